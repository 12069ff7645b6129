"""Junk at every command: a message and status 2, or success; never a traceback, never a hang.

JUNK_INPUTS=N tries N inputs for each command in place of the default, JUNK_SEED=N others. Both hold for
test_readers.py too.
"""

import random
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from megatron_post import cli
from tests.unit.junk.junk import junk_argument, replace_by_junk
from tests.unit.junk.runner import ENOUGH, SEED, Copy, inputs, limits
from tests.unit.test_display import RICH, unsafe

CONFIG = ["sft.yaml", "base.yaml"]
WEIGHTS = ["model/config.json", "model/model.safetensors"]
TOKENIZER = ["tokenizer/tokenizer.json"]
STORE = [f"store/{name}" for name in
         ("zarr.json", "checksums.json", "train/zarr.json", "train/segment/length/zarr.json",
          "train/tokens/c/0/0", "train/segment/length/c/0", "train/segment_offsets/c/0")]  # fmt: skip
PAIRS = [name.replace("store", "pairs", 1) for name in STORE]
CONVERTED = [f"converted/step-00000000/{name}" for name in
             ("manifest.json", ".metadata", "config.json", "__0_0.distcp", "tokenizer.json")]  # fmt: skip
ROWS = [
    "rows.jsonl",
    "rows.jsonl.gz",
    "rows.csv",
    "rows.csv.gz",
    "rows.parquet",
    "array.json",
    "folder/train.jsonl",
]
ROUND = ["round.yaml", "reward.yaml", "sft.yaml", "dpo.yaml", "base.yaml", "prompts.jsonl",
         "model/config.json", "model/tokenizer.json", "rounds/state.json"]  # fmt: skip
RUN = ["run/slurm/jobs.jsonl", "run/slurm/1.log"]
SELECT = ["select.yaml", "rules.yaml", "prompts.jsonl", "samples.jsonl", "scores.jsonl", "step-scores.jsonl"]

