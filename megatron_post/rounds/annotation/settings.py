"""The section `annotate` of a round file."""

from pydantic import Field

from megatron_post.config.section import Count, Section


class Annotation(Section):
    """The comparisons that people make in each round."""

    pairs: Count | None = Field(
        None, description="largest number of pairs of a round. null: one for each prompt"
    )
    pages: Count = Field(1, description="pages that the pairs are divided among, such as one for each person")
    enough: Count | None = Field(
        None, description="answered pairs with which the round continues. null: all pairs"
    )
