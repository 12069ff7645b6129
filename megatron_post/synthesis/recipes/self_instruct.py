"""Instructions that a model writes from seed tasks and its own earlier ones, with inputs and outputs.

The input rows of a generation are of two kinds. One has instructions of the pool, from which new ones are
written. The other is an instruction that the generation before has written. It comes into the pool if it
passes the filters and is not close to any that is there.
"""

import random
import re
import string
from collections.abc import Generator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from megatron_post.config.section import Count, Name, Section, Whole
from megatron_post.data.dialog import Message
from megatron_post.synthesis.instances import Instance, classified, examples, without_faults
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.rouge import RougePool
from megatron_post.synthesis.row import Found, Row
from megatron_post.synthesis.task import Task

VERSION = 1
_IN_CONTEXT, _OF_SEEDS = 8, 6
_SHORTEST, _LONGEST = 4, 150  # words of an instruction
_NUMBERED = re.compile(r"^[ \t]*\d+[ \t]*[.)][ \t]*", re.MULTILINE)
_WITH_INPUT = (
    "{instruction}\n\n{input}",
    "{instruction}\n{input}",
    "{instruction}\nInput: {input}",
    "Task: {instruction}\n\nInput:\n{input}",
)
_ALONE = ("{instruction}", "{instruction}", "{instruction}", "Task: {instruction}")
Values = list[dict[str, Any]]


class Settings(Section):
    instructions: Count = Field(50_000, description="generated instructions at which no more are written")
    batches: Count = Field(64, description="requests of one generation that write new instructions")
    new: Count = Field(8, description="instructions that one request asks for")
    rouge: float = Field(0.7, gt=0, le=1, description="ROUGE-L at which two instructions are too close")
    instances: Count = Field(5, description="inputs and outputs of one instruction, at most")
    words: tuple[Name, ...] = Field(
        (
            *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps"),
            *("draw", "plot", "go to"),
        ),
        description="words of instructions that a language model cannot follow",
    )
    only_classification: bool = Field(False, description="write classification tasks from such seeds alone")
    seed: Whole = Field(0, description="of the choice of instructions in a prompt")


class _Seed(BaseModel):
    """What is used of a seed task."""

    model_config = ConfigDict(strict=True)

    instruction: str = Field(min_length=1)
    is_classification: StrictBool


def generations(seeds: Values, settings: Settings) -> Generator[Values, Values, None]:
    """Raises `ValueError` for seeds that are not in Self-Instruct's form, and for too few of them."""
    instructions = _Instructions(_instructions_of(seeds, settings), settings)
    batch, written, grows = 0, list[dict[str, Any]](), True
    while True:
        batches = []
        if grows and len(instructions.generated) < settings.instructions:
            batches = [
                {"instructions": instructions.chosen(), "batch": batch + n} for n in range(settings.batches)
            ]
            batch += settings.batches
        if not written and not batches:
            return
        found = yield [*written, *batches]
        before = len(instructions.generated)
        written = [{**values, **instructions.add(values["instruction"])} for values in found]
        grows = len(instructions.generated) > before


class _Instructions:
    """The instructions of the seeds, and those that were generated and are not close to earlier ones."""

    def __init__(self, human: list[str], settings: Settings) -> None:
        self._human, self._settings = human, settings
        self._pool, self._seeds = RougePool(human), RougePool(human)
        self._texts = {_plain(text) for text in human}
        self._chooser = random.Random(settings.seed)
        self.generated: list[str] = []

    def chosen(self) -> list[str]:
        """Those of a prompt: six of the seeds and two generated ones, or more seeds at the beginning."""
        own = self._chooser.sample(self.generated, min(_IN_CONTEXT - _OF_SEEDS, len(self.generated)))
        chosen = own + self._chooser.sample(self._human, _IN_CONTEXT - len(own))
        self._chooser.shuffle(chosen)
        return chosen

    def add(self, instruction: str) -> dict[str, Any]:
        """Add a new one, unless it has a fault. Returns what the next generation has to know about it."""
        fault, detail = _fault(instruction, self._settings.words), instruction
        if not fault and (close := self._pool.closest(instruction, least=self._settings.rouge)):
            fault = "the instruction is too close to one of the pool"
            detail = f"{instruction}\nROUGE-L {close[0]:.3f} to: {close[1]}"
        elif not fault and _plain(instruction) in self._texts:  # ROUGE sees no words of other scripts
            fault = "the instruction repeats one of the pool"
        if not fault:
            self._pool.add(instruction)
            self._texts.add(_plain(instruction))
            self.generated.append(instruction)
        to_seed = self._seeds.closest(instruction)
        return {"fault": fault, "detail": detail, "rouge_to_seed": round(to_seed[0], 4) if to_seed else 0.0}


