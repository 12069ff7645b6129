"""`megatron-post evaluate tasks` runs benchmarks of lm-evaluation-harness on a model."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_post.convert.hf_directory import HuggingFaceDirectory
from megatron_post.convert.jobs import convert
from megatron_post.convert.megatron_checkpoint import step_of
from megatron_post.convert.publishing.card import with_results
from megatron_post.convert.publishing.record import Result
from megatron_post.convert.publishing.run_record import ORIGIN
from megatron_post.convert.to_hf import ToHuggingFace
from megatron_post.installation import require
from megatron_post.storage import manifest
from megatron_post.storage.files import write_json
from megatron_post.storage.hub import hub_name, model_directory
from megatron_post.storage.reading import did_you_mean, read_json

RESULTS = "evaluations.json"


@dataclass(frozen=True)
class TaskSettings:
    """Settings of an evaluation.

    backend: what runs the model. task_dir: a directory of further tasks as YAML files. shots: examples in the
    prompt, None for each task's own number. limit: rows of each task, None for all. chat: whether prompts are
    rendered by the model's chat template.
    """

    tasks: tuple[str, ...]
    backend: Literal["transformers", "vllm"] = "transformers"
    task_dir: str | None = None
    shots: int | None = None
    limit: int | None = None
    batch: int = 8
    chat: bool = False


def evaluate_tasks(model: str, settings: TaskSettings) -> list[Result]:
    """Evaluate a model, and append the results to `evaluations.json`.

    model: a Hugging Face directory, a name of the hub, a run's checkpoints or one step. A checkpoint is
    exported to a directory that is removed afterwards. The file is written into the model's directory and
    into that of its run. An export's model card shows the results.

    Raises `ValueError` for an unknown task, a reward model, and a package that is not installed.
    """
    require("lm_eval", "evaluate tasks", "eval")
    if settings.backend == "vllm":
        require("vllm", "evaluate tasks --backend vllm", "generate")
    manager = _manager(settings)
    with _exported(model) as (directory, homes, step):
        source = HuggingFaceDirectory(directory)
        if source.scalar_head:
            raise ValueError(f"{model} is a reward model, which cannot answer tasks")
        found = _run(directory, settings, manager)
        results = list(_results(found, settings))
        entry = {
            "model": model,
            "step": step,
            "backend": settings.backend,
            "chat_template": settings.chat,
            "lm_eval": found.get("lm_eval_version"),
            "versions": found["versions"],
            "results": [result.model_dump() for result in results],
        }
        for home in homes:
            path = home / RESULTS
            before = read_json(path, "a list of evaluations") if path.is_file() else []
            if not isinstance(before, list):
                raise ValueError(f"{path} is no list of evaluations; move it away")
            write_json(path, [*before, entry])
        if step is None and homes:
            with_results(directory, results)
    return results


@contextmanager
def _exported(model: str) -> Iterator[tuple[Path, list[Path], int | None]]:
    """Gives a Hugging Face directory, the directories of results, and the step of a checkpoint.

    Results are not written into the hub's cache.
    """
    directory = model_directory(model)
    is_step = (directory / manifest.MANIFEST).is_file()
    if not is_step and not manifest.published_steps(directory):
        run = directory.absolute().parent
        homes = [directory, *([run] if (run / ORIGIN).is_dir() else [])]
        yield directory, [] if hub_name(directory) else homes, None
        return
    step = step_of(directory, None)
    run = step.absolute().parent.parent
    with tempfile.TemporaryDirectory(prefix=".evaluating-", dir=run) as temporary:
        target = Path(temporary) / "hf"
        convert(ToHuggingFace(str(step), str(target)), workers=1, report=lambda text: None)
        yield target, [run], int(step.name.removeprefix("step-"))


def _manager(settings: TaskSettings) -> Any:
    """lm-evaluation-harness' tasks. Raises `ValueError` for an unknown one."""
    from lm_eval.tasks import TaskManager

    if settings.task_dir is not None and not Path(settings.task_dir).is_dir():
        raise ValueError(f"--task-dir {settings.task_dir} is not a directory")
    manager = TaskManager(include_path=settings.task_dir)
    if not settings.tasks:
        raise ValueError("--tasks names no task")
    for task in settings.tasks:
        if task not in manager.task_index:
            known = sorted(manager.task_index)
            raise ValueError(
                f"--tasks: lm-evaluation-harness has no task {task!r}{did_you_mean(task, known)}; give a "
                "directory with your own tasks as --task-dir"
            )
    return manager


def _run(directory: Path, settings: TaskSettings, manager: Any) -> dict[str, Any]:
    """What lm-evaluation-harness returns. Its errors become a `ValueError` that names the tasks."""
    import torch
    from lm_eval import simple_evaluate

    arguments: dict[str, Any] = {"pretrained": str(directory), "dtype": "auto"}
    if settings.backend == "transformers":
        arguments["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = simple_evaluate(
            model="hf" if settings.backend == "transformers" else "vllm",
            model_args=arguments,
            tasks=list(settings.tasks),
            num_fewshot=settings.shots,
            limit=settings.limit,
            batch_size=settings.batch,
            apply_chat_template=settings.chat,
            task_manager=manager,
            log_samples=False,
        )
    except Exception as error:  # a data set that cannot be loaded, or a fault in a task's own code
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"tasks {', '.join(settings.tasks)}: {type(error).__name__}: {reason}; without internet, the "
            "data sets of tasks must be in the cache of `datasets` (HF_HOME)"
        ) from error
    assert found is not None, "only ranks other than 0 get no results"
    return dict(found)


def _results(found: dict[str, Any], settings: TaskSettings) -> Iterator[Result]:
    """The figures of all tasks and of their groups. Figures that are no finite numbers are left out."""
    for task, figures in found["results"].items():
        for key, value in figures.items():
            name, _, kind = key.partition(",")
            if not _is_figure(value) or name.endswith("_stderr") or not kind:
                continue
            error = figures.get(f"{name}_stderr,{kind}")
            yield Result(
                task=task,
                metric=name if kind == "none" else f"{name} ({kind})",
                value=float(value),
                stderr=float(error) if _is_figure(error) else None,
                shots=found.get("n-shot", {}).get(task),
                limit=settings.limit,
            )


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
