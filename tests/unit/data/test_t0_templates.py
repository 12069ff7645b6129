"""Templates that are written again in promptsource's format give T0's rows.

../shared/data/t0 has the rendered rows and not the rows of the datasets, so a test finds the columns of a row
in its prompt and its completion. What the prompt does not show has a value that gives the same prompt. The
file of `trec_fine_grained_ABBR_context_first` has no rows.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_post.data.dialog import BadRow
from megatron_post.data.prompt_templates import PromptTemplate, read_templates

TEMPLATES = Path(__file__).with_name("t0_templates.yaml")
Row = dict[str, Any]
# The row of a dataset and the choices, from the texts that the pattern has found and the completion.
Source = Callable[[Row, str], tuple[Row, tuple[str, ...] | None]]


def _labelled(*choices: str) -> Source:
    return lambda row, completion: (row | {"label": choices.index(completion)}, choices)


def _open(column: str) -> Source:
    return lambda row, completion: (row | {column: completion}, None)


def _squad(row: Row, completion: str) -> tuple[Row, None]:
    """The prompt shows no metadata, and one of the answers was drawn as the completion."""
    return row | {"answers": {"text": [completion]}, "metadata": {"split": "train"}}, None


def _duorc(row: Row, completion: str) -> tuple[Row, None]:
    nothing = completion in ("Can't answer", "Not answerable")
    return row | {"no_answer": nothing, "answers": [] if nothing else [completion]}, None


def _concepts(row: Row, completion: str) -> tuple[Row, None]:
    return {"concepts": row["concepts"].split(", "), "target": completion}, None


def _cosmos(row: Row, completion: str) -> tuple[Row, tuple[str, ...]]:
    letters = ("A", "B", "C", "D")
    answers = [line[3:] for line in row["answers"].split("\n")]
    return row | {"answers": answers, "label": letters.index(completion)}, letters


def _steps(row: Row, completion: str) -> tuple[Row, None]:
    return {"steps": [*row["steps"].split("\n- "), completion]}, None


def _kilt(row: Row, completion: str) -> tuple[Row, None]:
    return row | {"output": [{"answer": completion}]}, None


def _qasc(row: Row, completion: str) -> tuple[Row, tuple[str, ...]]:
    """The dataset's sentences have a capital letter and a full stop, which the template changes."""
    fact = row["fact"][:1].upper() + row["fact"][1:] + "."
    question = row["question"][:1].upper() + row["question"][1:]
    choices = {"text": [row["choice"]], "label": ["A"]}
    answer = "A" if completion == "Yes" else "B"
    return {
        "question": question,
        "combinedfact": fact,
        "choices": choices,
        "answerKey": answer,
    }, ("Yes", "No")


def _quartz(row: Row, completion: str) -> tuple[Row, tuple[str, ...]]:
    """The prompt does not show where the other choice ends. Any end gives the same prompt."""
    question = row["question"]
    if f" {completion} or " in question:
        question, _, other = question.partition(f" {completion} or ")
        choices, after = (completion, other), ""
    else:
        before, _, after = question.partition(f" or {completion}")
        question, _, other = before.rpartition(" ")
        choices = (other, completion)
    if after or question[-1] in ".?!":  # the template would remove the mark before choices at the end
        question += f" _____{after}"
    labels = ["A", "B"]
    key = labels[choices.index(completion)]
    columns = {"question": question, "choices": {"text": list(choices), "label": labels}, "answerKey": key}
    return row | columns, choices


def _wiki_hop(row: Row, completion: str) -> tuple[Row, tuple[str, ...]]:
    choices = tuple(row["candidates"].split("\n - "))
    question = f"{row['relation'].replace(' ', '_')} {row['subject']}"
    columns = {"supports": row["supports"].split("\n\n- "), "question": question}
    return columns | {"candidates": list(choices), "answer": completion}, choices


def _wiki_qa(row: Row, completion: str) -> tuple[Row, None]:
    return row | {"label": 1, "document_title": completion}, None


