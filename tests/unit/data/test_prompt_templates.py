"""Prompt templates in promptsource's format run nothing, and name what is wrong."""

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_post.config.load import ConfigError
from megatron_post.config.yaml_text import read_yaml
from megatron_post.data.dialog import BadRow
from megatron_post.data.prompt_templates import PromptTemplate, read_templates

TEMPLATES = Path(__file__).with_name("t0_templates.yaml")


def apply(jinja: str, row: dict[str, Any], choices: str | None = None, number: int = 1) -> Any:
    return PromptTemplate("t", jinja, choices).apply(row, number=number)


def test_texts_of_a_row_are_no_templates_and_no_separators() -> None:
    row = {"text": "a ||| {{ 7 * 7 }} {% if %}", "options": ["x ||| y", "z"], "label": 0}
    found = apply("{{text}} ||| {{answer_choices[label]}}", row, "{{ options | join('|||') }}")
    assert found.prompt == "a ||| {{ 7 * 7 }} {% if %}"
    assert (found.completion, found.choices) == ("x ||| y", ("x ||| y", "z"))
    assert row["options"] == ["x ||| y", "z"]


def test_the_filters_of_promptsource_are_known_and_choice_depends_only_on_the_row() -> None:
    jinja = (
        "{{ items | choice }} {% for a, b in zip(items, items) %}{{a}}{% endfor %} ||| "
        "{{ items | most_frequent | join }}"
    )
    row = {"items": ["a", "b", "c", "b"]}
    drawn = [apply(jinja, row, number=number).prompt for number in range(30)]
    assert drawn == [apply(jinja, row, number=number).prompt for number in range(30)]
    assert {text[0] for text in drawn} == {"a", "b", "c"}
    assert apply(jinja, row).completion == "b" and apply(jinja, row).prompt.endswith(" abcb")


@pytest.mark.parametrize(
    "jinja", ["{% if x %}{{x}} ||| y{% endif %}", "{{y}} ||| {% if x %}{{x}}{% endif %}"]
)
def test_a_template_may_leave_a_row_out(jinja: str) -> None:
    """A null column of an Arrow file is absent, and is as false as null."""
    for row in ({"x": None, "y": "b"}, {"y": "b"}, {"x": "", "y": "b"}):
        assert apply(jinja, row) is None
    assert apply(jinja, {"x": "a", "y": "b"}) is not None


@pytest.mark.parametrize(
    ("jinja", "row", "reason"),
    [
        ("{{txt}} ||| a", {"text": "b"}, "'txt' is undefined"),
        ("{{text}} ||| {{answer_choices[label]}}", {"text": "b"}, "'label' is undefined"),
        ("{{text}} ||| a", {"text": None}, "prints a null value"),
        ("{{text}} ||| {{answer_choices[label]}}", {"text": "b", "label": 2}, "has no element 2"),
        ("{{text}} ||| {{answer_choices[label]}}", {"text": "b", "label": -1}, "a row without a label"),
        ("{{text}} ||| {{answer_choices[gold_label]}}", {"text": "b", "gold_label": -1}, "gold_label is -1"),
        ("{{text}} ||| a", {"text": "b", "answer_choices": ["a"]}, "a column answer_choices"),
        ("{{text}} ||| a ||| b", {"text": "b"}, "gives 2 ||| and not one"),
        ("{{text / 0}} ||| a", {"text": 1}, "division by zero"),
        ("{{text.__class__.__mro__}} ||| a", {"text": "b"}, "unsafe"),
        ("{{range(10 ** 9) | list}} ||| a", {}, "Range too big"),
    ],
)
def test_a_row_that_a_template_cannot_render_is_a_bad_row(jinja: str, row: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=re.escape(reason)):
        apply(jinja, row, "no ||| yes" if "answer_choices[" in jinja else None)


def test_the_digest_is_of_the_text_and_not_of_the_name() -> None:
    digests = [
        PromptTemplate(*args).digest for args in (("a", "x ||| y"), ("b", "x ||| y"), ("a", "x ||| z"))
    ]
    assert digests[0] == digests[1] != digests[2]
    assert PromptTemplate("a", "x ||| y", "y ||| z").digest != digests[0]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("{name: a, jinja: '{% if %} ||| b'}", "template 'a', line 1: "),
        ("{name: a, jinja: no separator}", "template 'a' has no |||"),
        ("{name: a}", "templates.k.jinja: missing"),
        ("{name: a, jinja: 'x ||| y', answer_choices: [x, y]}", "answer_choices: Input should be text"),
        ("{name: a, jinja: 'x ||| y', ansver_choices: x}", "ansver_choices: unknown key"),
        ("!!python/object/apply:os.system {name: a}", "the tag !!python/object/apply:os.system is refused"),
        ("!Template [a]", "the tag !Template is refused"),
        ("{name: !Template a}", "the tag !Template is refused"),
        ("{name: a, jinja: 'x ||| y'}\n  l: {name: a, jinja: 'z ||| y'}", "two templates have the name 'a'"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(tmp_path: Path, entry: str, reason: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(f"templates:\n  k: {entry}\n")
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        read_templates(file)
    assert str(file) in str(error.value)


def test_missing_files_and_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_templates(tmp_path / "none.yaml")
    with pytest.raises(
        ValueError, match=r"has no template 'glue_qqp_same' .did you mean 'glue_qqp_same_thing'"
    ):
        read_templates(TEMPLATES, ["glue_qqp_same"])
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match=re.escape("empty.yaml")):
        read_templates(tmp_path / "empty.yaml")


def test_tags_stay_refused_in_every_other_file() -> None:
    with pytest.raises(ValueError, match="the tag !Template is refused"):
        read_yaml("a: !Template {b: 1}")
