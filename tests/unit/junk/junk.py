"""What a stranger's file or argument may be: valid ones that are damaged, of another kind, or hostile."""

import contextlib
import gzip
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

HOSTILE_TEXTS = (
    "", " ", "\0", "a\0b", "\x1b[31m", "\x1b]52;c;aGk=\x07", "[red]x[/red]", "[/]", "[link=http://e]",
    "\u202egnp", "\r", "\x9b2J", "\ud800", "\udcff", "..", "/", "/dev/zero", "/proc/self/mem",
    "~nobody_here/x", "~", "a" * 300, "a/" * 3000, "$(reboot)", "${a}", "${oc.env:HOME}", "${", "???",
    "!!python/object:os.system x", "{", "[", "&a *a", "null", "nan", "inf", "-inf", "1e400", "0x10",
    "1_000", "12:30:00", "true", "-1", "0", "1" * 5000, str(2**80), "(a+)+$", "(" * 2000, "a{99999999999}",
    "\\", "--help", "-", "=", "https://[", "file:///etc/passwd", "中文\u200d", "*.jsonl", "%j", "'", '"',
    "\n", "a\nb: c", "<script>alert(1)</script>", "{0}", "%s", "train", "eval", "x=y",
)  # fmt: skip
HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 1.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), 2**31,
    2**63, 2**80, 10**30, [], {}, [[]], [None], {"": 0}, {"a": {"b": {}}}, [0] * 50, "model", "rows.jsonl",
    "store", "sft.yaml", *HOSTILE_TEXTS,
)  # fmt: skip


def junk_bytes(rng: random.Random, content: bytes) -> bytes:
    """A file's content, damaged in one of many ways."""
    place = rng.randrange(len(content) + 1)
    ways = (
        lambda: b"",
        lambda: rng.randbytes(rng.randrange(200)),
        lambda: content[:place],
        lambda: content[place:],
        lambda: _flipped(rng, content),
        lambda: _flipped(rng, content),
        lambda: content[:place] + bytes(min(64, len(content))) + content[place + 64 :],
        lambda: content[:place] + rng.choice(HOSTILE_TEXTS).encode(errors="surrogatepass") + content[place:],
        lambda: content[:place] + rng.randbytes(8) + content[place:],
        lambda: content * 2,
        lambda: gzip.compress(content),
        lambda: gzip.compress(content)[: rng.randrange(1, 40)],
        lambda: content.decode(errors="replace").encode("utf-16"),
        lambda: b"\xef\xbb\xbf" + content,
        lambda: rng.choice((b"[", b'{"a":', b"- ", b"{", b"(", b"[[[[{")) * 100_000,
        lambda: b"%s" % (b"1" * 10_000),
        lambda: (2**62).to_bytes(8, "little") + content[8:],
        lambda: _twisted_text(rng, content),
        lambda: _twisted_text(rng, content),
        lambda: _twisted_text(rng, content),
        lambda: _twisted_text(rng, content),
        lambda: _twisted_text(rng, content),
    )
    return rng.choice(ways)()


def replace_by_junk(rng: random.Random, path: Path) -> str:
    """Damage a file, or put something else in its place. Returns what was done, for a report."""
    if rng.random() < 0.75:
        path.write_bytes(junk_bytes(rng, path.read_bytes()))
        return f"content of {path}"
    kind = rng.choice(
        ("missing", "directory", "pipe", "loop", "dangling", "zeros", "unreadable", "other", "up")
    )
    path.unlink()
    match kind:
        case "directory":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path.name)
        case "dangling":
            path.symlink_to("nothing")
        case "zeros":
            path.symlink_to("/dev/zero")
        case "unreadable":  # a plain file, of which root too can read nothing
            path.symlink_to("/proc/self/mem")
        case "up":
            path.symlink_to("/etc/passwd")
        case "other":
            others = [other for other in sorted(Path().rglob("*")) if other.is_file()]
            shutil.copy(rng.choice(others), path)
    return f"{kind} in place of {path}"


def junk_argument(rng: random.Random, known: list[str]) -> str:
    """A hostile text, a file of another kind, or an override. Never a NUL, which no process can be given."""
    text = rng.choice((rng.choice(HOSTILE_TEXTS), rng.choice(known), _override(rng)))
    return (
        text.replace("\0", "")
        .encode(errors="surrogateescape" if "\udcff" in text else "replace")
        .decode(errors="surrogateescape")
    )


def _override(rng: random.Random) -> str:
    keys = (
        "train.steps", "optimizer.lr", "data.sources.0.path", "data.sources", "model", "parallel.tensor",
        "stage", "run_dir", "data.pack_length", "a.b.c", "", "data..store", "model.preset", "seed",
        "data.sources.9.x", "[", "tokenizer.path", "model.num_layers", "train.global_batch",
        "precision.fp8", "rounds", "average.weights.sft",
    )  # fmt: skip
    value = rng.choice((rng.choice(HOSTILE_TEXTS), str(rng.choice(HOSTILE_VALUES))))
    return f"{rng.choice(keys)}={value}"


def _flipped(rng: random.Random, content: bytes) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.randrange(1, 5)) if damaged else ():
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _twisted_text(rng: random.Random, content: bytes) -> bytes:
    """One value of a JSON or YAML document, or of a line of JSON, is replaced, removed or added."""
    if content[:1] not in (b"{", b"[") and b"\0" not in content and len(content) < 20_000:
        with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError, RecursionError):
            values = yaml.safe_load(content)
            return yaml.safe_dump(_twisted(rng, values), allow_unicode=True).encode(errors="surrogatepass")
    lines = content.splitlines() if content.count(b"\n{") else [content]
    with contextlib.suppress(ValueError, RecursionError):
        number = rng.randrange(len(lines))
        twisted = json.dumps(_twisted(rng, json.loads(lines[number])))
        lines[number] = twisted.replace("NaN", rng.choice(("NaN", "1e999"))).encode()
        return b"\n".join(lines) + b"\n"
    return _flipped(rng, content)


def _twisted(rng: random.Random, tree: Any) -> Any:
    places = list(_places(tree))
    if not places:
        return rng.choice(HOSTILE_VALUES)
    holder, key = rng.choice(places)
    way = rng.random()
    if way < 0.15:
        del holder[key]
    elif way < 0.25 and isinstance(holder, dict):
        holder[rng.choice(HOSTILE_TEXTS)] = holder[key]
    elif way < 0.3:
        deep: Any = 0
        for _ in range(rng.choice((30, 300, 900))):
            deep = [deep]
        holder[key] = deep
    else:
        holder[key] = rng.choice(HOSTILE_VALUES)
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)
