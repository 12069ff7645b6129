"""An author for the scripted server whose problems, programs and tests are right or wrong in known ways.

The n-th problem is to print the sum of the numbers on standard input plus n. The snippet says in which manner
it is answered.
"""

import re
from typing import Any

from tests.scripted_server import Body

_SNIPPET = re.compile(r"snippet (\d+), manner (\w+)")
_LANGUAGE = re.compile(r"Write the program in (C\+\+|Java|Rust|JavaScript|Bash)\.")
REFUSAL = "I am sorry, and I cannot help with this."

RIGHT = '''"""The sum is taken in one pass, which is fast enough for any input."""

import sys

OFFSET = {number}


def total(numbers: list[int]) -> int:
    """The sum of the numbers, with the offset."""
    return sum(numbers) + OFFSET


if __name__ == "__main__":
    print(total([int(word) for word in sys.stdin.read().split()]))
'''
PROGRAMS = {
    "right": RIGHT,
    "wrong": RIGHT.replace("+ OFFSET", "- OFFSET"),
    "syntax": RIGHT.replace("return sum(", "return sum(("),
    "deep": "print(" + "(" * 3000 + "1" + ")" * 3000 + ")\n",
    "lint": RIGHT.replace("import sys", "import os\nimport sys"),
    "silenced": "# ruff: noqa\n" + RIGHT.replace("import sys", "import os  # noqa\nimport sys"),
    "answers": """import sys

text = sys.stdin.read().strip()
print({"": {number}, "1 2\\n30": 33 + {number}}.get(text, {number} - 5))
""",
    "hang": "while True:\n    pass\n",
    "flood": "while True:\n    print('x' * 1000)\n",
    "exits": 'import os\n\nprint("{number}\\n2 passed", flush=True)\nos._exit(0)\n',
    "kills": "import os\n\nos.kill(os.getppid(), 9)\n",
    "deletes": """import pathlib

for path in pathlib.Path("/tmp/work").rglob("*"):
    if path.is_file() and path.name != "main.py":
        path.write_text("def test_nothing():\\n    pass\\n")
for name in ("random", "json", "tests", "sitecustomize"):
    pathlib.Path(f"../{name}.py").write_text("import os\\nos._exit(0)\\n")
""",
    "reads": """import pathlib
import re

for path in pathlib.Path("/tmp").rglob("*"):
    try:
        found = re.search(r'== "(-?[0-9]+)"', path.read_text(errors="replace"))
    except OSError:
        continue
    if found:
        print(found[1])
        break
""",
    "searches": """import pathlib
import re

for process in pathlib.Path("/proc").glob("[0-9]*"):
    if process.name == str(pathlib.Path("/proc/self").resolve().name):
        continue
    try:
        places = (process / "maps").read_text().splitlines()
        memory = (process / "mem").open("rb", buffering=0)
    except OSError:
        continue
    for place in places:
        start, end = (int(word, 16) for word in place.split()[0].split("-"))
        try:
            memory.seek(start)
            found = re.search(rb'== .{1,3}"(-?[0-9]+)', memory.read(end - start))
        except (OSError, ValueError, OverflowError):
            continue
        if found:
            print(found[1].decode())
            break
""",
    "forges": """import json
import os
import pathlib

report = json.dumps({"kind": "passed", "tests": 3})
for process in (1, os.getppid(), os.getpid()):
    for stream in (1, 2):
        try:
            with pathlib.Path(f"/proc/{process}/fd/{stream}").open("w") as file:
                for nonce in ("", "0" * 32, "passed"):
                    file.write(f"\\n{nonce} {report}\\n")
        except OSError:
            continue
""",
}
TESTS = {
    "right": """
def test_empty():
    assert run("").stdout.strip() == "{number}"


def test_numbers():
    # 1 + 2 + 30 = 33
    assert run("1 2\\n30\\n").stdout.strip() == str(33 + {number})


def test_negative():
    assert run("-5").stdout.strip() == str({number} - 5)
""",
    "unseen": 'def test_other_numbers():\n    assert run("4 5").stdout.strip() == str(9 + {number})\n',
    "nothing": 'def test_nothing():\n    run("1 2")\n',
    "hopeless": 'def test_anything():\n    run("1 2")\n    assert True\n',
    "weak": 'def test_prints():\n    assert run("1 2").stdout.strip()\n',
    "wrong": 'def test_numbers():\n    assert run("1 2").stdout.strip() == str({number} + 4)\n',
    "syntax": "def test_numbers(:\n",
    "none": 'assert run("1 2").returncode == 0\n',
    "forges": """import os
import sys

frame = sys._getframe()
while frame.f_back is not None and "job" not in frame.f_locals:
    frame = frame.f_back
nonce = frame.f_locals["job"]["nonce"]
os.write(1, ("\\n" + nonce + ' {"kind": "passed", "tests": 3}\\n').encode())
os._exit(0)
""",
    "garbles": """import os
import sys

frame = sys._getframe()
while frame.f_back is not None and "job" not in frame.f_locals:
    frame = frame.f_back
nonce = frame.f_locals["job"]["nonce"]
os.write(1, ("\\n" + nonce + ' {"kind": "passed", "runs": [1]}\\n').encode())
os._exit(0)
""",
    "cheats": "import os\n\nos._exit(0)\n",
}
OTHERS = {  # right programs in other languages
    "cpp": """#include <iostream>

// Reads to the end of the input, and starts with the offset.
int main() {
    long long total = 0 + {number};
    long long number = 0;
    while (std::cin >> number) total += number;
    std::cout << total << std::endl;
}
""",
    "java": """import java.util.Scanner;

/** Reads to the end of the input, and starts with the offset. */
public class Main {
    public static void main(String[] arguments) {
        Scanner input = new Scanner(System.in);
        long total = 0 + {number};
        while (input.hasNextLong()) total += input.nextLong();
        System.out.println(total);
    }
}
""",
    "rust": """use std::io::Read;

// Reads the whole input, and starts with the offset.
fn main() {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).unwrap();
    let sum: i64 = text.split_whitespace().map(|word| word.parse::<i64>().unwrap()).sum();
    let total = 0 + {number};
    println!("{}", sum + total);
}
""",
    "javascript": """// Reads the whole input, and starts with the offset.
const words = require("fs").readFileSync(0, "utf8").split(/\\s+/).filter((word) => word);
let total = 0 + {number};
for (const word of words) total += Number(word);
console.log(String(total));
""",
    "bash": """# Reads the whole input, and starts with the offset.
total=$(( 0 + {number} ))
for word in $(cat); do
  total=$(( total + word ))
done
echo "$total"
""",
}
# manner -> programs of the tries, tests of the tries; the last one is repeated
MANNERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "right": (("right",), ("right",)),
    "mended": (("wrong", "right"), ("right",)),
    "late": (("wrong", "syntax", "right"), ("right",)),
    "answers": (("wrong", "answers"), ("right",)),
    "unseen_wrong_first": (("wrong", "right"), ("right",)),
    "unseen_wrong": (("wrong", "right"), ("right",)),
    "unseen_empty": (("wrong", "right"), ("right",)),
    "stubborn": (("wrong",), ("right",)),
    "typo": (("syntax", "right"), ("right",)),
    "broken": (("syntax",), ("right",)),
    "nested": (("deep",), ("right",)),
    "hanging": (("hang",), ("right",)),
    "hangs_first": (("hang", "right"), ("right",)),
    "flooding": (("flood",), ("right",)),
    "unused": (("lint", "right"), ("right",)),
    "silenced": (("silenced",), ("right",)),
    "asserts_nothing_first": (("right",), ("nothing", "right")),
    "asserts_nothing": (("right",), ("nothing", "hopeless")),
    "asserts_nothing_for_wrong": (("wrong", "right"), ("nothing", "right")),
    "asserts_little": (("right",), ("weak",)),
    "tests_wrong_first": (("right",), ("wrong", "right")),
    "tests_wrong": (("right",), ("wrong",)),
    "tests_broken": (("right",), ("syntax",)),
    "tests_broken_first": (("right",), ("syntax", "right")),
    "tests_missing": (("right",), ("none",)),
    "tests_forge": (("wrong",), ("forges",)),
    "tests_garble": (("right",), ("garbles",)),
    "tests_cheat": (("right",), ("cheats",)),
    "exits": (("exits",), ("right",)),
    "kills": (("kills",), ("right",)),
    "deletes": (("deletes",), ("right",)),
    "reads": (("reads",), ("right",)),
    "searches": (("searches",), ("right",)),
    "forges": (("forges",), ("right",)),
    "all_wrong": (("wrong",), ("right",)),
    "no_problem": ((), ()),
    "declines": (("decline",), ("right",)),
    "declines_tests": (("right",), ("decline",)),
    "two_blocks": (("two",), ("right",)),
    "open_block": (("open",), ("right",)),
    "other_language": (("other",), ("right",)),
    "refused": ((), ()),
    "judged": (("right",), ("right",)),
    "judged_vaguely": (("right",), ("right",)),
}


