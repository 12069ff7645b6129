"""A tokenizer with the added special tokens <think> and </think> and the added plain token <tool_call>."""

import json
from pathlib import Path

from megatron_post.data.tokenizer import load_tokenizer, train_small_tokenizer

THINK = ("<think>", "</think>")
ADDED = {"<think>": True, "</think>": True, "<tool_call>": False}


def save_with_think(directory: Path) -> Path:
    train_small_tokenizer(["system user assistant ipython Hello, 1 + 1 = 2."] * 9, 300).save(directory)
    return add_think(directory)


def add_think(directory: Path) -> Path:
    """Add the tokens to the tokenizer in a directory, as `transformers` does. Returns the directory."""
    path = directory / "tokenizer.json"
    state = json.loads(path.read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    for number, (name, special) in enumerate(ADDED.items(), start=load_tokenizer(directory).vocab_size):
        token = {"id": number, "content": name, **flags, "normalized": not special, "special": special}
        state["added_tokens"].append(token)
    path.write_text(json.dumps(state))
    return directory
