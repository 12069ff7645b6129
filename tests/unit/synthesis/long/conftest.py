"""A small tokenizer, and real documents that are long."""

from pathlib import Path

import pytest

from megatron_post.data.tokenizer import Tokenizer, train_small_tokenizer
from tests.documentation import ROOT


@pytest.fixture(scope="session")
def pages() -> str:
    """The documentation of this project as one text."""
    return "\n".join(page.read_text() for page in sorted((ROOT / "docs").rglob("*.md")))


@pytest.fixture(scope="session")
def tokenizer_path(pages: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    _trained(pages).save(directory)
    return directory


@pytest.fixture(params=["small", "Llama 3"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer_path: Path) -> Path:
    """The small tokenizer, and Meta's own where it is."""
    if request.param == "small":
        return tokenizer_path
    path = ROOT / "../shared/data/llama3_tokenizer/tokenizer.model"
    if not path.is_file():
        pytest.skip("../shared/data has no tokenizer.model of Llama 3")
    return path


def _trained(pages: str) -> Tokenizer:
    return train_small_tokenizer([pages], 1500)
