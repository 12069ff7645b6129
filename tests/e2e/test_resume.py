"""A run that is killed resumes as if it had not been interrupted."""

import random
import re
import time
from pathlib import Path

import pytest
from safetensors.torch import load

from megatron_post.convert.metadata_file import read_metadata
from megatron_post.storage import manifest
from tests.e2e.runs import kill_9, small_run, start


def _train(
    directory: Path, name: str, *, ranks: int = 1, overrides: tuple[str, ...] = ()
) -> tuple[str, dict[str, bytes]]:
    """Log and exported weights of a run that is trained to its end."""
    run_dir, log = directory / name, directory / f"{name}.log"
    command = ["train", str(directory / "config.yaml"), f"run_dir={run_dir}", *overrides]
    assert start(command, ranks=ranks, log=log).wait(timeout=240) == 0, log.read_text()
    return log.read_text(), {file.name: file.read_bytes() for file in (run_dir / "hf").glob("*.safetensors")}


def test_kill_9_at_a_random_moment(tmp_path: Path) -> None:
    """After kill -9 the same command gives the same final weights bit for bit, in TP 2 and with Adam."""
    small_run(tmp_path, parallel={"tensor": 2}, train={"steps": 30})
    _, expected = _train(tmp_path, "whole", ranks=2)
    seed = random.SystemRandom().randrange(2**32)
    print(f"moment drawn from seed {seed}")
    kill_after = random.Random(seed).randrange(3, 28)
    run_dir, log = tmp_path / "killed", tmp_path / "killed.log"
    command = ["train", str(tmp_path / "config.yaml"), f"run_dir={run_dir}"]
    process = start(command, ranks=2, log=log)
    deadline = time.monotonic() + 120
    while f"step {kill_after}/" not in (text := log.read_text().replace("step  ", "step ")):
        assert process.poll() is None and time.monotonic() < deadline, text
        time.sleep(0.01)
    kill_9(process)
    assert not (run_dir / "hf").exists()
    resumed_log, actual = _train(tmp_path, "killed", ranks=2)
    (resumed,) = re.findall(r"resumed after step (\d+)", resumed_log)
    assert kill_after - 3 <= int(resumed) <= kill_after
    assert actual == expected


def test_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """One byte of the newest checkpoint is flipped. The run names it and resumes from the one before.

    It ends with the same weights.
    """
    small_run(tmp_path)
    _, expected = _train(tmp_path, "run")
    root = tmp_path / "run" / "checkpoints"
    assert manifest.published_steps(root) == [6, 8]
    file = manifest.step_directory(root, 8) / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    log, again = _train(tmp_path, "run")
    assert "step 8 is damaged and passed over" in log and "resumed after step 6" in log
    assert again == expected


def test_another_layout_resumes(tmp_path: Path) -> None:
    """A run saved under TP 2 after 4 of 8 steps continues under PP 2.

    The weights are equal up to fp32 rounding in Adam.
    """
    small_run(tmp_path, checkpoint={"every": 4, "keep": 5})
    _, parts = _train(tmp_path, "whole", ranks=2, overrides=("parallel.tensor=2",))
    whole = load(parts["model.safetensors"])
    (tmp_path / "moved").mkdir()
    checkpoints = tmp_path / "moved" / "checkpoints"
    checkpoints.mkdir()
    source = manifest.step_directory(tmp_path / "whole" / "checkpoints", 4)
    source.rename(checkpoints / source.name)
    log, parts = _train(tmp_path, "moved", ranks=2, overrides=("parallel.pipeline=2",))
    assert "resumed after step 4" in log and len(parts) == 2
    moved = {name: value for part in parts.values() for name, value in load(part).items()}
    assert whole.keys() == moved.keys()
    for name, value in whole.items():
        assert (value - moved[name]).norm() <= 1e-4 * value.norm(), name


def test_another_stream_is_refused(tmp_path: Path) -> None:
    """Another seed would train other samples, and a vocabulary may only be padded.

    Both are refused with status 2.

    The message has both values.
    """
    small_run(tmp_path, train={"steps": 2})
    _train(tmp_path, "run")
    log = tmp_path / "refused.log"
    command = [
        "train",
        str(tmp_path / "config.yaml"),
        f"run_dir={tmp_path / 'run'}",
        "seed=7",
        "train.steps=4",
    ]
    assert start(command, ranks=1, log=log).wait(timeout=120) == 2
    assert "seed: 1234 there, 7 here" in log.read_text()
    assert start([*command[:3], "model.vocab_size=640"], ranks=1, log=log).wait(timeout=120) == 2
    assert "vocab_size: 512 there, 640 here" in log.read_text()


@pytest.mark.parametrize("payload", ["os.system", "builtins.getattr"])
def test_poisoned_metadata_runs_nothing(tmp_path: Path, payload: str) -> None:
    """A pickle that would create a file is refused before anything is called."""
    module, name = payload.rsplit(".", 1)
    witness = tmp_path / "witness"
    poison = b"\x80\x04c" + f"{module}\n{name}\n".encode() + b"(V" + f"touch {witness}".encode() + b"\ntR."
    (tmp_path / ".metadata").write_bytes(poison)
    with pytest.raises(manifest.DamagedCheckpoint, match=name):
        read_metadata(tmp_path / ".metadata")
    assert not witness.exists()
