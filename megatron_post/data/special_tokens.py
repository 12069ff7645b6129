"""The control tokens of Llama 3's chat format."""

BOS, END_OF_TEXT, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
START_HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"
END_OF_MESSAGE, END_OF_TURN, PYTHON_TAG = "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"
USED_SPECIAL_TOKENS = (
    BOS,
    END_OF_TEXT,
    PAD,
    START_HEADER,
    END_HEADER,
    END_OF_MESSAGE,
    END_OF_TURN,
    PYTHON_TAG,
)


def llama31_special_tokens() -> list[str]:
    """The 256 control tokens of Llama 3.1, in the order of their ids from 128000."""
    reserved = (f"<|reserved_special_token_{number}|>" for number in range(256))
    first = [BOS, END_OF_TEXT, next(reserved), next(reserved), PAD, next(reserved), START_HEADER, END_HEADER]
    return [*first, END_OF_MESSAGE, END_OF_TURN, PYTHON_TAG, *(next(reserved) for _ in range(245))]
