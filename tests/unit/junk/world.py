"""A directory with one small valid file of every kind that a command reads, named relative to it."""

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import yaml

from megatron_post.bench.record import Record, once, write_record
from megatron_post.config.load import load_config
from megatron_post.convert.jobs import convert
from megatron_post.convert.to_hf import ToHuggingFace
from megatron_post.convert.to_megatron import ToMegatron
from megatron_post.curation.run import curate
from megatron_post.curation.settings import load_curation
from megatron_post.data.build import build_store
from megatron_post.display import make_console
from megatron_post.rounds.annotation.export import export_pairs
from megatron_post.rounds.annotation.settings import Annotation
from megatron_post.storage.files import read_lines, write_lines
from megatron_post.synthesis.run import synthesize
from megatron_post.synthesis.settings import load_synthesis
from tests.tiny import MODEL
from tests.unit.convert.models import shaped_like, weights_of
from tests.unit.convert.test_meta_source import _meta
from tests.unit.rounds.models import tiny_policy

ANSWER = "The answer is 2."
TEMPLATES = """\
templates:
  1: !Template
    name: right
    jinja: 'Is {{text}} 2? ||| {{answer_choices[label]}}'
    answer_choices: no ||| yes
"""
RECIPE = """\
from megatron_post.data.dialog import Message
from megatron_post.synthesis.row import Row

VERSION = 1

async def recipe(row, task):
    question = task.prompt("ask", prompt=row["prompt"])
    reply = await task.ask("ask", question)
    return [Row([Message("user", question), reply.message], capability="general")]
"""
SIZES = {**MODEL, "num_layers": 2, "vocab_size": 288, "rope_scaling": None}
TRAINING: dict[str, Any] = {
    "run_dir": "run",
    "model": SIZES,
    "tokenizer": {"path": "tokenizer/tokenizer.json"},
    "precision": {"dtype": "fp32"},
    "optimizer": {"lr": 1e-3, "schedule": "constant"},
    "train": {"steps": 2, "global_batch": 2, "export_hf": False},
    "checkpoint": {"every": 1, "keep": 1},
}


def make_world(root: Path) -> None:
    """Write the files below `root`, which is the working directory."""
    _write_rows(root)
    tiny_policy(root / "model", text=ANSWER)
    tiny_policy(root / "reward", scalar_head=True, text=ANSWER)
    tiny_policy(root / "step-reward", scalar_head=True, scores_steps=True, text=ANSWER)
    (root / "tokenizer").mkdir()
    (root / "model" / "tokenizer.json").rename(root / "tokenizer" / "tokenizer.json")
    (root / "model" / "tokenizer.json").write_bytes((root / "tokenizer" / "tokenizer.json").read_bytes())
    _write_configs(root)
    for name in ("sft.yaml", "dpo.yaml"):
        build_store(load_config(root / name), console=make_console(quiet=True))
    job = ToMegatron("model", "converted", None)
    assert convert(job, workers=1, report=lambda text: None).is_complete
    assert convert(ToHuggingFace("converted", "published"), workers=1, report=lambda text: None).is_complete
    record = Record("step", "a run", {"steps": "2"}, {"seconds": once("s", 1.0, "lower")}, {"date": "2026"})
    write_record(root / "bench", record)
    write_record(root / "bench", record)
    _write_run(root)
    _write_synthesis(root)
    _write_answers(root)
    curate(load_curation("curation.yaml"), console=make_console(quiet=True))
    _write_labelled(root / "labelled")
    _write_meta(root / "meta")


def _write_labelled(run: Path) -> None:
    """What a curation has written whose judge labelled topics."""
    run.mkdir()
    notes = {"id": "0" * 32, "source": "rows", "place": "rows.jsonl:1"}
    labels = {"topics": {"coarse": "sums", "fine": "small"}}
    row = {"prompt": "1 + 1?", "completion": ANSWER, "curation": {**notes, "steps": labels}}
    for name in ("rows.jsonl", "dropped.jsonl"):
        (run / name).write_text(json.dumps(row) + "\n")


def _write_synthesis(root: Path) -> None:
    """A recipe, and what a run of it has left."""
    (root / "answers.py").write_text(RECIPE)
    (root / "answers").mkdir()
    (root / "answers/ask.j2").write_text("{# version 1 #}\n{{ prompt }}\n")
    synthesize(load_synthesis("synthesis.yaml"), console=make_console(quiet=True))


def _write_answers(root: Path) -> None:
    """Pairs of the samples, their key, and what a person has answered."""
    pages = root / "annotate"
    export_pairs([root / "samples.jsonl"], pages, root / "annotate-key.jsonl", Annotation(), seed=0)
    rated = {"better": "a", "rating": "better", "edited": "The answer is two."}
    answers = ({"pair": row["pair"], **rated} for row in read_lines(pages / "pairs.jsonl"))
    write_lines(root / "answers.jsonl", answers)


