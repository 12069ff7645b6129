"""Every command, file, link and block of the pages is what a reader can use: parsed, loaded or found."""

import ast
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from typer.core import TyperGroup

from megatron_post.cli import app
from megatron_post.config.chain import is_chain, load_chain
from megatron_post.config.load import load_config
from megatron_post.inference.generate import Generate
from megatron_post.launch.cluster import load_cluster
from megatron_post.rounds.merge_settings import load_merge
from megatron_post.rounds.select_settings import Select
from megatron_post.rounds.settings import load_round
from megatron_post.synthesis.settings import Synthesis
from tests.documentation import (
    LANGUAGES,
    ROOT,
    anchors,
    arguments,
    blocks,
    commands,
    json_values,
    pages,
    prose,
    spans,
)

PAGES = [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages()]
# commands of others that the pages use; a word that is not here is taken for a mistake
OTHERS = {
    "apptainer", "apt-get", "bash", "cat", "cd", "chmod", "cp", "curl", "docker", "enroot", "export", "git",
    "hf", "ls", "lm_eval", "make", "mkdir", "pip", "python", "python3", "sbatch", "scontrol", "source",
    "squeue", "srun", "tail", "tensorboard", "torchrun", "vllm", "xargs",
}  # fmt: skip
RUNS = {"train", "data pack", "config show", "plan show", "plan search", "plan dry-run", "launch submit",
        "bench step", "bench checkpoint"}  # fmt: skip
ROUNDS = {"round", "launch round"}
FILES = {"generate": Generate, "select": Select, "synthesize run": Synthesis}
# a word in capitals stands for what the reader has
PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_/.]*")
_IN_TREE = re.compile(r"(configs|docs|tests|kernels|launchers|megatron_post)/[\w./*-]*")
_IN_PACKAGE = re.compile(r"[a-z]+/\w+\.(py|sbatch|jinja)")


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Name and parameters of a command, read by the command line itself. Raises typer's usage errors."""
    command: Any = typer.main.get_command(app)
    context, names = command.make_context("megatron-post", list(words)), []
    while isinstance(command, TyperGroup):
        name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None and name is not None
        command, context = found, found.make_context(name, rest, parent=context)
        names.append(name)
    return " ".join(names), context.params


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_a_language_and_parse(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.place}: choose one of {LANGUAGES} as its language"
        if block.language == "json":
            assert json_values(block.text), block.place
        elif block.language == "yaml":
            assert yaml.safe_load(block.text), block.place
        elif block.language == "python":
            ast.parse(block.text)
        elif block.language == "text":  # what is printed; a command belongs into a block that is checked
            assert not re.search(r"^\W*(megatron-post|torchrun|make|pip) ", block.text, re.MULTILINE), (
                block.place
            )


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist_and_their_files_load(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")  # files of pages are written into it
    (tmp_path / "launchers").symlink_to(ROOT / "launchers")
    monkeypatch.chdir(tmp_path)
    found = blocks(page)
    for block in found:
        if block.title:
            Path(block.title).parent.mkdir(exist_ok=True)
            shipped = ROOT / block.title
            assert not shipped.is_file() or shipped.read_text() == block.text, block.title
            Path(block.title).write_text(block.text)
    for block in found:
        for words in commands(block.text) if block.language == "bash" else ():
            what = f"{block.place}: {shlex.join(words)}"
            ours = arguments(words)
            if ours is None:
                assert Path(words[0]).name in OTHERS or os.access(ROOT / words[0], os.X_OK), what
                _check_others(words, what)
                continue
            try:
                _load(*parse(ours))
            except Exception as error:
                pytest.fail(f"{what}\n{getattr(error, 'message', '') or error!r}")


def _check_others(words: list[str], what: str) -> None:
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = [word for word in words[1:] if "=" not in word]
        assert all(re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE) for target in targets), what
    if "-m" in words:
        module = words[words.index("-m") + 1]
        if module.startswith("megatron_post"):
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), what


def _load(name: str, parameters: dict[str, Any]) -> None:
    """Load the files of settings that a command names, with its overrides."""
    cluster = parameters.get("cluster")
    if cluster and not PLACEHOLDER.fullmatch(cluster):
        load_cluster(cluster)
    file = parameters.get("config") or parameters.get("file")
    if not file or PLACEHOLDER.fullmatch(file):
        return
    overrides = [word for word in parameters.get("overrides") or [] if not PLACEHOLDER.search(word)]
    if name in RUNS:
        load_config(file, overrides)
    elif name in ROUNDS and is_chain(file):
        load_chain(file, overrides)
    elif name in ROUNDS:
        load_round(file, overrides)
    elif name in FILES:
        FILES[name].model_validate(yaml.safe_load(Path(file).read_text()))
    elif name == "merge":
        load_merge(file, parameters["method"])


@pytest.mark.parametrize("page", PAGES)
def test_names_in_the_text_exist(page: Path) -> None:
    """Commands, options and files between backticks. A command there need not be complete."""
    for span in [*spans(page), *(block.text for block in blocks(page) if block.language != "text")]:
        for path in (
            match[0].rstrip("./") for match in _IN_TREE.finditer(span) if _begins_a_path(span, match)
        ):
            assert any(ROOT.glob(path)), f"{page.name}: {path} is not in the repository"
    for span in spans(page):
        if _IN_PACKAGE.fullmatch(span):
            assert any((root / span).is_file() for root in (ROOT, ROOT / "megatron_post", page.parent)), (
                f"{page.name}: {span}"
            )
        if re.match(r"make [a-z]", span):
            _check_others(span.split(), f"{page.name}: `{span}`")
        words = arguments(span.split())
        if words is not None:
            _check_names(words, f"{page.name}: `{span}`")


def _begins_a_path(text: str, match: re.Match[str]) -> bool:
    return not match.start() or text[match.start() - 1] in " \n\"'`=({[,"


def _check_names(words: list[str], what: str) -> None:
    command: Any = typer.main.get_command(app)
    for word in words:
        if isinstance(command, TyperGroup) and word in command.commands:
            command = command.commands[word]
        elif isinstance(command, TyperGroup):
            assert command.name in ("plan", "launch"), f"{what}: no command {word}"
            command = command.commands[{"plan": "show", "launch": "submit"}[command.name]]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if re.fullmatch(r"--[a-z][\w-]*", word)} <= {*options, "--help"}, what


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_pages_of_this_repository(page: Path) -> None:
    for target in _links(page):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_relative_to(ROOT) and file.exists(), f"{page.name}: {target} is not there"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target} has no such heading"


def _links(page: Path) -> Iterator[str]:
    for link in re.finditer(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", prose(page)):
        target = link[1] or link[2]
        if not target.startswith(("https://", "mailto:")):
            yield target


def test_every_page_is_in_the_navigation() -> None:
    """`make docs` finds this too, and needs a network once."""
    named = re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    files = (str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))
    assert sorted(named) == sorted([*files, "contributing.md", "index.md"])


def test_nothing_points_outside_of_the_repository() -> None:
    files = [
        *pages(),
        *ROOT.glob("configs/**/*.yaml"),
        *ROOT.glob("megatron_post/**/*.py"),
        ROOT / "Makefile",
    ]
    assert not [
        str(file) for file in files if re.search(r"\bshared(/|\" / )", file.read_text(encoding="utf-8"))
    ]
