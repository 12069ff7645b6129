"""Which module an import statement means, in several layouts of a repository."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_post.synthesis.code.scripts import script


def _modules(tmp_path: Path, files: dict[str, str], *, least: int = 1) -> dict[str, Any]:
    """What the script prints of files that this test wrote, so that they are not hostile."""
    for name in ("repository.py", "definitions.py"):
        (tmp_path / name).write_bytes(script(name).read_bytes())
    (tmp_path / "files.json").write_text(json.dumps(files))
    command = [sys.executable, "repository.py", "pkg", str(least)]
    found = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60)
    modules: dict[str, Any] = json.loads(found.stdout)["modules"]
    return modules


@pytest.mark.parametrize("prefix", ["", "src/pkg/", "lib/pkg/", "pkg/", "deep/er/pkg/"])
def test_layouts(tmp_path: Path, prefix: str) -> None:
    files = {
        "__init__.py": "",
        "a.py": "one = two = three = 1\ndef four(): pass\nclass Five: six = 1",
        "sub/__init__.py": "from ..a import one",
        "sub/b.py": "from .. import a\nimport pkg.a\na.two, pkg.a.three",
        "c.py": "from pkg.a import four, absent",
        "d.py": "import pkg.a as x\nx.Five.six",
        "e.py": "from .a import *",
        "f.py": "import a\nfrom a import one\nfrom .b import one\nfrom ..a import one\n'import pkg.a'",
    }
    found = _modules(tmp_path, {prefix + name: text for name, text in files.items()})
    importers = sorted(prefix + name for name in ("c.py", "d.py", "e.py", "sub/__init__.py", "sub/b.py"))
    names = ["Five", "four", "one", "three", "two"]
    assert found == {f"{prefix}a.py": {"importers": importers, "names": names}}


def test_scripts_import_their_neighbours(tmp_path: Path) -> None:
    files = {"tools/a.py": "x = 1", "tools/b.py": "import a\na.x", "c.py": "from tools.a import x"}
    found = _modules(tmp_path, files)
    assert found == {"tools/a.py": {"importers": ["c.py", "tools/b.py"], "names": ["x"]}}
    assert _modules(tmp_path, files, least=3) == {}


def test_names_that_a_module_defines(tmp_path: Path) -> None:
    text = (
        "import os.path, json as j\nfrom re import sub as s, match\n"
        "if j:\n    a = 1\nelse:\n    def b(): inner = 1\n"
        "try:\n    c: int = 2\nexcept E as error:\n    pass\n"
        "for d, (e, *f) in []:\n    pass\nwith g as h:\n    pass\n(i := 1)\n[k for k in l]\nm.n = o[0] = 1\n"
    )
    (tmp_path / "main.py").write_text(text)
    (tmp_path / "definitions.py").write_bytes(script("definitions.py").read_bytes())
    command = [sys.executable, "definitions.py"]
    found = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60)
    expected = ["a", "b", "c", "d", "e", "f", "h", "i", "j", "match", "os", "s"]
    assert json.loads(found.stdout) == expected
