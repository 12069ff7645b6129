from pathlib import Path

import pytest

from tests.encoder import WHY_ABSENT, unpack_encoder
from tests.unit.curation.place import Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of all-MiniLM-L6-v2, a real encoder with 384 dimensions and windows of 256 tokens."""
    found = unpack_encoder(tmp_path_factory.mktemp("encoder"))
    if found is None:
        pytest.skip(WHY_ABSENT)
    return found
