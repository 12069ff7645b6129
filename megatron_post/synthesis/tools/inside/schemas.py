"""Runs in the sandbox, and imports nothing of the package: JSON schemas of parameters, and what fits them."""

from collections.abc import Iterator
from typing import Any

_LISTS = ("allOf", "anyOf", "oneOf")  # keywords whose schemas apply to the value itself
_ONES = ("not", "if", "then", "else")
_MAPPINGS = ("dependentSchemas", "$defs", "definitions")
_INNER_ONES = ("items", "additionalProperties", "contains")  # keywords whose schemas apply to parts of it
_INNER_MAPPINGS = ("properties", "patternProperties")


def fault_of(schema: Any) -> str:
    """What is wrong with a schema of parameters, or nothing."""
    import jsonschema

    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        return error.message
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        return "its parameters are no object"
    for part in _within(schema):
        properties = part.get("properties")
        missing = set(part.get("required", ())) - set(properties or ())
        is_whole = not part.keys() & {"$ref", *_LISTS} and (part is schema or properties is not None)
        if missing and is_whole:
            return f"{sorted(missing)[0]} is required and not described"
    return _fault_of_references(schema)


def _within(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield a schema and all schemas in it."""
    from referencing.jsonschema import DRAFT202012

    if isinstance(schema, dict):
        yield schema
        for inner in DRAFT202012.create_resource(schema).subresources():
            yield from _within(inner.contents)


def _fault_of_references(schema: dict[str, Any]) -> str:
    """Why a reference in a schema cannot be followed, or nothing.

    A schema that applies itself to the same value would have no end. One that applies itself to a part of the
    value, such as that of a tree, ends with the value.
    """
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    resolver = Registry().with_resource("", DRAFT202012.create_resource(schema)).resolver()

    def same_value(part: dict[str, Any]) -> Iterator[Any]:
        yield from (resolver.lookup(part[name]).contents for name in ("$ref", "$dynamicRef") if name in part)
        yield from (each for name in _LISTS for each in part.get(name, ()))
        yield from (part[name] for name in _ONES if name in part)
        yield from part.get("dependentSchemas", {}).values()

    finished: set[int] = set()

    def has_end(part: Any, above: tuple[int, ...] = ()) -> bool:
        if id(part) in above:
            return False
        if isinstance(part, dict) and id(part) not in finished:
            if not all(has_end(each, (*above, id(part))) for each in same_value(part)):
                return False
            finished.add(id(part))
        return True

    try:
        ends = all(has_end(part) for part in _within(schema))
    except Unresolvable as error:
        return f"the reference {error.ref} leads nowhere"
    return "" if ends else "a schema refers to itself without an end"


def strict(schema: Any, *, closed: bool = True) -> Any:
    """A schema in which objects with described properties may have no others, at any depth.

    closed: whether this schema itself gets the rule. Parts of `allOf` and the like do not get it, because
    each of them describes some of the properties. The schema around them gets it.
    """
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for name in {*_LISTS, "prefixItems"} & found.keys():
        found[name] = [strict(each, closed=name == "prefixItems") for each in found[name]]
    for name in {*_ONES, *_INNER_ONES} & found.keys():
        found[name] = strict(found[name], closed=name in _INNER_ONES)
    for name in {*_MAPPINGS, *_INNER_MAPPINGS} & found.keys():
        inner = name in _INNER_MAPPINGS
        found[name] = {key: strict(each, closed=inner) for key, each in found[name].items()}
    if closed and found.keys() & {"properties", "$ref", *_LISTS}:
        found.setdefault("unevaluatedProperties", False)
    return found


def check_arguments(name: str, schema: dict[str, Any], arguments: Any) -> None:
    """Raises `ValueError` for arguments of the function `name` that do not fit the schema."""
    import jsonschema

    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {name} are no object")
    validator = jsonschema.Draft202012Validator(strict({"properties": {}, **schema}))
    if errors := sorted(validator.iter_errors(arguments), key=str):
        place = "".join(f"[{part!r}]" for part in errors[0].absolute_path)
        raise ValueError(f"{name}: the arguments{place}: {errors[0].message}"[:500])
