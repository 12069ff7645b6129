"""`data pack` gives a store of the same segments as rendering the rows one by one."""

import json
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megatron_post.config.load import validate
from megatron_post.config.schema import Config
from megatron_post.data.assembly import assemble
from megatron_post.data.build import build_store
from megatron_post.data.dialog import Dialog, Message
from megatron_post.data.length_limit import LengthLimit
from megatron_post.data.rows import TooManyBadRows
from megatron_post.data.show import show_pack
from megatron_post.data.store import PackStore, StoreError, open_store
from megatron_post.data.store_format import StoreSettings
from megatron_post.data.template import Rendered, TokenRole, render
from megatron_post.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_of, train_small_tokenizer
from megatron_post.data.units import UnitPile
from tests.unit.data.thinking import THINK, save_with_think

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "ate", "all", "of", "it"]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_small_tokenizer([" ".join(WORDS)] * 10, 300).save(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


def dialog(seed: int, *, turns: int = 1, words: int = 6) -> list[dict[str, str]]:
    random = np.random.default_rng(seed)
    messages = []
    for turn in range(turns):
        for role in ("user", "assistant"):
            said = " ".join(random.choice(WORDS, random.integers(1, words + 1)))
            messages.append({"role": role, "content": f"{seed}.{turn} {said}"})
    return messages


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))


