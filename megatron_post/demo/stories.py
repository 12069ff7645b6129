"""The texts of the demo's problems: short stories with numbers to be filled in.

A story's `plan` gives its answer, operation by operation from left to right: "a + b - c" is (a + b) - c. The
text has placeholders for the numbers a, b and c, for two people {name} and {friend}, and for {things}.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Story:
    """One form of a question.

    goes_on: the answer is the amount that {name} now has, so a follow-up may change it.
    """

    text: str
    plan: str
    goes_on: bool = False


STORIES = (
    Story(
        "{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?", "a + b", True
    ),
    Story(
        "{friend} gives {b} {things} to {name}, who had {a}. How many {things} does {name} have?",
        "a + b",
        True,
    ),
    Story(
        "There are {a} {things} in one box and {b} in another. How many {things} are there in all?", "a + b"
    ),
    Story("{name} has {a} {things}, {friend} has {b}. How many {things} do they have together?", "a + b"),
    Story(
        "{name} has {a} {things}. {friend} has {b} more than {name}. How many does {friend} have?", "a + b"
    ),
    Story(
        "{name} has {a} {things}. {friend} has twice as many. How many {things} does {friend} have?", "a + a"
    ),
    Story("{name} had {a} {things} and lost {b}. How many {things} are left?", "a - b", True),
    Story("{name} gives {b} of {a} {things} to {friend}. How many {things} does {name} keep?", "a - b", True),
    Story("{friend} took {b} of the {a} {things} on the table. How many {things} are still there?", "a - b"),
    Story(
        "{name} has {a} {things}, {friend} has {b}. How many more does {name} have than {friend}?", "a - b"
    ),
    Story(
        "{name} has {a} {things}. {friend} has {b} fewer than {name}. How many does {friend} have?", "a - b"
    ),
    Story("{name} wants {a} {things} and has {b} so far. How many more does {name} need?", "a - b"),
    Story(
        "{name} has {a} {things}, buys {b} and then gives {c} to {friend}. How many are left?",
        "a + b - c",
        True,
    ),
    Story(
        "{name} had {a} {things}, sold {b} and then made {c} new ones. How many are there now?",
        "a - b + c",
        True,
    ),
    Story(
        "{name} has {a} {things}, {friend} has {b}. Together they buy {c} more. How many is that?",
        "a + b + c",
    ),
    Story("Of {a} {things}, {name} took {b} and {friend} took {c}. How many {things} remain?", "a - b - c"),
)

# Questions that may follow a story with `goes_on`. Here `a` is the answer before, and not a placeholder.
FOLLOW_UPS = (
    Story("Then {friend} brings {b} more. How many {things} does {name} have now?", "a + b"),
    Story("Now {name} finds another {b}. What is the total?", "a + b"),
    Story("After that {name} loses {b}. How many {things} are left?", "a - b"),
    Story("And if {friend} takes {b} of them?", "a - b"),
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a patient teacher of arithmetic.",
    "Show your work, then give the answer.",
)

NAMES = (
    *(
        "Ada",
        "Alan",
        "Barbara",
        "Claude",
        "Donald",
        "Edsger",
        "Emmy",
        "Frances",
        "Grace",
        "Hedy",
        "John",
        "Kurt",
    ),
    *("Leslie", "Margaret", "Niklaus", "Radia", "Rosa", "Sofia", "Tim", "Tony"),
)

THINGS = (
    *(
        "apples",
        "beads",
        "books",
        "buttons",
        "cards",
        "coins",
        "eggs",
        "keys",
        "marbles",
        "nuts",
        "pencils",
        "pens",
    ),
    *("shells", "stamps", "stones", "tickets"),
)
