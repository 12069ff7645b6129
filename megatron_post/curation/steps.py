"""All kinds of steps. A new step is added here, see `step`."""

from typing import Annotated

from pydantic import Field

from megatron_post.curation.cleaning import Clean
from megatron_post.curation.difficulty import Difficulty
from megatron_post.curation.duplicates.contamination_step import Contamination
from megatron_post.curation.duplicates.exact import ExactDuplicates
from megatron_post.curation.duplicates.near_step import NearDuplicateRows
from megatron_post.curation.duplicates.semantic_step import SemanticDuplicates
from megatron_post.curation.encoding import Encoding
from megatron_post.curation.languages import Languages
from megatron_post.curation.lengths import Lengths
from megatron_post.curation.quality import Quality
from megatron_post.curation.repeats import Repeats
from megatron_post.curation.tokens import Tokens
from megatron_post.curation.topics import Topics

AnyStep = Annotated[
    Clean
    | Contamination
    | Difficulty
    | Encoding
    | ExactDuplicates
    | Languages
    | Lengths
    | NearDuplicateRows
    | Quality
    | Repeats
    | SemanticDuplicates
    | Tokens
    | Topics,
    Field(discriminator="kind"),
]
