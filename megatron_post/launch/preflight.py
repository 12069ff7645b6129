"""The checks before a job is queued. They report all findings together."""

import dataclasses
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_post.config.layout import segment_multiple, store_layout, world_errors
from megatron_post.config.load import ConfigError
from megatron_post.config.schema import Config
from megatron_post.data.store import open_store
from megatron_post.data.store_format import GROUPS
from megatron_post.data.tokenizer import tokenizer_of
from megatron_post.launch import slurm
from megatron_post.launch.cluster import Cluster
from megatron_post.launch.placement import place
from megatron_post.launch.script import Job
from megatron_post.plan.estimate import make_plan, verdict
from megatron_post.plan.hardware import gpu
from megatron_post.plan.outlook import most_checkpoints
from megatron_post.storage.hub import model_directory
from megatron_post.storage.manifest import published_steps


def findings(config: Config, job: Job, cluster: Cluster) -> list[str]:
    """Every reason why this run would fail on this cluster. The list is empty if no check fails."""
    found = layout_findings(config, cluster, nodes=job.nodes)
    if not found:
        found += memory_findings(config, cluster, nodes=job.nodes)
    found += data_findings(config, job.directory)
    found += disk_findings(config, job.directory)
    if cluster.container is not None:
        found += mount_findings(config, job.directory, cluster.container.mounts)
    return found + slurm_findings(job, cluster)


def raise_for(found: Sequence[str], origin: str) -> None:
    """Raise `ConfigError` with all findings if there are any."""
    if found:
        lines = "\n".join(f"  - {line}" for text in found for line in text.splitlines())
        raise ConfigError(f"{origin}: {len(found)} finding(s), nothing was queued\n{lines}")


def layout_findings(config: Config, cluster: Cluster, *, nodes: int) -> list[str]:
    """Check group sizes, batch, switches and the placement of the config on `nodes` nodes."""
    capability = gpu(cluster.gpu).capability if cluster.gpus_per_node and cluster.gpu else None
    found = world_errors(
        config,
        world_size=nodes * cluster.ranks,
        has_gpu=cluster.gpus_per_node > 0,
        # the compute nodes need Transformer Engine, and the login node that runs this may not have it
        has_transformer_engine=True,
        capability=capability,
        cuda=torch.version.cuda if cluster.python is None and cluster.container is None else None,
    )
    in_order = cluster.environment.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"
    is_blackwell = capability is not None and capability >= (10, 0)
    if config.parallel.tp_comm_overlap and not (in_order or is_blackwell):
        found.append(
            "parallel.tp_comm_overlap=true needs kernels that run in the order of their launch. Set "
            'environment.CUDA_DEVICE_MAX_CONNECTIONS="1" in the cluster file'
        )
    if nodes * cluster.ranks % config.parallel.model_size == 0:
        found += place(config.parallel, nodes=nodes, ranks_per_node=cluster.ranks).errors()
    return found


def memory_findings(config: Config, cluster: Cluster, *, nodes: int) -> list[str]:
    """Report by how much the run exceeds GPU memory in the planner's estimate, and which changes would help.

    The check is skipped if the cluster has no GPUs or its file has `gpu: null`. Raises `ValueError` for a GPU
    that the planner does not know.
    """
    if not cluster.gpus_per_node or cluster.gpu is None:
        return []
    device = dataclasses.replace(gpu(cluster.gpu), per_node=cluster.ranks)
    plan = make_plan(config, gpus=nodes * cluster.ranks, gpu=device)
    if plan.shortfall <= 0:
        return []
    text = re.sub(r"--gpus (\d+)", lambda found: f"--nodes {int(found[1]) // cluster.ranks}", verdict(plan))
    return [f"memory, by `megatron-post plan`: {text}"]


def data_findings(config: Config, directory: Path) -> list[str]:
    """Check that weights, tokenizer and store exist, can be read and belong together."""
    found = []
    weights = config.model.init_from
    try:
        if weights is not None and not (directory / model_directory(weights)).is_dir():
            found.append(f"model.init_from={weights} is no directory here")
    except ValueError as error:
        found.append(f"model.init_from={error}")
    try:
        tokenizer = tokenizer_of(config, beside=directory)
    except (ValueError, OSError) as error:
        found.append(f"tokenizer.path={config.tokenizer.path}: {error}")
        fingerprint = None
    else:
        fingerprint = tokenizer.fingerprint
        if tokenizer.vocab_size > config.model.vocab_size:
            found.append(
                f"the tokenizer {config.tokenizer.path} has {tokenizer.vocab_size} ids, more than "
                f"model.vocab_size={config.model.vocab_size}"
            )
    for group in GROUPS if config.data.eval_sources else GROUPS[:1]:
        try:
            open_store(
                directory / config.data.store,
                group,
                pack_length=config.data.pack_length,
                segment_multiple=segment_multiple(config),
                tokenizer_fingerprint=fingerprint,
                layout=store_layout(config),
                reasoning=config.data.reasoning,
            )
        except (ValueError, OSError) as error:
            found.append(f"data.store, {group}: {error}")
            break
    return found


def disk_findings(config: Config, directory: Path) -> list[str]:
    """Check the permission and the free space for all checkpoints that exist at the same time.

    The checkpoint that is being written counts. Checkpoints that the run has already written do not need
    more space.
    """
    from megatron_post.train.shards import checkpoint_bytes

    run_dir = directory / config.run_dir
    place = run_dir
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        return [f"run_dir={config.run_dir}: {place} is not writable"]
    count, free = most_checkpoints(config), shutil.disk_usage(place).free
    there = min(len(published_steps(run_dir / "checkpoints")), count - 1)
    need = (count - there) * checkpoint_bytes(config)
    if need <= free:
        return []
    kept = f"checkpoint.keep={config.checkpoint.keep}"
    if config.checkpoint.keep_every:
        kept += f", checkpoint.keep_every={config.checkpoint.keep_every}"
    what = f"the {count - there} that are not there yet" if there else "together they"
    return [
        f"run_dir={config.run_dir}: {count} checkpoints must fit on the disk ({kept}, and the one being "
        f"written): {what} take {need / 1e9:.1f} GB, and {place} has {free / 1e9:.1f} GB free"
    ]


def mount_findings(config: Config, directory: Path, mounts: Sequence[str]) -> list[str]:
    """Find paths of the config that do not exist under the same name inside the container."""
    inside = [Path(host) for host, target in (text.split(":")[:2] for text in mounts) if host == target]
    paths = {
        "the working directory": directory,
        "run_dir": directory / config.run_dir,
        "tokenizer.path": directory / model_directory(config.tokenizer.path),
        "data.store": directory / config.data.store,
    }
    if config.model.init_from is not None:
        paths["model.init_from"] = directory / model_directory(config.model.init_from)
    missing = [text.split(":")[0] for text in mounts if not Path(text.split(":")[0]).exists()]
    return [f"container.mounts: {path} does not exist here" for path in missing] + [
        f"{name}: {path} is under no container mount of the same path inside and outside"
        for name, path in paths.items()
        if not any(path.absolute().is_relative_to(mount) for mount in inside)
    ]


def slurm_findings(job: Job, cluster: Cluster) -> list[str]:
    """The reason for which `sbatch --test-only` refuses the job, if it does."""
    try:
        slurm.test_only(job, cluster)
    except slurm.SlurmError as error:
        return [str(error)]
    return []
