"""Prompts are templates that are checked when they are loaded, and values in them are text."""

from pathlib import Path

import pytest

from megatron_post.synthesis.prompts import Prompts


def _prompts(tmp_path: Path, **templates: str) -> Prompts:
    for name, text in templates.items():
        (tmp_path / f"{name}.j2").write_text(text)
    return Prompts(tmp_path)


def test_a_prompt_is_rendered(tmp_path: Path) -> None:
    prompts = _prompts(
        tmp_path, solve="{# version 12 #}\n{% if hint %}\nHint: {{ hint }}\n{% endif %}\n\n{{ task }}\n"
    )
    assert prompts.versions == {"solve": 12}
    assert prompts.render("solve", task="{{ 7 * 7 }} <b>", hint="") == "{{ 7 * 7 }} <b>"
    assert prompts.render("solve", task="t", hint="h") == "Hint: h\n\nt"


@pytest.mark.parametrize(
    "text", ["hello", "{# version x #}\nhello", "\n{# version 1 #}\nhello", "{# version 1 #} a"]
)
def test_a_prompt_without_a_version_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"solve\.j2: its first line must be its version"):
        _prompts(tmp_path, solve=text)


def test_a_broken_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"solve\.j2: not a template"):
        _prompts(tmp_path, solve="{# version 1 #}\n{% if %}")


def test_what_a_template_lacks_is_named(tmp_path: Path) -> None:
    prompts = _prompts(tmp_path, solve="{# version 1 #}\n{{ task }}")
    with pytest.raises(ValueError, match=r"solve\.j2: 'task' is undefined"):
        prompts.render("solve")
    with pytest.raises(ValueError, match=r"no solv\.j2 \(did you mean 'solve'\?\)"):
        prompts.render("solv", task="")


def test_a_template_reaches_nothing_of_python(tmp_path: Path) -> None:
    prompts = _prompts(tmp_path, solve="{# version 1 #}\n{{ task.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match="unsafe"):
        prompts.render("solve", task="")
