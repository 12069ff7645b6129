"""Converts requests to token ids and token ids to replies, for a model in this process."""

from collections.abc import Sequence

from megatron_post.data.special_tokens import END_OF_MESSAGE
from megatron_post.data.template import render_prompt
from megatron_post.data.tokenizer import Tokenizer
from megatron_post.inference.request import Refusal, Reply, Request, Sampling, assistant_message


def prompt_ids(request: Request, tokenizer: Tokenizer) -> list[int]:
    """The token ids of the conversation and of the answer's header."""
    return render_prompt(request.messages, tokenizer, tools=request.tools).tolist()


def overlong(requests: Sequence[Request], prompts: Sequence[Sequence[int]], limit: int) -> dict[int, Refusal]:
    """Refusals, by index, of requests that with their replies may exceed the `limit` positions."""
    wanted = [request.sampling.max_tokens for request in requests]
    lengths = [len(prompt) + more for prompt, more in zip(prompts, wanted, strict=True)]
    return {
        i: Refusal(
            f"the prompt and max_tokens={wanted[i]} take {length} positions, of the {limit} that the model "
            "has"
        )
        for i, length in enumerate(lengths)
        if length > limit
    }


def stop_ids(tokenizer: Tokenizer, sampling: Sampling) -> list[int]:
    """The ids of the stop tokens that the tokenizer has. Raises `ValueError` if it has none of them."""
    found = [i for i in tokenizer.stop_ids if tokenizer.decode([i]) in sampling.stop]
    if not found:
        raise ValueError(f"sampling.stop={list(sampling.stop)}: the tokenizer has none of these")
    return found


def reply_of(
    generated: list[int], stops: Sequence[int], tokenizer: Tokenizer, prompt: Sequence[int] = ()
) -> Reply:
    """The reply in generated ids. It ends with the first stop token, and padding follows.

    A message that ends with <|eom_id|> calls a tool and waits for its output, so it is not a complete answer.
    """
    end = next((i for i, token in enumerate(generated) if token in stops), None)
    text = tokenizer.decode(generated[:end], skip_special=True)
    tokens, finish = len(generated), "length"
    if end is not None:
        calls = tokenizer.decode([generated[end]]) == END_OF_MESSAGE
        tokens, finish = end + 1, "tool_calls" if calls else "stop"
    return Reply(assistant_message(text, finish=finish), finish, tokens, len(prompt))
