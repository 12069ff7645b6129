"""The step `clean`: rules that rewrite, drop and balance, by source and role, and the shipped masks."""

from pathlib import Path
from typing import Any

import pytest

from megatron_post.config.load import ConfigError
from megatron_post.curation.rules import Rule, load_response_rules, load_rules
from tests.unit.curation.place import Place, dialog

CONFIGS = Path(__file__).resolve().parents[3] / "configs/curation"
MASKS = load_rules(CONFIGS / "masks.yaml")
BOILERPLATE = load_rules(CONFIGS / "boilerplate.yaml")


def rule(name: str, pattern: str, **keys: Any) -> dict[str, Any]:
    return {"name": name, "pattern": pattern, **keys}


def clean(*rules: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"kind": "clean", "rules": list(rules), **keys}


def test_balanced_over_all_parts_by_source(place: Place) -> None:
    """In the source a, 4 of 10 rows are found. A share of 0.25 keeps floor(0.25 x 6 / 0.75) = 2 of them."""
    for name in ("a", "b"):
        place.add_source(name, [dialog(f"q {n}", f"wow {n}" if n < 4 else f"plain {n}") for n in range(10)])
    report = place.curate(clean(rule("wow", "WOW", max_share=0.25, sources=["a"])), part_rows=3)
    assert place.dropped() == ["wow", "wow"]
    assert [each["kept"] for each in report["sources"]] == [8, 10]
    assert report["steps"][0]["report"] == {"found": {"wow": 4}}


def test_a_changed_share_searches_nothing_again(place: Place) -> None:
    place.add_source("a", [dialog("q", f"wow {n}") for n in range(4)])
    place.curate(clean(rule("wow", "wow", max_share=0)))
    before = place.times()
    assert place.curate(clean(rule("wow", "wow", max_share=1)))["kept"] == 4
    new = {path.split("/")[1].rpartition("-")[0] for path in place.times().keys() - before.keys()}
    assert new == {"clean"}


def test_rows_that_an_earlier_step_drops_are_not_counted(place: Place) -> None:
    """Of the 4 rows that are long enough 2 are found. A share of 0.5 keeps both."""
    place.add_source("a", [dialog("q", "wow"), *[dialog("q", f"{word} indeed {n}") for n in "12"
                                               for word in ("wow", "plain")]])  # fmt: skip
    place.curate({"kind": "lengths", "least_characters": 6}, clean(rule("wow", "wow", max_share=0.5)))
    assert place.dropped() == ["too few characters"]


def test_roles_and_reasoning_are_searched(place: Place) -> None:
    place.add_source("a", [dialog("please", "x"), dialog("x", "please")])
    place.curate(clean(rule("polite", "please", max_share=0, roles=["user"])))
    assert [row["messages"][0]["content"] for row in place.rows()] == ["x"]
    thinking = dialog("x", "y")
    thinking["messages"][1]["reasoning_content"] = "mail a@b.de"
    place.values["sources"] = []
    place.add_source("b", [thinking])
    place.curate(clean(rule("mail", r"\w+@\w+\.de", replace="[M]")), reasoning="render")
    assert place.rows()[0]["messages"][1]["reasoning_content"] == "mail [M]"


def test_a_rewritten_row_is_searched_as_it_is_then(place: Place) -> None:
    place.add_source("a", [dialog("q", "Sure! It is a cat."), dialog("q", "a cat"), dialog("q", "dog")])
    place.curate(clean(rule("opening", r"^sure! ", replace=""), rule("cat", r"^it is a (cat)", max_share=0)))
    assert place.dropped() == ["cat"]
    assert place.rows("dropped.jsonl")[0]["messages"][1]["content"] == "It is a cat."
    place.curate(clean(rule("animal", r"a (cat)", replace=r"the \1")))
    texts = [row["messages"][1]["content"] for row in place.rows()]
    assert texts == ["Sure! It is the cat.", "the cat", "dog"]
    assert place.notes("clean")[1] == {"replaced": ["animal"]}


