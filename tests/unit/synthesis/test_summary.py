"""Counts of a run of any size stay small."""

from megatron_post.synthesis.parts import Drop, Result
from megatron_post.synthesis.summary import Summary
from megatron_post.synthesis.task import Event


def test_reasons_and_kinds_are_bounded() -> None:
    """Recipes should repeat their reasons. Where they do not, the first 200 are counted apart."""
    dropped = [Result(n, "i", f"f:{n}", [], Drop("s", f"reason {n}", "d" * 10**5)) for n in range(1000)]
    messages = [{"role": "assistant", "content": "x" * 10**5}]
    rows = [{"id": "r", "messages": messages, "capability": f"c{n}"} for n in range(1000)]
    kept = [Result(n, "i", "f", [row]) for n, row in enumerate(rows, start=1000)]
    summary = Summary(recipe="r", version=1, input=2000)
    assert len(list(summary.counted([*dropped, *kept]))) == 2000
    assert (summary.done, summary.dropped, summary.kept, summary.rows) == (2000, 1000, 1000, 1000)
    assert len(summary.reasons) == 201 and summary.reasons[-1].rows == 800
    assert summary.reasons[-1].reason == "(others)" and sum(reason.rows for reason in summary.reasons) == 1000
    assert len(summary.kinds) == 201 and summary.kinds["(others)"] == 800
    assert len(summary.model_dump_json()) < 201 * 3 * 2 * 7000


def test_steps_count_rows_requests_and_programs() -> None:
    events = [
        Event("a", "author", "reply", "k", 10, 5),
        Event("a", "author", "refusal", "k"),
        Event("b", "", "passed", "k"),
        Event("b", "", "timeout", "k"),
    ]
    summary = Summary(recipe="r", version=1)
    list(summary.counted([Result(0, "i", "f", [], Drop("b", "r", failed=True), events)] * 2))
    a, b = summary.steps["a"], summary.steps["b"]
    assert (a.rows, a.requests, a.refused, a.prompt_tokens, a.tokens) == (2, 4, 2, 20, 10)
    assert (b.rows, b.requests, dict(b.results), b.failed) == (2, 0, {"passed": 2, "timeout": 2}, 2)
    assert (summary.requests, summary.tokens, summary.prompt_tokens, summary.failed) == (4, 10, 20, 2)
