"""Greedy answers of the demo's model, here or in a process of its own."""

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

from megatron_post.bench.gpu_day.plan import OUTPUT, RESULT

_DEMO = Path(__file__).resolve().parents[3] / "runs" / "demo"
_PROMPTS = "held_out_prompts.jsonl"
_ANSWERS = 300


def demo_model(directory: Path) -> Path | None:
    """A directory with the demo's model and prompts: that of `make demo`, or a carried one, which is unpacked
    into `directory`."""
    if (_DEMO / "hf").is_dir():
        return _DEMO
    for archive in Path(os.environ.get("GPU_DAY_OUTPUT", OUTPUT)).glob("*/demo.tar"):
        with tarfile.open(archive) as content:
            content.extractall(directory, filter="data")
        return directory
    return None


def answer(model: Path, environment: Mapping[str, str] | None = None) -> list[str]:
    """Texts in the prompts' order, from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_post.bench.gpu_day.answers", str(model)],
        env=os.environ | dict(environment or {}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    return [str(text) for text in json.loads(line.removeprefix(RESULT))]


def answer_here(model: Path) -> list[str]:
    """The same in this process, on the GPU where there is one."""
    from megatron_post.data.dialog import Message
    from megatron_post.inference.backend import open_backend
    from megatron_post.inference.request import Reply, Request, Sampling
    from megatron_post.inference.settings import TransformersBackend

    rows = [json.loads(line) for line in (model / _PROMPTS).read_text().splitlines()[:_ANSWERS]]
    backend = open_backend(TransformersBackend(), str(model / "hf"))
    greedy = Sampling(temperature=0.0, max_tokens=96)
    requests = [Request(tuple(Message(**m) for m in row["prompt"]), greedy, seed=0) for row in rows]
    drawn = backend.respond(requests)
    return [found.text if isinstance(found, Reply) else "" for found in drawn]


if __name__ == "__main__":
    print(RESULT + json.dumps(answer_here(Path(sys.argv[1]))), flush=True)
