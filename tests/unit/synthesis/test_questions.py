"""Questions that speak of a text that their reader does not have."""

import pytest

from megatron_post.synthesis.questions import plain, points_at_document, points_at_passage


@pytest.mark.parametrize(
    ("question", "passage", "document"),
    [
        ("Who built the mill, as the given passage says?", True, True),
        ("What does this long excerpt describe?", True, True),
        ("According to the text, who built the mill?", False, True),
        ("What is described in the article?", False, True),
        ("Who wrote this document?", False, True),
        ("Who wrote the text of the Magna Carta?", False, False),
        ("Which tower has 90 steps?", False, False),
    ],
)
def test_a_question_points_at_its_text(question: str, passage: bool, document: bool) -> None:
    assert (points_at_passage(question), points_at_document(question)) == (passage, document)


def test_repeats_differ_in_case_blanks_and_punctuation() -> None:
    assert plain("Who built  it?") == plain("who built it") != plain("Who built 2 of it?")
    assert plain("3 + 4") != plain("3 - 4")
