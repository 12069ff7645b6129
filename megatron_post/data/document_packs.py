"""Distributes documents over packs, cut at the ends of packs or whole."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_post.data.packing import pack_units
from megatron_post.data.permutation import permutation
from megatron_post.data.store_format import GroupName, StoreSettings
from megatron_post.data.template import TokenRole
from megatron_post.data.units import Units, round_up


@dataclass(frozen=True)
class Pieces:
    """Parts of documents in the order of packs. A document that is not cut is one piece.

    A piece that continues a document begins with the last token of the piece before it. This token is only
    context, so that every token after a document's first one is trained exactly once.
    """

    documents: np.ndarray  # int64 [n], the document of each piece
    first: np.ndarray  # int64 [n], its first token in the document
    last: np.ndarray  # int64 [n], the token after its last one
    pack_ends: np.ndarray  # int64 [packs + 1], pack i has the pieces pack_ends[i]:pack_ends[i + 1]

    @staticmethod
    def of(pieces: list[tuple[int, int, int]], pack_ends: list[int]) -> "Pieces":
        documents, first, last = np.array(pieces, dtype=np.int64).reshape(-1, 3).T
        return Pieces(documents, first, last, np.array(pack_ends, dtype=np.int64))

    def with_packs(self, order: np.ndarray) -> "Pieces":
        """The same packs in another order. order: int64 [packs]."""
        counts = np.diff(self.pack_ends)[order]
        ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        index = np.repeat(self.pack_ends[:-1][order] - ends[:-1], counts) + np.arange(ends[-1])
        return Pieces(self.documents[index], self.first[index], self.last[index], ends)


@dataclass(frozen=True)
class DocumentAssembly:
    """Packs of documents, with the interface of `Assembly`.

    used: int64 [n], the units that the documents of `pieces` are, with repeats.
    """

    units: Units
    settings: StoreSettings
    used: np.ndarray
    pieces: Pieces

    @property
    def segment_ends(self) -> np.ndarray:
        return self.pieces.pack_ends

    def __len__(self) -> int:
        return len(self.segment_ends) - 1

    def columns(self) -> dict[str, np.ndarray]:
        """The store's `COLUMNS`, each [segments] in pack order. The first token of a piece is not trained."""
        lengths = self.pieces.last - self.pieces.first
        unit = self.used[self.pieces.documents]
        return {
            "padded": round_up(lengths, self.settings.segment_multiple),
            "length": lengths,
            "source": self.units.sources[unit],
            "sample": self.units.samples[unit],
            "unit": np.arange(len(unit)),
            "rank": np.full(len(unit), -1),
            "turns": np.zeros(len(unit), dtype=np.int64),
            "response": lengths - 1,
        }

    def packs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens and roles of each pack, [pack_length] each."""
        units, settings, pieces = self.units, self.settings, self.pieces
        segments = self.used[pieces.documents]  # a document is a unit of one segment
        for begin, end in pairwise(self.segment_ends.tolist()):
            tokens = np.full(settings.pack_length, settings.pad_id, dtype=np.int32)
            roles = np.full(settings.pack_length, TokenRole.PADDING, dtype=np.uint8)
            position = 0
            for piece in range(begin, end):
                first, last = int(pieces.first[piece]), int(pieces.last[piece])
                length = last - first
                piece_tokens, piece_roles = units.read(int(segments[piece]), first, last)
                tokens[position : position + length] = piece_tokens
                roles[position : position + length] = piece_roles
                if first > 0:
                    roles[position] = TokenRole.PROMPT
                position += round_up(length, settings.segment_multiple)
            yield tokens, roles


def assemble_documents(
    units: Units, used: np.ndarray, group: GroupName, settings: StoreSettings
) -> DocumentAssembly:
    """Pack the documents `used` (int64 [n], repeats allowed) and shuffle the packs. They are shuffled."""
    lengths = units.lengths(multiple=1)[used]
    place = cut_documents if settings.layout == "cut_documents" else whole_documents
    pieces = place(lengths, capacity=settings.pack_length, multiple=settings.segment_multiple)
    order = permutation(len(pieces.pack_ends) - 1, settings.seed, group, "packs")
    return DocumentAssembly(units, settings, used, pieces.with_packs(order))


def cut_documents(lengths: np.ndarray, *, capacity: int, multiple: int) -> Pieces:
    """Fill pack after pack with the documents in their order. Only the last pack is not full.

    With `multiple=1` and `capacity=4`, documents of 3 and 4 tokens give [a0 a1 a2 _] and [b0 b1 b2 b3],
    because a piece of one token would train nothing. Documents of 6 and 3 tokens give [a0 a1 a2 a3],
    [a3 a4 a5 _] and [b0 b1 b2 _].

    lengths: int [n], each at least 2. multiple: a piece is padded to it, and it divides `capacity`. Raises
    `ValueError` for packs of less than 2 tokens.
    """
    if capacity < 2:
        raise ValueError(f"data.pack_length={capacity} has no room for a token and its successor; raise it")
    pieces: list[tuple[int, int, int]] = []
    ends, room = [0], capacity
    for document, length in enumerate(lengths.tolist()):
        first = 0
        while first < length - 1:
            if room < 2:
                ends.append(len(pieces))
                room = capacity
            last = min(first + room, length)
            pieces.append((document, first, last))
            room -= round_up(last - first, multiple)
            first = last if last == length else last - 1
    if len(pieces) > ends[-1]:
        ends.append(len(pieces))
    return Pieces.of(pieces, ends)


def whole_documents(lengths: np.ndarray, *, capacity: int, multiple: int) -> Pieces:
    """Pack whole documents by best fit. Raises `ValueError` for a document that is longer than a pack."""
    packs = pack_units(round_up(lengths, multiple), capacity=capacity)
    pieces = [(document, 0, int(lengths[document])) for pack in packs for document in pack.tolist()]
    return Pieces.of(pieces, np.cumsum([0, *map(len, packs)]).tolist())