_TOPICS = (
    "Company ||| Educational Institution ||| Artist ||| Athlete ||| Office Holder ||| "
    "Mean Of Transportation ||| Building ||| Natural Place ||| Village ||| Animal ||| Plant ||| "
    "Album ||| Film ||| Written Work"
)
# By the name of a template: how to find the columns in a prompt, and the row of these and the completion.
SOURCES: dict[str, tuple[str, Source]] = {
    "rotten_tomatoes_Reviewer_Opinion_bad_good_choices": (
        r"(?P<text>.*) Did the reviewer find this movie good or bad\?",
        _labelled("bad", "good"),
    ),
    "amazon_polarity_Is_this_review": (
        r"Title: (?P<title>.*?)\nReview: (?P<content>.*)\nIs the review positive or negative\?",
        _labelled("Negative", "Positive"),
    ),
    "paws_labeled_final_Concatenation_no_label": (
        r"Sentence 1: (?P<sentence1>.*)\nSentence 2: (?P<sentence2>.*)\nQuestion: Does .* paraphrase .*\?",
        _labelled("No", "Yes"),
    ),
    "glue_mrpc_equivalent": (
        r".*\"\?\n(?P<sentence1>.*)\n(?P<sentence2>.*)",
        _labelled("not equivalent", "equivalent"),
    ),
    "glue_qqp_same_thing": (
        r"Are the questions \"(?P<question1>.*)\" and \"(?P<question2>.*)\" asking the same thing\?",
        _labelled("no", "yes"),
    ),
    "yelp_review_full_based_on_that": (
        r"(?P<text>.*)\n===\nBased on that, my rating is",
        _labelled("1 star", "2 stars", "3 stars", "4 stars", "5 stars"),
    ),
    "dbpedia_14_given_a_choice_of_categories_": (
        r"(?P<title>.*?) - (?P<content>.*) Given a choice of categories .*",
        _labelled(*_TOPICS.split(" ||| ")),
    ),
    "common_gen_Put_together": (r".*sentence: (?P<concepts>.*)\.", _concepts),
    "cosmos_qa_context_description_question_answer_id": (
        r"(?P<context>.*)\nAccording .* question\.\nQuestion: (?P<question>.*)\nOptions:\n(?P<answers>.*)",
        _cosmos,
    ),
    "wiqa_what_might_be_the_last_step_of_the_process": (
        r"- (?P<steps>.*)\n\nWhat might be the last step of the process\?",
        _steps,
    ),
    "adversarial_qa_droberta_based_on": (
        r"Extract .*?\.\nQuestion: (?P<question>.*?)\nContext: (?P<context>.*)",
        _squad,
    ),
    "quoref_Find_Answer": (
        r"The following .*? question: (?P<question>.*?) , can you please find it\? \n\n(?P<context>.*)",
        _squad,
    ),
    "ropes_plain_bottom_hint": (
        r"(?P<situation>.*?)\n\n(?P<question>.*?)\n\nHint: (?P<background>.*)",
        _squad,
    ),
    "cnn_dailymail_3_0_0_2_or_3_sentences": (r"In 2 .*?\n\nArticle: (?P<article>.*)", _open("highlights")),
    "sciq_Direct_Question": (
        r"Answer .*?: \n\n(?P<support>.*)\n\n\nQ: (?P<question>.*)\n\n\nA:",
        _open("correct_answer"),
    ),
    "duorc_ParaphraseRC_extract_answer": (
        r"Extract .*?\.\nQuestion: (?P<question>.*?)\nTitle: (?P<title>.*?)\nMovie plot: (?P<plot>.*)",
        _duorc,
    ),
    "duorc_SelfRC_movie_director": (
        r"I am .*?\n\nPlot title: (?P<title>.*?)\nMovie plot: (?P<plot>.*)\nMy question: (?P<question>.*)",
        _duorc,
    ),
    "kilt_tasks_hotpotqa_combining_facts": (r"Combine facts and answer this: (?P<input>.*)", _kilt),
    "qasc_is_correct_2": (
        r"Do .* question \"(?P<question>.*)\" is \"(?P<choice>.*)\", given that\n (?P<fact>.*)\?",
        _qasc,
    ),
    "quartz_answer_question_based_on": (
        r"Answer .*\n\nQuestion:\n\n\n(?P<question>.*)\? \n\n\nText:\n\n(?P<para>.*)",
        _quartz,
    ),
    "wiki_hop_original_choose_best_object_affirmative_3": (
        r"Information:\n\n- (?P<supports>.*)\n\n\n\nAfter .* with which '(?P<subject>.*)' exhibits the "
        r"relationship of '(?P<relation>.*?)'\. Find .*\n\nChoices:\n- (?P<candidates>.*)",
        _wiki_hop,
    ),
    "wiki_qa_Topic_Prediction_Answer_Only": (
        r"Determine the topic of the passage\.\n\"(?P<answer>.*)\"\nTopic:",
        _wiki_qa,
    ),
}


