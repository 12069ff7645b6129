"""Writes `report.html` of a training run, from what the run has written so far."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from megatron_post.config.load import load_config
from megatron_post.display import say
from megatron_post.pages.charts import lines
from megatron_post.pages.page import bullets, cards, document, element, figures, table
from megatron_post.plan.estimate import Plan, make_plan
from megatron_post.plan.hardware import GIB, gpu_of_device
from megatron_post.storage.files import write_whole
from megatron_post.storage.manifest import published_steps, step_directory
from megatron_post.storage.writing import write_text
from megatron_post.train.history import METRICS, STARTS, History, read_history

REPORT = "report.html"
# What each metric shows, with its unit. The others are shown under their own names.
_AXES = {
    "loss": "loss",
    "lr": "learning rate",
    "grad_norm": "norm of the gradient",
    "tokens_per_second": "tokens/s of all ranks",
    "memory_gib": "GiB",
    "seconds": "seconds of a step",
    "tokens": "tokens of a step",
    "saves_stalled_seconds": "seconds so far",
    "tflops_per_gpu": "TFLOP/s of a GPU",
    "mfu": "share of the bf16 peak",
    "loss_outlier": "deviations",
    "grad_norm_outlier": "deviations",
}


def write_run_report(run_dir: Path, target: Path | None = None) -> Path:
    """Write the report of a run, which may go on or may have been killed. Returns the path of the page.

    target: `report.html` in the run's directory by default. Raises `ValueError` if the directory has no run.
    """
    if not any((run_dir / name).is_file() for name in (METRICS, STARTS)):
        raise ValueError(
            f"{run_dir} is not the directory of a training run: it has neither {METRICS} nor {STARTS}. "
            "`synthesize report` and `bench report` show other directories"
        )
    history = read_history(run_dir)
    planned = _plan_of(run_dir, history)
    damage = f"{history.unread} damaged line(s) are left out."
    parts = [
        cards(_facts(history)),
        *([element("p", damage, kind="bad")] if history.unread else []),
        figures(_charts(history)),
        element("h2", "Plan and measurement"),
        element("p", planned) if isinstance(planned, str) else _beside(planned, history),
        element("h2", "Starts"),
        *_starts(history),
    ]
    page = document(f"Training run {run_dir}", parts)
    if target is not None:
        write_text(target, page)
        return target
    write_whole(run_dir / REPORT, page)
    return run_dir / REPORT


def try_run_report(run_dir: Path) -> None:
    """Write the report of a run that has finished. An error is only printed, since the run is complete."""
    try:
        say(f"{write_run_report(run_dir)} shows the run")
    except Exception as error:  # whatever it is, the run has succeeded
        say(f"{run_dir / REPORT} cannot be written: {type(error).__name__}: {error}")


def _facts(history: History) -> dict[str, str]:
    loss, held_out = history.train.points("loss"), history.evaluation.points("loss")
    seconds, tokens = history.train.points("seconds")[:, 1], history.train.points("tokens")[:, 1]
    facts = {"last step": f"{int(loss[-1, 0]):,}" if len(loss) else "none"}
    if len(loss):
        facts["last loss"] = f"{loss[-1, 1]:.4g}"
        # a step whose packs are skipped has no line
        facts["skipped steps"] = f"{int(loss[-1, 0] - loss[0, 0]) + 1 - len(loss):,}"
    if len(held_out):
        facts["last loss on held-out packs"] = f"{held_out[-1, 1]:.4g}"
    facts |= {"tokens": f"{np.nansum(tokens):,.0f}", "hours of steps": f"{np.nansum(seconds) / 3600:.4g}"}
    facts["starts"] = f"{len(history.starts):,}" if history.starts else "not recorded"
    if history.starts:
        facts["lost steps"] = f"{sum(start['lost'] for start in history.starts):,}"
    return facts


def _charts(history: History) -> list[Markup]:
    """A chart for each metric, with that of the held-out packs in it. The known ones come first."""
    train, held_out = history.train, history.evaluation
    found = dict.fromkeys([*train.names, *held_out.names])
    names = [*(name for name in _AXES if name in found), *(name for name in found if name not in _AXES)]
    return [
        lines(
            name.replace("_", " "),
            {"training": train.points(name), "held-out packs": held_out.points(name)},
            x="step",
            y=_AXES.get(name, name),
        )
        for name in names
        if name != "time"
    ]


def _plan_of(run_dir: Path, history: History) -> Plan | str:
    """The plan of the newest checkpoint's config on the GPUs of the last start, or why there is none."""
    root = run_dir / "checkpoints"
    device = str(history.starts[-1].get("device")) if history.starts else "an unknown device"
    gpu = gpu_of_device(device)
    if gpu is None:
        return f"The planner has no figures for {device}, so there is no plan to compare with."
    try:
        step = max(published_steps(root), default=None)
        if step is None:
            return "No checkpoint has the run's config yet, so there is no plan to compare with."
        config = load_config(str(step_directory(root, step) / "config.yaml"))
        plan = make_plan(config, gpus=history.starts[-1]["ranks"], gpu=gpu)
        assert plan.time.seconds > 0  # computed here, so that its errors are caught here
    except ValueError as error:
        return f"There is no plan to compare with: {error}"
    return plan


def _beside(plan: Plan, history: History) -> Markup:
    def middle(name: str) -> float:
        values = history.train.points(name)[:, 1]
        return float(np.nanmedian(values)) if np.isfinite(values).any() else float("nan")

    memory = history.train.points("memory_gib")[:, 1]
    rows = {
        "seconds of a step": (plan.time.seconds, middle("seconds")),
        "tokens/s of a GPU": (plan.tokens_per_second_per_gpu, middle("tokens_per_second") / plan.gpus),
        "MFU, % of the bf16 peak": (100 * plan.model_flops_utilization, 100 * middle("mfu")),
        "memory, GiB": (plan.fullest.total / GIB, float(memory.max()) if len(memory) else float("nan")),
    }
    cells = [(name, f"{a:,.4g}", f"{b:,.4g}", f"{b / a:.2f}") for name, (a, b) in rows.items()]
    note = (
        "Measured figures are medians over the steps, and the largest for memory. The plan is for full packs "
        "of one segment, so packs of short segments have less work. Its memory is that of the fullest rank "
        "with a reserve, and the measured one is that of tensors on the rank that reports."
    )
    head = ["", f"plan for {plan.gpus} x {plan.gpu.name}", "measured", "measured / plan"]
    return table(head, cells, numbers=True) + element("p", note, kind="faint")


def _starts(history: History) -> list[Markup]:
    """A row for each time that the run started or went back to a checkpoint."""
    note = "A start after a kill, and a return to a checkpoint, repeat the lost steps."
    if not history.starts:
        return [bullets(["No start is recorded. Runs of earlier versions have no record."])]
    head = ["start", "time (UTC)", "after step", "lost steps", "ranks", "device"]
    rows = [
        (str(n), _time(s.get("time")), s["after"], s["lost"], s["ranks"], str(s.get("device", "")))
        for n, s in enumerate(history.starts, start=1)
    ]
    return [element("p", note, kind="faint"), table(head, rows)]


def _time(value: Any) -> str:
    try:
        return f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d %H:%M:%S}"
    except (TypeError, ValueError, OverflowError, OSError):
        return "unknown"
