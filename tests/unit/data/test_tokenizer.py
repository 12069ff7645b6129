import json
import random
from pathlib import Path

import pytest

from megatron_post.config.schema import Config
from megatron_post.data.special_tokens import USED_SPECIAL_TOKENS
from megatron_post.data.tokenizer import load_tokenizer, tokenizer_of, train_small_tokenizer
from tests.tiny import tiny_config
from tests.unit.data.thinking import THINK, save_with_think

MODEL = Path(__file__).resolve().parents[3] / "../shared/data/llama3_tokenizer/tokenizer.model"
needs_model = pytest.mark.skipif(
    not MODEL.exists(), reason=f"{MODEL} is absent: Meta's tokenizer is not tested"
)

SENTENCES = [
    "Natalia sold 48/2 = 24 clips in May.",
    "Wie geht's? 你好，世界",
    "def f(x):\n    return x ** 2\n",
] * 20
TRICKY = [
    "",
    " ",
    "\n",
    "a  b   c    d\t\te \n\n\n f\r\n\r\ng",
    "1 12 123 1234 12345 1234567890 3.14159 １２３ ٣٤٥",
    "it's I'M we'Re 'ſ don’t 'll 'd",
    "def f(x):\n    if x:\n\t\treturn {**x, 'a': [1, 2]}  # 🙂\n",
    "Größe naïve e\u0301 ﬁ ß İ ı ǅ Ω≈ç√ 你好，世界。こんにちは 한국어 עברית العربية हिन्दी ไทย",
    "👩‍👩‍👧‍👦 🏳️‍🌈 \u200b\u200d\ufeff\u00a0\u3000\u2028\x00\x1f",
    "<|begin_of_text|><|eot_id|> <|start_header_id|>system<|end_header_id|>\n\n",
    "=" * 300 + " " * 300 + "\n" * 300 + "a" * 300,
]


@pytest.fixture(scope="module")
def llama():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def reference():
    """Meta's tokenizer, which is tiktoken with the ranks and the pattern of llama-models' tokenizer.py."""
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    ranks = load_tiktoken_bpe(str(MODEL))
    return tiktoken.Encoding("llama3", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


@needs_model
@pytest.mark.parametrize("text", TRICKY)
def test_ids_equal_tiktokens_on_tricky_texts(llama, reference, text):
    assert llama.encode(text) == reference.encode(text, disallowed_special=())
    assert llama.decode(llama.encode(text)) == text


@needs_model
def test_ids_equal_tiktokens_on_random_texts(llama, reference):
    draw = random.Random(0)
    alphabets = ["aab", "a =-\n\t", "'stdrevmlSTDRE 0123\n.,", [chr(code) for code in range(0x20, 0x3000)]]
    texts = ["".join(draw.choices(draw.choice(alphabets), k=draw.randint(1, 80))) for _ in range(3000)]
    vocabulary = [reference.decode([draw.randrange(128000)]) for _ in range(20000)]
    texts += ["".join(draw.choices(vocabulary, k=draw.randint(1, 12))) for _ in range(3000)]
    expected = [reference.encode(text, disallowed_special=()) for text in texts]
    assert llama.encode_batch(texts) == expected
    assert [llama.encode(text) for text in texts[:200]] == expected[:200]


@needs_model
def test_control_tokens_have_llama_31s_ids(llama):
    published = {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|reserved_special_token_0|>": 128002,
        "<|finetune_right_pad_id|>": 128004,
        "<|reserved_special_token_2|>": 128005,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<|python_tag|>": 128010,
        "<|reserved_special_token_3|>": 128011,
        "<|reserved_special_token_247|>": 128255,
    }
    assert {name: llama.special(name) for name in published} == published
    assert (llama.vocab_size, llama.bos_id, llama.pad_id) == (128256, 128000, 128004)
    assert llama.stop_ids == [128001, 128008, 128009]  # Meta's stop_tokens
    # Meta's test_tokenizer.py
    ids = [llama.bos_id, *llama.encode("This is a test sentence."), llama.special("<|end_of_text|>")]
    assert ids == [128000, 2028, 374, 264, 1296, 11914, 13, 128001]
    assert llama.decode(ids) == "<|begin_of_text|>This is a test sentence.<|end_of_text|>"
    assert llama.decode(ids, skip_special=True) == "This is a test sentence."


@needs_model
def test_a_saved_tokenizer_is_the_same_one(llama, tmp_path):
    llama.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == llama.fingerprint
        assert loaded.encode_batch(TRICKY) == llama.encode_batch(TRICKY)
        assert loaded.special("<|eot_id|>") == 128009


def test_small_tokenizer_splits_digits_and_knows_every_byte():
    small = train_small_tokenizer(SENTENCES, 400)
    assert small.vocab_size <= 400
    assert {small.decode([number]) for number in small.encode("2024")} == {"2", "0", "4"}
    for text in TRICKY:
        assert small.decode(small.encode(text)) == text
    ids = {small.special(name) for name in USED_SPECIAL_TOKENS}
    assert len(ids) == len(USED_SPECIAL_TOKENS)
    assert ids.isdisjoint(small.encode(" ".join(USED_SPECIAL_TOKENS)))
    assert ids.isdisjoint(small.encode_batch([" ".join(USED_SPECIAL_TOKENS)])[0])


def test_fingerprint_is_stable_and_distinguishes_tokenizers(tmp_path):
    small = train_small_tokenizer(SENTENCES, 400)
    assert small.fingerprint == train_small_tokenizer(SENTENCES, 400).fingerprint
    assert small.fingerprint != train_small_tokenizer(SENTENCES, 300).fingerprint
    small.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == small.fingerprint


def test_ids_that_are_left_out_count(tmp_path: Path) -> None:
    """A model's embedding needs a row for the largest id, even if smaller ids are not used."""
    small = train_small_tokenizer(SENTENCES, 300)
    small.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert small.vocab_size == 300
    content["model"]["vocab"]["far"] = 5000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).vocab_size == 5001