def _rows(shared_data: Path, name: str) -> list[tuple[str, str]]:
    """The prompts and completions of T0, without its line feed and its end of the text."""
    lines = map(json.loads, (shared_data / f"t0/{name}.jsonl").read_text().splitlines())
    return [
        (line["prompt"].removesuffix("\n"), line["completion"].removesuffix("<|endoftext|>"))
        for line in lines
    ]


def _columns(pattern: str, prompt: str) -> Row:
    found = re.fullmatch(pattern, prompt, re.DOTALL)
    assert found, prompt
    return found.groupdict()


@pytest.mark.parametrize("name", SOURCES)
def test_rendered_rows_equal_those_of_t0(name: str, shared_data: Path) -> None:
    (template,) = read_templates(TEMPLATES, [name])
    pattern, source = SOURCES[name]
    rows = _rows(shared_data, name)
    assert len(rows) == (8 if name.startswith("wiki_qa") else 100)
    for number, (prompt, completion) in enumerate(rows):
        # promptsource strips both parts, and some of T0's completions still have a blank at the end.
        row, choices = source(_columns(pattern, prompt), completion.strip())
        rendered = template.apply(row, number=number)
        assert rendered is not None
        assert (rendered.prompt, rendered.completion) == (prompt.strip(), completion.strip())
        assert rendered.choices == choices


def test_a_column_that_is_missing_is_an_error_and_not_an_empty_completion(shared_data: Path) -> None:
    """The completions of T0's rows of `trec` are empty, because its rows have no column `label_coarse`."""
    (template,) = read_templates(TEMPLATES, ["trec_pick_the_best_descriptor"])
    rows = _rows(shared_data, "trec_pick_the_best_descriptor")
    assert len(rows) == 100 and not any(completion for _, completion in rows)
    for number, (prompt, _) in enumerate(rows):
        row = _columns(r"Question: (?P<text>.*)\n\nDescriptors: .*\n\nBest Descriptor\?", prompt)
        with pytest.raises(BadRow, match="'label_coarse' is undefined"):
            template.apply(row, number=number)
        rendered = template.apply(row | {"label_coarse": 1}, number=number)
        assert rendered is not None and (rendered.prompt, rendered.completion) == (prompt, "Entity")


def test_all_files_of_t0_are_covered(shared_data: Path) -> None:
    names = {path.stem for path in (shared_data / "t0").glob("*.jsonl") if path.stat().st_size}
    assert names == {*SOURCES, "trec_pick_the_best_descriptor"}


def test_a_row_without_an_answer_is_left_out_or_has_the_words_for_it() -> None:
    templates = {template.name: template for template in read_templates(TEMPLATES)}

    def completion(name: str, row: Row) -> str | None:
        template: PromptTemplate = templates[name]
        rendered = template.apply(row, number=1)
        return rendered and rendered.completion

    plot = {"question": "Who?", "title": "A film", "plot": "A plot.", "no_answer": True, "answers": []}
    assert completion("duorc_ParaphraseRC_extract_answer", plot) == "Can't answer"
    assert completion("duorc_SelfRC_movie_director", plot) == "Not answerable"
    passage = {"answer": "A passage.", "document_title": "Passages"}
    assert completion("wiki_qa_Topic_Prediction_Answer_Only", passage | {"label": 1}) == "Passages"
    assert completion("wiki_qa_Topic_Prediction_Answer_Only", passage | {"label": 0}) is None
    assert completion("kilt_tasks_hotpotqa_combining_facts", {"input": "Who?", "output": []}) is None
    squad = {"question": "Who?", "context": "A.", "answers": {"text": ["A", "B"]}}
    assert completion("adversarial_qa_droberta_based_on", squad | {"metadata": {"split": "test"}}) is None
    assert completion("quoref_Find_Answer", squad) in ("A", "B")
