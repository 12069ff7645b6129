"""`evaluate choices` ranks choices as plain `transformers` does, in every layout."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_post.rounds import choices as module
from megatron_post.rounds import ranking, segments
from megatron_post.rounds.choices import DatasetReport, _read, _reports, evaluate_choices
from megatron_post.storage.files import read_lines
from tests.ranks import run_ranks
from tests.unit.rounds.models import tiny_policy

SETTINGS = ("precision.dtype=fp32", "data.pack_length=256")


def row(**values: Any) -> dict[str, Any]:
    known = {
        "dataset": "films",
        "task": "sentiment",
        "template": "good or bad",
        "row": 1,
        "prompt": "a film?",
    }
    return {**known, "completion": "good", "choices": ["bad", "good"], **values}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def rows_of_two_datasets() -> list[dict[str, Any]]:
    """Rows of different lengths and numbers of choices, some of which begin another one."""
    rows = [row(row=n, prompt="a b " * (n + 1), template=f"t{n % 3}") for n in range(9)]
    choices = ["a", "a b c", "1 2 3 a b c", "c"]
    rows += [row(dataset="sums", row=n, prompt=f"{n}?", choices=choices, completion="a") for n in range(4)]
    return [*rows, row(dataset="sums", choices=None, completion="anything")]


def test_log_probabilities_are_those_of_transformers_in_every_layout(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, rows = tiny_policy(tmp_path / "model"), write(tmp_path / "rows.jsonl", rows_of_two_datasets())
    llama = transformers.AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    expected = []
    for each in rows_of_two_datasets()[:-1]:
        asked = [{"role": "user", "content": each["prompt"].strip()}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        for choice in each["choices"]:
            said = [*asked, {"role": "assistant", "content": choice}]
            ids = tokenizer.apply_chat_template(said, return_dict=True)["input_ids"]
            assert ids[: len(prompt)] == prompt
            with torch.no_grad():
                logps = llama(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected.append(sum(float(logps[n - 1, ids[n]]) for n in range(len(prompt), len(ids))))
    layouts: dict[int, list[tuple[str, ...]]] = {
        1: [()],
        2: [("parallel.tensor=2",), ("parallel.pipeline=2",), ("parallel.context=2",), ()],
    }
    for ranks, settings in layouts.items():
        for layout in settings:
            output = tmp_path / "choices.jsonl"
            reports = run_ranks(evaluate_choices, ranks, model, rows, output, (*SETTINGS, *layout))
            lines = [json.loads(line) for line in output.read_text().splitlines()]
            found = [logp for line in lines for logp in line["logps"]]
            np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=str(layout))
            assert [line["predicted"] for line in lines] == [int(np.argmax(line["logps"])) for line in lines]
            assert all(each == reports[0] for each in reports)
    films, sums = reports[0]
    assert (films.rows, len(films.accuracies), sums.rows, sums.open_rows) == (9, 3, 4, 1)
    assert json.loads((tmp_path / "choices.jsonl.report.json").read_text())[0]["median"] == films.median


def test_the_report_is_of_the_prompts_of_a_dataset() -> None:
    """Five prompts of 4 rows with 0, 1, 2, 3 and 4 right answers have the quartiles 1/4, 1/2 and 3/4."""
    lines = [
        {"dataset": "d", "task": "t", "template": str(right), "answer": 0, "predicted": int(n >= right)}
        for right in range(5)
        for n in range(4)
    ]
    accuracies = {"0": 0.0, "1": 0.25, "2": 0.5, "3": 0.75, "4": 1.0}
    assert _reports(lines, {"open": 2, "d": 1}) == [
        DatasetReport("d", "t", 20, 1, accuracies, 0.5, 0.25, 0.75),
        DatasetReport("open", None, 0, 2, {}, None, None, None),
    ]


class _Killed(BaseException):
    pass


def _interrupted(model: Path, rows: Path, output: Path) -> None:
    """Rank the choices of four rows at a time, and end in the third batch after a half line."""
    segments._ROWS_AT_ONCE = 4
    real, batches = module.append_lines, [2]

    def append(path: Path, lines: Any) -> None:
        if batches[0] == 0:
            with path.open("a") as file:
                file.write(json.dumps(next(iter(lines)))[:40])
            raise _Killed
        batches[0] -= 1
        real(path, lines)

    module.append_lines = append  # this process ends after the call
    with pytest.raises(_Killed):
        evaluate_choices(model, rows, output, SETTINGS)


def _counted(model: Path, rows: Path, output: Path, *settings: str) -> tuple[list[DatasetReport], int]:
    """The report, and the number of segments whose log-probability was computed."""
    segments._ROWS_AT_ONCE = 4
    real, count = ranking.values_of_segments, [0]

    def values(rendered: Any, *arguments: Any, **options: Any) -> Any:
        count[0] += len(rendered)
        return real(rendered, *arguments, **options)

    ranking.values_of_segments = values
    return evaluate_choices(model, rows, output, (*SETTINGS, *settings)), count[0]


def test_an_interrupted_call_continues_after_its_last_line(tmp_path: Path) -> None:
    """Eight rows are done, so one row of two choices and four rows of four choices remain."""
    model, rows = tiny_policy(tmp_path / "model"), write(tmp_path / "rows.jsonl", rows_of_two_datasets())
    whole, output, other = (tmp_path / f"{name}.jsonl" for name in ("whole", "output", "other"))
    ((reports, count),) = run_ranks(_counted, 1, model, rows, whole)
    assert count == 9 * 2 + 4 * 4
    run_ranks(_interrupted, 1, model, rows, output)
    assert output.read_text().count("\n") == 8 and not (tmp_path / "output.jsonl.report.json").exists()
    for name in ("", ".origin.json"):
        shutil.copy(f"{output}{name}", f"{other}{name}")
    assert run_ranks(_counted, 1, model, rows, output) == [(reports, 1 * 2 + 4 * 4)]
    assert output.read_bytes() == whole.read_bytes()
    assert Path(f"{output}.report.json").read_bytes() == Path(f"{whole}.report.json").read_bytes()
    assert run_ranks(_counted, 1, model, rows, output) == [(reports, 0)]
    # Another layout continues it as well. Its reporter is not rank 0.
    found = run_ranks(_counted, 2, model, rows, other, "parallel.pipeline=2")
    assert [len(each) for each, _ in found] == [2, 2] and [count for _, count in found] == [18, 18]
    logps = [[logp for line in read_lines(path) for logp in line["logps"]] for path in (other, whole)]
    np.testing.assert_allclose(*logps, atol=1e-4)


def _refused(model: Path, rows: Path, output: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_choices(model, rows, output, SETTINGS)


def test_lines_of_other_rows_are_not_continued(tmp_path: Path) -> None:
    model, rows = tiny_policy(tmp_path / "model"), write(tmp_path / "rows.jsonl", [row()])
    output = tmp_path / "choices.jsonl"
    run_ranks(evaluate_choices, 1, model, rows, output, SETTINGS)
    before = output.read_bytes()
    write(rows, [row(completion="bad")])
    message = r"choices.jsonl holds 1 lines with logps of another rows; give another --output"
    run_ranks(_refused, 1, model, rows, output, message)
    (tmp_path / "choices.jsonl.origin.json").unlink()
    run_ranks(_refused, 1, model, rows, output, r"choices.jsonl exists and holds no logps")
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"completion": "fine"}, "the completion 'fine' is none of ['bad', 'good']"),
        ({"choices": ["good"]}, "choices must be two or more different texts"),
        ({"choices": ["good", "good "]}, "choices must be two or more different texts"),
        ({"choices": ["good", ""]}, "choices must be two or more different texts"),
        ({"answer": 1}, "answer: unknown key"),
        ({"choices": None}, "has no row with choices"),
    ],
)
def test_rows_that_cannot_be_ranked_are_refused(tmp_path: Path, values: dict[str, Any], reason: str) -> None:
    path = write(tmp_path / "rows.jsonl", [row(**values)])
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        _read(path)
    assert "rows.jsonl" in str(error.value)


def test_a_reward_model_is_refused(tmp_path: Path) -> None:
    model = tiny_policy(tmp_path / "model", scalar_head=True)
    with pytest.raises(ValueError, match="model is a reward model"):
        evaluate_choices(model, write(tmp_path / "rows.jsonl", [row()]), tmp_path / "o.jsonl")