def test_a_row_that_would_be_blank_or_whose_call_would_change_is_dropped(place: Place) -> None:
    call = {"type": "function", "function": {"name": "mail", "arguments": '{"to": "a@b.de"}'}}
    calling = {
        "messages": [
            {"role": "user", "content": "mail!"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "sent"},
            {"role": "assistant", "content": "done"},
        ]
    }
    place.add_source("a", [dialog("q", "a@b.de"), calling, dialog("q", "to a@b.de")])
    place.curate(clean(rule("mail", r"\w+@\w+\.de", replace=""), rule("to", "to", replace="at")))
    assert place.dropped() == ["mail, which leaves a row that cannot be trained on",
                               "mail, in the call of a tool"]  # fmt: skip
    assert place.rows("dropped.jsonl")[0]["messages"][1]["content"] == "a@b.de"
    assert [row["messages"][1]["content"] for row in place.rows()] == ["at "]


def test_all_responses_of_a_preference_are_rewritten(place: Place) -> None:
    place.add_source("a", [{"prompt": "q", "chosen": "Sure! yes", "rejected": "Sure! no"},
                           {"prompt": "q", "chosen": "Sure! yes", "rejected": "yes"}])  # fmt: skip
    place.curate(clean(rule("opening", "sure! ", replace="")))
    assert [row["rejected"][0]["content"] for row in place.rows()] == ["no"]
    assert place.dropped() == ["opening, which leaves a row that cannot be trained on"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (clean(), "it has no rule"),
        (clean(rule("a", "x", max_share=0), rule("a", "y", max_share=0)), "two rules have the name 'a'"),
        (clean(rule("a", "x")), "give either max_share or replace"),
        (clean(rule("a", "x", max_share=0, replace="")), "give either max_share or replace"),
        (clean(rule("a", "x", replace="", at_least=2)), "at_least has no effect"),
        (clean(rule("a", "(x)", replace=r"\2")), r"\\2 is no group of the pattern, which has 1"),
        (clean(rule("a", "(x)", replace="\\")), "write a backslash as two"),
        (clean(rule("a", "x", max_share=0, sources=["chat"])), "source 'chat', which is not in sources"),
        (clean(rule("a", "x", max_share=0), sources=["aa"]), r"did you mean 'a'\?"),
        ({"kind": "clean", "files": ["none.yaml"]}, "config file none.yaml does not exist"),
    ],
)
def test_rules_that_cannot_work_are_refused(place: Place, values: dict[str, Any], message: str) -> None:
    place.add_source("a", [dialog("q", "a")])
    with pytest.raises(ConfigError, match=message):
        place.curate(values)


