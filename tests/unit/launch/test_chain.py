"""Chains are sorted by their dependencies, and impossible chains are refused with every reason."""

from pathlib import Path

import pytest
import typer

from megatron_post.cli import app
from megatron_post.config.chain import load_chain
from megatron_post.config.load import ConfigError, load_config, to_yaml
from megatron_post.launch.allocation import chained_jobs
from megatron_post.launch.chain import chain_findings, command_findings
from megatron_post.launch.cluster import Cluster

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def _write(directory: Path, steps: str) -> Path:
    (directory / "chain.yaml").write_text(f"run_dir: runs/round\nsteps:\n{steps}")
    return directory / "chain.yaml"


def test_steps_are_sorted_by_dependency(tmp_path: Path) -> None:
    """Each step comes after its predecessors. Otherwise the order of the file is kept."""
    chain = load_chain(
        _write(
            tmp_path,
            "  - {name: dpo, command: [train, d.yaml], after: [reference], nodes: 2, run_dir: runs/dpo}\n"
            "  - {name: pack, command: [data, pack, s.yaml], ranks_per_node: 1}\n"
            "  - {name: reference, command: [reference, s], after: [sft]}\n"
            "  - {name: sft, command: [train, s.yaml], after: [pack]}\n",
        )
    )
    jobs = {each.job.name: each.job for each in chained_jobs(chain, Cluster(cpus_per_node=8), tmp_path)}
    assert list(jobs) == ["pack", "sft", "reference", "dpo"]
    assert (jobs["dpo"].nodes, jobs["dpo"].run_dir, jobs["sft"].run_dir) == (2, "runs/dpo", "runs/round")
    assert (jobs["pack"].ranks_per_node, jobs["sft"].ranks_per_node) == (1, None)


def test_all_errors_are_reported_together(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        "  - {name: a, command: [train, x], after: [gone]}\n  - {name: a, command: [train, y]}\n",
    )
    with pytest.raises(ConfigError) as error:
        load_chain(path)
    assert "step 'a' is named twice" in str(error.value)
    assert "step 'a' comes after 'gone', which is not a step" in str(error.value)
    path = _write(tmp_path, '  - {name: a, command: [], nods: 2}\n  - {name: "b\\n", command: [x]}\n')
    with pytest.raises(ConfigError) as error:
        load_chain(path)
    message = str(error.value)
    assert "steps.0.command: " in message and "steps.0.nods: unknown key" in message
    assert "steps.1.name: 'b\\n' holds a newline" in message


def test_like_checks_a_step_without_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is checked by another's layout and model: 70B without context parallelism is 1.9 GiB too much on 8
    nodes, and three checkpoints of 70,553,706,496 x 14 bytes are too much for any disk here."""
    monkeypatch.chdir(tmp_path)
    large = load_config(CONFIGS / "llama3_70b" / "sft.yaml", ["parallel.context=1"])
    (tmp_path / "stage.yaml").write_text(to_yaml(large))
    step = "  - {name: sft, command: [train, made.yaml], nodes: 8, run_dir: run"
    cluster = Cluster(gpus_per_node=8, cpus_per_node=96)
    chain = load_chain(_write(tmp_path, f"{step}, like: [stage.yaml, optimizer.lr=1e-6]}}\n"))
    memory, disk = chain_findings(chain, chained_jobs(chain, cluster, tmp_path), cluster, tmp_path)
    assert memory.startswith("step 'sft': memory, by `megatron-post plan`: does not fit: pipeline rank 0")
    assert disk.startswith("step 'sft': run_dir=run: 3 checkpoints")
    unknown = load_chain(_write(tmp_path, f"{step}}}\n"))
    assert chain_findings(unknown, chained_jobs(unknown, cluster, tmp_path), cluster, tmp_path) == []


def test_like_has_settings_or_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both give the same config. Wrong settings are refused under their own key."""
    monkeypatch.chdir(tmp_path)
    settings = load_config(CONFIGS / "tiny" / "dpo.yaml", ["train.steps=7"])
    (tmp_path / "stage.yaml").write_text(to_yaml(settings))
    step = "  - {name: sft, command: [train, made.yaml], like: "
    by_arguments = load_chain(_write(tmp_path, f"{step}[stage.yaml, train.steps=7]}}\n"))
    written = to_yaml(by_arguments.model_dump(mode="json", exclude_defaults=True))
    (tmp_path / "written.yaml").write_text(written)
    assert load_chain(tmp_path / "written.yaml") == by_arguments
    assert by_arguments.steps[0].like == settings
    for like, message in (
        ("[none.yaml]", "steps.0.like: config file none.yaml does not exist"),
        ("[stage.yaml, train.steps=0]", "train.steps: Input should be greater than 0"),
        ("[1]", "steps.0.like: a list here has the arguments of `train`"),
        ("{train: {stpes: 1}}", "steps.0.like.train.stpes: unknown key"),
    ):
        with pytest.raises(ConfigError) as error:
            load_chain(_write(tmp_path, f"{step}{like}}}\n"))
        assert message in str(error.value)
    with pytest.raises(ConfigError, match="like: it has no effect with command score, only with train"):
        load_chain(_write(tmp_path, "  - {name: a, command: [score, x], like: [stage.yaml]}\n"))


def test_commands_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    """The arguments of each step are parsed as on the nodes. The findings name the right commands."""
    right = ("train, c.yaml, seed=1", "data, pack, c.yaml", "plan, c.yaml, --gpus, '8'", "--debug, doctor")
    wrong = {
        "trian, c.yaml": "no command 'trian' (did you mean 'train'?); commands are annotate, bench, ",
        "megatron-post, train": "no command 'megatron-post'",
        "data, pak, c.yaml": "no command 'pak' (did you mean 'pack'?); commands are pack, prompt, show",
        "data": "no command; commands are pack",
        "train": "Missing argument 'CONFIG'",
        "score, m, f": "Missing option '--output'",
        "score, m, f, --outptu, x": "No such option: --outptu",
    }
    steps = "".join(f"  - {{name: s{i}, command: [{text}]}}\n" for i, text in enumerate((*right, *wrong)))
    found = command_findings(load_chain(_write(tmp_path, steps)), typer.main.get_command(app))
    assert len(found) == len(wrong)
    for number, (text, finding) in enumerate(zip(wrong.values(), found, strict=True), start=len(right)):
        assert finding.startswith(f"step 's{number}': ") and text in finding


def test_a_cycle_is_refused(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        "  - {name: a, command: [x], after: [c]}\n  - {name: b, command: [x], after: [a]}\n"
        "  - {name: c, command: [x], after: [b]}\n  - {name: d, command: [x]}\n",
    )
    with pytest.raises(ConfigError, match="steps wait for each other: a, b, c"):
        load_chain(path)
