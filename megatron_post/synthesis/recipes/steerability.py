"""Dialogs that follow system prompts on length, format, tone, persona and language, and preferences."""

import json
from typing import Any

from pydantic import Field, model_validator

from megatron_post.config.section import Count, Section
from megatron_post.data.dialog import Message
from megatron_post.inference.model import Refused
from megatron_post.synthesis.code.programs import block_in
from megatron_post.synthesis.judge import verdict
from megatron_post.synthesis.languages.identify import check_installed
from megatron_post.synthesis.questions import plain
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.replies import unless_refused, whole_reply
from megatron_post.synthesis.row import PreferenceRow, Row
from megatron_post.synthesis.steering.rules import checked, described
from megatron_post.synthesis.steering.system_prompt import SystemPrompt, system_prompt
from megatron_post.synthesis.task import Task

VERSION = 1
MODELS = ("author", "judge")
_LIST = "the list of system prompts"
Made = Row | PreferenceRow


class Settings(Section):
    variants: Count = Field(4, description="largest number of system prompts written from a seed")
    turns: Count = Field(2, description="largest number of the user's messages in a dialog")
    samples: Count = Field(4, description="K, number of answers to each message of the user")

    @model_validator(mode="after")
    def _languages_can_be_identified(self) -> "Settings":
        check_installed()  # here, because an author may write a rule on the language for any seed
        return self


async def recipe(row: dict[str, Any], task: Task[Settings]) -> list[Made]:
    seed = _seed(row)
    count = task.settings.variants
    example = json.dumps({"system": seed.system, "rules": seed.rules.given}, ensure_ascii=False)
    reply = await task.ask("write", task.prompt("write", count=count, kind=seed.kind, example=example))
    prompts = _different(task, _listed(block_in(reply, _LIST, "JSON", ("json",))), seed)
    if not prompts:
        raise Dropped("no system prompt can be used")
    found = await unless_refused(task, *(_dialog(task, prompt) for prompt in prompts))
    rows = [row for rows in found if rows for row in rows]
    if not rows:
        raise Dropped("no dialog follows its system prompt")
    return rows


def _seed(row: dict[str, Any]) -> SystemPrompt:
    """Raises `ValueError` for a row that is no seed."""
    try:
        return system_prompt(
            {key: row[key] for key in ("kind", "system", "rules") if row.get(key) is not None}
        )
    except ValueError as error:
        raise ValueError(
            f"this seed has {error}{f': {error.__cause__}' if error.__cause__ else ''}. A seed has `kind`, "
            "`system` and `rules`, as in configs/synthesis/steerability_seeds.jsonl"
        ) from None


def _listed(text: str) -> list[Any]:
    """The list in a JSON text. Raises `Dropped` if it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Dropped(f"{_LIST} is not JSON", str(error)) from None
    if not isinstance(found, list):
        raise Dropped(f"{_LIST} is not a list", text[:200])
    return found


def _different(task: Task[Settings], values: list[Any], seed: SystemPrompt) -> list[SystemPrompt]:
    """The first `variants` different system prompts. The report counts what is wrong with the others."""
    found = {plain(seed.system): seed}
    for each in values:
        try:
            prompt = system_prompt(each, seed.kind)
        except ValueError as error:
            task.count("write", str(error))
            continue
        if plain(prompt.system) in found:
            task.count("write", "repeated system prompt")
        elif len(found) > task.settings.variants:
            task.count("write", "more system prompts than asked for")
        else:
            found[plain(prompt.system)] = prompt
    return list(found.values())[1:]


async def _dialog(task: Task[Settings], prompt: SystemPrompt) -> list[Made]:
    """The rows of the turns before the first turn without an answer that follows the system prompt."""
    if rules := described(prompt.rules):
        asked = task.prompt("agree", system=prompt.system, rules=rules)
        if await verdict(task, "agree", asked, ("same", "different")) != "same":
            return []
    dialog, rows = [Message("system", prompt.system)], list[Made]()
    for turn in range(1, task.settings.turns + 1):
        try:
            made = await _turn(task, prompt, dialog, turn)
        except Refused:
            if not rows:
                raise
            break  # the earlier turns are kept
        if not made:
            break
        rows += made
    return rows


async def _turn(task: Task[Settings], prompt: SystemPrompt, dialog: list[Message], turn: int) -> list[Made]:
    """The rows of one turn, whose messages are added to the dialog. No rows: the dialog ends."""
    asked = task.prompt("user", system=prompt.system, messages=dialog[1:])
    text = whole_reply(task, "user", await task.ask("user", asked))
    if not text:
        return []
    dialog.append(Message("user", text))
    follows, breaks = await _answers(task, prompt, dialog)
    if follows is None:
        task.count("answer", "no answer follows the system prompt")
        return []
    extra = {"rules": prompt.rules.given, "turn": turn}
    rows: list[Made] = []
    if breaks is None:
        task.count("answer", "no answer breaks the system prompt")
    else:
        kind = f"{prompt.kind} preference"
        rows.append(PreferenceRow([*dialog], follows, breaks, "steerability", kind=kind, extra=extra))
    dialog.append(follows)
    return [*rows, Row([*dialog], "steerability", kind=prompt.kind, extra=extra)]


async def _answers(
    task: Task[Settings], prompt: SystemPrompt, dialog: list[Message]
) -> tuple[Message | None, Message | None]:
    """The first answer that follows the system prompt, and one that breaks it.

    If all follow it, the author is asked without the system prompt.
    """
    asked = (task.ask("answer", dialog, seed=seed) for seed in range(task.settings.samples))
    replies = [reply for reply in await unless_refused(task, *asked) if reply]
    texts = list(dict.fromkeys(filter(None, (whole_reply(task, "answer", reply) for reply in replies))))
    verdicts = await unless_refused(task, *(_verdict(task, prompt, dialog, text) for text in texts))
    found: dict[str | None, Message] = {}
    for text, result in zip(texts, verdicts, strict=True):
        found.setdefault(result, Message("assistant", text))
    if "follows" in found and "breaks" not in found:
        text = whole_reply(task, "without", await task.ask("without", dialog[1:]))
        if text and await _verdict(task, prompt, dialog, text) == "breaks":
            found["breaks"] = Message("assistant", text)
    return found.get("follows"), found.get("breaks")


async def _verdict(task: Task[Settings], prompt: SystemPrompt, dialog: list[Message], text: str) -> str:
    """`follows` or `breaks`, or another word for an answer that is neither chosen nor rejected.

    The judge is asked only if the answer follows all rules with certainty.
    """
    found = checked(prompt.rules, text)
    for name, result in found.items():
        task.count("rules", f"{name}: {result}")
    if {"breaks", "unclear"} & set(found.values()):
        return "breaks" if "breaks" in found.values() else "unclear"
    asked = task.prompt("judge", system=prompt.system, messages=dialog[1:], answer=text)
    return await verdict(task, "judge", asked, ("follows", "breaks", "unhelpful"))
