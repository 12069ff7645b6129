"""Two processes never work in one directory."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_post.storage.lock import only_process_in


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        only_process_in(tmp_path),
        pytest.raises(ValueError, match="another process works here"),
        only_process_in(tmp_path),
    ):
        pass
    with only_process_in(tmp_path):
        pass


def test_ranks_that_outlive_the_round_keep_its_lock(tmp_path: Path) -> None:
    """The kernel may end the round alone, for want of memory: its ranks still write, and a second round
    beside them would double rows."""
    with only_process_in(tmp_path) as lock:
        rank = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    with (
        pytest.raises(ValueError, match="a step of one that was killed still does"),
        only_process_in(tmp_path),
    ):
        pass
    rank.communicate()
    with only_process_in(tmp_path):
        pass
