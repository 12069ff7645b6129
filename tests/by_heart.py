"""A Llama that gives fixed replies to fixed requests, made without training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_post.data.special_tokens import END_OF_MESSAGE, END_OF_TURN, PYTHON_TAG
from megatron_post.data.template import render_prompt
from megatron_post.data.tokenizer import Tokenizer, train_small_tokenizer
from megatron_post.inference.request import Sampling
from tests.chat_server import request_of

_HIDDEN, _VOCABULARY = 512, 1024


def llama_with_replies(directory: Path, pairs: Sequence[tuple[dict[str, Any], str | dict[str, Any]]]) -> int:
    """Write a Hugging Face directory whose greedy reply to each request is the given one.

    pairs: bodies of requests in OpenAI's protocol, and the text or message that answers them. Returns the
    length of the longest reply in tokens.

    The layers have random weights. Their outputs H at the n tokens before those of all replies are n vectors
    of _HIDDEN numbers, which are linearly independent where n <= _HIDDEN. So some output matrix W gives the
    logits Y = H W^T in which each next token is the largest, and least squares finds it.
    """
    texts = [json.dumps(pair) for pair in pairs]
    tokenizer = train_small_tokenizer(texts, _VOCABULARY)
    torch.manual_seed(0)
    size = {"hidden_size": _HIDDEN, "intermediate_size": _HIDDEN, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 8192}
    config = LlamaConfig(
        vocab_size=_VOCABULARY, **size, **heads, initializer_range=0.3, tie_word_embeddings=False
    )
    model = LlamaForCausalLM(config).eval()
    hidden, wanted, longest = [], [], 0
    for body, message in pairs:
        request = request_of(body, Sampling())
        prompt = render_prompt(request.messages, tokenizer, tools=request.tools).tolist()
        reply = _ids_of(message, tokenizer)
        with torch.no_grad():
            states = model.model(torch.tensor([prompt + reply])).last_hidden_state[0]
        hidden.append(states[len(prompt) - 1 : -1])
        wanted += reply
        longest = max(longest, len(reply))
    before = torch.cat(hidden).double()
    assert len(before) <= _HIDDEN
    logits = torch.nn.functional.one_hot(torch.tensor(wanted), _VOCABULARY).double()
    model.lm_head.weight.data = torch.linalg.lstsq(before, logits).solution.T.float().contiguous()
    model.save_pretrained(directory)
    tokenizer.save(directory)
    return longest


def _ids_of(message: str | dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """The tokens of a reply. A call is a JSON object."""
    if isinstance(message, str):
        return [*tokenizer.encode(message), tokenizer.special(END_OF_TURN)]
    ids = tokenizer.encode(message["content"])
    if not message.get("tool_calls"):
        return [*ids, tokenizer.special(END_OF_TURN)]
    function = message["tool_calls"][0]["function"]
    call = json.dumps({"name": function["name"], "parameters": json.loads(function["arguments"])})
    return [
        *ids,
        tokenizer.special(PYTHON_TAG),
        *tokenizer.encode(call),
        tokenizer.special(END_OF_MESSAGE),
    ]
