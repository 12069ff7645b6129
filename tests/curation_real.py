"""The whole pipeline of `curate` over HH-RLHF, GSM8K and Self-Instruct, with a real encoder.

python -m tests.curation_real DATA DIRECTORY [ROWS]    # ROWS of each source, 400 by default

The judge is a script, and no model. It knows topics by words, tags the longest words, and marks by a hash.
So the figures show that the steps work together, and not how good the rows are.
"""

import hashlib
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from megatron_post.curation.run import curate
from megatron_post.curation.settings import load_curation
from megatron_post.display import make_console
from tests.encoder import WHY_ABSENT, unpack_encoder
from tests.scripted_server import ScriptedServer

_TOPICS = (
    (r"how (many|much)|\$\d|percent|total", "mathematics / arithmetic and word problems"),
    (r"code|python|function|program", "code / writing code"),
    (r"kill|drug|steal|hate|rob|weapon|sex", "safety / crime and fraud"),
    (r"write|story|poem|e-?mail", "writing / letters and e-mails"),
    (r"recipe|cook|eat|food", "everyday life / cooking"),
    (r"sentence|word|classif|translat", "language / classification"),
)


def judge(body: dict[str, Any]) -> str:
    """The answer to any question of the steps."""
    text = body["messages"][-1]["content"]
    dialog = text[text.index("<dialog>") : text.index("</dialog>")]
    draw = int(hashlib.sha256(dialog.encode()).hexdigest()[:8], 16) / 2**32
    last = text.rsplit("exactly", 1)[-1]
    if "Topic:" in last:
        found = (topic for pattern, topic in _TOPICS if re.search(pattern, dialog, re.IGNORECASE))
        return f"Topic: {next(found, 'conversation / small talk')}"
    if "Tags:" in last:
        words = sorted({*re.findall(r"[a-z]{6,}", dialog.lower())}, key=lambda word: (-len(word), word))
        return f"Tags: {'; '.join(words[: 1 + int(5 * draw)] or ['talk'])}"
    if "Difficulty:" in last:
        return f"Difficulty: {1 + int(3 * draw)}"
    marks = ("yes", "yes", "yes") if draw < 0.7 else ("yes", "no", "yes")
    names = ("Free of bugs", "Intent") if "Free of bugs" in last else ("Accuracy", "Instructions", "Tone")
    return "\n".join(f"{name}: {mark}" for name, mark in zip(names, marks, strict=False))


def settings_of(data: Path, directory: Path, encoder: Path, url: str, rows: int) -> dict[str, Any]:
    """A curation with every kind of step."""
    return {
        "run": str(directory / "run"),
        "sources": [
            {"name": "hh-rlhf", "path": str(data / "hh_rlhf"), "max_rows": rows},
            {"name": "gsm8k", "path": str(data / "gsm8k" / "train.jsonl"), "max_rows": rows,
             "columns": {"user": "question", "assistant": "answer"}},
            {"name": "self-instruct", "max_rows": rows,
             "path": str(data / "self_instruct" / "seed_tasks.jsonl"),
             "columns": {"user": "instruction+instances.0.input", "assistant": "instances.0.output"}},
        ],
        "models": {"judge": {"model": "script",
                             "backend": {"kind": "server", "url": url, "served_model": "s"}}},
        "max_bad_rows": rows,
        "steps": [
            {"kind": "encoding"},
            {"kind": "clean", "files": ["configs/curation/cleaning.yaml"]},
            {"kind": "lengths", "most_characters": 20000},
            {"kind": "repeats"},
            {"kind": "languages", "keep": ["en"], "least_confidence": 0.9},
            {"kind": "contamination", "evaluations": [
                {"name": "gsm8k test", "path": str(data / "gsm8k" / "test.jsonl"),
                 "columns": ["question"]}]},
            {"kind": "exact_duplicates"},
            {"kind": "near_duplicates"},
            {"kind": "topics", "taxonomy": "configs/curation/topics.yaml", "judge": "judge"},
            {"kind": "difficulty", "tags": "judge", "rating": "judge"},
            {"kind": "quality", "topics": "topics",
             "marks": {"judge": "judge", "code_topics": ["code"]}},
            {"kind": "semantic_duplicates", "encoder": str(encoder), "devices": ["cpu"], "threshold": 0.8,
             "order_by": ["quality.score", "difficulty.score"]},
            {"kind": "tokens", "tokenizer": str(data / "llama3_tokenizer" / "tokenizer.model")},
        ],
        "mixture": {"tokens": "tokens", "categories": [
            {"name": "Code", "where": {"topics.coarse": ["code"]}, "share": 14.89, "turns": 2.7,
             "tokens": 753.3, "context": 378.8, "response": 374.5},
            {"name": "Reasoning", "where": {"topics.coarse": ["mathematics"]}, "share": 21.19, "turns": 3.1,
             "tokens": 661.6, "context": 359.8, "response": 301.9},
            {"name": "General English", "share": 52.66, "turns": 6.3, "tokens": 974.0, "context": 656.7,
             "response": 317.1},
        ]},
    }  # fmt: skip


def main() -> None:
    data, directory = Path(sys.argv[1]), Path(sys.argv[2])
    rows = int(sys.argv[3]) if len(sys.argv) > 3 else 400
    directory.mkdir(parents=True)
    encoder = unpack_encoder(directory / "encoder")
    if encoder is None:
        sys.exit(WHY_ABSENT)
    start = time.monotonic()
    with ScriptedServer(judge) as server:
        path = directory / "curation.yaml"
        path.write_text(
            yaml.safe_dump(settings_of(data, directory, encoder, server.url, rows), sort_keys=False)
        )
        report = curate(load_curation(str(path)), console=make_console())
    for step in report["steps"]:
        print(
            f"{step['name']:20} {step['rows']:6} rows, {step['dropped']:5} dropped, {step['failed']} failed"
        )
    for kind, table in report["mixture"].items():
        for own in (*table["categories"], table["total"]):
            print(
                kind, {key: own.get(key) for key in ("name", "rows", "share", "turns", "tokens", "context")}
            )
    print(f"{time.monotonic() - start:.0f} s, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