def config_for(tmp_path: Path, tokenizer_path: Path, **data: Any) -> Config:
    """A config with the sources a (20 rows of one turn) and b (6 rows of two), and 3 evaluation rows."""
    write_rows(tmp_path / "a.jsonl", [dialog(seed) for seed in range(20)])
    write_rows(tmp_path / "b.jsonl", [dialog(100 + seed, turns=2) for seed in range(6)])
    write_rows(tmp_path / "held_out.jsonl", [dialog(200 + seed) for seed in range(3)])
    values = {
        "run_dir": str(tmp_path / "run"),
        "model": {"preset": "tiny"},
        "tokenizer": {"path": str(tokenizer_path)},
        "data": {
            "store": str(tmp_path / "store"),
            "sources": [{"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in ("a", "b")],
            "eval_sources": [{"name": "held_out", "path": str(tmp_path / "held_out.jsonl")}],
            "pack_length": 256,
            **data,
        },
        "parallel": {"context": 2},
        "train": {"steps": 1, "global_batch": 1},
    }
    return validate(values, origin="test")


def build(config: Config, **modes: bool) -> str:
    output = StringIO()
    build_store(config, console=Console(file=output, width=200), **modes)
    return output.getvalue()


def test_keys_that_nothing_uses_are_listed_once_a_source(tmp_path: Path, tokenizer_path: Path) -> None:
    config = config_for(tmp_path, tokenizer_path)
    rows = [{"messages": dialog(seed), "id": seed, "source": "web" if seed else None} for seed in range(20)]
    rows[3]["messages"][0]["name"] = "Ann"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = build(config).splitlines()
    assert "train: a: keys not used: id (20 rows), source (19 rows), messages.name (1 row)" in lines
    assert sum("keys not used" in line for line in lines) == 1


def test_train_on_is_the_configurations_unless_the_source_says_otherwise(
    tmp_path: Path, tokenizer_path: Path
) -> None:
    """b has 6 rows of two turns. So it has 12 trained messages, or 6 with train_on=last_turn."""
    for data, source, expected in (
        ({}, {}, 12),
        ({"train_on": "last_turn"}, {}, 6),
        ({}, {"train_on": "last_turn"}, 6),
    ):
        sources = [{"name": "b", "path": str(tmp_path / "b.jsonl"), **source}]
        build(config_for(tmp_path, tokenizer_path, sources=sources, **data), overwrite=True)
        store = open_store(tmp_path / "store", "train")
        roles = np.concatenate([store.read(i).roles for i in range(len(store))])
        assert np.count_nonzero(roles == TokenRole.TERMINATOR) == expected
        assert np.any(roles == TokenRole.MASKED) == (expected == 6)


def test_a_truncated_dialog_of_which_only_masked_messages_are_left_is_dropped() -> None:
    roles = [TokenRole.HEADER, TokenRole.PROMPT, TokenRole.HEADER, TokenRole.MASKED, TokenRole.BODY]
    segment = Rendered(np.ones(5, dtype=np.int32), np.array(roles, dtype=np.uint8))
    for capacity, left in ((4, None), (5, 5)):
        limit = LengthLimit("s", overlong="truncate", capacity=capacity, multiple=1)
        fitted = limit.fit([segment], row=1)
        assert (None if fitted is None else len(fitted[0])) == left


def segments_in(store: PackStore) -> list[tuple[str, int, tuple[int, ...], tuple[int, ...]]]:
    """(source, row, tokens, roles) of every segment without its padding, which this function checks."""
    found = []
    for index in range(len(store)):
        pack = store.read(index)
        for n, (start, end) in enumerate(zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:], strict=True)):
            roles, tokens = pack.roles[start:end], pack.tokens[start:end]
            real = int((roles != TokenRole.PADDING).sum())
            assert not roles[real:].any()
            assert (tokens[real:] == store.settings.pad_id).all()
            if pack.sources[n] < 0:
                assert real == 0 and (pack.sources[n:] < 0).all()  # the padding at the end
                continue
            assert end - start == -(-real // 4) * 4
            name = store.sources[pack.sources[n]].name
            found.append((name, int(pack.sample_ids[n]), tuple(tokens[:real]), tuple(roles[:real])))
    return found


def rendered(rows: list[Any], tokenizer: Tokenizer) -> list[Rendered]:
    return [render(Dialog(tuple(Message(**message) for message in row)), tokenizer) for row in rows]


def test_the_store_holds_every_row_as_rendered(
    tmp_path: Path, tokenizer_path: Path, tokenizer: Tokenizer
) -> None:
    output = build(config_for(tmp_path, tokenizer_path))
    wanted = Counter(
        (name, row, tuple(item.tokens), tuple(item.roles))
        for name, rows in (
            ("a", [dialog(seed) for seed in range(20)]),
            ("b", [dialog(100 + seed, turns=2) for seed in range(6)]),
        )
        for row, item in enumerate(rendered(rows, tokenizer), start=1)
    )
    store = open_store(
        tmp_path / "store",
        "train",
        pack_length=256,
        segment_multiple=4,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    assert Counter(segments_in(store)) == wanted
    assert sorted(row for _, row, _, _ in segments_in(open_store(tmp_path / "store", "eval"))) == [1, 2, 3]
    assert f"train: {len(store)} packs of 256 tokens" in output


def test_the_columns_say_turns_and_final_response(
    tmp_path: Path, tokenizer_path: Path, tokenizer: Tokenizer
) -> None:
    build(config_for(tmp_path, tokenizer_path))
    store = open_store(tmp_path / "store", "train")
    keys = zip(store.column("source"), store.column("sample"), strict=True)
    by_row = {(int(s), int(r)): n for n, (s, r) in enumerate(keys)}
    row = dialog(100 + 3, turns=2)
    n = by_row[1, 4]
    assert store.column("turns")[n] == 2
    assert store.column("response")[n] == len(tokenizer.encode(row[-1]["content"])) + 1  # and its <|eot_id|>
    assert store.column("length")[n] == len(rendered([row], tokenizer)[0])


def test_the_same_config_gives_the_same_bytes(tmp_path: Path, tokenizer_path: Path) -> None:
    config = config_for(tmp_path, tokenizer_path)
    build(config)
    files = {p: p.read_bytes() for p in sorted((tmp_path / "store").rglob("*")) if p.is_file()}
    build(config, overwrite=True)
    assert files == {p: p.read_bytes() for p in sorted((tmp_path / "store").rglob("*")) if p.is_file()}


def test_the_mixture_is_applied_and_printed(tmp_path: Path, tokenizer_path: Path) -> None:
    sources = [
        {"name": "a", "path": str(tmp_path / "a.jsonl"), "epochs": 1.5},
        {"name": "b", "path": str(tmp_path / "b.jsonl"), "epochs": 2},
    ]
    output = build(config_for(tmp_path, tokenizer_path, sources=sources))
    names = Counter(name for name, *_ in segments_in(open_store(tmp_path / "store", "train")))
    assert names == {"a": 30, "b": 12}
    line = next(line.split() for line in output.splitlines() if line.split()[:2] == ["train", "a"])
    assert line[2:6] == ["20", "1.50", "30", f"{100 * 30 / 42:.2f}"]


def test_sources_share_packs(tmp_path: Path, tokenizer_path: Path) -> None:
    """Units of equal length are shuffled before packing. Otherwise each source would fill its own packs."""
    config = config_for(tmp_path, tokenizer_path)
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl", [dialog(7)] * 200)
    build(config)
    store = open_store(tmp_path / "store", "train")
    mixed = [len({int(s) for s in store.read(i).sources if s >= 0}) == 2 for i in range(len(store))]
    assert np.mean(mixed) > 0.9


def test_overlong_rows_are_refused_with_their_number(tmp_path: Path, tokenizer_path: Path) -> None:
    config = config_for(tmp_path, tokenizer_path)
    write_rows(tmp_path / "a.jsonl", [dialog(1), dialog(2, turns=30), dialog(3, turns=40)])
    with pytest.raises(
        ValueError, match=r"source 'a': 2 row\(s\) are longer than data.pack_length=256 .* row 3,"
    ):
        build(config)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("overlong", "rows"), [("drop", [1]), ("truncate", [1, 2])])
def test_overlong_rows_are_dropped_or_truncated_and_counted(
    tmp_path: Path, tokenizer_path: Path, tokenizer: Tokenizer, overlong: str, rows: list[int]
) -> None:
    config = config_for(tmp_path, tokenizer_path, overlong=overlong)
    question = [{"role": "user", "content": "cat " * 300}, {"role": "assistant", "content": "mat"}]
    write_rows(tmp_path / "a.jsonl", [dialog(1), dialog(2, turns=30), question])
    output = build(config)
    found = {
        row: tokens
        for name, row, tokens, _ in segments_in(open_store(tmp_path / "store", "train"))
        if name == "a"
    }
    # Truncation would leave nothing to train of the long question, so it is dropped in both cases.
    assert sorted(found) == rows
    if overlong == "truncate":
        assert found[2] == tuple(rendered([dialog(2, turns=30)], tokenizer)[0].tokens[:256])
    truncated = len(rows) - 1
    assert (
        f"train: a: 0 bad rows left out, {2 - truncated} longer than 256 tokens dropped, {truncated} trunc"
        in output
    )
    counts = open_store(tmp_path / "store", "train").sources[0]
    assert (counts.rows, counts.dropped, counts.truncated) == (len(rows), 2 - truncated, truncated)


def test_bad_rows_are_refused_or_counted_with_file_and_line(tmp_path: Path, tokenizer_path: Path) -> None:
    bad = [{"role": "assistant", "content": "first"}]
    config = config_for(tmp_path, tokenizer_path)
    write_rows(tmp_path / "a.jsonl", [dialog(1), bad, dialog(2)])
    with pytest.raises(TooManyBadRows, match=r"a\.jsonl:2"):
        build(config)
    assert not (tmp_path / "store").exists()
    config = config_for(tmp_path, tokenizer_path, max_bad_rows=1)
    write_rows(tmp_path / "a.jsonl", [dialog(1), bad, dialog(2)])
    output = build(config)
    assert "a.jsonl:2" in output
    assert open_store(tmp_path / "store", "train").sources[0].bad == 1
    assert {row for name, row, *_ in segments_in(open_store(tmp_path / "store", "train")) if name == "a"} == {
        1,
        3,
    }


def test_an_existing_store_is_refused_before_any_work(tmp_path: Path, tokenizer_path: Path) -> None:
    config = config_for(tmp_path, tokenizer_path)
    build(config)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(StoreError, match="exists"):
        build(config)


def test_append_adds_another_source(tmp_path: Path, tokenizer_path: Path) -> None:
    build(config_for(tmp_path, tokenizer_path))
    more = [{"name": "more", "path": str(tmp_path / "held_out.jsonl")}]
    build(config_for(tmp_path, tokenizer_path, sources=more, eval_sources=[]), append=True)
    names = Counter(name for name, *_ in segments_in(open_store(tmp_path / "store", "train")))
    assert names == {"a": 20, "b": 6, "more": 3}
    assert len(segments_in(open_store(tmp_path / "store", "eval"))) == 3


def test_texts_that_spell_special_tokens_are_counted(tmp_path: Path) -> None:
    """The count is per token and source. The store lists the tokens that the config names."""
    tokenizer_path = save_with_think(tmp_path / "tokenizer")
    source = {"name": "a", "path": str(tmp_path / "a.jsonl"), "templated": "keep"}
    config = config_for(tmp_path, tokenizer_path, sources=[source])
    rows = [dialog(1), [*dialog(2), {"role": "user", "content": "<think>"}, dialog(3)[1]]]
    rows[0][1]["content"] = "<think>x</think> <|eot_id|>, <tool_call> is no special token"
    write_rows(tmp_path / "a.jsonl", rows)
    said = "the texts of a spell special tokens, which are encoded as text: "
    assert f"warning: train: {said}<think> 2 times, </think> 1 times, <|eot_id|> 1 times" in build(config)
    named = config.tokenizer.model_copy(update={"content_tokens": THINK})
    other = config.model_copy(update={"tokenizer": named})
    with pytest.raises(StoreError, match=r"content_tokens=\('<tool_call>',\) \(now \('<think>', '</think>'"):
        build(other, append=True)
    assert f"{said}<|eot_id|> 1 times" in build(other, overwrite=True)
    store = open_store(tmp_path / "store", "train", tokenizer_fingerprint=tokenizer_of(other).fingerprint)
    assert store.settings.content_tokens == (*THINK, "<tool_call>")
    think = tokenizer_of(other).encode("<think>")
    assert sum(int((store.read(i).tokens == think[0]).sum()) for i in range(len(store))) == 2
    with pytest.raises(
        StoreError, match=r"content_tokens=\['<think>', '</think>', '<tool_call>'\], tokenizer"
    ):
        open_store(tmp_path / "store", "train", tokenizer_fingerprint=tokenizer_of(config).fingerprint)
    with pytest.raises(StoreError, match=r"data.reasoning=refuse, and now it is drop: the exported chat"):
        open_store(tmp_path / "store", "train", reasoning="drop")
    show_pack(tmp_path / "store", 0, console=Console(file=StringIO()))  # uses the content tokens of the store


def test_without_evaluation_sources(tmp_path: Path, tokenizer_path: Path) -> None:
    build(config_for(tmp_path, tokenizer_path, eval_sources=[]))
    assert len(segments_in(open_store(tmp_path / "store", "train"))) == 26
    assert len(open_store(tmp_path / "store", "eval")) == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sources": []}, "data.sources is empty"),
        ({"eval_sources": [{"name": "x", "path": "x.jsonl", "epochs": 2}]}, "x has epochs or weight"),
        ({"sources": [{"name": "p", "path": "PREFERENCES"}]}, "'p' holds preferences"),
        ({"sources": [{"name": "n", "path": "EMPTY"}]}, r"'n' .* gave no usable row"),
    ],
)
def test_sources_that_cannot_be_packed(tmp_path: Path, tokenizer_path: Path, data: Any, message: str) -> None:
    pair = {"prompt": "which?", "chosen": "this", "rejected": "that"}
    (tmp_path / "preferences.jsonl").write_text(json.dumps(pair) + "\n")
    (tmp_path / "empty.jsonl").write_text("")
    text = json.dumps(data).replace("PREFERENCES", str(tmp_path / "preferences.jsonl"))
    config = config_for(
        tmp_path, tokenizer_path, **json.loads(text.replace("EMPTY", str(tmp_path / "empty.jsonl")))
    )
    with pytest.raises(ValueError, match=message):
        build(config)
    assert not (tmp_path / "store").exists()


