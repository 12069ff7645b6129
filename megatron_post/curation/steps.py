"""All kinds of steps. A new step is added here, see `step`."""

from typing import Annotated

from pydantic import Field

from megatron_post.curation.cleaning import Clean
from megatron_post.curation.encoding import Encoding
from megatron_post.curation.languages import Languages
from megatron_post.curation.lengths import Lengths
from megatron_post.curation.repeats import Repeats

AnyStep = Annotated[Clean | Encoding | Languages | Lengths | Repeats, Field(discriminator="kind")]
