"""The best model of each capability answers its prompts, and the data of rounds follows a curriculum."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_post.config.load import ConfigError
from megatron_post.inference.failures import write_failures
from megatron_post.inference.generate import Generate
from megatron_post.inference.prompts import read_prompts
from megatron_post.rounds import round_actions
from megatron_post.rounds.checks import check_files
from megatron_post.rounds.round import Round
from megatron_post.rounds.settings import RoundSettings, load_round
from megatron_post.rounds.steps import all_steps
from megatron_post.rounds.validation import best_by_capability
from megatron_post.storage.files import read_lines, write_json, write_lines
from tests.unit.rounds.models import tiny_policy

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
QUIET = Console(quiet=True)
CAPABILITIES = ("code", "math", "", "code", "math", "chat")


def _settings(tmp_path: Path, *values: str) -> RoundSettings:
    """A round of six prompts, one for each of `CAPABILITIES`, which are also those of validation."""
    prompts = [
        {"prompt": f"What is {i}?", "answer": str(i), **({"capability": c} if c else {})}
        for i, c in enumerate(CAPABILITIES, start=1)
    ]
    for name in ("prompts", "validation", "held_out"):
        write_lines(tmp_path / f"{name}.jsonl", prompts)
    own = {f"data.{name}": f"{tmp_path / name}.jsonl" for name in ("prompts", "validation", "held_out")}
    own |= {"run_dir": str(tmp_path / "run"), "data.prompts_per_round": "null", "rounds": "3"}
    own |= dict(value.split("=", 1) for value in values)
    return load_round(CONFIGS / "tiny" / "round.yaml", [f"{key}={value}" for key, value in own.items()])


def _drawn(settings: RoundSettings, number: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The model and the prompts' numbers of each call of `generate`, in the step that draws samples."""
    calls = []

    def draw(asked: Generate, output: Path, **_: Any) -> None:
        limits = {"skip": asked.skip, "limit": asked.max_prompts, "capabilities": asked.capabilities}
        numbers = [prompt.number for prompt in read_prompts(asked.prompts, **limits)]
        calls.append((asked.model, numbers))
        write_lines(output, [{"by": asked.model, "prompt": number} for number in numbers])
        write_failures(output, [{"prompt": 0, "by": asked.model}])

    monkeypatch.setattr(round_actions, "generate", draw)
    round_actions.generate_samples(Round(settings, number, QUIET))
    return calls


