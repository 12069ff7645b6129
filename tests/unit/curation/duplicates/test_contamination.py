import numpy as np

from megatron_post.curation.duplicates.contamination import EvaluationNgrams
from megatron_post.curation.duplicates.words import Dialog

QUESTION = "Natalia sold clips to forty eight of her friends in April and then she sold half as many in May"


def evaluation(*rows: list[str], most_rows: int = 10) -> EvaluationNgrams:
    found = EvaluationNgrams(13, most_rows=most_rows)
    for number, row in enumerate(rows):
        found.add(row, ("exam", number))
    found.finish()
    return found


def asked(text: str, answer: str = "I do not know.") -> Dialog:
    return [("user", text), ("assistant", answer)]


def test_thirteen_shared_words_are_named_with_the_row() -> None:
    ngrams = evaluation(
        ["something else entirely, of more than thirteen words, as the rule for n-grams wants it"], [QUESTION]
    )
    found = ngrams.first_shared(
        [
            asked(f"Please solve this. {QUESTION.upper()}!"),
            asked("no", f"A question that I know is: {QUESTION}"),
            asked(" ".join(QUESTION.split()[:12])),
            asked(" ".join(QUESTION.split()[2:15])),
            asked(QUESTION.replace("friends", "enemies").replace("April", "June")),
        ]
    )
    assert [shared and shared.row[1] for shared in found] == [1, 1, None, 1, None]
    assert found[0] and found[0].words == " ".join(QUESTION.lower().split()[:13])


def test_punctuation_and_blanks_do_not_hide_a_question() -> None:
    found = evaluation([QUESTION]).first_shared([asked(QUESTION.replace(" ", ", \n"))])
    assert found[0] is not None


def test_ngrams_do_not_cross_messages() -> None:
    words = QUESTION.split()
    found = evaluation([QUESTION]).first_shared([asked(" ".join(words[:10]), " ".join(words[10:]))])
    assert found == [None]


def test_short_questions_are_compared_with_whole_messages() -> None:
    ngrams = evaluation(["What is the capital of France?"], ["Yes."])
    assert (ngrams.rows["exam"], ngrams.too_short["exam"]) == (2, 1)
    found = ngrams.first_shared(
        [
            asked("what is the capital of france"),
            asked("what is the capital of France and of Spain"),
            asked("yes", "Yes."),
        ]
    )
    assert [shared and shared.row[1] for shared in found] == [0, None, None]


def test_words_of_a_template_are_not_compared() -> None:
    template = "Read the question with care and answer with the letter of the one option that is right"
    rows = [[f"{template}: {'abcdefgh'[row]} {row}"] for row in range(4)]
    assert evaluation(*rows).first_shared([asked(template)])[0]
    ngrams = evaluation(*rows, most_rows=3)
    assert ngrams.common == len(template.split()) - 12
    found = ngrams.first_shared([asked(template), asked(f"{template}: b 1")])
    assert [shared and shared.row[1] for shared in found] == [None, 1]


def test_nothing_is_shared_with_no_evaluation_data() -> None:
    assert evaluation().first_shared([asked(QUESTION)]) == [None]


def test_random_texts_share_what_a_set_of_ngrams_says() -> None:
    """The table of bytes and the search agree with Python's sets."""
    draw = np.random.default_rng(5)
    texts = [" ".join(map(str, draw.integers(0, 3, 40))) for _ in range(60)]
    sets = [{tuple(text.split()[i : i + 13]) for i in range(28)} for text in texts]
    ngrams = evaluation(*([text] for text in texts[:30]), most_rows=30)
    found = ngrams.first_shared([asked(text) for text in texts])
    known = set().union(*sets[:30])
    assert [shared is not None for shared in found] == [bool(own & known) for own in sets]
