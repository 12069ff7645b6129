"""Measures `data pack` beside `datasets.map` with TRL's packing, on the same rows of one turn.

Both sides read the same file, render with the same tokenizer and template, pack with best-fit and write the
result. Each runs in a process of its own, and in shuffled turns.
"""

import importlib.util
import json
import random
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from rich.table import Table

from megatron_post.bench.curation.own_side import in_processes
from megatron_post.bench.environment import environment
from megatron_post.bench.memory import peak_rss
from megatron_post.bench.record import Figure, Record
from megatron_post.bench.tables import titled
from megatron_post.config.load import validate
from megatron_post.data.build import build_store
from megatron_post.data.store import open_store
from megatron_post.data.tokenizer import train_small_tokenizer
from megatron_post.display import make_console
from megatron_post.installation import install_command

_PACK_LENGTH = 8192
_VOCABULARY, _WORDS = 2048, 3000
# Llama 3's template without tools. The exported one also checks messages and texts, which takes longer.
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_OWN, _TRL = "data pack", "TRL"


@dataclass(frozen=True)
class Packing:
    """How one side packed `rows` rows.

    peak: memory of its largest process, in MiB. tokens: tokens that it wrote, without padding.
    """

    side: str
    rows: int
    workers: int
    seconds: float
    peak: float
    tokens: int


def measure_packing(directory: Path, *, rows: list[int], workers: list[int], rounds: int) -> list[Packing]:
    """Measure every combination once a round. Each round shuffles the order.

    Raises `ValueError` for counts that give no measurement, if TRL is not installed, and if the two sides
    write another number of tokens.
    """
    if min([*rows, *workers, rounds]) < 1:
        raise ValueError(f"--rows {rows} --workers {workers} --rounds {rounds}: give at least 1")
    if importlib.util.find_spec("trl") is None:
        raise ValueError(f"TRL is not installed, so there is no comparison; run: {install_command('bench')}")
    draw = random.Random(0)
    _write_rows(directory, max(rows), draw)
    found: list[Packing] = []
    for _ in range(rounds):
        turns = [
            (side, n, w) for side in (_OWN, _TRL) for n in dict.fromkeys(rows) for w in dict.fromkeys(workers)
        ]
        draw.shuffle(turns)
        for number, (side, count, processes) in enumerate(turns):
            place = directory / f"turn-{len(found)}-{number}"
            (packing,) = in_processes(_pack, [(side, directory, place, count, processes)])
            found.append(packing)
    for count in rows:
        if len(tokens := {each.tokens for each in found if each.rows == count}) > 1:
            raise ValueError(
                f"the sides wrote {' and '.join(map(str, sorted(tokens)))} tokens of {count} rows"
            )
    return found


def packing_table(found: list[Packing]) -> Table:
    """A row for each number of rows and workers, with medians of both sides."""
    title = (
        f"data pack beside datasets.map and TRL's packing, packs of {_PACK_LENGTH:,}: rows/s, and MiB of the "
        "largest process"
    )
    table = titled(title, ("rows", "workers", _OWN, "MiB", _TRL, "MiB", "ratio"))
    for count, workers in dict.fromkeys(sorted((each.rows, each.workers) for each in found)):
        own, other = (_of(found, side, count, workers) for side in (_OWN, _TRL))
        ratio = median(b.seconds / a.seconds for a, b in zip(own, other, strict=True))
        cells = [
            f"{value:,.0f}" for side in (own, other) for value in (_speed(side), max(e.peak for e in side))
        ]
        table.add_row(f"{count:,}", str(workers), *cells, f"{ratio:.2f}")
    return table