def _instructions_of(seeds: Values, settings: Settings) -> list[str]:
    found = []
    for number, values in enumerate(seeds, start=1):
        try:
            seed = _Seed.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise ValueError(
                f"input: row {number}: {key}: {first['msg']}. A seed task has `instruction` and "
                "`is_classification`"
            ) from None
        if seed.is_classification or not settings.only_classification:
            found.append(_one_line(seed.instruction))
    if len(found) < _IN_CONTEXT:
        what = "classification tasks" if settings.only_classification else "tasks"
        raise ValueError(f"input: {len(found)} seed {what}; a prompt needs {_IN_CONTEXT}")
    return found


def _fault(instruction: str, words: tuple[str, ...]) -> str:
    """Why an instruction is of no use; empty if it may be."""
    length = len(instruction.split())
    named = (word for word in words if re.search(rf"\b{re.escape(word)}\b", instruction, re.IGNORECASE))
    if length < _SHORTEST:
        return "the instruction is too short"
    if length > _LONGEST:
        return "the instruction is too long"
    if word := next(named, ""):
        return f"the instruction has the word {word!r}"
    if instruction.lower().startswith("write a program"):
        return "the instruction asks for a program"
    if instruction[0] in string.punctuation:
        return "the instruction begins with punctuation"
    return "" if instruction[0].isascii() else "the instruction does not begin in English"


async def recipe(row: dict[str, Any], task: Task[Settings]) -> list[Row] | list[Found]:
    return await (_written(row, task) if "instructions" in row else _instantiated(row, task))


async def _written(row: dict[str, Any], task: Task[Settings]) -> list[Found]:
    """New instructions from eight of the pool."""
    settings = task.settings
    values = {"instructions": row["instructions"], "count": settings.new}
    prompt = task.prompt("write", classification=settings.only_classification, **values)
    reply = await task.ask("write", prompt, seed=row["batch"])
    found = [_one_line(text) for text in _NUMBERED.split(reply.text)[1:]]
    if reply.finish != "stop" and found:
        task.count("write", "the last instruction is cut off")
        found.pop()
    if not any(found):
        raise Dropped("the reply has no numbered instruction")
    return [Found({"instruction": text, "written_from": task.id}) for text in found if text]


async def _instantiated(row: dict[str, Any], task: Task[Settings]) -> list[Row]:
    """Inputs and outputs of an instruction, if it came into the pool."""
    task.count("pool", row["fault"] or "new instruction")
    if row["fault"]:
        raise Dropped(row["fault"], row["detail"])
    instruction, count = row["instruction"], task.settings.instances
    is_classification = task.settings.only_classification or await _is_classification(task, instruction)
    step = "output_first" if is_classification else "input_first"
    reply = await task.ask(step, task.prompt(step, instruction=instruction, count=count))
    found = classified(reply.text) if is_classification else examples(reply.text)
    if reply.finish != "stop" and found:
        task.count(step, "the last example is cut off")
        found.pop()
    kept, faults = without_faults(found)
    for fault in faults:
        task.count(step, fault)
    if not kept:
        raise Dropped("no example can be used" if found else "the reply has no example")
    kept = kept[:count]
    kind = "classification" if is_classification else "generation"
    task.count("kept", f"{kind} instruction")
    _measure(task, row, kept)
    return [_row(task, row, kind, instance) for instance in kept]


async def _is_classification(task: Task[Settings], instruction: str) -> bool:
    prompt = task.prompt("classify", instruction=instruction)
    reply = await task.ask("classify", prompt, temperature=0.0, top_p=1.0)
    verdict = reply.text.strip().rstrip(".").lower()
    if verdict not in ("yes", "no"):
        raise Dropped("the answer to whether it is classification is neither yes nor no", reply.text)
    return verdict == "yes"


def _measure(task: Task[Settings], row: dict[str, Any], instances: list[Instance]) -> None:
    task.measure("ROUGE-L of an instruction to the nearest seed", row["rouge_to_seed"])
    task.measure("words of an instruction", len(row["instruction"].split()))
    for instance in instances:
        if instance.input:
            task.measure("words of an input that is not empty", len(instance.input.split()))
        task.measure("words of an output", len(instance.output.split()))


def _row(task: Task[Settings], row: dict[str, Any], kind: str, instance: Instance) -> Row:
    form = task.random.choice(_WITH_INPUT if instance.input else _ALONE)
    asked = form.format(instruction=row["instruction"], input=instance.input)
    extra = {key: row[key] for key in ("instruction", "rouge_to_seed")} | {"input": instance.input}
    return Row(
        [Message("user", asked), Message("assistant", instance.output)],
        capability="general",
        kind=kind if instance.input else f"{kind} without input",
        parents=[row["written_from"]],
        extra=extra,
    )


def _one_line(text: str) -> str:
    """A text in one line, with a capital letter at its beginning."""
    line = " ".join(text.split())
    return line[:1].upper() + line[1:]


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
