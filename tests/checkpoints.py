"""Reads the tensors of a checkpoint that any layout has written."""

from pathlib import Path

import torch
from torch import Tensor

from megatron_post.convert.dist_checkpoint import DistCheckpoint
from megatron_post.storage import manifest


def checkpoint_tensors(directory: Path) -> dict[str, Tensor]:
    """Whole weights and Adam's whole state by megatron-core's keys. The checksums are verified first."""
    manifest.verify_step(directory)
    checkpoint, found = DistCheckpoint(directory), {}
    for key, kind in checkpoint.kinds.items():
        found[key] = torch.empty(kind.shape, dtype=kind.dtype)
        checkpoint.read_into(key, None, 0, found[key])
    return found