def packing_record(found: list[Packing]) -> Record:
    """The record with the speeds and peaks of every round."""
    figures = {}
    for side, count, workers in dict.fromkeys((each.side, each.rows, each.workers) for each in found):
        name, each = f"{side}: {count:,} rows, {workers} workers", _of(found, side, count, workers)
        figures[name] = Figure("rows/s", tuple(count / one.seconds for one in each), "higher")
        figures[f"{name}: peak"] = Figure("MiB", tuple(one.peak for one in each), "lower")
    return Record("pack", "data pack beside TRL", {"pack length": str(_PACK_LENGTH)}, figures, environment())


def _of(found: list[Packing], side: str, rows: int, workers: int) -> list[Packing]:
    return [each for each in found if (each.side, each.rows, each.workers) == (side, rows, workers)]


def _speed(found: list[Packing]) -> float:
    return median(each.rows / each.seconds for each in found)


def _write_rows(directory: Path, count: int, draw: random.Random) -> None:
    """Rows of random words with long-tailed lengths, about 200 tokens each, and a tokenizer for them."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(_WORDS)]

    def text(mean: float) -> str:
        return " ".join(
            draw.choices(words, k=max(1, min(1500, round(draw.lognormvariate(np.log(mean), 0.8)))))
        )

    with (directory / "rows.jsonl").open("w") as file:
        for _ in range(count):
            file.write(json.dumps({"prompt": text(20), "completion": text(40)}) + "\n")
    train_small_tokenizer([text(500) for _ in range(50)], _VOCABULARY).save(directory / "tokenizer")


def _pack(side: str, inputs: Path, place: Path, rows: int, workers: int) -> Packing:
    """Pack the first rows in this process. Imports are not counted."""
    place.mkdir()
    with (inputs / "rows.jsonl").open() as file, (place / "rows.jsonl").open("w") as target:
        target.writelines(line for line, _ in zip(file, range(rows), strict=False))
    seconds, tokens = (_pack_own if side == _OWN else _pack_trl)(inputs / "tokenizer", place, workers)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return Packing(side, rows, workers, seconds, max(peak_rss(), children) / 2**20, tokens)


def _pack_own(tokenizer: Path, place: Path, workers: int) -> tuple[float, int]:
    source = {"name": "rows", "path": str(place / "rows.jsonl")}
    values = {
        "run_dir": str(place / "run"),
        "model": {"preset": "tiny", "vocab_size": _VOCABULARY},
        "tokenizer": {"path": str(tokenizer)},
        "data": {"store": str(place / "store"), "sources": [source], "pack_length": _PACK_LENGTH},
        "train": {"steps": 1, "global_batch": 1},
    }
    config = validate(values, origin="bench")
    started = time.perf_counter()
    build_store(config, console=make_console(quiet=True), workers=workers)
    seconds = time.perf_counter() - started
    return seconds, int(open_store(config.data.store, "train").column("length").sum())


def _pack_trl(tokenizer: Path, place: Path, workers: int) -> tuple[float, int]:
    import datasets
    import transformers
    import trl

    datasets.disable_progress_bars()
    own = transformers.AutoTokenizer.from_pretrained(tokenizer)
    own.chat_template = _TEMPLATE

    def render(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = [{"role": "user", "content": row["prompt"]}]
        answer = [*prompt, {"role": "assistant", "content": row["completion"]}]
        before = own.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        whole = own.apply_chat_template(answer, return_dict=False)
        mask = [0] * len(before) + [1] * (len(whole) - len(before))
        return {"input_ids": whole, "completion_mask": mask}

    processes = None if workers == 1 else workers
    started = time.perf_counter()
    rows = datasets.load_dataset(
        "json", data_files=str(place / "rows.jsonl"), split="train", cache_dir=str(place / "cache")
    )
    rendered = rows.map(render, remove_columns=rows.column_names, num_proc=processes)
    packed = trl.pack_dataset(rendered, _PACK_LENGTH, "bfd", {"num_proc": processes})
    packed.save_to_disk(str(place / "packed"))
    seconds = time.perf_counter() - started
    return seconds, sum(map(sum, packed["seq_lengths"]))
