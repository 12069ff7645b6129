"""The workload of both sides of a comparison: one tokenizer, one packed store and one set of weights."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_post.config.load import validate
from megatron_post.config.schema import Config
from megatron_post.convert.hf_config import to_hf_config
from megatron_post.data.build import build_store
from megatron_post.data.pack import Pack
from megatron_post.data.store import PackStore, open_store
from megatron_post.data.template import TokenRole
from megatron_post.data.tokenizer import train_small_tokenizer
from megatron_post.display import make_console

GSM8K = Path("data/gsm8k/train.jsonl")  # in the working directory, see docs/benchmark_commands.md
VOCAB_SIZE = 2048
ROWS = 4000


@dataclass(frozen=True)
class Workload:
    """A training run for either side, on `threads` threads, in rounds of `steps_per_round` steps."""

    config: Config
    data_name: str
    threads: int
    steps_per_round: int


def make_workload(
    directory: Path,
    *,
    threads: int,
    steps_per_round: int,
    pack_length: int = 1024,
    packs_per_step: int = 4,
    rows: int = ROWS,
) -> Workload:
    """Write tokenizer, store and random Hugging Face weights of the tiny preset into `directory`.

    The data is GSM8K if its file exists, and otherwise additions in words. Training is in fp32
    with Adam and a constant learning rate.
    """
    data = _write_rows(directory / "rows.jsonl", rows)
    texts = (text for row in _read(directory / "rows.jsonl") for text in row.values())
    train_small_tokenizer(texts, VOCAB_SIZE).save(directory / "tokenizer")
    columns = {"user": "question", "assistant": "answer"}
    source = {"name": data, "path": str(directory / "rows.jsonl"), "columns": columns}
    config = validate(
        {
            "run_dir": str(directory / "run"),
            "model": {"preset": "tiny", "vocab_size": VOCAB_SIZE, "init_from": str(directory / "weights")},
            "tokenizer": {"path": str(directory / "tokenizer")},
            "data": {"store": str(directory / "store"), "sources": [source], "pack_length": pack_length},
            "precision": {"dtype": "fp32"},
            "optimizer": {"lr": 1e-3, "schedule": "constant"},
            "train": {"steps": 10**6, "global_batch": packs_per_step, "log_every": 10**6},
        },
        origin="bench",
    )
    build_store(config, console=make_console(quiet=True))
    _write_weights(config)
    return Workload(config, data, threads, steps_per_round)


def segments(store: PackStore) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens and labels of every dialog in the store, both int64 [n].

    The label of an untrained token is -100.
    """
    for index in range(len(store)):
        pack = store.read(index)
        for start, end in zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:], strict=True):
            real = pack.roles[start:end] != TokenRole.PADDING
            if real.any():
                tokens = pack.tokens[start:end][real].astype(np.int64)
                yield tokens, np.where(trained(pack.roles[start:end][real]), tokens, -100)


def open_train_store(config: Config) -> PackStore:
    """The workload's packed store."""
    return open_store(config.data.store, "train")


def trained(roles: np.ndarray) -> np.ndarray:
    """Whether each token has loss, as bool [n]: assistant bodies and terminators have. roles is uint8 [n]."""
    return (roles == TokenRole.BODY) | (roles == TokenRole.TERMINATOR)


def count_tokens(packs: list[Pack]) -> tuple[int, int]:
    """(real tokens, tokens with loss)."""
    real = sum(int((pack.roles != TokenRole.PADDING).sum()) for pack in packs)
    return real, sum(int(trained(pack.roles).sum()) for pack in packs)


def _write_rows(path: Path, count: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if GSM8K.is_file():
        path.write_text("".join(line + "\n" for line in GSM8K.read_text().splitlines()[:count]))
        return "GSM8K"
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            numbers = [draw.randrange(100) for _ in range(draw.randrange(2, 40))]
            question = (
                "Tom counts apples in baskets: " + ", then ".join(map(str, numbers)) + ". How many in all?"
            )
            answer = f"{' + '.join(map(str, numbers))} = {sum(numbers)}"
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")
    return "generated sums"


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as file:
        yield from map(json.loads, file)


def _write_weights(config: Config) -> None:
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    torch.manual_seed(config.seed)
    values = to_hf_config(config.model, dtype="float32", bos_id=None, eos_ids=[0], pad_id=None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
    model.save_pretrained(config.model.init_from)
