"""Functions that could run code in a file are called in few places, which the poison tests attack."""

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_post"

# The last two parts of the name of a called function or a base class, and the only modules that may use it.
ALLOWED: dict[str, set[str]] = {
    "torch.load": {"convert/torch_file.py", "convert/module_state.py"},
    "pickle.Unpickler": {"convert/metadata_file.py", "convert/module_state.py"},
    # without a directory, with trust_remote_code=False, or only with weights in safetensors
    "from_pretrained": {
        "inference/transformers.py",
        "demo/adapter.py",
        "demo/evaluate.py",
        "bench/trl/packing.py",
        "bench/trl/preferences.py",
        "bench/trl/trl_side.py",
    },
    # for a template of the package, and never one of a user or a model
    "jinja2.Environment": {"pages/page.py"},
    # what a process sends to processes that it has started, and never a file
    "pickle.loads": {"data/rendering.py", "data/render_pool.py"},
    # numpy refuses objects unless it is told otherwise
    "np.load": {"curation/duplicates/semantic_step.py"},
    # these programs run inside the sandbox
    "exec": {
        "synthesis/code/inside/run_tests.py",
        "synthesis/math/session_driver.py",
        "synthesis/tools/inside/call_functions.py",
    },
    "eval": {"synthesis/math/session_driver.py"},
}
NOWHERE = (
    "pickle.load", "pickle._Unpickler", "jit.load", "hub.load", "dist_checkpointing.load",
    "checkpoint.load", "numpy.load", "joblib.load", "dill.load", "dill.loads", "marshal.load",
    "marshal.loads", "shelve.open", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "runpy.run_path",
    "runpy.run_module", "jinja2.Template",
)  # fmt: skip


def _name(node: ast.expr) -> str:
    """The last two parts of a name, as `jit.load` for torch.jit.load."""
    if isinstance(node, ast.Name):
        return node.id
    if not isinstance(node, ast.Attribute):
        return ""
    if node.attr == "from_pretrained":
        return node.attr
    owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
    return f"{owner}.{node.attr}"


def test_only_these_modules_can_run_a_file() -> None:
    found = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        module = str(path.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call():
                    found[_name(node.func)].add(module)
                    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    assert _name(node.func) != "torch.load" or given["weights_only"] == "True", module
                    assert "allow_pickle" not in given, module
                case ast.ClassDef():
                    for base in node.bases:
                        found[_name(base)].add(module)
                case ast.ImportFrom(module="pickle" | "torch" | "torch.serialization" | "yaml" | "jinja2"):
                    imported = {alias.name for alias in node.names}
                    assert not imported & {"load", "loads", "Unpickler", "Template", "Environment"}, module
    assert {name: found[name] for name in ALLOWED} == ALLOWED
    assert {name: found[name] for name in NOWHERE if name in found} == {}
