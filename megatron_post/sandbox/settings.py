"""Settings of the sandbox, which is bubblewrap or a site's container command, and limits of programs."""

import string
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from megatron_post.config.section import Count, Line, Name, Positive, Section

PLACEHOLDERS = ("directory", "name", "memory_mib", "processes", "disk_mib", "seconds")


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError(f"{path!r} is not an absolute path, and a program has another working directory")
    return path


def _template(words: tuple[str, ...]) -> tuple[str, ...]:
    for word in words:
        try:
            fields = [field for _, field, _, _ in string.Formatter().parse(word) if field is not None]
        except ValueError as error:
            raise ValueError(f"{word!r}: {error}; write {{{{ and }}}} for braces") from None
        for field in fields:
            if field not in PLACEHOLDERS:
                raise ValueError(
                    f"{word!r} has the unknown placeholder {{{field}}}. The placeholders are "
                    f"{', '.join(f'{{{name}}}' for name in PLACEHOLDERS)}"
                )
    return words


_Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
_Text = Annotated[str, Field(pattern=r"^[^\x00]*$", max_length=100_000)]
_Template = Annotated[tuple[Line, ...], Field(min_length=1), AfterValidator(_template)]


class Limits(Section):
    """Limits of one program together with all processes that it starts."""

    seconds: Positive = Field(30.0, le=86_400, description="wall-clock time until a program is killed")
    cpu_seconds: Positive = Field(10.0, le=86_400, description="processor time on all cores together")
    memory_mib: Count = Field(1024, le=2**20, description="memory, without the files that a program writes")
    processes: Count = Field(64, le=2**15, description="processes and threads at a time")
    open_files: Count = Field(
        256,
        ge=16,
        le=2**16,
        description="open files, pipes and sockets of one process. All together may have four times as many",
    )
    disk_mib: Count = Field(64, le=2**20, description="size of all files, which are kept in memory")
    output_kib: Count = Field(256, le=2**20, description="size of standard output and error together")


class _Sandbox(Section):
    programs: Count | None = Field(
        None,
        le=4096,
        description="programs that run at a time in one process; null: one for each core, and at most 32",
    )
    limits: Limits = Field(Limits(), description="limits of programs for which the recipe sets none")


class Bubblewrap(_Sandbox):
    """bubblewrap, which needs user namespaces but no rights of root."""

    kind: Literal["bubblewrap"] = Field("bubblewrap", description="selects this sandbox")
    read_only: tuple[Annotated[Name, AfterValidator(_absolute)], ...] = Field(
        (),
        description="more directories that programs can read, such as one with Python packages. Under root "
        "every user must be able to read them",
    )
    environment: dict[_Variable, _Text] = Field(
        {},
        description="more variables of a program, such as PYTHONPATH. It gets no variables of this process",
    )


class Container(_Sandbox):
    """A container command of the site, which must itself isolate the network, files and environment."""

    kind: Literal["command"] = Field(description="selects this sandbox")
    command: _Template = Field(
        description="words in front of a program's command. {directory} has the program's files and must be "
        "the working directory inside"
    )
    stop: _Template | None = Field(
        None, description="ends a container that is not a child of `command`, such as docker kill {name}"
    )


SandboxSettings = Annotated[Bubblewrap | Container, Field(discriminator="kind")]
