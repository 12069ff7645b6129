"""Finds the tools of the languages on this machine if they are not in /usr."""

import shutil
import subprocess
import sys
from pathlib import Path

_TOOLS = ("node", "g++", "java", "javac")
# A program only sees these parts of a prefix, because the prefix of a tool in ~/bin is the home directory.
_PARTS = ("bin", "lib", "lib64", "libexec", "include", "conf", "*-linux-gnu*")


def prefixes() -> list[Path]:
    """The prefixes of this Python and of the tools on the PATH of this process, without those in /usr."""
    found = [Path(sys.base_prefix).resolve()]
    for name in _TOOLS:
        if path := shutil.which(name):
            found.append(Path(path).resolve().parents[1])
    if shutil.which("rustc"):  # it may be rustup's proxy for the real rustc
        command = ["rustc", "--print", "sysroot"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
        if done.returncode == 0:
            found.append(Path(done.stdout.strip()).resolve())
    return [path for path in dict.fromkeys(found) if path != Path("/") and path.parts[:2] != ("/", "usr")]


def directories(prefix: Path) -> list[str]:
    """The directories of a prefix that its tools need."""
    return [str(path) for part in _PARTS for path in sorted(prefix.glob(part)) if path.is_dir()]
