"""The filter of system calls: its numbers are the kernel's, and it refuses what it lists."""

import asyncio
import errno
import platform
import re
import struct
from pathlib import Path

import pytest

from megatron_post.sandbox.sandbox import Sandbox
from megatron_post.sandbox.syscalls import closely, filter_program, refused

HEADERS = {
    "x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
    "aarch64": "/usr/include/asm-generic/unistd.h",
}
# of later kernels than the headers, of earlier ones, or defined for both under another name
ELSEWHERE = {"memfd_secret", "quotactl_fd"}


@pytest.mark.parametrize("architecture", HEADERS)
def test_numbers_are_those_of_the_kernel_s_headers(architecture: str) -> None:
    header = Path(HEADERS[architecture])
    if not header.is_file():
        pytest.skip(f"{header} is not installed (linux-libc-dev)")
    found = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text()))
    for call in [*refused(), *closely().values()]:
        if call.name in found or call.name not in ELSEWHERE:
            assert call.numbers.get(architecture) == (int(found[call.name]) if call.name in found else None)


def test_every_call_of_the_list_is_refused(sandbox: Sandbox) -> None:
    numbers = {call.name: call.numbers.get(platform.machine()) for call in refused()}
    source = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"for name, number in {numbers}.items():\n"
        "    if number is not None:\n"
        "        print(name, libc.syscall(number, 0, 0, 0, 0, 0, 0), ctypes.get_errno())\n"
    )
    outcome = asyncio.run(sandbox.run({"main.py": source}, ["python3", "main.py"]))
    assert outcome.ok, outcome
    expected = [f"{name} -1 {errno.EPERM}" for name, number in numbers.items() if number is not None]
    assert outcome.stdout.splitlines() == expected


def test_calls_of_32_bits_end_the_program(sandbox: Sandbox) -> None:
    """They have other numbers, which the filter would misread: SIGSYS is signal 31."""
    if platform.machine() != "x86_64" or sandbox.missing("cpp"):
        pytest.skip("int 0x80 is x86's, and g++ compiles it")
    source = 'int main() { asm volatile("int $0x80" :: "a"(20)); }'
    files, command = {"main.cpp": source}, ["sh", "-c", "g++ -o /tmp/p main.cpp && exec /tmp/p"]
    outcome = asyncio.run(sandbox.run(files, command))
    assert (outcome.kind, outcome.returncode) == ("killed", 128 + 31)


def test_the_newest_calls_are_not_there(sandbox: Sandbox) -> None:
    source = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "for number in (451, 1000, 0x40000000):\n    libc.syscall(number)\n    print(ctypes.get_errno())"
    )
    outcome = asyncio.run(sandbox.run({"main.py": source}, ["python3", "main.py"]))
    assert outcome.stdout.split() == [str(errno.ENOSYS)] * 3


@pytest.mark.parametrize("architecture", HEADERS)
def test_every_jump_stays_in_the_program(architecture: str) -> None:
    program = filter_program(architecture)
    instructions = list(struct.iter_unpack("<HBBI", program))
    for place, (opcode, if_true, if_false, _) in enumerate(instructions):
        if opcode & 7 == 5:  # BPF_JMP
            assert place + 1 + max(if_true, if_false) < len(instructions)
    assert instructions[-1][0] == 6  # BPF_RET


def test_a_processor_without_a_filter_is_refused() -> None:
    with pytest.raises(ValueError, match="x86_64 and aarch64, and this machine is riscv64"):
        filter_program("riscv64")
