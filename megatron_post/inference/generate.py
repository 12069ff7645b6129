"""`megatron-post generate`: K responses a prompt, in parts that are there whole or not at all."""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, model_validator
from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn, TimeRemainingColumn

from megatron_post.config.section import Count, Line, Name, Section, Whole
from megatron_post.convert.open_model import open_weights_directory
from megatron_post.display import make_console, make_progress
from megatron_post.inference.backend import Backend, open_backend
from megatron_post.inference.failures import (
    beside_part,
    check_failures,
    failed_prompts,
    failures_in,
    failures_of,
    write_failures,
)
from megatron_post.inference.prompts import Prompt, read_prompts
from megatron_post.inference.request import Refusal, Reply, Request, messages_as_json
from megatron_post.inference.settings import (
    BackendSettings,
    SamplesPerPrompt,
    ServerBackend,
    TransformersBackend,
    gpus_of,
)
from megatron_post.parallel.environment import rank_from_environment
from megatron_post.storage.checksums import sha256_of_file
from megatron_post.storage.files import read_lines, write_json, write_lines, write_pieces
from megatron_post.storage.lock import only_process_in
from megatron_post.storage.reading import read_object, reading

OpenBackend = Callable[[BackendSettings, str, Sequence[str]], Backend]
_RECORD = "settings.json"
_SECONDS_BETWEEN_LINES = 60.0
_SECONDS_BETWEEN_LOOKS = 0.5  # at a file system that processes share


class _Said(BaseModel):
    role: str
    content: str


class _Sample(BaseModel, strict=True):
    """The keys of a row of responses that others rely on; a row may have more."""

    prompt: int
    sample: int
    checkpoint: str
    seed: int
    tokens: int
    finish: str
    messages: list[_Said] = Field(min_length=1)


class Generate(Section):
    """A generation file."""

    model: Name = Field(description="Hugging Face directory; with a server, a name for the record")
    prompts: Name = Field(description="JSON lines of prompt, and if known capability, answer, solution")
    skip: Whole = Field(0, description="good prompts passed over")
    max_prompts: Count | None = Field(None, description="good prompts answered, at most; null: all")
    max_bad_rows: Whole = Field(
        0, description="rows of prompts that may be refused, and are left out, before generation ends"
    )
    max_failed: float = Field(
        0.01, ge=0, le=1, description="share of the prompts, rounded up, that may be refused or too long"
    )
    system: dict[str, str] = Field(
        default_factory=dict, description="capability -> system prompt; default: any other capability's"
    )
    content_tokens: tuple[Line, ...] = Field(
        (), description="special tokens of the model's tokenizer that prompts may spell and responses keep"
    )
    sampling: SamplesPerPrompt = SamplesPerPrompt()
    backend: BackendSettings = TransformersBackend()
    part: Count = Field(32, description="prompts of a part; a crash loses the part in progress")

    @model_validator(mode="after")
    def _has_a_tokenizer(self) -> "Generate":
        if self.content_tokens and isinstance(self.backend, ServerBackend):
            raise ValueError(
                "content_tokens: a server renders prompts with its own tokenizer, where these tokens must "
                "not be special; leave them out here"
            )
        return self


