"""Mutants have one planted error each, and the lexer behind them takes linear time."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_post.sandbox.languages import LANGUAGES, Language
from megatron_post.synthesis.code import inside
from megatron_post.synthesis.code.mutants import _by_tokens, _difference
from megatron_post.synthesis.code.tokens import tokens

PYTHON = '''"""A docstring stays: 1 < 2."""
def f(a, b=True):
    """Also 3."""
    if a < 10 and b:
        return f"{a + 1:>5}"
    a -= 2
    return None
if __name__ == "__main__":
    print(f(7))
'''
CPP = """#include <vector> // 1 < 2
/* 3 + 4 */
int main() { std::vector<int> v(5); char c = '6'; for (i = 0; i < 10; i++) if (v[i] == 7 && true) { i - 8; } }
"""
HOSTILE = ("/*", '"\\', "'", '"""', "#", "`", "a", "1", "$#", "\\", "'\\x", "-", "#[", " -a", "&", "'''\\")


def test_mutants_of_python(tmp_path: Path) -> None:
    """The script is run on this program of ours."""
    (tmp_path / "main.py").write_text(PYTHON)
    script = Path(inside.__file__).with_name("mutate.py")
    done = subprocess.run([sys.executable, script, "100"], cwd=tmp_path, capture_output=True, check=True)
    original, *mutants = json.loads(done.stdout)
    changes = [_difference(original, mutant) for mutant in mutants]
    added = [line[1:].strip() for change in changes for line in change.split("\n") if line.startswith("+")]
    assert added == [
        *("def f(a, b=False):", "if a < 10 or b:", "if a <= 10 and b:", "if a < 11 and b:", "return"),
        *("return f'{a - 1:>5}'", "return f'{a + 2:>5}'", "a += 2", "a -= 3", "print(f(8))"),
    ]
    assert len(set(mutants)) == len(mutants)


def test_mutants_by_tokens() -> None:
    changes = [_difference(CPP, mutant).split("\n") for mutant in _by_tokens("cpp", CPP, 100)]
    assert all(len(change) == 2 for change in changes)
    (line,) = {removed[1:] for removed, _ in changes}
    assert line == CPP.split("\n")[2]  # neither comments nor the directive
    for old, new in [("v(5)", "v(6)"), ("= 0", "= 1"), ("i < 10", "i <= 10"), ("10", "11"), ("i++", "i--")]:
        assert [f"-{line}", f"+{line.replace(old, new)}"] in changes
    for old, new in [("== 7", "!= 7"), ("7", "8"), ("&& true", "|| true"), ("true", "false"), ("- 8", "+ 8")]:
        assert [f"-{line}", f"+{line.replace(old, new)}"] in changes
    assert len(changes) == 11  # and the 8
    few = _by_tokens("cpp", CPP, 3)
    assert len(few) == 3 and _by_tokens("cpp", "int main() {}", 3) == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_lexer_takes_linear_time(language: Language) -> None:
    """Ten times the text takes about ten times as long. Quadratic time would take a hundred times as long.

    Processor time counts, and the shortest of three runs, since the machine may be busy.
    """
    for text in HOSTILE:
        times = []
        for size in (3_000, 30_000):
            long, seconds = text * (size // len(text)), []
            for _ in range(3):
                begun = time.process_time()
                assert sum(len(token.text) for token in tokens(language, long)) <= size
                seconds.append(time.process_time() - begun)
            times.append(min(seconds))
        assert times[1] < 30 * times[0] + 0.05, text
