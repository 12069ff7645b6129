"""Inputs and outputs of an instruction, as a model writes them after Self-Instruct's prompts."""

import re
from typing import NamedTuple

_EXAMPLE = re.compile(r"^[ \t]*Example[ \t]*\d*[ \t]*[.:]?[ \t]*$", re.MULTILINE | re.IGNORECASE)
_INPUT = re.compile(r"^[ \t]*Input[ \t]*\d*[ \t]*:[ \t]*", re.MULTILINE)
_OUTPUT = re.compile(r"^[ \t]*Output[ \t]*\d*[ \t]*:[ \t]*", re.MULTILINE)
_LABEL = re.compile(r"^[ \t]*Class label[ \t]*\d*[ \t]*:[ \t]*", re.MULTILINE | re.IGNORECASE)


class Instance(NamedTuple):
    """input: empty if the instruction needs none."""

    input: str
    output: str


def examples(text: str) -> list[Instance]:
    """The examples of a reply that has the input of each before its output."""
    found = []
    for part in _EXAMPLE.split(text):
        before, *outputs = _OUTPUT.split(part)
        if outputs:  # what follows a second output in one example is of no use
            output = _INPUT.split(outputs[0])[0].strip()
            found.append(Instance(_INPUT.sub("", before, count=1).strip(), output))
    return found


def classified(text: str) -> list[Instance]:
    """The examples of a reply that has the class label of each before its input."""
    found = []
    for part in _LABEL.split(text)[1:]:
        label, _, rest = part.partition("\n")
        found.append(Instance(_INPUT.sub("", rest, count=1).strip(), label.strip()))
    return found


def without_faults(instances: list[Instance]) -> tuple[list[Instance], list[str]]:
    """The instances that can be used, and why each other one cannot.

    If one input has several outputs, none of the instances can: the model does not know the task.
    """
    kept: dict[Instance, None] = {}
    faults = []
    for instance in instances:
        fault = _fault(instance) or ("repeated example" if instance in kept else "")
        if fault:
            faults.append(fault)
        else:
            kept[instance] = None
    inputs = [instance.input for instance in kept if instance.input]
    if len(inputs) > len(set(inputs)):
        return [], [*faults, *["one input has several outputs"] * len(kept)]
    return list(kept), faults


def _fault(instance: Instance) -> str:
    if not instance.output:
        return "empty output"
    if instance.input == instance.output:
        return "input and output are the same"
    return "text ends with a colon" if instance.input.endswith(":") or instance.output.endswith(":") else ""