def _write_meta(directory: Path) -> None:
    """A model of Meta's, with a tokenizer of three words."""
    directory.mkdir()
    model = shaped_like("8b")
    tensors = _meta(weights_of(model), model)
    torch.save(tensors, directory / "consolidated.00.pth")
    params = {"dim": 64, "n_layers": 3, "n_heads": 32, "n_kv_heads": 8, "norm_eps": 1e-5, "rope_theta": 1e3}
    (directory / "params.json").write_text(json.dumps(params))
    words = (base64.b64encode(word).decode() for word in (b"a", b"b", b"ab"))
    (directory / "tokenizer.model").write_text("".join(f"{word} {n}\n" for n, word in enumerate(words)))


def _write_rows(root: Path) -> None:
    said = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": ANSWER}]
    rows = [{"messages": said}] * 4
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "rows.jsonl").write_text(lines)
    (root / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (root / "array.json").write_text(json.dumps(rows))
    (root / "rows.csv").write_text(f"question,answer\n1 + 1?,{ANSWER}\n")
    (root / "rows.csv.gz").write_bytes(gzip.compress((root / "rows.csv").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "rows.parquet")
    (root / "folder").mkdir()
    (root / "folder" / "train.jsonl").write_text(lines)
    pair = {"prompt": said[:1], "chosen": said[1:], "rejected": [{"role": "assistant", "content": "No."}]}
    (root / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 4)
    steps = [
        {"prompt": "1 + 1?", "completions": ["1 + 1", "It is 2."], "labels": [True, None]},
        {"question": {"problem": "1 + 1?"}, "label": {"steps": [
            {"completions": [{"text": "2", "rating": 1}, {"text": "3", "rating": -1}],
             "human_completion": None, "chosen_completion": 0}]}},
    ]  # fmt: skip
    (root / "documents.jsonl").write_text(f"{json.dumps({'text': 'def f():', 'id': 1})}\n" * 4)
    (root / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps * 2))
    prompts = [{"prompt": f"{number} + 1?", "answer": number + 1} for number in (1, 2)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    samples = [
        {"prompt": n, "sample": k, "checkpoint": "model", "seed": k, "tokens": 5, "finish": "stop",
         "messages": [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": text}]}
        for n in (1, 2) for k, text in enumerate((ANSWER, "The answer is 3."))
    ]  # fmt: skip
    (root / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    scores = [{"row": row, "scores": [row / 8]} for row in range(1, 5)]
    (root / "scores.jsonl").write_text("".join(json.dumps(score) + "\n" for score in scores))
    of_steps = [
        {"row": row, "steps": [[0.5]], "min": [0.5], "product": [0.5], "last": [0.5]} for row in range(1, 5)
    ]
    (root / "step-scores.jsonl").write_text("".join(json.dumps(score) + "\n" for score in of_steps))
    _write_prompted(root)


def _write_prompted(root: Path) -> None:
    """Rows and prompt templates of `data prompt`, and what it writes for `evaluate choices`."""
    films = [{"text": "1 + 1", "label": n % 2} for n in range(4)]
    (root / "films.jsonl").write_text("".join(json.dumps(film) + "\n" for film in films))
    (root / "templates.yaml").write_text(TEMPLATES)
    row = {"dataset": "films", "template": "right", "task": "sums", "row": 1, "prompt": "1 + 1?",
           "completion": "2", "choices": ["2", "3"]}  # fmt: skip
    (root / "choices.jsonl").write_text("".join(json.dumps(row | {"row": n}) + "\n" for n in range(4)))


def _write_configs(root: Path) -> None:
    columns = {"user": "question", "assistant": "answer"}
    files = ("rows.jsonl", "rows.jsonl.gz", "array.json", "rows.parquet", "folder")
    sources: list[dict[str, Any]] = [{"name": name, "path": name} for name in files]
    sources += [{"name": name, "path": name, "columns": columns} for name in ("rows.csv", "rows.csv.gz")]
    verifier = {"kind": "exact", "pattern": r"is (\d+)\."}
    model = {"model": "model", "weight": 1.0}
    files_of = {
        "base.yaml": TRAINING,
        "sft.yaml": {"base": "base.yaml", "stage": "sft",
                     "data": {"store": "store", "pack_length": 128, "sources": sources}},
        "dpo.yaml": {"base": "base.yaml", "stage": "dpo", "dpo": {"reference": "frozen"},
                     "data": {"store": "pairs", "pack_length": 128,
                              "sources": [{"name": "pairs", "path": "pairs.jsonl"}]}},
        "prompted.yaml": {"base": "base.yaml", "stage": "sft",
                          "data": {"store": "prompted", "sources": [{"name": "films", "path": "films.jsonl"}],
                                   "prompted": {"sources": [{"source": "films", "templates": "templates.yaml",
                                                             "task": "sums"}]}}},
        "reward.yaml": {"base": "base.yaml", "stage": "reward",
                        "data": {"store": "pairs", "pack_length": 128}},
        "generate.yaml": {"model": "model", "prompts": "prompts.jsonl",
                          "sampling": {"samples": 1, "max_tokens": 2}},
        "synthesis.yaml": {"recipe": "answers.py", "output": "synthesized",
                           "input": {"kind": "rows", "path": "prompts.jsonl"},
                           "models": {"author": {"model": "model", "backend": {"kind": "transformers"},
                                                 "sampling": {"max_tokens": 8}}}},
        "curation.yaml": {"run": "curated", "steps": [{"kind": "lengths", "most_turns": 3}],
                          "sources": [{"name": "rows", "path": "rows.jsonl"},
                                      {"name": "csv", "path": "rows.csv", "columns": columns}]},
        "labels.yaml": {"run": "labelled", "sources": [{"name": "rows", "path": "rows.jsonl"}],
                        "models": {"judge": {"model": "m", "backend": {"kind": "transformers"}}},
                        "steps": [{"kind": "topics", "taxonomy": "topics.yaml", "judge": "judge"}]},
        "topics.yaml": {"topics": {"sums": {"parts": {"small": None, "large": None}}}},
        "select.yaml": {"prompts": "prompts.jsonl", "verifier": verifier, "cleaning": "rules.yaml",
                        "samples": [{"responses": "samples.jsonl",
                                     "scores": {"a": "scores.jsonl", "b": "step-scores.jsonl"}}],
                        "reward": [{"name": "helpful", "models": ["a"], "standardize": True},
                                   {"name": "steps", "models": ["b"], "of_steps": "min",
                                    "weight": {"default": 0.5}, "at_least": 0.1}]},
        "rules.yaml": {"rules": [{"name": "sorry", "pattern": "sorry", "max_share": 0.5}]},
        "merge.yaml": {"models": [model, model | {"layers": [{"tensors": "*.mlp.*", "weight": 2.0}]}]},
        "round.yaml": {"run_dir": "rounds", "start": {"policy": "model"},
                       "data": {"prompts": "prompts.jsonl", "held_out": "prompts.jsonl"},
                       "select": {"verifier": verifier},
                       "generate": {"sampling": {"max_tokens": 8}},
                       "average": {"weights": {"sft": 1.0, "dpo": 1.0}},
                       "stages": {"reward": "reward.yaml", "sft": "sft.yaml", "dpo": "dpo.yaml",
                                  "sweep": {"sft": [{}, {"set": {"optimizer.lr": 1e-6}, "weight": 2.0}]}}},
        "chain.yaml": {"run_dir": "chain", "steps": [
            {"name": "one", "command": ["train", "sft.yaml"]},
            {"name": "two", "command": ["train", "dpo.yaml"], "after": ["one"]},
            {"name": "many", "after": ["two"], "tasks": [
                {"command": ["train", "dpo.yaml", f"seed={seed}"], "run_dir": f"many-{seed}"}
                for seed in (1, 2)]}]},
        "cluster.yaml": {"gpus_per_node": 0, "ranks_per_node": 2, "cpus_per_node": 2, "time_limit": "30:00",
                         "warning_seconds": 60, "environment": {"A": "b"}},
    }  # fmt: skip
    for name, values in files_of.items():
        (root / name).write_text(yaml.safe_dump(values, sort_keys=False))


def _write_run(root: Path) -> None:
    """What earlier commands have left: a launched run, unfinished outputs, the record of a round."""
    slurm = root / "run" / "slurm"
    slurm.mkdir(parents=True)
    (slurm / "1.log").write_text("step 1/2\nlaunch: 12:00:00 done\n")
    job = {"job_id": 1, "name": "run", "log": "run/slurm/1.log", "run_dir": "run", "after": [], "command": []}
    (slurm / "jobs.jsonl").write_text(json.dumps(job) + "\n")
    (root / "run" / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    start = {"time": 1.0, "after": 0, "lost": 0, "ranks": 1, "device": "CPU"}
    (root / "run" / "starts.jsonl").write_text(json.dumps(start) + "\n")
    (root / "scored.jsonl").write_text('{"row": 1, "scores": [0.5]}\n')
    (root / "scored.jsonl.origin.json").write_text("{}")
    for unfinished in (".partial-drawn.jsonl", ".converting-hf", ".converting-merged"):
        (root / unfinished).mkdir()
    (root / ".partial-drawn.jsonl" / "settings.json").write_text("{}")
    (root / ".converting-hf" / "conversion.json").write_text("{}")
    (root / ".converting-merged" / "conversion.json").write_text("{}")
    (root / "rounds").mkdir()
    (root / "rounds" / "state.json").write_text('{"settings": {}, "done": {}}')
