"""Adapters' dropout: its share, its scale, and how it depends on token, column, adapter and seed."""

import torch

from megatron_post.models.adapter_dropout import drop

SHARE = 0.25


def _kept(*, seed: int = 1, adapter: str = "0.mlp.linear_fc1.up_proj", first_token: int = 0) -> torch.Tensor:
    tokens = torch.arange(first_token, first_token + 400, dtype=torch.int32)
    seeds = torch.tensor([seed], dtype=torch.int32)
    x = torch.ones(400, 1, 500)
    return drop(x, seeds, tokens, adapter=adapter, first_column=0, share=SHARE)[:, 0]


def test_share_and_scale() -> None:
    """The share of 200,000 numbers has a standard deviation of 0.001, and that of a row of 500 has 0.02."""
    values = _kept()
    torch.testing.assert_close(values.unique(), torch.tensor([0.0, 1 / (1 - SHARE)]))
    zeros = (values == 0).float()
    assert abs(float(zeros.mean()) - SHARE) < 0.005
    assert (
        float((zeros.mean(0) - SHARE).abs().max()) < 0.1 and float((zeros.mean(1) - SHARE).abs().max()) < 0.1
    )


def test_neighbours_are_independent() -> None:
    """Two independent masks both drop a number with probability SHARE^2."""
    zeros = (_kept() == 0).float()
    others = {
        "next token": (zeros[1:], zeros[:-1]),
        "next column": (zeros[:, 1:], zeros[:, :-1]),
        "other seed": (zeros, (_kept(seed=2) == 0).float()),
        "other adapter": (zeros, (_kept(adapter="1.mlp.linear_fc1.up_proj") == 0).float()),
    }
    for name, (a, b) in others.items():
        assert abs(float((a * b).mean()) - SHARE**2) < 0.005, name


def test_a_rank_drops_its_part() -> None:
    whole, tokens = _kept(), torch.arange(400, dtype=torch.int32)
    seed, part = torch.tensor([1], dtype=torch.int32), torch.ones(100, 1, 200)
    found = drop(
        part, seed, tokens[200:300], adapter="0.mlp.linear_fc1.up_proj", first_column=300, share=SHARE
    )
    assert torch.equal(found[:, 0], whole[200:300, 300:])