def segment(length: int, start: int = 0) -> Rendered:
    roles = np.full(length, TokenRole.BODY, dtype=np.uint8)
    roles[0] = TokenRole.HEADER
    return Rendered(np.arange(start, start + length, dtype=np.int32), roles)


def test_units_of_several_segments_stay_in_one_pack() -> None:
    """Three segments of 5 tokens, padded to 8, fill 24 of 32 tokens. So each unit has its own pack."""
    pile = UnitPile()
    for unit in range(4):
        pile.add([segment(5, 100 * unit + 10 * part) for part in range(3)], source=0, sample=unit, turns=1)
    settings = StoreSettings(32, 4, "f", pad_id=-1, seed=1)
    assembly = assemble(pile.units(), np.array([0, 1, 2, 3, 2]), "train", settings)
    assert np.diff(assembly.segment_ends).tolist() == [3] * 5
    columns = assembly.columns()
    assert columns["unit"].tolist() == np.repeat(np.arange(5), 3).tolist()
    assert sorted(columns["sample"][::3].tolist()) == [0, 1, 2, 2, 3]
    for (tokens, roles), sample in zip(assembly.packs(), columns["sample"][::3], strict=True):
        for part in range(3):
            start = 100 * int(sample) + 10 * part
            assert tokens[8 * part : 8 * part + 8].tolist() == [*range(start, start + 5), -1, -1, -1]
        assert (tokens[24:] == -1).all() and not roles[24:].any()


