"""Compiles Triton kernels for Hopper and Blackwell without a GPU, and reads the resources that they use.

Kernels are compiled in the process of the tests. Triton's interpreter (`TRITON_INTERPRET=1`) replaces every
kernel and Triton's own functions when they are decorated, so it runs in another process. See
tests/kernels/interpreter.py.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

CAPABILITIES = pytest.mark.parametrize("capability", [90, 100], ids=["sm_90", "sm_100"])


@dataclass(frozen=True)
class Resources:
    """The resources that the binary of one kernel needs."""

    registers: int  # per thread, at most 255
    shared_bytes: int  # per program
    stack_bytes: int  # per thread, for spilled registers
    local_bytes: int  # per thread


def compiled_resources(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    num_warps: int,
    capability: int,
    num_stages: int = 3,
) -> Resources:
    """Compile `kernel`, and read its registers, shared bytes and spilled bytes.

    kernel: a function under `@triton.jit`. signature: type by argument, as `triton.compile` expects it, such
    as "*bf16", "i32" or "fp32". A suffix ":16"
      says that the value is a multiple of 16. A launch would find this out from the value.
    constexprs: value by `tl.constexpr` argument.
    capability: 90 for Hopper, 100 for Blackwell.
    Raises `AssertionError` unless signature and constexprs together name exactly the kernel's arguments.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert isinstance(kernel, triton.JITFunction), (
        f"{kernel} belongs to the interpreter: unset TRITON_INTERPRET"
    )
    assert {*signature, *constexprs} == {*kernel.arg_names}, kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={
            name: "constexpr" if name in constexprs else signature[name].split(":")[0]
            for name in kernel.arg_names
        },
        constexprs=dict(constexprs),
        attrs={
            (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if kind.endswith(":16")
        },
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    # The metadata has the shared memory that a launch requests. The binary has only what is fixed when
    # linked.
    return Resources(
        registers=found["REG"],
        shared_bytes=max(found["SHARED"], compiled.metadata.shared),
        stack_bytes=found["STACK"],
        local_bytes=found["LOCAL"],
    )