# command -> its words, the files that it reads, and inputs by default. Every command must have an entry.
COMMANDS: dict[str, tuple[str, list[str], int]] = {
    "train": ("sft.yaml", [*CONFIG, *TOKENIZER, *STORE], 12),
    "doctor": ("", [], 3),
    "config list": ("", [], 2),
    "config copy": ("tiny/sample --to copies", [], 2),
    "demo": ("--config sft.yaml --run-dir demo", CONFIG, 20),
    "data pack": ("sft.yaml --overwrite", [*CONFIG, *TOKENIZER, *ROWS], 40),
    "data prompt": ("prompted.yaml --output prompted.jsonl --group train",
                    ["prompted.yaml", "base.yaml", "templates.yaml", "films.jsonl"], 40),
    "data show": ("store --pack 0", [*TOKENIZER, *STORE], 40),
    "data stats": ("store", STORE, 40),
    "data verify": ("store", STORE, 40),
    "config show": ("sft.yaml train.steps=3", CONFIG, 40),
    "config schema": ("", [], 2),
    "bench step": ("sft.yaml --steps 1 --warmup 0", CONFIG, 20),
    "bench data": ("--rounds 1 --output bench", [], 10),
    "bench balance": ("", [], 1),
    "bench trl": ("--rounds 1 --output bench", [], 10),
    "bench kernels": ("--output bench", [], 5),
    "bench convert": ("--model 8b --rounds 1 --directory scratch --output bench", [], 10),
    "bench merge": ("--gigabytes 1 --directory scratch --output bench", [], 10),
    "bench curation": ("--rows 1000 --words 60 --directory scratch --output bench", [], 10),
    "bench pack": ("--rows 10 --rounds 1 --directory scratch --output bench", [], 10),
    "bench checkpoint": ("sft.yaml --directory scratch --output bench", CONFIG, 10),
    "report": ("run", ["run/metrics.jsonl", "run/starts.jsonl"], 25),
    "bench report": ("bench --html report.html", ["bench/*.json"], 40),
    "convert hf-to-megatron": ("model new", [*WEIGHTS, "model/tokenizer.json"], 25),
    "convert megatron-to-hf": ("converted hf", [*CONVERTED, ".converting-hf/conversion.json"], 25),
    "convert verify": ("model converted", [*WEIGHTS, *CONVERTED], 25),
    "convert inspect": ("converted", CONVERTED, 25),
    "convert plan": ("model --max-shard-size 5GB", WEIGHTS, 25),
    "launch submit": ("sft.yaml --cluster cluster.yaml --dry-run", [*CONFIG, "cluster.yaml"], 40),
    "launch status": ("run", RUN, 25),
    "launch cancel": ("run", RUN, 25),
    "launch logs": ("run --lines 3", RUN, 25),
    "launch check-nodes": ("sft.yaml", CONFIG, 10),
    "launch round": ("chain.yaml --cluster cluster.yaml --dry-run",
                     ["chain.yaml", "cluster.yaml", *CONFIG], 40),
    "launch curate": ("curation.yaml --cluster cluster.yaml --dry-run",
                      ["curation.yaml", "cluster.yaml"], 25),
    "launch synthesize": ("synthesis.yaml --cluster cluster.yaml --dry-run",
                          ["synthesis.yaml", "cluster.yaml"], 25),
    "plan show": ("sft.yaml --gpus 2 --html plan.html", CONFIG, 25),
    "plan compare": ("sft.yaml dpo.yaml --gpus 1", CONFIG, 15),
    "plan search": ("sft.yaml --gpus 2 --output best.yaml", CONFIG, 20),
    "plan dry-run": ("sft.yaml --gpus 1", CONFIG, 20),
    "reference": ("pairs --model model", [*WEIGHTS, *PAIRS], 20),
    "score": ("reward rows.jsonl --output scored.jsonl",
              ["reward/config.json", "reward/model.safetensors", "reward/tokenizer.json", "rows.jsonl",
               "scored.jsonl", "scored.jsonl.origin.json"], 20),
    "merge": ("linear --config merge.yaml --output merged",
              [*WEIGHTS, "merge.yaml", ".converting-merged/conversion.json"], 25),
    "push": ("published acme/Llama-x --dry-run",
             ["published/*.json", "published/model.safetensors", "published/README.md"], 20),
    "evaluate tasks": ("model --tasks none", [*WEIGHTS], 3),
    "evaluate choices": ("model choices.jsonl --output ranked.jsonl", [*WEIGHTS, "choices.jsonl"], 15),
    "generate": ("generate.yaml --output drawn.jsonl",
                 ["generate.yaml", "prompts.jsonl", *WEIGHTS, "model/tokenizer.json",
                  ".partial-drawn.jsonl/settings.json"], 25),
    "synthesize list": ("", [], 2),
    "synthesize run": ("synthesis.yaml max_failed=0.5",
                       ["synthesis.yaml", "prompts.jsonl", "answers/ask.j2", "model/config.json",
                        "synthesized/run.json", "synthesized/summary.json",
                        "synthesized/journal/journal-00000.jsonl"], 25),
    "synthesize serve": ("synthesis.yaml", ["synthesis.yaml"], 10),
    "synthesize end-servers": ("synthesis.yaml", ["synthesis.yaml"], 10),
    "synthesize show": ("synthesized/rows.jsonl --row 1",
                        ["synthesized/rows.jsonl", "synthesized/journal/journal-00000.jsonl"], 25),
    "synthesize report": ("synthesized", ["synthesized/run.json", "synthesized/summary.json"], 25),
    "annotate export": ("pages samples.jsonl --key key.jsonl", ["samples.jsonl"], 40),
    "annotate import": ("annotate answers.jsonl --key annotate-key.jsonl --output preferences.jsonl",
                        ["annotate/pairs.jsonl", "annotate-key.jsonl", "answers.jsonl"], 40),
    "curate run": ("curation.yaml", ["curation.yaml", "rows.jsonl", "rows.csv",
                                     "curated/columns/*/*.parquet", "curated/columns/*/*.json"], 40),
    "curate labels": ("labels.yaml --output labels.jsonl",
                      ["labels.yaml", "topics.yaml", "labelled/rows.jsonl", "labelled/dropped.jsonl"], 25),
    "curate show": ("curated --source rows", ["curated/report.json", "curated/rows.jsonl"], 25),
    "select": ("select.yaml --output selected", SELECT, 40),
    "round": ("round.yaml --only round-01/report", ROUND, 40),
}  # fmt: skip

