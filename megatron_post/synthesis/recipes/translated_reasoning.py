"""Translations of English dialogs with numbers, such as solutions of word problems, which are checked."""

import re
from typing import Annotated, Any

from pydantic import Field, model_validator

from megatron_post.config.section import Count, Distinct, Positive, Whole
from megatron_post.data.dialog import Message
from megatron_post.synthesis.languages.dialogs import DialogSettings, dialog_of
from megatron_post.synthesis.languages.kept import first_fault
from megatron_post.synthesis.languages.mix_ups import language_fault
from megatron_post.synthesis.languages.numbers import numbers_of
from megatron_post.synthesis.languages.prose import prose_of
from megatron_post.synthesis.languages.table import LANGUAGES, Code
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.rouge import check_installed, rouge_l, words_of
from megatron_post.synthesis.row import Row
from megatron_post.synthesis.task import Task

VERSION = 1
MODELS = ("author", "judge")
_TAG = re.compile(r"(</?message_\d{1,4}>)")


class Settings(DialogSettings):
    languages: Annotated[tuple[Code, ...], Distinct] = Field(
        ("de", "fr", "it", "pt", "hi", "es", "th"),
        min_length=1,
        description="languages to translate to. One is drawn at random for each row",
    )
    numbers: Whole = Field(1, description="least number of numbers in a dialog that is translated")
    words: Count = Field(600, description="largest number of words of a dialog that is translated")
    shortest: Positive = Field(0.5, description="least length of a translation, relative to its original")
    longest: Positive = Field(2.0, description="largest length of a translation, relative to its original")
    closeness: float = Field(
        0.5, ge=0, le=1, description="least ROUGE-L of a back-translation and its original"
    )

    @model_validator(mode="after")
    def _can_hold(self) -> "Settings":
        if "en" in self.languages:
            raise ValueError("languages: en is the language of the originals; leave it out")
        if self.shortest >= self.longest:
            raise ValueError(f"shortest={self.shortest} must be less than longest={self.longest}")
        check_installed()
        return self


async def recipe(row: dict[str, Any], task: Task[Settings]) -> list[Row]:
    settings = task.settings
    messages = dialog_of(row, settings).messages
    originals = [message.content for message in messages]
    _check_originals(originals, settings)
    code = task.random.choice(settings.languages)
    texts = await _translated(task, "translate", originals, code, "author")
    for original, text in zip(originals, texts, strict=True):
        if fault := first_fault(original, text, code, settings.shortest, settings.longest):
            raise Dropped(*fault)
    back = await _translated(task, "back", texts, code, "judge", temperature=0.0, top_p=1.0)
    closeness = _closeness(originals, back)
    if closeness < settings.closeness:
        raise Dropped("the back-translation is not close to the original", f"ROUGE-L {closeness:.3f}")
    task.count("kept", LANGUAGES[code].name)
    task.measure("ROUGE-L of a back-translation and its original", closeness)
    task.measure("length of a translation, relative to its original", _length(texts) / _length(originals))
    made = [
        Message(message.role, text, trained=message.trained)
        for message, text in zip(messages, texts, strict=True)
    ]
    extra = {"language": code, "closeness": round(closeness, 4)}
    return [Row(made, capability="multilingual", kind="translation", extra=extra)]


def _check_originals(originals: list[str], settings: Settings) -> None:
    """Raises `Dropped` for a dialog that is not quantitative, too long, or not in English."""
    text = "\n\n".join(originals)
    words = len(text.split())
    if words > settings.words:
        raise Dropped("the dialog is too long", f"{words} words")
    if numbers_of(text).total() < settings.numbers:
        raise Dropped("the dialog has too few numbers")
    if fault := next(filter(None, (language_fault(each, "en") for each in originals)), ""):
        raise Dropped("the dialog is not in English", fault)


async def _translated(
    task: Task[Settings], step: str, texts: list[str], code: Code, model: str, **sampling: Any
) -> list[str]:
    """The texts in the other language, from one reply. Raises `Dropped` if it does not have them all."""
    prompt = task.prompt(step, texts=texts, language=LANGUAGES[code].name)
    reply = await task.ask(step, prompt, model=model, **sampling)
    what = "the translation" if step == "translate" else "the back-translation"
    if reply.finish != "stop":
        raise Dropped(f"{what} is cut off")
    outside, inside = _between_tags(reply.text, len(texts))
    if len(inside) != len(texts) or outside.strip():
        raise Dropped(f"{what} is not in the form that was asked for", outside.strip()[:200])
    if not all(inside):
        raise Dropped(f"{what} is empty")
    return inside


def _between_tags(text: str, count: int) -> tuple[str, list[str]]:
    """The text outside the tags of the messages 1 to `count`, and the text inside each pair of tags.

    The list is empty if the reply has other tags.
    """
    parts = _TAG.split(text)
    tags = [tag for n in range(1, count + 1) for tag in (f"<message_{n}>", f"</message_{n}>")]
    if parts[1::2] != tags:
        return text, []
    return "".join(parts[::4]), [part.strip() for part in parts[2::4]]


def _closeness(originals: list[str], back: list[str]) -> float:
    """The least ROUGE-L of a message and its back-translation. Messages without words do not count."""
    pairs = [(prose_of(original), prose_of(text)) for original, text in zip(originals, back, strict=True)]
    return min((rouge_l(*pair) for pair in pairs if words_of(pair[0])), default=1.0)


def _length(texts: list[str]) -> int:
    return sum(map(len, texts))
