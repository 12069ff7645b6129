"""The steps of a round as a chain of jobs for `launch round`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_post.config.chain import Chain, ChainJob, ChainTask
from megatron_post.config.load import to_yaml
from megatron_post.config.schema import Config
from megatron_post.config.section import one_line
from megatron_post.rounds.checks import check_files, check_models
from megatron_post.rounds.settings import load_round
from megatron_post.rounds.state import state_of
from megatron_post.rounds.steps import RoundStep, all_steps, check_packed
from megatron_post.storage.files import write_whole


def write_chain(path: str | Path, overrides: Sequence[str], target: str | Path, *, console: Console) -> int:
    """Write the steps as a chain file. Returns their number."""
    chain = chain_of(path, overrides, console=console)
    write_whole(Path(target), to_yaml(chain.model_dump(mode="json", exclude_defaults=True)))
    return len(chain.steps)


def chain_of(
    path: str | Path, overrides: Sequence[str], *, console: Console, needs_inputs: bool = True
) -> Chain:
    """The remaining steps as a chain of jobs. Each job follows the previous one.

    needs_inputs: also check the models and files that the first round starts with. Raises `ValueError` for
    errors that a user can mend, and if no step is left.
    """
    for text in (str(path), *overrides):  # they become arguments of the jobs, which must be one line
        one_line(text)
    settings = load_round(path, overrides)
    if needs_inputs:
        check_models(settings)
        check_files(settings)
    steps = all_steps(settings, console)
    if Path(settings.run_dir, "state.json").is_file():
        left = state_of(settings).remaining([step.name for step in steps])
        steps = [step for step in steps if step.name in left]
        if needs_inputs:
            check_packed(steps, set(left))
    if not steps:
        raise ValueError(
            f"{settings.run_dir}: every step is done; `megatron-post round {path} --again-from STEP` "
            "repeats a step and all steps after it"
        )
    jobs: list[ChainJob] = []
    for step in steps:
        # Slurm starts the same number of ranks on each node.
        if step.ranks % step.ranks_of_a_node:
            raise ValueError(
                f"{path}: {step.name} needs {step.ranks} ranks, which do not fill nodes of "
                f"{step.ranks_of_a_node} (ranks_per_node={settings.ranks_per_node})"
            )
        task = ChainTask(
            command=step.command or step.own_command(path, overrides),
            run_dir=None if step.run_dir is None else str(step.run_dir),
            like=_similar_run(step, needs_inputs=needs_inputs),
        )
        if step.array is not None and jobs and jobs[-1].name == step.array:
            jobs[-1] = jobs[-1].model_copy(update={"tasks": (*jobs[-1].tasks, task)})
            continue
        shape: dict[str, Any] = {
            "nodes": step.ranks // step.ranks_of_a_node,
            "ranks_per_node": step.ranks_of_a_node,
            "gpus_per_rank": step.gpus_per_rank,
            "after": (jobs[-1].name,) if jobs else (),
        }
        if step.array is not None:
            jobs.append(ChainJob(name=step.array, tasks=(task,), **shape))
        else:
            jobs.append(ChainJob(name=step.name, **dict(task), **shape))
    return Chain(run_dir=settings.run_dir, steps=tuple(jobs))


def _similar_run(step: RoundStep, *, needs_inputs: bool) -> Config | None:
    """The run that is checked in place of a training step. None if it cannot be known without the model."""
    if step.similar_run is None:
        return None
    try:
        return step.similar_run(needs_model=needs_inputs)
    except ValueError:
        if needs_inputs:
            raise
        return None
