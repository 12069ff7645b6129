"""Pairs for people to compare are blind, and what they answer is checked row by row."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_post.config.data import Source
from megatron_post.data.dialog import Preference
from megatron_post.data.rows import BadRows, TooManyBadRows, read_rows
from megatron_post.rounds.annotation.answers import Imported, import_answers
from megatron_post.rounds.annotation.export import export_pairs
from megatron_post.rounds.annotation.pairs import draw_pairs
from megatron_post.rounds.annotation.settings import Annotation
from megatron_post.rounds.report import write_report
from megatron_post.rounds.round import Round
from megatron_post.rounds.settings import load_round
from megatron_post.rounds.steps import all_steps
from megatron_post.storage.files import read_lines, write_lines

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
# Neither name is a part of any text on the page.
MODELS = ("runs/older-model", "runs/newer-model")


def sample(
    prompt: int, checkpoint: str, text: str, *, number: int = 0, finish: str = "stop"
) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Question {prompt}?"}, {"role": "assistant", "content": text}]
    draw = {"prompt": prompt, "sample": number, "checkpoint": checkpoint, "seed": 7 * prompt + number}
    return draw | {"tokens": 3, "finish": finish, "messages": messages}


def exported(directory: Path, *, prompts: int = 4, **settings: Any) -> tuple[Path, Path]:
    """The pairs of `prompts` prompts, which both models have answered, and their key."""
    rows = [
        sample(prompt, model, f"Answer {side} to {prompt}.")
        for side, model in zip(("old", "new"), MODELS, strict=True)
        for prompt in range(1, prompts + 1)
    ]
    write_lines(directory / "samples.jsonl", rows)
    pages, key = directory / "annotate", directory / "key.jsonl"
    export_pairs([directory / "samples.jsonl"], pages, key, Annotation(**settings), seed=0)
    return pages, key


def test_a_pair_is_of_two_checkpoints(tmp_path: Path) -> None:
    """Both orders occur, and the pairs are not in the order of the prompts."""
    rows = [
        sample(prompt, model, f"{prompt} {model} {k}", number=k)
        for model in MODELS
        for prompt in range(1, 101)
        for k in range(3)
    ]
    drawn = draw_pairs(rows, seed=1, most=None)
    assert sorted(pair.a["prompt"] for pair in drawn) == list(range(1, 101))
    assert [pair.a["prompt"] for pair in drawn] != list(range(1, 101))
    assert all(pair.is_between_checkpoints and pair.a["prompt"] == pair.b["prompt"] for pair in drawn)
    first = Counter(pair.a["checkpoint"] for pair in drawn)
    # For fair draws, fewer than 30 of 100 have a probability of 2e-5.
    assert min(first[model] for model in MODELS) >= 30
    assert {pair.a["sample"] for pair in drawn} == {0, 1, 2}
    assert draw_pairs(rows, seed=1, most=None) == drawn
    some = draw_pairs(rows, seed=1, most=10)
    assert len(some) == 10 and all(pair in drawn for pair in some)
    assert draw_pairs(rows, seed=2, most=None) != drawn


def test_what_cannot_be_compared() -> None:
    """Prompt 1 has one complete response, and prompt 2 has equal ones. Prompt 3 has one checkpoint."""
    rows = [
        sample(1, MODELS[0], "whole"),
        sample(1, MODELS[1], "cut", finish="length"),
        sample(1, MODELS[1], "", number=1),
        sample(1, MODELS[1], "User<|eot_id|>", number=2),
        sample(2, MODELS[0], "equal"),
        sample(2, MODELS[1], "equal"),
    ]
    with pytest.raises(ValueError, match="none of 2 prompts has two different responses"):
        draw_pairs(rows, seed=0, most=None)
    rows += [sample(3, MODELS[0], "one"), sample(3, MODELS[0], "two", number=1)]
    (pair,) = draw_pairs(rows, seed=0, most=None)
    assert {pair.pair.a, pair.pair.b} == {"one", "two"} and not pair.is_between_checkpoints


def test_responses_with_other_system_prompts_are_not_compared() -> None:
    other = sample(1, MODELS[1], "new")
    other["messages"].insert(0, {"role": "system", "content": "Be brief."})
    with pytest.raises(ValueError, match="none of 2 prompts"):
        draw_pairs([sample(1, MODELS[0], "old"), other], seed=0, most=None)


def test_the_export_is_blind_and_repeats(tmp_path: Path) -> None:
    pages, key = exported(tmp_path, pages=2)
    files = sorted(pages.iterdir())
    assert [file.name for file in files] == ["annotate-1.html", "annotate-2.html", "pairs.jsonl"]
    content = {file.name: file.read_bytes() for file in files}
    for model in MODELS:
        assert not any(model.encode() in bytes_of_file for bytes_of_file in content.values())
        assert model in key.read_text()
    for row, origin in zip(read_lines(pages / "pairs.jsonl"), read_lines(key), strict=True):
        assert row.keys() == {"pair", "prompt", "a", "b"} and row["pair"] == origin["pair"]
        for side in ("a", "b"):
            wrote = dict(zip(("old", "new"), MODELS, strict=True))[row[side].split()[1]]
            assert origin[side]["checkpoint"] == wrote
    exported(tmp_path, pages=2)
    assert {file.name: file.read_bytes() for file in pages.iterdir()} == content
    (pages / "pairs.jsonl").unlink()
    key.unlink()
    exported(tmp_path, pairs=1, pages=3)
    assert sorted(file.name for file in pages.iterdir()) == ["annotate-1.html", "pairs.jsonl"]


def test_pairs_that_people_may_be_comparing_are_not_replaced(tmp_path: Path) -> None:
    """Otherwise their answers could not be imported. A key may also be the name of another file."""
    pages, key = exported(tmp_path)
    before = {path: path.read_bytes() for path in (key, *pages.iterdir())}
    with pytest.raises(ValueError, match=r"pairs.jsonl exists and is not of these pairs; choose another"):
        exported(tmp_path, pairs=2)
    assert {path: path.read_bytes() for path in (key, *pages.iterdir())} == before
    key.write_text("precious")
    with pytest.raises(ValueError, match=r"key.jsonl exists and is not of these pairs; choose another"):
        exported(tmp_path)
    assert key.read_text() == "precious"


def test_the_key_does_not_go_to_the_people(tmp_path: Path) -> None:
    write_lines(tmp_path / "samples.jsonl", [sample(1, model, model) for model in MODELS])
    for key in (tmp_path / "out" / "key.jsonl", tmp_path / "out" / "below" / ".." / "key.jsonl"):
        with pytest.raises(ValueError, match="choose a path outside it"):
            export_pairs([tmp_path / "samples.jsonl"], tmp_path / "out", key, Annotation(), seed=0)


def test_a_page_is_self_contained(tmp_path: Path) -> None:
    """It has no address to load from, and a text cannot end the script that holds it."""
    texts = ("</script><script>alert(1)</script>", "{{ 7 * 7 }} <img src=x onerror=alert(1)>")
    write_lines(tmp_path / "s.jsonl", [sample(1, m, t) for m, t in zip(MODELS, texts, strict=True)])
    export_pairs([tmp_path / "s.jsonl"], tmp_path / "out", tmp_path / "key.jsonl", Annotation(), seed=0)
    page = (tmp_path / "out" / "annotate-1.html").read_text()
    assert not re.search(r"https?:|//[a-z]|url\(|@import|\bsrc=\"|<link|fetch\(|XMLHttpRequest", page)
    assert page.count("</script>") == 2 and "<img" not in page
    assert "default-src 'none'" in page
    held = re.search(r'<script type="application/json" id="pairs">(.*?)</script>', page)
    assert held is not None
    (pair,) = json.loads(held[1])
    assert {pair["a"], pair["b"]} == set(texts)


def answered(directory: Path, rows: list[Any], name: str = "answers.jsonl", **options: Any) -> Imported:
    path = directory / "answers" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return import_answers(
        directory / "annotate", directory / "key.jsonl", path.parent, directory / "out.jsonl", **options
    )


def test_answers_become_preferences(tmp_path: Path) -> None:
    pages, _ = exported(tmp_path)
    one, two, three, four = read_lines(pages / "pairs.jsonl")
    first = [
        {"pair": three["pair"], "left_out": True},
        {"pair": two["pair"], "better": "b", "rating": "better"},
    ]
    edited = {"pair": one["pair"], "better": "a", "rating": "significantly_better", "edited": "Better still."}
    last = {"pair": four["pair"], "better": "a", "rating": "marginally_better", "edited": None}
    with pytest.raises(ValueError, match=r"waiting for people: 2 of 4 pairs are answered in .*, and 4 are"):
        answered(tmp_path, first, "first.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    found = answered(tmp_path, [edited, last], "second.jsonl")
    assert str(found) == (
        "3 preferences, 1 edited, 1 pairs left out, 0 pairs not answered, 0 repeated rows, 0 bad rows"
    )
    rows = list(read_lines(tmp_path / "out.jsonl"))
    texts = [
        {name: row[name][0]["content"] for name in ("edited", "chosen", "rejected") if name in row}
        for row in rows
    ]
    assert texts == [
        {"edited": "Better still.", "chosen": one["a"], "rejected": one["b"]},
        {"chosen": two["b"], "rejected": two["a"]},
        {"chosen": four["a"], "rejected": four["b"]},
    ]
    assert [row["rating"] for row in rows] == ["significantly_better", "better", "marginally_better"]
    assert rows[0]["provenance"]["answer"] == "second.jsonl:1" and rows[0]["provenance"]["by"] == "annotator"
    wrote = {"old": MODELS[0], "new": MODELS[1]}
    for row in rows:
        for name in ("chosen", "rejected"):
            content = row[name][0]["content"]
            assert row["provenance"][name]["checkpoint"] == wrote[content.split()[1]]
    source = Source(name="people", path=str(tmp_path / "out.jsonl"), ignore=("provenance",))
    examples = [example for _, example in read_rows(source, bad_rows=BadRows())]
    assert all(isinstance(example, Preference) for example in examples)
    best = examples[0]
    assert isinstance(best, Preference)
    assert [response[0].content for response in best.responses] == ["Better still.", one["a"], one["b"]]


def test_fewer_answers_may_be_enough(tmp_path: Path) -> None:
    pages, _ = exported(tmp_path)
    one, two, *_ = read_lines(pages / "pairs.jsonl")
    rated = {"pair": one["pair"], "better": "a", "rating": "better"}
    found = answered(tmp_path, [rated], enough=1)
    assert (len(found.preferences), found.missing) == (1, 3)
    with pytest.raises(ValueError, match="every answer leaves its pair out"):
        answered(tmp_path, [{"pair": two["pair"], "left_out": True}], enough=1)


def test_the_report_shows_what_people_prefer(tmp_path: Path) -> None:
    """The old model is preferred three times and the new one once. One pair is of one model only."""
    rows = [sample(prompt, model, f"{prompt} <b> {model}") for model in MODELS for prompt in range(1, 5)]
    rows += [sample(5, MODELS[0], text, number=number) for number, text in enumerate(("one", "two"))]
    write_lines(tmp_path / "s.jsonl", rows)
    pages, key = tmp_path / "annotate", tmp_path / "key.jsonl"
    export_pairs([tmp_path / "s.jsonl"], pages, key, Annotation(), seed=0)
    answers = []
    for origin in read_lines(key):
        wanted = MODELS[1] if origin["a"]["prompt"] == 4 else MODELS[0]
        better = next(side for side in ("a", "b") if origin[side]["checkpoint"] == wanted)
        rating = "significantly_better" if origin["a"]["prompt"] == 1 else "better"
        answers.append({"pair": origin["pair"], "better": better, "rating": rating})
    answers[0]["edited"] = "<script>alert(1)</script>\x1b[31m"
    found = answered(tmp_path, answers)
    numbers = dict.fromkeys(("rewards", "margins", "selected_lengths", "rejected_lengths", "cleaning"), ())
    (tmp_path / "selected.jsonl").touch()
    write_report(
        tmp_path / "report.html",
        title="a round",
        policy=MODELS[1],
        best=MODELS[1],
        evaluations=[{}],
        selection=numbers,
        preferences=tmp_path / "selected.jsonl",
        runs={},
        people=(found.counts, tmp_path / "out.jsonl"),
    )
    page = (tmp_path / "report.html").read_text()
    cells = re.sub(r"<[^>]*>", "|", page.split("Preferences of people")[1])
    cells = re.sub(r"\|+", "|", cells)
    assert "|preferences|5|edited|1|pairs left out|0|pairs not answered|0|repeated rows|0|" in cells
    assert f"|rating|preferred: {MODELS[1]}|preferred: {MODELS[0]}|both of one checkpoint|" in cells
    assert "|significantly better|0|1|0|better|1|2|1|slightly better|0|0|0|" in cells
    assert "|share|25.0% (4.6 to 69.9)|75.0% (30.1 to 95.4)|" in cells
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[31m" in page


def test_an_answer_that_is_sent_twice_counts_once(tmp_path: Path) -> None:
    """A person exported after two answers and again after four, and sent both files."""
    pages, _ = exported(tmp_path)
    rows = [{"pair": pair["pair"], **RATED} for pair in read_lines(pages / "pairs.jsonl")]
    rows[1]["edited"], rows[2] = "Better.", {"pair": rows[2]["pair"], "left_out": True}
    with pytest.raises(ValueError, match="2 of 4 pairs are answered"):
        answered(tmp_path, rows[:2], "answers-1.jsonl")
    found = answered(tmp_path, rows, "answers-2.jsonl")
    assert found.counts == {
        "preferences": 3,
        "edited": 1,
        "pairs_left_out": 1,
        "pairs_not_answered": 0,
        "repeated_rows": 2,
        "bad_rows": 0,
    }


def test_the_output_is_not_among_the_files_that_are_read(tmp_path: Path) -> None:
    pages, key = exported(tmp_path)
    (pair, *_) = read_lines(pages / "pairs.jsonl")
    answered(tmp_path, [{"pair": pair["pair"], "better": "a", "rating": "better"}], enough=1)
    answers = tmp_path / "answers"
    for output in (key, pages / "pairs.jsonl", answers / "preferences.jsonl", answers / "answers.jsonl"):
        before = output.read_bytes() if output.exists() else None
        with pytest.raises(ValueError, match="which is read; choose another path"):
            import_answers(pages, key, answers, output, enough=1)
        assert (output.read_bytes() if output.exists() else None) == before


RATED = {"better": "a", "rating": "better"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{broken", "JSON"),
        ("[1, 2]", "an answer is an object, not list"),
        ({"pair": "0123", **RATED}, "pair '0123' is not in"),
        ({"pair": "HERE", "better": "a"}, "rating: Field required"),
        ({"pair": "HERE", "better": "A", "rating": "better"}, "better: Input should be 'a' or 'b'"),
        ({"pair": "HERE", "better": "a", "rating": "best"}, "rating: Input should be 'significantly_better'"),
        ({"pair": "HERE", **RATED, "edits": "x"}, "edits: Extra inputs are not permitted"),
        ({"pair": "HERE", **RATED, "left_out": True}, "better: Extra inputs"),
        ({"pair": "HERE", "left_out": False}, "left_out: Input should be True"),
        ({"pair": "HERE", **RATED, "edited": " \n"}, "edited is blank"),
        ({"pair": "HERE", **RATED, "edited": 3}, "edited: Input should be a valid string"),
        ({"pair": "HERE", **RATED, "edited": "A"}, "edited is the text of response a"),
        ({"pair": "HERE", **RATED, "edited": "B\n"}, "edited is the text of response b"),
        ({"pair": "HERE", **RATED, "edited": "Fine.<|eot_id|>"}, "<|eot_id|>"),
        ({"pair": "DONE", **RATED, "rating": "slightly_better"}, "has another answer in"),
        ({"pair": "DONE", "left_out": True}, "has another answer in"),
        (None, "an answer is an object, not NoneType"),
    ],
)
def test_a_bad_row_is_named_with_its_reason(tmp_path: Path, row: Any, reason: str) -> None:
    """A row that is not bad is imported beside it, if bad rows are allowed."""
    pages, _ = exported(tmp_path, prompts=2)
    done, here = read_lines(pages / "pairs.jsonl")
    text = row if isinstance(row, str) else json.dumps(row)
    for name, value in (("HERE", here["pair"]), ("DONE", done["pair"])):
        text = text.replace(name, value)
    for side in ("a", "b"):
        text = text.replace(f'"edited": "{side.upper()}', f'"edited": "{here[side]}')
    rows = [{"pair": done["pair"], **RATED}, text]
    with pytest.raises(TooManyBadRows, match=re.escape(reason)) as error:
        answered(tmp_path, rows, enough=1)
    assert "answers.jsonl:2" in str(error.value)
    found = answered(tmp_path, rows, enough=1, max_bad_rows=1)
    assert (len(found.preferences), found.bad, found.missing) == (1, 1, 1)


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    pages, key = exported(tmp_path)
    lines = (pages / "pairs.jsonl").read_text()
    (pages / "pairs.jsonl").write_text(lines.replace("Answer old to 2.", "Another answer."))
    with pytest.raises(ValueError, match="has other texts than those that were exported"):
        answered(tmp_path, [])
    (pages / "pairs.jsonl").write_text(lines)
    key.write_text("".join(key.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=r"is not the key of .*: 1 pair\(s\) are only in one of them"):
        answered(tmp_path, [])
    with pytest.raises(ValueError, match=r"the answers .* do not exist"):
        import_answers(pages, key, tmp_path / "none.jsonl", tmp_path / "out.jsonl")


def test_a_setting_without_effect_is_named_as_it_is_written() -> None:
    with pytest.raises(
        ValueError, match=re.escape("=2 has no effect with annotate={pairs: 5}: set annotate")
    ):
        load_round(CONFIGS / "tiny" / "round.yaml", ["annotate={pairs: 5}"])


def test_steps_and_batches_of_a_round_with_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """People compare responses before the reward model is trained on them, and DPO uses only these."""
    overrides = [f"run_dir={tmp_path}", "rounds=2", "annotate={pairs: 5}"]
    overrides.append("generate.collected_samples=4")  # the value by default, because nothing is collected
    settings = load_round(CONFIGS / "tiny" / "round.yaml", overrides)
    console = Console(quiet=True)
    names = [step.name.split("/")[1] for step in all_steps(settings, console) if "01/" in step.name]
    assert names[:6] == [
        "generate",
        "annotate-export",
        "annotate-import",
        "reward-pack",
        "reward-train",
        "score",
    ]
    assert "collect" not in names and len(names) == len(set(names))
    used: list[list[dict[str, Any]]] = []

    def config(self: Round, stage: str, model: str, sources: Any, **_: Any) -> None:
        used.append(list(sources))

    monkeypatch.setattr(Round, "config", config)
    second = Round(settings, 2, console)
    monkeypatch.setattr(Round, "best", "policy")
    second.stage_config("reward")
    second.stage_config("dpo")
    paths = [[source["path"].removeprefix(f"{tmp_path}/") for source in sources] for sources in used]
    assert paths == [
        ["round-01/annotated.jsonl", "round-01/selection/preferences.jsonl", "round-02/annotated.jsonl"],
        ["round-02/annotated.jsonl"],
    ]
    assert [source["batch"] for source in used[0]] == [0, 1, 2]
