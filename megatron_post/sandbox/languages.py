"""The files and the command that run a program in one of six languages."""

import re
from typing import Literal, NamedTuple, get_args

Language = Literal["python", "javascript", "cpp", "java", "rust", "bash"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
# The tools that each language needs on the PATH. rustc links with cc.
TOOLS: dict[Language, tuple[str, ...]] = {
    "python": ("python3",),
    "javascript": ("node",),
    "cpp": ("g++",),
    "java": ("java", "javac"),
    "rust": ("rustc", "cc"),
    "bash": ("bash",),
}
ALL_TOOLS = tuple(name for names in TOOLS.values() for name in names)
_STDIN = "stdin.txt"
# By default Java takes a share of the machine. These options give it one core and a small heap at first.
# MEMORY_MIB is the limit of memory, which the sandbox sets for each program. The heap has half of it, because
# Java itself needs 60 to 100 MiB. A full heap then always ends as an OutOfMemoryError.
_JAVA_OPTIONS = (
    "-XX:+UseSerialGC", "-XX:ActiveProcessorCount=1", "-XX:TieredStopAtLevel=1", "-Xms16m",
    "-Xmx$((MEMORY_MIB / 2))m",
)  # fmt: skip
_PYTHON_CHECK = "import sys; compile(open(sys.argv[1], 'rb').read(), sys.argv[1], 'exec')"
_COMMENTS = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_PUBLIC = re.compile(
    r"\bpublic\s+(?:(?:final|abstract|sealed|strictfp)\s+)*(?:class|interface|enum|record)\s+(\w{1,100})"
)


class Code(NamedTuple):
    """The files and the command of a program, for `Sandbox.run`."""

    files: dict[str, str | bytes]
    command: tuple[str, ...]


def program(
    language: Language, source: str, *, stdin: str | bytes | None = None, check: bool = False
) -> Code:
    """The code that compiles and runs a program of one file. Raises `ValueError` for an unknown language.

    check: only parse and compile the program. stdin: empty by default.
    """
    name, run, compile_only = _known(language, source)
    files: dict[str, str | bytes] = {name: source}
    if check:
        return Code(files, ("sh", "-c", compile_only))
    if stdin is None:
        return Code(files, ("sh", "-c", run))
    return Code({**files, _STDIN: stdin}, ("sh", "-c", f"exec <{_STDIN} && {run}"))


class Steps(NamedTuple):
    """Shell commands that build a program once and run it many times, in the directory of its file.

    build: in a language without a compiler, it only checks the syntax. run: the program's arguments can be
    appended.
    """

    file: str
    build: str
    run: str


def steps(language: Language, source: str) -> Steps:
    """The steps of a program of one file. Raises `ValueError` for an unknown language."""
    file, run, check = _known(language, source)
    match language:
        case "cpp" | "rust":
            build, _, _ = run.partition(" && ")
            return Steps(file, build, "exec /tmp/program")
        case "java":
            main = file.removesuffix(".java")
            return Steps(file, check, f"exec java {' '.join(_JAVA_OPTIONS)} -cp /tmp/classes {main}")
        case _:
            return Steps(file, check, run)


def _known(language: Language, source: str) -> tuple[str, str, str]:
    if language not in TOOLS:
        raise ValueError(f"{language!r} cannot be run. The languages are {', '.join(LANGUAGES)}")
    return _commands(language, source)


def _commands(language: Language, source: str) -> tuple[str, str, str]:
    """The name of the file, the command that runs it, and the command that only compiles it."""
    match language:
        case "python":
            return "main.py", "exec python3 main.py", f'exec python3 -c "{_PYTHON_CHECK}" main.py'
        case "javascript":
            return (
                "main.js",
                "exec node --max-old-space-size=${MEMORY_MIB} main.js",
                "exec node --check main.js",
            )
        case "cpp":
            compiler = "g++ -std=c++20 -O1"
            run = f"{compiler} -o /tmp/program main.cpp && exec /tmp/program"
            return "main.cpp", run, f"{compiler} -fsyntax-only main.cpp"
        case "java":
            public = _PUBLIC.search(_COMMENTS.sub(" ", source))  # a public class must have its file's name
            name = f"{public[1] if public else 'Main'}.java"
            options = " ".join(f"-J{option}" for option in _JAVA_OPTIONS)
            check = f"exec javac {options} -proc:none -d /tmp/classes {name}"
            return name, f"exec java {' '.join(_JAVA_OPTIONS)} {name}", check
        case "rust":
            compiler = "rustc --edition 2021 -C opt-level=1"
            run = f"{compiler} -o /tmp/program main.rs && exec /tmp/program"
            return "main.rs", run, f"{compiler} --emit=metadata --out-dir /tmp main.rs"
        case "bash":
            return "main.sh", "exec bash main.sh", "exec bash -n main.sh"
