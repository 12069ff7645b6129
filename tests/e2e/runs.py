"""A small packed store on disk, and the real command line on real ranks."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
from rich.console import Console

from megatron_post.config.load import to_yaml
from megatron_post.config.schema import Config
from megatron_post.data.build import build_store
from megatron_post.data.tokenizer import train_small_tokenizer
from tests.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[2]


def small_run(directory: Path, **sections: object) -> Config:
    """A config with a tokenizer and a packed store of 240 short dialogs under `directory`."""
    dialogs = [
        [
            {"role": "user", "content": f"What is {i} plus {i % 7}?"},
            {"role": "assistant", "content": f"{i} plus {i % 7} is {i + i % 7}." + " Indeed." * (i % 5)},
        ]
        for i in range(240)
    ]
    lines = "".join(json.dumps({"messages": messages}) + "\n" for messages in dialogs)
    (directory / "rows.jsonl").write_text(lines)
    train_small_tokenizer((m["content"] for d in dialogs for m in d), 300).save(directory / "tokenizer")
    values: dict = {
        "model": {"vocab_size": 512},
        "tokenizer": {"path": str(directory / "tokenizer")},
        "data": {
            "store": str(directory / "store"),
            "sources": [{"name": "sums", "path": str(directory / "rows.jsonl")}],
        },
        "train": {"steps": 8, "global_batch": 4, "export_hf": True},
        "checkpoint": {"every": 2, "keep": 2},
    }
    for name, keys in sections.items():
        values[name] = {**values.get(name, {}), **keys}  # type: ignore[dict-item]
    config = tiny_config(directory / "run", **values)
    build_store(config, console=Console(quiet=True), overwrite=True)
    (directory / "config.yaml").write_text(to_yaml(config))
    return config


def start(
    command: list[str], *, ranks: int, log: Path, module: str = "megatron_post"
) -> subprocess.Popen[bytes]:
    """Start `megatron-post COMMAND` on ranks, under torchrun if there are several. Output goes to `log`."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with log.open("ab") as out:
        return subprocess.Popen(
            [*launcher, "-m", module, *command],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def kill_9(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to a launcher and all its ranks at once. torchrun gives each rank a session of its own."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=10)
    process.wait()
