"""Rules on replies: what follows them, what breaks them, and where this is not certain."""

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_post.synthesis.steering.rules import Rules, checked, described, unstated
from megatron_post.synthesis.steering.system_prompt import system_prompt

FRENCH = "Le ciel est bleu parce que la lumière du soleil se disperse dans l'air."
GERMAN = "Der Himmel ist blau, weil das Licht der Sonne in der Luft gestreut wird."


@pytest.mark.parametrize(
    ("rules", "text", "verdict"),
    [
        ({"most_words": 4}, "The sky is blue.", "follows"),
        ({"most_words": 3}, "The sky is blue.", "breaks"),
        ({"most_words": 5}, "A well-known sky, it's.", "follows"),
        ({"most_words": 4}, "A well-known sky, it's.", "unclear"),
        ({"least_words": 5}, "A well-known sky, it's.", "unclear"),
        ({"least_sentences": 2}, "Dr. Hall left.", "unclear"),
        ({"least_sentences": 3}, "Dr. Hall left.", "breaks"),
        ({"most_characters": 3}, "blue", "breaks"),
        ({"format": "bullets"}, "- a\n- b", "follows"),
        ({"case": "lower"}, "the sky.", "follows"),
        ({"case": "lower"}, "The sky.", "breaks"),
        ({"case": "upper"}, "THE SKY.", "follows"),
        ({"case": "upper"}, "12", "unclear"),
        ({"begins": "Ahoy"}, "Ahoy, it is blue.", "follows"),
        ({"begins": "Ahoy"}, "ahoy, it is blue.", "unclear"),
        ({"begins": "Ahoy"}, "**Ahoy**, it is blue.", "unclear"),
        ({"ends": "Ask me more!"}, "It is blue. Ask me more!", "follows"),
        ({"ends": "Ask me more!"}, "It is blue.", "breaks"),
        ({"begins": "Hi"}, "Hill, it is blue.", "unclear"),
        ({"begins": "¡Hi!"}, "¡Hi!there, it is blue.", "follows"),
        ({"ends": "art"}, "It is smart", "unclear"),
        ({"contains": ["sea", "sky"]}, "The Sea and the sky.", "follows"),
        ({"contains": ["sea"]}, "All seas.", "unclear"),
        ({"contains": ["sea"]}, "The sky.", "breaks"),
        ({"avoids": ["sea"]}, "The sky.", "follows"),
        ({"avoids": ["sea"]}, "All seas.", "unclear"),
        ({"avoids": ["sea"]}, "The sea.", "breaks"),
    ],
)
def test_a_rule_is_followed_or_broken_for_certain(rules: dict[str, Any], text: str, verdict: str) -> None:
    assert checked(Rules.model_validate(rules), text) == {next(iter(rules)): verdict}


@pytest.mark.parametrize(
    ("text", "keys", "items"),
    [
        ('{"b": 1, "a": 2}', "follows", "breaks"),
        ('{"a": 1}', "breaks", "breaks"),
        ('{"a": 1, "b": 2, "c": 3}', "breaks", "breaks"),
        ('["a", "b"]', "breaks", "follows"),
        ("a, b", "breaks", "breaks"),
    ],
)
def test_keys_and_items_of_json(text: str, keys: str, items: str) -> None:
    assert checked(Rules(format="json", keys=("a", "b")), text)["keys"] == keys
    assert checked(Rules(format="json", items=2), text)["items"] == items
    if text.startswith(("{", "[")):
        block = f"```json\n{text}\n```"
        assert checked(Rules(format="json", keys=("a", "b")), block)["keys"] == "unclear"
        assert checked(Rules(format="json", items=2), block)["items"] == "unclear"


def test_a_language_is_identified() -> None:
    pytest.importorskip("py3langid")
    french = Rules(language="fr")
    assert checked(french, FRENCH) == {"language": "follows"}
    assert checked(french, GERMAN) == {"language": "breaks"}
    assert checked(french, "Oui.") == {"language": "unclear"}
    assert checked(french, f"{FRENCH}\n\n{GERMAN}") != {"language": "follows"}


@pytest.mark.parametrize(
    ("rules", "fault"),
    [
        ({"least_words": 5, "most_words": 4}, "least_words is above most_words"),
        ({"items": 3}, "items needs a format"),
        ({"format": "plain", "items": 3}, "items needs a format"),
        ({"keys": ["a"]}, "keys are those of a JSON object"),
        ({"format": "json", "items": 2, "keys": ["a"]}, "keys are those of a JSON object"),
        ({"format": "json", "language": "fr", "most_words": 3}, "a JSON value has no language, most_words"),
        ({"most_words": 0}, "greater than 0"),
        ({"most_words": "5"}, "valid integer"),
        ({"words": 5}, "Extra inputs"),
        ({"contains": []}, "at least 1"),
    ],
)
def test_rules_that_cannot_all_hold_are_refused(rules: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        Rules.model_validate(rules)


def test_every_rule_has_a_sentence() -> None:
    examples: dict[str, Any] = {
        **dict.fromkeys(Rules.model_fields, 3),
        **{"format": "bullets", "keys": ["a"], "case": "lower", "begins": "a", "ends": "a", "language": "fr"},
        **{"contains": ["a", "b"], "avoids": ["a"]},
    }
    for name, value in examples.items():
        rules = {name: value, **({"format": "bullets"} if name == "items" else {})}
        rules = {"format": "json", "keys": ["a"]} if name == "keys" else rules
        assert len(described(Rules.model_validate(rules))) == len(rules)
        assert checked(Rules.model_validate(rules), "- one").keys() == rules.keys()
    assert described(Rules(language="fr", contains=("a", "b"))) == [
        "These words are in the reply: a, b",
        "The reply is in French.",
    ]


@pytest.mark.parametrize(
    ("rules", "system", "name"),
    [
        ({"most_words": 50}, "Use at most 50 words.", ""),
        ({"most_words": 50}, "Use at most 500 words.", "most_words"),
        ({"most_words": 50}, "Use at most fifty words.", "most_words"),
        ({"most_words": 1500}, "Use at most 1,500 words.", ""),
        ({"contains": ["Sea", "sky"]}, "Speak of the sea and the sky.", ""),
        ({"contains": ["sea", "sky"]}, "Speak of the sea.", "contains"),
        ({"format": "bullets", "case": "lower", "language": "fr"}, "Réponds.", ""),
    ],
)
def test_a_system_prompt_states_its_rules(rules: dict[str, Any], system: str, name: str) -> None:
    assert unstated(Rules.model_validate(rules), system) == name


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"system": "Be brief.", "rules": {"format": "plain"}}, "no rule on the length"),
        ({"system": "Be brief."}, "no rule on the length"),
        (
            {"system": "Be brief.", "rules": {"most_words": 9}},
            "a rule that its text does not state: most_words",
        ),
        ({"system": "Use 9 words.", "rules": {"words": 9}}, "a system prompt or rules in another form"),
        ({"system": "", "rules": {"most_words": 9}}, "a system prompt or rules in another form"),
        ({"kind": "tone", "system": "Be kind."}, "no object with `system` and `rules`"),
        (["Be brief."], "no object with `system` and `rules`"),
    ],
)
def test_system_prompts_with_faults(values: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        system_prompt(values, "length")
    assert system_prompt({"system": "Be kind."}, "tone").rules.given == {}
