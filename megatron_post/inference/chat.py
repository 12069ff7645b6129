"""Writes requests and reads replies in OpenAI's chat protocol."""

import json
from typing import Any

from megatron_post.data.dialog import BadRow, ToolCall
from megatron_post.data.special_tokens import END_OF_MESSAGE
from megatron_post.inference.request import Reply, Request, assistant_message, messages_as_json

_LONGEST_FINISH, _MOST_TOKENS = 100, 2**31
_SHOWN = 2**14  # bytes of an answer in a message. The message is shortened further once keys are hidden
_CALLS = (END_OF_MESSAGE, 128008)  # the token and its id in Llama 3's tokenizer
_REASONING = ("reasoning_content", "reasoning")  # the names in older and newer versions of vLLM


class NoCompletion(Exception):
    """An answer is not a chat completion."""


class Unusable(Exception):
    """A chat completion cannot be used as a reply, and another try would not help."""


def request_body(request: Request, model: str) -> dict[str, Any]:
    """The body of a request to a server. model: the model's name on the server."""
    sampling = request.sampling
    body = {
        "model": model,
        "messages": messages_as_json(request.messages),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "stop": list(sampling.stop),
        "seed": request.seed % 2**31,  # some servers only accept 32 bits
    }
    if request.tools:  # Llama 3's format allows one call per message
        body |= {"tools": list(request.tools), "parallel_tool_calls": False}
    return body


def parse_completion(content: bytes) -> Reply:
    """The reply in a chat completion.

    Raises `NoCompletion` if `content` is not a completion. Raises `Unusable` if it has neither text nor
    calls, or calls that Llama 3's format cannot represent.
    """
    shown = content[:_SHOWN].decode(errors="replace")
    try:
        answer = json.loads(content)
        choice = answer["choices"][0]
        message, finish = choice["message"], choice["finish_reason"]
        usage = answer.get("usage") or {}
        tokens, prompt_tokens = (usage.get(f"{name}_tokens", 0) for name in ("completion", "prompt"))
        # vLLM says "stop", and `stop_reason` is the token. <|eom_id|> ends a message that calls a tool.
        finish = "tool_calls" if choice.get("stop_reason") in _CALLS else finish
        text = message["content"]
        reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), "")
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        named = [(call["name"], call["arguments"]) for call in calls]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise NoCompletion(f"an answer that is not a chat completion ({error!r}): {shown}") from None
    is_finish = isinstance(finish, str) and len(finish) <= _LONGEST_FINISH
    if text is None and is_finish and not named:  # a refusal, or reasoning without an answer
        raise Unusable(f"a chat completion without text: {shown}")
    texts = ["" if text is None else text, reasoning, *(part for call in named for part in call)]
    if (
        not is_finish
        or not all(isinstance(each, str) for each in texts)
        or not all(type(count) is int and 0 <= count < _MOST_TOKENS for count in (tokens, prompt_tokens))
    ):
        raise NoCompletion(f"a chat completion without text, reason of ending or count of tokens: {shown}")
    text, reasoning, *parts = map(_without_surrogates, texts)
    made = [ToolCall(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
    try:
        said = assistant_message(text, calls=made, reasoning=reasoning, finish=finish)
    except BadRow as error:
        raise Unusable(f"a chat completion that cannot be kept: {error}: {shown}") from None
    return Reply(said, finish, tokens, prompt_tokens)


def texts_of(reply: Reply) -> list[str]:
    """All texts of a reply, which the server has written."""
    message = reply.message
    calls = (text for call in message.tool_calls for text in (call.name, str(call.arguments)))
    return [message.content, message.reasoning, reply.finish, *calls]


def _without_surrogates(text: str) -> str:
    """The text with lone surrogates replaced, which are valid in JSON but not in UTF-8."""
    return text.encode(errors="replace").decode()
