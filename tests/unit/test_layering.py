"""Modules only import the rooms that they may import, and importing a module has no effects.

`stages` imports `megatron_post_kernels`, because each loss over pairs is there, as torch next to its kernel.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.rooms import PICTURE, TABLE, floors, knowledge, picture, table

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_post"

# For each room, the other rooms or single modules of the package that it may import.
ALLOWED = {
    "config": {"display", "installation", "storage"},
    "display": set(),
    "progress": {"display"},
    "installation": set(),
    "storage": {"display"},
    "pages": {"display"},
    "sandbox": {"config", "installation"},
    "doctor": {"config.fp8", "display", "installation", "sandbox"},
    "errors": {"config.secrets", "display"},
    "data": {"config", "display", "progress", "installation", "storage"},
    "parallel": {"config"},
    "models": {"config", "parallel", "data.batch"},
    "convert": {"config", "display", "progress", "models", "parallel", "data.tokenizer", "storage"},
    "stages": {"config", "data.batch", "data.pack"},
    "train": {
        "config",
        "data",
        "display",
        "progress",
        "storage",
        "parallel",
        "installation",
        "models",
        "stages",
        "convert",
        "pages",
        "plan.estimate",
        "plan.flops",
        "plan.hardware",
    },
    "bench": {
        "config",
        "data",
        "parallel",
        "models",
        "stages",
        "convert",
        "train",
        "plan",
        "inference",
        "rounds",
        "curation",
        "doctor",
        "display",
        "pages",
        "installation",
        "storage",
    },
    "demo": {
        "config",
        "data",
        "display",
        "pages",
        "parallel",
        "models",
        "convert",
        "train",
        "rounds",
        "storage",
    },
    "plan": {"config", "data.batch", "display", "models", "pages", "parallel", "storage"},
    "inference": {
        "config",
        "convert",
        "data",
        "display",
        "progress",
        "installation",
        "parallel.environment",
        "storage",
    },
    "rounds": {
        "config",
        "curation",
        "data",
        "display",
        "pages",
        "progress",
        "inference",
        "installation",
        "storage",
        "parallel",
        "models",
        "stages",
        "convert",
        "train",
    },
    "curation": {
        "config",
        "data",
        "display",
        "pages",
        "inference",
        "installation",
        "parallel.environment",
        "plan.commands",
        "storage",
        "synthesis.languages",
        "synthesis.prompts",
    },
    "synthesis": {
        "config",
        "data",
        "display",
        "pages",
        "progress",
        "inference",
        "installation",
        "parallel.environment",
        "sandbox",
        "storage",
    },
    "launch": {
        "config",
        "curation",
        "data",
        "display",
        "inference.settings",
        "parallel.environment",
        "plan",
        "storage",
        "synthesis",
        "train",
        "installation",
    },
    "api": {"config", "convert", "data", "inference", "plan", "rounds", "train"},
    "cli": {
        "config",
        "data",
        "display",
        "errors",
        "convert",
        "train",
        "plan",
        "inference",
        "rounds",
        "synthesis",
        "curation",
        "launch",
        "demo",
        "bench",
        "doctor",
    },
    "__main__": {"cli"},
}
# For each room, the only third-party packages that it may import.
ONLY = {
    "config": {"pydantic", "pydantic_core", "yaml"},
    "display": {"rich"},
    "progress": {"rich"},
    "errors": {"typer"},
    "installation": set(),
    "storage": {"blake3", "huggingface_hub", "isal", "yaml"},
    "pages": {"jinja2", "markupsafe", "matplotlib", "numpy"},
    "sandbox": {"pydantic"},
    "data": {"numpy", "zarr", "tokenizers", "datasets", "rich", "torch", "nvidia", "jinja2", "pydantic"},
    "stages": {"torch", "megatron_post_kernels"},
    "models": {"torch", "megatron", "transformer_engine", "megatron_post_kernels"},
    "convert": {"torch", "megatron", "rich", "typer", "pydantic", "huggingface_hub"},
    "cli": {"typer"},
    "doctor": {"rich", "torch"},
}
# For each module, the only files that may import it.
ONLY_IN = {
    "transformer_engine": {"models/specs.py"},
    "megatron.core.extensions.transformer_engine": {"models/specs.py"},
    "trl": {"bench/trl/trl_side.py", "bench/trl/preferences.py", "bench/trl/packing.py"},
    "nvidia.dali": {"data/dali.py"},
    "megatron.bridge": set(),
    "apex": set(),
}
NEVER_IN_DATA = ("torch.distributed", "megatron")


def _sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> Iterator[str]:
    """The full names of everything that a file imports, also lazily or only for types."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def violations(file: str, names: list[str]) -> list[str]:
    """The names among `names` that a file must not import. file: its path in the package."""
    room = Path(file).parts[0].removesuffix(".py")
    bad = []
    for name in names:
        top, _, rest = name.partition(".")
        if top == "megatron_post":
            allowed = {room, *ALLOWED.get(room, set())}
            wrong = bool(rest) and not any(_within(rest, module) for module in allowed)
        else:
            wrong = room in ONLY and top not in {*sys.stdlib_module_names, *ONLY[room]}
        wrong |= any(_within(name, module) and file not in files for module, files in ONLY_IN.items())
        wrong |= room == "data" and any(_within(name, module) for module in NEVER_IN_DATA)
        if wrong:
            bad.append(f"{file} imports {name}")
    return bad


def test_layers() -> None:
    files = {str(path.relative_to(PACKAGE)): list(_imports(path)) for path in _sources()}
    assert len(files) > 40
    unknown = {Path(file).parts[0].removesuffix(".py") for file in files} - {*ALLOWED, "__init__"}
    assert not unknown, f"say in ALLOWED what these rooms may import: {unknown}"
    assert not [line for file, names in files.items() for line in violations(file, names)]


