"""Names of packages that tests cannot install are compared with tables from the sources of these packages.

The tables have the names of the stated versions that this package could use. A developer who uses another
name must look it up in the sources and add it here. The used names are read from this package's source.
"""

import ast
import inspect
import re
from pathlib import Path

import pytest

from megatron_post.launch.node_findings import GPU_FIELDS
from megatron_post.parallel.adam import ApexStyleAdam

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_post"

# From vLLM 0.32.0. LLM.__init__ and LLM.generate are in vllm/entrypoints/llm.py. EngineArgs in
# vllm/engine/arg_utils.py gets the arguments that LLM does not name. SamplingParams is in
# vllm/sampling_params.py, and the shutdown of the engine's client in vllm/v1/engine/core_client.py.
VLLM = {
    "LLM": {
        "model", "tokenizer", "skip_tokenizer_init", "trust_remote_code", "tensor_parallel_size", "dtype",
        "quantization", "seed", "gpu_memory_utilization", "enforce_eager",
        "enable_prefix_caching", "load_format", "max_model_len",
    },
    "generate": {"prompts", "sampling_params", "use_tqdm", "lora_request", "priority"},
    "_parameters": {
        "n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos",
        "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "detokenize", "skip_special_tokens",
    },
    "shutdown": {"timeout"},
}  # fmt: skip
# From NVIDIA DALI 2.4.0. Pipeline.__init__ is in nvidia/dali/pipeline.py. Also the signature of
# fn.external_source.
DALI = {
    "Pipeline": {
        "batch_size", "num_threads", "device_id", "seed", "exec_pipelined", "prefetch_queue_depth",
        "exec_async", "exec_dynamic", "py_num_workers", "output_dtype", "output_ndim",
    },
    "external_source": {
        "source", "num_outputs", "cycle", "device", "layout", "dtype", "ndim", "cuda_stream", "blocking",
        "batch", "parallel", "no_copy", "batch_info",
    },
}  # fmt: skip
# From `nvidia-smi --help-query-gpu`. Newer drivers list "clocks_event_reasons", or the name that is used
# here.
NVIDIA_SMI = {
    "index", "name", "driver_version", "memory.total", "memory.used", "memory.free",
    "clocks_throttle_reasons.hw_slowdown", "ecc.errors.uncorrected.volatile.total",
}  # fmt: skip
# FusedAdam.__init__ from apex/optimizers/fused_adam.py of NVIDIA/apex at 004da4e, without the arguments that
# this package's Adam does not support.
APEX_ADAM = {"params", "lr", "betas", "eps", "weight_decay"}


def _keywords(file: str, function: str) -> set[str]:
    """The keywords of all calls of a function or method of this name in a file of the package."""
    calls = [
        node
        for node in ast.walk(ast.parse((PACKAGE / file).read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == function
    ]
    assert calls, f"{file} does not call {function}"
    return {keyword.arg or "**" for call in calls for keyword in call.keywords}


@pytest.mark.parametrize("function", VLLM)
def test_vllm(function: str) -> None:
    assert _keywords("inference/vllm.py", function) <= VLLM[function]


@pytest.mark.parametrize("function", DALI)
def test_dali(function: str) -> None:
    """If DALI is installed, the names are also compared with the package."""
    asked = _keywords("data/dali.py", function)
    assert asked <= DALI[function]
    try:
        from nvidia import dali
    except ImportError:
        return
    installed = {"Pipeline": dali.Pipeline, "external_source": dali.fn.external_source}[function]
    assert asked <= set(inspect.signature(installed).parameters)


def test_nvidia_smi() -> None:
    queries = [
        fields
        for path in PACKAGE.rglob("*.py")
        for fields in re.findall(r'(?:--query-gpu=|fields = ")([a-z_.,]+)"', path.read_text())
    ]
    assert len(queries) >= 2
    assert {name for query in [GPU_FIELDS, *queries] for name in query.split(",")} <= NVIDIA_SMI


def test_apex() -> None:
    """This package's Adam, which replaces Apex's, has arguments of the same names."""
    names = set(inspect.signature(ApexStyleAdam).parameters)
    assert names >= APEX_ADAM
