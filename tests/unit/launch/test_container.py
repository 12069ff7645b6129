"""The container recipe runs with a stand-in for enroot that records its calls."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "launchers" / "container" / "build_image.sh"
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
