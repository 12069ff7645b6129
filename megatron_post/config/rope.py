"""The section `model.rope_scaling`."""

from pydantic import Field, model_validator

from megatron_post.config.section import Count, Positive, Section


class RopeScaling(Section):
    """Llama 3.1's frequency scaling, with Hugging Face's names."""

    factor: Positive = Field(8.0, description="long wavelengths are stretched by this factor")
    low_freq_factor: Positive = Field(
        1.0, description="wavelengths above the original context divided by this are stretched in full"
    )
    high_freq_factor: Positive = Field(
        4.0, description="wavelengths below the original context divided by this stay as they are"
    )
    original_max_position_embeddings: Count = Field(
        8192, description="context for which the model was trained before the stretching"
    )

    @model_validator(mode="after")
    def _bands_are_apart(self) -> "RopeScaling":
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor:g} must be below "
                f"high_freq_factor={self.high_freq_factor:g}"
            )
        return self
