"""The peak memory of a process does not depend on the process that started it."""

import numpy as np

from megatron_post.bench.beside_copy import in_own_process
from megatron_post.bench.memory import peak_rss

MIB = 2**20


def _hold(size: int) -> None:
    np.ones(size * MIB, np.uint8)


def test_peak_is_the_processs_own() -> None:
    """The parent process holds 2 GB, at which `ru_maxrss` of its child would begin."""
    held = np.ones(2048 * MIB, np.uint8)
    assert peak_rss() > held.nbytes
    _, little = in_own_process(_hold, 1)
    _, more = in_own_process(_hold, 301)
    assert little < 1024 and 250 < more - little < 350
