"""Names, rows and logs that hold escape sequences and markup, through every command that prints them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_post import cli
from megatron_post.bench.record import Record, once, write_record
from megatron_post.inference.journal import Journal
from tests.unit.junk.runner import Copy
from tests.unit.test_display import RICH, unsafe

MARKUP = "[red]x[/red]"
# a title, a link with another target, the clipboard, a C1 control, text that runs backwards, overwritten text
ESCAPES = "\x1b]0;t\x07 \x1b]8;;http:e\x1b\\ \x1b]52;c;aGk=\x07 \x9b2J \u202eexe.txt a\rb \x7f"
TEXT = f"{MARKUP} {ESCAPES}"
ARGUMENT = TEXT.replace("/", "")
NAME = f"{ARGUMENT} \udcff"  # of a file, with a byte that is not UTF-8

# what a command about NAME prints does not always repeat it
SILENT = {"data show, by name", "data verify, by name", "convert verify", "launch status", "an override"}


def _run(*words: str) -> int:
    sys.argv = ["megatron-post", *words]
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def _rows() -> None:
    """A source whose name and rows are hostile, and whose last row is refused in its own words."""
    said = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": MARKUP}]
    rows = [*[{"messages": said}] * 3, {"messages": TEXT}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = yaml.safe_load(Path("sft.yaml").read_text())
    values["data"] |= {"sources": [{"name": ARGUMENT, "path": "rows.jsonl"}], "max_bad_rows": 1}
    Path("sft.yaml").write_text(yaml.safe_dump(values))
    _run("data", "pack", "sft.yaml", "--overwrite")


def _logs() -> None:
    Path("run/slurm/1.log").write_text(NAME, errors="surrogateescape")
    job = json.loads(Path("run/slurm/jobs.jsonl").read_text()) | {"name": TEXT}
    Path("run/slurm/jobs.jsonl").write_text(json.dumps(job) + "\n")


def _records() -> None:
    for _ in range(2):
        settings, figures = {"steps": TEXT}, {TEXT: once(TEXT, 1.0)}
        write_record("bench", Record("step", TEXT, settings, figures, {"date": "2027"}, (TEXT,)))


def _rules() -> None:
    rules = {"rules": [{"name": TEXT, "pattern": "is", "max_share": 1.0}]}
    Path("rules.yaml").write_text(yaml.safe_dump(rules))


def _row() -> None:
    """A row, and the reply that it is from, in hostile words."""
    path = Path("synthesized/rows.jsonl")
    row = json.loads(path.read_text().replace("1 + 1", json.dumps(TEXT)[1:-1]).splitlines()[0])
    path.write_text(json.dumps(row) + "\n")
    Path("synthesized/journal/journal-00000.jsonl").unlink()
    said = {"role": "assistant", "content": TEXT}
    request = {"messages": [{"role": TEXT, "content": TEXT}], "sampling": {TEXT: TEXT}, "seed": TEXT}
    with Journal("synthesized/journal") as journal:
        key = row["provenance"]["journal"][0]["key"]
        journal.append(key, "reply", {"request": request, "reply": {"message": said}})


def _settings() -> None:
    values = yaml.safe_load(Path("base.yaml").read_text()) | {"run_dir": f"{MARKUP} \u202eexe.txt"}
    Path("base.yaml").write_text(yaml.safe_dump(values, allow_unicode=True))


def _renamed(original: str) -> Callable[[], None]:
    def rename() -> None:
        Path(original).rename(NAME)

    return rename


def _nothing() -> None:
    """The name is an argument alone."""


# command -> what is prepared, and its words
PRINTED: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
    "data pack": (_rows, ("data", "pack", "sft.yaml", "--overwrite")),
    "data show": (_rows, ("data", "show", "store")),
    "data stats": (_rows, ("data", "stats", "store")),
    "data show, by name": (_renamed("store"), ("data", "show", NAME)),
    "data verify, by name": (_renamed("store"), ("data", "verify", NAME)),
    "config show": (_settings, ("config", "show", "sft.yaml")),
    "convert inspect": (_renamed("model"), ("convert", "inspect", NAME)),
    "convert verify": (_renamed("model"), ("convert", "verify", NAME, "converted")),
    "convert hf-to-megatron": (_nothing, ("convert", "hf-to-megatron", "model", NAME)),
    "launch logs": (_logs, ("launch", "logs", "run")),
    "launch status": (_logs, ("launch", "status", "run")),
    "launch": (_nothing, ("launch", "sft.yaml", "--cluster", "cluster.yaml", "--dry-run", "--name", NAME)),
    "bench report": (_records, ("bench", "report", "bench")),
    "synthesize show": (_row, ("synthesize", "show", "synthesized/rows.jsonl")),
    "synthesize report": (_renamed("synthesized"), ("synthesize", "report", NAME)),
    "select": (_rules, ("select", "select.yaml", "--output", "selected")),
    "generate": (_nothing, ("generate", "generate.yaml", "--output", NAME)),
    "a command": (_nothing, (NAME,)),
    "an option": (_nothing, ("plan", "sft.yaml", "--gpus", "2", "--gpu", ARGUMENT)),
    "a config": (_nothing, ("train", NAME)),
    "a model": (_nothing, ("reference", "pairs", "--model", NAME)),
    "an override": (_nothing, ("train", "sft.yaml", f"{ARGUMENT}=1")),
}


@pytest.mark.parametrize("name", PRINTED)
def test_nothing_hostile_reaches_the_terminal(
    name: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(sys, "argv", sys.argv)
    prepare, words = PRINTED[name]
    Copy(world, tmp_path / "w").heal()
    prepare()
    status = _run(*words)
    out, err = capfd.readouterr()
    shown = RICH.sub("", out + err)
    assert status in (0, 2) and "Traceback" not in err
    assert not unsafe(shown), shown
    assert MARKUP in shown or MARKUP.replace("/", "") in shown or name in SILENT, shown
    for page in Path().glob("bench/*.html"):
        text = page.read_text()
        assert MARKUP in text and not unsafe(text)
