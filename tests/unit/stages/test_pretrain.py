"""Which labels continued pre-training trains, and which tokens a token sees."""

import numpy as np

from megatron_post.data.pack import pack_of_segments
from megatron_post.data.template import Rendered, TokenRole
from megatron_post.stages.pretrain import Pretrain

H, B, T, P = TokenRole.HEADER, TokenRole.BODY, TokenRole.TERMINATOR, TokenRole.PROMPT


def _piece(tokens: list[int], roles: list[int]) -> Rendered:
    return Rendered(np.array(tokens, dtype=np.int32), np.array(roles, dtype=np.uint8))


# a whole document, and the rest of a cut one, whose first token is only context
PACK = pack_of_segments([_piece([1, 11, 12, 2], [H, B, B, T]), _piece([13, 14, 2], [P, B, T])], pack_length=8)


def test_documents_that_see_themselves() -> None:
    batch = Pretrain("document").collate(PACK)
    assert batch.trained.tolist() == [True, True, True, False, True, True, False, False]
    assert batch.labels.tolist() == [11, 12, 2, 0, 14, 2, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 8]


def test_documents_that_see_those_before_them() -> None:
    """The same labels are trained. The first token of a document is not, although it has one before it."""
    batch = Pretrain("pack").collate(PACK)
    assert batch.trained.tolist() == Pretrain("document").collate(PACK).trained.tolist()
    assert batch.positions.tolist() == list(range(8))
    assert batch.cu_seqlens.tolist() == [0, 8] and batch.lengths.tolist() == [7]
