"""Where the languages' tools are on this machine."""

import shutil
import subprocess
import sys
from pathlib import Path

_TOOLS = ("node", "g++", "java", "javac")


def toolchains() -> list[str]:
    """Directories outside /usr that hold Python, and the tools which are on the PATH of this process."""
    found = [Path(sys.base_prefix).resolve()]
    for name in _TOOLS:
        if path := shutil.which(name):
            found.append(Path(path).resolve().parents[1])
    if shutil.which("rustc"):  # may be rustup's, which starts the one that it has chosen
        command = ["rustc", "--print", "sysroot"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
        if done.returncode == 0:
            found.append(Path(done.stdout.strip()).resolve())
    outside = (path for path in found if path != Path("/") and path.parts[:2] != ("/", "usr"))
    return list(dict.fromkeys(map(str, outside)))
