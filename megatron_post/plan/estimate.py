"""Plans a config on a number of GPUs: memory, time, and single changes that would make it fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from megatron_post.config.layout import (
    layout_errors,
    segment_multiple,
    store_layout,
    uses_portable_layers,
    world_errors,
)
from megatron_post.config.load import SettingsSource, raise_for, section_of
from megatron_post.config.schema import Config
from megatron_post.config.switches import switches_on
from megatron_post.plan.activations import Layers, Segment
from megatron_post.plan.flops import Load, step_flops
from megatron_post.plan.hardware import GIB, GPU
from megatron_post.plan.hardware import gpu as gpu_of
from megatron_post.plan.memory import RankMemory, memory
from megatron_post.plan.step import StepTime, step_time
from megatron_post.plan.timing import Costs


@dataclass(frozen=True)
class Plan:
    """Memory and time of a step of a config.

    segment_length: tokens of the segments that fill a pack. By default the pack is one segment.
    trained_share: share of the tokens that carry loss, for times. Memory is that of a pack of trained tokens.
    """

    config: Config
    gpus: int
    gpu: GPU
    segment_length: int | None = None
    trained_share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.trained_share <= 1:
            raise ValueError(f"--trained-share {self.trained_share}: want above 0 and at most 1")

    @cached_property
    def pack(self) -> tuple[Segment, ...]:
        """The segments of every pack. Raises `ValueError` for a length that no pack has."""
        return pack_segments(self.config, self.segment_length)

    @property
    def data_size(self) -> int:
        return self.gpus // self.config.parallel.model_size

    @property
    def microbatches(self) -> int:
        return self.config.train.global_batch // self.data_size

    @cached_property
    def memory(self) -> list[RankMemory]:
        """Memory of each pipeline rank."""
        return self._memory(extremes=False)

    @cached_property
    def fullest(self) -> RankMemory:
        return max(self._memory(extremes=True), key=lambda rank: rank.total)

    def _memory(self, *, extremes: bool) -> list[RankMemory]:
        return memory(
            self.config,
            data_size=self.data_size,
            layers=layers_on_gpu(self.config),
            segments=self.pack,
            fp8_copies=2 if self.gpu.transposed_fp8 else 1,
            reserve=self.gpu.reserve,
            extremes=extremes,
        )

    @cached_property
    def time(self) -> StepTime:
        return step_time(self.costs, [self.pack] * self.microbatches)

    @property
    def costs(self) -> Costs:
        return Costs(self.config, self.gpu, self.data_size, trained_share=self.trained_share)

    @property
    def shortfall(self) -> int:
        """Bytes by which the fullest rank does not fit. It is 0 or less if the rank fits."""
        return self.fullest.total - self.gpu.memory

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes that a reader of the figures must know."""
        notes = {
            "times are those of bf16: fp32 takes several times as long, and is not timed": (
                self.config.precision.dtype == "fp32"
            ),
            "parallel.tp_comm_overlap: what it hides is computed and was not measured; published steps of "
            "runs with it are nearer to the plan without it": self.config.parallel.tp_comm_overlap,
            "parallel.cp_comm_type=a2a: Transformer Engine computes the order of tokens on the host, and "
            "waits for the GPU for every segment of a pack in every layer, which is not timed": (
                self.config.parallel.cp_comm_type == "a2a"
            ),
        }
        return tuple(note for note, holds in notes.items() if holds)

    @property
    def tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.config.train.global_batch * self.config.data.pack_length

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens / self.time.seconds / self.gpus

    @property
    def model_flops(self) -> float:
        """FLOPs of a step, without recomputation."""
        pack = Load.of(self.pack, trained=self.trained_share * self.config.data.pack_length)
        return step_flops(self.config, pack * self.config.train.global_batch).model

    @property
    def model_flops_utilization(self) -> float:
        """Share of the GPUs' dense bf16 peak, from 0 to 1."""
        return self.model_flops / self.time.seconds / self.gpus / self.gpu.bf16


