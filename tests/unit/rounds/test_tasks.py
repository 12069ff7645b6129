"""Benchmarks of lm-evaluation-harness on a tiny Llama, with a task and rows on this disk."""

import json
from pathlib import Path

import pytest

from megatron_post.convert.publishing.card import documents_of
from megatron_post.convert.publishing.record import read_record
from megatron_post.rounds.tasks import TaskSettings, evaluate_tasks
from tests.unit.convert.models import to_megatron
from tests.unit.rounds.models import tiny_policy

TASK = """\
task: same
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["a", "a"]
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaskSettings:
    """Two choices with equal texts, of which the first wins. It is right in one of four rows."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e .[eval]")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"{n} a b", "answer": int(n > 0)} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "same.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    return TaskSettings(("same",), task_dir=str(tmp_path / "tasks"), batch=2)


def test_an_export_and_its_card_get_the_results(tmp_path: Path, settings: TaskSettings) -> None:
    """Evaluated twice, the file has both evaluations and the card the latest."""
    model = tiny_policy(tmp_path / "model")
    for name, content in documents_of(model, {}).items():
        (model / name).write_bytes(content)
    for _ in range(2):
        (result,) = evaluate_tasks(str(model), settings)
        assert (result.task, result.metric, result.value, result.shots) == ("same", "acc", 0.25, 0)
    entries = json.loads((model / "evaluations.json").read_text())
    assert len(entries) == 2 and entries[0]["results"] == [result.model_dump()]
    record = read_record(model)
    assert record is not None and record.results == (result,)
    assert "| `same` | `acc` | 0.25 |" in (model / "README.md").read_text()


def test_a_checkpoint_is_exported_and_removed(tmp_path: Path, settings: TaskSettings) -> None:
    run = tmp_path / "run"
    to_megatron(tiny_policy(tmp_path / "model"), run / "checkpoints")
    (result,) = evaluate_tasks(str(run / "checkpoints"), settings)
    assert result.value == 0.25
    (entry,) = json.loads((run / "evaluations.json").read_text())
    assert (entry["step"], entry["backend"]) == (0, "transformers")
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "evaluations.json"]


def test_refusals(tmp_path: Path, settings: TaskSettings) -> None:
    with pytest.raises(ValueError, match=r"has no task 'sam'.*did you mean 'same'"):
        evaluate_tasks("x", TaskSettings(("sam",), task_dir=settings.task_dir))
    with pytest.raises(ValueError, match="is not a directory"):
        evaluate_tasks("x", TaskSettings(("same",), task_dir="none"))
    reward = tiny_policy(tmp_path / "reward", scalar_head=True)
    with pytest.raises(ValueError, match="is a reward model"):
        evaluate_tasks(str(reward), settings)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match="tasks same: "):
        evaluate_tasks(str(tiny_policy(tmp_path / "model")), settings)


def test_without_the_harness_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package lm_eval: pip install .*\[eval\]"):
        evaluate_tasks("x", TaskSettings(("same",)))