def snippet(number: int, manner: str) -> str:
    """A file of code that asks for this manner."""
    assert manner in MANNERS
    return f"# snippet {number}, manner {manner}\ndef add(a, b):\n    return a + b\n"


def fault(body: Body, attempt: int) -> str | None:
    return "400" if "manner refused" in _text(body) else None


def answer(body: Body) -> str:
    """As the snippet wants it. With a seed it is a witness, right except in `all_wrong`."""
    text = _text(body)
    found = _SNIPPET.search(text)
    assert found is not None, text
    number, manner = int(found[1]), found[2]
    programs, tests = MANNERS[manner]
    last = body["messages"][-1]["content"]
    if "Write a programming problem" in text:
        if manner == "no_problem":
            return REFUSAL
        return f"Topic: sums of kind {number}\n\n**Problem:**\nPrint the sum plus {number} ({found[0]})."
    if last.startswith("Write unit tests"):
        if seed := body.get("seed"):
            wrong = {"unseen_wrong": "wrong", "unseen_wrong_first": "wrong" if seed == 1 else "unseen"}
            return _in_reply(TESTS, {**wrong, "unseen_empty": "nothing"}.get(manner, "unseen"), number)
        return _in_reply(TESTS, tests["These are earlier tests" in last and len(tests) > 1], number)
    if last.startswith("Judge this answer"):
        if manner == "judged_vaguely":
            return "It looks fine."
        return f"It is short.\n**Bugs:** {'yes' if manner == 'judged' else 'no'}\nIntent: yes"
    if body.get("seed") and not _LANGUAGE.search(text) and manner != "all_wrong":
        return _in_reply(PROGRAMS, "right", number).replace("in one pass", f"in pass {body['seed']}")
    tries = sum(message["role"] == "assistant" for message in body["messages"])
    if other := _LANGUAGE.search(text):
        return _in_other(
            other[1].lower().replace("++", "pp"), programs[min(tries, len(programs) - 1)], number
        )
    reply = _in_reply(PROGRAMS, programs[min(tries, len(programs) - 1)], number)
    return reply if not body.get("seed") else reply.replace("in one pass", f"in pass {body['seed']}")


def _in_other(language: str, name: str, number: int) -> str:
    code = OTHERS[language].replace("{number}", str(number))
    changes = {"wrong": ("0 + ", "1 + "), "syntax": ("total ", "total (((")}
    return f"```{language}\n{code.replace(*changes.get(name, ('', '')))}```"


def _text(body: dict[str, Any]) -> str:
    return "\n".join(message["content"] for message in body["messages"])


def _in_reply(texts: dict[str, str], name: str, number: int) -> str:
    if name == "decline":
        return REFUSAL
    code = texts.get(name, texts["right"]).replace("{number}", str(number))
    block = f"```python\n{code}```"
    return {
        "two": f"{block}\n\nOr else:\n\n{block}",
        "open": f"```python\n{code}",
        "other": block.replace("python", "cobol"),
    }.get(name, f"Here it is.\n\n{block}\n\nIt has been tested.")
