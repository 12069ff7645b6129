"""Writes the report of a run, which shows its `Summary` as one self-contained HTML file."""

from pathlib import Path

import jinja2

from megatron_post.display import printable
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
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        s=summary,
        title=f"{summary.recipe}, version {summary.version}",
        count=lambda number: f"{number:,}",
        share=lambda part, whole: f"{part / whole:.1%}" if whole else "0%",
        width=lambda part, whole: f"{100 * part / whole if whole else 0:.2f}%",
    )
    write_whole(target, page)
