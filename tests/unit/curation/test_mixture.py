"""The mixture: the tables beside their targets, and the sources that reach these when they are packed."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_post.config.load import ConfigError, load_config
from megatron_post.data.build import build_store
from megatron_post.data.stats import source_stats
from megatron_post.data.store import open_store
from megatron_post.data.tokenizer import train_small_tokenizer
from megatron_post.display import make_console
from tests.unit.curation.place import Place, dialog

CODE = [dialog(f"Program {n}", "print(1)") for n in range(6)]
CHAT = [dialog(f"Hello {n}", "Hi.", "How are you?", "Fine.") for n in range(14)]
CHOICES = [
    {"prompt": f"Say {n}", "chosen": "Yes, of course.", "rejected": "No.", "rating": "better"}
    for n in range(4)
]
CATEGORIES = [
    {"name": "Code", "sources": ["code"], "share": 3, "turns": 2.7, "tokens": 753.3},
    {"name": "The rest", "share": 1},
]
WITHOUT_TOKENS = [{**CATEGORIES[0], "tokens": None}, CATEGORIES[1]]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    texts = [message["content"] for row in (*CODE, *CHAT) for message in row["messages"]]
    train_small_tokenizer(["user", "assistant", *texts], 300).save(str(tmp_path / "tokenizer"))
    return tmp_path / "tokenizer"


def _place(place: Place, tokenizer: Path | None = None, **mixture: Any) -> Place:
    place.add_source("code", CODE)
    place.add_source("chat", CHAT)
    place.values["steps"] = [{"kind": "encoding"}]
    if tokenizer is not None:
        place.values["steps"].append({"kind": "tokens", "tokenizer": str(tokenizer)})
        mixture = {"tokens": "tokens", **mixture}
    categories = CATEGORIES if tokenizer else WITHOUT_TOKENS
    place.values["mixture"] = {"categories": categories, **mixture}
    return place


def _base(place: Place, base: str | None = None, *, stage: str = "sft") -> Path:
    """A config of training without sources, or with those of its own base."""
    values: dict[str, Any] = {} if base is None else {"base": base}
    values |= {"stage": stage, "run_dir": "runs/x", "train": {"steps": 60, "global_batch": 1}}
    values["model"] = {"preset": "tiny", "vocab_size": 300, "max_position_embeddings": 512}
    values["data"] = {"store": "store", "pack_length": 256}
    values["data"] |= {"preferences": {"max_similarity": 1.0}} if stage == "reward" else {}
    path = place.directory / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _packed(place: Place, config: str, tokenizer: Path, **keys: Any) -> list[Any]:
    """The statistics of the store that `data pack` makes of a written config."""
    overrides = [f"tokenizer.path={tokenizer}", f"data.store={place.directory / 'store'}"]
    loaded = load_config(config, [*overrides, *(f"{key}={value}" for key, value in keys.items())])
    build_store(loaded, console=make_console(quiet=True))
    return source_stats(open_store(place.directory / "store", "train"))


@pytest.mark.parametrize(
    ("mixture", "code", "rest"),
    [
        # 20 rows at 3 to 1 are 15 of 6, and 5 of 14
        ({}, 15, 5),
        ({"rows": 40}, 30, 10),
        # without repeats all 6 rows of code are used, and a third as many others
        ({"reach": "weights"}, 6, 2),
    ],
)
def test_data_pack_reaches_the_targets(
    place: Place, tokenizer: Path, mixture: dict[str, Any], code: int, rest: int
) -> None:
    base = _base(place)
    report = _place(place, tokenizer, config=str(base), **mixture).curate()
    table = report["mixture"]["dialogs"]
    assert [each["mixed_rows"] for each in table["categories"]] == [code, rest]
    stats = _packed(place, table["config"], tokenizer)
    assert [(each.name, each.rows) for each in stats] == [
        ("Code", code),
        ("The rest", rest),
        ("total", code + rest),
    ]
    assert stats[0].share == 0.75


def test_the_table_has_the_figures_of_data_stats(place: Place, tokenizer: Path) -> None:
    # with these shares each row is used once
    categories = [{**CATEGORIES[0], "share": 6}, {**CATEGORIES[1], "share": 14}]
    report = _place(place, tokenizer, categories=categories).curate()
    base = _base(place, report["mixture"]["dialogs"]["config"])
    stats = _packed(place, str(base), tokenizer)
    table = report["mixture"]["dialogs"]
    for own, each in zip(table["categories"], stats, strict=False):
        for name in ("turns", "tokens", "context", "response"):
            assert own[name] == pytest.approx(getattr(each, name))
    assert table["total"]["rows"] == 20
    assert table["categories"][0]["target"] == {
        "share": 0.3, "turns": 2.7, "tokens": 753.3, "context": None, "response": None
    }  # fmt: skip


def test_preferences_have_a_table_of_their_own(place: Place, tokenizer: Path) -> None:
    place.add_source("choices", CHOICES)
    report = _place(place, tokenizer).curate()
    dialogs, preferences = report["mixture"]["dialogs"], report["mixture"]["preferences"]
    assert dialogs["total"]["rows"] == 20 and preferences["total"]["rows"] == 4
    assert preferences["without_rows"] == ["Code"] and dialogs["without_rows"] == []
    base = _base(place, preferences["config"], stage="reward")
    stats = _packed(place, str(base), tokenizer)
    for name in ("turns", "context", "response"):
        assert preferences["categories"][1][name] == pytest.approx(getattr(stats[0], name))


def test_rows_of_no_category_are_counted_and_left_out(place: Place) -> None:
    report = _place(place, categories=WITHOUT_TOKENS[:1]).curate()
    code, other = report["mixture"]["dialogs"]["categories"]
    assert (other["name"], other["rows"], other["share"]) == ("other", 14, 0.7)
    assert code["tokens"] is None and code["turns"] == 1
    written = yaml.safe_load(Path(report["mixture"]["dialogs"]["config"]).read_text())
    assert [source["name"] for source in written["data"]["sources"]] == ["Code"]


def test_conditions_read_the_columns_of_steps(place: Place) -> None:
    place.values["steps"] = []
    _place(place, categories=[
        {"name": "Emoji", "where": {"clean.found": ["no"]}, "share": 0},
        {"name": "Code", "where": {"words.dropped": ["too long"]}, "sources": ["code"], "share": 1},
    ])  # fmt: skip
    with pytest.raises(ConfigError, match=r"where\.clean\.found: 'clean' is no step"):
        place.curate()
    place.values["mixture"]["categories"] = [
        {"name": "A", "where": {"encoding.language": ["de"]}, "share": 1}
    ]
    with pytest.raises(ValueError, match=r"mixture reads encoding\.language, and the step encoding has"):
        place.curate()


def test_a_changed_mixture_writes_only_the_selection_again(place: Place) -> None:
    _place(place).curate()
    times, files = place.times(), {path.name for path in place.run.glob("mixture/dialogs/*")}
    assert files == {"01-code.jsonl", "02-the-rest.jsonl"}
    report = place.curate(mixture={"categories": [{"name": "All!", "share": 1}]})
    assert place.times() == times
    assert {path.name for path in place.run.glob("mixture/dialogs/*")} == {"01-all.jsonl"}
    assert report["mixture"]["dialogs"]["categories"][0]["rows"] == 20
    place.values.pop("mixture")
    assert "mixture" not in place.curate() and not (place.run / "mixture").exists()


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"categories": [{"name": "a", "share": 0}]}, "all shares are 0"),
        ({"categories": CATEGORIES[:1] * 2}, "two categories have the name 'Code'"),
        ({"categories": [{"name": "other", "share": 1}]}, "must not have the name 'other'"),
        ({"reach": "weights", "rows": 3}, "rows has no effect with reach: weights"),
        ({"categories": [{"name": "a", "share": 1, "least_tokens": 9}]}, "least_tokens needs `tokens`"),
        ({"tokens": "encoding"}, "no step of the kind `tokens`"),
        ({"categories": [{"name": "a", "share": 1, "sources": ["cod"]}]}, "'cod' is not in sources.*code"),
    ],
)
def test_mistakes_are_named(place: Place, mixture: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _place(place, **mixture).settings()


def test_a_base_that_does_not_exist_is_refused_before_the_rows_are_read(place: Place) -> None:
    with pytest.raises(ValueError, match=r"mixture\.config: .*/nft\.yaml does not exist"):
        _place(place, config=str(place.directory / "nft.yaml")).curate()
    assert not place.run.exists()
