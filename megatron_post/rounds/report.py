"""Writes the report of a round as one self-contained HTML file."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from markupsafe import Markup

from megatron_post.config.data import Rating
from megatron_post.pages.charts import histogram, intervals, lines
from megatron_post.pages.page import document, element, figures, html_of, table
from megatron_post.rounds.accuracy import Accuracy
from megatron_post.storage.files import read_lines, write_whole
from megatron_post.train.history import read_history

_SAMPLES = 12


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
    selected = {"selected": selection["selected_lengths"], "not selected": selection["rejected_lengths"]}
    models = Markup("<p>Answers by <code>{}</code>. The best model is <code>{}</code>.</p>")
    parts = [
        models.format(html_of(policy), html_of(best)),
        element("h2", "Held-out prompts"),
        *_accuracies(evaluations),
        *_by_capability(evaluations[-1].get("by_capability") or {}),
        element("h2", "Selection"),
        *_selection(selection),
        figures(
            [
                histogram("Rewards of all samples", {"samples": selection["rewards"]}, x="reward"),
                histogram(
                    "Margins of the best over the worst",
                    {"pairs": selection["margins"]},
                    x="difference of rewards",
                ),
                histogram("Lengths of responses", selected, x="tokens"),
            ]
        ),
        element("h2", "Training"),
        figures(_training(runs)),
        element("h2", "Samples"),
        _samples(preferences),
        *([] if people is None else _people(*people)),
    ]
    write_whole(target, document(title, parts))


def _by_capability(found: dict[str, Any]) -> list[Markup]:
    """A table of the best model for each capability of the validation prompts, or nothing without any."""
    if not found:
        return []
    models = list(next(iter(found.values()))["validation"])
    rows = [
        [capability, *(f"{100 * each['validation'][model]:.1f}%" for model in models), each["stage"]]
        for capability, each in found.items()
    ]
    return [element("h3", "Validation prompts by capability"), table(["", *models, "best"], rows)]


def _accuracies(results: Sequence[dict[str, Any]]) -> list[Markup]:
    """A table and a chart by round of greedy decoding, one sample, and the best of K by the reward model."""
    if "greedy" not in results[0]:
        return [element("p", "Without a verifier there are no accuracies.")]
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
        "The intervals are 95% (Wilson). Those of one sample treat the samples of a prompt as independent, "
        "which makes them too narrow."
    )
    chart = intervals("Exact match on held-out prompts, by round", series, x="round", y="exact match")
    return [table(head, rows), element("p", note), chart]


def _selection(found: dict[str, Any]) -> list[Markup]:
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
    counts = [(label, found[key]) for key, label in keys.items() if found.get(key) is not None]
    rules = [[r[key] for key in ("name", "found", "total", "dropped")] for r in found["cleaning"]]
    tables = [table(["", "count"], counts, numbers=True)]
    return tables + (
        [table(["cleaning rule", "found", "of", "dropped"], rules, numbers=True)] if rules else []
    )


def _training(runs: Mapping[str, Path]) -> list[Markup]:
    """Charts of each stage's loss, and of the accuracy and margin of pairs if its metrics have them."""
    charts = []
    for stage, run_dir in runs.items():
        metrics = read_history(run_dir).train
        charts += [
            lines(f"{stage}: {name}", {name: metrics.points(name)}, x="step", y=name)
            for name in ("loss", "accuracy", "margin")
        ]
    return charts


def _samples(preferences: Path) -> Markup:
    rows = [
        [*_texts(row), f"{row['provenance']['margin']:.2f} {row['rating'] or ''}"]
        for row in islice(read_lines(preferences), _SAMPLES)
    ]
    return table(["prompt", "chosen", "rejected", "edited", "margin"], rows)


def _texts(row: dict[str, Any]) -> list[str]:
    """The texts of a preference. A response that nobody has edited is blank."""
    cells = [row["prompt"][-1]["content"], *(row[key][-1]["content"] for key in ("chosen", "rejected"))]
    return [*cells, row["edited"][-1]["content"] if "edited" in row else ""]


def _people(counts: dict[str, Any], preferences: Path) -> list[Markup]:
    """The counts of what people have answered, which model they prefer, and some of their preferences."""
    rows = list(read_lines(preferences))
    samples = [[*_texts(row), row["rating"].replace("_", " ")] for row in rows[:_SAMPLES]]
    return [
        element("h2", "Preferences of people"),
        table(["", "count"], [(n.replace("_", " "), count) for n, count in counts.items()], numbers=True),
        _preferred(rows),
        table(["prompt", "chosen", "rejected", "edited", "rating"], samples),
    ]


def _preferred(rows: Sequence[dict[str, Any]]) -> Markup:
    """A table of how often people prefer each checkpoint, by rating. Both responses may be of one."""
    found: Counter[tuple[str, str]] = Counter()
    for row in rows:
        chosen, rejected = (row["provenance"][name]["checkpoint"] for name in ("chosen", "rejected"))
        found[row["rating"], "" if chosen == rejected else chosen] += 1
        found.update({("", name): 0 for name in (chosen, rejected) if chosen != rejected})
    names = sorted({name for _, name in found if name})
    head = ["rating", *(f"preferred: {name}" for name in names), "both of one checkpoint"]
    ratings = get_args(Rating)
    found_rows = [[r.replace("_", " "), *(str(found[r, name]) for name in (*names, ""))] for r in ratings]
    total = {name: sum(found[r, name] for r in ratings) for name in names}
    if len(names) == 2:
        found_rows.append(["share", *(str(Accuracy(total[name], sum(total.values()))) for name in names), ""])
    return table(head, found_rows)
