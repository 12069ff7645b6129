import os
from pathlib import Path

import pytest

from tests.unit.junk.world import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a valid file of every kind. Made once, and never changed."""
    root = tmp_path_factory.mktemp("junk") / "world"
    root.mkdir()
    before = Path.cwd()
    os.chdir(root)
    try:
        make_world(root)
    finally:
        os.chdir(before)
    return root
