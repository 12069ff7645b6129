"""Measures pairs per second in DPO beside TRL's DPOTrainer.

Weights, token ids, masks, loss and optimizer settings are the same. A round is one optimizer step over all
pairs, so every side trains the same pairs in every round. A side with a frozen reference runs the reference
at every step. A side with stored log-probabilities ran it once, before the rounds. Only sides with the same
kind of reference are compared. Megatron-Post is also measured with rows that have each prompt once
(`dpo.layout: isolated`).

TRL pads the pairs of a microbatch to the longest response. It is measured with as many pairs in a microbatch
as a pack holds, which gives it the same parallelism. It is also measured with one pair, which pads least and
is its fastest setting on a CPU.
"""

import gzip
import json
import os
import random
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from megatron_post.bench.tables import titled
from megatron_post.bench.trl.figures import MEGATRON_POST, StepFigures, summarise
from megatron_post.bench.trl.own_side import run_rounds
from megatron_post.bench.trl.side import Gate, Input, Side, interleave
from megatron_post.bench.trl.trl_side import real_tokens, trainer_arguments
from megatron_post.bench.trl.workload import GSM8K, Workload, open_train_store
from megatron_post.config.load import validate
from megatron_post.config.schema import Config
from megatron_post.data.build import build_store
from megatron_post.data.loader import PackLoader
from megatron_post.data.pack import Pack
from megatron_post.data.store import PackStore
from megatron_post.data.template import TokenRole
from megatron_post.display import make_console
from megatron_post.parallel.topology import Topology, parallel_run
from megatron_post.train.parts import build_trainer
from megatron_post.train.reference import attach_reference, compute_reference, reference_key

HH_RLHF = GSM8K.parents[1] / "hh_rlhf" / "harmless_base.jsonl.gz"
PAIRS = 36  # these fill 97.5% of their packs; all 1,500 would fill 99.6%


def pair_workload(
    workload: Workload, directory: Path, *, pack_length: int = 1536, rows: int = PAIRS
) -> Workload:
    """DPO with the model, weights and tokenizer of an SFT workload, on pairs packed into `directory`.

    The pairs are those of HH-RLHF if its file exists, and otherwise generated pairs of unequal
    lengths. Pairs with an empty response or too long for a pack are dropped for both sides.
    """
    directory.mkdir(parents=True, exist_ok=True)
    name = _write_pairs(directory / "pairs.jsonl", rows)
    values = workload.config.model_dump()
    values |= {
        "stage": "dpo",
        "run_dir": str(directory / "run"),
        "data": {
            "store": str(directory / "store"),
            "sources": [{"name": name, "path": str(directory / "pairs.jsonl")}],
            "pack_length": pack_length,
            "overlong": "drop",
            "max_bad_rows": rows,
        },
        # TRL's loss trains terminators and has no NLL term.
        "dpo": {"trained_roles": ("body", "terminator"), "nll_weight": 0.0},
    }
    config = validate(values, origin="bench")
    for each in (config, _isolated(config)):
        build_store(each, console=make_console(quiet=True))
    train = config.train.model_copy(update={"global_batch": len(open_train_store(config))})
    config = config.model_copy(update={"train": train})
    return replace(workload, config=config, data_name=name, steps_per_round=1)


def _isolated(config: Config) -> Config:
    """The same pairs in rows that have each prompt once, in a store of their own."""
    values = config.model_dump()
    values["dpo"]["layout"] = "isolated"
    for section, key in ((values, "run_dir"), (values["data"], "store")):
        section[key] += "-isolated"
    return validate(values, origin="bench")


def measure_pairs(workload: Workload, *, rounds: int) -> list[StepFigures]:
    """Figures of Megatron-Post and TRL with either kind of reference, from interleaved rounds.

    A round counts pairs, so `trained_per_second` is pairs per second.
    """
    packs = workload.config.train.global_batch
    in_a_pack = round(len(list(pairs(open_train_store(workload.config)))) / packs)
    sides: dict[str, Side] = {}
    compared_with: dict[str, str] = {}  # side -> side of Megatron-Post with the same reference
    for reference in ("frozen", "store"):
        own = f"{MEGATRON_POST}, {reference}"
        sides[own] = partial(_train_megatron_post, reference=reference)
        isolated = f"{MEGATRON_POST}, isolated, {reference}"
        sides[isolated] = partial(_train_megatron_post, reference=reference, isolated=True)
        for size in dict.fromkeys((in_a_pack, 1)):
            sides[f"TRL x {size}, {reference}"] = partial(_train_trl, reference=reference, microbatch=size)
        compared_with |= {name: own for name in sides if name.endswith(reference)}
    inputs, results = interleave(sides, workload, rounds=rounds)
    return [
        summarise(name, inputs[name], results[name], own_rounds=results[compared_with[name]])
        for name in sides
    ]


def pair_table(workload: Workload, figures: Sequence[StepFigures], *, rounds: int) -> Table:
    """A table with a row for each side.

    The speedup is the pairs/s of Megatron-Post with the same kind of reference, divided by this side's.
    """
    config = workload.config
    title = (
        f"DPO: {config.model.preset} on pairs of {workload.data_name}, {config.precision.dtype}, threads: "
        f"{workload.threads}\n{config.train.global_batch} packs of {config.data.pack_length} tokens a step; "
        f"medians of {rounds} interleaved rounds\nTRL x n: n pairs a microbatch; "
        "frozen: the reference runs at every step; store: it ran once\n"
        "isolated: each prompt once\n"
        f"speedup: pairs/s of {MEGATRON_POST} divided by this side's"
    )
    table = titled(title, ("", "pairs/s", "speedup", "tokens/s", "fill", "loss"))
    for side in figures:
        table.add_row(
            side.name,
            f"{side.trained_per_second:.1f}",
            f"{side.speed:.2f}",
            f"{side.tokens_per_second:,.0f}",
            f"{side.fill:.1%}",
            f"{side.loss:.3f}",
        )
    return table


