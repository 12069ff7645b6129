"""The functions of Megatron-Post for use from Python. The commands call the same ones.

    from megatron_post.api import load_config, pack, train

Each returns an object with figures and paths. Wrong input raises `ValueError` or a class derived from it.
None of them ends the process, except that the watchdog of `train` ends a run that hangs. docs/python.md shows
them.

A name is imported when it is first used, so that `plan` does not wait for what `train` needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_post.config.load import load_config
    from megatron_post.convert.directions import convert_weights as convert
    from megatron_post.data.build import build_store as pack
    from megatron_post.inference.generate import generate
    from megatron_post.plan.estimate import make_plan as plan
    from megatron_post.rounds.merge import merge
    from megatron_post.rounds.score import score_file as score
    from megatron_post.train.callbacks import Callback
    from megatron_post.train.run import train

__all__ = ["Callback", "convert", "generate", "load_config", "merge", "pack", "plan", "score", "train"]

_PLACES = {
    "Callback": "train.callbacks:Callback",
    "convert": "convert.directions:convert_weights",
    "generate": "inference.generate:generate",
    "load_config": "config.load:load_config",
    "merge": "rounds.merge:merge",
    "pack": "data.build:build_store",
    "plan": "plan.estimate:make_plan",
    "score": "rounds.score:score_file",
    "train": "train.run:train",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"megatron_post.api has no {name!r}, only {', '.join(_PLACES)}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(f"megatron_post.{module}"), attribute)


def __dir__() -> list[str]:
    return [*_PLACES]
