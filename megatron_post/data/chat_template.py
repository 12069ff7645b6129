"""`template.render` as a Jinja chat template, saved with the tokenizer for `transformers` and vLLM.

For messages in OpenAI's form it gives the ids that training uses for the same row. Texts are stripped as
`rows` strips them, and the arguments of a call may be a mapping or JSON text. The template raises an error
for messages that a row may not hold either.

It also raises an error if a text spells a control token. In training such a text is encoded as text. But
`transformers` finds control tokens in the whole rendered conversation, and cannot know whether a text or the
template wrote them.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_post.config.data import Reasoning

_FILES = ("json_text.jinja", "chat_template.jinja")


def chat_template(*, control_tokens: Sequence[str], reasoning: Reasoning) -> str:
    """The Jinja source. control_tokens: texts may not spell them. reasoning: training's `data.reasoning`."""
    tokens = json.dumps(list(control_tokens), ensure_ascii=False)
    settings = f"{{%- set reasoning = '{reasoning}' -%}}\n{{%- set control_tokens = {tokens} -%}}\n"
    texts = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in _FILES)
    return settings + "".join(texts)
