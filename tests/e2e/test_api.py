"""Every function of `megatron_post.api` on a tiny model returns its result. Wrong input is a `ValueError`."""

import ast
import json
import signal
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_post import api
from megatron_post.config.schema import Config
from megatron_post.train.callbacks import CallbackFailed
from megatron_post.train.run import Trained
from tests.e2e.runs import small_run
from tests.ranks import run_ranks
from tests.unit.rounds.models import tiny_policy

SHORT: dict[str, Any] = {"train": {"steps": 4}, "checkpoint": {"every": 2}}


class Recorder(api.Callback):
    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        assert values["loss"] > 0 and values["tokens_per_second"] > 0
        self.calls.append(("step", step))

    def on_evaluate(self, step: int, values: Mapping[str, float]) -> None:
        assert values["loss"] > 0
        self.calls.append(("evaluate", step))

    def on_save(self, step: int, directory: Path) -> None:
        assert (directory / "manifest.json").is_file()
        self.calls.append(("save", step))


class Stops(api.Callback):
    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        if step == 3:
            raise ZeroDivisionError("no more")


class Asks(api.Callback):
    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        signal.raise_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Trained, Recorder]:
    """A run of 4 steps with two checkpoints and two evaluations."""
    directory = tmp_path_factory.mktemp("api")
    rows = {"eval_sources": [{"name": "held out", "path": str(directory / "rows.jsonl"), "max_rows": 40}]}
    rows["sources"] = [{"name": "sums", "path": str(directory / "rows.jsonl")}]
    data = {"store": str(directory / "store"), **rows}
    config = small_run(directory, data=data, **{**SHORT, "train": {"steps": 4, "eval_every": 2}})
    recorder = Recorder()
    return config, api.train(config, callbacks=[recorder]), recorder


def test_training_returns_metrics_and_paths(trained: tuple[Config, Trained, Recorder]) -> None:
    config, result, recorder = trained
    assert result.is_finished and result.step == 4 and result.run_dir == Path(config.run_dir)
    assert result.checkpoint == result.run_dir / "checkpoints/step-00000004" and result.checkpoint.is_dir()
    assert result.model == result.run_dir / "hf" and (result.model / "config.json").is_file()
    assert result.adapter is None
    assert [line["step"] for line in result.history()] == [1, 2, 3, 4]
    assert result.metrics == result.history()[-1] and result.evaluation["step"] == 4
    steps = [step for kind, step in recorder.calls if kind == "step"]
    assert steps == [1, 2, 3, 4]
    for kind in ("evaluate", "save"):  # a save beside training may be announced steps later
        assert [step for each, step in recorder.calls if each == kind] == [2, 4]


def test_a_finished_run_says_so_and_returns_the_same(
    trained: tuple[Config, Trained, Recorder], capsys: pytest.CaptureFixture[str]
) -> None:
    config, result, _ = trained
    recorder = Recorder()
    assert api.train(config, callbacks=[recorder]) == result
    assert recorder.calls == []
    assert "already finished: all 4 steps are done" in capsys.readouterr().out


def test_a_callback_that_raises_ends_the_run_which_then_resumes(tmp_path: Path) -> None:
    config = small_run(tmp_path, train={"steps": 4}, checkpoint={"every": 2, "asynchronous": False})
    with pytest.raises(CallbackFailed, match=r"Stops\.on_step failed after step 3: ZeroDivisionError: no mo"):
        api.train(config, callbacks=[Stops()])
    recorder = Recorder()
    assert api.train(config, callbacks=[recorder]).step == 4
    assert recorder.calls == [("step", 3), ("step", 4), ("save", 4)]


def test_a_run_that_is_asked_to_stop_returns_and_continues(tmp_path: Path) -> None:
    config = small_run(tmp_path, **SHORT)
    stopped = api.train(config, callbacks=[Asks()])
    assert not stopped.is_finished and stopped.model is None
    assert 0 < stopped.step < 4 and stopped.checkpoint is not None
    assert api.train(config).is_finished


@pytest.mark.parametrize("callback", [print, Recorder, None])
def test_an_object_that_is_no_callback_is_refused(tmp_path: Path, callback: Any) -> None:
    with pytest.raises(ValueError, match=r"callbacks\[1\] is .*derived from"):
        api.train(small_run(tmp_path), callbacks=[Recorder(), callback])
    assert not (tmp_path / "run/checkpoints").exists()
    with pytest.raises(ValueError, match="give a list of callbacks"):
        api.train(tmp_path / "config.yaml", callbacks=callback)


def _calls(path: Path) -> list[tuple[str, int]]:
    recorder = Recorder()
    api.train(api.load_config(path, ["parallel.pipeline=2"]), callbacks=[recorder])
    return recorder.calls


def test_only_the_reporting_rank_calls_callbacks(tmp_path: Path) -> None:
    """With two pipeline stages this is rank 1, which has the loss. Rank 0 publishes the checkpoints."""
    small_run(tmp_path, **SHORT)
    first, last = run_ranks(_calls, 2, tmp_path / "config.yaml")
    assert first == []
    assert sorted(last) == [*(("save", step) for step in (2, 4)), *(("step", step) for step in (1, 2, 3, 4))]


