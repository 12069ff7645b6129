"""A shell and pip accept the commands that messages and pages recommend for an installation."""

import json
import re
import shlex
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_post import installation
from megatron_post.installation import VERSIONS, install_command, require, unfit_versions

ROOT = Path(__file__).resolve().parents[2]


class Distribution:
    """Of `importlib.metadata`, with pip's record of where the package came from."""

    def __init__(self, record: object) -> None:
        self._record = record

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self._record is None else json.dumps(self._record)


def _installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, record: object) -> None:
    monkeypatch.setattr(
        installation, "__file__", str(tmp_path / "site-packages/megatron_post/installation.py")
    )
    monkeypatch.setattr(installation.metadata, "distribution", lambda name: Distribution(record))


def test_from_this_checkout() -> None:
    assert shlex.split(install_command("dali")) == ["pip", "install", "-e", f"{ROOT}[dali]"]
    assert shlex.split(install_command()) == ["pip", "install", "-e", str(ROOT)]


def test_transformer_engine_is_built_for_the_torch_that_is_there() -> None:
    assert shlex.split(install_command("cuda"))[:3] == ["pip", "install", "--no-build-isolation"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"url": "file:///src/my%20copy", "dir_info": {"editable": True}}, ["-e", "/src/my copy[bench]"]),
        ({"url": "file:///src/copy", "dir_info": {}}, ["/src/copy[bench]"]),
        (
            {"url": "file:///tmp/megatron_post-0.1.0-py3-none-any.whl", "archive_info": {}},
            ["/tmp/megatron_post-0.1.0-py3-none-any.whl[bench]"],
        ),
        (
            {"url": "https://example.com/m.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            ["megatron-post[bench] @ git+https://example.com/m.git@abc"],
        ),
        (
            {"url": "https://example.com/m.whl", "archive_info": {}},
            ["megatron-post[bench] @ https://example.com/m.whl"],
        ),
        (None, ["megatron-post[bench]"]),
        ("damaged", ["megatron-post[bench]"]),
    ],
)
def test_command_repeats_the_recorded_source(
    record: object, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _installed(monkeypatch, tmp_path, record)
    assert shlex.split(install_command("bench"))[2:] == words
    if words[-1].startswith("megatron-post"):
        assert Requirement(words[-1]).extras == {"bench"}


def test_only_installation_has_commands_for_this_package() -> None:
    """A command in another module would be right for one kind of installation only."""
    written = re.compile(r"pip install[^\n\"']*(\[\w+\]|megatron-post|-e \.)|megatron-post\[")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in sorted((ROOT / "megatron_post").rglob("*.py"))
        if path.name != "installation.py"
        for match in written.finditer(path.read_text())
    ]
    assert not found, found


def test_no_page_or_script_builds_transformer_engine_in_isolation() -> None:
    """In an isolated environment pip would build it for another torch than the one that is installed."""
    places = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *ROOT.glob("docs/**/*.md")]
    places += [path for path in (ROOT / "launchers").rglob("*") if path.is_file()]
    commands = [
        (path.name, command)
        for path in places
        for command in re.findall(r"pip install[^&;|`\n]*", path.read_text())
        if "[cuda]" in command or "transformer" in command
    ]
    assert {name for name, _ in commands} >= {"README.md", "first_8b_run.md", "build_image.sh"}
    for name, command in commands:
        alone = "--no-deps" in command  # its pure Python code, for the tests
        assert alone or "--no-build-isolation" in command, f"{name}: {command}"


def test_a_missing_package_is_named_with_the_command() -> None:
    require("json", "reading", "curate")
    with pytest.raises(
        ValueError, match=r"^dreaming needs the package no_such_package: pip install .*curate"
    ):
        require("no_such_package", "dreaming", "curate")


@pytest.mark.parametrize(
    ("name", "version", "fits"),
    [
        ("torch", "2.5.1+cu124", False),
        ("torch", "2.6", True),
        ("torch", "2.10.0a0+b4e4ee81d3.nv25.12", True),
        ("megatron-core", "0.16.0", False),
        ("megatron-core", "0.16.1", True),
        ("megatron-core", "0.17", False),
        ("megatron-core", "0.17.0rc1", False),
        ("transformer-engine", "2.9", True),
        ("transformer-engine", "2.11.0+c1", True),
        ("transformer-engine", "2.12.0", False),
        ("NCCL", "2.20.5", False),
        ("NCCL", "2.28.9", True),
        ("torch", "not installed", True),  # what is missing is reported elsewhere
        ("NCCL", "", True),
    ],
)
def test_versions_that_fit(name: str, version: str, fits: bool) -> None:
    found = unfit_versions({name: version})
    assert [line.startswith(f"{name} {version} is not one of {VERSIONS[name]}: ") for line in found] == [
        True
    ] * (not fits)
