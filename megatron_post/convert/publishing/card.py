"""The model card of an export, `README.md`. It is made from the training record.

Names of sources and models come from outside. They stand in the card as code, where neither Markdown nor HTML
is interpreted.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_post.convert.publishing.legal import legal_files, llama_licence
from megatron_post.convert.publishing.record import (
    RECORD,
    Record,
    Result,
    Step,
    merged_record,
    read_record,
    record_of_base,
)
from megatron_post.display import markdown_code
from megatron_post.storage.files import whole_file

CARD = "README.md"
_HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(@.*)?", re.ASCII)
_TASKS = {
    "LlamaForSequenceClassification": "text-classification",
    "LlamaForTokenClassification": "token-classification",
}


def documents(
    record: Record, legal: Mapping[str, bytes], companions: Mapping[str, bytes]
) -> dict[str, bytes]:
    """The record, the model card and the legal files of an export, by name.

    legal: those of the base model. companions: the other small files, whose config names the kind of model.
    """
    files = dict(legal)
    licence = llama_licence(record.license)
    if licence is not None and not any(name.upper().startswith("NOTICE") for name in files):
        files["NOTICE"] = licence.notice
    files[RECORD] = record.text()
    files[CARD] = card_of(record, companions, legal=sorted(files.keys() - {RECORD}))
    return files


def documents_of(directory: Path, companions: Mapping[str, bytes]) -> dict[str, bytes]:
    """The documents of a copy of the weights in a directory."""
    record = read_record(directory) or record_of_base(directory)
    return documents(record, legal_files(directory), companions)


def merged_documents(
    found: Sequence[Mapping[str, bytes]],
    weights: Sequence[float],
    settings: dict[str, Any],
    companions: Mapping[str, bytes],
) -> dict[str, bytes]:
    """The documents of a merge of models with the documents `found`.

    If models have different legal files of one name, the later ones get the number of their model.
    """
    legal: dict[str, bytes] = {}
    for number, files in enumerate(found, 1):
        for name, content in files.items():
            if name in (RECORD, CARD) or legal.setdefault(name, content) == content:
                continue
            legal[f"{name}.{number}"] = content
    records = [Record.model_validate_json(files[RECORD]) for files in found]
    return documents(merged_record(records, weights, settings), legal, companions)


def with_results(directory: Path, results: Sequence[Result]) -> None:
    """Add evaluations to the record and the card of an export. Those of the same tasks are replaced.

    A directory without a record stays as it is, because its card is not ours.
    """
    record = read_record(directory)
    if record is None:
        return
    again = {result.task for result in results}
    kept = tuple(result for result in record.results if result.task not in again)
    record = record.model_copy(update={"results": (*kept, *results)})
    names = [name for name in ("config.json", "adapter_config.json") if (directory / name).is_file()]
    companions = {name: (directory / name).read_bytes() for name in names}
    files = documents(record, legal_files(directory), companions)
    for name in (RECORD, CARD):
        with whole_file(directory / name) as growing:
            growing.write_bytes(files[name])


def card_of(record: Record, companions: Mapping[str, bytes], *, legal: list[str]) -> bytes:
    """The text of the card. legal: names of the legal files beside it."""
    licence = llama_licence(record.license)
    lines = ["# Llama, post-trained with Megatron-Post", ""]
    if licence is not None:
        lines += [f"**{licence.display}**", ""]
    bases = ", ".join(map(markdown_code, record.base_models)) or "none: training began from random weights"
    unknown = "see the legal files" if legal else "not stated by the base model"
    lines += ["| | |", "|---|---|", f"| base model | {bases} |", f"| licence | {record.license or unknown} |"]
    if legal:
        lines.append(f"| legal files | {', '.join(map(markdown_code, legal))} |")
    lines.append("")
    if record.steps:
        lines += ["## Training", ""]
    for number, step in enumerate(record.steps, 1):
        lines += _step(step, f"{number}")
    if record.results:
        lines += ["## Evaluation", "", "| task | figure | value | standard error | examples | rows |"]
        lines.append("|---|---|---|---|---|---|")
        for result in record.results:
            error = "" if result.stderr is None else f"{result.stderr:.4g}"
            shots = "" if result.shots is None else f"{result.shots}"
            names = f"{markdown_code(result.task)} | {markdown_code(result.metric)}"
            rows = "all" if result.limit is None else f"first {result.limit}"
            lines.append(f"| {names} | {result.value:.4g} | {error} | {shots} | {rows} |")
        lines.append("")
    return (_metadata(record, companions) + "\n".join(lines)).encode()


def _metadata(record: Record, companions: Mapping[str, bytes]) -> str:
    """The card's YAML header, which the hub reads."""
    from huggingface_hub import ModelCardData

    is_adapter = "adapter_config.json" in companions
    config = json.loads(companions.get("config.json", b"{}"))
    architecture = next(iter(config.get("architectures") or []), "LlamaForCausalLM")
    names = [match[1] for name in record.base_models if (match := _HUB_NAME.fullmatch(name))]
    data = ModelCardData(
        base_model=names or None,
        license=record.license,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=_TASKS.get(architecture, "text-generation"),
        tags=["megatron-post", "llama", *dict.fromkeys(_names(record.steps))],
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _names(steps: tuple[Step, ...]) -> Iterator[str]:
    for step in steps:
        for model in step.models:
            yield from _names(model.steps)
        yield step.name


def _step(step: Step, number: str) -> list[str]:
    """The lines of a step. number: such as `3`, or `3.1.2` for a step of a merge's first model."""
    lines = [f"### {number}. {markdown_code(step.name)}", ""]
    if step.data:
        total = sum(source.tokens or 0 for source in step.data)
        lines += ["| source | tokens | share |", "|---|---|---|"]
        for source in step.data:
            count = "" if source.tokens is None else f"{source.tokens:,}"
            share = "" if source.tokens is None or not total else f"{source.tokens / total:.1%}"
            lines.append(f"| {markdown_code(source.name)} | {count} | {share} |")
        lines.append("")
    settings = {k: v if isinstance(v, str) else json.dumps(v) for k, v in step.settings.items()}
    figures = {key: f"{value:.4g}" for key, value in step.figures.items()}
    for title, values in (("setting", settings), ("figure", figures)):
        if values:
            lines += [f"| {title} | value |", "|---|---|"]
            lines += [f"| {markdown_code(key)} | {markdown_code(text)} |" for key, text in values.items()]
            lines.append("")
    for place, model in enumerate(step.models, 1):
        after = "" if model.steps else ", as it was before this step"
        lines += [f"Model {place}: weight {model.weight:g}{after}", ""]
        for inner, own in enumerate(model.steps, 1):
            lines += _step(own, f"{number}.{place}.{inner}")
    return lines
