"""Where the languages' tools are on this machine, if they are not in /usr."""

import shutil
import subprocess
import sys
from pathlib import Path

_TOOLS = ("node", "g++", "java", "javac")
# A tool in ~/bin has the home directory as its prefix, so a program sees these parts of a prefix alone
_PARTS = ("bin", "lib", "lib64", "libexec", "include", "conf", "*-linux-gnu*")


def prefixes() -> list[Path]:
    """Prefixes outside /usr of this Python, and of the tools that are on the PATH of this process."""
    found = [Path(sys.base_prefix).resolve()]
    for name in _TOOLS:
        if path := shutil.which(name):
            found.append(Path(path).resolve().parents[1])
    if shutil.which("rustc"):  # may be rustup's, which starts the one that it has chosen
        command = ["rustc", "--print", "sysroot"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
        if done.returncode == 0:
            found.append(Path(done.stdout.strip()).resolve())
    return [path for path in dict.fromkeys(found) if path != Path("/") and path.parts[:2] != ("/", "usr")]


def directories(prefix: Path) -> list[str]:
    """What a tool needs of its prefix."""
    return [str(path) for part in _PARTS for path in sorted(prefix.glob(part)) if path.is_dir()]
