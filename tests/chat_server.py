"""A model of this machine behind OpenAI's chat interface: real templates, stop tokens and lengths."""

import asyncio
import contextlib
import json
import threading
from pathlib import Path
from typing import Any

from megatron_post.data.dialog import Message, ToolCall
from megatron_post.inference.answers import Answers, open_answers
from megatron_post.inference.request import Refusal, Request, Sampling, messages_as_json
from megatron_post.inference.settings import TransformersBackend

_ROLES = {"tool": "ipython"}


class ChatServer:
    """Serves a Hugging Face directory from a thread of its own, with `inference`'s transformers backend."""

    def __init__(self, model: Path) -> None:
        self.requests = 0
        self._model, self._ready, self._ended = str(model), threading.Event(), asyncio.Event()
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._serve(),), daemon=True
        )
        self._thread.start()
        assert self._ready.wait(120)

    def __enter__(self) -> "ChatServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(60)

    async def _serve(self) -> None:
        async with open_answers(TransformersBackend(batch=16), self._model) as answers:

            async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                with contextlib.suppress(
                    ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError
                ):
                    while True:
                        head = await reader.readuntil(b"\r\n\r\n")
                        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                        status, content = await self._answer(
                            answers, json.loads(await reader.readexactly(length))
                        )
                        line = f"HTTP/1.1 {status} Chat\r\nContent-Length: {len(content)}\r\n\r\n"
                        writer.write(line.encode() + content)
                        await writer.drain()
                writer.close()

            listening = await asyncio.start_server(connection, "127.0.0.1", 0, limit=2**24)
            self.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
            self._ready.set()
            await self._ended.wait()
            listening.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    async def _answer(self, answers: Answers, body: dict[str, Any]) -> tuple[int, bytes]:
        """Status and content of a chat completion."""
        self.requests += 1
        sampling = Sampling(
            temperature=float(body["temperature"]), top_p=float(body["top_p"]), max_tokens=body["max_tokens"]
        )
        reply = await answers.answer(request_of(body, sampling))
        if isinstance(reply, Refusal):
            return 400, json.dumps({"error": {"message": reply.reason}}).encode()
        message = messages_as_json([reply.message])[0]
        if reply.finish == "tool_calls":
            message |= _with_call(reply.text)
        choice = {"index": 0, "message": message, "finish_reason": reply.finish}
        usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.tokens}
        return 200, json.dumps({"choices": [choice], "usage": usage}).encode()


def request_of(body: dict[str, Any], sampling: Sampling) -> Request:
    """The request in the body of a chat completion."""
    messages = tuple(map(_message, body["messages"]))
    return Request(messages, sampling, body["seed"], tuple(body.get("tools", ())))


def _with_call(text: str) -> dict[str, Any]:
    """The text before a call, and the call as a JSON object, as vLLM's parser `llama3_json` finds them."""
    says, brace, rest = text.partition("{")
    try:
        call, _ = json.JSONDecoder().raw_decode(brace + rest)
        function = {"name": call["name"], "arguments": json.dumps(call["parameters"])}
    except (ValueError, KeyError):
        return {}
    return {"content": says, "tool_calls": [{"id": "call", "type": "function", "function": function}]}


def _message(values: dict[str, Any]) -> Message:
    calls = tuple(ToolCall(**call["function"]) for call in values.get("tool_calls", ()))
    role = _ROLES.get(values["role"], values["role"])
    return Message(role, values["content"] or "", calls, end_of_turn=not calls)
