"""`megatron-post generate`: K responses a prompt, from a journal in which no answer is lost."""

import asyncio
import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from rich.console import Console

from megatron_post.config.section import Count, Line, Name, Section, Whole
from megatron_post.convert.open_model import open_weights_directory
from megatron_post.inference.backend import Backend, open_backend
from megatron_post.inference.drawing import Progress, Share, draw_from_servers, draw_in_process
from megatron_post.inference.failures import (
    check_failures,
    failed_prompts,
    failures_of,
    read_failures,
    write_failures,
)
from megatron_post.inference.journal import Journal
from megatron_post.inference.model import answer_in
from megatron_post.inference.prompts import Prompt, read_prompts
from megatron_post.inference.ranks import rank_prefix, wait_until
from megatron_post.inference.request import Refusal, Request
from megatron_post.inference.samples import Draw, sample_seed
from megatron_post.inference.settings import (
    PART,
    BackendSettings,
    SamplesPerPrompt,
    ServerBackend,
    TransformersBackend,
    VllmBackend,
)
from megatron_post.parallel.environment import rank_from_environment
from megatron_post.storage.checksums import sha256_of_file
from megatron_post.storage.files import write_json, write_pieces
from megatron_post.storage.reading import read_object

OpenBackend = Callable[[TransformersBackend | VllmBackend, str, Sequence[str]], Backend]
_RECORD = "settings.json"


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
    part: Count = Field(32, description=PART)

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

    Each answer is appended to a journal beside the output as it arrives, and the same call again goes on with
    an interrupted one. A response's seed follows from (seed, prompt, sample): with a deterministic backend
    the same call writes the same bytes. Ranks of one step, each with the model to itself, draw every so
    many-th part each on a file system that they share, and all return once the output is there. Returns the
    responses drawn by this call.

    What is refused or too long is a failure: it is written to `failures_of(output)` and not asked again.
    Raises `ValueError` for bad prompts, an existing `output`, an unfinished one of other settings, a bad
    server, a full disk, and `TooManyFailures`; what was answered is kept then.
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
    if rank > 0:
        wait_until(
            lambda: target.exists() or _is_begun(parts, settings),
            f"rank 0 to begin {target} with these settings and prompts",
            console,
        )
        with Journal(parts, rank) as journal:
            if target.exists():  # it was complete without this rank
                shutil.rmtree(parts, ignore_errors=True)
                return 0
            share = _draw(journal, target, pieces[rank::size], len(prompts), settings, console, open_backend)
        wait_until(target.exists, f"rank 0 to put {target} together", console)
        return share.written
    with Journal(parts) as journal:
        _claim(parts, settings, journal)
        share = _draw(journal, target, pieces[::size], len(prompts), settings, console, open_backend)
        write_pieces(target, _lines(target, prompts, settings, journal, console))
    if failures := read_failures(target):
        console.print(
            f"{target}: {failed_prompts(failures):,} of {len(prompts):,} prompts failed, "
            f"{failures_of(target)} has the reasons",
            highlight=False,
            soft_wrap=True,
        )
    # behind the lock: NFS keeps a name for what is open. What is left, the next call removes
    shutil.rmtree(parts, ignore_errors=True)
    return share.written


def parts_of(output: Path) -> Path:
    """Where the answers for an unfinished output are."""
    return output.with_name(f".partial-{output.name}")


