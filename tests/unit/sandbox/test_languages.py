"""Honest programs in every language: they run, and a wrong one is found without running."""

import asyncio

import pytest

from megatron_post.sandbox.languages import LANGUAGES, Language, program, steps
from megatron_post.sandbox.sandbox import Sandbox

ECHO: dict[Language, str] = {
    "python": "print(input(), end='')",
    "javascript": "process.stdout.write(require('fs').readFileSync(0, 'utf8').trim())",
    "cpp": "#include <iostream>\nint main() { std::string s; std::getline(std::cin, s); std::cout << s; }",
    "java": "import java.util.*;\n/* public class Wrong */\npublic final class Echo { "
    "public static void main(String[] a) { System.out.print(new Scanner(System.in).nextLine()); } }",
    "rust": "fn main() { let mut s = String::new(); std::io::stdin().read_line(&mut s).unwrap(); "
    'print!("{}", s.trim()); }',
    "bash": "read -r line; echo -n $line",
}


@pytest.fixture
def language(request: pytest.FixtureRequest, sandbox: Sandbox) -> Language:
    if missing := sandbox.missing(request.param):
        pytest.skip(f"not installed: {', '.join(missing)}")
    return request.param


@pytest.mark.parametrize("language", LANGUAGES, indirect=True)
def test_a_program_is_compiled_and_run_with_its_input(sandbox: Sandbox, language: Language) -> None:
    outcome = asyncio.run(sandbox.run(*program(language, ECHO[language], stdin="ä 7\n")))
    assert (outcome.kind, outcome.returncode, outcome.stdout, outcome.stderr) == ("passed", 0, "ä 7", "")


@pytest.mark.parametrize("language", LANGUAGES, indirect=True)
def test_a_check_finds_what_does_not_parse(sandbox: Sandbox, language: Language) -> None:
    right = asyncio.run(sandbox.run(*program(language, ECHO[language], check=True)))
    wrong = asyncio.run(sandbox.run(*program(language, ECHO[language] + "\n)(", check=True)))
    assert right.ok and right.stdout == ""
    assert wrong.kind == "failed" and wrong.stdout + wrong.stderr


@pytest.mark.parametrize("language", LANGUAGES, indirect=True)
def test_a_program_is_built_once_and_run_many_times(sandbox: Sandbox, language: Language) -> None:
    file, build, run = steps(language, ECHO[language])
    command = f"({build}) && for text in 1 2; do echo $text | ({run} an argument); done"
    outcome = asyncio.run(sandbox.run({file: ECHO[language]}, ["sh", "-c", command]))
    assert (outcome.kind, outcome.stdout, outcome.stderr) == ("passed", "12", "")
    broken = asyncio.run(sandbox.run({file: f"{ECHO[language]}\n)("}, ["sh", "-c", build]))
    assert broken.kind == "failed"


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'cobol' cannot be run. The languages are python, javascript"):
        program("cobol", "")  # type: ignore[arg-type]
