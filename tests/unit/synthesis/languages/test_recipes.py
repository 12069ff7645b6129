"""Translations with right and wrong replies, and the filter of mix-ups."""

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_post.config.data import Source
from megatron_post.config.load import ConfigError, load_config
from megatron_post.data.build import build_store
from megatron_post.data.dialog import Dialog
from megatron_post.data.rows import BadRows, read_rows
from megatron_post.data.tokenizer import train_small_tokenizer
from megatron_post.storage.reading import read_object
from tests.documentation import ROOT
from tests.scripted_server import ScriptedServer
from tests.unit.synthesis.conftest import Place
from tests.unit.synthesis.languages.translator import PHRASES, answer, fault, row, texts

pytest.importorskip("py3langid")
COLUMNS = {"user": "question", "assistant": "answer"}
NUMBERS, FORM = "the translation changes numbers", "the translation is not in the form that was asked for"
LANGUAGE, SCRIPTS = "the translation is in another language", "the translation mixes scripts"
EXPECTED = {
    "Anna": "translation",
    "Local": "translation",
    "Cody": "translation",
    "Renumbered": NUMBERS,
    "Added": NUMBERS,
    "Codysseus": "the translation changes code",
    "Formula": "the translation changes a formula",
    "English": LANGUAGE,
    "Half": LANGUAGE,
    "Dutch": LANGUAGE,
    "Chinese": SCRIPTS,
    "Lookalike": SCRIPTS,
    "Brief": "the translation is too short or too long",
    "Prose": FORM,
    "Chatty": FORM,
    "Single": FORM,
    "Empty": "the translation is empty",
    "Cut": "the translation is cut off",
    "Faraway": "the back-translation is not close to the original",
    "Refused": "refused by a model",
    "Refusedback": "refused by a model",
}
OTHERS: list[tuple[dict[str, Any], str]] = [
    (
        dict(zip(("question", "answer"), texts("de", "Anna", 12, 5), strict=True)),
        "the dialog is not in English",
    ),
    ({"question": "Who bakes the cakes?", "answer": "Anna does."}, "the dialog has too few numbers"),
    ({"question": "Read 1 text. " * 400, "answer": "No."}, "the dialog is too long"),
    ({"question": "Say 1. <|im_end|>", "answer": "1"}, "`data pack` would refuse the row"),
]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ScriptedServer(answer, fault) as server:
        yield Place(tmp_path, server)


def _run(
    place: Place, rows: list[dict[str, Any]], recipe: str = "translated_reasoning", **values: Any
) -> None:
    path = place.directory / "input.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    backend = {"kind": "server", "url": place.server.url, "served_model": "author", "timeout": 20.0}
    models = (
        {}
        if recipe == "language_match"
        else {"author": {"model": "a", "backend": backend}, "judge": "author"}
    )
    values = {"max_failed": 0.2, "recipe": recipe, "models": models, **values}
    place.run(input={"kind": "rows", "path": str(path)}, **values)


def _outcomes(place: Place) -> list[str]:
    found = {each["provenance"]["source"]: each["kind"] for each in place.rows()}
    found |= {each["source"]: each["reason"] for each in place.rows("dropped.jsonl")}
    return [found[source] for source in sorted(found, key=lambda source: int(source.rpartition(":")[2]))]


def _baked() -> list[dict[str, Any]]:
    return [row(name, 1200 + 7 * number, 35) for number, name in enumerate(EXPECTED)]


def _settings(*languages: str, **more: Any) -> dict[str, Any]:
    return {"columns": COLUMNS, "languages": list(languages), **more}


def test_exactly_the_right_translations_come_out(place: Place) -> None:
    _run(place, [*_baked(), *(each for each, _ in OTHERS)], settings=_settings("de"))
    assert _outcomes(place) == [*EXPECTED.values(), *(outcome for _, outcome in OTHERS)]
    first = place.rows()[0]
    assert [m["content"] for m in first["messages"]] == texts("de", "Anna", 1200, 35)
    assert (first["language"], first["capability"], first["closeness"]) == ("de", "multilingual", 1.0)
    assert "1.207 Kuchen" in place.rows()[1]["messages"][0]["content"]
    # no reply of an input that was dropped before, and no back-translation of a wrong translation
    asked = [body["messages"][0]["content"][:80] for body in place.server.requests]
    assert sum("to English" in each for each in asked) == 5
    assert sum("to German" in each for each in asked) == len(EXPECTED)


def test_each_language_of_the_report(place: Place) -> None:
    codes = [code for code in PHRASES if code != "en"]
    _run(place, [row("Anna", 100 + number, 5) for number in range(40)], settings=_settings(*codes))
    assert {each["language"] for each in place.rows()} == set(codes) and len(place.rows()) == 40
    source = Source(name="s", path=str(place.output / "rows.jsonl"))
    dialogs = [dialog for _, dialog in read_rows(source, bad_rows=BadRows())]
    assert len(dialogs) == 40 and all(isinstance(dialog, Dialog) for dialog in dialogs)


def test_a_dialog_of_several_turns_keeps_which_are_trained(place: Place) -> None:
    question, solution = texts("en", "Anna", 12, 5)
    asked = {"role": "user", "content": question}
    wrong, right = ({"role": "assistant", "content": solution, "train": train} for train in (False, True))
    _run(place, [{"messages": [asked, wrong, asked, right]}], settings={"languages": ["de"]})
    (found,) = place.rows()
    assert [m["content"] for m in found["messages"]] == 2 * texts("de", "Anna", 12, 5)
    assert [m.get("train") for m in found["messages"]] == [None, False, None, True]


