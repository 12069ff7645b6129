"""Verifiers decide whether a response is right, independently of the reward model."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, field_validator

from megatron_post.config.section import Positive, Section
from megatron_post.curation.patterns import check_pattern, first_group
from megatron_post.inference.prompts import Prompt
from megatron_post.inference.request import messages_as_json


class ExactMatch(Section):
    """A response is right if the first group of `pattern`'s match is the prompt's answer."""

    kind: Literal["exact"] = Field("exact", description="selects this verifier")
    pattern: str = Field(description=r"regular expression with a group, such as 'The answer is (\d+)\.\Z'")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        if not check_pattern(pattern):
            raise ValueError(f"{pattern!r} has no group for the answer; put parentheses around it")
        return pattern


class Command(Section):
    """A user's program, which reads and writes one JSON line per response.

    It reads `{"prompt", "response", "answer", "solution"}` and writes `{"correct": true or false, "edited": a
    right response, if it can make one}`.
    """

    kind: Literal["command"] = Field(description="selects this verifier")
    command: tuple[str, ...] = Field(
        min_length=1, description="program and arguments, which no shell interprets"
    )
    timeout: Positive = Field(600.0, description="seconds for all responses together")


VerifierSettings = Annotated[ExactMatch | Command, Field(discriminator="kind")]


@dataclass(frozen=True)
class Verdict:
    """Whether a response is right. edited: a right response to the same prompt, if the verifier has one."""

    correct: bool
    edited: str | None = None


def judge(settings: VerifierSettings, asked: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
    """A verdict on each (prompt, response).

    Raises `ValueError` for a prompt without an answer, and for a program that fails, times out or writes
    invalid output.
    """
    if isinstance(settings, Command):
        return _by_command(settings, asked)
    if nameless := [prompt.number for prompt, _ in asked if prompt.answer is None]:
        raise ValueError(f"the prompt of line {nameless[0]} has no `answer` for the exact verifier")
    verdicts = []
    for prompt, text in asked:
        found = first_group(settings.pattern, text.strip())
        verdicts.append(Verdict(found is not None and found == prompt.answer, prompt.solution))
    return verdicts


def _by_command(settings: Command, asked: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
    lines = [
        json.dumps(
            {
                "prompt": messages_as_json(p.messages),
                "response": text,
                "answer": p.answer,
                "solution": p.solution,
            }
        )
        for p, text in asked
    ]
    name = " ".join(settings.command)
    try:
        done = subprocess.run(
            settings.command,
            input="".join(f"{line}\n" for line in lines),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=settings.timeout,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"verifier {name}: not finished within timeout={settings.timeout} s") from None
    except OSError as error:
        raise ValueError(f"verifier {name}: {error}") from None
    if done.returncode:
        raise ValueError(f"verifier {name} ended with status {done.returncode}: {done.stderr[-500:]}")
    # Not splitlines(), because a text may contain line separators.
    answers = done.stdout.removesuffix("\n").split("\n")
    if len(answers) != len(asked):
        raise ValueError(f"verifier {name} wrote {len(answers)} lines for {len(asked)} responses")
    return [_verdict(line, number, name) for number, line in enumerate(answers, start=1)]


def _verdict(line: str, number: int, name: str) -> Verdict:
    try:
        values = json.loads(line)
        correct, edited = values["correct"], values.get("edited")
        if not isinstance(correct, bool) or not isinstance(edited, str | None):
            raise TypeError("`correct` must be a boolean and `edited` a text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"verifier {name}, line {number}: no verdict ({error!r}): {line[:200]}") from None
    return Verdict(correct, edited)
