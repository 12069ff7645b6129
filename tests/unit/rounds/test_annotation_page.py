"""A person compares pairs in a real browser: rates, edits, comes back, exports, and the answers are imported.

The tests need the package playwright and the Chromium of the machine (`apt-get install chromium`).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_post.rounds.annotation.answers import import_answers
from megatron_post.rounds.annotation.export import export_pairs
from megatron_post.rounds.annotation.settings import Annotation
from megatron_post.storage.files import read_lines, write_lines
from tests.browser import opened as open_page
from tests.browser import running_browser
from tests.unit.rounds.test_annotation import MODELS, sample

HOSTILE = "Two lines,\r\n<b>not bold</b> \u202e\x07\x1b[31m end </script><script>document.title = 1</script>"
SHOWN = (
    "Two lines,\n<b>not bold</b> \\u{202e}\\u{7}\\u{1b}[31m end </script><script>document.title = 1</script>"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with running_browser() as running:
        yield running


@pytest.fixture
def pairs(tmp_path: Path) -> list[dict[str, Any]]:
    """Four pairs. The text of one response is hostile."""
    rows = [
        sample(prompt, model, HOSTILE if (prompt, name) == (2, "new") else f"The {name} answer to {prompt}.")
        for name, model in zip(("old", "new"), MODELS, strict=True)
        for prompt in range(1, 5)
    ]
    write_lines(tmp_path / "samples.jsonl", rows)
    export_pairs(
        [tmp_path / "samples.jsonl"], tmp_path / "annotate", tmp_path / "key.jsonl", Annotation(), seed=3
    )
    return list(read_lines(tmp_path / "annotate" / "pairs.jsonl"))


def opened(context: Any, directory: Path) -> contextlib.AbstractContextManager[Any]:
    return open_page(context, directory / "annotate" / "annotate-1.html")


def rate(page: Any, label: str) -> None:
    page.get_by_label(label, exact=True).check()


def export(page: Any, target: Path) -> list[dict[str, Any]]:
    with page.expect_download() as started:
        page.get_by_role("button", name="Export the answers").click()
    target.parent.mkdir(exist_ok=True)
    started.value.save_as(target)
    return list(read_lines(target))


def test_rate_edit_export_import(browser: Any, pairs: list[dict[str, Any]], tmp_path: Path) -> None:
    """The answers of two visits are exported, and their preferences are those that were chosen."""
    context = browser.new_context(accept_downloads=True)
    with opened(context, tmp_path) as page:
        assert page.get_by_role("heading", name="Pair 1 of 4").is_visible()
        assert page.locator("#text-a").inner_text() == pairs[0]["a"]
        assert page.locator("#prompt").inner_text().split() == [
            "user",
            *pairs[0]["prompt"][0]["content"].split(),
        ]
        assert page.get_by_role("textbox").count() == 0
        rate(page, "B is significantly better")
        editor = page.get_by_role("textbox", name="Edit response B")
        assert editor.input_value() == pairs[0]["b"]
        editor.press("End")
        editor.press_sequentially(" It is\nbetter. ")
        assert editor.input_value() == f"{pairs[0]['b']} It is\nbetter. "
        page.get_by_role("button", name="Next", exact=True).click()
        rate(page, "A is marginally better")
        assert page.get_by_text("2 of 4 pairs answered").is_visible()
    # The page was closed without an export. A new tab of the same browser has the answers.
    with opened(context, tmp_path) as page:
        assert page.get_by_text("2 of 4 pairs answered").is_visible()
        assert page.get_by_label("B is significantly better").is_checked()
        assert page.get_by_role("textbox").input_value() == f"{pairs[0]['b']} It is\nbetter. "
        page.get_by_role("button", name="Next unanswered pair").click()
        assert page.get_by_role("heading", name="Pair 3 of 4").is_visible()
        rate(page, "Leave this pair out")
        page.get_by_role("button", name="Next", exact=True).click()
        rate(page, "B is slightly better")
        rate(page, "A is better")
        assert page.get_by_role("button", name="Next", exact=True).is_disabled()
        rows = export(page, tmp_path / "answers" / "one.jsonl")
        assert page.get_by_text("Exported 4 of 4 answers").is_visible()
    ids = [pair["pair"] for pair in pairs]
    edited = f"{pairs[0]['b']} It is\nbetter. "
    assert rows == [
        {"pair": ids[0], "better": "b", "rating": "significantly_better", "edited": edited},
        {"pair": ids[1], "better": "a", "rating": "marginally_better"},
        {"pair": ids[2], "left_out": True},
        {"pair": ids[3], "better": "a", "rating": "better"},
    ]
    output = tmp_path / "preferences.jsonl"
    found = import_answers(tmp_path / "annotate", tmp_path / "key.jsonl", tmp_path / "answers", output)
    assert list(found.counts.values()) == [3, 1, 1, 0, 0, 0]
    first, second, third = read_lines(output)
    assert [first[name][0]["content"] for name in ("edited", "chosen", "rejected")] == [
        edited,
        pairs[0]["b"],
        pairs[0]["a"],
    ]
    assert second["chosen"][0]["content"] == pairs[1]["a"] and "edited" not in second
    assert (third["chosen"][0]["content"], third["rating"]) == (pairs[3]["a"], "better")
    context.close()


def test_an_edit_that_cannot_be_used_is_no_answer(
    browser: Any, pairs: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The page says why at once, and `import` gets no such row."""
    context = browser.new_context(accept_downloads=True)
    with opened(context, tmp_path) as page:
        rate(page, "A is better")
        editor = page.get_by_role("textbox")
        for text, message in (
            (" ", "The edited response is blank"),
            ("Yes.<|eot_id|>", "has <|eot_id|>, which is a mark of a chat template"),
            (pairs[0]["b"], "the text of response B"),
        ):
            editor.fill(text)
            assert message in page.get_by_role("alert").inner_text()
            assert editor.get_attribute("aria-invalid") == "true"
            assert page.get_by_text("0 of 4 pairs answered").is_visible()
        assert export(page, tmp_path / "none.jsonl") == []
        assert page.get_by_text("The edits of these pairs cannot be used: 1.").is_visible()
        # The edit belongs to response A, and does not change response B.
        rate(page, "B is better")
        assert editor.input_value() == pairs[0]["b"]
        rate(page, "A is better")
        page.get_by_role("button", name="Restore the response").click()
        assert editor.input_value() == pairs[0]["a"]
        (row,) = export(page, tmp_path / "one.jsonl")
        assert row == {"pair": pairs[0]["pair"], "better": "a", "rating": "better"}
    context.close()


