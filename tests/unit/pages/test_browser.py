"""Every kind of page in a real browser. No text is cut or covered, wide and narrow, in light and in dark."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_post.bench.page import page as bench_page
from megatron_post.bench.record import Figure, Record
from megatron_post.demo.seeds import compare
from megatron_post.plan.estimate import make_plan
from megatron_post.plan.hardware import GPUS
from megatron_post.plan.page import page as plan_page
from megatron_post.rounds.annotation.export import export_pairs
from megatron_post.rounds.annotation.settings import Annotation
from megatron_post.rounds.report import write_report
from megatron_post.storage.files import write_lines
from megatron_post.synthesis.parts import Drop, Result
from megatron_post.synthesis.report import write_report as write_synthesis_report
from megatron_post.synthesis.summary import Measure, Summary
from megatron_post.synthesis.task import Event
from megatron_post.train.report import write_run_report
from tests.browser import layout_problems, opened, running_browser
from tests.unit.curation.place import Place, dialog
from tests.unit.plan.test_estimate import BIG, llama_config
from tests.unit.rounds.test_annotation import MODELS, sample

LONG = "averyveryverylongword" * 12 + " <b>and</b> \u202e words " * 40


def round_page(directory: Path) -> Path:
    runs = {}
    for stage in ("reward", "dpo", "a_stage_with_a_long_name"):
        runs[stage] = directory / stage
        runs[stage].mkdir()
        keys = ("accuracy", "margin") if stage == "dpo" else ()
        rows = [
            {"kind": "train", "step": n, "loss": 1 / n, **{key: n / 100 for key in keys}}
            for n in range(1, 60)
        ]
        write_lines(runs[stage] / "metrics.jsonl", rows)
    texts = {key: [{"role": "assistant", "content": f"{key} {LONG}"}] for key in ("chosen", "rejected")}
    prompt = [{"role": "user", "content": "Question?"}]
    row = {"prompt": prompt, **texts, "rating": "better"}
    provenance = {"margin": 1.5, **{key: {"checkpoint": key} for key in ("chosen", "rejected")}}
    write_lines(directory / "preferences.jsonl", [row | {"provenance": provenance}] * 3)
    found = {key: {"correct": 40, "total": 100} for key in ("start", "greedy", "one_sample", "best_of_k")}
    capabilities = {
        name: {"validation": {"one": 0.5, "two": 0.25}, "stage": "sft"} for name in ("code", LONG)
    }
    rules = [{"name": f"a rule {LONG[:60]}", "found": 1, "total": 2, "dropped": 1}]
    write_report(
        directory / "report.html",
        title=f"Round 1 of {'runs/a_long_directory_name/' * 6}",
        policy="runs/a/" * 30,
        best="b",
        evaluations=[found | {"k": 8, "stage": "dpo", "by_capability": capabilities}] * 6,
        selection={
            "rewards": [n / 7 for n in range(100)],
            "margins": [n**3 * 1.0 for n in range(50)],
            "selected_lengths": list(range(100)),
            "rejected_lengths": list(range(0, 5000, 50)),
            "cleaning": rules,
            "prompts": 1_000_000,
        },
        preferences=directory / "preferences.jsonl",
        runs=runs,
        people=({"preferences": 3}, directory / "preferences.jsonl"),
    )
    return directory / "report.html"


def bench_report(directory: Path) -> Path:
    records = []
    for number in range(6):
        figures = {
            "step": Figure("s", tuple(1 + n / 10 + number for n in range(8)), "lower"),
            "tokens/s/rank": Figure("1/s", (123456.0,), "higher"),
            "trained tokens/s/rank": Figure("1/s", (12345.0,), "higher"),
            "padded tokens/s/rank": Figure("1/s", (133456.0,), "higher"),
            **{f"phase: part {n} of a step": Figure("s", (0.1 * n,), "lower") for n in range(1, 14)},
        }
        environment = {"date": f"2026-11-2{number}T06:00:00+00:00", "cpu": LONG}
        text = "as printed " * 40
        records.append(Record("step", LONG, {"ranks": str(number)}, figures, environment, (LONG,), text=text))
    (directory / "bench.html").write_text(bench_page(records))
    return directory / "bench.html"


def plan_report(directory: Path) -> Path:
    config = llama_config("llama3.1_405b", BIG, pack_length=131072, train={"steps": 1, "global_batch": 16})
    (directory / "plan.html").write_text(plan_page(make_plan(config, gpus=512, gpu=GPUS["h100-80gb"])))
    return directory / "plan.html"


def seeds_report(directory: Path) -> Path:
    counts = {"correct": 30, "total": 100}
    rounds = [dict.fromkeys(("greedy", "one_sample", "best_of_k"), counts)] * 5
    results = [{"before": counts, "sft": counts, "rounds": rounds}] * 10
    compare(results, directory, Console(quiet=True))
    return directory / "seeds.html"


def synthesis_report(directory: Path) -> Path:
    messages = [
        {"role": "user", "content": LONG, "train": False},
        {"role": "assistant", "content": LONG, "train": True},
    ]
    events = [Event("check", "", kind, "k") for kind in ("passed", "timeout", "a_kind_with_a_long_name")]
    rows = [{"id": LONG, "messages": messages, "capability": LONG, "measures": {"characters": 5.0}}]
    dropped = Drop("check", LONG, LONG)
    summary = Summary(recipe="a_recipe", version=1, input=400, bad=1, bad_examples=[LONG])
    for n in range(200):
        list(
            summary.counted(
                [Result(2 * n, LONG, "f", rows, None, events), Result(2 * n + 1, "i", "f", [], dropped)]
            )
        )
    summary.measures["similarity"] = Measure()
    for n in range(300):
        summary.measures["similarity"].add(n * n / 7)
    write_synthesis_report(directory / "report.html", summary)
    return directory / "report.html"


def curation_report(directory: Path) -> Path:
    place = Place(directory)
    rows = [dialog(f"Question {n} {LONG}", f"Answer {n % 30}. {'word ' * n}") for n in range(60)]
    place.add_source("a-source-with-a-name-that-is-long-" * 3, [*rows, *rows[:9]])
    place.curate({"kind": "exact_duplicates"}, {"kind": "lengths", "most_turns": 1})
    return place.run / "report.html"


def annotation_page(directory: Path) -> Path:
    rows = [sample(prompt, model, LONG) for model in MODELS for prompt in range(1, 4)]
    rows = [
        row | {"messages": [row["messages"][0], {"role": "assistant", "content": f"{n} {LONG}"}]}
        for n, row in enumerate(rows)
    ]
    write_lines(directory / "samples.jsonl", rows)
    export_pairs([directory / "samples.jsonl"], directory / "pages", directory / "key", Annotation(), seed=0)
    return directory / "pages" / "annotate-1.html"


def run_report(directory: Path) -> Path:
    """A run of five starts and many metrics, with values that are not finite and a damaged line."""
    names = ("loss", "lr", "grad_norm", "tokens_per_second", "memory_gib", "accuracy", "a_metric" * 20, LONG)
    rows = [
        {"kind": kind, "step": n, "time": 1.8e9 + n}
        | {name: 10.0 ** (3 * place - 6) / (n + 1) for place, name in enumerate(names)}
        for n in range(1, 3000)
        for kind in (("train", "eval") if n % 100 == 0 else ("train",))
    ]
    rows[5]["loss"], rows[7]["loss"] = float("nan"), float("inf")
    write_lines(directory / "metrics.jsonl", rows)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    start = {"time": 1.8e9, "after": 100, "lost": 7, "ranks": 16384, "device": LONG}
    write_lines(directory / "starts.jsonl", [start] * 5)
    return write_run_report(directory)


PAGES: dict[str, Callable[[Path], Path]] = {
    "round": round_page,
    "bench": bench_report,
    "plan": plan_report,
    "seeds": seeds_report,
    "synthesis": synthesis_report,
    "curation": curation_report,
    "annotation": annotation_page,
    "run": run_report,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of the pages. A curation starts an event loop, which it cannot while a browser runs."""
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in PAGES.items()}


