"""A sweep trains a stage several times in a round, and averages the models."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megatron_post.cli import app
from megatron_post.config.chain import Chain, load_chain
from megatron_post.config.load import ConfigError, parse, to_yaml
from megatron_post.launch.allocation import chained_jobs
from megatron_post.launch.cluster import Cluster
from megatron_post.launch.script import render
from megatron_post.rounds import round_actions
from megatron_post.rounds.chain import chain_of
from megatron_post.rounds.round import Round
from megatron_post.rounds.settings import RoundSettings, load_round
from megatron_post.rounds.steps import all_steps
from megatron_post.rounds.sweep import Variant
from tests.unit.rounds.models import tiny_policy

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SFT = [
    {"set": {"optimizer.lr": 1e-3}},
    {"set": {"optimizer.lr": 2e-3, "optimizer.schedule": "linear"}, "weight": 3},
    {"mix": {"selected": 2, "human": 1}},
]
QUIET = Console(quiet=True)


def _settings(tmp_path: Path, sweep: dict[str, Any], *more: str) -> RoundSettings:
    human = json.dumps([{"name": "human", "path": str(tmp_path / "human.jsonl")}])
    values = [f"run_dir={tmp_path / 'run'}", f"stages.sweep={json.dumps(sweep)}", f"data.sft={human}"]
    return load_round(CONFIGS / "tiny" / "round.yaml", [*values, *more])


def _names(settings: RoundSettings) -> list[str]:
    return [step.name.removeprefix("round-01/") for step in all_steps(settings, QUIET)]


def test_each_variant_is_trained_and_the_models_are_averaged(tmp_path: Path) -> None:
    names = _names(_settings(tmp_path, {"sft": SFT}))
    begin = names.index("sft-pack")
    expected = ["sft-pack", "sft-train-1", "sft-train-2", "sft-train-3", "sft-merge", "dpo-pack"]
    assert names[begin : begin + 6] == expected and "dpo-train" in names


def test_configs_of_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of `set` have priority, and `mix` gives shares. Variants with the same data share a store.

    In round 2 the selected rows of both rounds share the part of `selected`.
    """
    monkeypatch.chdir(CONFIGS.parent)
    policy = tiny_policy(tmp_path / "policy")
    settings = _settings(tmp_path, {"sft": SFT}, f"start.policy={policy}", f"start.base={policy}", "rounds=2")
    second = Round(settings, 2, QUIET)
    configs = [second.stage_config("sft", number) for number in range(3)]
    assert [config.optimizer.lr for config in configs] == [1e-3, 2e-3, 4e-3]
    assert [config.optimizer.schedule for config in configs] == ["cosine", "linear", "cosine"]
    stores = [Path(config.data.store).relative_to(second.directory) for config in configs]
    assert stores == [Path("sft/store"), Path("sft/store"), Path("sft/variant-3/store")]
    assert [Path(config.run_dir).name for config in configs] == ["variant-1", "variant-2", "variant-3"]
    weights = [{source.name: source.weight for source in config.data.sources} for config in configs]
    assert weights[0] == {"round-01": None, "round-02": None, "human": None}
    assert weights[2] == {"round-01": 1.0, "round-02": 1.0, "human": 1.0}


