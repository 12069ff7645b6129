"""`make install` chooses the build of torch by the machine, and requirements.lock is the pins with hashes."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
# `python -m venv DIR` makes a pip that records its arguments, and fails for arguments that $REFUSED matches
PYTHON = r"""#!/bin/bash
mkdir -p "$3/bin"
cat >"$3/bin/pip" <<'PIP'
#!/bin/bash
echo "$*" >>"$CALLS"
[[ -z $REFUSED || ! "$*" =~ $REFUSED ]]
PIP
chmod +x "$3/bin/pip"
"""
GPU = '#!/bin/bash\necho "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)"\n'
NO_DRIVER = (
    "#!/bin/bash\necho 'NVIDIA-SMI has failed because it could not communicate with the driver.'\nexit 9\n"
)
MAC = "#!/bin/bash\necho Darwin\n"


def _install(
    directory: Path, *variables: str, refused: str = "", **programs: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """`make install` with stand-ins for programs, and the arguments of the calls of pip that name torch."""
    own = directory / "bin"
    own.mkdir()
    for name, text in {"nvidia_smi": "#!/bin/bash\nexit 127\n", **programs, "python": PYTHON}.items():
        (own / name.replace("_", "-")).write_text(text)
        (own / name.replace("_", "-")).chmod(0o755)
    calls = directory / "calls"
    calls.touch()
    done = subprocess.run(
        ["make", "install", f"PYTHON={own}/python", f"VENV={directory}/venv", *variables],
        cwd=ROOT,
        env={"PATH": f"{own}:{os.environ['PATH']}", "CALLS": str(calls), "REFUSED": refused},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done, [line for line in calls.read_text().splitlines() if " torch==" in line]


@pytest.mark.parametrize(
    ("variables", "programs", "build"),
    [
        ((), {}, "+cpu"),
        ((), {"nvidia_smi": NO_DRIVER}, "+cpu"),
        ((), {"nvidia_smi": GPU}, ""),
        ((), {"uname": MAC}, ""),
        (("TORCH_BUILD=cpu",), {"nvidia_smi": GPU}, "+cpu"),
        (("TORCH_BUILD=pypi",), {}, ""),
    ],
)
def test_the_build_of_torch(
    tmp_path: Path, variables: tuple[str, ...], programs: dict[str, str], build: str
) -> None:
    """It is installed once, before all other packages. The output names it and the other choice."""
    done, calls = _install(tmp_path, *variables, **programs)
    assert done.returncode == 0, done.stderr
    assert len(calls) == 1 and calls[0].endswith(f" torch==2.13.0{build}")
    assert (tmp_path / "calls").read_text().startswith(calls[0])
    assert f"TORCH_BUILD={'pypi' if build else 'cpu'} takes" in done.stdout


def test_the_cpu_index(tmp_path: Path) -> None:
    """PyPI has no file of the build for CPUs. Where no configured index has one, PyTorch's own is asked."""
    done, calls = _install(tmp_path, refused=r"\+cpu$")
    assert done.returncode == 0, done.stderr
    assert [call.split("torch==2.13.0+cpu")[1] for call in calls] == [
        "",
        " --extra-index-url https://download.pytorch.org/whl/cpu",
    ]


@pytest.mark.parametrize(("variables", "refused"), [(("TORCH_BUILD=cuda",), ""), ((), r"\+cpu")])
def test_nothing_is_installed_without_the_build(
    tmp_path: Path, variables: tuple[str, ...], refused: str
) -> None:
    """Neither an unknown build nor one that no index has falls back to another."""
    done, _ = _install(tmp_path, *variables, refused=refused)
    assert done.returncode == 2 and not (tmp_path / "venv" / ".installed").exists()
    assert "-e .[dev]" not in (tmp_path / "calls").read_text()


def _locked() -> dict[str, str]:
    """The entries of requirements.lock, each a requirement with its hashes."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
    entries = text.replace("\\\n", " ").splitlines()
    return {canonicalize_name(entry.split("==")[0]): entry for entry in entries if entry.strip()}


def test_the_lock_has_the_pinned_versions_and_hashes() -> None:
    """If this fails, run `make lock`."""
    locked = _locked()
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}
    for name, entry in locked.items():
        requirement = Requirement(entry.split("--hash")[0])
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), name
        assert str(requirement.specifier) == versions.get(name, str(requirement.specifier)), name
    assert "torch" not in locked and not [name for name in locked if name.startswith("nvidia")]


def test_the_lock_has_every_requirement(monkeypatch: pytest.MonkeyPatch) -> None:
    """These are the package's and those of its extra `dev`, without torch. If this fails, run `make lock`."""
    monkeypatch.chdir(ROOT)  # setup.py reads README.md
    text = (ROOT / "setup.py").read_text()
    named: list[str] = []

    def setup(**settings: object) -> None:
        named.extend(settings["install_requires"])  # type: ignore[call-overload]
        named.extend(settings["extras_require"]["dev"])  # type: ignore[index]

    source = text.replace("from setuptools import find_packages, setup", "")
    exec(source, {"setup": setup, "find_packages": lambda **_: []}, {})
    wanted = {canonicalize_name(Requirement(each).name) for each in named} - {"torch"}
    assert wanted <= _locked().keys()
