"""Secrets are hidden in every place, and all other text stays readable."""

import time
from pathlib import Path

import pytest

from megatron_post.config.load import ConfigError, load_config
from megatron_post.config.secrets import is_secret_name, redact

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
KEY = "s3cr3t/Hunter=2"


@pytest.mark.parametrize(
    "text",
    [
        f"http://user:{KEY}@host:8000/v1 refuses",
        "http://s3cr3tHunter@host/v1",
        "https://user:s3cr3t@Hunter@host",
        "nonsense http://host/v1?api_key=s3cr3tHunter&version=2",
        "http://host/v1?x=1&X-Amz-Signature=s3cr3tHunter",
        '{"Authorization": "Bearer s3cr3tHunter"}',
        "authorization=Basic s3cr3tHunter",
        "the header Bearer s3cr3tHunter is wrong",
        "api_key: s3cr3tHunter",
        '{"apiKey": "s3cr3tHunter"}',
        "export WANDB_API_KEY='s3cr3tHunter'",
        "HF_TOKEN=s3cr3tHunter",
        "Incorrect API key provided: sk-proj-s3cr3tHunter",
        "hf_s3cr3tHunters3cr3tHunter",
        "ghp_s3cr3tHunters3cr3tHunter",
        "eyJhbGciOiJIUzI1NiJ9.s3cr3tHunter.x",
    ],
)
def test_shapes_are_hidden(text: str) -> None:
    shown = redact(text)
    assert "***" in shown and "s3cr3t" not in shown and "Hunter" not in shown


@pytest.mark.parametrize(
    "text",
    [
        "http://host:8000/v1/chat/completions: 3 tries failed",
        "http://127.0.0.1:8000 refuses a@b",
        "hf://datasets/org/name@main/rows.jsonl",
        "api_key_variable: the environment has no MY_KEY",
        "sampling.max_tokens=512 is more than the model has",
        "tokenizer.path=/models/sk-8/hf does not exist",
        "key=value: overrides must have the form key=value",
        "risk-adjusted task-specific-tokens",
        "user@host: Permission denied",
    ],
)
def test_the_rest_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("spelling", [KEY, KEY.upper(), "s3cr3t%2FHunter%3D2", "S3CR3T/hunter=2"])
def test_a_known_secret_is_hidden_in_any_spelling(spelling: str) -> None:
    assert redact(f"no such key {spelling}!", [KEY, ""]) == "no such key ***!"
    assert redact('no "a\\"b<" nor a&quot;b&lt; nor a"b<', ['a"b<']) == 'no "***" nor *** nor ***'


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["api_key=s3cr3t"], "api_key (its value is hidden): unknown key"),
        (["data.hf_token=s3cr3t"], "data.hf_token (its value is hidden): unknown key"),
        (["api_key=s3cr3t1", "api_key=s3cr3t2"], "api_key is given twice, as *** and as ***; leave one out"),
        (
            ["stage.password=s3cr3t"],
            "stage.password (its value is hidden): stage is 'dpo', and holds no keys",
        ),
        (["api_key=s3cr3t", "api_key.x=1"], "api_key.x (its value is hidden): api_key is ***, and holds no"),
        (["api_key="], "'api_key=' has no value; write null"),
    ],
)
def test_a_message_about_a_secret_keeps_its_words(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(CONFIGS / "tiny" / "dpo.yaml", overrides)
    assert expected in str(error.value) and "s3cr3t" not in str(error.value)


def test_names() -> None:
    secret = "api_key apiKey OPENAI_API_KEY HF_TOKEN WANDB_API_KEY backend.token password x.DB_PASSWD secret"
    other = "max_tokens_a_step api_key_variable tokenizer TOKENIZERS_PARALLELISM keys_of path monkey"
    other += " sampling.max_tokens tokenizer.content_tokens"
    assert all(map(is_secret_name, secret.split()))
    assert not any(map(is_secret_name, other.split()))


def test_junk_takes_no_time() -> None:
    began = time.process_time()
    for text in ("://a:" * 40_000, "eyJ-" * 40_000, "?key" * 40_000, "api_key:" * 20_000, "a" * 200_000):
        redact(text, [KEY])
    assert time.process_time() - began < 5