def test_packing_returns_the_store_and_its_groups(trained: tuple[Config, Trained, Recorder]) -> None:
    config = trained[0]
    packed = api.pack(config, overwrite=True, workers=1)
    assert packed.store == Path(config.data.store) and packed.store.is_dir()
    assert [count.rows for count in packed.groups["train"].counts] == [240]
    assert packed.groups["train"].tokens > packed.groups["eval"].tokens > 0
    with pytest.raises(ValueError, match="exists"):
        api.pack(config)


def test_a_model_generates_and_a_reward_model_scores(tmp_path: Path) -> None:
    model, reward = tiny_policy(tmp_path / "model"), tiny_policy(tmp_path / "reward", scalar_head=True)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a b", "1 2 3")))
    settings = {
        "model": str(model),
        "prompts": str(prompts),
        "sampling": {"samples": 2, "max_tokens": 4, "temperature": 1.0},
        "backend": {"kind": "transformers"},
    }
    generated = api.generate(settings, tmp_path / "samples.jsonl")
    assert (generated.written, generated.failed_prompts, generated.failures) == (4, 0, None)
    assert len(generated.output.read_text().splitlines()) == 4
    overrides = ["precision.dtype=fp32", "data.pack_length=256"]
    scored = api.score(reward, generated.output, tmp_path / "scores.jsonl", overrides)
    assert (scored.rows, scored.written, scored.failed_prompts) == (4, 4, 0)
    assert len(scored.output.read_text().splitlines()) == 4
    assert api.score(reward, generated.output, scored.output, overrides).written == 0
    with pytest.raises(ValueError, match="language model without a reward head"):
        api.score(model, generated.output, tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match="samples"):
        api.generate({**settings, "sampling": {"samples": 0}}, tmp_path / "none.jsonl")


def test_weights_are_converted_both_ways_and_merged(tmp_path: Path) -> None:
    model = tiny_policy(tmp_path / "model")
    converted = api.convert(model, tmp_path / "run/checkpoints", to="megatron")
    assert converted.is_complete and converted.directory == tmp_path / "run/checkpoints/step-00000000"
    size = (model / "model.safetensors").stat().st_size
    assert 0 < converted.nbytes <= size
    back = api.convert(tmp_path / "run/checkpoints", tmp_path / "back", to="hf")
    assert back.nbytes == converted.nbytes and (back.directory / "config.json").is_file()
    merged = api.merge({"models": [{"model": str(model)}, {"model": str(back.directory)}]}, tmp_path / "mean")
    assert merged.is_complete and (tmp_path / "mean/model.safetensors").stat().st_size == size
    for options in ({"to": "hf", "dtype": "bf16"}, {"to": "megatron", "step": 3}, {"to": "onnx"}):
        with pytest.raises(ValueError, match=r"leave (it|them) out|choose 'megatron' or 'hf'"):
            api.convert(model, tmp_path / "other", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="merges differences from a base"):
        api.merge({"models": [{"model": "a"}, {"model": "b"}]}, tmp_path / "ties", method="ties")


def test_a_plan_and_its_gpu(tmp_path: Path) -> None:
    config = api.load_config(Path(__file__).parents[2] / "configs/llama3_8b/sft.yaml")
    plan = api.plan(config, gpus=8, gpu="h100-80gb")
    assert plan.time.seconds > 0 and plan.fullest.total > 0
    with pytest.raises(ValueError, match="not in the planner's table"):
        api.plan(config, gpus=8, gpu="abacus")


def test_wrong_settings_are_value_errors(tmp_path: Path) -> None:
    """Each function takes settings as an object, a file or a mapping, and nothing else."""
    functions: list[Any] = [
        api.load_config,
        api.pack,
        api.train,
        lambda settings: api.plan(settings, gpus=8),
        lambda settings: api.generate(settings, tmp_path / "out"),
        lambda settings: api.merge(settings, tmp_path / "out"),
    ]
    for function in functions:
        for settings in (None, 3, ["stage=sft"]):
            with pytest.raises(ValueError, match="are a YAML file or a mapping of keys and values, not"):
                function(settings)
        with pytest.raises(ValueError, match=r"nothing\.yaml does not exist"):
            function(tmp_path / "nothing.yaml")
        with pytest.raises(ValueError, match="stege: unknown key"):
            function({"stege": "sft"})
    with pytest.raises(ValueError, match="gpus=0: give at least 1"):
        api.plan(Path(__file__).parents[2] / "configs/llama3_8b/sft.yaml", gpus=0)


def test_training_in_another_thread_is_refused(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="in the main thread only"):
        pool.submit(api.train, config).result()


def test_a_mapping_is_checked_like_a_file() -> None:
    with pytest.raises(ValueError, match="optimiser"):
        api.load_config({"optimiser": {"lr": 1.0}}, ["train.steps=3"])


def test_the_names_for_the_type_checker_are_those_that_python_finds() -> None:
    tree = ast.parse(Path(api.__file__).read_text())
    imports = {
        (alias.asname or alias.name, f"{node.module}.{alias.name}")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("megatron_post.")
        for alias in node.names
    }
    found = {(name, f"{getattr(api, name).__module__}.{getattr(api, name).__name__}") for name in api.__all__}
    assert found == imports and set(dir(api)) == set(api.__all__)
    with pytest.raises(AttributeError, match="only Callback, convert"):
        _ = api.nothing
