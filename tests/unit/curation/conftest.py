from pathlib import Path

import pytest

from tests.unit.curation.place import Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)
