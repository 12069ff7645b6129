"""Doctor recognises parts by what lies on the path, without importing them, and survives broken probes."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from megatron_post.display import make_console
from megatron_post.doctor import fused_parts, machine, probes, problems, report
from megatron_post.installation import install_command

import_failure = problems.import_failure.__wrapped__  # each test has another machine, and asks anew


def _install(
    site: Path, files: dict[str, str], *, name: str = "", version: str = "", requires: str = ""
) -> None:
    """Fake installed files. A module that is imported raises."""
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text or "raise RuntimeError('doctor must not import this')\n")
    if name:
        folder = site / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
        )


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def core_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the import of megatron-core, which takes seconds, in tests that do not concern it."""
    _answer_import_failure(monkeypatch, lambda: None)


def _answer_import_failure(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], str | None]) -> None:
    for module in (report, problems):
        monkeypatch.setattr(module, "import_failure", answer)


def _report() -> str:
    console = Console(record=True, width=300)
    report.diagnose(console)
    return console.export_text()


# the layout of apex 0.9.10dev as downloaded from PyPI
PYRAMID_APEX = {"apex/__init__.py": "", "apex/views.py": "", "apex/forms.py": "", "apex/lib/__init__.py": ""}
NVIDIA_APEX = {"apex/__init__.py": "", "apex/optimizers/__init__.py": "", "apex/optimizers/fused_adam.py": ""}


def test_pypi_apex_is_named(site: Path) -> None:
    _install(site, PYRAMID_APEX, name="apex", version="0.9.10.dev0")
    assert fused_parts.apex_kind() == "unrelated"
    (problem,) = [line for line in problems.find_problems() if "apex" in line]
    assert "0.9.10.dev0" in problem and "not NVIDIA's" in problem and "pip uninstall apex" in problem
    assert problem in _report()


def test_nvidia_apex_with_and_without_extensions(site: Path) -> None:
    _install(site, NVIDIA_APEX, name="apex", version="0.1")
    assert fused_parts.apex_kind() == "nvidia without CUDA extensions"
    adam = fused_parts.fused_parts(has_gpu=True)[1]
    assert adam.state == "missing" and "without CUDA extensions" in adam.meaning
    _install(site, {"amp_C.py": ""})
    assert fused_parts.apex_kind() == "nvidia"
    assert fused_parts.fused_parts(has_gpu=True)[1].state == "active"
    assert not [line for line in problems.find_problems() if "apex" in line]


def test_no_apex() -> None:
    """Unless this very machine has one."""
    if probes.installed_version("apex") == "not installed":
        assert fused_parts.apex_kind() == "absent"


def test_transformer_engine_brings_its_own_adam(site: Path) -> None:
    _install(site, {"transformer_engine/__init__.py": ""}, name="transformer_engine", version="2.9.0")
    assert probes.installed_version("transformer-engine") == "2.9.0"
    engine, adam, _ = fused_parts.fused_parts(has_gpu=True)
    assert (engine.state, adam.state) == ("active", "not needed")