def test_a_run_that_was_cut_off_goes_on(place: Place) -> None:
    _run(place, _baked(), settings=_settings("de"))
    expected, asked = place.bytes(), place.asked()
    (journal,) = (place.output / "journal").glob("journal-*.jsonl")
    content = journal.read_bytes()[: journal.stat().st_size // 2]
    shutil.rmtree(place.output)
    journal.parent.mkdir(parents=True)
    journal.write_bytes(content)
    for rank in (1, 0):
        _run(place, _baked(), settings=_settings("de"), rank=rank, size=2)
    kept = content.count(b'"kind":"reply"')
    assert place.bytes() == expected and kept
    assert place.asked() in (asked - kept, asked - kept + 1)  # the torn line may be a reply


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"languages": ["en"]}, "en is the language of the originals"),
        ({"languages": ["sr"]}, "languages"),
        ({"languages": []}, "languages"),
        ({"columns": {"user": "question"}}, "make neither a dialog"),
        ({"shortest": 2.0, "longest": 1.0}, "must be less than"),
    ],
)
def test_wrong_settings_are_refused(place: Place, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _run(place, [row("Anna", 12, 5)], settings=settings)


@pytest.mark.parametrize("package", ["py3langid", "rapidfuzz"])
def test_a_package_that_is_not_installed_is_named(
    place: Place, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(ConfigError, match=f"{package}: pip install"):
        _run(place, [row("Anna", 12, 5)], settings=_settings("de"))
    assert not place.server.requests


def test_a_response_must_be_in_the_language_and_script_of_its_prompt(place: Place) -> None:
    german, english, hindi = (texts(code, "Anna", 12, 5) for code in ("de", "en", "hi"))
    romanised = "Anna subah baarah kek banati hai aur unhein bazaar mein bech deti hai. Kitne bache?"
    pairs = [
        (german[0], german[1], "match"),
        (german[0], "7", "match"),
        (german[0], english[1], "the response is in another language"),
        (german[0], german[1].replace("Kuchen", "蛋糕", 1), "the response mixes scripts"),
        (hindi[0], hindi[1], "match"),
        (hindi[0], romanised, "the response mixes scripts"),
        (english[0], hindi[1], "the response mixes scripts"),
        ("12 - 5?", german[1], "the language of the prompt cannot be identified"),
        (german[0].replace("Kuchen", "Kuсhen"), german[1], "the prompt mixes scripts"),
    ]
    rows = [{"prompt": prompt, "completion": response} for prompt, response, _ in pairs]
    _run(place, rows, "language_match")
    assert _outcomes(place) == [outcome for *_, outcome in pairs]
    assert not place.server.requests
    assert [each["language"] for each in place.rows()] == ["de", "de", "hi"]


def test_a_column_may_name_the_language_of_the_response(place: Place) -> None:
    german, english = (texts(code, "Anna", 12, 5) for code in ("de", "en"))
    asked = f"Translate to German: {english[1]}"
    rows = [
        {"prompt": asked, "completion": german[1], "to": "de"},
        {"prompt": asked, "completion": english[1], "to": "de"},
        {"prompt": "12?", "completion": german[1], "to": "de"},
        {"prompt": asked, "completion": german[1], "to": "tlh"},
        {"prompt": asked, "completion": german[1]},
    ]
    _run(place, rows, "language_match", settings={"language": "to"})
    found = [
        "match",
        "the response is in another language",
        "match",
        "no language is known by the code in the row",
        "ValueError in the recipe",
    ]
    assert _outcomes(place) == found


def test_the_mixture_of_the_report() -> None:
    config = load_config(ROOT / "configs/llama3_405b/sft_multilingual.yaml")
    assert [source.weight for source in config.data.sources] == [2.4, 44.2, 18.8, 34.6]
    whole = load_config(ROOT / "configs/llama3_405b/sft.yaml").data.sources
    (share,) = (source.weight for source in whole if source.name == "multilingual")
    text = (ROOT / "configs/llama3_405b/sft_multilingual.yaml").read_text()
    assert share is not None
    for source in config.data.sources:
        assert source.weight is not None and f"{source.weight * share / 100:.4f}" in text


def test_a_packed_store_has_the_shares_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 24 rows of people are 2.4%, so a percent is 10 rows. The other sources have more rows than that."""
    available = {
        "data/multilingual/human.jsonl": 24,
        "data/multilingual/tasks.jsonl": 500,
        "runs/language_match/rows.jsonl": 200,
        "runs/translated_reasoning/rows.jsonl": 400,
        "data/multilingual/held_out.jsonl": 2,
    }
    for path, count in available.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = (
            {"prompt": f"{path} {number}?", "completion": "a " * (number % 7 + 1)} for number in range(count)
        )
        file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    train_small_tokenizer(["a b c 1 2 3"] * 5, 280).save(tmp_path / "tokenizer")
    config = load_config(
        ROOT / "configs/llama3_405b/sft_multilingual.yaml", [f"tokenizer.path={tmp_path / 'tokenizer'}"]
    )
    monkeypatch.chdir(tmp_path)
    shares = build_store(config, console=Console(quiet=True)).groups["train"].shares
    assert [share.rows for share in shares] == [24, 442, 188, 346]


def test_summary_has_the_measures(place: Place) -> None:
    _run(place, [row("Anna", 12, 5)], settings=_settings("de"))
    summary = read_object(place.output / "summary.json", "summary")["summary"]
    assert summary["steps"]["kept"]["results"] == {"German": 1}