def test_a_model_answers_the_prompts_of_its_capabilities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In round 1 an expert answers code. In round 2 the best models of round 1 for code and math answer."""
    settings = _settings(
        tmp_path,
        "start.policies={code: expert}",
        "generate.by_capability=true",
        "generate.previous_samples=0",
    )
    policy = settings.start.policy
    assert _drawn(settings, 1, monkeypatch) == [("expert", [1, 4]), (policy, [2, 3, 5, 6])]
    first = Round(settings, 1, QUIET)
    rows = list(read_lines(first.directory / "samples.jsonl"))
    assert [row["prompt"] for row in rows] == [1, 4, 2, 3, 5, 6]
    by_capability = {"code": {"best": "sft"}, "math": {"best": "dpo"}, "chat": {"best": "average"}}
    write_json(first.directory / "choice.json", {"best": "average", "by_capability": by_capability})
    assert _drawn(settings, 2, monkeypatch) == [("sft", [1, 4]), ("dpo", [2, 5]), ("average", [3, 6])]
    other = settings.model_copy(
        update={"generate": settings.generate.model_copy(update={"by_capability": False})}
    )
    (first.directory.parent / "round-02").rename(tmp_path / "gone")
    assert _drawn(other, 2, monkeypatch) == [("average", [1, 2, 3, 4, 5, 6])]


def test_all_files_of_models_are_removed_before_a_repetition(tmp_path: Path) -> None:
    settings = _settings(tmp_path, "start.policies={code: expert}", "generate.by_capability=true")
    outputs = {step.name: [path.name for path in step.outputs] for step in all_steps(settings, QUIET)}
    assert {"samples-policy-1.jsonl", "samples-policy-4.jsonl"} <= set(outputs["round-02/generate"])
    assert "collected-2.jsonl" in outputs["round-01/collect"]


def test_the_best_model_of_each_capability(tmp_path: Path) -> None:
    """SFT is right on code, and DPO on math. On chat all are right, and the later one wins.

    One answer of the average to code failed, which counts as wrong.
    """
    settings = _settings(tmp_path, "generate.by_capability=true")
    r = Round(settings, 1, QUIET)
    right = {"sft": {1, 4, 6}, "dpo": {2, 5, 6, 1}, "average": {4, 2, 6}}
    answers = {name: tmp_path / f"{name}.jsonl" for name in right}
    for name, numbers in right.items():
        rows = []
        for number in (n for n in range(1, 7) if (name, n) != ("average", 1)):
            text = f"The answer is {number if number in numbers else 99}."
            messages = [("user", f"What is {number}?"), ("assistant", text)]
            row = {"prompt": number, "sample": 0, "checkpoint": name, "seed": 0, "tokens": 1}
            said = [{"role": role, "content": content} for role, content in messages]
            rows.append({**row, "finish": "stop", "messages": said})
        write_lines(answers[name], rows)
    write_failures(answers["average"], [{"prompt": 1, "sample": 0, "reason": "no"}])
    found = best_by_capability(r, {name: f"models/{name}" for name in right}, answers)
    assert {name: each["stage"] for name, each in found.items()} == {
        "chat": "average", "code": "sft", "math": "dpo",
    }  # fmt: skip
    assert found["code"]["validation"] == {"sft": 1.0, "dpo": 0.5, "average": 0.5}
    write_json(r.directory / "choice.json", {"best": "b", "by_capability": found})
    assert Round(settings, 2, QUIET).policies["code"] == "models/sft"


def test_a_curriculum(tmp_path: Path) -> None:
    """Round 1 uses all sources as they are. From round 2 on the prompts and the mixture are others."""
    hard = tmp_path / "hard.jsonl"
    write_lines(hard, [{"prompt": f"Hard {i}?", "answer": "1"} for i in range(4)])
    policy = tiny_policy(tmp_path / "policy")
    sources = [{"name": name, "path": f"{name}.jsonl", "epochs": 2.0} for name in ("human", "code")]
    phases = [
        {"from_round": 2, "mix": {"selected": 4, "code": 1}},
        {"from_round": 3, "prompts": str(hard), "mix": {"selected": 1}},
    ]
    settings = _settings(
        tmp_path,
        *(f"start.{name}={policy}" for name in ("policy", "base")),
        f"data.sft={json.dumps(sources)}",
        f"data.curriculum={json.dumps(phases)}",
        *(f"stages.{name}={CONFIGS / 'tiny' / f'round_{name}.yaml'}" for name in ("reward", "sft", "dpo")),
        "data.prompts_per_round=2",
    )
    rounds = [Round(settings, number, QUIET) for number in (1, 2, 3)]
    found = [{s.name: (s.weight, s.epochs) for s in r.stage_config("sft").data.sources} for r in rounds[:1]]
    assert found == [{"round-01": (None, None), "human": (None, 2.0), "code": (None, 2.0)}]
    # a round's sources do not depend on the models that exist
    second, third = ({s.name: s.weight for s in r.similar_run("sft").data.sources} for r in rounds[1:])
    assert second == {"round-01": 2.0, "round-02": 2.0, "code": 1.0}
    assert third == {f"round-0{n}": pytest.approx(1 / 3) for n in (1, 2, 3)}
    assert [Path(r.prompts["prompts"]).name for r in rounds] == ["prompts.jsonl"] * 2 + ["hard.jsonl"]
    assert [r.prompts["skip"] for r in rounds] == [0, 2, 0]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["data.curriculum=[{from_round: 2}, {from_round: 2}]"], "curriculum.1.from_round=2 is not after"),
        (["data.curriculum=[{from_round: 1, mix: {hmuan: 1}}]"], "'hmuan' is neither a source of data.sft"),
        (["data.curriculum=[{from_round: 1, mix: {selected: 0}}]"], "mix"),
        (
            ["generate.by_capability=true", "data.validation=null"],
            "generate.by_capability=true has no effect",
        ),
        (
            [
                "data.curriculum=[{from_round: 1, mix: {selected: 1}}]",
                "stages.sweep={sft: [{}, {mix: {selected: 1}}]}",
            ],
            "contradicts that of data.curriculum",
        ),
    ],
)
def test_wrong_settings(tmp_path: Path, values: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        _settings(tmp_path, *values)


def test_capabilities_without_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    policy = tiny_policy(tmp_path / "policy")
    models = [f"start.policy={policy}", f"start.base={policy}"]
    settings = _settings(tmp_path, *models, "start.policies={coed: expert}")
    with pytest.raises(ValueError, match=r"start.policies: no prompt of .* has the capability 'coed' \(did"):
        check_files(settings)
    settings = _settings(tmp_path, *models, "generate.by_capability=true")
    write_lines(tmp_path / "validation.jsonl", [{"prompt": "1?", "answer": "1"}])
    with pytest.raises(ValueError, match=r"validation.jsonl: no prompt has a `capability`"):
        check_files(settings)


def test_prompts_of_capabilities(tmp_path: Path) -> None:
    """The range comes first, and the capabilities choose among its prompts."""
    _settings(tmp_path)
    file = tmp_path / "prompts.jsonl"
    found = read_prompts(file, skip=1, limit=4, capabilities=("math", ""))
    assert [prompt.number for prompt in found] == [2, 3, 5]
    with pytest.raises(ValueError, match=r"none has a capability among \['tools'\]"):
        read_prompts(file, capabilities=("tools",))
