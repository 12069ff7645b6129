"""Which directories of a machine's tools a program sees."""

import sys
from pathlib import Path

import pytest

from megatron_post.sandbox import toolchains


def _tool(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def test_a_tool_in_the_home_directory_does_not_show_that_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in (".ssh", "share", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "lib").write_text("a file of that name")
    _tool(tmp_path / "bin/node")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert tmp_path in toolchains.prefixes()
    assert toolchains.directories(tmp_path) == [str(tmp_path / "bin")]


def test_a_toolchain_of_its_own_is_seen_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _tool(tmp_path / "gcc/bin/g++")
    for name in ("lib/gcc", "libexec/gcc", "include/c++", "x86_64-conda-linux-gnu/sysroot"):
        (tmp_path / "gcc" / name).mkdir(parents=True)
    (tmp_path / "links").mkdir()
    (tmp_path / "links/g++").symlink_to(tmp_path / "gcc/bin/g++")
    monkeypatch.setenv("PATH", str(tmp_path / "links"))
    assert tmp_path / "gcc" in toolchains.prefixes()
    names = [Path(path).name for path in toolchains.directories(tmp_path / "gcc")]
    assert names == ["bin", "lib", "libexec", "include", "x86_64-conda-linux-gnu"]


def test_rustup_is_asked_which_toolchain_it_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _tool(tmp_path / "shims/rustc")
    (tmp_path / "shims/rustc").write_text(f"#!/bin/sh\necho {tmp_path}/stable\n")
    monkeypatch.setenv("PATH", str(tmp_path / "shims"))
    assert tmp_path / "stable" in toolchains.prefixes()
    assert tmp_path / "shims" not in toolchains.prefixes()


def test_usr_is_seen_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setenv("PATH", "/usr/bin")
    assert toolchains.prefixes() == []