def test_select_refuses_rules_that_it_cannot_apply(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("rules: [{name: a, pattern: x, replace: y}]")
    with pytest.raises(ValueError, match="rule 'a': `select` only limits shares of responses"):
        load_response_rules(path)


def masked(text: str) -> str:
    for each in MASKS:
        text = each.rewritten(text)
    return text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to Anna.Smith+x@mail.example-shop.co.uk, please", "write to [E-MAIL], please"),
        ("user@example.com and bob@sub.example.org", "user@example.com and bob@sub.example.org"),
        ("@handle, a@b, x@1.2 and matrix A@B.T", "@handle, a@b, x@1.2 and matrix A@B.T"),
        ("ping 8.8.8.8 or 93.184.216.34:80.", "ping [IP ADDRESS] or [IP ADDRESS]:80."),
        ("127.0.0.1, 192.168.0.1, 203.0.113.9, 1.2.3, 1.2.3.4.5, 300.1.1.1, 10.0.0.1",
         "127.0.0.1, 192.168.0.1, 203.0.113.9, 1.2.3, 1.2.3.4.5, 300.1.1.1, 10.0.0.1"),
        ("2606:4700:4700::1111 or 2a00:1450:4001:81b:0:0:0:200e", "[IP ADDRESS] or [IP ADDRESS]"),
        ("12:30:45, std::vector, a::b, 2001:db8::1, 00:1B:44:11:3A:B7",
         "12:30:45, std::vector, a::b, 2001:db8::1, 00:1B:44:11:3A:B7"),
        ("call (415) 555-2671 or 415-555-2671", "call [TELEPHONE] or [TELEPHONE]"),
        ("+49 30 901820", "[TELEPHONE]"),
        ("+4930901820 and 1-800-555-0199!", "[TELEPHONE] and [TELEPHONE]!"),
        ("2023-11-28, 3.14159265358, 1,234,567, 555-1234, 5+1234567, x = 1234567890, 123-45-6789",
         "2023-11-28, 3.14159265358, 1,234,567, 555-1234, 5+1234567, x = 1234567890, 123-45-6789"),
        ("key sk-proj-abcdefghij0123456789ABCD and AKIAIOSFODNN7EXAMPLE", "key [SECRET] and [SECRET]"),
        ("ghp_" + "a1" * 18 + " hf_" + "b2" * 17, "[SECRET] [SECRET]"),
        ("git clone https://me:hunter22@host/x", "git clone https://[SECRET]@host/x"),
        ("http://host:8080/a@b and sk-learn, risk-adjusted-returns-of-portfolios",
         "http://host:8080/a@b and sk-learn, risk-adjusted-returns-of-portfolios"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----\nend", "[PRIVATE KEY]\nend"),
    ],
)  # fmt: skip
def test_shipped_masks(text: str, expected: str) -> None:
    assert masked(text) == expected


@pytest.mark.parametrize(
    ("text", "expected", "names"),
    [
        ("Sure! The sum is 3.", "The sum is 3.", []),
        ("Great question! It rains.", "It rains.", []),
        ("Sure enough, it rained. Certainly not!", "Sure enough, it rained. Certainly not!", []),
        ("It is 3.\n\nI hope this helps!", "It is 3.", []),
        ("It is 3. Let me know if you have any other questions.", "It is 3.", []),
        ("They said: let me know.\nThen they left.", "They said: let me know.\nThen they left.", []),
        (
            "As an AI language model, I have no body.",
            "As an AI language model, I have no body.",
            ["language model"],
        ),
        ("I'm sorry, but I can't help with that.", "I'm sorry, but I can't help with that.", ["refusal"]),
        ("I cannot do this", "I cannot do this", ["refusal"]),
        ("I am unable to answer", "I am unable to answer", ["refusal"]),
        ("I can. She cannot.", "I can. She cannot.", []),
        ("N/A", "N/A", ["no answer"]),
        ("[insert answer here]", "[insert answer here]", ["no answer"]),
        ("None of them.", "None of them.", []),
    ],
)
def test_shipped_boilerplate(text: str, expected: str, names: list[str]) -> None:
    rewritten = text
    for each in BOILERPLATE:
        rewritten = each.rewritten(rewritten)
    assert rewritten == expected
    assert [each.name for each in BOILERPLATE if each.replace is None and each.finds(rewritten)] == names


def test_masks_do_not_take_long_on_long_texts() -> None:
    """Each pattern is linear in texts that begin like a match again and again."""
    for text in (
        "a" * 30_000 + "@",
        "1.2.3." * 5000,
        "ab:" * 9000,
        "+1 " * 9000,
        "x@y." * 8000,
        "://a:" * 6000,
    ):
        masked(text)  # raises if a pattern takes more than two seconds


def test_a_rule_of_a_role(place: Place) -> None:
    assert Rule(name="a", pattern="x", replace="y").rewritten("X x") == "y y"
    assert not Rule(name="a", pattern="x", max_share=0, sources=("a",)).applies_to("b")
