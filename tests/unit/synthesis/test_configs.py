"""The synthesis files of configs/ load, and their recipes take their settings."""

from pathlib import Path

import pytest

from megatron_post.synthesis.recipe import built_in_recipes, load_recipe
from megatron_post.synthesis.settings import load_synthesis, recipe_settings
from tests.documentation import ROOT, blocks
from tests.unit.synthesis.author import write_recipe

DIRECTORY = Path(__file__).parents[3] / "configs/synthesis"


@pytest.mark.parametrize("name", built_in_recipes())
def test_each_recipe_has_a_file_that_loads(name: str) -> None:
    settings = load_synthesis(str(DIRECTORY / f"{name}.yaml"))
    recipe = load_recipe(settings.recipe)
    assert recipe.name == name and recipe.summary
    recipe_settings(settings, recipe)


def test_the_page_lists_each_recipe_with_the_models_that_it_asks() -> None:
    rows = [line.split("|") for line in (ROOT / "docs/synthesis.md").read_text().splitlines()]
    listed = {row[1].split("]")[0].strip(" ["): row[3].strip() for row in rows if len(row) == 6}
    for recipe in map(load_recipe, built_in_recipes()):
        assert listed[recipe.name] == (", ".join(f"`{model}`" for model in recipe.models) or "none")
    assert listed.keys() == {"recipe", "---", *built_in_recipes()}


def test_the_pages_settings_fit_the_pages_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_recipe(tmp_path).parent)
    for block in blocks(ROOT / "docs/synthesis/running.md"):
        if block.title == "my_run.yaml":
            Path(block.title).write_text(block.text)
    settings = load_synthesis("my_run.yaml")
    recipe_settings(settings, load_recipe(settings.recipe))


def test_recipes_of_mathematics_ask_for_the_same_form_of_solution() -> None:
    recipes = DIRECTORY.parents[1] / "megatron_post/synthesis/recipes"
    for prompt in ("solve", "judge"):
        texts = {file.read_text() for file in recipes.glob(f"math_*/{prompt}.j2")}
        assert len(texts) == (2 if prompt == "solve" else 1)  # math_interleaved has its own