def test_the_average_has_the_weights_of_the_variants(tmp_path: Path) -> None:
    """Weights of 1 and 3: the average is a quarter of the first and three quarters of the second."""
    settings = _settings(tmp_path, {"sft": SFT[:2]})
    r = Round(settings, 1, QUIET)
    weights = []
    for number, directory in enumerate(r.run_dirs("sft")):
        tiny_policy(directory / "hf")
        file = directory / "hf" / "model.safetensors"
        tensors = {name: value + number for name, value in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        weights.append(tensors)
    round_actions.merge_variants(r, "sft")
    found = load_file(r.directory / "sft" / "hf" / "model.safetensors")
    for name, value in found.items():
        torch.testing.assert_close(value, weights[0][name] / 4 + weights[1][name] * 3 / 4)


@pytest.mark.parametrize(("stage", "layout"), [("reward", "separate"), ("dpo", "isolated")])
def test_another_layout_of_rows_needs_another_store(stage: str, layout: str) -> None:
    assert Variant(set={f"{stage}.layout": layout}).packs_alone
    assert not Variant(set={"optimizer.lr": 1e-6}).packs_alone


def test_each_store_of_dpo_has_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    sweep = {"dpo": [{"set": {"dpo.beta": 0.2}}, {"set": {"data.preferences.min_rating": None}}]}
    names = _names(_settings(tmp_path, sweep))
    assert [name for name in names if "reference" in name] == ["reference-1", "reference-2"]


@pytest.mark.parametrize(
    ("sweep", "reason"),
    [
        ({"sft": SFT[:1]}, "stages.sweep: sft has one variant"),
        ({"sft": [SFT[0], SFT[0]]}, "sft.1 trains what variant 0 trains"),
        ({"sft": [{}, {"set": {"run_dir": "x"}}]}, "sft.1.set: the round sets run_dir"),
        ({"sft": [{}, {"set": {"data.sources": []}}]}, "the round sets data.sources"),
        ({"sft": [{}, {"set": {"parallel.tensor": 2}}]}, "parallel.tensor is the same for all variants"),
        ({"dpo": [{}, {"set": {"dpo.reference": "frozen"}}]}, "dpo.reference is the same for all"),
        ({"dpo": [{}, {"mix": {"selected": 1}}]}, "dpo.1.mix has no effect"),
        ({"sft": [{}, {"mix": {"selected": 1}}]}, "mix names selected; it must name all of human, selected"),
        ({"sft": [{}, {"mix": {"selected": 0, "human": 1}}]}, "mix"),
        ({"sft": [{}, {"wieght": 1}]}, "wieght"),
    ],
)
def test_wrong_sweeps(tmp_path: Path, sweep: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        _settings(tmp_path, sweep)


def test_a_key_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    policy = tiny_policy(tmp_path / "policy")
    sweep = {"sft": [{}, {"set": {"optimizer.lrr": 1}}]}
    settings = _settings(tmp_path, sweep, f"start.policy={policy}", f"start.base={policy}")
    with pytest.raises(ConfigError, match=r"optimizer.lrr"):
        Round(settings, 1, QUIET).similar_run("sft", 1)


# Slurm


def _chain(tmp_path: Path) -> Chain:
    human = json.dumps([{"name": "human", "path": "human.jsonl"}])
    values = [f"run_dir={tmp_path / 'run'}", f"stages.sweep={json.dumps({'sft': SFT})}", f"data.sft={human}"]
    return chain_of(CONFIGS / "tiny" / "round.yaml", values, console=QUIET, needs_inputs=False)


def test_a_sweep_is_an_array_with_the_merge_behind_it(tmp_path: Path) -> None:
    chain = _chain(tmp_path)
    steps = {step.name.removeprefix("round-01/"): step for step in chain.steps}
    array = steps["sft-train"]
    assert len(array.tasks) == 3 and not array.command and array.after == ("round-01/sft-pack",)
    assert steps["sft-merge"].after == ("round-01/sft-train",)
    assert steps["sft-merge"].command[3] == "round-01/sft-merge"
    # the chain can be written to a file and read again
    (tmp_path / "chain.yaml").write_text(to_yaml(chain.model_dump(mode="json", exclude_defaults=True)))
    assert load_chain(tmp_path / "chain.yaml") == chain


def test_each_task_runs_its_own_command(tmp_path: Path) -> None:
    """bash reads the command and the directory of the task whose number Slurm gives."""
    cluster = Cluster(cpus_per_node=8)
    job = next(
        each.job
        for each in chained_jobs(_chain(tmp_path), cluster, tmp_path)
        if each.job.name == "round-01/sft-train"
    )
    assert job.array == 3 and job.log.name.endswith("%A_%a.log")
    script = render(job, cluster)
    settings = script.split("# >>> settings\n")[1].split("# <<< settings\n")[0]
    for number in range(3):
        shown = subprocess.run(
            ["bash", "-c", settings + 'printf "%s\\n" "$RUN_DIR" "${command[@]}"'],
            env={"SLURM_ARRAY_TASK_ID": str(number), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        directory = tmp_path / "run" / "round-01" / "sft" / f"variant-{number + 1}"
        assert shown == [str(directory), "train", str(directory / "config.yaml")]


def test_the_dry_run_shows_the_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    values = [f"stages.sweep={json.dumps({'dpo': [{}, {'set': {'dpo.beta': 0.2}}]})}"]
    command = ["launch", "round", "configs/tiny/round.yaml", "--cluster", "configs/clusters/local.yaml"]
    result = CliRunner().invoke(app, [*command, "--dry-run", "--", *values], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("# round-01/dpo-train[")]
    assert [line.split()[-1] for line in lines] == [
        f"runs/tiny/round/round-01/dpo/variant-{number}/config.yaml" for number in (1, 2)
    ]
    assert "[n] is task n of an array" in result.output


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ({"name": "a"}, "step 'a' needs either a command or tasks"),
        ({"name": "a", "command": ["x"], "tasks": [{"command": ["y"]}]}, "needs either a command or tasks"),
        ({"name": "a", "tasks": [{}]}, "steps.0.tasks.0.command: "),
    ],
)
def test_wrong_arrays(step: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse(Chain, {"run_dir": "r", "steps": [step]}, origin="chain")
