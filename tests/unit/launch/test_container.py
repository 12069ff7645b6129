"""The recipes for containers. enroot is a stand-in that records its calls, and Dockerfiles are parsed."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_post.installation import VERSIONS

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "launchers" / "container"
SCRIPT = FOLDER / "build_image.sh"
DOCKERFILES = sorted(FOLDER.glob("Dockerfile.*"))
ENROOT = """#!/bin/bash
printf '%s\\n' "$*" >> "$CALLS"
[[ $1 == "$FAILS_AT" ]] && exit 1
[[ $1 == import || $1 == export ]] && touch "$3"
exit 0
"""


def _run(
    tmp_path: Path, *arguments: str, fails_at: str = ""
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    enroot, calls = tmp_path / "bin" / "enroot", tmp_path / "calls"
    enroot.parent.mkdir(exist_ok=True)
    enroot.write_text(ENROOT)
    enroot.chmod(0o755)
    calls.write_text("")
    done = subprocess.run(
        ["bash", SCRIPT, *arguments],
        cwd=ROOT,
        env={"PATH": f"{enroot.parent}:{os.environ['PATH']}", "CALLS": str(calls), "FAILS_AT": fails_at},
        capture_output=True,
        text=True,
    )
    return done, calls.read_text().splitlines()


def test_the_image_is_made_and_nothing_is_left(tmp_path: Path) -> None:
    output = tmp_path / "image.sqsh"
    done, calls = _run(tmp_path, "nvcr.io/any:1", str(output))
    assert done.returncode == 0, done.stderr
    assert [call.split()[0] for call in calls] == ["import", "create", "start", "export", "remove"]
    assert calls[0].endswith("docker://nvcr.io/any:1") and str(output) in calls[3]
    assert "pip install --no-build-isolation -e '.[cuda]'" in calls[2]
    assert list(tmp_path.glob("*.sqsh")) == [output]


def test_a_failed_build_leaves_no_image(tmp_path: Path) -> None:
    done, calls = _run(tmp_path, "any", str(tmp_path / "image.sqsh"), fails_at="start")
    assert done.returncode == 1
    assert calls[-1].startswith("remove") and not list(tmp_path.glob("*.sqsh"))


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    for arguments in ((), ("any",), ("any", "image.tar")):
        done, calls = _run(tmp_path, *arguments)
        assert done.returncode == 2 and "build_image.sh IMAGE OUTPUT.sqsh" in done.stderr and not calls


def _instructions(file: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, each in one line."""
    text = re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile(file: Path) -> None:
    """Its base has a version. All that it copies exists and holds what it runs and what setup.py reads."""
    instructions = _instructions(file)
    assert {name for name, _ in instructions} <= {"FROM", "COPY", "WORKDIR", "ENV", "RUN"}
    (base,) = [text for name, text in instructions if name == "FROM"]
    assert re.fullmatch(r"[\w./-]+:\d[\w.-]+", base)
    copied = [word for name, text in instructions if name == "COPY" for word in text.split()[:-1]]
    assert {"setup.py", "pyproject.toml", "README.md", "kernels", "configs", "launchers"} <= {*copied}
    assert all((ROOT / path).exists() for path in copied)
    (run,) = [text for name, text in instructions if name == "RUN"]
    subprocess.run(["bash", "-n", "-c", run], check=True)
    for command in run.split("&&"):
        words = command.split()
        if words[:2] == ["pip", "install"]:
            assert "--no-cache-dir" in words and ("--constraint" in words or "==" in command)
        elif words[0] == "python3":
            assert words[1].split("/")[0] in copied and (ROOT / words[1]).is_file()
    *_, check = run.split("&&")
    assert "check_versions.py" in check and {*check.split()[2:]} <= VERSIONS.keys()


def test_versions_of_the_images() -> None:
    """They are those of the other files: torch of `make install`, and the ranges of setup.py."""
    (run,) = [text for name, text in _instructions(FOLDER / "Dockerfile.cpu") if name == "RUN"]
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    made = re.search(r"^TORCH := torch==(\S+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert pinned and made and pinned[1] == made[1] and f" torch=={pinned[1]}+cpu " in run
    required = (ROOT / "setup.py").read_text()
    for name in ("torch", "megatron-core", "transformer-engine"):
        found = re.search(rf'"({name}(\[\w+\])?[<>][^"]+)"', required)
        assert found is not None
        fits = VERSIONS[name]
        bounds = {f">={'.'.join(map(str, fits.first))}"}
        bounds |= set() if fits.end is None else {f"<{'.'.join(map(str, fits.end))}"}
        assert {str(each) for each in Requirement(found[1]).specifier} == bounds


def test_an_image_keeps_what_is_built_together() -> None:
    pins = runpy.run_path(str(FOLDER / "pins.py"))["pins"]
    text = "# pins\nnumpy==2.4.0\npydantic==2.13.0\ntorch==2.13.0\ntriton==3.6.0\n"
    installed = {"torch": "2.10.0a0+b4e4ee81d3.nv25.12", "transformer_engine": "2.10.0", "numpy": "2.1.0"}
    assert pins(text, {**installed, "pydantic": "2.9.0"}) == [
        "numpy==2.1.0",
        "torch==2.10.0a0+b4e4ee81d3.nv25.12",
        "transformer-engine==2.10.0",
        "pydantic==2.13.0",
    ]


def test_a_missing_package_ends_the_build() -> None:
    """Transformer Engine is not installed where the tests run, and torch and megatron-core are."""
    command = [sys.executable, str(FOLDER / "check_versions.py"), "torch", "megatron-core"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    done = subprocess.run([*command, "transformer-engine"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "transformer-engine is not installed\n"