def make_plan(
    config: Config | SettingsSource,
    *,
    gpus: int,
    gpu: GPU | str = "h100-80gb",
    segment_length: int | None = None,
    trained_share: float = 1.0,
) -> Plan:
    """The plan of a config, a YAML file or its keys and values. gpu: also by its name in `hardware.GPUS`.

    segment_length: tokens of the segments that fill a pack, None for one segment. trained_share: share of the
    tokens that carry loss.

    Raises `ConfigError` with every reason why it cannot run here, and `ValueError` for a wrong length.
    """
    if gpus < 1:
        raise ValueError(f"gpus={gpus}: give at least 1")
    config = section_of(Config, config)
    gpu = gpu_of(gpu) if isinstance(gpu, str) else gpu
    raise_for(_errors(config, gpus, gpu))
    plan = Plan(config, gpus, gpu, segment_length, trained_share)
    assert plan.pack  # computing the pack refuses a wrong length
    return plan


def _errors(config: Config, gpus: int, gpu: GPU) -> list[str]:
    errors = world_errors(
        config, world_size=gpus, has_gpu=True, has_transformer_engine=True, capability=gpu.capability
    )
    if gpu.per_node % config.parallel.tensor:
        errors.append(
            f"parallel.tensor={config.parallel.tensor} does not divide the {gpu.per_node} GPUs of a node: "
            "tensor-parallel groups would cross nodes"
        )
    return errors


def layout_line(config: Config, data_size: int) -> str:
    """A line such as "TP 8 + SP x PP 8 x VPP 8 x CP 8 x DP 1, recompute full, FP8 tensorwise"."""
    p = config.parallel
    sizes = {"TP": p.tensor, "PP": p.pipeline, "VPP": p.virtual_pipeline, "CP": p.context, "DP": data_size}
    text = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one GPU"
    modules = f" ({', '.join(config.recompute.modules)})" if config.recompute.mode == "selective" else ""
    precision = f"FP8 {config.precision.fp8}" if config.precision.fp8 else config.precision.dtype
    return f"{text}{' + SP' if p.sequence else ''}, recompute {config.recompute.mode}{modules}, {precision}"


def layers_on_gpu(config: Config) -> Layers:
    """The kind of layers that run on a GPU with Transformer Engine."""
    if uses_portable_layers(config, has_transformer_engine=True):
        return "portable"
    return "mixed" if config.shares_prompts else "transformer_engine"


