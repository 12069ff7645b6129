"""Token counts of packs, computed by hand."""

import dataclasses

import numpy as np

from megatron_post.bench.accounting import Counts, count_packs
from megatron_post.config.losses import Reward as RewardConfig
from megatron_post.data.pack import Pack
from megatron_post.data.template import TokenRole
from megatron_post.plan.flops import Load
from megatron_post.stages.comparisons import SegmentSums
from megatron_post.stages.reward import Reward
from megatron_post.stages.sft import SFT
from tests.unit.plan.measured import packs_of


def _padded(pack: Pack, lengths: list[int]) -> Pack:
    """The same pack, in which only the first `lengths` tokens of its segments are real."""
    roles = pack.roles.copy()
    for start, end, length in zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:], lengths, strict=True):
        roles[start + length : end] = TokenRole.PADDING
    return dataclasses.replace(pack, roles=roles, lengths=np.array(lengths, np.int32))


def test_dialogs() -> None:
    """Segments of 12 and 8 tokens hold 10 and 5 real tokens. Another 12 tokens are the pack's padding.

    All real tokens but the first of each segment are labels: 9 + 4. The sum of squares is 100 + 25 for real
    tokens, and 144 + 64 + 144 for all tokens.
    """
    (pack,) = packs_of([12, 8, 12], [-1, -1, -1], count=1)
    found = count_packs([_padded(pack, [10, 5, 0])], SFT(["body"]))
    assert found == Counts(32, 15, 13, 2, Load(15, 125, 13), Load(32, 352, 13))
    twice = count_packs([_padded(pack, [10, 5, 0])] * 2, SFT(["body"]))
    assert twice == found + found and twice.useful == Load(30, 250, 26)


def test_responses_see_their_prompt() -> None:
    """A prompt of 8 tokens (6 real) has two responses of 4 that attend to its real tokens alone.

    The load is 6^2 + 2 (4^2 + 2 x 4 x 6) = 164 for real tokens, and 8^2 + 128 = 192 for all tokens. There are
    two scores of one preference.
    """
    (pack,) = packs_of([8, 4, 4], [-1, 0, 1], count=1)
    stage = Reward(RewardConfig(layout="isolated"), SegmentSums())
    found = count_packs([_padded(pack, [6, 4, 4])], stage, scalar_head=True)
    assert found == Counts(16, 14, 2, 1, Load(14, 164, 3), Load(16, 192, 3))
