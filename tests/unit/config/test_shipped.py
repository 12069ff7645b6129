"""Configs are installed with the package, and can be listed and copied."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_post.cli import app
from megatron_post.config.load import load_config
from megatron_post.config.shipped import copy, listed, shipped

ROOT = Path(__file__).resolve().parents[3]


def test_every_config_is_listed_with_its_purpose() -> None:
    found = listed()
    files = (ROOT / "configs").rglob("*.yaml")
    assert set(found) == {str(file.relative_to(ROOT / "configs").with_suffix("")) for file in files}
    assert all(found.values())


def test_a_copied_config_loads_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config is copied with its base and the files that it names, such as sample data."""
    files = copy("tiny/sample_dpo", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert {file.name for file in files} >= {"sample_dpo.yaml", "sample.yaml", "preferences.jsonl"}
    config = load_config("configs/tiny/sample_dpo.yaml")
    assert Path(config.tokenizer.path).is_dir()
    assert all(Path(source.path).is_file() for source in config.data.sources)
    assert copy("tiny/sample_dpo", tmp_path) == []


@pytest.mark.parametrize("name", ["llama3_8b", "synthesis", "clusters", "launchers", "tiny/round.yaml"])
def test_directories_are_copied_whole(tmp_path: Path, name: str) -> None:
    copied = {file.relative_to(tmp_path) for file in copy(name, tmp_path)}
    root = ROOT if name == "launchers" else ROOT / "configs"
    wanted = [root / name] if name.endswith(".yaml") else (root / name).rglob("*")
    assert copied >= {file.relative_to(ROOT) for file in wanted if file.is_file()}
    assert all((tmp_path / file).read_bytes() == (ROOT / file).read_bytes() for file in copied)


def test_an_edited_copy_is_not_replaced(tmp_path: Path) -> None:
    (edited, *_) = copy("clusters", tmp_path)
    edited.write_text("mine")
    others = [file for file in copied_files(tmp_path) if file != edited]
    for file in others:
        file.unlink()
    with pytest.raises(ValueError, match="is there with other content"):
        copy("clusters", tmp_path)
    assert edited.read_text() == "mine" and copied_files(tmp_path) == [edited]


def copied_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "name", ["lama3_8b", "", ".", "..", "../setup.py", "/etc/passwd", "tiny/../../README"]
)
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="there is no shipped config"):
        copy(name, tmp_path)
    assert copied_files(tmp_path) == []


def test_the_commands(tmp_path: Path) -> None:
    runner = CliRunner()
    listing = runner.invoke(app, ["config", "list"]).output
    assert "llama3_405b/sft" in listing and "tiny/demo" in listing
    output = runner.invoke(app, ["config", "copy", "llama3_8b/sft", "--to", str(tmp_path)]).output
    assert str(tmp_path / "configs" / "llama3_8b" / "base.yaml") in output.replace("\n", "")
    assert runner.invoke(app, ["--version"]).output.startswith("megatron-post ")


def test_a_wheel_holds_every_file_of_the_project_that_commands_need(tmp_path: Path) -> None:
    """Templates, configs, launchers and markers of types, as git knows them."""
    pytest.importorskip("setuptools")
    rooms = ["megatron_post", "configs", "launchers", "kernels/megatron_post_kernels"]
    tracked = subprocess.run(
        ["git", "ls-files", *rooms], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"  # a build writes into its directory
    for file in [*tracked.stdout.split(), "setup.py", "pyproject.toml", "README.md"]:
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_bytes((ROOT / file).read_bytes())
    subprocess.run([*build, "--wheel-dir", tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in tracked.stdout.split():
        inside = file.removeprefix("kernels/")
        inside = f"megatron_post/{inside}" if inside.startswith(("configs/", "launchers/")) else inside
        assert inside in names, file
    assert shipped("configs/tiny/demo.yaml").is_file()
