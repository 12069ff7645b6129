"""`megatron-post generate`: K responses a prompt, in parts that are there whole or not at all."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_post.config.schema import Section
from megatron_post.convert.open_source import open_weights_directory
from megatron_post.rounds.backends import (
    Backend,
    BackendSettings,
    Request,
    Response,
    Sampling,
    ServerBackend,
    TransformersBackend,
    open_backend,
)
from megatron_post.rounds.files import read_lines, write_json, write_lines, write_pieces
from megatron_post.rounds.prompts import Prompt, read_prompts
from megatron_post.rounds.state import alone

OpenBackend = Callable[[BackendSettings, str], Backend]
_SECONDS_BETWEEN_LINES = 60.0


class Generate(Section):
    """A generation file."""

    model: str = Field(description="Hugging Face directory; with a server, a name for the record")
    prompts: str = Field(description="JSON lines of prompt, and if known capability, answer, solution")
    skip: int = Field(0, ge=0, description="good prompts passed over")
    max_prompts: PositiveInt | None = None
    max_bad_rows: int = Field(0, ge=0)
    system: dict[str, str] = Field(
        default_factory=dict, description="capability -> system prompt; default: any other capability's"
    )
    sampling: Sampling = Sampling()
    backend: BackendSettings = TransformersBackend()
    part: PositiveInt = Field(32, description="prompts of a part; a crash loses the part in progress")


def generate(
    settings: Generate, output: str | Path, *, console: Console, open_backend: OpenBackend = open_backend
) -> int:
    """Write K responses to each prompt: a JSON line a response, with its prompt's number, sample, seed and
    checkpoint. `messages` in it is the whole dialog, which `score` and training read.

    The same call again goes on with an interrupted one. A response's seed follows from (seed, prompt,
    sample): with a deterministic backend the same call writes the same bytes. Returns the responses written
    by this call. Raises `ValueError` for bad prompts, an existing `output`, an unfinished one of other
    settings, a bad server and a full disk; finished parts are kept then.
    """
    target = Path(output)
    parts = parts_of(target)
    if target.exists():
        if not parts.exists():
            raise ValueError(f"{target} exists already; choose another --output, or remove it")
        shutil.rmtree(parts)  # killed between its last two acts
        return 0
    prompts = read_prompts(
        settings.prompts, max_bad_rows=settings.max_bad_rows, skip=settings.skip, limit=settings.max_prompts
    )
    pieces = [prompts[i : i + settings.part] for i in range(0, len(prompts), settings.part)]
    with alone(parts):
        _claim(parts, settings)
        names = [parts / f"part-{i:06d}.jsonl" for i in range(len(pieces))]
        missing = [i for i, name in enumerate(names) if not name.is_file()]
        written = tokens = 0
        started = time.perf_counter()
        backend = open_backend(settings.backend, settings.model) if missing else None
        done = sum(len(piece) for i, piece in enumerate(pieces) if i not in missing)
        with _Progress(console, done, len(prompts)) as progress:
            for i in missing:
                assert backend is not None
                rows = _rows(pieces[i], backend, settings)
                write_lines(names[i], rows)
                written, tokens = written + len(rows), tokens + sum(row["tokens"] for row in rows)
                rate = f"{tokens / (time.perf_counter() - started):,.0f} tokens/s"
                progress.advance(len(pieces[i]), rate)
        write_pieces(target, (name.read_text(encoding="utf-8") for name in names))
        shutil.rmtree(parts)
    seconds = time.perf_counter() - started
    console.print(
        f"{target}: {written:,} responses, {tokens:,} tokens in {seconds:.1f} s, "
        f"{tokens / seconds:,.0f} tokens/s",
        highlight=False,
        soft_wrap=True,
    )
    return written


def parts_of(output: Path) -> Path:
    """Where the parts of an unfinished output are."""
    return output.with_name(f".partial-{output.name}")


def sample_seed(seed: int, prompt: int, sample: int) -> int:
    """Below 2^63, and unrelated for neighbours."""
    digest = hashlib.sha256(f"{seed}/{prompt}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Rows that `generate` wrote. Raises `ValueError` for other rows."""
    rows = list(read_lines(path))
    keys = {"prompt", "sample", "checkpoint", "seed", "messages", "tokens", "finish"}
    for number, row in enumerate(rows, start=1):
        if not keys <= row.keys():
            raise ValueError(f"{path}:{number}: no sample: {sorted(keys - row.keys())} missing")
    return rows


def _rows(prompts: Sequence[Prompt], backend: Backend, settings: Generate) -> list[dict[str, Any]]:
    drawn = [(prompt, k) for prompt in prompts for k in range(settings.sampling.samples)]
    requests = [
        Request(p.with_system(settings.system), sample_seed(settings.sampling.seed, p.number, k))
        for p, k in drawn
    ]
    responses = backend.respond(requests, settings.sampling)
    return [
        _row(prompt, sample, request, response, settings.model)
        for (prompt, sample), request, response in zip(drawn, requests, responses, strict=True)
    ]


def _row(prompt: Prompt, sample: int, request: Request, response: Response, model: str) -> dict[str, Any]:
    return {
        "prompt": prompt.number,
        "sample": sample,
        "checkpoint": model,
        "seed": request.seed,
        "tokens": response.tokens,
        "finish": response.finish,
        "messages": [*request.messages, {"role": "assistant", "content": response.text.strip()}],
    }


def _claim(parts: Path, settings: Generate) -> None:
    """Make the directory of the parts, or go on with it where it is of the same settings."""
    record = parts / "settings.json"
    wanted = {
        "settings": json.loads(settings.model_dump_json()),
        "prompts": hashlib.sha256(Path(settings.prompts).read_bytes()).hexdigest(),
        "model": None if isinstance(settings.backend, ServerBackend) else _weights(settings.model),
    }
    if not any(parts.glob("part-*.jsonl")):  # nothing is lost where another call failed before its first part
        write_json(record, wanted)
    found = json.loads(record.read_text())
    if found != wanted:
        changed = [key for key in wanted if found.get(key) != wanted[key]]
        raise ValueError(
            f"{parts} belongs to an unfinished generation with other {', '.join(changed)}; finish that one "
            "with its own settings, or remove it"
        )


def _weights(model: str) -> str:
    """A language model's fingerprint. Raises `ValueError` where there is none."""
    source = open_weights_directory(Path(model))
    if source.scalar_head:
        raise ValueError(f"{model} is a reward model, which scores responses and writes none")
    return source.fingerprint


class _Progress:
    """A bar on a terminal; elsewhere, in the log of a job, a line a minute."""

    def __init__(self, console: Console, done: int, total: int) -> None:
        self._console, self._done, self._total = console, done, total
        self._said = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("prompts, {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console if console.is_terminal else Console(quiet=True),
        )
        self._task = self._bar.add_task("generating", completed=done, total=total, rate="")

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, prompts: int, rate: str) -> None:
        self._done += prompts
        self._bar.update(self._task, advance=prompts, rate=rate)
        if not self._console.is_terminal and time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self._console.print(f"{self._done:,} of {self._total:,} prompts, {rate}", highlight=False)
