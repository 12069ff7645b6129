"""The format of a packed store: a zarr v3 directory with a group for training and one for evaluation.

    STORE/checksums.json            of metadata and columns, see `store_checksums`
    STORE/zarr.json                 attributes: format, version, what the packs were made for
    STORE/{train,eval}/zarr.json    attributes: sources, by index, with their counts
      tokens, roles                 int32, uint8 [packs, pack_length]
      checksums                     uint32 [packs, 2]: CRC-32 of a pack's tokens and of its roles
      segment_offsets               int64 [packs + 1]: pack i has the segments offsets[i]:offsets[i + 1]
      segment/<column>              [segments], see `COLUMNS`

Per-token arrays are uncompressed and unsharded on purpose: a pack is then one contiguous run of bytes in a
chunk file and is read with one `pread`. zarr-python itself needs 0.8-1.5 ms a chunk (3.1.6, one 2.5 GHz
core), twice a pack, which is 30 times slower; it still reads and writes the very same arrays.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_post.config.data import Reasoning

FORMAT = "megatron-post-packs"
VERSION = 2
GroupName = Literal["train", "eval"]
GROUPS: tuple[GroupName, ...] = ("train", "eval")

# Per-segment columns. padded - length tokens at a segment's end are padding; the pack's tail has no row here.
COLUMNS: Mapping[str, str] = {
    "padded": "<i4",  # tokens with padding
    "length": "<i4",  # real tokens
    "source": "<i4",  # index in the group's sources
    "sample": "<u8",  # row number in the source
    "unit": "<i8",  # segments of one unit share it and stand in one pack, side by side
    "rank": "<i4",  # of a preference's response: 0 is the best; -1 elsewhere
    "turns": "<i4",  # user turns
    "response": "<i4",  # tokens of the final response
}
PER_TOKEN: Mapping[str, str] = {"tokens": "<i4", "roles": "|u1"}
CHECKSUMS = "checksums"
OFFSETS = "segment_offsets"
# Added later by `megatron-post reference`: log-probability of each token's successor, keyed by what made it.
REFERENCE = "reference_logps"
DTYPES: Mapping[str, str] = {**PER_TOKEN, REFERENCE: "<f4"}


# dialogs: a unit is one segment. The others hold preferences. separate: a segment a response, prompt and all.
# isolated and concatenated: a unit is its prompt's segment, then one of each response.
StoreLayout = Literal["dialogs", "separate", "isolated", "concatenated"]


@dataclass(frozen=True)
class StoreSettings:
    """What the packs of a store were made for. Packs of other settings cannot stand in the same store."""

    pack_length: int
    segment_multiple: int
    tokenizer_fingerprint: str
    pad_id: int
    seed: int
    layout: StoreLayout = "dialogs"
    tokenizer_path: str = field(
        default="", compare=False
    )  # where it was then: for people, not for a decision
    reasoning: Reasoning = "refuse"
    content_tokens: tuple[str, ...] = ()  # the tokenizer's added tokens that texts may spell


@dataclass(frozen=True)
class SourceCounts:
    """One source of a group: rows used (repeats apart) and what happened to the others."""

    name: str
    rows: int
    bad: int = 0
    dropped: int = 0
    truncated: int = 0
    filtered: int = 0
    spelled: dict[str, int] = field(
        default_factory=dict
    )  # special tokens in texts, which are encoded as text
