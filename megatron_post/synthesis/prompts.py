"""The prompts of a recipe, which are Jinja templates beside its file, rendered in jinja2's sandbox."""

import re
from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader, StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from megatron_post.storage.checksums import sha256_of_file
from megatron_post.storage.reading import did_you_mean, reading

_VERSION = re.compile(r"\{#-? version (\d+) -?#\}\s*\n")


class Prompts:
    """The templates of one directory. The first line of each is its version, `{# version 1 #}`."""

    def __init__(self, directory: Path) -> None:
        """Raises `ValueError` for a template that has no version, or that cannot be parsed."""
        self._environment = SandboxedEnvironment(
            loader=FileSystemLoader(directory),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.versions: dict[str, int] = {}
        self.checksums: dict[str, str] = {}
        for file in sorted(directory.glob("*.j2")):
            with reading(file, "a template in UTF-8"):
                found = _VERSION.match(file.read_text(encoding="utf-8"))
            if found is None:
                raise ValueError(f"{file}: its first line must be its version, such as {{# version 1 #}}")
            try:
                self._environment.get_template(file.name)
            except TemplateError as error:
                raise ValueError(f"{file}: not a template: {error}") from None
            self.versions[file.stem] = int(found[1])
            self.checksums[file.stem] = sha256_of_file(file)
        self._directory = directory

    def render(self, name: str, **values: Any) -> str:
        """The text of `name.j2` with these values, without white space around it.

        Template syntax inside a value is not rendered. Raises `ValueError` for an unknown template, and if a
        value that the template uses is missing.
        """
        if name not in self.versions:
            known = list(self.versions)
            raise ValueError(f"{self._directory} has no {name}.j2{did_you_mean(name, known)}")
        try:
            return self._environment.get_template(f"{name}.j2").render(values).strip()
        except TemplateError as error:
            raise ValueError(f"{self._directory / name}.j2: {error}") from error
