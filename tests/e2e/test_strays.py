"""Every command reports stray names among a run's checkpoints once, and ignores them."""

from pathlib import Path

from tests.e2e.poison import command, succeed
from tests.e2e.runs import small_run
from tests.ranks import run_ranks

STRAYS = (".DS_Store", "backup", "step-00000002.bak", "step-00000003", "step-00000009", "step-4", "step-abc")


def _train_among_strays(directory: Path) -> list[tuple[int, str]]:
    """Run two steps, make stray files, and run every command that looks for checkpoints."""
    train = ("train", directory / "config.yaml")
    succeed(*train)
    root = directory / "run" / "checkpoints"
    for name in ("backup", "step-00000002.bak", "step-4", "step-abc"):
        (root / name).mkdir()
    for name in (".DS_Store", "step-00000003"):
        (root / name).write_text("")
    (root / "step-00000009").symlink_to(root / "nowhere")
    return [
        command(*train, "train.steps=4"),
        command("convert", "inspect", root),
        command("convert", "megatron-to-hf", root, directory / "hf"),
        command("convert", "verify", root, directory / "hf"),
    ]


def test_strays_are_named_once_and_passed_over(tmp_path: Path) -> None:
    small_run(tmp_path, model={"num_layers": 1}, train={"steps": 2, "export_hf": False})
    ((trained, *others),) = run_ranks(_train_among_strays, 1, tmp_path)
    status, output = trained
    assert status == 0 and "resumed after step 2" in output and "step 4/4" in output.replace("  ", " "), (
        output
    )
    (line,) = [line for line in output.splitlines() if "no checkpoints" in line]
    assert line.endswith(", ".join(map(repr, STRAYS)))
    for status, output in others:
        assert status == 0, output
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} >= set(STRAYS)
