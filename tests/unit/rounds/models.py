"""A policy with random weights that is small enough for a CPU."""

from pathlib import Path

from megatron_post.data.tokenizer import train_small_tokenizer
from tests.tiny import tiny_config
from tests.unit.convert.models import weights_of, write_hf


def tiny_policy(
    directory: Path,
    *,
    scalar_head: bool = False,
    scores_steps: bool = False,
    text: str = "a b c 1 2 3",
    positions: int = 256,
) -> Path:
    """A Hugging Face directory of two layers with a tokenizer of bytes, made of `text`.

    positions: the largest number of tokens of a prompt and its reply.
    """
    tokenizer = train_small_tokenizer([text] * 5, 280)
    shape = {"num_layers": 2, "vocab_size": 288, "rope_scaling": None, "max_position_embeddings": positions}
    model = tiny_config().model.model_copy(update=shape)
    head = {"scalar_head": scalar_head, "scores_steps": scores_steps}
    write_hf(directory, model, weights_of(model, **head), **head)
    tokenizer.save(directory)
    return directory
