"""The page of every key is the schemas'."""

from tests.config_keys import KINDS, PAGE, keys, page, schema_of

HINT = "run `python -m tests.config_keys`"


def _cells(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")
    ]


def test_the_page_has_every_key_with_its_type_and_default() -> None:
    """What a description says may be a step behind the code: it is words."""
    here, wanted = _cells(PAGE.read_text()), _cells(page())
    assert [row[:3] for row in here] == [row[:3] for row in wanted], HINT
    assert all(row[3] for row in here), "every key needs a description in its schema"


def test_keys_are_those_of_the_schema() -> None:
    found = {kind: {key for key, *_ in keys(schema_of(kind))} for kind in KINDS}
    assert {"stage", "model.rope_scaling.factor", "data.sources.*.path", "checkpoint.every"} <= found["run"]
    assert {"select.verifier (exact).pattern", "generate.backend (vllm).tensor_parallel"} <= found["round"]
    assert {"steps.*.after", "run_dir"} <= found["chain"]
