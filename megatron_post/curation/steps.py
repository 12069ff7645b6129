"""All kinds of steps. A new step is added here, see `step`."""

from megatron_post.curation.lengths import Lengths

AnyStep = Lengths
