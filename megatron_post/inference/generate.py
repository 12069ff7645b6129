"""`megatron-post generate` writes K responses per prompt. A journal ensures that no answer is lost."""

import asyncio
import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator
from rich.console import Console

from megatron_post.config.load import SettingsSource, section_of
from megatron_post.config.section import Count, Line, Name, Section, Whole
from megatron_post.convert.open_model import open_weights_directory
from megatron_post.display import make_console
from megatron_post.inference.backend import Backend, open_backend
from megatron_post.inference.drawing import Share, ShareProgress, draw_from_servers, draw_in_process
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

    model: Name = Field(description="Hugging Face directory, or with a server the name that is recorded")
    prompts: Name = Field(description="JSON lines of prompt, and optionally capability, answer, solution")
    skip: Whole = Field(0, description="number of good prompts to skip")
    max_prompts: Count | None = Field(None, description="largest number of good prompts. null: all")
    capabilities: tuple[Annotated[str, Field(max_length=4096)], ...] | None = Field(
        None,
        description="only the prompts of these capabilities, within the range of skip and max_prompts. "
        "An empty text names the prompts without one. null: all",
    )
    max_bad_rows: Whole = Field(
        0, description="bad rows of prompts that are left out. With more of them generation fails"
    )
    max_failed: float = Field(
        0.01, ge=0, le=1, description="share of the prompts, rounded up, that may be refused or too long"
    )
    system: dict[str, str] = Field(
        default_factory=dict,
        description="system prompt of each capability. `default` is that of all other capabilities",
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


@dataclass(frozen=True)
class Generated:
    """The result of `generate`.

    written: the number of responses that this call has generated on this rank. failed_prompts: the number of
    prompts that lack a response. failures: the file with their reasons, or None if nothing failed.
    """

    output: Path
    written: int
    failed_prompts: int
    failures: Path | None


def generate(
    settings: Generate | SettingsSource,
    output: str | Path,
    *,
    console: Console | None = None,
    open_backend: OpenBackend = open_backend,
) -> Generated:
    """Write K responses to each prompt, one JSON line per response.

    A line has the number of the prompt, sample, seed and checkpoint. Its `messages` are the whole dialog,
    which `score` and training read. Each answer is appended to a journal next to the output as it arrives,
    and the same call continues an interrupted one. The seed of a response follows from (seed, prompt,
    sample), so with a deterministic backend the same call writes the same bytes.

    Several ranks of a step, each with its own copy of the model, take parts in turn. They need a shared file
    system, and all return when the output exists. Ranks that share a node must call `take_gpus` before.

    settings: also a YAML file of them, or its keys and values.

    A request that is refused or too long is a failure. It is written to `failures_of(output)` and not sent
    again. Raises `ValueError` for bad prompts, an existing `output`, an unfinished one with other settings, a
    bad server, a full disk, and `TooManyFailures`. Recorded answers are then kept.
    """
    console, settings = console or make_console(), section_of(Generate, settings)
    target = Path(output)
    written = _write(settings, target, console, open_backend)
    failures = failures_of(target)
    return Generated(
        target,
        written,
        failed_prompts(read_failures(target)),
        failures if failures.exists() else None,
    )


def _write(settings: Generate, target: Path, console: Console, open_backend: OpenBackend) -> int:
    """Do this rank's share of `generate`. Returns the number of responses that it has generated."""
    rank, size, _ = rank_from_environment()
    parts = parts_of(target)
    if target.exists():
        if rank == 0:
            if not parts.exists():
                raise ValueError(f"{target} exists already; choose another --output, or remove it")
            shutil.rmtree(parts, ignore_errors=True)  # the last call was killed before it removed them
        return 0
    prompts = read_prompts(
        settings.prompts,
        max_bad_rows=settings.max_bad_rows,
        skip=settings.skip,
        limit=settings.max_prompts,
        capabilities=settings.capabilities,
    )
    pieces = [prompts[i : i + settings.part] for i in range(0, len(prompts), settings.part)]
    if rank > 0:
        wait_until(
            partial(_is_begun, target, _asked(settings)),
            f"rank 0 to begin {target} with these settings and prompts",
            console,
        )
        with Journal(parts, rank) as journal:
            model = _recorded(parts).get("model")
            if target.exists():  # the other ranks have finished the output, and may have removed the record
                shutil.rmtree(parts, ignore_errors=True)
                return 0
            share = Share(journal, len(prompts), settings.max_failed)
            _draw(share, target, pieces[rank::size], settings, str(model), console, open_backend)
        wait_until(target.exists, f"rank 0 to put {target} together", console)
        return share.written
    with Journal(parts) as journal:
        model = _claim(parts, settings, journal)
        share = Share(journal, len(prompts), settings.max_failed)
        _draw(share, target, pieces[::size], settings, model, console, open_backend)
        write_pieces(target, _lines(target, prompts, settings, model, journal, console))
    if failures := read_failures(target):
        console.print(
            f"{target}: {failed_prompts(failures):,} of {len(prompts):,} prompts failed, "
            f"{failures_of(target)} has the reasons",
            highlight=False,
            soft_wrap=True,
        )
    # After the journal is closed, because NFS keeps open files under another name. The next call removes what
    # is left.
    shutil.rmtree(parts, ignore_errors=True)
    return share.written


def parts_of(output: Path) -> Path:
    """The directory with the answers of an unfinished output."""
    return output.with_name(f".partial-{output.name}")


def _draw(
    share: Share,
    target: Path,
    pieces: Sequence[Sequence[Prompt]],
    settings: Generate,
    model: str,
    console: Console,
    open_backend: OpenBackend,
) -> None:
    """Generate the answers to this rank's pieces that no journal has. model: its name in the journal."""
    lacking, left = [], Counter[int]()
    for piece in pieces:
        if prompts := share.missing(_draws(piece, settings, model)):
            lacking.append(piece)
            left.update(prompts)
    if not left:
        return
    parts = (list(_draws(piece, settings, model)) for piece in lacking)
    total = sum(map(len, pieces))
    with ShareProgress(console, share, total - len(left), total) as progress:
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


def _draws(prompts: Iterable[Prompt], settings: Generate, model: str) -> Iterator[Draw]:
    """Yield every response that is requested. model: the model's name in the journal."""
    sampling, seed = settings.sampling.of_each, settings.sampling.seed
    for prompt in prompts:
        messages = prompt.with_system(settings.system)
        for sample in range(settings.sampling.samples):
            request = Request(messages, sampling, sample_seed(seed, prompt.number, sample))
            scope = ("generate", *settings.content_tokens)
            yield Draw(prompt.number, sample, request, settings.model, model, scope)


def _lines(
    target: Path,
    prompts: Sequence[Prompt],
    settings: Generate,
    model: str,
    journal: Journal,
    console: Console,
) -> Iterator[str]:
    """Yield the output's lines, and wait for answers of other ranks.

    The file of failures is written before this ends, because the output appears directly afterwards.
    """
    failures = []
    for draw in _draws(prompts, settings, model):
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
    """Whether any rank's journal has an answer."""
    journal.refresh()
    return key in journal


def _claim(parts: Path, settings: Generate, journal: Journal) -> str:
    """Record the settings of this generation. Returns the model's name in the journal.

    Raises `ValueError` if there are answers of other settings.
    """
    wanted = _record(settings)
    if len(journal):  # without answers, a call with other settings loses nothing
        found = _recorded(parts)
        if changed := [key for key in ("settings", "model") if found.get(key) != wanted[key]]:
            raise ValueError(
                f"{parts} belongs to an unfinished generation with other {', '.join(changed)}; finish that "
                "one with its own settings, or remove it"
            )
    write_json(parts / _RECORD, wanted)
    return str(wanted["model"])


def _is_begun(target: Path, wanted: dict[str, Any]) -> bool:
    """Whether rank 0 has begun with the same settings and prompts, or has finished.

    Only rank 0 records the model's fingerprint, because other nodes may use copies of the model.
    """
    return target.exists() or {**_recorded(parts_of(target)), "model": None} == {**wanted, "model": None}


def _record(settings: Generate) -> dict[str, Any]:
    backend = settings.backend
    model = backend.served_model if isinstance(backend, ServerBackend) else _weights(settings.model)
    return _asked(settings) | {"model": model}


def _asked(settings: Generate) -> dict[str, Any]:
    """The settings on which responses depend, and the prompts. More prompts may be added later."""
    depending = {"model", "system", "content_tokens", "sampling"}
    own = [] if settings.capabilities is None else [list(settings.capabilities)]
    return {
        "settings": json.loads(settings.model_dump_json(include=depending)),
        "prompts": [sha256_of_file(Path(settings.prompts)), settings.skip, settings.max_prompts, *own],
    }


def _recorded(parts: Path) -> dict[str, Any]:
    """The recorded settings, or nothing before `_claim` and after the directory has been removed."""
    path = parts / _RECORD
    return read_object(path, "the record of a generation") if path.exists() else {}


def _weights(model: str) -> str:
    """A language model's fingerprint. Raises `ValueError` if the directory has no language model."""
    source = open_weights_directory(Path(model))
    if source.scalar_head:
        raise ValueError(f"{model} is a reward model, which scores responses and writes none")
    return source.fingerprint
