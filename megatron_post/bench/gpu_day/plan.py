"""What `gpu_day` runs: pieces of checks, each a command, and switches to measure with and without."""

from dataclasses import dataclass

OUTPUT = "runs/gpu_day"
# a line of a check's output that holds its result in JSON
RESULT = "RESULT "


@dataclass(frozen=True)
class Check:
    """One command of this Python. It passes with status 0, or says more by a line of results (check.py).

    least: seconds without which it is not begun; most: after which it has failed. without_gpu: why a machine
    without a GPU skips it, empty where it runs there too. engine: it needs Transformer Engine. beside: it is
    begun before the others of its piece, and awaited after them.
    """

    name: str
    command: tuple[str, ...]
    expected: str
    least: float = 20.0
    most: float = 240.0
    without_gpu: str = ""
    engine: bool = False
    beside: bool = False


@dataclass(frozen=True)
class Switch:
    """A setting that is measured with and without: `config` with `base` alone, and with `setting` as well.

    figure: of the record that `megatron-post bench step` writes.
    """

    setting: str
    base: tuple[str, ...] = ()
    config: str = "configs/llama3_8b/sft.yaml"
    figure: str = "step"


# A performance switch that one GPU can show has a line here. Others need ranks, see docs/gpu.md.
SWITCHES = (
    Switch("optimizer.gradient_accumulation_fusion=true"),
    # On one GPU nothing is gathered.
    Switch(
        "precision.fp8_param_gather=true", base=("precision.fp8=tensorwise",), figure="memory, fullest rank"
    ),
)

_NO_TIMES = "a CPU's times say nothing about a GPU"
_NO_ENGINE = "Transformer Engine runs on a GPU alone; tests/transformer_engine has its Python code on a CPU"
# 8B's layers on one GPU, as many as fit beside the optimizer: 2.4 billion parameters at 18 bytes are 42 GB
SHARD_8B = (
    "parallel.tensor=1",
    "parallel.sequence=false",
    "optimizer.overlap=false",
    "model.init_from=null",
    "model.num_layers=6",
    "train.global_batch=4",
)


def _ours(*arguments: str) -> tuple[str, ...]:
    return ("-m", "megatron_post.bench.gpu_day.check", *arguments)


def _kernel(name: str, *arguments: str) -> tuple[str, ...]:
    return _ours("kernel", name, "--seconds", "15", *arguments)


PIECES: dict[str, tuple[Check, ...]] = {
    "correct": (
        Check(
            "build Transformer Engine",
            ("-m", "megatron_post.bench.gpu_day", "--build-engine"),
            "its extension for this torch",
            most=1200,  # what is compiled stays, so the end of a piece is no failure
            without_gpu=_NO_ENGINE,
            beside=True,
        ),
        Check("doctor", _ours("doctor"), "no problems found"),
        Check("FlexAttention", _ours("flex"), "within 1e-4 of the block attention, gradients too"),
        Check("SFT", _ours("stage", "sft", "20"), "the CPU's losses within 1e-4"),
        Check("DPO", _ours("stage", "dpo", "5"), "the CPU's losses within 1e-4"),
        Check("reward model", _ours("stage", "reward", "5"), "the CPU's losses within 1e-4"),
        Check("kill and resume", _ours("resume"), "the losses of a run that was left alone, within 1e-4"),
        Check("asynchronous save", _ours("save"), "the bytes of a synchronous one"),
        Check(
            "generate",
            _ours("answers"),
            "the CPU's 300 answers; bf16 here, so some may differ",
            without_gpu="it compares a GPU's answers with a CPU's",
        ),
        Check(
            "kernels, compiled",
            ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels"),
            "all pass",
            without_gpu="`make test` runs them in Triton's interpreter",
        ),
    ),
    "engine": (
        Check(
            "Transformer Engine",
            _ours("engine"),
            "the portable layers' losses within 1e-3, gradient norms within 2e-2, in bf16",
            without_gpu=_NO_ENGINE,
            engine=True,
        ),
        Check(
            "FP8 recipes",
            _ours("fp8"),
            "20 steps end within 2% of bf16; blockwise and mxfp8 may be refused, by the GPU's kind or CUDA",
            without_gpu=_NO_ENGINE,
            engine=True,
        ),
        Check(
            "fp32 with Transformer Engine",
            _ours("stage", "sft", "3"),
            "portable layers: the CPU's losses within 1e-4",
            without_gpu=_NO_ENGINE,
            engine=True,
        ),
        Check(
            "checkpoints between layers",
            _ours("exchange"),
            "either resumes the other's, losses within 1e-3",
            without_gpu=_NO_ENGINE,
            engine=True,
        ),
        Check(
            "waits for the GPU",
            _ours("syncs"),
            "none in attention",
            without_gpu=_NO_ENGINE,
            engine=True,
        ),
    ),
    "speed": (
        Check(
            "linear_logprob, h 4096",
            _kernel("linear_logprob", "--tokens", "8192", "--hidden", "4096"),
            "v 128,256: 44 to 50 ms in 4 chunks, 36 to 38 ms in one",
        ),
        Check(
            "linear_logprob, h 16384",
            _kernel("linear_logprob", "--tokens", "8192", "--hidden", "16384"),
            "near cuBLAS's roof, and less memory than torch",
        ),
        Check(
            "logprob",
            _kernel("logprob", "--tokens", "8192"),
            "near 0.55 ms (v 16,032) and 1.6 ms (with entropy)",
        ),
        Check("dpo_loss", _kernel("dpo_loss"), "below torch's"),
        Check("ranking_loss", _kernel("ranking_loss"), "below torch's"),
        Check(
            "memory bandwidth",
            _ours("bandwidth"),
            "share of the DRAM's peak, by ncu",
            without_gpu=_NO_TIMES,
        ),
        Check(
            "8B-shaped step, bf16",
            _ours("step", "configs/llama3_8b/sft.yaml", *SHARD_8B),
            "memory within 5% of the plan",
            engine=True,
            without_gpu=_NO_TIMES,
        ),
        Check(
            "8B-shaped step, FP8",
            _ours("step", "configs/llama3_8b/sft.yaml", *SHARD_8B, "precision.fp8=tensorwise"),
            "memory within 5% of the plan",
            engine=True,
            without_gpu=_NO_TIMES,
        ),
        Check(
            "one 405B rank, bf16",
            _ours("proxy", "precision.fp8=null"),
            "the planner's seconds beside the measured ones",
            engine=True,
            without_gpu=_NO_TIMES,
        ),
        Check(
            "one 405B rank, FP8",
            _ours("proxy"),
            "the planner's seconds beside the measured ones",
            engine=True,
            without_gpu=_NO_TIMES,
        ),
        *(
            Check(
                f"switch {switch.setting}",
                _ours("switch", str(number)),
                "with and without",
                engine=True,
                without_gpu=_NO_TIMES,
            )
            for number, switch in enumerate(SWITCHES)
        ),
        Check("steps of the tiny model", _ours("step", "configs/tiny/demo.yaml"), "the command runs"),
    ),
}