@pytest.fixture(scope="module")
def browser(written: dict[str, Path]) -> Iterator[Any]:
    with running_browser() as running:
        yield running


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_cut_or_covered(browser: Any, written: dict[str, Path], name: str) -> None:
    """At 1,200 and 500 pixels in light and dark, also of every part that is closed at first."""
    problems = {}
    for width in (1200, 500):
        for scheme in ("light", "dark"):
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            with opened(context, written[name]) as page:
                problems[width, scheme] = layout_problems(page)
            context.close()
    assert not any(problems.values()), problems


def test_the_check_finds_what_is_wrong(browser: Any, tmp_path: Path) -> None:
    """Each of these pages has one fault of its own."""
    faults = {
        '<p style="width: 900px">wide': "px wide",
        '<p style="width: 9em; overflow: hidden; white-space: nowrap">a long text in a small box': "is cut",
        '<p>first</p><p style="margin-top: -2em">second': "covers",
        '<p style="color: #999">faint': "contrast",
        "<svg></svg>": "no accessible name",
        '<svg role="img" aria-label="a" viewBox="0 0 9 9"><text>out</text></svg>': "by its chart",
        '<i id="a"></i><i id="a"></i>': "double",
    }
    context = browser.new_context(viewport={"width": 500, "height": 900})
    for body, problem in faults.items():
        (tmp_path / "page.html").write_text(f'<!doctype html><html lang="en"><title>t</title>{body}</html>')
        with opened(context, tmp_path / "page.html") as page:
            found = layout_problems(page)
        assert any(problem in each for each in found), (body, found)
    context.close()
