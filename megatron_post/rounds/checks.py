"""Finds errors in the inputs of a round before its first step, so that they are found early."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from megatron_post.config.data import Source
from megatron_post.config.layout import world_errors
from megatron_post.config.load import ConfigError
from megatron_post.config.rewards import TRAINED, check_capabilities
from megatron_post.config.schema import Config
from megatron_post.convert.open_model import open_weights_directory
from megatron_post.curation.rules import load_response_rules
from megatron_post.data.rows import BadRows, read_rows
from megatron_post.data.tokenizer import load_tokenizer
from megatron_post.display import make_console
from megatron_post.inference.prompts import Prompt, read_prompts
from megatron_post.inference.request import Request
from megatron_post.inference.settings import VllmBackend
from megatron_post.inference.tokens import prompt_ids
from megatron_post.installation import install_command
from megatron_post.rounds.round import Round
from megatron_post.rounds.settings import RoundSettings, Stages
from megatron_post.rounds.verifier import ExactMatch
from megatron_post.storage.reading import did_you_mean

_HEADER = 16  # the largest number of tokens of a message around its text


def check_models(settings: RoundSettings) -> None:
    """Raise `ValueError` unless all models that a run starts with have the same tokenizer."""
    start = settings.start
    others = [(f"start.{key}", getattr(start, key)) for key in ("previous", "base", "reward")]
    others += [(f"start.policies.{name}", path) for name, path in start.policies.items()]
    listed = [(n, r, m) for n, r in enumerate(settings.reward) for m in r.models if m != TRAINED]
    others += [(f"reward.{number}.models", model) for number, _, model in listed]
    for key, path in (("start.policy", start.policy), *others):
        if path is not None and not Path(path).is_dir():
            raise ValueError(f"{key}={path}: no such directory; the first round begins with that model")
    policy = load_tokenizer(start.policy).fingerprint
    for key, path in others:
        if path is not None and load_tokenizer(path).fingerprint != policy:
            raise ValueError(
                f"{key}={path} has another tokenizer than start.policy={start.policy}; its ids mean "
                "other words there, so use models of one family"
            )
    for number, reward, model in listed:
        weights = open_weights_directory(Path(model))
        if not weights.scalar_head:
            raise ValueError(f"reward.{number}.models={model} is a language model, and no reward model")
        if weights.scores_steps != (reward.of_steps is not None):
            remedy = "set of_steps" if weights.scores_steps else "leave out of_steps"
            kind = "steps" if weights.scores_steps else "whole responses"
            raise ValueError(f"reward.{number}.models={model} is a reward model of {kind}; {remedy}")


def check_backend(settings: RoundSettings) -> None:
    """Raise `ValueError` if the backend is not installed. Only the machine that generates must check this."""
    if isinstance(settings.generate.backend, VllmBackend) and importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "generate.backend: vllm is not installed; on a machine with a GPU, "
            f"{install_command('generate')}, or choose the backend transformers"
        )


def check_files(settings: RoundSettings) -> None:
    """Raise `ValueError` for files of prompts, rows, rules and stages that a later step could not use.

    Also for stages that cannot run on their ranks, and for models that the method cannot average.
    """
    data, verifier = settings.data, settings.select.verifier
    first = Round(settings, 1, make_console(quiet=True))
    _ = first.curation  # raises `ConfigError` for a file that `curate` could not use
    pack_length = first.stage("reward").data.pack_length
    files = {key: getattr(data, key) for key in ("prompts", "validation", "held_out")}
    files |= {f"curriculum.{number}.prompts": phase.prompts for number, phase in enumerate(data.curriculum)}
    asked: set[str] = set()  # the capabilities of all prompts that are trained on
    for key, path in files.items():
        if path is None:
            continue
        prompts = read_prompts(path, max_bad_rows=data.max_bad_rows)
        unanswered = next((p.number for p in prompts if p.answer is None), None)
        if isinstance(verifier, ExactMatch) and unanswered is not None:
            raise ValueError(f"data.{key}={path}: line {unanswered} has no `answer` for the exact verifier")
        _check_lengths(settings, key, prompts, pack_length=pack_length)
        found = {prompt.capability for prompt in prompts}
        if key == "validation" and settings.generate.by_capability and not found - {""}:
            raise ValueError(
                f"data.validation={path}: no prompt has a `capability`, so generate.by_capability has no "
                "effect"
            )
        asked |= found if key not in ("validation", "held_out") else set()
    check_capabilities(settings.reward, asked, origin=data.prompts)
    for name in settings.start.policies:
        if name not in asked:
            meant = did_you_mean(name, sorted(asked))
            raise ValueError(
                f"start.policies: no prompt of {data.prompts} has the capability {name!r}{meant}"
            )
    if settings.select.cleaning is not None:
        load_response_rules(settings.select.cleaning)
    configs = {
        (stage, number): first.similar_run(stage, number)
        for stage in Stages.trained
        for number in range(len(first.run_dirs(stage)))
    }
    for (stage, _), config in configs.items():
        _check_content_tokens(config, settings)
        ranks = settings.ranks or config.parallel.model_size
        # Assume both, because a login node may have neither a GPU nor Transformer Engine.
        errors = world_errors(config, world_size=ranks, has_gpu=True, has_transformer_engine=True)
        if errors:
            raise ConfigError(f"stages.{stage} on ranks={ranks}: " + "; ".join(errors))
    first.merge_plan  # noqa: B018 - the property raises the errors of the plan
    rules = configs["sft", 0].data, configs["reward", 0].data
    preferences = tuple(Source(name=path, path=path) for path in settings.start.preferences)
    for rule, sources in zip(rules, (data.sft, preferences), strict=True):
        for source in sources:
            bad_rows = BadRows(data.max_bad_rows)
            rows = read_rows(source, bad_rows=bad_rows, train_on=rule.train_on, reasoning=rule.reasoning)
            # The first good row shows that the file can be read and that its columns make examples.
            next(rows, None)


def _check_content_tokens(config: Config, settings: RoundSettings) -> None:
    """Raise `ConfigError` if a stage's texts may spell a token that is special for the policy's tokenizer.

    Such a model would have another tokenizer, so it could not be used and averaged like the others.
    """
    known = load_tokenizer(settings.start.policy).content_tokens
    missing = [token for token in config.tokenizer.content_tokens if token not in known]
    if missing:
        raise ConfigError(
            f"stages.{config.stage}: tokenizer.content_tokens has {missing[0]}, which texts cannot spell for "
            f"start.policy={settings.start.policy}. All models of a round share one tokenizer: give the "
            'token "special": false in the tokenizer.json of each model that the round starts with'
        )


def _check_lengths(settings: RoundSettings, key: str, prompts: Sequence[Prompt], *, pack_length: int) -> None:
    """Raise `ValueError` for a prompt that the reward model cannot score with a response of `max_tokens`.

    Without this check the error would occur only after all responses have been generated.
    """
    capacity = pack_length - settings.generate.sampling.max_tokens
    tokenizer = load_tokenizer(settings.start.policy)
    for prompt in prompts:
        messages = prompt.with_system(settings.generate.system)
        if sum(len(m.content.encode()) + _HEADER for m in messages) <= capacity:
            continue  # a token has at least one byte, so this prompt fits without tokenizing it
        tokens = len(prompt_ids(Request(messages, settings.generate.sampling.of_each, seed=0), tokenizer))
        if tokens > capacity:
            raise ValueError(
                f"data.{key}: the prompt in line {prompt.number} has {tokens} tokens; with "
                f"generate.sampling.max_tokens={settings.generate.sampling.max_tokens} that is more than "
                f"data.pack_length={pack_length} of {settings.stages.reward}, in which responses are scored"
            )
