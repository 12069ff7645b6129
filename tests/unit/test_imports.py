"""Light commands import no heavy library, and training imports none that reads rows."""

import json
import subprocess
import sys

import pytest

ROWS = ["datasets", "pandas", "pyarrow"]
TRAINING = ["torch", "torch._inductor", "megatron.core", "transformers", "triton", "scipy"]
SERVERS = ["httpx", "playwright", "faiss", "sentence_transformers", "sympy", "matplotlib"]

# What a command imports, and what must not come with it. The first line is what every command pays.
LIGHT = {
    "megatron_post.cli": [*ROWS, *TRAINING, *SERVERS, "numpy", "zarr", "tokenizers"],
    "megatron_post.config.load": [*ROWS, *TRAINING, *SERVERS, "numpy", "zarr", "tokenizers"],
    "megatron_post.data.build": [*ROWS, *TRAINING, *SERVERS],
    "megatron_post.data.check_store": [*ROWS, *TRAINING, *SERVERS],
    "megatron_post.data.show": [*ROWS, *TRAINING, *SERVERS],
    "megatron_post.data.stats": [*ROWS, *TRAINING, *SERVERS],
    "megatron_post.train.run": [*ROWS, "transformers", "httpx", "playwright", "matplotlib"],
}


@pytest.mark.parametrize("module", LIGHT)
def test_a_command_imports_no_heavy_library(module: str) -> None:
    """A new process imports the module, because this one has imported everything."""
    code = f"import json, sys, {module}; print(json.dumps([m for m in {LIGHT[module]} if m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []
