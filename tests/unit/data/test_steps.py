"""Rows with labelled steps, in TRL's form, PRM800K's and named columns, up to the roles of tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megatron_post.config.data import Source
from megatron_post.data.build import build_store
from megatron_post.data.dialog import BadRow, Dialog, Message
from megatron_post.data.row_formats import example_of_row
from megatron_post.data.row_keys import KeyCounts
from megatron_post.data.rows import BadRows, read_rows
from megatron_post.data.show import show_pack
from megatron_post.data.stats import print_stats
from megatron_post.data.step_example import Solution, StepExample, split_steps
from megatron_post.data.store import StoreError, open_store
from megatron_post.data.template import STEP_ROLES, TokenRole, render, render_solutions
from megatron_post.data.tokenizer import Tokenizer, load_tokenizer, train_small_tokenizer
from tests.tiny import tiny_config

TRL = {
    "prompt": "1 + 2 + 3?",
    "completions": ["1 + 2 = 3", "3 + 3 = 7", "It is 7"],
    "labels": [True, False, False],
}
PROMPT = (Message("user", "1 + 2 + 3?"),)


def _example(row: Any, *, neutral: Any = "right", **fields: Any) -> StepExample:
    found = example_of_row(row, Source(name="s", path="x.jsonl", **fields), neutral=neutral)
    assert isinstance(found, StepExample)
    return found


def _completion(text: str, rating: int | None) -> dict[str, Any]:
    return {"text": text, "rating": rating, "flagged": False}


def _prm800k(*steps: tuple[list[dict[str, Any]], int | None], **label: Any) -> dict[str, Any]:
    return {
        "labeler": "a",
        "timestamp": "2022",
        "question": {"problem": "1 + 2 + 3?", "ground_truth_answer": "6"},
        "label": {
            "steps": [
                {"completions": found, "human_completion": None, "chosen_completion": chosen}
                for found, chosen in steps
            ],
            "finish_reason": "solution",
            **label,
        },
    }


# rows


def test_trl() -> None:
    expected = StepExample(PROMPT, (Solution(tuple(TRL["completions"]), (True, False, False)),))
    assert _example(TRL) == expected
    assert _example({**TRL, "labels": [1, 0, 0]}) == expected
    assert _example({**TRL, "prompt": [{"role": "user", "content": "1 + 2 + 3?"}]}) == expected
    assert _example({**TRL, "labels": [None, 0, 1.0]}).solutions[0].labels == (None, False, True)
    with_system = _example({**TRL, "system": "Be brief."})
    assert [message.role for message in with_system.prompt] == ["system", "user"]


def test_named_columns() -> None:
    """A row of `math_step_labels` has several kinds of labels, and the mapping chooses one of them."""
    row = {**TRL, "judge_labels": [True, True, False]}
    columns = {"user": "prompt", "steps": "completions", "labels": "judge_labels"}
    assert _example(row, columns=columns).solutions[0].labels == (True, True, False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": [True, False]}, "3 steps have 2 labels"),
        ({"completions": [], "labels": []}, "0 steps have 0 labels"),
        ({"labels": [0.5, 1, 0]}, "`labels.0` is 0.5; the label of a step is true or 1"),
        ({"labels": [1, -1, 0]}, "`labels.1` is -1"),
        ({"labels": ["+", "-", "+"]}, "`labels.0` is '\\+'"),
        ({"labels": [None] * 3}, "no step has a label"),
        ({"labels": True}, "`labels` must be a list"),
        ({"completions": "1 + 2 = 3"}, "`completions` must be a list"),
        ({"completions": ["a", " ", "b"]}, "step 2 is ''"),
        ({"completions": ["a", 3, "b"]}, "'completions.1' is int, not text"),
        ({"completions": ["a", "\ud800", "b"]}, "lone surrogate"),
        ({"completions": ["a", "<|eot_id|>", "b"]}, "chat template"),
        ({"prompt": " "}, ""),
        ({"question": "Another one?"}, "`question`, which its form does not use"),
    ],
)
def test_bad_rows(change: dict[str, Any], reason: str) -> None:
    if reason:
        with pytest.raises(BadRow, match=reason):
            _example({**TRL, **change})
    else:
        _example({**TRL, **change})  # a blank prompt is allowed, as in dialogs


def test_prm800k() -> None:
    """The chosen completions make a solution. Another rated completion makes one with its own label only."""
    row = _prm800k(
        ([_completion("a", 1), _completion("b", -1), _completion("c", None)], 0),
        ([_completion("d", 0)], 0),
        ([_completion("e", -1)], None),
    )
    found = _example(row)
    assert found.prompt == PROMPT
    assert found.solutions == (
        Solution(("a", "d", "e"), (True, True, False)),
        Solution(("b",), (False,)),
    )
    assert _example(row, neutral="wrong").solutions[0].labels == (True, False, False)
    assert _example(row, neutral="unlabelled").solutions[0].labels == (True, None, False)


def test_prm800k_of_a_labeler_who_wrote_a_step() -> None:
    row = _prm800k(([_completion("a", -1)], None), ([_completion("c", 1)], 0), ([], None))
    row["label"]["steps"][0]["human_completion"] = {"text": "b", "rating": None}
    assert _example(row).solutions == (Solution(("b", "c"), (True, True)), Solution(("a",), (False,)))
    row["label"]["steps"][0]["human_completion"] = "b"
    assert _example(row).solutions[0].steps == ("b", "c")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (_prm800k(([_completion("a", 2)], 0)), "completions.0.rating=2 is none of -1, 0, 1"),
        (_prm800k(([_completion("a", True)], 0)), "rating=True"),
        (_prm800k(([_completion("a", 1)], 1)), "chosen_completion=1 is none of 1 completions"),
        (_prm800k(([_completion("a", 1)], True)), "chosen_completion=True"),
        (_prm800k(([_completion("a", None)], 0)), "no step has a rating"),
        (_prm800k(([_completion("a", -1)], None), ([_completion("b", 1)], 0)), "steps.0 has no chosen"),
        (_prm800k(([_completion("", 1)], 0)), "step 1 is ''"),
        (_prm800k(finish_reason="bad_problem"), "finish_reason=bad_problem"),
        (_prm800k(steps=3), "label.steps must be a list"),
        ({**_prm800k(), "question": "1 + 2?"}, "question must be a mapping"),
    ],
)
def test_bad_rows_of_prm800k(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        _example(row)


def test_unused_keys_of_prm800k_are_counted(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(_prm800k(([_completion("a", 1)], 0))) + "\n")
    counts = KeyCounts()
    source = Source(name="s", path=str(tmp_path / "rows.jsonl"))
    assert len(list(read_rows(source, bad_rows=BadRows(), counts=counts))) == 1
    assert set(counts.unused) == {"labeler", "timestamp", "question.ground_truth_answer"}


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        (
            "## Step 1: add\n3 + 4\n\n= 7\n\n## Step 2: say\n7",
            ("## Step 1: add\n3 + 4\n\n= 7", "## Step 2: say\n7"),
        ),
        ("3 + 4\n\n\n\n= 7\n\n", ("3 + 4", "= 7")),
        ("Step 2: no first step", ("Step 2: no first step",)),
        ("one", ("one",)),
    ],
)
def test_a_text_is_split_into_steps(text: str, steps: tuple[str, ...]) -> None:
    assert split_steps(text, "\n\n") == steps


# tokens and stores


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_small_tokenizer(["1 + 2 + 3 = 6\n\nIt is 7"] * 5, 290).save(directory)
    return load_tokenizer(directory)


def test_the_last_token_of_each_step_carries_its_label(tokenizer: Tokenizer) -> None:
    """The separator belongs to the step before it. The text is that of the same solution as a dialog."""
    example = _example({**TRL, "labels": [True, None, False]})
    (found,) = render_solutions([(PROMPT, example.solutions[0], ())], tokenizer, separator="\n\n")
    places = np.flatnonzero(np.isin(found.roles, STEP_ROLES))
    assert [TokenRole(found.roles[place]).name for place in places] == ["RIGHT_STEP", "WRONG_STEP"]
    texts = [tokenizer.decode(found.tokens[: place + 1].tolist()) for place in places]
    assert texts[0].endswith("1 + 2 = 3\n\n") and texts[1].endswith("It is 7")
    whole = render(Dialog((*PROMPT, *example.responses[0])), tokenizer)
    assert tokenizer.decode(found.tokens.tolist()) == tokenizer.decode(whole.tokens.tolist())
    assert found.roles[-1] == TokenRole.TERMINATOR and TokenRole.MASKED not in found.roles


def _store(tmp_path: Path, tokenizer: Tokenizer, rows: list[dict[str, Any]], **data: Any) -> Any:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer.save(tmp_path / "tokenizer")
    return tiny_config(
        stage=data.pop("stage", "step_reward"),
        model={"vocab_size": 512},
        tokenizer={"path": str(tmp_path / "tokenizer")},
        data={
            "store": str(tmp_path / "store"),
            "sources": [{"name": "steps", "path": str(tmp_path / "rows.jsonl")}],
            **data,
        },
    )


def test_pack_and_show(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Four labels of two rows are in the store, one solution of PRM800K's alternatives included."""
    rows = [TRL, _prm800k(([_completion("a", 1), _completion("b", -1)], 0))]
    config = _store(tmp_path, tokenizer, rows)
    build_store(config, console=Console(quiet=True))
    store = open_store(config.data.store, "train", layout="steps")
    roles = np.concatenate([store.read(index).roles for index in range(len(store))])
    assert (roles == TokenRole.RIGHT_STEP).sum() == 2 and (roles == TokenRole.WRONG_STEP).sum() == 3
    assert store.sources[0].rows == 3
    with Console(record=True, width=200, quiet=False, file=(tmp_path / "out").open("w")) as console:
        print_stats(config.data.store, console=console)
        show_pack(config.data.store, 0, console=console)
    text = console.export_text()
    assert "steps: 5 of" in text and "3 trained" in text
    with pytest.raises(StoreError, match="holds examples as 'steps', this stage needs 'dialogs'"):
        open_store(config.data.store, "train", layout="dialogs")


def test_a_cut_solution_keeps_the_labels_before_the_cut(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Steps do not depend on what follows them. A cut before the first label leaves nothing to train."""
    long = {**TRL, "completions": ["1 + 2 = 3", "word " * 200, "It is 7"]}
    late = {**TRL, "completions": ["word " * 200, "a", "b"]}
    config = _store(tmp_path, tokenizer, [long, late], overlong="truncate")
    build_store(config, console=Console(quiet=True))
    store = open_store(config.data.store, "train")
    assert (store.sources[0].truncated, store.sources[0].dropped) == (1, 1)
    assert np.isin(store.read(0).roles, STEP_ROLES).sum() == 1


@pytest.mark.parametrize(
    ("stage", "row", "reason"),
    [
        ("sft", TRL, "'steps' holds labelled steps, stage=sft trains dialogs"),
        ("reward", TRL, "'steps' holds rows without ranked responses"),
        ("step_reward", {"prompt": "a", "completion": "b"}, "'steps' holds rows without labelled steps"),
        ("step_reward", {"prompt": "a", "chosen": "b", "rejected": "c"}, "without labelled steps"),
    ],
)
def test_rows_of_another_stage(
    tmp_path: Path, tokenizer: Tokenizer, stage: str, row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        build_store(_store(tmp_path, tokenizer, [row], stage=stage), console=Console(quiet=True))
