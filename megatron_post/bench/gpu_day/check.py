"""Single checks, each a process: `python -m megatron_post.bench.gpu_day.check NAME ARGUMENTS...`.

A check prints one line of JSON: what was found, whether that is what was expected, and figures.
"""

import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_post.bench.checkpoint import checkpoints_in
from megatron_post.bench.gpu_day.answers import answer, demo_model
from megatron_post.bench.gpu_day.runs import (
    CPU,
    PORTABLE,
    Run,
    Step,
    apart,
    config_of,
    once,
    say_result,
    training,
)
from megatron_post.bench.gpu_day.speed import Found, bandwidth, kernel, proxy, step, switch
from megatron_post.data.batch import PackedBatch, segment_numbers
from megatron_post.display import make_console
from megatron_post.doctor.problems import find_problems
from megatron_post.doctor.report import diagnose
from megatron_post.models.attention import block_attention, flex_attention
from megatron_post.models.packing import portable_segments
from megatron_post.parallel.context import ContextSplit
from megatron_post.train.checkpoint import Position

_WIDE = ("precision.dtype=bf16", "model.num_attention_heads=16", "model.num_key_value_heads=8")


def doctor() -> Found:
    """What would break a run on this machine."""
    diagnose(make_console())
    problems = list(find_problems())
    return Found("; ".join(problems) or "no problems found", not problems)


def flex() -> Found:
    """FlexAttention (compiled on a GPU) beside the block attention, where 128 divides neither packs nor
    segments."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    worst = 0.0
    for lengths in ((130, 7, 200), (1000, 24, 1, 999)):
        whole = _dialogs(lengths)
        split = ContextSplit(whole.cu_seqlens, 1)
        packed = portable_segments(whole, split, rank=0, device=torch.device(device))
        torch.manual_seed(0)
        q, k, v, weights = (torch.randn(heads, sum(lengths), 64, device=device) for heads in (8, 2, 2, 8))
        results = []
        for attend in (flex_attention, block_attention):
            inputs = [x.clone().requires_grad_(device == "cuda") for x in (q, k, v)]
            output = attend(inputs[0], inputs[1], inputs[2], packed, scale=0.125)
            # torch has FlexAttention's gradients on a GPU alone
            gradients = torch.autograd.grad((output * weights).sum(), inputs) if device == "cuda" else ()
            results.append([output.detach(), *gradients])
        worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(*results, strict=True)))
    with_or_without = "with" if device == "cuda" else "without"
    return Found(f"at most {worst:.1e} apart, {with_or_without} gradients", worst <= 1e-4)


def stage(name: str, steps: str) -> Found:
    """A stage on this device beside the CPU, in fp32."""
    here, there = once(name, int(steps)), once(name, int(steps), environment=CPU | PORTABLE)
    return _compare(here, there, loss=1e-4)


def resume() -> Found:
    """A run that is killed behind step 5 and started again, beside one that is left alone."""
    with tempfile.TemporaryDirectory() as directory:
        whole = apart(Run(f"{directory}/whole", 8, every=2))
        apart(Run(f"{directory}/killed", 8, every=2, die_after=5))
        after = apart(Run(f"{directory}/killed", 8, every=2))
    found = _compare(after, whole[-len(after) :], loss=1e-4)
    return Found(f"resumed after step {8 - len(after)}: {found.found}", found.ok and 0 < len(after) < 8)


def save() -> Found:
    """An asynchronous checkpoint with a step beside it, and a synchronous one of the same state."""
    files = []
    with tempfile.TemporaryDirectory() as directory:
        config = config_of(Run(directory, 2))
        with training(config) as (trainer, loader, _):
            trainer.step(next(loader))
            for mode in (False, True):
                place = Path(directory, str(mode))
                trainer.checkpoints = checkpoints_in(config, trainer.topology, place, asynchronous=mode)
                trainer.save(Position(1, config.train.global_batch))
                if mode:
                    trainer.step(next(loader))
                trainer.checkpoints.wait()
                (file,) = place.glob("checkpoints/*/__0_0.distcp")
                files.append(file.read_bytes())
    same = files[0] == files[1]
    return Found(f"{len(files[0]):,} bytes, {'equal' if same else 'not equal'}", same)


def engine() -> Found:
    """Transformer Engine's layers beside the portable ones, in bf16."""
    settings = (*_WIDE, "model.num_layers=4", "model.hidden_size=1024", "model.ffn_hidden_size=2816")
    found, expected = once("sft", 5, settings), once("sft", 5, settings, PORTABLE)
    return _compare(found, expected, loss=1e-3, norm=2e-2)


