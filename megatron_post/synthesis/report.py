"""Writes the report of a run, which shows its `Summary` as one self-contained HTML file."""

from pathlib import Path

from megatron_post.pages.charts import histogram
from megatron_post.pages.page import figures, render
from megatron_post.storage.checksums import sha256_of_json
from megatron_post.storage.files import write_whole
from megatron_post.storage.reading import read_object, reading
from megatron_post.synthesis.parts import PARTS, parts_in, results_of
from megatron_post.synthesis.record import summary_of
from megatron_post.synthesis.summary import Summary, read_summary


def write_report_of(output: Path) -> Path:
    """Write the report of a run, which may be unfinished. Returns the path of the report.

    Raises `ValueError` if the directory has no run.
    """
    record = read_object(output / "run.json", "the record of a run of a recipe")
    fingerprint = sha256_of_json(record)
    summary = read_summary(output, fingerprint)
    if summary is None:
        with reading(output / "run.json", "the record of a run of a recipe"):
            summary = summary_of(record)
        for _ in summary.counted(results_of(parts_in(output / PARTS, fingerprint))):
            pass
    target = output / "report.html"
    write_report(target, summary)
    return target


def write_report(target: Path, summary: Summary) -> None:
    """Write the page. Every text in it is escaped, because models wrote some of it."""
    charts = (
        histogram(f"{name}: {m.number:,} value(s), mean {m.mean:.4g}", {name: m.counts}, x=name)
        for name, m in summary.measures.items()
    )
    template = Path(__file__).parent / "report.html.j2"
    title = f"{summary.recipe}, version {summary.version}"
    write_whole(target, render(template, s=summary, title=title, charts=figures(charts)))