def test_every_permission_is_used() -> None:
    """A permission that no file uses would allow an import that nobody has decided on."""
    imports: dict[str, set[str]] = {}
    for path in _sources():
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        imports.setdefault(room, set()).update(_imports(path))
    rooms = [
        f"{room}: {module}"
        for room, modules in ALLOWED.items()
        for module in modules
        if not any(_within(name, f"megatron_post.{module}") for name in imports[room])
    ]
    packages = [
        f"{room}: {package}"
        for room, names in ONLY.items()
        for package in names
        if not any(_within(name, package) for name in imports[room])
    ]
    assert (rooms, packages) == ([], [])


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("data/loader.py", "torch.distributed.all_reduce"),
        ("data/loader.py", "megatron.core.parallel_state"),
        ("data/loader.py", "megatron_post.parallel.topology"),
        ("storage/manifest.py", "numpy"),
        ("storage/manifest.py", "megatron_post.config.schema"),
        ("models/build.py", "transformer_engine.pytorch"),
        ("models/build.py", "megatron_post.data.pack.Pack"),
        ("stages/sft.py", "megatron_post.train.step"),
        ("train/run.py", "megatron_post.cli"),
        ("train/run.py", "megatron.bridge.AutoBridge"),
        ("convert/hf_reader.py", "transformers"),
    ],
)
def test_violations_are_found(file: str, name: str) -> None:
    assert violations(file, [name]) == [f"{file} imports {name}"]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("data/loader.py", "torch"),
        ("models/build.py", "megatron_post.data.batch.PackedBatch"),
        ("models/specs.py", "transformer_engine.pytorch"),
        ("cli.py", "megatron_post.train.run.train"),
        ("storage/manifest.py", "dataclasses"),
    ],
)
def test_what_is_allowed_is_no_violation(file: str, name: str) -> None:
    assert not violations(file, [name])


def test_the_table_and_the_picture_of_the_rooms_are_those_of_this_test() -> None:
    text = TABLE.read_text()
    known = knowledge(text)
    assert known.keys() == ALLOWED.keys() - {"__main__"}, "CONTRIBUTING.md: a row for each room, by hand"
    current = (text, PICTURE.read_text())
    assert current == (table(ALLOWED, text), picture(ALLOWED, known)), "run `python -m tests.rooms`"


def file_imports() -> dict[str, set[str]]:
    """For each module, the modules of the package that it imports, also lazily or only for types."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in _sources()
    }
    return {
        module: {name if name in modules else name.rpartition(".")[0] for name in _imports(path)}
        & modules.keys() - {"megatron_post", module}
        for module, path in modules.items()
    }


def test_no_files_import_each_other() -> None:
    """There is no cycle of imports between files."""
    imports = file_imports()
    assert "megatron_post.config.sections" in imports["megatron_post.config.layout"]
    TopologicalSorter(imports).prepare()  # raises CycleError
    imports["megatron_post.config.section"].add("megatron_post.cli")
    with pytest.raises(CycleError, match=r"megatron_post\.cli"):
        TopologicalSorter(imports).prepare()


def test_rooms_that_import_each_other_are_found() -> None:
    assert floors({"a": {"b.c"}, "b": set(), "d": {"a"}}) == [["b"], ["a"], ["d"]]
    with pytest.raises(ValueError, match="circle: \\['a', 'b'\\]"):
        floors({"a": {"b"}, "b": {"a.c"}, "d": set()})


# Imports every module of the package with sockets and subprocesses forbidden, and prints what has changed.
_PROBE = """
import json, os, socket, subprocess, sys, warnings
warnings.simplefilter("ignore")
# what third-party modules do when they are imported is their affair: they come first
import datasets, megatron.core, numpy, pydantic, rich, yaml, safetensors, tokenizers, torch, typer, zarr
import megatron.core.distributed, megatron.core.models.gpt.gpt_model, megatron.core.optimizer
import megatron.core.pipeline_parallel, megatron.core.dist_checkpointing, torch.utils.tensorboard
import importlib

def forbidden(*args, **kwargs):
    raise AssertionError("a socket or a process was opened on import")

socket.socket.connect = socket.create_connection = subprocess.Popen.__init__ = forbidden
torch.cuda._lazy_init = forbidden

def state():
    return {
        "environ": dict(os.environ),
        "argv": list(sys.argv),
        "cwd": os.getcwd(),
        "seed": torch.initial_seed(),
        "default dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "process group": torch.distributed.is_initialized(),
        "CUDA": torch.cuda.is_initialized(),
        "functions": [str(f) for f in (torch.cuda.current_device, torch.Tensor.cuda, torch.empty)],
        "warning filters": len(warnings.filters),
    }

before, changed = state(), {}
for name in sys.argv[1:]:
    importlib.import_module(name)
    after = state()
    changed |= {f"{name}: {key}": str(after[key]) for key in before if before[key] != after[key]}
    before = after
print(json.dumps(changed))
"""


def test_importing_does_nothing(tmp_path: Path) -> None:
    """Imports change no environment, argument, directory, seed or patch, and use no CUDA, socket or file.

    One process imports all modules.
    """
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in _sources()
    ]
    names = [name for name in names if not name.endswith("__main__")]
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, *names],
        cwd=tmp_path,
        env={
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
            "PATH": "/usr/bin:/bin",
            "HF_HOME": str(tmp_path / "hf"),
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {}
    assert not [path for path in tmp_path.iterdir() if path.name != "hf"]
