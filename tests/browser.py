"""A real browser for tests of pages: Chromium of the machine, driven by the package playwright."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def running_browser() -> Iterator[Any]:
    """Skips the test if the package or the browser is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        # As root, Chromium starts only without its sandbox.
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@contextlib.contextmanager
def opened(context: Any, path: Path) -> Iterator[Any]:
    """A page in a tab. The test fails if the page has an error or asks for anything but itself."""
    page = context.new_page()
    errors, requests = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    yield page
    assert errors == []
    # an export is a file of the page itself
    assert [url for url in requests if not url.startswith("blob:")] == [path.as_uri()]
    page.close()


def layout_problems(page: Any) -> list[str]:
    """Texts that are cut, cover another text or lack contrast, charts without a name, and a page too wide."""
    found: list[str] = page.evaluate(_PROBLEMS)
    return found


# A text may scroll in its own box, but nothing may hide a part of it. WCAG asks for a contrast of 4.5.
_PROBLEMS = """() => {
  const problems = [];
  for (const details of document.querySelectorAll("details")) details.open = true;
  const window_width = document.documentElement.clientWidth;
  const wide = document.documentElement.scrollWidth;
  if (wide > window_width) problems.push(`the page is ${wide} px wide in a window of ${window_width} px`);
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = numbers(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  // the part of a box that its scrolling ancestors show
  const seen = (element, box) => {
    let {left, right, top, bottom} = box;
    for (let at = element; at; at = at.parentElement) {
      if (!/auto|scroll/.test(getComputedStyle(at).overflow)) continue;
      const own = at.getBoundingClientRect();
      left = Math.max(left, own.left); right = Math.min(right, own.right);
      top = Math.max(top, own.top); bottom = Math.min(bottom, own.bottom);
    }
    return {left, right, top, bottom};
  };
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement, style = getComputedStyle(element);
    if (!node.data.trim() || element.closest("script, style, title, noscript, textarea")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const svg = element.closest("svg");
    const boxes = svg ? [element.getBoundingClientRect()] : [...range.getClientRects()];
    const words = node.data.trim().slice(0, 40), box = (svg || element).getBoundingClientRect();
    for (const each of boxes) {
      if (each.width < 1 || each.height < 1) continue;
      texts.push({words, node, box: seen(element, each)});
      if (svg) {
        const across = each.left < box.left - 1 || each.right > box.right + 1;
        if (across || each.top < box.top - 1 || each.bottom > box.bottom + 1)
          problems.push(`"${words}" is cut by its chart`);
      } else if (!element.closest(".wide, .text") && (each.right > window_width + 1 || each.left < -1))
        problems.push(`"${words}" is outside of the window`);
    }
    if (svg && boxes[0].height > 0 && parseFloat(style.fontSize) * box.width / svg.viewBox.baseVal.width < 10)
      problems.push(`"${words}" is smaller than 10 px`);
    for (let at = element; at && !svg; at = at.parentElement) {
      const own = getComputedStyle(at);
      if (own.overflowX === "hidden" && at.scrollWidth > at.clientWidth + 1)
        problems.push(`"${words}" is cut`);
    }
    const ink = light(numbers(svg ? style.fill : style.color)), back = light(ground(element));
    const contrast = (Math.max(ink, back) + 0.05) / (Math.min(ink, back) + 0.05);
    if (contrast < 4.5 && !element.closest(":disabled"))
      problems.push(`"${words}" has a contrast of ${contrast.toFixed(2)}`);
  }
  texts.sort((a, b) => a.box.top - b.box.top);
  texts.forEach((a, i) => {
    for (let j = i + 1; j < texts.length && texts[j].box.top < a.box.bottom - 2; j++) {
      const b = texts[j];
      const across = Math.min(a.box.right, b.box.right) - Math.max(a.box.left, b.box.left);
      const down = Math.min(a.box.bottom, b.box.bottom) - Math.max(a.box.top, b.box.top);
      if (a.node !== b.node && across > 1 && down > 2) problems.push(`"${a.words}" covers "${b.words}"`);
    }
  });
  for (const drawing of document.querySelectorAll("svg, .bar"))
    if (drawing.getAttribute("role") !== "img" || !drawing.getAttribute("aria-label"))
      problems.push("a drawing has no accessible name");
  const ids = [...document.querySelectorAll("[id]")].map(element => element.id);
  if (new Set(ids).size !== ids.length) problems.push(`${ids.length - new Set(ids).size} ids are double`);
  if (!document.title || !document.documentElement.lang)
    problems.push("the page has no title or no language");
  return problems;
}"""