def generate(
    settings: Generate, output: str | Path, *, console: Console, open_backend: OpenBackend = open_backend
) -> int:
    """Write K responses to each prompt: a JSON line a response, with its prompt's number, sample, seed and
    checkpoint. `messages` in it is the whole dialog, which `score` and training read.

    The same call again goes on with an interrupted one. A response's seed follows from (seed, prompt,
    sample): with a deterministic backend the same call writes the same bytes. Ranks of one step, each with
    the model to itself, draw every so many-th part each on a file system that they share, and all return
    once the output is there. Returns the responses written by this call.

    What is refused or too long is a failure: it is written to `failures_of(output)` and not asked again.
    Raises `ValueError` for bad prompts, an existing `output`, an unfinished one of other settings, a bad
    server, a full disk, and `TooManyFailures`; finished parts are kept then.
    """
    rank, size, _ = rank_from_environment()
    target = Path(output)
    parts = parts_of(target)
    if target.exists():
        if rank == 0:
            if not parts.exists():
                raise ValueError(f"{target} exists already; choose another --output, or remove it")
            shutil.rmtree(parts, ignore_errors=True)  # killed between its last two acts
        return 0
    prompts = read_prompts(
        settings.prompts, max_bad_rows=settings.max_bad_rows, skip=settings.skip, limit=settings.max_prompts
    )
    pieces = [prompts[i : i + settings.part] for i in range(0, len(prompts), settings.part)]
    names = [parts / f"part-{i:06d}.jsonl" for i in range(len(pieces))]
    own = dict(zip(names[rank::size], pieces[rank::size], strict=True))
    if rank > 0:
        wanted = _record(settings)
        # rank 0 alone asks for the same model: other nodes may have copies of their own
        wait_until(
            lambda: target.exists() or {**_recorded(parts), "model": None} == {**wanted, "model": None},
            f"rank 0 to begin {target} with these settings and prompts",
            console,
        )
        written = _draw(target, own, len(prompts), settings, console, open_backend)
        wait_until(target.exists, f"rank 0 to put {target} together", console)
        return written
    with only_process_in(parts):
        _claim(parts, settings)
        written = _draw(target, own, len(prompts), settings, console, open_backend)
        wait_until(lambda: all(name.is_file() for name in names), f"the other parts of {target}", console)
        failures = failures_in(names)
        check_failures(failures, prompts=len(prompts), max_failed=settings.max_failed)
        write_failures(target, failures)
        write_pieces(target, (name.read_text(encoding="utf-8") for name in names))
    if failures:
        console.print(
            f"{target}: {failed_prompts(failures):,} of {len(prompts):,} prompts failed, "
            f"{failures_of(target)} has the reasons",
            highlight=False,
            soft_wrap=True,
        )
    # behind the lock: NFS keeps a name for what is open. What is left, the next call removes
    shutil.rmtree(parts, ignore_errors=True)
    return written


def wait_until(done: Callable[[], bool], what: str, console: Console) -> None:
    """Until another rank of this step has done something; whoever started them ends all where one fails.

    Raises `ValueError` where that one is gone.
    """
    parent, said = os.getppid(), time.monotonic()
    while not done():
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        if os.getppid() != parent:
            raise ValueError(f"what started this rank is gone, while it waited for {what}")
        if time.monotonic() - said >= _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            console.print(f"{_who()}waiting for {what}", highlight=False, soft_wrap=True)


def take_gpus(backend: BackendSettings) -> None:
    """Of a node on which several ranks draw, use those GPUs that are this rank's. Once a process, before
    anything of CUDA begins. Raises `ValueError` where there are too few.
    """
    _, size, local_rank = rank_from_environment()
    count = gpus_of(backend)
    # device_count asks NVML; is_available would begin CUDA, after which no variable changes what is visible
    if size == 1 or count == 0 or torch.cuda.device_count() == 0:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    own = devices[local_rank * count : (local_rank + 1) * count]
    if len(own) < count:
        raise ValueError(
            f"rank {local_rank} of this node would draw on GPUs {local_rank * count} to "
            f"{(local_rank + 1) * count - 1}, and sees {len(devices)}: let every rank see all GPUs of its "
            "node, and have no more ranks on it (generate.copies, ranks_per_node) than these hold"
        )
    if isinstance(backend, TransformersBackend):
        torch.cuda.set_device(local_rank)
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # vLLM's processes meet in a store of their own


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
    for number, row in enumerate(rows, start=1):
        with reading(f"{path}:{number}: no sample"):
            _Sample.model_validate(row)
    return rows


