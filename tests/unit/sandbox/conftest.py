"""One sandbox for the tests of this directory, which are skipped where bubblewrap cannot run."""

import shutil
import subprocess
from collections.abc import Iterator

import pytest

from megatron_post.sandbox.sandbox import Sandbox, open_sandbox
from megatron_post.sandbox.settings import Bubblewrap


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: apt-get install bubblewrap")
    plain = subprocess.run(["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"], capture_output=True)
    if plain.returncode:
        pytest.skip(f"this machine forbids namespaces: {plain.stderr.decode().strip()}")
    with open_sandbox(Bubblewrap(programs=2)) as opened:
        yield opened
