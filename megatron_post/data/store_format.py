"""The format of a packed store, a zarr v3 directory with groups for training and evaluation.

    STORE/checksums.json            checksums of metadata and columns, see `store_checksums`
    STORE/zarr.json                 attributes with the format, its version and `StoreSettings`
    STORE/{train,eval}/zarr.json    attributes with the group's sources and their counts
      tokens, roles                 int32, uint8 [packs, pack_length]
      checksums                     uint32 [packs, 2], CRC-32 of a pack's tokens and of its roles
      segment_offsets               int64 [packs + 1], pack i has the segments offsets[i]:offsets[i + 1]
      segment/<column>              [segments], see `COLUMNS`

The columns (checksums, segment_offsets and segment/*) are not compressed and are one chunk file each, so that
a reader maps them into memory and uses parts of them. Earlier versions compressed them. They are small, about
1% of the tokens, and are written again if packs are added.

Per-token arrays are not compressed and not sharded. A pack is then a contiguous range of bytes in a chunk
file, and one `pread` reads it. zarr-python needs 0.8-1.5 ms per chunk (3.1.6, one 2.5 GHz core) and two
chunks per pack, which is 30 times slower. It can still read and write the same arrays.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_post.config.data import Reasoning

FORMAT = "megatron-post-packs"
VERSION = 2
GroupName = Literal["train", "eval"]
GROUPS: tuple[GroupName, ...] = ("train", "eval")

# Per-segment columns. A segment ends with padded - length tokens of padding. The padding at a pack's end is
# not a row here.
COLUMNS: Mapping[str, str] = {
    "padded": "<i4",  # tokens with padding
    "length": "<i4",  # real tokens
    "source": "<i4",  # index in the group's sources
    "sample": "<u8",  # row number in the source
    "unit": "<i8",  # the same number for all segments of a unit, which follow each other in one pack
    "rank": "<i4",  # rank of a preference's response, 0 for the best, -1 for other segments
    "turns": "<i4",  # user turns
    "response": "<i4",  # tokens of the final response
}
PER_TOKEN: Mapping[str, str] = {"tokens": "<i4", "roles": "|u1"}
CHECKSUMS = "checksums"
OFFSETS = "segment_offsets"
# `megatron-post reference` adds this array later. It holds the log-probability of each token's successor, and
# an attribute with a key of the model and the data.
REFERENCE = "reference_logps"
DTYPES: Mapping[str, str] = {**PER_TOKEN, REFERENCE: "<f4"}


# With "dialogs" a unit is one segment, and with "steps" it is one solution. With "whole_documents" it is one
# document, and with "cut_documents" the part of a document that is in one pack. The others hold preferences.
# With "separate" a unit has a segment for each response, which repeats the prompt. With "isolated" and
# "concatenated" the prompt is the first segment, and each response is one more. With "isolated_pairs" the
# prompt's last token is not in the prompt's segment but begins the segment of each response, because its
# output predicts the response's first token.
StoreLayout = Literal[
    "dialogs",
    "steps",
    "whole_documents",
    "cut_documents",
    "separate",
    "isolated",
    "concatenated",
    "isolated_pairs",
]
DOCUMENTS: tuple[StoreLayout, ...] = ("whole_documents", "cut_documents")
ONE_SEGMENT: tuple[StoreLayout, ...] = ("dialogs", "steps", *DOCUMENTS)  # a unit is one segment
SEPARATE: tuple[StoreLayout, ...] = (*ONE_SEGMENT, "separate")  # a segment sees only itself


@dataclass(frozen=True)
class StoreSettings:
    """The settings with which packs were made. All packs of a store have the same settings."""

    pack_length: int
    segment_multiple: int
    tokenizer_fingerprint: str
    pad_id: int
    seed: int
    layout: StoreLayout = "dialogs"
    # the path when the store was packed, which is only a default of `data show` and never compared
    tokenizer_path: str = field(default="", compare=False)
    reasoning: Reasoning = "refuse"
    content_tokens: tuple[str, ...] = ()  # the tokenizer's added tokens that texts may spell


@dataclass(frozen=True)
class SourceCounts:
    """The counts of one source in a group. `rows` are the used rows without repeats."""

    name: str
    rows: int
    bad: int = 0
    dropped: int = 0
    truncated: int = 0
    filtered: int = 0
    # how often texts spell each special token, which is encoded as text
    spelled: dict[str, int] = field(default_factory=dict)
    # the digest of the template that was applied to the rows, or "" without one
    template: str = ""
