"""Rounds as a user runs them: whole, repeated from a step, as a chain, and with wrong settings.

Kills are in tests/faults/test_round_kills.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from megatron_post.config.chain import load_chain
from megatron_post.convert.configs import read_model
from megatron_post.data.tokenizer import load_tokenizer
from megatron_post.rounds import round_actions
from megatron_post.rounds import run as run_module
from megatron_post.rounds.chain import chain_of, write_chain
from megatron_post.rounds.round import Round
from megatron_post.rounds.run import run_rounds
from megatron_post.rounds.settings import load_round
from megatron_post.rounds.state import state_of
from megatron_post.rounds.steps import all_steps
from megatron_post.storage.files import read_lines
from tests.e2e.runs import start
from tests.unit.rounds.models import tiny_policy


def _policy(directory: Path) -> Path:
    """Random weights that stop after a few tokens, because the logit of the last stop token is extreme."""
    tiny_policy(directory)
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"][load_tokenizer(directory).stop_ids[-1]] *= 5
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def round_file(directory: Path, **changes: Any) -> Path:
    """A round on 12 prompts, with two optimizer steps in each stage and a checkpoint at each step."""
    directory.mkdir(parents=True)
    prompts = [{"prompt": f"a b {i}", "answer": str(i), "solution": f"It is {i}."} for i in range(12)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    for stage in ("reward", "sft", "dpo"):
        values: dict[str, Any] = {
            "data": {"pack_length": 256, "overlong": "drop"},
            "precision": {"dtype": "fp32"},
            "optimizer": {"lr": 1e-4, "schedule": "constant"},
            "train": {"steps": 2, "global_batch": 1},
            "checkpoint": {"every": 1},
        }
        if stage != "sft":
            values["data"]["preferences"] = {"min_rating": None, "max_similarity": 1.0}
        (directory / f"{stage}.yaml").write_text(yaml.safe_dump(values))
    prompt_file = str(directory / "prompts.jsonl")
    settings: dict[str, Any] = {
        "run_dir": str(directory / "run"),
        "start": {"policy": str(_policy(directory / "policy"))},
        "data": {
            "prompts": prompt_file,
            "prompts_per_round": 6,
            "validation": prompt_file,
            "held_out": prompt_file,
        },
        "generate": {"sampling": {"samples": 4, "max_tokens": 12}, "previous_samples": 1, "part": 2},
        "select": {"verifier": {"kind": "exact", "pattern": r"is (\d+)\."}, "only_correct": False},
        "stages": {stage: str(directory / f"{stage}.yaml") for stage in ("reward", "sft", "dpo")},
        "average": {"weights": {"sft": 1.0, "dpo": 2.0}},
    }
    (directory / "round.yaml").write_text(yaml.safe_dump(settings | changes))
    return directory / "round.yaml"


def _kept(directory: Path) -> dict[str, Any]:
    """The results that a round must have in any case: rows without their paths, and weights."""
    r = directory / "run" / "round-01"
    files = ["collected.jsonl", "samples.jsonl", "selection/sft.jsonl", "selection/preferences.jsonl"]
    rows = {f: [json.dumps(row).replace(str(directory), "") for row in read_lines(r / f)] for f in files}
    scores = {f: (r / f).read_text() for f in ("scores.jsonl", "held_out-scores.jsonl")}
    return {**rows, **scores, "weights": load_file(r / "average" / "model.safetensors")}


def _assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert {k: v for k, v in a.items() if k != "weights"} == {k: v for k, v in b.items() if k != "weights"}
    assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one round that ran without interruption."""
    directory = tmp_path_factory.mktemp("rounds") / "whole"
    log = directory.parent / "log"
    process = start(["round", str(round_file(directory))], ranks=1, log=log)
    assert process.wait(600) == 0, log.read_text()[-5000:]
    return directory