def test_packs_are_shuffled() -> None:
    """Best-fit puts the longest units into the first packs, which an evaluation of few packs would take."""
    pile = UnitPile()
    for length in range(8, 108):
        pile.add([segment(length)], source=0, sample=length, turns=1)
    assembly = assemble(pile.units(), np.arange(100), "train", StoreSettings(108, 4, "f", pad_id=-1, seed=1))
    longest = [max(pack) for pack in np.split(assembly.columns()["length"], assembly.segment_ends[1:-1])]
    assert longest != sorted(longest, reverse=True)
    assert max(longest[: len(longest) // 2]) - max(longest[len(longest) // 2 :]) in range(-10, 11)


def test_a_pair_is_never_truncated() -> None:
    limit = LengthLimit("pairs", overlong="truncate", capacity=16, multiple=4)
    assert limit.fit([segment(5), segment(5)], row=1) is not None  # 8 + 8 tokens
    assert limit.fit([segment(5), segment(9)], row=2) is None  # 8 + 12
    assert (limit.dropped, limit.truncated) == (1, 0)


def test_real_rows_with_the_real_tokenizer(tmp_path: Path, shared_data: Path) -> None:
    if not (shared_data / "llama3_tokenizer/tokenizer.model").is_file():
        pytest.skip("no Llama 3 tokenizer in shared/data")
    rows = {"columns": {"user": "question", "assistant": "answer"}, "max_rows": 300}
    config = config_for(
        tmp_path,
        shared_data / "llama3_tokenizer/tokenizer.model",
        sources=[{"name": "gsm8k", "path": str(shared_data / "gsm8k/train.jsonl"), **rows}],
        eval_sources=[{"name": "gsm8k", "path": str(shared_data / "gsm8k/test.jsonl"), **rows}],
        pack_length=2048,
    )
    build(config)
    store = open_store(tmp_path / "store", "train")
    assert len(segments_in(store)) == 300
    first = json.loads((shared_data / "gsm8k/train.jsonl").read_text().splitlines()[0])
    tokenizer = load_tokenizer(config.tokenizer.path)
    (tokens,) = (tokens for _, row, tokens, _ in segments_in(store) if row == 1)
    text = tokenizer.decode([int(token) for token in tokens])
    assert first["question"].strip() in text and text.endswith(first["answer"].strip() + "<|eot_id|>")
