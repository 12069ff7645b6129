"""An author for the scripted server that translates programs and writes them again, right or wrong."""

import json
import re

from tests.scripted_server import Body

_MANNER = re.compile(r"manner: (\w+)")
REFUSAL = "I am sorry, and I cannot help with this."

# A program in Python that prints the sum of its input, and whether that is above a limit
SOURCE = """# manner: {manner}
import sys

LIMIT = {number}
total = 0
for word in sys.stdin.read().split():
    total += int(word)
print("total", total)
if total > LIMIT:
    print("above the limit")
"""
SOURCES = {
    "source_broken": "# manner: source_broken {number}\nprint(\n",
    "source_constant": "# manner: source_constant {number}\nprint(7)\n",
    "source_random": "# manner: source_random {number}\nimport random\nprint(random.random())\n",
    "source_fails": "# manner: source_fails {number}\nraise SystemExit(3)\n",
    "source_hangs": "# manner: source_hangs {number}\nwhile True:\n    pass\n",
}
_SHELL = """# Sums the words of the input.
total=0
for word in $(cat); do
  total=$((total + word))
done
echo "total $total"
if [ "$total" -gt {number} ]; then
  echo "above the limit"
fi
"""
_TRANSLATIONS = {
    "blanks": _SHELL.replace('echo "total $total"', 'echo "total $total  "'),
    "off_by_one": _SHELL.replace("-gt", "-ge"),
    "broken": _SHELL.replace("fi\n", ""),
    "hangs": "while true; do :; done\n",
    "runs_python": "exec python3 -c 'import sys\nprint(sum(map(int, sys.stdin)))'\n",
    "guesses": "echo total 3\n",
    "fails": _SHELL + "exit 1\n",
    "exits": 'echo "total 3"\nkill -9 $PPID\n',
}


def source(manner: str, number: int) -> str:
    text = SOURCES.get(manner, SOURCE)
    return text.replace("{number}", str(number)).replace("{manner}", manner)


def translate(body: Body) -> str:
    """Inputs for a program, or its translation to Bash, as the first line of the program says."""
    text = body["messages"][-1]["content"]
    found = _MANNER.search(text)
    assert found is not None, text
    manner = found[1]
    number = int((re.search(r"LIMIT = (\d+)", text) or ["", "0"])[1])
    if "inputs for it" in text:
        cases = ["", "1 2\n", f"{number}", f"{number} 1\n-1", "-5 -6\n", "x"]
        answers = {
            "no_cases": REFUSAL,
            "cases_broken": '```json\n["1",\n```',
            "cases_deep": f"```json\n{'[' * 20_000}\n```",
            "cases_of_numbers": "```json\n[1, 2, 3, 4]\n```",
            "few_cases": '```json\n["1", "2", "x", "1"]\n```',
        }
        return answers.get(manner, f"```json\n{json.dumps(cases)}\n```")
    if manner == "declines":
        return REFUSAL
    program = _TRANSLATIONS.get(manner, _SHELL).replace("{number}", str(number))
    return f"```bash\n{program}```"


# What is written again, by the sample's seed. `same` has other names, comments and annotations
SAME = '''"""Sums words."""

import sys

BOUND = {number}


result = 0
for item in sys.stdin.read().split():  # each of them
    result += int(item)
print("total", result)
if result > BOUND:
    print("above the limit")
'''
_AGAIN = {
    "same": SAME,
    "recursive": """import sys


def add(words):
    return int(words[0]) + add(words[1:]) if words else 0


total = add(sys.stdin.read().split())
print(f"total {total}" + ("\\nabove the limit" if total > {number} else ""))
""",
    "wrong": SAME.replace("result > BOUND", "result >= BOUND"),
    "far": "class Stack:\n    def push(self, item):\n        self.items = [item, *self.items]\n",
    "broken": "print(",
}
_TESTS = """def test_empty():
    assert run("").stdout.split() == ["total", "0"]


def test_at_the_limit():
    assert run("{number}").stdout.strip() == "total {number}"


def test_above():
    assert run("{number} 1").stdout.strip().endswith("\\nabove the limit")
"""
# manner -> what each of the samples is, and the tests
BACK: dict[str, tuple[tuple[str, ...], str]] = {
    "tested": (("wrong", "same", "recursive"), _TESTS),
    "only_far_passes": (("wrong", "recursive", "broken"), _TESTS),
    "none_passes": (("wrong", "far", "broken"), _TESTS),
    "tests_of_nothing": (("far", "same", "wrong"), 'def test_nothing():\n    run("")\n'),
    "tests_wrong": (("far", "same", "broken"), 'def test_it():\n    assert run("").stdout == "1"\n'),
    "no_tests": (("far", "wrong", "same"), ""),
    "no_tests_and_close": (("far", "wrong", "broken"), ""),
    "no_tests_and_far": (("far", "broken", "far"), ""),
    "no_programs": (("decline", "decline", "decline"), ""),
    "quotes": (("same",) * 3, ""),
    "quotes_lines": (("same",) * 3, ""),
    "declines_to_explain": ((), ""),
    "source_broken": ((), ""),
    "source_deep": ((), ""),
}


def back(body: Body) -> str:
    """An explanation, tests, or the code again."""
    text = body["messages"][-1]["content"]
    found = re.search(r"(?:manner: |kind )(\w+)", text)
    assert found is not None, text
    manner = found[1]
    number = (re.search(r"(?:LIMIT = |limit of )(\d+)", text) or ["", "0"])[1]
    samples, tests = BACK[manner]
    if text.startswith("Explain this code"):
        explanation = f"It is of the kind {manner}. It sums words, and compares with the limit of {number}."
        lines = "\n".join(line for line in SOURCE.split("\n") if len(line) >= 20)
        more = {"quotes": "\n```python\ntotal += 1\n```", "quotes_lines": f"\n{lines}"}
        return "" if manner == "declines_to_explain" else explanation + more.get(manner, "")
    if text.startswith("Write unit tests"):
        return f"```python\n{tests.replace('{number}', number)}```" if tests else "NO TESTS"
    name = samples[body.get("seed") or 0]
    return REFUSAL if name == "decline" else f"```python\n{_AGAIN[name].replace('{number}', number)}\n```"