@pytest.mark.slow
def test_a_round_writes_all_its_files(whole: Path) -> None:
    r = whole / "run" / "round-01"
    samples = list(read_lines(r / "samples.jsonl"))
    assert [(row["prompt"], row["sample"]) for row in samples] == [
        (p, k) for p in range(1, 7) for k in range(4)
    ]
    done = json.loads((whole / "run" / "state.json").read_text())["done"]
    settings = load_round(whole / "round.yaml")
    assert list(done) == [step.name for step in all_steps(settings, Console(quiet=True))]
    evaluation = json.loads((r / "evaluation.json").read_text())
    assert evaluation["greedy"]["total"] == evaluation["best_of_k"]["total"] == 12
    assert evaluation["one_sample"]["total"] == 48 and evaluation["k"] == 4
    page = (r / "report.html").read_text()
    assert page.count("<svg") >= 7 and "http:" not in page and "https:" not in page and "<script" not in page
    sft, average = load_file(r / "sft/hf/model.safetensors"), load_file(r / "average/model.safetensors")
    dpo = load_file(r / "dpo/hf/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(average[name], (sft[name] + 2 * dpo[name]) / 3)
    first = json.loads((r / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    # policy and reference agree at step 0: ln 2 + 0.2 NLL
    assert first["loss"] == pytest.approx(0.693147 + 0.2 * first["nll"], abs=1e-4)


@pytest.mark.slow
def test_a_round_waits_for_people(tmp_path: Path) -> None:
    """It ends with one message after the export. With the answers it continues, and DPO gets only these."""
    tiny = _policy(tmp_path / "earlier")
    weights = load_file(tiny / "model.safetensors")
    weights["model.embed_tokens.weight"] = -weights["model.embed_tokens.weight"]
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    file = round_file(tmp_path / "round", annotate={})
    words = ["round", str(file), f"start.previous={tiny}", "annotate.enough=2"]
    r = tmp_path / "round" / "run" / "round-01"
    process = start(words, ranks=1, log=tmp_path / "log")
    assert process.wait(600) == 2, (tmp_path / "log").read_text()[-5000:]
    log = (tmp_path / "log").read_text()
    assert "megatron-post: waiting for people: 0 of" in log and "Traceback" not in log
    pairs = list(read_lines(r / "annotate" / "pairs.jsonl"))
    origins = list(read_lines(r / "annotate-key.jsonl"))
    policy = str(tmp_path / "round" / "policy")
    # Some responses of random weights are cut off, so not every prompt has two checkpoints' responses.
    assert {policy, str(tiny)} in [{o["a"]["checkpoint"], o["b"]["checkpoint"]} for o in origins]
    rows = [
        {"pair": pairs[0]["pair"], "better": "a", "rating": "better", "edited": "a b c."},
        {"pair": pairs[1]["pair"], "better": "b", "rating": "slightly_better"},
    ]
    (r / "answers" / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    process = start(words, ranks=1, log=tmp_path / "log")
    assert process.wait(600) == 0, (tmp_path / "log").read_text()[-5000:]
    first, second = read_lines(r / "annotated.jsonl")
    assert "<h2>Preferences of people</h2>" in (r / "report.html").read_text()
    assert first["edited"][0]["content"] == "a b c." and second["chosen"][0]["content"] == pairs[1]["b"]
    for stage in ("reward", "dpo"):
        config = yaml.safe_load((r / stage / "config.yaml").read_text())
        assert [source["path"] for source in config["data"]["sources"]] == [str(r / "annotated.jsonl")]
    # The same settings with fewer answers, and a step that is repeated, keep what people have sent.
    again = [*words[:-1], "annotate.enough=1", "--again-from", "round-01/report"]
    process = start(again, ranks=1, log=tmp_path / "log")
    assert process.wait(600) == 0, (tmp_path / "log").read_text()[-5000:]
    assert (r / "answers" / "answers.jsonl").is_file()


@pytest.mark.slow
def test_repeated_from_a_step(whole: Path) -> None:
    """Averaging and all steps after it run again with the same result. The steps before are not touched."""
    before = _kept(whole)
    selected = (whole / "run" / "round-01" / "selection" / "sft.jsonl").stat().st_mtime_ns
    log = whole.parent / "again"
    process = start(
        ["round", str(whole / "round.yaml"), "--again-from", "round-01/average"], ranks=1, log=log
    )
    assert process.wait(600) == 0, log.read_text()[-5000:]
    assert "round-01/average" in log.read_text() and "round-01/select" not in log.read_text()
    _assert_same(before, _kept(whole))
    assert (whole / "run" / "round-01" / "selection" / "sft.jsonl").stat().st_mtime_ns == selected


@pytest.mark.slow
def test_copies_sample_the_same(whole: Path) -> None:
    """Two copies of the model share the sampling of a step: the samples, and the choice of one."""
    names = ["choice.json", *(f"validation-{name}.jsonl" for name in ("sft", "dpo", "average"))]
    names += ["held_out.jsonl", "held_out-start.jsonl", "held_out-samples.jsonl"]
    files = [whole / "run" / "round-01" / name for name in names]
    before, log = [file.read_bytes() for file in files], whole.parent / "copies"
    again = ["--again-from", "round-01/choose", "generate.copies=2"]
    assert start(["round", str(whole / "round.yaml"), *again], ranks=1, log=log).wait(600) == 0, (
        log.read_text()
    )
    assert [file.read_bytes() for file in files] == before
    output = (whole / "run" / "round-01" / "choose.log").read_text()
    for answers in files[1:]:
        assert all(f"rank {rank} of 2: {answers}: " in output for rank in (0, 1))
    refused = start(["round", str(whole / "round.yaml"), "generate.copies=2"], ranks=2, log=log).wait(600)
    assert refused and "several ranks can only run one generating step" in log.read_text()


@pytest.mark.slow
def test_a_stage_whose_file_has_changed_is_not_trained_by_the_old_one(whole: Path) -> None:
    """Training reads what packing wrote. The chain and the run refuse to pass over the change."""
    path, config, state = whole / "sft.yaml", whole / "round.yaml", whole / "run" / "state.json"
    text, before, console = path.read_text(), state.read_bytes(), Console(quiet=True)
    path.write_text(text.replace("steps: 2", "steps: 3"))
    try:
        with pytest.raises(
            ValueError, match=r"(?s)sft.yaml differs from .*train.steps: 2 there, 3 here.*undo"
        ):
            run_rounds(config, again_from="round-01/sft-train", console=console)
        assert state.read_bytes() == before and (whole / "run/round-01/sft/hf").is_dir()
        content = json.loads(before)
        done = list(content["done"])[: list(content["done"]).index("round-01/sft-pack") + 1]
        state.write_text(json.dumps(content | {"done": {name: 1.0 for name in done}}))
        with pytest.raises(ValueError, match="accept it with --again-from round-01/sft-pack"):
            chain_of(config, (), console=console)
        path.write_text(text)
        assert chain_of(config, (), console=console).steps[0].name == "round-01/sft-train"
    finally:
        path.write_text(text)
        state.write_bytes(before)


@pytest.mark.slow
def test_a_packing_that_was_killed_leaves_nothing(whole: Path) -> None:
    stage = whole / "run" / "round-01" / "sft"
    (stage / ".store.1.partial" / "train").mkdir(parents=True)
    round_actions.pack(Round(load_round(whole / "round.yaml"), 1, Console(quiet=True)), "sft")
    assert not list(stage.glob(".store.*"))


def test_the_chain_has_the_same_steps(tmp_path: Path) -> None:
    """Each step is a job that waits for the one before. Training steps are `train` on their ranks."""
    config = round_file(tmp_path / "round")
    count = write_chain(config, ["rounds=2"], tmp_path / "chain.yaml", console=Console(quiet=True))
    chain = load_chain(tmp_path / "chain.yaml")
    names = [step.name for step in chain.ordered()]
    assert count == len(names) and names[0] == "round-01/collect" and names[-1] == "round-02/report"
    assert "round-02/collect" not in names
    by_name = {step.name: step for step in chain.steps}
    train = by_name["round-02/dpo-train"]
    assert train.command == ("train", str(tmp_path / "round/run/round-02/dpo/config.yaml"))
    assert train.run_dir == str(tmp_path / "round/run/round-02/dpo")
    policy = load_round(config).start.policy
    shape = read_model(Path(policy)).model_copy(update={"init_from": policy})
    assert train.like is not None and (train.like.stage, train.like.model) == ("dpo", shape)
    assert chain == chain_of(config, ["rounds=2"], console=Console(quiet=True))
    assert by_name["round-02/select"].command == (
        "round", str(config), "--only", "round-02/select", "rounds=2",
    )  # fmt: skip
    assert all(step.after == ((names[i - 1],) if i else ()) for i, step in enumerate(chain.ordered()))


def test_nodes_of_a_chain(tmp_path: Path) -> None:
    """Copies of the model fill nodes by their GPUs. Scores and the reference are computed on all ranks."""
    config, console = round_file(tmp_path / "round"), Console(quiet=True)
    for stage in ("reward", "sft", "dpo"):
        path = tmp_path / "round" / f"{stage}.yaml"
        path.write_text(path.read_text().replace("global_batch: 1", "global_batch: 32"))
    backend = "generate.backend={kind: vllm, tensor_parallel: 4}"
    for copies, placed in ((1, (1, 1)), (2, (1, 2)), (16, (8, 2))):
        overrides = [backend, f"generate.copies={copies}", "ranks=16"]
        steps = chain_of(config, overrides, console=console).steps
        nodes = {s.name.removeprefix("round-01/"): (s.nodes, s.ranks_per_node) for s in steps}
        assert nodes["collect"] == nodes["generate"] == nodes["choose"] == placed
        assert nodes["score"] == nodes["reference"] == nodes["dpo-train"] == (2, 8)
        assert nodes["select"] == nodes["average"] == (1, 1)
    with pytest.raises(ValueError, match=r"collect needs 3 ranks, which do not fill nodes of 2"):
        chain_of(config, [backend, "generate.copies=3"], console=console)


def test_a_chain_starts_after_finished_steps(tmp_path: Path) -> None:
    """Jobs on ranks write nothing to the state. The jobs between them do."""
    config, console = round_file(tmp_path / "round"), Console(quiet=True)
    names = [step.name for step in chain_of(config, (), console=console).steps]
    assert not (tmp_path / "round" / "run").exists()
    state = state_of(load_round(config))
    for name in ("round-01/collect", "round-01/select"):
        state.finish(name, 1.0)
    rest = chain_of(config, (), console=console).steps
    assert [step.name for step in rest] == names[names.index("round-01/sft-pack") :]
    assert rest[0].after == () and rest[1].after == ("round-01/sft-pack",)
    state.finish("round-01/report", 1.0)
    with pytest.raises(ValueError, match="every step is done"):
        chain_of(config, (), console=console)
    more = chain_of(config, ["rounds=2"], console=console).steps
    assert more[0].name == "round-02/reward-pack"


def test_wrong_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, console = round_file(tmp_path / "round"), Console(quiet=True)
    tiny_policy(tmp_path / "other", scalar_head=True, text="x y z q w e r t")
    cases = [
        (["generate.sampling.samples=0"], "generate.sampling.samples: .*greater than 0"),
        ([f"start.reward={tmp_path / 'other'}"], "start.reward=.*another tokenizer"),
        (["select.verifier=null"], "the first reward model has no data"),
        (["start.policy=/nowhere"], "start.policy=/nowhere: no such directory"),
        (["round=3"], "round: unknown key"),
        (["ranks=3"], r"stages.reward on ranks=3: .*global_batch=1"),
        (["average.method=slerp", "average.weights.policy=1"], "slerp merges two models, not 3"),
        (["average.weights.sft=0"], r"average.weights.sft: .*greater than 0"),
        (["generate.sampling.seed=3"], "a round uses its own `seed`"),
        ([f"start.preferences=[{tmp_path / 'none.jsonl'}]"], "none.jsonl"),
        (["select.cleaning=/no/rules"], "config file /no/rules does not exist"),
        (["generate.backend={kind: server, url: 'http://x/v1', served_model: m}"], "a server has one model"),
        ([f"data.held_out={tmp_path / 'unanswered'}"], "data.held_out=.*line 1 has no `answer`"),
        ([f"data.validation={tmp_path / 'empty'}"], "no prompt in it"),
        ([f"stages.dpo={tmp_path / 'dpo.yaml'}"], "optimizer.lr: .*greater than 0"),
        ([f"stages.sft={tmp_path / 'sft.yaml'}"], r"stages.sft: .*content_tokens has <think>.*start.policy="),
        (
            ["generate.sampling.max_tokens=9000"],
            r"data.prompts: the prompt in line 1 has \d+ tokens;",
        ),
        (["generate.backend={kind: vllm}"], "generate.backend: vllm is not installed"),
    ]
    (tmp_path / "unanswered").write_text('{"prompt": "Why?"}\n')
    (tmp_path / "empty").touch()
    (tmp_path / "dpo.yaml").write_text("optimizer: {lr: -1}")
    sft = {"base": load_round(config).stages.sft, "tokenizer": {"content_tokens": ["<think>"]}}
    (tmp_path / "sft.yaml").write_text(json.dumps(sft))
    for overrides, message in cases:
        with pytest.raises(ValueError, match=message):
            run_rounds(config, overrides, console=console)
    assert not (tmp_path / "round" / "run").exists()
    with pytest.raises(ValueError, match=r"'round-01/rest' \(did you mean 'round-01/report'\?\); steps are"):
        run_rounds(config, console=console, only="round-01/rest")
    monkeypatch.setattr(run_module, "rank_from_environment", lambda: (1, 2, 1))
    for options, message in (
        ({}, "give --only and one of round-01/collect, round-01/generate, round-01/choose;"),
        ({"only": "round-01/select"}, "several ranks can only run one generating step"),
        ({"only": "round-01/choose", "again_from": "round-01/choose"}, "--again-from is for one process"),
    ):
        with pytest.raises(ValueError, match=message):
            run_rounds(config, console=console, **options)  # type: ignore[arg-type]
    monkeypatch.undo()
    prompts = tmp_path / "round" / "prompts.jsonl"
    good = prompts.read_text()
    prompts.write_text('{"prompt": "fine", "answer": "1"}\n{broken\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: not JSON"):
        run_rounds(config, console=console)
    assert not (tmp_path / "round" / "run").exists()
    prompts.write_text(good)
    settings = load_round(config)
    state_of(settings)
    state_of(settings.model_copy(update={"rounds": 3, "ranks": 2}))  # may change
    with pytest.raises(ValueError, match="of a run with other seed"):
        run_rounds(config, ["seed=5"], console=console)
