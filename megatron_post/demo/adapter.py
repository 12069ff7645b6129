"""Loads the adapter of a run with PEFT, and compares it with the run's merged weights.

Run as `python -m megatron_post.demo.adapter BASE RUN_DIR`.
"""

import sys
from pathlib import Path

import torch

from megatron_post.display import say


def largest_difference(base: Path, run_dir: Path) -> tuple[float, float]:
    """How far the logits of 64 tokens change by the adapter, and how far PEFT's are from the merged model's.

    base: the Hugging Face directory that the run started from. run_dir: has the exports `adapter` and `hf`.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(64)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
        before = plain(tokens).logits
        adapted = PeftModel.from_pretrained(plain, run_dir / "adapter")(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(run_dir / "hf", dtype=torch.float32)(tokens).logits
    return float((adapted - before).abs().max()), float((adapted - merged).abs().max())


def main(base: str, run_dir: str) -> None:
    """Print both differences."""
    change, error = largest_difference(Path(base), Path(run_dir))
    say(f"The adapter changes logits by up to {change:.3f}.")
    say(f"Those of PEFT and of the merged model differ by at most {error:.1e}.")


if __name__ == "__main__":
    main(*sys.argv[1:])
