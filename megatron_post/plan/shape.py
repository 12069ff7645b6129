"""Divides the model over a layout: the chunks of every pipeline rank, and their parameters."""

from dataclasses import dataclass

from megatron_post.config.schema import Config

VOCABULARY_TILE = 128


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers on a pipeline rank, and whether the chunk also has the embedding or the head."""

    rank: int
    number: int
    layers: int
    embedding: bool
    head: bool


def chunks(config: Config) -> list[list[Chunk]]:
    """Chunks of each pipeline rank, as megatron-core assigns layers.

    Chunk c of rank r is stage c * p + r of the model. All stages have equally many layers, except that
    `embedding_and_loss_as_layers` takes one from the first and one from the last.
    """
    p = config.parallel
    counted = p.embedding_and_loss_as_layers
    each = (config.model.num_layers + 2 * counted) // (p.pipeline * p.virtual_pipeline)
    last = p.pipeline * p.virtual_pipeline - 1
    result = []
    for rank in range(p.pipeline):
        parts = []
        for number in range(p.virtual_pipeline):
            stage = number * p.pipeline + rank
            first, final = stage == 0, stage == last
            parts.append(Chunk(rank, number, each - counted * (first + final), embedding=first, head=final))
        result.append(parts)
    return result


def vocabulary_rows(config: Config) -> int:
    """Rows of the embedding on a tensor-parallel rank, with padding (`models.build.padded_vocab_size`)."""
    tensor = config.parallel.tensor
    multiple = VOCABULARY_TILE * tensor if tensor > 1 else 1
    return -(-config.model.vocab_size // multiple) * multiple // tensor


def layer_matrices(config: Config) -> dict[str, int]:
    """Parameters of a layer's matrices on a tensor-parallel rank."""
    m, tensor = config.model, config.parallel.tensor
    attention = m.num_attention_heads * m.head_dim // tensor
    groups = m.num_key_value_heads * m.head_dim // tensor
    ffn = m.ffn_hidden_size // tensor
    return {
        "qkv": m.hidden_size * (attention + 2 * groups),
        "proj": attention * m.hidden_size,
        "fc1": m.hidden_size * 2 * ffn,
        "fc2": ffn * m.hidden_size,
    }


def chunk_parameters(config: Config, chunk: Chunk) -> int:
    """Parameters of a chunk on one tensor-parallel rank, with vocabulary padding."""
    h, rows = config.model.hidden_size, vocabulary_rows(config)
    count = chunk.layers * (sum(layer_matrices(config).values()) + 2 * h)
    if chunk.embedding:
        count += rows * h
    if chunk.head:
        count += h + head_parameters(config, chunk)
    return count


def head_parameters(config: Config, chunk: Chunk) -> int:
    """Parameters of the output layer, or of the reward model's scalar head.

    A tied output layer is a copy only if the embedding is in another chunk.
    """
    h = config.model.hidden_size
    if config.traits.scalar_head:
        return h + config.traits.scores_steps  # a reward model of steps has a bias
    tied = config.model.tie_word_embeddings and chunk.embedding
    return 0 if tied else vocabulary_rows(config) * h


def model_parameters(config: Config) -> int:
    """Parameters of the whole model without padding: 405,853,388,800 for Llama 3.1 405B."""
    m = config.model
    kv = m.num_key_value_heads * m.head_dim
    attention = m.num_attention_heads * m.head_dim
    layer = m.hidden_size * (2 * attention + 2 * kv + 3 * m.ffn_hidden_size + 2)
    embeddings = m.vocab_size * m.hidden_size
    score = m.hidden_size + config.traits.scores_steps
    head = score if config.traits.scalar_head else embeddings * (not m.tie_word_embeddings)
    return m.num_layers * layer + embeddings + m.hidden_size + head


@dataclass(frozen=True)
class LocalSizes:
    """Sizes with which one rank computes.

    t: tokens of a pack. s: tokens outside attention and MLP. h: hidden size. a, k, f: width of queries, of
    keys, and of the MLP. rows: of the vocabulary. The other fields are the layout.
    """

    t: int
    s: int
    h: int
    a: int
    k: int
    f: int
    rows: int
    tensor: int
    context: int
    sequence: bool

    @staticmethod
    def of(config: Config) -> "LocalSizes":
        m, p = config.model, config.parallel
        t = config.data.pack_length // p.context
        return LocalSizes(
            t=t,
            s=t // p.tensor if p.sequence else t,
            h=m.hidden_size,
            a=m.num_attention_heads * m.head_dim // p.tensor,
            k=m.num_key_value_heads * m.head_dim // p.tensor,
            f=m.ffn_hidden_size // p.tensor,
            rows=vocabulary_rows(config),
            tensor=p.tensor,
            context=p.context,
            sequence=p.sequence,
        )
