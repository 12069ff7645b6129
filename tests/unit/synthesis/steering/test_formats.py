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
        ("bullets", "- a\nThat is all.", None),
        ("bullets", "-a", None),
        ("bullets", "", None),
        ("numbers", "1. a\n2. b", 2),
        ("numbers", "1) a\n   - within\n2) b", 2),
        ("numbers", "1. a\n3. b", None),
        ("numbers", "2. a", None),
        ("table", "| a | b |\n|---|:-:|\n| 1 | 2 |\n| 3 | 4 |", 2),
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


def test_json_in_a_block_of_code_is_unclear() -> None:
    assert verdict_on_format("json", '```json\n{"a": 1}\n```') == "unclear"
    assert verdict_on_format("json", "```json\n{a: 1}\n```") == "breaks"
    assert json_value('{"a": null}') == {"a": None} and json_value("null") is None