def test_a_hostile_text_is_shown_as_text(browser: Any, pairs: list[dict[str, Any]], tmp_path: Path) -> None:
    """Its marks are visible and its tags are text. Without a change of the text there is no edit."""
    context = browser.new_context(accept_downloads=True)
    number = next(n for n, pair in enumerate(pairs) if HOSTILE in (pair["a"], pair["b"]))
    side = "A" if pairs[number]["a"] == HOSTILE else "B"
    with opened(context, tmp_path) as page:
        for _ in range(number):
            page.get_by_role("button", name="Next", exact=True).click()
        shown = page.locator(f"#text-{side.lower()}")
        assert shown.inner_text() == SHOWN
        assert shown.locator("*").count() == 0 and page.title() == "Compare responses"
        rate(page, f"{side} is better")
        assert page.get_by_text("This text has invisible characters").is_visible()
        editor = page.get_by_role("textbox")
        editor.fill(editor.input_value() + "x")
        editor.press("Backspace")
        (row,) = export(page, tmp_path / "one.jsonl")
        assert "edited" not in row
    context.close()


def load(page: Any, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Load exported answers").click()
    chooser.value.set_files(path)


def test_an_export_continues_in_another_browser(
    browser: Any, pairs: list[dict[str, Any]], tmp_path: Path
) -> None:
    """A new context has no storage, as another machine. Answers that it has already are kept."""
    context = browser.new_context(accept_downloads=True)
    with opened(context, tmp_path) as page:
        rate(page, "B is better")
        page.get_by_role("textbox").fill("Edited,\nand better.")
        page.get_by_role("button", name="Next", exact=True).click()
        rate(page, "Leave this pair out")
        page.get_by_role("button", name="Next", exact=True).click()
        rate(page, "A is better")
        first = export(page, tmp_path / "first.jsonl")
    context.close()
    context = browser.new_context(accept_downloads=True)
    with opened(context, tmp_path) as page:
        for _ in range(2):
            page.get_by_role("button", name="Next", exact=True).click()
        rate(page, "B is slightly better")
        load(page, tmp_path / "first.jsonl")
        page.get_by_text("2 of 3 answers loaded from first.jsonl.").wait_for()
        assert page.get_by_text("which is kept: 1.").is_visible()
        assert page.get_by_text("3 of 4 pairs answered").is_visible()
        assert page.locator("#refused").inner_text() == ""
        kept = {"pair": pairs[2]["pair"], "better": "b", "rating": "slightly_better"}
        assert export(page, tmp_path / "second.jsonl") == [*first[:2], kept]
    # A later visit has what was loaded.
    with opened(context, tmp_path) as page:
        assert page.get_by_text("3 of 4 pairs answered").is_visible()
        assert page.get_by_role("textbox").input_value() == "Edited,\nand better."
    context.close()


def test_lines_of_a_loaded_file_that_are_no_answers(
    browser: Any, pairs: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Each is named with its reason, and the others are loaded."""
    here = pairs[0]["pair"]
    lines = {
        "{broken": "it is not JSON",
        "null": "its pair is not on this page",
        '{"pair": "<b>other</b>", "better": "a", "rating": "better"}': "its pair is not on this page",
        f'{{"pair": "{here}", "better": "c", "rating": "better"}}': "it has no rating of this page",
        f'{{"pair": "{here}", "left_out": false}}': "it has no rating of this page",
        f'{{"pair": "{here}", "better": "a", "rating": "better", "edited": 3}}': "edited is not a text",
    }
    good = f'{{"pair": "{here}", "better": "a", "rating": "better", "edited": null}}'
    file = tmp_path / "<b>x.jsonl"
    file.write_text("\r\n".join([*lines, "", good]))
    context = browser.new_context(accept_downloads=True)
    with opened(context, tmp_path) as page:
        load(page, file)
        page.get_by_text("1 of 7 answers loaded from <b>x.jsonl.").wait_for()
        shown = page.locator("#refused").inner_text()
        reasons = "; ".join(f"line {number}: {reason}" for number, reason in enumerate(lines.values(), 1))
        assert shown == f"Lines that cannot be used: 6. {reasons}"
        rows = export(page, tmp_path / "out.jsonl")
        assert rows == [{"pair": here, "better": "a", "rating": "better"}]
        file.write_bytes(b"\xff\x00\n" * 50)
        load(page, file)
        page.get_by_text("0 of 50 answers loaded").wait_for()
        assert len(page.locator("#refused").inner_text()) < 500
    context.close()


def test_long_texts_and_texts_from_right_to_left(browser: Any, tmp_path: Path) -> None:
    """A long text scrolls in its box, by the keyboard too. A line has the direction of its letters."""
    texts = ("word " * 20_000 + "x" * 50_000, "\u0645\u0631\u062d\u0628\u0627 abc.\nabc.")
    rows = [sample(1, model, text) for model, text in zip(MODELS, texts, strict=True)]
    write_lines(tmp_path / "s.jsonl", rows)
    export_pairs([tmp_path / "s.jsonl"], tmp_path / "annotate", tmp_path / "key.jsonl", Annotation(), seed=3)
    (pair,) = read_lines(tmp_path / "annotate" / "pairs.jsonl")
    long, arabic = ("a", "b") if pair["a"] == texts[0] else ("b", "a")
    context = browser.new_context(viewport={"width": 500, "height": 900}, accept_downloads=True)
    with opened(context, tmp_path) as page:
        box = page.locator(f"#text-{long}")
        assert box.inner_text() == texts[0] and box.bounding_box()["height"] <= 0.75 * 900
        assert box.get_attribute("tabindex") == "0"
        assert page.locator(f"#text-{arabic}").get_attribute("tabindex") is None
        assert page.evaluate("document.documentElement.scrollWidth") <= 500
        # The first line starts at the right of the box, and the second at its left.
        first, second = page.evaluate(LINE_STARTS, f"text-{arabic}")
        assert first > 400 and second < 100
        rate(page, f"{long.upper()} is better")
        editor = page.get_by_role("textbox")
        editor.press("Control+End")
        editor.press_sequentially("end")
        (row,) = export(page, tmp_path / "out.jsonl")
        assert row["edited"] == texts[0] + "end"
    context.close()


# The horizontal places of the first character of each line, in pixels.
LINE_STARTS = """id => {
  const text = document.getElementById(id).firstChild, range = document.createRange();
  return [0, text.data.indexOf("\\n") + 1].map(start => {
    range.setStart(text, start);
    range.setEnd(text, start + 1);
    return range.getBoundingClientRect().left;
  });
}"""


def test_the_keyboard_is_enough(browser: Any, pairs: list[dict[str, Any]], tmp_path: Path) -> None:
    """Tab reaches every part in order, the arrow keys choose, and Enter on "Next" focuses the next pair."""
    context = browser.new_context()
    with opened(context, tmp_path) as page:
        focused = "document.activeElement.value || document.activeElement.textContent.trim()"
        page.keyboard.press("Tab")
        assert page.evaluate(focused) == "How to compare"
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        assert page.evaluate(focused) == "a significantly_better"
        page.keyboard.press("ArrowDown")
        assert page.get_by_label("A is better", exact=True).is_checked()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "edit"
        page.keyboard.press("Tab")
        assert page.evaluate(focused) == "Next"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "heading"
        assert page.get_by_role("heading", name="Pair 2 of 4").is_visible()
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_in_light_and_dark(
    browser: Any, pairs: list[dict[str, Any]], tmp_path: Path, scheme: str
) -> None:
    """At 500 px nothing is wider than the window. Text has the contrast of 4.5 that WCAG asks for."""
    context = browser.new_context(viewport={"width": 500, "height": 900}, color_scheme=scheme)
    with opened(context, tmp_path) as page:
        rate(page, "A is better")
        assert page.evaluate("document.documentElement.scrollWidth") <= 500
        boxes = [page.locator(f"#text-{side}").bounding_box() for side in "ab"]
        assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]
        assert all(page.evaluate(CONTRASTS)[name] >= 4.5 for name in ("text", "message", "button", "warning"))
    context.close()


# The contrast of a text with its background, by WCAG 2's formula. The body has the browser's own colours.
CONTRASTS = """() => {
  const canvas = document.createElement("div");
  canvas.style.cssText = "color: CanvasText; background: Canvas";
  document.body.append(canvas);
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const back = element => {
    const found = numbers(getComputedStyle(element).backgroundColor);
    return found.length === 4 && found[3] === 0 ? numbers(getComputedStyle(canvas).backgroundColor) : found;
  };
  const contrast = selector => {
    const element = document.querySelector(selector);
    const text = light(numbers(getComputedStyle(element).color)), ground = light(back(element));
    return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
  };
  const shown = {text: "#text-a", message: ".message", button: "button.main", warning: "#problem"};
  const found = Object.fromEntries(Object.entries(shown).map(([name, one]) => [name, contrast(one)]));
  canvas.remove();
  return found;
}"""
