"""The page of a training run: killed, resumed and damaged ones, without steps and with a million."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_post.config.load import to_yaml
from megatron_post.storage.files import write_lines
from megatron_post.train.history import read_history
from megatron_post.train.metrics import MetricsWriter
from megatron_post.train.report import try_run_report, write_run_report
from tests.unit.plan.test_estimate import llama_config

H100 = "NVIDIA H100 80GB HBM3"


def texts(path: Path) -> str:
    """The text of a page without its charts, with a bar between two elements."""
    page = re.sub(r"<(style|svg).*?</\1>", "", path.read_text(), flags=re.DOTALL)
    return re.sub(r"\s*(\||\n)+\s*", "|", re.sub(r"<[^>]*>", "|", page))


def run(directory: Path, *, after: int, last: int, device: str = "CPU", **values: float) -> MetricsWriter:
    """An incarnation of a run that goes on after a step and ends at another one."""
    writer = MetricsWriter(directory, active=True, ranks=2, device=device)
    writer.begin(after=after)
    for step in range(after + 1, last + 1):
        writer.on_step(step, {"loss": 1 / step, "tokens": 10.0, "seconds": 1.8} | values)
    return writer


def test_a_killed_and_resumed_run(tmp_path: Path) -> None:
    """It was killed after steps 5 and 7, and went on from checkpoints of 3 and 6: 2 and 1 steps are lost."""
    run(tmp_path, after=0, last=5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 6, "lo')
    run(tmp_path, after=3, last=7)
    run(tmp_path, after=6, last=10).on_evaluate(10, {"loss": 0.5})
    found = texts(write_run_report(tmp_path))
    for fact in ("10|last step", "0.1|last loss", "0|skipped steps", "0.5|last loss on held-out packs",
                 "100|tokens", "0.005|hours of steps", "3|starts", "3|lost steps"):  # fmt: skip
        assert f"|{fact}|" in found, fact
    assert "damaged" not in found and "no figures for CPU" in found
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 3 and "held-out packs</li>" in page


def test_a_run_that_was_killed_before_its_first_step(tmp_path: Path) -> None:
    run(tmp_path, after=0, last=0)
    found = texts(write_run_report(tmp_path))
    assert "|none|last step|" in found and "|1|starts|" in found and "last loss" not in found


def test_a_run_of_one_step_that_is_not_finite(tmp_path: Path) -> None:
    run(tmp_path, after=0, last=1, loss=math.nan)
    found = texts(write_run_report(tmp_path))
    assert "|nan|last loss|" in found and "1 value(s) are not finite" in found


def test_a_run_of_an_earlier_version_has_no_starts(tmp_path: Path) -> None:
    run(tmp_path, after=0, last=2)
    (tmp_path / "starts.jsonl").unlink()
    found = texts(write_run_report(tmp_path))
    assert "|not recorded|starts|" in found and "No start is recorded." in found


@pytest.mark.parametrize(
    "line",
    ["", "[]", "3", "null", '{"kind": "train"}', '{"kind": [], "step": 1}', '{"kind": "other", "step": 1}',
     '{"kind": "train", "step": true, "loss": 1}', '{"kind": "train", "step": -1, "loss": 1}',
     '{"kind": "train", "step": 1e300, "loss": 1}', '{"kind": "train", "step": 1, "loss": "2"}',
     '{"kind": "train", "step": 1, "loss": null}', f'{{"kind": "train", "step": 1, "loss": 1{"0" * 400}}}',
     f'{{"kind": "train", "step": 1{"0" * 5000}}}', "[" * 100_000, "\udcff"],
)  # fmt: skip
def test_damaged_lines_are_counted(tmp_path: Path, line: str) -> None:
    """Each of these lines is left out as a whole, of both files."""
    run(tmp_path, after=0, last=2)
    for name in ("metrics.jsonl", "starts.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(line.encode(errors="surrogateescape") + b"\n")
    history = read_history(tmp_path)
    assert history.unread == 2 and len(history.starts) == 1
    assert history.train.points("loss").tolist() == [[1, 1], [2, 0.5]]
    assert "2 damaged line(s) are left out." in texts(write_run_report(tmp_path))


def test_a_repeated_step_has_its_last_value(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"kind": "train", "step": n, "loss": v} for n, v in ((2, 1), (1, 5), (2, 3))
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    assert read_history(tmp_path).train.points("loss").tolist() == [[1, 5], [2, 3]]


def test_a_million_steps(tmp_path: Path) -> None:
    """The page is small, and the one large loss of 1,000,000 is in it."""
    line = '{{"kind": "train", "step": {}, "loss": {}}}\n'
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.writelines(line.format(n, 9.0 if n == 654_321 else 1.0) for n in range(1, 1_000_001))
    path = write_run_report(tmp_path)
    assert path.stat().st_size < 100_000 and "Of every 2,500 points" in texts(path)
    assert "|1,000,000|last step|" in texts(path)


def test_the_plan_beside_what_was_measured(tmp_path: Path) -> None:
    """Half the tokens/s of the plan and twice its seconds are shown as 0.50 and 2.00."""
    config = llama_config("llama3.1_8b", {"tensor": 2}, train={"steps": 4, "global_batch": 2})
    step = tmp_path / "checkpoints" / "step-00000004"
    step.mkdir(parents=True)
    (step / "config.yaml").write_text(to_yaml(config))
    from megatron_post.plan.estimate import make_plan
    from megatron_post.plan.hardware import GPUS

    plan = make_plan(config, gpus=2, gpu=GPUS["h100-80gb"])
    values = {"seconds": 2 * plan.time.seconds, "tokens_per_second": plan.tokens_per_second_per_gpu}
    run(tmp_path, after=0, last=4, device=H100, **values)
    found = texts(write_run_report(tmp_path))
    assert "|plan for 2 x h100-80gb|measured|measured / plan|" in found
    assert re.search(r"\|seconds of a step\|[\d.]+\|[\d.]+\|2\.00\|", found)
    assert re.search(r"\|tokens/s of a GPU\|[\d.,]+\|[\d.,]+\|0\.50\|", found)
    (step / "config.yaml").write_text("stage: nothing\n")
    assert "There is no plan to compare with: " in texts(write_run_report(tmp_path))


def test_another_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither metrics\.jsonl nor starts\.jsonl"):
        write_run_report(tmp_path)


def test_a_failure_to_draw_is_only_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, after=0, last=1)
    (tmp_path / "report.html").mkdir()
    try_run_report(tmp_path)
    assert "report.html cannot be written: " in capsys.readouterr().out
    (tmp_path / "starts.jsonl").write_text(json.dumps({"after": 1, "lost": 0, "ranks": 1, "time": "?"}))
    assert "unknown" in texts(write_run_report(tmp_path, tmp_path / "other.html"))
