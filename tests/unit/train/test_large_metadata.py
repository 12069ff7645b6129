"""The index of a checkpoint of 16,384 ranks is written and read in seconds."""

import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_post.convert.metadata_file import collector_paused, read_metadata
from megatron_post.train.async_save import _metadata

STATES = ("", "optimizer.state.fp32_param.", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")


def _note(rank: int, rectangles: int) -> dict[str, Any]:
    """A rank's part of 405B's fc1 on 32 pipeline stages of 512 ranks, as a JSON note has it."""
    name, tensors = f"__{rank}_0.distcp", []
    for number in range(rectangles):
        layer = rank // 512 * 4 + number // 4 % 4
        key = f"{STATES[number % 4]}decoder.layers.{layer}.mlp.linear_fc1.weight"
        offsets, sizes = [layer, rank % 512 * 208, number // 16 * 1024], [1, 208, 1024]
        tensors.append([key, "float32", [126, 106496, 16384], offsets, sizes, name, [number * 1000, 1000]])
    return {"tensors": tensors, "objects": [], "files": {}}


@pytest.mark.parametrize("ranks", [512, pytest.param(16384, marks=pytest.mark.slow)])
def test_time_and_content(tmp_path: Path, ranks: int) -> None:
    """64 rectangles a rank. The goal for 16,384 ranks is 10 s each, on a machine that does nothing else."""
    notes = [_note(rank, 64) for rank in range(ranks)]
    begin = time.process_time()
    with collector_paused():
        content = pickle.dumps(_metadata(notes))
    written = time.process_time()
    (tmp_path / ".metadata").write_bytes(content)
    metadata = read_metadata(tmp_path / ".metadata")
    read = time.process_time()
    print(f"\n{ranks} ranks: {len(content) / 1e6:.0f} MB, {written - begin:.2f} processor seconds to write, "
          f"{read - written:.2f} s to read")  # fmt: skip
    assert len(metadata.storage_data) == ranks * 64
    for index, place in list(metadata.storage_data.items())[:: ranks * 4 + 1]:
        chunk = metadata.state_dict_metadata[index.fqn].chunks[index.index]
        rank = int(place.relative_path.split("_")[2])
        assert chunk.offsets == index.offset and chunk.offsets[1] == rank % 512 * 208
        assert tuple(chunk.sizes) == (1, 208, 1024)
    assert written - begin < 15 and read - written < 15  # a busy machine took 10.9 and 4.2
