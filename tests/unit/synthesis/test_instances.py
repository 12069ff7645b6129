"""Examples out of replies, and which of them can be used."""

from megatron_post.synthesis.instances import Instance, classified, examples, without_faults


def test_examples_with_an_input() -> None:
    text = "Example 1\nInput: 2 + 2\nOutput: 4\nExample 2:\nInput:\nTwo\nlines\nOutput: They\nare two.\n"
    assert examples(text) == [Instance("2 + 2", "4"), Instance("Two\nlines", "They\nare two.")]


def test_an_example_without_an_input() -> None:
    assert examples("Output: Say it aloud.") == [Instance("", "Say it aloud.")]
    assert examples("Example 1\nOutput: One.\nExample 2\nOutput: Two.") == [
        Instance("", "One."),
        Instance("", "Two."),
    ]


def test_what_follows_the_first_output_of_an_example_is_of_no_use() -> None:
    assert examples("Input: a\nOutput: b\nInput: c\nOutput: d") == [Instance("a", "b")]


def test_words_within_a_line_are_no_marks() -> None:
    text = "Example 1\nInput: Example 2 shows the Output: none\nOutput: An Input: field"
    assert examples(text) == [Instance("Example 2 shows the Output: none", "An Input: field")]


def test_a_reply_without_the_form() -> None:
    assert examples("I cannot do this.") == [] and classified("I cannot do this.") == []


def test_labels_come_before_inputs() -> None:
    text = "The labels are yes and no.\nClass label: yes\nInput: 7 is prime\nClass label: no\n8 is prime\n"
    assert classified(text) == [Instance("7 is prime", "yes"), Instance("8 is prime", "no")]
    assert classified("Class label: no") == [Instance("", "no")]


def test_faults_are_named() -> None:
    good = Instance("a", "b")
    bad = [Instance("a", ""), Instance("x", "x"), Instance("this:", "y"), Instance("y", "so:"), good]
    assert without_faults([good, *bad]) == (
        [good],
        [
            "empty output",
            "input and output are the same",
            "text ends with a colon",
            "text ends with a colon",
            "repeated example",
        ],
    )


def test_one_input_with_several_outputs_spoils_all() -> None:
    found = [Instance("a", "b"), Instance("c", "d"), Instance("a", "e")]
    assert without_faults(found) == ([], ["one input has several outputs"] * 3)
    without_input = [Instance("", "one"), Instance("", "another")]
    assert without_faults(without_input) == (without_input, [])