def pairs(store: PackStore) -> Iterator[dict[str, list[int]]]:
    """Every pair of a store in TRL's tokenised form: ids of prompt, chosen and rejected response."""
    for index in range(len(store)):
        pack = store.read(index)
        responses: dict[int, dict[int, tuple[list[int], list[int]]]] = {}
        for segment, rank in enumerate(pack.ranks.tolist()):
            if rank >= 0:
                start = int(pack.cu_seqlens[segment])
                real = slice(start, start + int(pack.lengths[segment]))
                prompt = int(np.argmax(pack.roles[real] == TokenRole.BODY))
                ids = pack.tokens[real].tolist()
                responses.setdefault(int(pack.unit_ids[segment]), {})[rank] = (ids[:prompt], ids[prompt:])
        for both in responses.values():
            (prompt_ids, chosen), (_, rejected) = both[0], both[1]
            yield {"prompt_ids": prompt_ids, "chosen_ids": chosen, "rejected_ids": rejected}


def _train_megatron_post(workload: Workload, gate: Gate, *, reference: str, isolated: bool = False) -> None:
    config = _isolated(workload.config) if isolated else workload.config
    store = open_train_store(config)
    values = config.model_dump()
    values["dpo"]["reference"] = reference
    values["run_dir"] += f"-{reference}"
    values["train"]["global_batch"] = len(store)
    config = validate(values, origin="bench")
    with parallel_run(config.parallel, seed=config.seed) as topology:
        if reference == "store":
            _store_reference(config, topology, store)
        trainer, _ = build_trainer(config, topology)
        with _loader(store, config) as loader:
            whole = next(loader)
            sizes = ((_count([p])[0], len(trainer.stepper.prepare(p).batch.tokens)) for p in whole)
            is_wanted = gate.ready(_input(sizes))
        with _loader(store, config) as loader:
            run_rounds(trainer, loader, gate, is_wanted=is_wanted, count=_count)


def _store_reference(config: Config, topology: Topology, store: PackStore) -> None:
    """Compute and attach the reference log-probabilities, as `megatron-post reference` does."""
    assert config.model.init_from is not None
    trainer, _ = build_trainer(config, topology)
    key = reference_key(config.model.init_from, config.precision, topology)
    roles = config.dpo.trained_roles
    compute_reference(trainer.stepper, store, topology, key=key, roles=roles, group_size=2)
    attach_reference(config, topology, [store])


def _loader(store: PackStore, config: Config) -> PackLoader:
    return PackLoader(store, seed=config.seed, global_batch=config.train.global_batch)


def _count(packs: list[Pack]) -> tuple[int, int]:
    """(real tokens, pairs). Every pair has exactly one best response."""
    return sum(int(p.lengths.sum()) for p in packs), sum(int((p.ranks == 0).sum()) for p in packs)


def _input(sizes: Iterable[tuple[int, int]]) -> Input:
    """The input figures. sizes: (real tokens, capacity) of batches, timed while they are made."""
    tokens = capacity = 0
    started = time.perf_counter()
    for real, size in sizes:
        tokens, capacity = tokens + real, capacity + size
    return Input(tokens / capacity, tokens / (time.perf_counter() - started))


def _train_trl(workload: Workload, gate: Gate, *, reference: str, microbatch: int) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as directory:
        trainer = _trl_trainer(
            workload.config, directory, precompute=reference == "store", microbatch=microbatch
        )
        batches = trainer.get_train_dataloader()
        prepared = _input((real_tokens(inputs), inputs["input_ids"].numel()) for inputs in batches)

        class PauseBetweenRounds(transformers.TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_training_stop = not gate.ready(prepared)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_training_stop = not gate.step(**trainer.pop_counts())

        trainer.add_callback(PauseBetweenRounds())
        trainer.train()


def _trl_trainer(config: Config, directory: str, *, precompute: bool, microbatch: int) -> Any:
    import datasets
    import transformers
    import trl

    class CountingTrainer(trl.DPOTrainer):
        """Counts the pairs of a step, and accepts rows that are already tokenised."""

        counts = (0, 0, 0.0)

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(model, inputs, *args, **kwargs)
            tokens, count, total = self.counts
            count += len(inputs["input_ids"]) // 2
            self.counts = (tokens + real_tokens(inputs), count, total + float(loss))
            return loss

        def pop_counts(self) -> dict[str, Any]:
            counts, self.counts = self.counts, (0, 0, 0.0)
            return dict(zip(("tokens", "trained", "loss"), counts, strict=True))

    rows = list(pairs(open_train_store(config)))
    arguments = trl.DPOConfig(
        output_dir=directory,
        loss_type=[config.dpo.loss],
        beta=config.dpo.beta,
        precompute_ref_log_probs=precompute,
        max_length=config.data.pack_length,
        per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=-(-len(rows) // microbatch),
        **trainer_arguments(config),
    )
    return CountingTrainer(
        model=config.model.init_from,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(
            config.tokenizer.path, trust_remote_code=False
        ),
    )


def _write_pairs(path: Path, count: int) -> str:
    if HH_RLHF.is_file():
        with gzip.open(HH_RLHF, "rt", encoding="utf-8") as file:
            path.write_text("".join(islice(file, count)))
        return "HH-RLHF"
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            texts = [
                " ".join(f"{draw.randrange(100)}" for _ in range(draw.randrange(4, 160))) for _ in range(3)
            ]
            file.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))) + "\n")
    return "generated numbers"