def test_missing_special_token_is_named():
    with pytest.raises(ValueError, match=r"no special token '<\|image\|>'"):
        train_small_tokenizer(SENTENCES, 300).special("<|image|>")


def test_padding_falls_back_on_end_of_text(tmp_path):
    """Llama 3.0's tokenizer.json has no <|finetune_right_pad_id|>."""
    small = train_small_tokenizer(SENTENCES, 300)
    small.save(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text().replace("<|finetune_right_pad_id|>", "<|reserved|>")
    (tmp_path / "tokenizer.json").write_text(text)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_id == loaded.special("<|end_of_text|>")


def test_what_cannot_be_loaded_is_refused_with_the_path(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\n\x0a\x0esentencepiece\n")
    with pytest.raises(ValueError, match=r"tokenizer\.model:2 is not Llama 3's format"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": None}))
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="vocab_size=100 is too small"):
        train_small_tokenizer(SENTENCES, 100)


def test_texts_spell_the_tokens_that_the_config_names(tmp_path):
    """Other special tokens are encoded as text and counted. <tool_call> is an added token of texts."""
    text = "<think>1</think><tool_call><think><|eot_id|>"
    plain = load_tokenizer(save_with_think(tmp_path))
    named = load_tokenizer(tmp_path, content_tokens=THINK)
    think, end, call = plain.vocab_size - 3, plain.vocab_size - 2, plain.vocab_size - 1
    assert [number for number in plain.encode(text) if number >= think] == [call]
    assert [number for number in named.encode_batch([text])[0] if number >= think] == [
        think,
        end,
        call,
        think,
    ]
    assert named.special("<|eot_id|>") not in named.encode(text)
    assert plain.spelled([text, text]) == {"<think>": 4, "</think>": 2, "<|eot_id|>": 2}
    assert named.spelled([text]) == {"<|eot_id|>": 1}
    assert (plain.content_tokens, named.content_tokens) == (("<tool_call>",), (*THINK, "<tool_call>"))
    assert plain.fingerprint != named.fingerprint
    assert named.decode([think, named.special("<|eot_id|>")], skip_special=True) == "<think>"


def test_a_saved_tokenizer_remembers_what_texts_may_spell(tmp_path):
    named = load_tokenizer(save_with_think(tmp_path / "own"), content_tokens=THINK)
    named.save(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert (saved.fingerprint, saved.content_tokens) == (named.fingerprint, named.content_tokens)
    assert load_tokenizer(tmp_path / "saved", content_tokens=THINK).fingerprint == named.fingerprint
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = theirs("<think>1", add_special_tokens=False)["input_ids"]
    assert ids == named.encode("<think>1")
    assert theirs.decode([*ids, theirs.eos_token_id], skip_special_tokens=True) == "<think>1"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("<thnik>", r"no added token '<thnik>'; it has <think>, </think>, <tool_call>"),
        ("Hello", "no added token 'Hello'"),
        ("<|eot_id|>", "is a control token of Llama 3's format"),
        ("<|finetune_right_pad_id|>", "is a control token of Llama 3's format"),
    ],
)
def test_what_texts_may_not_spell_is_refused(tmp_path, name, reason):
    with pytest.raises(ValueError, match=f"tokenizer.content_tokens: .*{reason}"):
        load_tokenizer(save_with_think(tmp_path), content_tokens=[*THINK, name])


@pytest.mark.parametrize("flag", ["lstrip", "rstrip"])
def test_a_token_that_takes_white_space_is_refused(tmp_path, flag):
    path = save_with_think(tmp_path) / "tokenizer.json"
    state = json.loads(path.read_text())
    state["added_tokens"][-1][flag] = True
    path.write_text(json.dumps(state))
    with pytest.raises(
        ValueError, match=r"its token <tool_call> removes the white space next to it.*to false"
    ):
        load_tokenizer(path)


def test_rendered_reasoning_spells_what_texts_may_spell(tmp_path):
    """Otherwise the exported template would refuse texts that training accepts."""
    values = tiny_config().model_dump() | {"tokenizer": {"path": str(save_with_think(tmp_path))}}
    values["data"] |= {"reasoning": "render"}
    with pytest.raises(
        ValueError, match=r"data.reasoning=render writes <think> and </think>, .*content_tokens"
    ):
        tokenizer_of(Config(**values))
    values["tokenizer"]["content_tokens"] = THINK
    tokenizer_of(Config(**values)).save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert "set reasoning = 'render'" in saved["chat_template"]


def test_a_split_with_too_many_ways_is_an_error_of_the_tokenizer(tmp_path: Path) -> None:
    """The library panics in this case, and a panic is not an `Exception` in Python."""
    train_small_tokenizer(["a b"], 270).save(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "(a|aa)+$"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(tmp_path)
    text = "a" * 60 + "!"
    for encode in (lambda: tokenizer.encode(text), lambda: tokenizer.encode_batch([text] * 2)):
        with pytest.raises(ValueError, match=r"the tokenizer cannot split a text: .*retry-limit"):
            encode()
