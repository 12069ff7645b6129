"""`template.render` as a Jinja chat template, saved with the tokenizer for `transformers` and vLLM.

For messages in OpenAI's form it gives the ids that training saw of the same row: texts are stripped as `rows`
strips them, and arguments of calls may be mappings or JSON text. What a row may not hold, it refuses as well.

One form differs, and is refused. Where a text spells a control token, training saw text. `transformers` finds
control tokens in the whole rendered conversation and cannot tell who wrote them, so the template raises.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_post.config.data import Reasoning

_FILES = ("json_text.jinja", "chat_template.jinja")


def chat_template(*, control_tokens: Sequence[str], reasoning: Reasoning) -> str:
    """control_tokens: what no text may spell. reasoning: `data.reasoning` of the training."""
    tokens = json.dumps(list(control_tokens), ensure_ascii=False)
    settings = f"{{%- set reasoning = '{reasoning}' -%}}\n{{%- set control_tokens = {tokens} -%}}\n"
    texts = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in _FILES)
    return settings + "".join(texts)
