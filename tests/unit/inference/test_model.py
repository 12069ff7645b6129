"""A model with a journal sends each request once, in any order and for any number of callers."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_post.data.dialog import Message
from megatron_post.inference.journal import Journal
from megatron_post.inference.model import Model, Refused, Usage
from megatron_post.inference.request import Refusal, Reply, Request, Sampling, assistant_message


class Parrot:
    """Answers with the request, and refuses the text "no". Fails if `broken`."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.broken = False

    async def answer(self, request: Request) -> Reply | Refusal:
        self.asked.append(request)
        await asyncio.sleep(0.01)
        if self.broken:
            raise ValueError("no server")
        text = request.messages[-1].content
        if text == "no":
            return Refusal("it said no")
        return Reply(assistant_message(f"{text} {request.seed}"), "stop", 2, 1)


def _model(parrot: Parrot, journal: Journal, **values: Any) -> Model:
    return Model(parrot, journal, **{"name": "m", "scope": ("recipe", 1), **values})


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    """Ten callers send it at once, and after a restart. Another seed, value or scope is another request."""

    async def main(model: Model) -> list[Reply]:
        return list(await asyncio.gather(*(model.ask("yes", seed=i % 2) for i in range(10))))

    first = Parrot()
    with Journal(tmp_path) as journal:
        model = _model(first, journal)
        replies = asyncio.run(main(model))
        assert [reply.text for reply in replies] == ["yes 0", "yes 1"] * 5
        assert len(first.asked) == 2 and model.usage == Usage(2, 8, 0, 2, 4)
    second = Parrot()
    with Journal(tmp_path) as journal:
        model = _model(second, journal)
        assert asyncio.run(main(model)) == replies and not second.asked
        assert [reply.key for reply in asyncio.run(main(model))] == [reply.key for reply in replies]
        assert all(reply.key in journal for reply in replies)
        others = [
            model.ask("yes", seed=2),
            model.ask("yes", temperature=0.5),
            model.ask("yes", stop=["\n"]),
            model.ask([Message("system", "s"), Message("user", "yes")]),
            model.ask("yes", tools=[{"type": "code_interpreter"}]),
            _model(second, journal, scope=("recipe", 2)).ask("yes"),
            _model(second, journal, name="n").ask("yes"),
            model.ask([Message("user", "?"), Message("assistant", "f()"), Message("ipython", "yes")]),
            model.ask(
                [
                    Message("user", "?"),
                    Message("assistant", "f()", end_of_turn=False),
                    Message("ipython", "yes"),
                ]
            ),
        ]
        for other in others:
            asyncio.run(other)  # type: ignore[arg-type]
        assert len(second.asked) == 9 and second.asked[2].sampling == Sampling(stop=("\n",))


def test_a_refusal_is_an_answer(tmp_path: Path) -> None:
    parrot = Parrot()
    for asked in (1, 1):
        with Journal(tmp_path) as journal:
            with pytest.raises(Refused, match="it said no") as error:
                asyncio.run(_model(parrot, journal).ask("no"))
            assert error.value.key in journal and error.value.reason == "it said no"
        assert len(parrot.asked) == asked


def test_a_server_that_is_gone_is_no_answer(tmp_path: Path) -> None:
    """Then every waiting caller sends the request itself, and a later call sends it again."""
    parrot = Parrot()
    with Journal(tmp_path) as journal:
        model = _model(parrot, journal)

        async def both() -> list[Any]:
            return await asyncio.gather(model.ask("yes"), model.ask("yes"), return_exceptions=True)

        parrot.broken = True
        assert [str(error) for error in asyncio.run(both())] == ["no server"] * 2
        parrot.broken = False
        assert len(journal) == 0 and asyncio.run(model.ask("yes")).text == "yes 0"


def test_a_caller_that_leaves_takes_nothing_with_it(tmp_path: Path) -> None:
    """If the first of two equal requests is cancelled, the second one is sent."""
    parrot = Parrot()
    with Journal(tmp_path) as journal:
        model = _model(parrot, journal)

        async def main() -> Reply:
            first, second = (asyncio.ensure_future(model.ask("yes")) for _ in range(2))
            await asyncio.sleep(0)
            first.cancel()
            return await second

        assert asyncio.run(main()).text == "yes 0" and len(parrot.asked) == 2


@pytest.mark.parametrize("values", [{"temperature": -1}, {"temprature": 1}, {"stop": "\n"}])
def test_wrong_values_of_sampling(tmp_path: Path, values: dict[str, Any]) -> None:
    with Journal(tmp_path) as journal, pytest.raises(ValidationError):
        asyncio.run(_model(Parrot(), journal).ask("yes", **values))