# what a benchmark calls once it has read its input
MEASURED = {
    "data": "bench.data.measure_data",
    "trl": "bench.trl.steps.measure_beside_trl",
    "convert": "bench.convert.measure_conversions",
    "merge": "bench.merge.measure_merges",
    "checkpoint": "bench.checkpoint.measure_checkpoints",
    "pack": "bench.trl.packing.measure_packing",
    "curation": "bench.curation.side_by_side.measure_side_by_side",
}
# what an earlier command has left is in the way of a valid one, and is there only where it is what is damaged
LEFTOVERS = (".converting-*/*", ".partial-*/*", "scored.jsonl*", "rounds/*")
# these end with 2 on a valid input: there is no Slurm, no step before this one, or `light` stops them
STOPS = {
    "evaluate tasks",
    "launch status",
    "launch cancel",
    "demo",
    "round",
    "synthesize serve",
    *(f"bench {name}" for name in MEASURED),
}


@pytest.fixture
def copy(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    monkeypatch.chdir(tmp_path)  # and back at the end
    return Copy(world, tmp_path / "w")


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """What measures or trains for minutes ends with a message at the point where its input has been read."""

    def enough(*_: object, **__: object) -> Any:
        raise ValueError("all input has been read")

    for name in ("demo.run.make_problems", *MEASURED.values()):
        monkeypatch.setattr(f"megatron_post.{name}", enough)


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The status of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["megatron-post", *words])
    with limits(), pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def commands() -> list[str]:
    """Every command of the application, as a user types it."""

    def below(group: Any, words: str) -> Iterator[str]:
        for name, command in group.commands.items():
            path = f"{words} {name}".strip()
            yield from below(command, path) if hasattr(command, "commands") else [path]

    return sorted(below(typer.main.get_command(cli.app), ""))


def test_every_command_is_tried() -> None:
    assert commands() == sorted(COMMANDS), "give a new command an entry in COMMANDS"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(
    command: str,
    copy: Copy,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words, patterns, count = COMMANDS[command]
    faults, tried = [], inputs(count)
    for number in range(tried):
        rng = random.Random(f"{SEED}/{command}/{number}")
        copy.heal()
        argv = [*command.split(), *words.split()]
        files = [path for pattern in patterns for path in sorted(Path().glob(pattern))]
        places = range(len(command.split()), len(argv))
        # the first input is valid, which shows that the others are tried far enough
        chosen = rng.choice(files) if files and number and (rng.random() < 0.8 or not places) else None
        for left in [path for pattern in LEFTOVERS for path in Path().glob(pattern) if path != chosen]:
            left.unlink()
        done = "" if chosen is None else replace_by_junk(rng, chosen)
        if number and places and not done:
            known = [word for word in argv if not word.startswith("-")] + [*map(str, files)]
            argv[rng.choice(places)] = junk_argument(rng, known)
        try:
            status = run(argv, monkeypatch)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            status, text = 1, "".join(traceback.format_exception(error))
        else:
            text = ""
        out, err = capfd.readouterr()
        text += err
        allowed = (0, 1, 2) if command == "plan show" else (0, 2)
        ugly = unsafe(RICH.sub("", out + err))
        valid = number > 0 or status == 0 or command in STOPS
        if status not in allowed or "Traceback" in text or ENOUGH in text or ugly or not valid:
            end = "\n".join(text.splitlines()[-12:])
            faults.append(f"input {number}: {argv} {done}: status {status} {ugly}\n{end}")
    with capfd.disabled():
        print(f"\njunk: {command}: {tried} inputs, {len(faults)} tracebacks", end="")
    assert not faults, "\n\n".join(faults[:5])
