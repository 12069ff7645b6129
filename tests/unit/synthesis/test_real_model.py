"""A recipe over a real Llama behind real HTTP, and its rows in a packed store."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megatron_post.config.load import validate
from megatron_post.data.build import build_store
from megatron_post.data.store import open_store
from megatron_post.data.template import TokenRole
from megatron_post.data.tokenizer import load_tokenizer
from tests.chat_server import ChatServer
from tests.scripted_server import Answer, Body
from tests.unit.rounds.models import tiny_policy
from tests.unit.synthesis import director, instructor, quiz
from tests.unit.synthesis.by_heart import rows_of_both
from tests.unit.synthesis.conftest import Place
from tests.unit.synthesis.languages import translator

TEXT = (
    "Write a Python program that does this: print 1, and be right\n\nHere it is.\n```python\nprint(1)\n```\n"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_policy(tmp_path_factory.mktemp("model") / "model", text=TEXT)


def _models(url: str, max_tokens: int) -> dict[str, object]:
    backend = {"kind": "server", "url": url, "served_model": "llama", "retries": 1, "timeout": 60.0}
    sampling = {"temperature": 1.0, "max_tokens": max_tokens}
    return {"author": {"model": "tiny", "backend": backend, "sampling": sampling}}


def test_a_model_that_writes_nonsense_is_dropped_where_it_does(place: Place, model: Path) -> None:
    """A Llama with random weights writes to its limit, or stops by itself, or is asked too much."""
    place.add_tasks(*["right"] * 12)
    with (place.directory / "tasks.jsonl").open("a") as file:
        file.write('{"task": "' + "print 1, " * 300 + '", "expected": "1"}\n')  # more than 256 positions
    with ChatServer(model) as server:
        first = place.run(models=_models(server.url, 24), max_failed=0.1)
        assert server.requests == 13
        before = place.bytes()
        (place.output / "summary.json").unlink()
        place.run(models=_models(server.url, 24), max_failed=0.1)
        assert server.requests == 13 and place.bytes() == before
    assert "0 rows from 0 of 13 input rows, 12 dropped, 1 failed" in first
    dropped = place.rows("dropped.jsonl")
    assert {row["reason"] for row in dropped[:12]} <= {"the reply is cut off", "the reply has no program"}
    assert dropped[12]["reason"] == "refused by a model" and "256" in dropped[12]["detail"]
    asked = [row["journal"][0] for row in dropped]
    assert all(0 < event["tokens"] <= 24 and event["prompt_tokens"] > 20 for event in asked[:12])
    page = (place.output / "report.html").read_text()
    assert "1 failed at solve: refused by a model" in page


def test_a_model_that_writes_no_instruction_ends_self_instruct(place: Place) -> None:
    """Without a new instruction there is no second generation. A restart sends no request."""
    pytest.importorskip("rapidfuzz")
    lines = (json.dumps(seed) + "\n" for seed in instructor.seeds(10))
    (place.directory / "seeds.jsonl").write_text("".join(lines))
    with ChatServer(tiny_policy(place.directory / "model", text=TEXT, positions=4096)) as server:
        values: dict[str, Any] = {
            "recipe": "self_instruct",
            "settings": {"batches": 5},
            "input": {"kind": "rows", "path": str(place.directory / "seeds.jsonl")},
            "models": _models(server.url, 24),
            "max_failed": 0.0,
        }
        first = place.run(**values)
        before = place.bytes()
        (place.output / "summary.json").unlink()
        place.run(**values)
        assert server.requests == 5 and place.bytes() == before
    assert "0 rows from 0 of 5 input rows, 5 dropped, 0 failed" in first
    dropped = place.rows("dropped.jsonl")
    assert {row["reason"] for row in dropped} == {"the reply has no numbered instruction"}
    assert all(0 < row["journal"][0]["tokens"] <= 24 for row in dropped)


WRITTEN = (
    "9. Name the capital of a country\n10. Say whether the text is polite",
    "9. Write a line on a season",
)


def _reply(body: Body) -> str:
    """Two instructions, another one in the second generation, and examples of each."""
    prompt = body["messages"][-1]["content"]
    if prompt.startswith("Here is a list"):
        return WRITTEN[body["seed"]]
    is_polite = "polite" in prompt.rpartition("Task: ")[2].splitlines()[0]
    if prompt.startswith("Is a task"):
        return "Yes" if is_polite else "No"
    if is_polite:
        return "Class label: polite\nInput: Please come in.\nClass label: rude\nInput: Go away."
    return "Example 1\nInput: France\nOutput: Paris" if "capital" in prompt else "Output: Snow falls."


def test_self_instruct_over_a_llama_that_gives_the_replies_of_a_script(tmp_path: Path) -> None:
    """The instructions of one generation are in the prompt of the next one."""
    pytest.importorskip("rapidfuzz")
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("".join(json.dumps(seed) + "\n" for seed in instructor.seeds(10)))
    expected, found = rows_of_both(
        tmp_path,
        _reply,
        recipe="self_instruct",
        settings={"instructions": 3, "batches": 1},
        input={"kind": "rows", "path": str(seeds)},
    )
    for key in ("messages", "instruction", "kind", "rouge_to_seed"):
        assert [row[key] for row in found] == [row[key] for row in expected]
    assert Counter(row["instruction"] for row in found) == {
        "Name the capital of a country": 1,
        "Say whether the text is polite": 2,
        "Write a line on a season": 1,
    }


@pytest.mark.parametrize(
    ("recipe", "settings", "others", "answer", "rows", "kinds"),
    [
        (
            "factuality",
            {"samples": 1},
            ("policy", "judge"),
            quiz.answer,
            [{"text": quiz.snippet(manner, 10)} for manner in ("knows", "shy")],
            ["answer", "refusal"],
        ),
        (
            "steerability",
            {"samples": 1, "variants": 1, "turns": 1},
            ("judge",),
            director.answer,
            [director.seed("obedient")],
            ["length", "length preference"],
        ),
        (
            "translated_reasoning",
            {"languages": ["de"], "columns": {"user": "question", "assistant": "answer"}},
            ("judge",),
            translator.answer,
            [translator.row("Anna", 12, 5)],
            ["translation"],
        ),
    ],
    ids=["factuality", "steerability", "translated_reasoning"],
)
def test_other_recipes_over_a_llama_that_gives_the_replies_of_a_script(
    tmp_path: Path,
    recipe: str,
    settings: dict[str, Any],
    others: tuple[str, ...],
    answer: Answer,
    rows: list[dict[str, Any]],
    kinds: list[str],
) -> None:
    pytest.importorskip("py3langid")
    path = tmp_path / "input.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected, found = rows_of_both(
        tmp_path,
        answer,
        others=others,
        recipe=recipe,
        settings=settings,
        input={"kind": "rows", "path": str(path)},
    )
    assert [row["kind"] for row in found] == kinds
    for key in ("messages", "prompt", "chosen", "rejected", "shares", "turn", "closeness"):
        assert [row.get(key) for row in found] == [row.get(key) for row in expected]


def test_rows_are_packed_with_their_final_turn_trained(place: Place, model: Path) -> None:
    place.add_tasks("right", "mended", "wrong", "mended")
    place.run()
    rows = place.output / "rows.jsonl"
    config = validate(
        {
            "stage": "sft",
            "run_dir": str(place.directory / "training"),
            "model": {"preset": "tiny"},
            "train": {"steps": 1, "global_batch": 1},
            "tokenizer": {"path": str(model)},
            "data": {
                "store": str(place.directory / "store"),
                "pack_length": 4096,
                "sources": [{"name": "code", "path": str(rows)}],
            },
        },
        origin="test",
    )
    build_store(config, console=Console(quiet=True))
    tokenizer = load_tokenizer(str(model))
    pack = open_store(place.directory / "store", "train").read(0)
    trained = np.isin(pack.roles, (TokenRole.BODY, TokenRole.TERMINATOR))
    edges = np.flatnonzero(np.diff(trained.astype(int), prepend=0, append=0)).reshape(-1, 2)
    texts = [tokenizer.decode(pack.tokens[start:end].tolist()) for start, end in edges]
    answers = [f"Here it is.\n```python\nprint({number})\n```<|eot_id|>" for number in (0, 1, 3)]
    assert sorted(texts) == answers
    assert np.count_nonzero(pack.roles == TokenRole.MASKED) > 2 * 10  # the two first tries


@pytest.mark.parametrize("recipe", ["factuality", "steerability"])
def test_nonsense_gives_no_row_of_other_recipes(place: Place, tmp_path: Path, recipe: str) -> None:
    """Over the same server, with a model of 4,096 positions that has random weights."""
    if recipe == "steerability":
        pytest.importorskip("py3langid")
    model = tiny_policy(tmp_path / "model", text=TEXT, positions=4096)
    seed = {"kind": "length", "system": "Use 9 words.", "rules": {"most_words": 9}}
    path = tmp_path / "input.jsonl"
    path.write_text(json.dumps(seed if recipe == "steerability" else {"text": "A tower has 9 steps."}) + "\n")
    names = ("author", "judge") if recipe == "steerability" else ("author", "policy", "judge")
    with ChatServer(model) as server:
        models = {name: _models(server.url, 16)["author"] for name in names}
        values = {"recipe": recipe, "input": {"kind": "rows", "path": str(path)}, "models": models}
        place.run(**values)
        requests, before = server.requests, place.bytes()
        (place.output / "summary.json").unlink()
        place.run(**values)
        assert server.requests == requests > 0 and place.bytes() == before
    (dropped,) = place.rows("dropped.jsonl")
    assert not dropped["failed"] and dropped["reason"] in {
        *("the reply is cut off", "the reply has no question"),
        *(f"the list of system prompts is {how}" for how in ("cut off", "missing", "empty")),
    }
