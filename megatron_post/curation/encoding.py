"""The step `encoding` repairs texts that were decoded wrongly, and drops rows that stay broken."""

import importlib.util
import json
from collections.abc import Sequence
from typing import Literal

import pyarrow as pa
from pydantic import Field

from megatron_post.curation.columns import DROPPED, REWRITTEN
from megatron_post.curation.row import Row
from megatron_post.curation.step import Batch, Pass, RowPass, Step, Values
from megatron_post.data.dialog import BadRow
from megatron_post.installation import install_command

_REPLACEMENT = "\ufffd"  # stands for bytes that a decoder could not read


class Encoding(Step):
    """Repairs texts such as "schÃ¶n" with the package ftfy. Rows that it cannot repair are dropped."""

    kind: Literal["encoding"] = Field(description="selects this step")

    def passes(self, *, seed: int) -> Sequence[Pass]:
        if importlib.util.find_spec("ftfy") is None:
            raise ValueError(f"{self.column}: encodings are repaired by ftfy: {install_command('curate')}")
        return [
            RowPass(
                name=self.column,
                version=1,
                settings={},
                fields={REWRITTEN: pa.string(), DROPPED: pa.string()},
                annotate=_annotate,
            )
        ]


def _annotate(batch: Batch) -> Values:
    pairs = [_repaired(row) for row in batch.rows]
    return {REWRITTEN: [texts for texts, _ in pairs], DROPPED: [reason for _, reason in pairs]}


def _repaired(row: Row) -> tuple[str | None, str | None]:
    """The new texts as `REWRITTEN` has them, or None if none is changed, and the reason for dropping."""
    import ftfy
    from ftfy.badness import is_bad

    # Only the encoding is repaired. ftfy's other repairs would change quotation marks and ligatures.
    texts = [text if text.isascii() else ftfy.fix_encoding(text) for text in row.texts]
    reason = None
    if any(_REPLACEMENT in text for text in texts):
        reason = "characters that were lost in decoding"
    elif any(not text.isascii() and is_bad(text) for text in texts):
        reason = "broken encoding"
    if texts == row.texts:
        return None, reason
    try:
        row.rewritten(texts)
    except BadRow:
        return None, "broken encoding"
    return json.dumps(texts), reason
