"""Formats of whole replies and the number of their items."""

import pytest

from megatron_post.synthesis.steering.formats import Format, items_in, json_value, verdict_on_format


@pytest.mark.parametrize(
    ("name", "text", "items"),
    [
        ("json", "[1, 2]", 2),
        ("json", '{"a": 1}', 0),
        ("json", "NaN", None),
        ("json", "Here it is: [1]", None),
        ("json", "[" * 100_000, None),
        ("bullets", "- a\n- b\n\n- c", 3),
        ("bullets", "* a\n  more of a\n  - within\n* b", 2),
        ("bullets", "Here:\n- a", None),
        ("bullets", "- a\n\nThat is all.", None),
        ("bullets", "That is all.\n- a", None),
        ("bullets", "+ a\n+ b", 2),
        ("bullets", "• a\n• b", 2),
        ("bullets", "-a", None),
        ("bullets", "", None),
        ("numbers", "1. a\n2. b", 2),
        ("numbers", "1) a\n   - within\n2) b", 2),
        ("numbers", "(1) a\n(2) b", 2),
        ("numbers", "1. a\n\nThat is all.", None),
        ("table", "| a | b |\n|---|:-:|\n| 1 | 2 |\n| 3 | 4 |", 2),
        ("table", "a | b\n---|---\n1 | 2", 1),
        ("table", "| a |\n| --- |\n| 1 |", 1),
        ("table", "a\n---\nb", None),
        ("table", "| a | b |\n|---|---|", None),
        ("table", "| a | b |\n| 1 | 2 |\n| 3 | 4 |", None),
        ("table", "| a |\n|---|\n| 1 |\nThat is all.", None),
    ],
)
def test_items_of_a_whole_reply(name: Format, text: str, items: int | None) -> None:
    assert items_in(name, text) == items
    assert verdict_on_format(name, text) == ("breaks" if items is None else "follows")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("The sky is blue - and 3 * 4 is 12.\n\nIt's wide.", "follows"),
        ("# Sky", "breaks"),
        ("It is **blue**.", "breaks"),
        ("Items:\n- a", "unclear"),
        ("__init__ is a name.", "unclear"),
        ("```\nprint\n```", "breaks"),
        ("Use `print`.", "breaks"),
        ("[sky](x)", "breaks"),
        ("| a |", "breaks"),
    ],
)
def test_plain_text_has_no_markdown(text: str, verdict: str) -> None:
    assert verdict_on_format("plain", text) == verdict


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("numbers", "1. a\n1. b"),
        ("numbers", "2. a\n3. b"),
        ("numbers", "1. a\nand more\n2. b"),
        ("bullets", "- a\nThat is all."),
    ],
)
def test_a_list_that_not_every_reader_accepts_is_unclear(name: Format, text: str) -> None:
    assert verdict_on_format(name, text) == "unclear"


def test_a_key_in_an_object_twice_is_not_json() -> None:
    assert verdict_on_format("json", '{"a": 1, "a": 2}') == "breaks"


def test_json_in_a_block_of_code_is_unclear() -> None:
    assert verdict_on_format("json", '```json\n{"a": 1}\n```') == "unclear"
    assert verdict_on_format("json", "```json\n{a: 1}\n```") == "breaks"
    assert json_value('{"a": null}') == {"a": None} and json_value("null") is None
