"""The reasons for which megatron-core's savings of memory are left out still hold (docs/performance.md)."""

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.transformer import TransformerConfig


def test_the_hybrid_optimizer_moves_no_parameter_of_a_cpu() -> None:
    """`offload_fraction` counts parameters on a GPU, so a CPU cannot show that offloading is exact."""
    optimizer = HybridDeviceOptimizer.__new__(HybridDeviceOptimizer)
    weight = torch.nn.Parameter(torch.ones(4))
    torch.optim.Optimizer.__init__(optimizer, [weight], {})
    optimizer.param_update_in_fp32 = True
    *_, copies, _, _ = optimizer._get_sub_optimizer_param_groups(1.0)
    assert not copies


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32},
            "no support for Pipeline parallelism",
        ),
        ({"recompute_granularity": "selective"}, "does not work when activation recomputation"),
    ],
)
def test_activations_in_host_memory_exclude_pipelines_and_recomputation(settings: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TransformerConfig(
            num_layers=4,
            hidden_size=8,
            num_attention_heads=2,
            cpu_offloading=True,
            cpu_offloading_num_layers=1,
            **settings,
        )
