"""Junk at every reader: its value, or an error of the user's that names the file or its directory."""

import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_post.bench.record import read_records
from megatron_post.config.chain import load_chain
from megatron_post.config.data import Source
from megatron_post.config.load import load_config
from megatron_post.convert.hf_config import from_hf_config
from megatron_post.convert.hf_directory import HuggingFaceDirectory
from megatron_post.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_post.convert.meta_source import MetaDirectory
from megatron_post.convert.metadata_file import read_metadata
from megatron_post.convert.safetensors_file import read_header
from megatron_post.convert.source import read_rows as read_weights
from megatron_post.curation.rules import load_rules
from megatron_post.data.rows import BadRows, read_rows
from megatron_post.data.store import open_store
from megatron_post.data.tokenizer import load_tokenizer
from megatron_post.errors import message_of
from megatron_post.inference.prompts import read_prompts
from megatron_post.inference.samples import read_samples
from megatron_post.launch.cluster import load_cluster
from megatron_post.launch.record import last_message, submitted_jobs
from megatron_post.rounds.merge_settings import load_merge
from megatron_post.rounds.settings import load_round
from megatron_post.rounds.state import State
from megatron_post.storage.files import read_lines
from megatron_post.storage.manifest import read_manifest, verify_step
from megatron_post.train.history import read_history
from tests.unit.junk.junk import replace_by_junk
from tests.unit.junk.runner import ENOUGH, SEED, Copy, inputs, limits

STEP = "converted/step-00000000"


def _rows(name: str) -> Callable[[], Any]:
    columns = {"user": "question", "assistant": "answer"} if ".csv" in name else {}
    columns = {"text": "text"} if "documents" in name else columns
    return lambda: list(read_rows(Source(name=name, path=name, columns=columns), bad_rows=BadRows(10**6)))


def _packs() -> None:
    store = open_store("store", "train")
    for index in range(len(store)):
        store.read(index)


def _weights(source: Any) -> None:
    for name in source.tensors:
        read_weights(source, name, 0, 1)


# what is read, by which call; a directory stands for what the error must name
READERS: dict[str, tuple[str, Callable[[], Any], int]] = {
    "config": ("sft.yaml", lambda: load_config("sft.yaml"), 40),
    "base of sft.yaml": ("base.yaml", lambda: load_config("sft.yaml"), 40),
    "cluster": ("cluster.yaml", lambda: load_cluster("cluster.yaml"), 40),
    "chain": ("chain.yaml", lambda: load_chain("chain.yaml"), 40),
    "round": ("round.yaml", lambda: load_round("round.yaml"), 40),
    "merge": ("merge.yaml", lambda: load_merge("merge.yaml", "linear"), 40),
    "rules": ("rules.yaml", lambda: load_rules("rules.yaml"), 40),
    "tokenizer.json": ("tokenizer/tokenizer.json", lambda: load_tokenizer("tokenizer").fingerprint, 40),
    "tokenizer.model": ("meta/tokenizer.model", lambda: load_tokenizer("meta/tokenizer.model"), 40),
    "JSON lines": ("rows.jsonl", _rows("rows.jsonl"), 40),
    "gzip": ("rows.jsonl.gz", _rows("rows.jsonl.gz"), 40),
    "array": ("array.json", _rows("array.json"), 40),
    "CSV": ("rows.csv", _rows("rows.csv"), 20),
    "CSV, gzip": ("rows.csv.gz", _rows("rows.csv.gz"), 20),
    "Parquet": ("rows.parquet", _rows("rows.parquet"), 20),
    "pairs": ("pairs.jsonl", _rows("pairs.jsonl"), 40),
    "documents": ("documents.jsonl", _rows("documents.jsonl"), 40),
    "labelled steps": ("steps.jsonl", _rows("steps.jsonl"), 40),
    "steps": ("step-reward/config.json", lambda: _weights(HuggingFaceDirectory("step-reward")), 20),
    "prompts": ("prompts.jsonl", lambda: read_prompts("prompts.jsonl"), 40),
    "samples": ("samples.jsonl", lambda: read_samples(Path("samples.jsonl")), 40),
    "scores": ("scores.jsonl", lambda: list(read_lines(Path("scores.jsonl"))), 40),
    "packs": ("store/train/tokens/c/0/0", _packs, 20),
    "store": ("store/zarr.json", _packs, 25),
    "columns": ("store/train/segment/length/c/0", _packs, 25),
    "safetensors": ("model/model.safetensors", lambda: read_header(Path("model/model.safetensors")), 40),
    "config of a model": ("model/config.json", lambda: from_hf_config(Path("model")), 40),
    "Hugging Face": ("model/config.json", lambda: _weights(HuggingFaceDirectory("model")), 25),
    "Meta's parameters": ("meta/params.json", lambda: _weights(MetaDirectory("meta")), 25),
    "Meta's weights": ("meta/consolidated.00.pth", lambda: _weights(MetaDirectory("meta")), 25),
    "manifest": (f"{STEP}/manifest.json", lambda: read_manifest(Path(STEP)), 40),
    "metadata": (f"{STEP}/.metadata", lambda: read_metadata(Path(STEP, ".metadata")), 40),
    "files of a checkpoint": (f"{STEP}/config.json", lambda: verify_step(Path(STEP)), 25),
    "checkpoint": (f"{STEP}/__0_0.distcp", lambda: _weights(MegatronCheckpoint("converted")), 25),
    "record": ("bench/step-2026.json", lambda: read_records("bench"), 40),
    "jobs": ("run/slurm/jobs.jsonl", lambda: submitted_jobs("run"), 40),
    "log": ("run/slurm/1.log", lambda: last_message(Path("run/slurm/1.log")), 40),
    "state of rounds": ("rounds/state.json", lambda: State(Path("rounds"), {}), 40),
    "metrics": ("run/metrics.jsonl", lambda: read_history(Path("run")), 40),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_readers(
    name: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, read, count = READERS[name]
    monkeypatch.chdir(tmp_path)
    copy, faults, tried = Copy(world, tmp_path / "w"), [], inputs(count)
    copy.heal()
    read()  # what is valid is read
    for number in range(tried):
        rng = random.Random(f"{SEED}/{name}/{number}")
        copy.heal()
        done = replace_by_junk(rng, Path(file))
        try:
            with limits():
                read()
        except BaseException as error:
            message = message_of(error)
            names = (*Path(file).parts, *name.split())
            if message is None or ENOUGH in message or not any(part in message for part in names):
                faults.append(
                    f"input {number}: {done}:\n{''.join(traceback.format_exception(error))[-1500:]}"
                )
    with capsys.disabled():
        print(f"\njunk: {name}: {tried} inputs, {len(faults)} errors that do not name the file", end="")
    assert not faults, "\n\n".join(faults[:5])
