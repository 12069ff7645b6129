"""The page of a run: every section, and hostile rows that are shown as text."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from tests.scripted_server import ScriptedServer
from tests.unit.curation.place import Place, dialog

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202e{{ 7 * 7 }}</details></html>"


class _Tags(HTMLParser):
    """Collects the tags, the attributes and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name == "href"]

    def handle_data(self, data: str) -> None:
        self.text += data


def _page(place: Place) -> _Tags:
    return _Tags((place.run / "report.html").read_text())


def _judge(body: dict[str, Any]) -> str:
    text = body["messages"][-1]["content"]
    number = int(re.findall(r"number (\d+)", text)[-1])
    if "Accuracy" in text:
        mark = "yes" if number % 2 else "no"
        return f"Accuracy: {mark}\nInstructions: {mark}\nTone: {mark}"
    return f"Topic: {'code / python' if number % 3 else 'chat / small talk'}"


def test_sections(place: Place, encoder: Path) -> None:
    taxonomy = place.directory / "topics.yaml"
    taxonomy.write_text(
        yaml.safe_dump(
            {"topics": {"code": {"parts": {"python": None}}, "chat": {"parts": {"small talk": None}}}}
        )
    )
    ways = ("Tell me about", "Please tell me of", "What can you say about", "Describe")
    rows = [dialog(f"{ways[n % 4]} number {n}", f"It is number {n} of all.") for n in range(1, 61)]
    place.add_source("numbers", [{**row, "quality": n} for n, row in enumerate(rows)])
    with ScriptedServer(_judge) as server:
        place.add_judge(server.url)
        report = place.curate(
            {"kind": "exact_duplicates"},
            {"kind": "topics", "taxonomy": str(taxonomy), "judge": "judge"},
            {
                "kind": "quality",
                "reward": [{"name": "helpful", "models": ["rm"]}],
                "scores": {"rm": {"column": "quality"}},
                "topics": "topics",
                "marks": {"judge": "judge"},
            },
            {"kind": "semantic_duplicates", "encoder": str(encoder), "devices": ["cpu"], "threshold": 0.7,
             "order_by": ["quality.score"]},
            mixture={"categories": [
                {"name": "Code", "where": {"topics.coarse": ["code"]}, "share": 1},
                {"name": "Chat", "where": {"topics.coarse": ["chat"]}, "share": 1, "turns": 2.5},
            ]},
        )  # fmt: skip
    page = _page(place)
    kept = {step["name"]: step["rows"] - step["dropped"] for step in report["steps"]}
    for text in (
        "Topics by topics",
        "Reward and judge by quality",
        # The top quarter has 46 to 60, and odd numbers have full marks. 8 + 23 rows have only one of the two.
        "Of 60 rows that have both, the two differ on 31 (51.7%)",
        "Mixture of dialogs",
        "quality.score: 60 row(s)",
        "semantic_duplicates.cosine",
        "cosine 0.",
        "dropped by semantic_duplicates: semantic duplicate",
        "dropped by quality: low reward and marks",
        "Random rows that are kept",
    ):
        assert text in page.text, text
    assert f"{kept['semantic_duplicates']:,}" in page.text and kept["semantic_duplicates"] == report["kept"]


def test_hostile_text_is_shown_as_text(place: Place) -> None:
    rows = [dialog(HOSTILE, HOSTILE), dialog(HOSTILE, HOSTILE), dialog("<b>x</b>" * 2000, "y")]
    place.add_source("<i>bad", rows)
    place.curate({"kind": "exact_duplicates"}, {"kind": "lengths", "most_turns": 1})
    page = _page(place)
    assert not {"script", "img", "b>x", "i"} & {*page.tags}
    assert not {"onerror", "src", "onload"} & page.attributes
    assert "<script>alert(1)</script>" in page.text and "{{ 7 * 7 }}" in page.text
    assert "\x1b" not in page.text and "\u202e" not in page.text
    assert "more characters]" in page.text
    assert page.tags.count("html") == 1
    # nothing is loaded from elsewhere
    assert "link" not in page.tags and all(link.startswith("#") for link in page.links)


def test_ten_random_rows_of_a_source(place: Place) -> None:
    """Without topics the groups are the sources. The rows depend on the seed, and not on the order."""
    place.add_source("many", [dialog(f"Question {n}", "Answer.") for n in range(200)])
    place.curate({"kind": "encoding"})
    first = re.findall(r"Question \d+", _page(place).text.split("Random rows")[1])
    assert len({*first}) == 10 and {*first} != {f"Question {n}" for n in range(10)}
    place.curate(seed=1)
    second = re.findall(r"Question \d+", _page(place).text.split("Random rows")[1])
    # no column depends on the seed here, so only the selection is written again
    assert {*second} != {*first}


def test_a_page_without_rows(place: Place) -> None:
    place.add_source("one", [dialog("Hello", "Hi")])
    report = place.curate({"kind": "lengths", "least_characters": 100})
    assert report["kept"] == 0
    assert "No row is kept." in _page(place).text


def test_a_row_with_tools_and_reasoning(place: Place) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": "Rome"})}}
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "no"},
        {"role": "assistant", "content": "No.", "reasoning_content": "The tool says no."},
    ]
    tool = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}  # fmt: skip
    place.add_source("tools", [{"messages": messages, "tools": [tool]}])
    place.curate({"kind": "lengths", "most_turns": 5}, reasoning="render")
    text = _page(place).text
    assert "weather(" in text and "Rome" in text and "The tool says no." in text


def test_a_removed_page_is_written_again(place: Place) -> None:
    place.add_source("one", [dialog("Hello", "Hi")])
    place.curate({"kind": "encoding"})
    before = (place.run / "report.html").read_bytes()
    (place.run / "report.html").unlink()
    place.curate()
    assert (place.run / "report.html").read_bytes() == before
