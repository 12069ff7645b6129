"""GPUs and their networks: published rates with their sources, and the shares of them that are reached.

`matrix_efficiency` is the one number that was fitted, in tests/unit/plan/published_steps.py. It is the speed
of multiplications in a training step relative to the best multiplication that anyone measured. The other
shares are the same for all GPUs, with their sources. Only H100 steps were available for the fit. The figures
of H200 and B200 are extrapolated.
"""

from dataclasses import dataclass

from megatron_post.storage.reading import did_you_mean

GIB = 2**30
# Fitted to two of the six published H100 steps. docs/planner.md has the fit and the steps that were held out.
MATRIX_EFFICIENCY = 0.807


@dataclass(frozen=True)
class GPU:
    """Rates of a GPU and its network.

    memory: bytes as `nvidia-smi` shows them. Rates are in FLOP/s and bytes/s, and of links in one direction.
    bf16, fp8: dense peaks of the data sheet. bf16_measured, fp8_measured: the fastest measured
    multiplication.
    """

    name: str
    memory: int
    bf16: float
    fp8: float
    bf16_measured: float
    fp8_measured: float
    memory_bandwidth: float
    nvlink: float
    network: float
    capability: tuple[int, int]
    transposed_fp8: bool  # FP8 multiplications need a transposed copy of the weights
    source: str
    per_node: int = 8
    matrix_efficiency: float = MATRIX_EFFICIENCY
    # Shares of the bf16 peak. Forward is FlashAttention-3 at 8,192 tokens, 614 TFLOP/s on H100 in
    # pytorch/benchmark pull request 2391. Backward is an assumption.
    attention_forward: float = 0.62
    attention_backward: float = 0.50
    # These are assumptions.
    bandwidth_efficiency: float = 0.85
    link_efficiency: float = 0.80
    # Casts to FP8 reach this share of the memory bandwidth that other operations reach, since they also find
    # the largest value and write a transposed copy. Chosen to one digit by the FP8 step of 8B.
    cast_efficiency: float = 0.5
    # Growth of a step's time with each doubling of the nodes. A step waits for the slowest GPU, and there are
    # more of them. It is the difference of the two published bf16 steps of 405B.
    scale_cost: float = 0.003
    latency: float = 15e-6  # least seconds of a collective
    reserve: int = 4 * GIB  # CUDA context, NCCL's and cuBLAS's buffers, fragmentation


_MEASURED = "multiplications: stas00/ml-engineering, maximum achievable matmul FLOPS"
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU(
            "h100-80gb",
            memory=81559 * 2**20,
            bf16=989.4e12,
            fp8=1978.9e12,
            bf16_measured=794.5e12,
            fp8_measured=1402.6e12,
            memory_bandwidth=3.35e12,
            nvlink=450e9,
            network=50e9,
            capability=(9, 0),
            transposed_fp8=True,
            source=f"NVIDIA H100 SXM data sheet, one 400 Gb/s card a GPU (DGX H100); {_MEASURED}",
        ),
        GPU(
            "h200-141gb",
            memory=143771 * 2**20,
            bf16=989.4e12,
            fp8=1978.9e12,
            bf16_measured=794.5e12,
            fp8_measured=1402.6e12,
            memory_bandwidth=4.8e12,
            nvlink=450e9,
            network=50e9,
            capability=(9, 0),
            transposed_fp8=True,
            source="NVIDIA H200 SXM data sheet; network of DGX H200; multiplications as the H100's",
        ),
        GPU(
            "b200-180gb",
            memory=180 * 10**9,
            bf16=2250e12,
            fp8=4500e12,
            bf16_measured=1745e12,
            fp8_measured=1745e12 * 1402.6 / 794.5,  # assumes the same gain as on the H100
            memory_bandwidth=8.0e12,
            nvlink=900e9,
            network=50e9,
            capability=(10, 0),
            transposed_fp8=False,
            source=f"NVIDIA DGX B200 data sheet (8 GPUs: 1,440 GB, 64 TB/s); {_MEASURED} (bf16)",
        ),
    )
}


def gpu(name: str) -> GPU:
    """The GPU with this name. Raises `ValueError` if it is not in the table."""
    if name not in GPUS:
        meant = did_you_mean(name, list(GPUS))
        raise ValueError(
            f"GPU {name!r} is not in the planner's table{meant}: choose one of {', '.join(GPUS)}"
        )
    return GPUS[name]


def gpu_of_device(device: str) -> GPU | None:
    """The GPU with CUDA's name of a device ("NVIDIA H100 80GB HBM3"), or None if it is not in the table.

    Cards for PCIe slots are slower, and GH200 and GB200 are other GPUs, so they are not matched.
    """
    words = device.upper().split()
    if "PCIE" in words or "NVL" in words:
        return None
    return next((gpu for gpu in GPUS.values() if gpu.name.split("-")[0].upper() in words), None)