def _draw(
    journal: Journal,
    target: Path,
    pieces: Sequence[Sequence[Prompt]],
    num_prompts: int,
    settings: Generate,
    console: Console,
    open_backend: OpenBackend,
) -> Share:
    """Draw what this rank's journal and the others' lack of its pieces."""
    share = Share(journal, num_prompts, settings.max_failed)
    model = str(_recorded(parts_of(target))["model"])
    lacking, left = [], Counter[int]()
    for piece in pieces:
        if prompts := share.missing(_draws(piece, settings, model)):
            lacking.append(piece)
            left.update(prompts)
    if not left:
        return share
    parts = (list(_draws(piece, settings, model)) for piece in lacking)
    total = sum(map(len, pieces))
    with Progress(console, share, total - len(left), total) as progress:
        if isinstance(settings.backend, ServerBackend):
            draws = chain.from_iterable(parts)
            asyncio.run(draw_from_servers(settings.backend, draws, left, share, progress.advance))
        else:
            with contextlib.closing(
                open_backend(settings.backend, settings.model, settings.content_tokens)
            ) as backend:
                draw_in_process(backend, parts, share, progress.advance)
        console.print(
            f"{rank_prefix()}{target}: {share.written:,} responses, {share.tokens:,} tokens in "
            f"{progress.seconds:.1f} s, {progress.rate}",
            highlight=False,
            soft_wrap=True,
        )
    return share


def _draws(prompts: Iterable[Prompt], settings: Generate, model: str) -> Iterator[Draw]:
    """model: what the journal calls it."""
    sampling, seed = settings.sampling.of_each, settings.sampling.seed
    for prompt in prompts:
        messages = prompt.with_system(settings.system)
        for sample in range(settings.sampling.samples):
            request = Request(messages, sampling, sample_seed(seed, prompt.number, sample))
            scope = ("generate", *settings.content_tokens)
            yield Draw(prompt.number, sample, request, settings.model, model, scope)


def _lines(
    target: Path, prompts: Sequence[Prompt], settings: Generate, journal: Journal, console: Console
) -> Iterator[str]:
    """The output's lines, once all ranks have answered. The failures' file is written before the last of them
    is, since the output then appears."""
    failures = []
    for draw in _draws(prompts, settings, str(_recorded(parts_of(target))["model"])):
        entry = journal.get(draw.key)
        if entry is None:
            wait_until(partial(_has, journal, draw.key), f"the other parts of {target}", console)
            entry = journal.get(draw.key)
            assert entry is not None
        answer = answer_in(entry, draw.key)
        if isinstance(answer, Refusal):
            failures.append(draw.row(answer))
        else:
            yield json.dumps(draw.row(answer)) + "\n"
    check_failures(failures, prompts=len(prompts), max_failed=settings.max_failed)
    write_failures(target, failures)


def _has(journal: Journal, key: str) -> bool:
    """Whether a rank has answered."""
    journal.refresh()
    return key in journal


def _claim(parts: Path, settings: Generate, journal: Journal) -> None:
    """Record what is drawn here, or go on where it is the same."""
    wanted = _record(settings)
    if len(journal):  # nothing is lost where another call failed before its first answer
        found = _recorded(parts)
        if changed := [key for key in ("settings", "model") if found.get(key) != wanted[key]]:
            raise ValueError(
                f"{parts} belongs to an unfinished generation with other {', '.join(changed)}; finish that "
                "one with its own settings, or remove it"
            )
    write_json(parts / _RECORD, wanted)


def _is_begun(parts: Path, settings: Generate) -> bool:
    """Whether rank 0 has begun with the same settings and prompts.

    It alone looks at the model, of which other nodes may have copies of their own.
    """
    wanted = _asked(settings)
    return {**_recorded(parts), "model": None} == {**wanted, "model": None}


def _record(settings: Generate) -> dict[str, Any]:
    backend = settings.backend
    model = backend.served_model if isinstance(backend, ServerBackend) else _weights(settings.model)
    return _asked(settings) | {"model": model}


def _asked(settings: Generate) -> dict[str, Any]:
    """settings: those that responses depend on. prompts: which of them are asked, and more may follow."""
    depending = {"model", "system", "content_tokens", "sampling"}
    return {
        "settings": json.loads(settings.model_dump_json(include=depending)),
        "prompts": [sha256_of_file(Path(settings.prompts)), settings.skip, settings.max_prompts],
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
