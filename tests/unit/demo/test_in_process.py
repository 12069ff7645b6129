"""The trainer's model compared with the exported one."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_post.config.load import load_config
from megatron_post.data.tokenizer import train_small_tokenizer
from megatron_post.demo.evaluate import answer_with_transformers
from megatron_post.demo.in_process import export_initial_weights, responses_match
from megatron_post.demo.task import make_problems
from tests.ranks import run_ranks

pytest.importorskip("transformers")
CONFIG = Path(__file__).resolve().parents[3] / "configs" / "tiny" / "demo.yaml"


def _compare(run_dir: Path) -> tuple[list[bool], list[bool]]:
    config = load_config(CONFIG, [f"run_dir={run_dir}", "model.num_layers=1", "model.initializer_range=0.2"])
    problems = make_problems(6, side="held_out", seed=2)
    train_small_tokenizer((p.solution for p in problems), 400).save(config.tokenizer.path)
    export_initial_weights(config, run_dir / "hf")
    responses = answer_with_transformers(run_dir / "hf", problems)
    changed = list(responses)
    first, last = responses[1].response_ids, responses[4].response_ids
    changed[1] = replace(responses[1], response_ids=[(first[0] + 1) % 400, *first[1:]])
    changed[4] = replace(responses[4], response_ids=[*last[:-1], (last[-1] + 1) % 400])
    same = responses_match(config, run_dir / "hf", responses)
    return same, responses_match(config, run_dir / "hf", changed)


def test_a_changed_token_is_noticed(tmp_path: Path) -> None:
    """The first token of one response and the last of another are replaced. Only these two differ."""
    ((same, changed),) = run_ranks(_compare, 1, tmp_path)
    assert same == [True] * 6
    assert changed == [True, False, True, True, False, True]
