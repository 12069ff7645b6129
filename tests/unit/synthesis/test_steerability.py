"""Steerability: which system prompts are used, which dialogs follow them, and the preferences for it."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from megatron_post.config.data import Source
from megatron_post.data.dialog import Dialog, Preference
from megatron_post.data.rows import BadRows, read_rows
from megatron_post.storage.files import read_lines
from megatron_post.storage.reading import read_object
from megatron_post.synthesis.steering.rules import Rules, checked
from megatron_post.synthesis.steering.system_prompt import Kind, system_prompt
from tests.documentation import ROOT
from tests.scripted_server import ScriptedServer
from tests.unit.synthesis.conftest import Place
from tests.unit.synthesis.director import LONG, SHORT, answer, fault, seed

pytest.importorskip("py3langid")
NONE, NO_PROMPT = "no dialog follows its system prompt", "no system prompt can be used"
LIST = "the list of system prompts"
# rows and preferences of two system prompts with two turns each, or why there are none
EXPECTED: dict[str, tuple[int, int] | str] = {
    "good": (4, 4),
    "obedient": (4, 4),
    "lasting": (4, 0),
    "unhelpful": (4, 4),
    "tiring": (2, 2),
    "curt": (2, 2),
    "interrupted": (2, 2),
    "many": (4, 4),
    "disobedient": NONE,
    "cut": NONE,
    "unclear": NONE,
    "off_scale": NONE,
    "loose": NONE,
    "faulty": NO_PROMPT,
    "object": f"{LIST} is not a list",
    "broken": f"{LIST} is not JSON",
    "prose": f"{LIST} is missing",
    "stopped": f"{LIST} is cut off",
    "refused": "refused by a model",
}
FILES = ("rows.jsonl", "preferences.jsonl", "dropped.jsonl", "report.html")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ScriptedServer(answer, fault) as server:
        yield Place(tmp_path, server)


def _run(place: Place, seeds: list[dict[str, Any]], *, size: int = 1, **settings: Any) -> str:
    path = place.directory / "seeds.jsonl"
    path.write_text("".join(json.dumps(seed) + "\n" for seed in seeds))
    backend = {"kind": "server", "url": place.server.url, "served_model": "author", "timeout": 20.0}
    author = {"model": "author", "backend": backend, "sampling": {"max_tokens": 4096}}
    printed = ""
    for rank in reversed(range(size)):
        printed = place.run(
            rank=rank,
            size=size,
            recipe="steerability",
            settings={"variants": 2, "turns": 2, "samples": 3, **settings},
            input={"kind": "rows", "path": str(path)},
            models={"author": author, "judge": "author"},
            max_failed=0.5,
        )
    return printed


def _by_seed(rows: list[dict[str, Any]]) -> Counter[int]:
    return Counter(int(row["provenance"]["source"].rpartition(":")[2]) for row in rows)


def test_exactly_the_right_rows_come_out(place: Place) -> None:
    printed = _run(place, [seed(manner) for manner in EXPECTED])
    rows, preferences = place.rows(), place.rows("preferences.jsonl")
    dropped = {int(row["source"].rpartition(":")[2]): row["reason"] for row in place.rows("dropped.jsonl")}
    counts = _by_seed(rows), _by_seed(preferences)
    found = {
        manner: dropped[number] if number in dropped else (counts[0][number], counts[1][number])
        for number, manner in enumerate(EXPECTED, start=1)
    }
    assert found == EXPECTED
    assert f"{len(rows) + len(preferences)} rows ({len(preferences)} of them preferences)" in printed
    steps = read_object(place.output / "summary.json", "summary")["summary"]["steps"]
    assert steps["write"]["results"] == {
        "repeated system prompt": 2,
        "more system prompts than asked for": 1,
        "a rule that its text does not state: most_words": 1,
        "no rule on the length": 1,
        "a system prompt or rules in another form": 1,
        "no object with `system` and `rules`": 1,
    }
    assert steps["agree"]["results"] == {"same": 24, "different": 2}
    assert steps["user"]["results"] == {"cut off": 2}
    assert steps["rules"]["results"].keys() == {
        f"most_words: {each}" for each in ("follows", "breaks", "unclear")
    }
    assert {row["kind"] for row in rows} == {"length"}
    assert {row["kind"] for row in preferences} == {"length preference"}


def test_what_is_chosen_follows_and_what_is_rejected_does_not(place: Place) -> None:
    _run(place, [seed("good"), seed("obedient"), seed("unhelpful")])
    source = Source(name="s", path=str(place.output / "rows.jsonl"))
    for _, dialog in read_rows(source, bad_rows=BadRows()):
        assert isinstance(dialog, Dialog) and dialog.messages[0].role == "system"
        trained = [message.trained for message in dialog.messages if message.role == "assistant"]
        assert trained == [False] * (dialog.turns - 1) + [True]
    for row in place.rows():
        (result,) = checked(Rules.model_validate(row["rules"]), row["messages"][-1]["content"]).values()
        assert result == "follows" and len(row["messages"]) == 1 + 2 * row["turn"]
    source = Source(name="s", path=str(place.output / "preferences.jsonl"))
    read = [example for _, example in read_rows(source, bad_rows=BadRows())]
    assert len(read) == 12
    for preference in read:
        assert isinstance(preference, Preference)
        chosen, rejected = (response[0].content for response in preference.responses)
        manner = preference.prompt[0].content.split()[-2]
        wanted = {"good": "It is blue, says 1.", "obedient": SHORT, "unhelpful": "It is blue, says 2."}
        assert chosen == wanted[manner] and rejected == LONG


def test_a_tone_is_judged(place: Place) -> None:
    """Two system prompts of each seed, two turns each. No rule and no agreement with rules is checked."""
    _run(place, [seed("good", "tone"), seed("disobedient", "tone")])
    assert len(place.rows()) == len(place.rows("preferences.jsonl")) == 4
    steps = read_object(place.output / "summary.json", "summary")["summary"]["steps"]
    assert "rules" not in steps and "agree" not in steps
    assert steps["judge"]["results"] == {"follows": 8, "breaks": 6}


def test_a_seed_with_a_fault_fails_with_its_reason(place: Place) -> None:
    bad = {"kind": "length", "system": "Be brief.", "rules": {"most_words": 5}}
    _run(
        place,
        [*[seed("good")] * 3, bad, {"kind": "mood", "system": "Be kind."}, {"prompt": "Hello"}],
        samples=2,
    )
    details = [row["detail"] for row in place.rows("dropped.jsonl")]
    assert "this seed has a rule that its text does not state: most_words" in details[0]
    assert "'length', 'format', 'tone', 'persona' or 'language'" in details[1]
    assert "Field required" in details[2] and "steerability_seeds.jsonl" in details[2]


def test_a_run_that_was_cut_off_goes_on(place: Place) -> None:
    """With a torn line at the end of the journal, and with two processes. A lost file is written again."""
    seeds = [seed(manner) for manner in ("good", "tiring", "disobedient", "lasting", "prose")]
    _run(place, seeds)
    expected, asked = {name: (place.output / name).read_bytes() for name in FILES}, place.asked()
    (journal,) = (place.output / "journal").glob("journal-*.jsonl")
    content = journal.read_bytes()
    content = content[: len(content) // 2]
    journal.write_bytes(content)
    (place.output / "summary.json").unlink()
    _run(place, seeds, size=2)
    assert {name: (place.output / name).read_bytes() for name in FILES} == expected
    kept = content.count(b'"kind":"reply"')
    assert place.asked() in (asked - kept, asked - kept + 1)
    (place.output / "preferences.jsonl").unlink()
    _run(place, seeds)
    assert {name: (place.output / name).read_bytes() for name in FILES} == expected and not place.asked()


def test_a_run_without_preferences_leaves_no_file_of_them(place: Place) -> None:
    _run(place, [seed("good")])
    assert (place.output / "preferences.jsonl").exists()
    _run(place, [seed("lasting")])
    assert len(place.rows()) == 4 and not (place.output / "preferences.jsonl").exists()


def test_the_seeds_of_the_configuration_are_good() -> None:
    found = [system_prompt(row) for row in read_lines(ROOT / "configs/synthesis/steerability_seeds.jsonl")]
    assert {prompt.kind for prompt in found} == set(get_args(Kind))
