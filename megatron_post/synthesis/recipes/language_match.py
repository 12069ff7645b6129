"""Filters dialogs whose response is in another language or script than the prompt, without asking a model."""

from typing import Any, get_args

from pydantic import Field

from megatron_post.config.section import Name
from megatron_post.synthesis.columns import column
from megatron_post.synthesis.languages.dialogs import DialogSettings, dialog_of
from megatron_post.synthesis.languages.identify import identified
from megatron_post.synthesis.languages.mix_ups import language_fault, script_fault
from megatron_post.synthesis.languages.prose import prose_of
from megatron_post.synthesis.languages.table import LANGUAGES, Code
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.row import Row
from megatron_post.synthesis.task import Task

VERSION = 1
MODELS = ()


class Settings(DialogSettings):
    language: Name | None = Field(
        None,
        description="column with the code of the response's language. null: that of the user's last message",
    )


async def recipe(row: dict[str, Any], task: Task[Settings]) -> list[Row]:
    dialog = dialog_of(row, task.settings)
    asked = next((m.content for m in reversed(dialog.messages) if m.role == "user"), "")
    code = _language_of(row, asked, task)
    response = dialog.messages[-1].content
    if fault := script_fault(response, code, also=asked):
        raise Dropped("the response mixes scripts", fault)
    if fault := language_fault(response, code):
        raise Dropped("the response is in another language", fault)
    task.count("kept", LANGUAGES[code].name)
    return [Row(dialog.messages, capability="multilingual", kind="match", extra={"language": code})]


def _language_of(row: dict[str, Any], asked: str, task: Task[Settings]) -> Code:
    """The language that the response must be in."""
    name = task.settings.language
    if name is None:
        if (found := identified(prose_of(asked))) is None:
            raise Dropped("the language of the prompt cannot be identified")
        if fault := script_fault(asked, found.code):
            raise Dropped("the prompt mixes scripts", fault)
        return found.code
    code = column(row, name, key="language")
    if code not in get_args(Code):
        raise Dropped("no language is known by the code in the row", code[:40])
    return code  # type: ignore[return-value]  # it is one of the table
