"""Model cards, licences and training records of exports, and their upload to a stand-in of the hub."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from megatron_post.config.schema import Config
from megatron_post.convert.publishing.card import documents
from megatron_post.convert.publishing.legal import licence_of
from megatron_post.convert.publishing.push import check_export, push
from megatron_post.convert.publishing.record import (
    RECORD,
    DataShare,
    Record,
    Step,
    merged_record,
    read_record,
)
from megatron_post.convert.publishing.run_record import run_documents, write_origin
from megatron_post.display import markdown_code
from megatron_post.rounds.merge import merge
from megatron_post.rounds.merge_settings import Ingredient, MethodMerge
from tests.tiny import tiny_config
from tests.unit.convert.models import to_hf, to_megatron
from tests.unit.rounds.models import tiny_policy

LLAMA = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version Release Date: July 23, 2024\n"
POLICY = "**Llama 3.1** Acceptable Use Policy\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model with the legal files of Llama 3.1."""
    directory = tiny_policy(tmp_path / "Llama-base")
    (directory / "generation_config.json").write_text('{"eos_token_id": 3}\n')
    (directory / "LICENSE").write_text(LLAMA)
    (directory / "USE_POLICY.md").write_text(POLICY)
    return directory


def _run(directory: Path, base: Path) -> Config:
    config = tiny_config(directory, model={"init_from": str(base)})
    Path(config.run_dir).mkdir(parents=True)
    write_origin(config, [DataShare(name="sums", tokens=300), DataShare(name="chat", tokens=100)])
    lines = [
        {"kind": "train", "step": 1, "loss": 3.0, "seconds": 1.0},
        {"kind": "train", "step": 2, "loss": 2.5, "seconds": 1.0},
        {"kind": "eval", "step": 2, "loss": 2.75, "margin": float("nan")},
        {"kind": "train", "step": 3, "loss": 2.0, "seconds": 1.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (Path(config.run_dir) / "metrics.jsonl").write_text(text + '{"kind": "tra')
    return config


def test_a_run_carries_licence_data_settings_and_figures(tmp_path: Path, base: Path) -> None:
    """Shares are those of tokens, 300 and 100 of 400. Figures are those of the exported step."""
    config = _run(tmp_path / "run", base)
    files = run_documents(config, Path(config.run_dir), 2, {})
    assert files["LICENSE"].decode() == LLAMA and files["USE_POLICY.md"].decode() == POLICY
    assert files["NOTICE"].startswith(b"Llama 3.1 is licensed under the Llama 3.1 Community License")
    card = files["README.md"].decode()
    assert "**Built with Llama**" in card and "| `sums` | 300 | 75.0% |" in card
    assert "| `chat` | 100 | 25.0% |" in card and "| `training: loss` | `2.5` |" in card
    assert "| `held out: loss` | `2.75` |" in card and "margin" not in card and "seconds" not in card
    assert "| `train.steps` | `2` |" in card and f"| `optimizer.lr` | `{config.optimizer.lr}` |" in card
    assert str(tmp_path) not in card
    metadata = ModelCard(card).data
    assert (metadata.license, metadata.library_name, metadata.base_model) == (
        "llama3.1",
        "transformers",
        None,
    )
    assert metadata.tags == ["megatron-post", "llama", "sft"]


def test_a_second_run_continues_the_steps_of_the_first(tmp_path: Path, base: Path) -> None:
    first = _run(tmp_path / "first", base)
    exported = tiny_policy(tmp_path / "exported")
    for name, content in run_documents(first, Path(first.run_dir), 3, {}).items():
        (exported / name).write_bytes(content)
    second = _run(tmp_path / "second", exported)
    files = run_documents(second, Path(second.run_dir), 3, {})
    record = Record.model_validate_json(files[RECORD])
    assert [step.name for step in record.steps] == ["sft", "sft"]
    assert (record.base_models, record.license) == (("Llama-base",), "llama3.1")
    assert files["LICENSE"].decode() == LLAMA


def test_conversions_and_merges_carry_documents(tmp_path: Path, base: Path) -> None:
    """The steps that all models of a merge share stand once before it."""
    step = to_megatron(base, tmp_path / "run" / "checkpoints") / "step-00000000"
    assert (step / "LICENSE").read_text() == LLAMA
    back = to_hf(tmp_path / "run" / "checkpoints", tmp_path / "back")
    assert (back / "USE_POLICY.md").read_text() == POLICY and read_record(back) is not None
    names = {}
    for name, steps in {"sft": ["sft"], "dpo": ["sft", "dpo"]}.items():
        names[name] = tiny_policy(tmp_path / name)
        record = Record(base_models=("acme/base",), steps=tuple(Step(name=each) for each in steps))
        files = documents(record, {"LICENSE": f"{name}'s".encode()}, {})
        for file, content in files.items():
            (names[name] / file).write_bytes(content)
    plan = MethodMerge(method="linear", models=tuple(Ingredient(model=str(each)) for each in names.values()))
    merge(plan, tmp_path / "merged", report=lambda text: None)
    merged = read_record(tmp_path / "merged")
    assert merged is not None and [step.name for step in merged.steps] == ["sft", "merge"]
    assert [[step.name for step in model.steps] for model in merged.steps[1].models] == [[], ["dpo"]]
    assert (tmp_path / "merged" / "LICENSE").read_text() == "sft's"
    assert (tmp_path / "merged" / "LICENSE.2").read_text() == "dpo's"
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.base_model == ["acme/base"] and "### 2.2.1. `dpo`" in card.content


def test_records_of_many_rounds_grow_linearly() -> None:
    """A round adds three steps. Without the shared steps ten rounds would have more than 2^10."""
    record = Record()
    for _ in range(10):
        sft = record.model_copy(update={"steps": (*record.steps, Step(name="sft"))})
        dpo = sft.model_copy(update={"steps": (*sft.steps, Step(name="dpo"))})
        record = merged_record([sft, dpo], [0.5, 0.5], {})
    assert len(record.steps) == 20 and record.text().count(b'"name"') == 30


@pytest.mark.parametrize(
    ("files", "name", "expected"),
    [
        ({"LICENSE": LLAMA}, "x", "llama3.1"),
        ({"LICENSE.txt": "META LLAMA 3 COMMUNITY LICENSE AGREEMENT"}, "x", "llama3"),
        ({"README.md": "---\nlicense: apache-2.0\n---\n"}, "meta-llama/Llama-3.2-1B", "apache-2.0"),
        ({}, "meta-llama/Llama-3.2-1B@abc", "llama3.2"),
        ({}, "meta-llama/Meta-Llama-3-8B", "llama3"),
        ({}, "acme/Llama-3.2-1B", None),
        ({"README.md": "---\nlicense: [1\n---\n"}, "x", None),
        ({"README.md": "---\nlicense: 'a\\nb: c'\n---\n"}, "x", None),
    ],
)
def test_licences(tmp_path: Path, files: dict[str, str], name: str, expected: str | None) -> None:
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    assert licence_of(tmp_path, name) == expected


def test_names_from_outside_are_not_interpreted() -> None:
    hostile = "a|b`c``<script>x</script>\n# [l](http://e.example) \x1b[31m"
    assert markdown_code(hostile) == r"```a\x7cb`c``<script>x</script> # [l](http://e.example) \x1b[31m```"
    record = Record(
        base_models=("evil`|<b>",),
        steps=(Step(name="sft", data=(DataShare(name="<img src=x>`|"),), settings={"k": hostile}),),
    )
    card = documents(record, {}, {})["README.md"].decode()
    assert "| base model | ``evil`\\x7c<b>`` |" in card and "| ``<img src=x>`\\x7c`` |" in card
    assert "\x1b" not in card and ModelCard(card).data.base_model is None


def test_a_legal_file_that_links_out_of_the_directory_is_refused(tmp_path: Path, base: Path) -> None:
    (tmp_path / "secret").write_text("key")
    (base / "NOTICE").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="link that points outside"):
        write_origin(tiny_config(tmp_path / "run", model={"init_from": str(base)}), [])


class _Hub(BaseHTTPRequestHandler):
    """The calls of the hub's API that an upload makes. Everything is committed as a regular file."""

    calls: list[tuple[str, Any]]
    refuses = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        lines = [json.loads(line) for line in body.splitlines()]
        self.calls.append((self.path, lines))
        if self.refuses:
            return self._answer({"error": "you may not"}, status=403)
        if "/preupload/" in self.path:
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            return self._answer({"files": [{"path": f["path"], **mode} for f in lines[0]["files"]]})
        if "/commit/" in self.path:
            url = f"https://huggingface.co/acme/Llama-x/commit/{'c' * 40}"
            return self._answer({"commitUrl": url, "commitOid": "c" * 40, "success": True})
        return self._answer({"url": "https://huggingface.co/acme/Llama-x", "id": "acme/Llama-x", "name": "x"})

    def do_GET(self) -> None:
        self._answer({"error": "not there"}, status=404)

    def _answer(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    from huggingface_hub import constants

    handler = type("Hub", (_Hub,), {"calls": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield handler
        server.shutdown()
        thread.join()


@pytest.fixture
def export(tmp_path: Path, base: Path) -> Path:
    to_megatron(base, tmp_path / "run" / "checkpoints")
    directory = to_hf(tmp_path / "run" / "checkpoints", tmp_path / "export", max_shard_bytes=100_000)
    (directory / "notes.txt").write_text("private")
    (directory / ".env").write_text("SECRET=1")
    return directory


def test_push_uploads_the_files_of_the_export(export: Path, hub: type[_Hub]) -> None:
    """A new repository is private, and other files of the directory stay here."""
    found = check_export(export, "acme/Llama-x")
    assert not found.notes
    url = push(found, "acme/Llama-x", private=True, revision="v1")
    assert url.endswith(f"/acme/Llama-x/commit/{'c' * 40}")
    calls = dict(hub.calls)
    assert calls["/api/repos/create"][0]["visibility"] == "private"
    assert "/api/models/acme/Llama-x/branch/v1" in calls
    committed = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in calls["/api/models/acme/Llama-x/commit/v1"]
        if line["key"] == "file"
    }
    assert committed.keys() == found.files.keys()
    assert {"README.md", "LICENSE", "USE_POLICY.md", "NOTICE", "config.json", RECORD} <= committed.keys()
    assert {"generation_config.json", "tokenizer.json", "model.safetensors.index.json"} <= committed.keys()
    assert not {"notes.txt", ".env"} & committed.keys()
    assert all((export / name).read_bytes() == content for name, content in committed.items())


def test_a_refusal_of_the_hub_is_one_message(export: Path, hub: type[_Hub]) -> None:
    hub.refuses = True
    with pytest.raises(ValueError, match=r"acme/Llama-x: the hub cannot be written to: .*403") as error:
        push(check_export(export, "acme/Llama-x"), "acme/Llama-x", private=True, revision=None)
    assert "hf_secret" not in str(error.value)


def test_what_is_no_export_is_refused(tmp_path: Path, base: Path, export: Path) -> None:
    with pytest.raises(ValueError, match=r"has no training_record.json"):
        check_export(base, "acme/x")
    with pytest.raises(ValueError, match="is not a directory"):
        check_export(tmp_path / "none", "acme/x")
    for repo in ("x", "a/b/c", "acme/x y", "", "../x", "acme/"):
        with pytest.raises(ValueError, match="is no name on the hub"):
            check_export(export, repo)
    notes = check_export(export, "acme/mine").notes
    assert notes == ("its licence asks for a name that begins with 'Llama'",)
    (export / "LICENSE").unlink()
    assert "asks for a copy of the LICENSE" in check_export(export, "acme/Llama-x").notes[0]
    next(export.glob("model-00001*")).unlink()
    with pytest.raises(ValueError, match="missing"):
        check_export(export, "acme/x")


def test_dry_run_prints_and_uploads_nothing(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_post.cli import app

    app(["push", str(export), "acme/Llama-x", "--dry-run"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "README.md" in printed and "bytes" in printed and "notes.txt" not in printed