def _draw(
    target: Path,
    own: Mapping[Path, Sequence[Prompt]],
    num_prompts: int,
    settings: Generate,
    console: Console,
    open_backend: OpenBackend,
) -> int:
    """Write those of this rank's parts that are missing. Returns the responses written.

    A part is not written where it has too many failures: these are asked again when the server is mended.
    """
    missing = {name: prompts for name, prompts in own.items() if not name.is_file()}
    if not missing or target.exists():  # in this order: parts are removed once the target is there
        return 0
    total, failures = sum(map(len, own.values())), failures_in(own)
    written = tokens = 0
    started = time.perf_counter()
    with (
        contextlib.closing(
            open_backend(settings.backend, settings.model, settings.content_tokens)
        ) as backend,
        _Progress(console, total - sum(map(len, missing.values())), total) as progress,
    ):
        for name, prompts in missing.items():
            rows, failed = _rows(prompts, backend, settings)
            failures += failed
            check_failures(failures, prompts=num_prompts, max_failed=settings.max_failed)
            write_lines(beside_part(name), failed)
            write_lines(name, rows)
            written, tokens = written + len(rows), tokens + sum(row["tokens"] for row in rows)
            rate = f"{tokens / (time.perf_counter() - started):,.0f} tokens/s"
            progress.advance(len(prompts), rate)
    seconds = time.perf_counter() - started
    console.print(
        f"{_who()}{target}: {written:,} responses, {tokens:,} tokens in {seconds:.1f} s, "
        f"{tokens / seconds:,.0f} tokens/s",
        highlight=False,
        soft_wrap=True,
    )
    return written


def _who() -> str:
    """Begins a line of one of several ranks."""
    rank, size, _ = rank_from_environment()
    return f"rank {rank} of {size}: " if size > 1 else ""


def _rows(
    prompts: Sequence[Prompt], backend: Backend, settings: Generate
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The responses, and the failures."""
    drawn = [(prompt, k) for prompt in prompts for k in range(settings.sampling.samples)]
    sampling, seed = settings.sampling.of_each, settings.sampling.seed
    requests = [
        Request(p.with_system(settings.system), sampling, sample_seed(seed, p.number, k)) for p, k in drawn
    ]
    responses = backend.respond(requests)
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for (prompt, sample), request, response in zip(drawn, requests, responses, strict=True):
        draw = {"prompt": prompt.number, "sample": sample, "checkpoint": settings.model}
        if isinstance(response, Refusal):
            failed.append(draw | {"reason": response.reason})
        else:
            rows.append(draw | _said(request, response))
    return rows, failed


def _said(request: Request, reply: Reply) -> dict[str, Any]:
    answer = replace(reply.message, content=reply.text.strip())
    return {
        "seed": request.seed,
        "tokens": reply.tokens,
        "finish": reply.finish,
        "messages": messages_as_json([*request.messages, answer]),
    }


def _claim(parts: Path, settings: Generate) -> None:
    """Make the directory of the parts, or go on with it where it is of the same settings."""
    wanted = _record(settings)
    if not any(parts.glob("part-*.jsonl")):  # nothing is lost where another call failed before its first part
        write_json(parts / _RECORD, wanted)
    found = _recorded(parts)
    if found != wanted:
        changed = [key for key in wanted if found.get(key) != wanted[key]]
        raise ValueError(
            f"{parts} belongs to an unfinished generation with other {', '.join(changed)}; finish that one "
            "with its own settings, or remove it"
        )


def _record(settings: Generate) -> dict[str, Any]:
    """What parts must have in common."""
    return {
        "settings": json.loads(settings.model_dump_json(exclude={"max_failed"})),
        "prompts": sha256_of_file(Path(settings.prompts)),
        "model": None if isinstance(settings.backend, ServerBackend) else _weights(settings.model),
    }


def _recorded(parts: Path) -> dict[str, Any]:
    """Of the parts that are there; nothing before they are claimed, or after they were removed."""
    path = parts / _RECORD
    return read_object(path, "the record of a generation") if path.exists() else {}


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
        self._bar = make_progress(
            console if console.is_terminal else make_console(quiet=True),
            MofNCompleteColumn(),
            TextColumn("prompts, {task.fields[rate]}"),
            TimeRemainingColumn(),
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
            self._console.print(f"{_who()}{self._done:,} of {self._total:,} prompts, {rate}", highlight=False)