def pack_segments(config: Config, length: int | None) -> tuple[Segment, ...]:
    """Segments of `length` that fill a pack, each with the padding that context parallelism adds.

    By default there is one segment, whose attention costs most. Documents that see each other are one too.
    If rows share a prompt, half of each row is the prompt and a quarter is each response. Raises `ValueError`
    for a length that no pack has.
    """
    total = config.data.pack_length
    length = total if length is None else length
    if config.joins_documents and length != total:
        raise ValueError(
            f"a segment of {length} tokens: with pretrain.attention=pack a pack is one segment of "
            f"data.pack_length={total}"
        )
    if not 1 <= length <= total:
        raise ValueError(f"a segment of {length} tokens: want 1 to data.pack_length={total}")
    multiple = segment_multiple(config)
    length = -(-length // multiple) * multiple
    count, rest = divmod(total, length)
    lengths = [length] * count + [rest] * (rest > 0)
    if not config.shares_prompts:
        return tuple(Segment(size) for size in lengths)
    result: list[Segment] = []
    for size in lengths:
        prompt, response = size // 2, size // 4
        seen = prompt + response if store_layout(config) == "concatenated" else prompt
        result += [Segment(prompt), Segment(response, prompt), Segment(size - prompt - response, seen)]
    return tuple(result)


def changed(config: Config, changes: dict[str, Any]) -> Config | None:
    """The config with dotted keys replaced, or None if the result is not valid."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    try:
        updates = {
            name: type(getattr(config, name)).model_validate({**getattr(config, name).model_dump(), **values})
            for name, values in sections.items()
        }
    except ValidationError:
        return None
    result = config.model_copy(update=updates)
    return None if layout_errors(result) else result


def single_changes(plan: Plan) -> list[tuple[dict[str, Any], Plan]]:
    """Changes of one setting that make a plan fit. For each setting this is the fastest change.

    Changes that need another store or more GPUs come last.
    """
    best: dict[str, tuple[dict[str, Any], Plan]] = {}
    for change, other in _variants(plan):
        if other.shortfall > 0:
            continue
        setting = next(iter(change))
        rate = other.tokens_per_second_per_gpu
        if setting not in best or rate > best[setting][1].tokens_per_second_per_gpu:
            best[setting] = (change, other)
    costly = ("data.pack_length", "--gpus")
    rates = {name: -item[1].tokens_per_second_per_gpu for name, item in best.items()}
    return [best[name] for name in sorted(best, key=lambda name: (name in costly, rates[name]))]


def _variants(plan: Plan) -> Iterator[tuple[dict[str, Any], Plan]]:
    """Plans that differ in one setting and can run."""
    for change in _candidates(plan.config):
        config = changed(plan.config, change)
        if config is None or _errors(config, plan.gpus, plan.gpu):
            continue
        length = None if plan.segment_length is None else min(plan.segment_length, config.data.pack_length)
        yield change, replace(plan, config=config, segment_length=length)
    for gpus in (plan.gpus * times for times in (2, 4, 8, 16)):
        if not _errors(plan.config, gpus, plan.gpu):
            yield {"--gpus": gpus}, replace(plan, gpus=gpus)


def _candidates(config: Config) -> list[dict[str, Any]]:
    p, r = config.parallel, config.recompute
    found: list[dict[str, Any]] = []
    if r.mode == "none":
        found += [{"recompute.mode": "selective"}]
    if r.mode != "full":
        found += [{"recompute.mode": "selective", "recompute.modules": ["core_attn", "mlp"]}]
        # The config refuses modules with the mode full, because they would have no effect.
        default = {"recompute.modules": ["core_attn"]} if r.mode == "selective" else {}
        found += [{"recompute.mode": "full"} | default]
    for size in (2, 4, 8):
        found += [{"parallel.tensor": p.tensor * size, "parallel.sequence": True}]
        found += [{"parallel.pipeline": p.pipeline * size}, {"parallel.context": p.context * size}]
        found += [{"data.pack_length": config.data.pack_length // size}]
    if p.pipeline > 1:
        most = config.model.num_layers // p.pipeline
        found += [
            {"parallel.virtual_pipeline": size} for size in range(1, most + 1) if size != p.virtual_pipeline
        ]
    if p.tensor > 1 and not p.sequence:
        found += [{"parallel.sequence": True}]
    if config.precision.fp8:
        kept = {"precision.fp8_param_gather": False} if config.precision.fp8_param_gather else {}
        found += [{"precision.fp8": None} | kept]
    if config.copies_reference:
        found += [{"dpo.reference": "store"}]
    if config.loss.impl == "unfused":
        found += [{"loss.impl": "fused"}]
    return found + [{key: off} for key, _, off in switches_on(config)]


def verdict(plan: Plan, *, search: bool = True) -> str:
    """A text that says whether the plan fits, by how much it does not, and what to change.

    search: mention `plan search` if no single change fits.
    """
    fullest, device = plan.fullest, plan.gpu
    where = f"pipeline rank {fullest.pipeline_rank} takes {fullest.total / GIB:.1f} GiB"
    room = f"{device.name} has {device.memory / GIB:.1f} GiB"
    if plan.shortfall <= 0:
        return f"fits: {where}, {room}: {-plan.shortfall / GIB:.1f} GiB to spare"
    lines = [f"does not fit: {where}, {room}: {plan.shortfall / GIB:.1f} GiB too much"]
    fixes = single_changes(plan)
    for change, other in fixes[:4]:
        text = " ".join(f"{key}={_value(value)}" for key, value in change.items()).replace(
            "--gpus=", "--gpus "
        )
        lines.append(
            f"  {text} fits: {other.fullest.total / GIB:.1f} GiB, {other.time.seconds:.1f} s a step, "
            f"{other.tokens_per_second_per_gpu:,.0f} tokens/s/GPU"
        )
    if not fixes:
        more = "; `megatron-post plan search` looks for a layout that does" if search else ""
        lines.append(f"  no single change fits{more}")
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
