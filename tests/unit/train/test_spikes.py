"""A jump of the loss is recorded once, with the samples of all ranks."""

import json
from pathlib import Path

from megatron_post.config.sections import Parallel
from megatron_post.parallel.topology import parallel_run
from megatron_post.train.health import FEWEST, Spikes
from megatron_post.train.step_lines import StepLines
from tests.ranks import run_ranks
from tests.tiny import tiny_packs


def _losses_with_a_jump(run_dir: str) -> list[float]:
    """Record losses near 2 that vary by 1%, and then a loss of 9. Both ranks have two packs."""
    with parallel_run(Parallel(), seed=1) as topology:
        packs = tiny_packs(4)[topology.data_rank :: topology.data_size]
        spikes = Spikes(StepLines(Path(run_dir, "spikes.jsonl")), topology, ["sums"], threshold=8.0)
        scores = []
        for step in range(1, FEWEST + 2):
            loss = 2 + 0.02 * (step % 3) if step <= FEWEST else 9.0
            own = [loss, loss + topology.data_rank + 1]
            scores.append(spikes.look(step, {"loss": loss, "grad_norm": 1.0}, packs, own)["loss_outlier"])
        return scores


def test_a_spike_is_recorded_with_its_samples(tmp_path: Path) -> None:
    scores = run_ranks(_losses_with_a_jump, 2, str(tmp_path))
    assert scores[0] == scores[1] and scores[0][-1] > 8
    (line,) = [json.loads(text) for text in (tmp_path / "spikes.jsonl").read_text().splitlines()]
    assert line["step"] == FEWEST + 1 and line["loss"] == 9.0
    assert [(pack["data_rank"], pack["microbatch"], pack["loss"]) for pack in line["packs"]] == [
        (1, 1, 11.0),
        (0, 1, 10.0),
        (0, 0, 9.0),
        (1, 0, 9.0),
    ]
    packs = tiny_packs(4)
    assert line["packs"][0]["samples"] == [f"sums:{i}" for i in range(len(packs[3].lengths))]