def fp8() -> Found:
    """Each recipe for 20 steps of 8 layers of 1,024 beside bf16, or why this machine cannot."""
    settings = (*_WIDE, "model.num_layers=8", "model.hidden_size=1024", "model.ffn_hidden_size=2816")
    bf16 = once("sft", 20, settings)[-1][0]
    texts, good = [], True
    for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8"):
        try:
            last = once("sft", 20, (*settings, f"precision.fp8={recipe}"))[-1][0]
        except ValueError as error:
            refusals = [line.strip("- ") for line in str(error).splitlines() if "precision.fp8=" in line]
            texts.append(f"{recipe}: {refusals[-1] if refusals else f'failed, {error}'[-200:]}")
            # every GPU that this is for can do the other two
            good = good and bool(refusals) and recipe in ("blockwise", "mxfp8")
        else:
            texts.append(f"{recipe}: last loss {last:.4f}, {abs(last / bf16 - 1):.2%} off {bf16:.4f}")
            good = good and abs(last / bf16 - 1) <= 0.02
    return Found("; ".join(texts), good)


def exchange() -> Found:
    """Each kind of layers resumes the other's checkpoint, beside a run of the first kind alone."""
    texts, good = [], True
    settings = ("precision.dtype=bf16",)
    for first, second, name in (({}, PORTABLE, "to portable"), (PORTABLE, {}, "to Transformer Engine")):
        with tempfile.TemporaryDirectory() as directory:
            whole = apart(Run(f"{directory}/whole", 8, settings=settings), first)
            apart(Run(f"{directory}/moved", 4, settings=settings, every=4), first)
            moved = apart(Run(f"{directory}/moved", 8, settings=settings), second)
        found = _compare(moved, whole[4:], loss=1e-3)
        texts.append(f"{name}: {found.found}")
        good = good and bool(found.ok)
    return Found("; ".join(texts), good)


def syncs() -> Found:
    """Where the host waits for the GPU in a step's forward and backward pass."""
    with tempfile.TemporaryDirectory() as directory:
        config = config_of(Run(directory, 2, settings=("precision.dtype=bf16",)))
        with training(config) as (trainer, loader, _), warnings.catch_warnings(record=True) as caught:
            trainer.step(next(loader))
            packs = next(loader)
            torch.cuda.synchronize()
            caught.clear()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            trainer.stepper(packs)
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in waits]
    found = ", ".join(f"{places.count(place)} at {place}" for place in dict.fromkeys(places)) or "none"
    return Found(found, not any("attention" in w.filename for w in waits), {"waits in a step": len(waits)})


def answers() -> Found:
    """Greedy answers of the demo's model, here and on the CPU."""
    with tempfile.TemporaryDirectory() as directory:
        found = demo_model(Path(directory))
        if found is None:
            return Found("not run: there is neither runs/demo/hf nor a demo.tar that was carried")
        here, there = answer(found), answer(found, environment=CPU)
    same = sum(a == b for a, b in zip(here, there, strict=True))
    return Found(f"{same} of {len(here)} answers are the CPU's", figures={"same answers": same})


def _dialogs(lengths: Sequence[int]) -> PackedBatch:
    """A pack of segments that see nothing but themselves; its tokens do not matter."""
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    segments = segment_numbers(cu_seqlens)
    nothing = torch.zeros_like(segments)
    return PackedBatch(
        tokens=nothing,
        labels=nothing,
        trained=nothing.bool(),
        positions=torch.arange(len(segments)) - cu_seqlens[segments],
        segments=segments,
        cu_seqlens=cu_seqlens,
        lengths=cu_seqlens.diff(),
    )


def _compare(
    found: Sequence[Step], expected: Sequence[Step], *, loss: float, norm: float = math.inf
) -> Found:
    """The largest differences; gradient norms relative to the expected one."""
    pairs = list(zip(found, expected, strict=True))
    off = max((abs(a[0] - b[0]) for a, b in pairs), default=math.inf)
    norm_off = max((abs(a[1] / b[1] - 1) for a, b in pairs), default=math.inf)
    text = f"{len(pairs)} losses at most {off:.1e} apart, gradient norms {norm_off:.1e}"
    return Found(text, off <= loss and norm_off <= norm)


_CHECKS: tuple[Callable[..., Found], ...] = (
    doctor, flex, stage, resume, save, answers, engine, fp8, exchange, syncs,
    kernel, bandwidth, step, proxy, switch,
)  # fmt: skip


def main() -> None:
    """Run the check that the command line names."""
    name, *arguments = sys.argv[1:]
    (function,) = [function for function in _CHECKS if function.__name__ == name]
    say_result(asdict(function(*arguments)))


if __name__ == "__main__":
    main()
