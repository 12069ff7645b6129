"""Writes the report of a round as one self-contained HTML file."""

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from megatron_post.config.data import Rating
from megatron_post.display import html_text
from megatron_post.rounds.accuracy import Accuracy
from megatron_post.rounds.charts import histogram, intervals, lines
from megatron_post.storage.files import read_lines, write_whole
from megatron_post.storage.reading import reading

_SAMPLES = 12
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; color: #222 }
figure { display: inline-block; width: 440px; margin: 0 12px 16px 0; vertical-align: top }
svg { width: 100%; font-size: 11px } table { border-collapse: collapse; margin: 1em 0 }
td, th { border: 1px solid #ccc; padding: 3px 9px; text-align: left; vertical-align: top }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 360px }
"""


def write_report(
    target: Path,
    *,
    title: str,
    policy: str,
    best: str,
    evaluations: Sequence[dict[str, Any]],
    selection: dict[str, Any],
    preferences: Path,
    runs: Mapping[str, Path],
    people: tuple[dict[str, Any], Path] | None = None,
) -> None:
    """Write the report of a round.

    policy: the model that generated the samples. best: the best model after the round. evaluations: the
    results of `evaluate` of each round so far. selection: the summary of `select`. preferences: the file of
    its preference rows. runs: the directory of each stage's training run. people: the counts of the answers
    of people, and the file of their preferences.
    """
    parts = [
        f"<h1>{html_text(title)}</h1>",
        f"<p>Answers by <code>{html_text(policy)}</code>. The best model is "
        f"<code>{html_text(best)}</code>.</p>",
        "<h2>Held-out prompts</h2>",
        _accuracies(evaluations),
        _by_capability(evaluations[-1].get("by_capability") or {}),
        "<h2>Selection</h2>",
        _selection(selection),
        histogram("reward of all samples", {"samples": selection["rewards"]}),
        histogram("margin of best over worst", {"pairs": selection["margins"]}),
        histogram(
            "tokens of responses",
            {"selected": selection["selected_lengths"], "not selected": selection["rejected_lengths"]},
        ),
        "<h2>Training</h2>",
        *_training(runs),
        "<h2>Samples</h2>",
        _samples(preferences),
        *([] if people is None else _people(*people)),
    ]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html_text(title)}</title>'
    write_whole(target, f"{page}<style>{STYLE}</style>{''.join(parts)}</html>\n")


def _by_capability(found: dict[str, Any]) -> str:
    """A table of the best model for each capability of the validation prompts, or nothing without any."""
    if not found:
        return ""
    models = list(next(iter(found.values()))["validation"])
    rows = [
        [capability, *(f"{100 * each['validation'][model]:.1f}%" for model in models), each["stage"]]
        for capability, each in found.items()
    ]
    return "<h3>Validation prompts by capability</h3>" + html_table(["", *models, "best"], rows)


def _accuracies(results: Sequence[dict[str, Any]]) -> str:
    """A table and a chart by round of greedy decoding, one sample, and the best of K by the reward model."""
    if "greedy" not in results[0]:
        return "<p>Without a verifier there are no accuracies.</p>"
    k = results[-1]["k"]
    names = {"greedy": "greedy", "one_sample": "one sample (K=1)", "best_of_k": f"best of {k} by reward"}
    rows = [["before", str(Accuracy(**results[0]["start"])), "", "", ""]]
    series: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in names.values()}
    start = Accuracy(**results[0]["start"])
    series["greedy"].append((0, start.share, *start.interval))
    for number, result in enumerate(results, start=1):
        found = {key: Accuracy(**result[key]) for key in names}
        rows.append([f"round {number}", *(str(found[key]) for key in names), result["stage"]])
        for key, name in names.items():
            series[name].append((number, found[key].share, *found[key].interval))
    head = ["", *names.values(), "best checkpoint"]
    note = (
        "<p>The intervals are 95% (Wilson). Those of one sample treat the samples of a prompt as "
        "independent, which makes them too narrow.</p>"
    )
    chart = intervals("exact match on held-out prompts, by round", dict(series))
    return html_table(head, rows) + note + chart


def _selection(found: dict[str, Any]) -> str:
    keys = {
        "prompts": "prompts",
        "responses": "responses",
        "failed": "prompts that failed",
        "blank": "blank",
        "cut_off": "cut off at max_tokens",
        "templated": "with markers of a chat template",
        "correct": "right",
        "best_correct": "selected and right",
        "ties": "prompts with a tie for the best",
        "sft_rows": "rows to train on",
        "sft_edited": "of these by the verifier",
        "preferences": "preferences",
        "edited": "edited by the verifier",
        "below_threshold": "responses below a threshold of reward",
    }
    table = html_table(
        ["", "count"],
        [[label, str(found[key])] for key, label in keys.items() if found.get(key) is not None],
    )
    rules = [[str(r[key]) for key in ("name", "found", "total", "dropped")] for r in found["cleaning"]]
    return table + (html_table(["cleaning rule", "found", "of", "dropped"], rules) if rules else "")


def _training(runs: Mapping[str, Path]) -> list[str]:
    """Charts of each stage's loss, and of the accuracy and margin of pairs if its metrics have them."""
    charts = []
    for stage, run_dir in runs.items():
        metrics = metrics_of(run_dir)
        charts.append(lines(f"{stage}: loss by step", {"loss": [(m["step"], m["loss"]) for m in metrics]}))
        pairs = {key: [(m["step"], m[key]) for m in metrics if key in m] for key in ("accuracy", "margin")}
        charts.append(lines(f"{stage}: pairs by step", dict(pairs)))
    return charts


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    """The metrics of each step of a training run, in order. A repeated step has its last metrics."""
    path = run_dir / "metrics.jsonl"
    rows: dict[int, dict[str, Any]] = {}
    with reading(path):
        lines = path.read_bytes().splitlines() if path.is_file() else []
    for line in lines:
        # a kill or a full disk may have cut a line
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            row = json.loads(line)
            if row["kind"] == "train":
                rows[int(row["step"])] = row
    return [rows[step] for step in sorted(rows)]


def _samples(preferences: Path) -> str:
    rows = [
        [*_texts(row), f"{row['provenance']['margin']:.2f} {row['rating'] or ''}"]
        for row in islice(read_lines(preferences), _SAMPLES)
    ]
    return html_table(["prompt", "chosen", "rejected", "edited", "margin"], rows)


def _texts(row: dict[str, Any]) -> list[str]:
    """The texts of a preference. A response that nobody has edited is blank."""
    cells = [row["prompt"][-1]["content"], *(row[key][-1]["content"] for key in ("chosen", "rejected"))]
    return [*cells, row["edited"][-1]["content"] if "edited" in row else ""]


def _people(counts: dict[str, Any], preferences: Path) -> list[str]:
    """The counts of what people have answered, which model they prefer, and some of their preferences."""
    rows = list(read_lines(preferences))
    samples = [[*_texts(row), row["rating"].replace("_", " ")] for row in rows[:_SAMPLES]]
    return [
        "<h2>Preferences of people</h2>",
        html_table(["", "count"], [[name.replace("_", " "), str(count)] for name, count in counts.items()]),
        _preferred(rows),
        html_table(["prompt", "chosen", "rejected", "edited", "rating"], samples),
    ]


def _preferred(rows: Sequence[dict[str, Any]]) -> str:
    """A table of how often people prefer each checkpoint, by rating. Both responses may be of one."""
    found: Counter[tuple[str, str]] = Counter()
    for row in rows:
        chosen, rejected = (row["provenance"][name]["checkpoint"] for name in ("chosen", "rejected"))
        found[row["rating"], "" if chosen == rejected else chosen] += 1
        found.update({("", name): 0 for name in (chosen, rejected) if chosen != rejected})
    names = sorted({name for _, name in found if name})
    head = ["rating", *(f"preferred: {name}" for name in names), "both of one checkpoint"]
    ratings = get_args(Rating)
    table = [[r.replace("_", " "), *(str(found[r, name]) for name in (*names, ""))] for r in ratings]
    total = {name: sum(found[r, name] for r in ratings) for name in names}
    if len(names) == 2:
        table.append(["share", *(str(Accuracy(total[name], sum(total.values()))) for name in names), ""])
    return html_table(head, table)


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as HTML. Every text is escaped, because some of it is from models."""
    top = "".join(f"<th>{html_text(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f'<td class="text">{html_text(cell)}</td>' for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"
