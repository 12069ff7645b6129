"""The side of TRL: SFTTrainer with the same weights, tokens, labels and optimizer settings."""

import os
import tempfile
import time
from functools import partial
from itertools import islice
from typing import Any

from megatron_post.bench.data import one_core
from megatron_post.bench.trl.side import Gate, Input, Side
from megatron_post.bench.trl.workload import Workload, open_train_store, segments
from megatron_post.config.schema import Config


def trl_packed() -> Side:
    """TRL with `packing=True` (best-fit decreasing, `sdpa`), and one pack in a microbatch.

    `transformers` finds the segments in the positions and masks attention between them. With several packs in
    a microbatch, the row would be longer and its dense square mask would cost more.
    """
    return partial(_train_trl, packing=True)


def trl_padded() -> Side:
    """TRL with `packing=False`: dialogs are padded to the longest of their batch.

    A step has about as many tokens as a step of Megatron-Post.
    """
    return partial(_train_trl, packing=False)


def _train_trl(workload: Workload, gate: Gate, *, packing: bool) -> None:
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as directory:
        trainer = _trainer(workload, directory, packing=packing)
        prepared = _input(trainer, workload)

        class PauseBetweenRounds(transformers.TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_training_stop = not gate.ready(prepared)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_training_stop = not gate.step(**trainer.pop_counts())

        trainer.add_callback(PauseBetweenRounds())
        trainer.train()


def trainer_arguments(config: Config) -> dict[str, Any]:
    """The arguments that TRL's trainers share: the config's optimizer and steps, on a CPU, without output."""
    o = config.optimizer
    return {
        "max_steps": config.train.steps,
        "learning_rate": o.lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": o.beta1,
        "adam_beta2": o.beta2,
        "max_grad_norm": o.clip_grad,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": config.seed,
    }


def _trainer(workload: Workload, directory: str, *, packing: bool) -> Any:
    import datasets
    import transformers
    import trl

    class CountingTrainer(trl.SFTTrainer):
        """Counts the tokens of a step. The losses of its microbatches add up to the step's mean."""

        counts = (0, 0, 0.0)

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(model, inputs, *args, **kwargs)
            tokens, trained, total = self.counts
            trained += int((inputs["labels"] != -100).sum())
            self.counts = (tokens + real_tokens(inputs), trained, total + float(loss))
            return loss

        def pop_counts(self) -> dict[str, Any]:
            counts, self.counts = self.counts, (0, 0, 0.0)
            return dict(zip(("tokens", "trained", "loss"), counts, strict=True))

    config = workload.config
    rows = [{"input_ids": t.tolist(), "labels": y.tolist()} for t, y in segments(open_train_store(config))]
    tokens_per_step = config.train.global_batch * config.data.pack_length
    mean_length = sum(len(row["input_ids"]) for row in rows) / len(rows)
    accumulation = config.train.global_batch
    arguments = trl.SFTConfig(
        output_dir=directory,
        max_length=config.data.pack_length,
        packing=packing,
        per_device_train_batch_size=1 if packing else round(tokens_per_step / mean_length / accumulation),
        gradient_accumulation_steps=accumulation,
        **trainer_arguments(config),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=f"{config.tokenizer.path}/tokenizer.json",
        eos_token="<|eot_id|>",
        pad_token="<|eot_id|>",
    )
    model = transformers.LlamaForCausalLM.from_pretrained(
        config.model.init_from, attn_implementation="sdpa", use_safetensors=True
    )
    dataset = datasets.Dataset.from_list(rows)
    return CountingTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)


def real_tokens(inputs: Any) -> int:
    """Tokens of a collated batch that are not padding. A packed batch has no padding."""
    return int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()


def _input(trainer: Any, workload: Workload, *, steps: int = 100) -> Input:
    tokens = capacity = 0
    with one_core():
        started = time.perf_counter()
        for inputs in islice(trainer.get_train_dataloader(), steps * workload.config.train.global_batch):
            tokens, capacity = tokens + real_tokens(inputs), capacity + _capacity(inputs, workload)
        seconds = time.perf_counter() - started
    return Input(fill=tokens / capacity, collated_per_second=tokens / seconds)


def _capacity(inputs: Any, workload: Workload) -> int:
    """The tokens that a batch could hold: `pack_length` if it is packed, or its own size if it is padded."""
    return inputs["input_ids"].numel() if "attention_mask" in inputs else workload.config.data.pack_length