def test_transformer_engine_without_its_extension(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pip leaves it where the extension for torch was not built: megatron-core's import ends in an error
    that it does not expect. Doctor imports it elsewhere, and so goes on."""
    code = 'raise FileNotFoundError("Could not find shared object file for Transformer Engine torch lib.")'
    _install(site, {"transformer_engine/__init__.py": code}, name="transformer_engine", version="2.11.0")
    monkeypatch.setattr(report, "_has_gpu", lambda: True)
    _answer_import_failure(monkeypatch, import_failure)
    text = _report()
    (problem,) = [line for line in text.splitlines() if line.startswith("problem: Transformer Engine")]
    assert "2.11.0 is installed and cannot be loaded" in problem
    assert "its extension for torch, transformer_engine_torch, is missing: FileNotFoundError" in problem
    assert f"Build it for this torch: {install_command('cuda')}; or remove it: pip uninstall" in problem
    assert "installed, but megatron-core cannot be imported beside it" in text
    _install(site, {"transformer_engine/wheel_lib/transformer_engine_torch.cpython-311.so": "another's"})
    failure = import_failure()
    assert failure is not None and "FileNotFoundError" in failure and "is missing" not in failure


def test_megatron_core_loads_here() -> None:
    assert import_failure() is None


@pytest.mark.parametrize(
    ("capability", "cuda", "expected"),
    [
        ((9, 0), "12.8", "can be delayed, tensorwise; blockwise needs CUDA 12.9 or newer, and this torch is "
         "built for 12.8; mxfp8 needs GPUs of compute capability 10.0"),
        ((10, 0), "13.0", "can be delayed, tensorwise, blockwise, mxfp8"),
        ((8, 0), "13.0", "can be nothing but null; delayed needs"),
    ],
)  # fmt: skip
def test_fp8_recipes_of_this_gpu(
    site: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cuda: str, expected: str
) -> None:
    _install(site, {"transformer_engine/__init__.py": ""})
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: capability)
    monkeypatch.setattr("torch.version.cuda", cuda)
    assert expected in fused_parts.fused_parts(has_gpu=True)[0].meaning


def test_missing_parts_say_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the part is missing. On a CPU it is not needed, and its cost on a GPU is reported anyway."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for has_gpu, state in ((True, "missing"), (False, "not needed")):
        engine, adam, triton = fused_parts.fused_parts(has_gpu=has_gpu)
        assert {engine.state, adam.state, triton.state} == {state}
        assert "precision.fp8 and recompute.modules with layernorm are refused" in engine.meaning
        assert "torch's fused kernel" in adam.meaning and "a run resumes" in adam.meaning
        assert "FlexAttention" in triton.meaning


@pytest.mark.parametrize(
    ("version", "count"), [("2.8.0", 1), ("2.9.0.post1", 0), ("2.11.0+c1", 0), ("2.12", 1)]
)
def test_transformer_engines_version(monkeypatch: pytest.MonkeyPatch, version: str, count: int) -> None:
    """megatron-core 0.16 supports versions from 2.9 to below 2.12."""
    found, installed = probes.is_found, probes.installed_version
    monkeypatch.setattr(problems, "is_found", lambda name: name == "transformer_engine" or found(name))
    versions = {"transformer-engine": version}
    monkeypatch.setattr(problems, "installed_version", lambda name: versions.get(name) or installed(name))
    lines = [
        line for line in problems.find_problems() if line.startswith(f"transformer-engine {version} is not")
    ]
    assert len(lines) == count


def test_missing_psutil_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "psutil" else found(name))
    assert any("psutil" in line and "hangs" in line for line in problems.find_problems())


def test_broken_probes_are_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hanging nvidia-smi and sinfo, damaged metadata, a find_spec that raises, no sysconf."""

    def hang(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, 20)

    def damaged(name: str) -> str:
        raise OSError("Input/output error")

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", hang)
    monkeypatch.setattr(metadata, "version", damaged)
    monkeypatch.setattr(importlib.util, "find_spec", damaged)
    monkeypatch.delattr(os, "sysconf", raising=False)
    text = _report()
    assert "Input/output error" in text
    assert "Slurm" in text and "unreadable" in text
    assert "psutil is missing" in text


def test_sinfo_that_fails_is_shown_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho 'sinfo: fatal: no configuration source' >&2\nexit 1\n")
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert dict(machine.machine())["Slurm"] == "sinfo fails: sinfo: fatal: no configuration source"


def test_gpus_and_slurm_as_their_tools_print_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "nvidia-smi": "NVIDIA H100 80GB HBM3, 81559 MiB, 81000 MiB, 570.86.15",
        "sinfo": "slurm 24.05.4",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{text}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    rows = dict(machine.machine())
    assert rows["GPU 0"] == "NVIDIA H100 80GB HBM3, 81559 MiB, 81000 MiB free, driver 570.86.15"
    assert rows["Slurm"] == "slurm 24.05.4"


def test_this_machine() -> None:
    text = _report()
    for part in ("python", "megatron-core", "CPU cores", "NCCL", "Transformer Engine", "FusedAdam", "Triton"):
        assert part in text


def test_a_narrow_terminal_breaks_no_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rich would read `[cuda]` as markup, and would wrap the command inside its table."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(report, "_has_gpu", lambda: True)
    report.diagnose(make_console(width=60))
    shown = capsys.readouterr().out.splitlines()
    assert f"to add Transformer Engine: {install_command('cuda')}" in shown
    assert any(line.endswith(f"nothing can be trained; {install_command()}") for line in shown)


def test_the_sandbox_says_what_can_run_or_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "sandbox" in _report() and "what a model wrote cannot be run: sandbox: bwrap" in _report()


def test_the_sandbox_lists_languages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stand:
        def __enter__(self) -> "Stand":
            return self

        def __exit__(self, *error: object) -> None: ...

        def missing(self, language: str) -> list[str]:
            return ["rustc", "cc"] if language == "rust" else []

    monkeypatch.setattr(machine, "open_sandbox", lambda settings: Stand())
    assert "bubblewrap runs python, javascript, cpp, java, bash; rust lacks rustc, cc" in _report()
