"""Only the newest incarnation publishes, whenever the older one is suspended."""

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


def _publish(root: Path, step: int, fence: Fence, partial: Path, *, while_suspended: object = None) -> None:
    """Publish a step. `while_suspended` is called between the last check of the fence and the rename."""

    def check() -> None:
        fence.check()
        if callable(while_suspended):
            while_suspended()

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


def test_a_removed_claim_is_no_longer_valid(tmp_path: Path) -> None:
    """A user deletes the directory of a live run. The run must not write half of its checkpoints again."""
    fence = claim(tmp_path, "1.0")
    (tmp_path / "incarnations" / "000001").unlink()
    with pytest.raises(Superseded, match=r"its claim .*/incarnations/000001 was removed"):
        fence.check()
    (tmp_path / "incarnations").rmdir()
    with pytest.raises(Superseded, match="was removed"):
        fence.check()


def test_a_replaced_incarnation_cannot_publish(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    old = claim(tmp_path, "old")
    claim(tmp_path, "new")
    with pytest.raises(Superseded):
        _publish(root, 5, old, _write(root, 5, old))
    assert manifest.published_steps(root) == []


@pytest.mark.parametrize("published", [False, True], ids=["", "new one has published the step"])
def test_an_incarnation_suspended_between_check_and_rename_cannot_publish(
    tmp_path: Path, published: bool
) -> None:
    """A new incarnation starts after the old one's check.

    The old one's rename must fail and change nothing.
    """
    root = tmp_path / "checkpoints"
    old = claim(tmp_path, "old")
    partial = _write(root, 5, old)

    def meanwhile() -> None:
        new = claim(tmp_path, "new")
        if published:
            _publish(root, 5, new, _write(root, 5, new))

    with pytest.raises(FileNotFoundError):
        _publish(root, 5, old, partial, while_suspended=meanwhile)
    assert manifest.published_steps(root) == ([5] if published else [])
    if published:
        assert (manifest.step_directory(root, 5) / "weights").read_text() == "new"
    assert not [path for path in root.iterdir() if path.name.startswith((".partial", ".stale", ".replaced"))]


def test_a_claim_does_not_delete_a_conversion(tmp_path: Path) -> None:
    """A partial directory without an epoch belongs to a conversion, which can resume it."""
    partial = manifest.partial_directory(tmp_path / "checkpoints", 0)
    partial.mkdir(parents=True)
    claim(tmp_path, "new")
    assert partial.is_dir()


def test_a_save_whose_files_a_newer_incarnation_removed_reports_that_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older rank resumes in the middle of a save. The error names the newer incarnation as the reason."""
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


def test_other_files_among_the_claims_are_ignored(tmp_path: Path) -> None:
    claim(tmp_path, "1.0")
    for name in ("7", "0000009", "000008.bak", "00000²", ".DS_Store"):
        (tmp_path / "incarnations" / name).touch()
    assert claim(tmp_path, "1.1").epoch == 2


def test_a_file_in_place_of_the_checkpoint_directory_fails_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(FileExistsError, match="checkpoints"):
        claim(tmp_path, "1.0")
