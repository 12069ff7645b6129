"""Only the newest incarnation publishes, at whatever moment the older one is stopped."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from megatron_post.config.schema import Config
from megatron_post.parallel.topology import Topology
from megatron_post.storage import manifest
from megatron_post.train.async_save import SaveFailed
from megatron_post.train.checkpoint import Checkpoints
from megatron_post.train.fence import Fence, Superseded, claim


def _write(root: Path, step: int, fence: Fence) -> Path:
    partial = manifest.partial_directory(root, step, epoch=fence.epoch, attempt=1)
    partial.mkdir(parents=True)
    (partial / "weights").write_text(fence.incarnation)
    return partial


def _publish(root: Path, step: int, fence: Fence, partial: Path, *, stopped: object = None) -> None:
    """`stopped` happens between the last look at the fence and the rename."""

    def check() -> None:
        fence.check()
        if callable(stopped):
            stopped()

    files = manifest.checksums(partial, ["weights"]) if partial.exists() else {}
    manifest.publish(root, step, files=files, state={}, keep=2, partial=partial, check=check)


def test_epochs_grow(tmp_path: Path) -> None:
    fences = [claim(tmp_path, name) for name in ("1.0", "1.1", "2.0")]
    assert [fence.epoch for fence in fences] == [1, 2, 3]
    fences[2].check()
    for old in fences[:2]:
        with pytest.raises(Superseded, match=r"belongs to incarnation 2\.0"):
            old.check()


def test_same_incarnation_may_start_again_until_it_is_superseded(tmp_path: Path) -> None:
    claim(tmp_path, "1.0")
    assert claim(tmp_path, "1.0").epoch == 2
    claim(tmp_path, "1.1")
    with pytest.raises(Superseded, match=r"1\.0 was superseded by 1\.1"):
        claim(tmp_path, "1.0")


def test_a_claim_that_was_removed_is_none(tmp_path: Path) -> None:
    """Whoever empties a run's directory under a live run does not get half of its checkpoints back."""
    fence = claim(tmp_path, "1.0")
    (tmp_path / "incarnations" / "000001").unlink()
    with pytest.raises(Superseded, match=r"its claim .*/incarnations/000001 was removed"):
        fence.check()
    (tmp_path / "incarnations").rmdir()
    with pytest.raises(Superseded, match="was removed"):
        fence.check()


def test_old_one_cannot_publish_what_it_began_after_the_claim(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    old = claim(tmp_path, "old")
    claim(tmp_path, "new")
    with pytest.raises(Superseded):
        _publish(root, 5, old, _write(root, 5, old))
    assert manifest.published_steps(root) == []


@pytest.mark.parametrize("published", [False, True], ids=["", "new one has published the step"])
def test_old_one_stopped_between_look_and_rename(tmp_path: Path, published: bool) -> None:
    """It has looked, sleeps, and a new incarnation starts: the rename must fail and harm nothing."""
    root = tmp_path / "checkpoints"
    old = claim(tmp_path, "old")
    partial = _write(root, 5, old)

    def meanwhile() -> None:
        new = claim(tmp_path, "new")
        if published:
            _publish(root, 5, new, _write(root, 5, new))

    with pytest.raises(FileNotFoundError):
        _publish(root, 5, old, partial, stopped=meanwhile)
    assert manifest.published_steps(root) == ([5] if published else [])
    if published:
        assert (manifest.step_directory(root, 5) / "weights").read_text() == "new"
    assert not [path for path in root.iterdir() if path.name.startswith((".partial", ".stale", ".replaced"))]


def test_a_claim_leaves_a_conversion_alone(tmp_path: Path) -> None:
    """A partial directory without an epoch is not a run's, and may be resumed by whoever writes it."""
    partial = manifest.partial_directory(tmp_path / "checkpoints", 0)
    partial.mkdir(parents=True)
    claim(tmp_path, "new")
    assert partial.is_dir()


def test_a_save_whose_files_a_newer_incarnation_removed_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older rank wakes in the middle of writing: what it misses was taken away, and that is the reason."""
    old = claim(tmp_path, "1.0")
    config = SimpleNamespace(run_dir=str(tmp_path))
    topology = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
    checkpoints = Checkpoints(cast(Config, config), cast(Topology, topology), old)
    checkpoints._saver.error = FileNotFoundError("generators-0.safetensors")
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda out, own: out.__setitem__(0, own))
    with pytest.raises(SaveFailed, match="rank 0: FileNotFoundError: generators-0"):
        checkpoints.wait()
    claim(tmp_path, "1.1")
    with pytest.raises(SaveFailed, match=r"rank 0: Superseded: incarnation 1\.0 \(epoch 1\) may not publish"):
        checkpoints.wait()


def test_strays_among_claims_are_no_epochs(tmp_path: Path) -> None:
    claim(tmp_path, "1.0")
    for name in ("7", "0000009", "000008.bak", "00000²", ".DS_Store"):
        (tmp_path / "incarnations" / name).touch()
    assert claim(tmp_path, "1.1").epoch == 2


def test_a_file_in_the_place_of_the_checkpoints_is_found_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(FileExistsError, match="checkpoints"):
        claim(tmp_path, "1.0")
