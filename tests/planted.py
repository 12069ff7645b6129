"""Rows among which duplicates and contaminated rows are planted, and how many of them `curate` finds.

python -m tests.planted [ROWS]    # 10,000; prints precision and recall of each step
"""

import json
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import ne
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from megatron_post.curation.run import curate
from megatron_post.curation.settings import load_curation
from megatron_post.display import make_console
from tests.encoder import WHY_ABSENT, unpack_encoder

Kind = Literal["exact", "near", "paraphrase", "numbers", "contaminated"]
THRESHOLD = 0.8  # of the semantic duplicates
STEPS: dict[str, Kind] = {
    "contamination": "contaminated",
    "exact_duplicates": "exact",
    "near_duplicates": "near",
    "semantic_duplicates": "paraphrase",
}

_NOUNS = """
    anchor antenna apron aquarium archway armchair astronaut avocado bagpipe bakery balcony ballad bamboo
    banjo barometer basil basket bassoon beacon beehive bicycle biscuit blanket blueprint boiler bonfire
    bookshelf bracelet brewery bridge bronze brush bucket buffalo bulldozer cabin cactus calendar camera
    campsite candle canoe canyon carburetor cardigan carpet casserole castle cathedral cello cement ceramics
    chandelier cheese cherry chessboard chimney chisel chocolate cinnamon clarinet clay clockwork cobweb
    coconut comet compass compost concrete copper coral corridor cotton cradle crane crater cricket
    crocodile crystal cucumber curtain dam dandelion desert diamond dictionary dolphin donkey drawer
    dragonfly drill drum eagle earring easel eclipse elevator embroidery engine escalator espresso fabric
    falcon fence fern ferry fiddle firefly fireplace flagpole flamingo flute foghorn fossil fountain fresco
    fridge furnace garage garlic gazelle geyser ginger giraffe glacier goggles gondola granite grapefruit
    greenhouse guitar gymnasium hammer hammock harbor harp harvest hazelnut hedgehog helicopter helmet
    herring honey horizon hummingbird hurricane iceberg igloo incense insulation iris island ivory jacket
    jaguar jasmine jigsaw juniper kayak kennel kettle keyboard kite kiwi koala lagoon lantern lasagna
    laundry lavender leather lemonade leopard library lighthouse lilac limestone linen lizard lobster
    locomotive loom lullaby magnet mandolin mango mansion maple marathon marble marinade meadow medal melon
    meteor microscope mill mirror molasses monastery monsoon mosaic moss motorcycle mountain muffin mulberry
    museum mushroom mustard necklace needle nightingale nutmeg oasis oatmeal oboe observatory octopus olive
    opera orchard orchid organ origami ostrich otter oven owl oyster paddle pagoda paint palace pancake
    panther paprika parachute parsley pasture peacock pear pebble pelican pendulum penguin peninsula pepper
    perfume piano pigeon pillow pineapple pipeline pistachio planet plaster plumbing polar pomegranate
    porcelain porch potato pottery prairie prism pumpkin puppet pyramid quarry quilt rabbit radar radish
    raft railway rainbow raspberry ravine recipe reef refinery rhubarb ribbon robot rocket roof rosemary
    rudder saddle saffron salmon sandal sapphire satellite sauna sausage sawmill saxophone scaffold
    scarecrow scarf sculpture seahorse seaweed shampoo shark shipyard shovel silk skateboard skeleton sledge
    snorkel soap sofa spaghetti spider spinach squirrel stable staircase starfish statue steamship stove
    strawberry submarine sundial sunflower surfboard swan sweater syrup tambourine tapestry telescope temple
    tent terrace theater thermometer thimble thunder tiger toaster tomato tornado tortoise tractor
    trampoline trombone trumpet tulip tundra tunnel turbine turquoise turtle tweed umbrella upholstery
    vanilla vase velvet veranda viaduct vinegar vineyard violin volcano waffle walnut walrus warehouse
    waterfall wheelbarrow whisk willow windmill wolf woodpecker wool workshop yacht yoghurt zebra zinc
    zipper
""".split()  # noqa: SIM905
_NAMES = ("Ada", "Boris", "Chen", "Dalia", "Elif", "Femi", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Luis")

# Two lines are the same content in two wordings, which share few runs of three words.
_QUESTIONS = """
How can I repair an old {a} with parts of a {b}?
What is a way to mend my worn {a} by using pieces from a {b}?
Write a short story about a {a} and a lonely {b}.
Please tell me a brief tale in which a {a} meets a {b} without friends.
Why is a {a} more expensive than a {b}?
What makes the price of a {a} higher than that of a {b}?
Explain to a child how a {a} differs from a {b}.
In words for kids, what is the difference between a {a} and a {b}?
Where should a traveller look for a {a} near a {b}?
I am on a trip and want to find a {a} close to a {b}. Which places are good?
Give me three reasons to buy a {a} instead of a {b}.
List a few arguments for purchasing a {a} and not a {b}.
Who first combined the {a} with the {b} in history?
In the past, which person was the earliest to join a {a} and a {b}?
Compose a poem that praises the {a} and mocks the {b}.
I need verses in honor of a {a} which make fun of a {b}.
Is it safe to store a {a} beside a {b} in winter?
During the cold months, may I keep my {a} next to the {b} without danger?
Plan a lesson about the {a} that ends with a {b}.
Design a class on the topic of a {a}, and finish it with a {b}.
""".strip().split("\n")
_SENTENCES = """
Start by cleaning the {a} with warm water.
First, wash the {a}, for which lukewarm water is best.
Most people forget that the {a} needs regular care.
It is often overlooked how much attention a {a} demands.
A museum in the north shows a famous {a} every summer.
Each summer visitors can see a well-known {a} in a northern museum.
The smell of a {a} reminds many of their childhood.
For a lot of people, memories of being young return when they smell a {a}.
Never leave the {a} outside when it rains.
In rainy weather the {a} must always stay indoors.
Experts compare its shape to that of a {a}.
Its form has been likened to a {a} by specialists.
In some villages the {a} is a symbol of luck.
There are small towns where good fortune is represented by a {a}.
You can borrow a {a} from a neighbor for a week.
Ask the people next door to lend you their {a} for seven days.
The colors come from the dust of a {a}.
Powder made of a {a} gives it these colors.
Ancient sailors traded each {a} for salt.
Salt was what seafarers of old received in exchange for a {a}.
Children paint the {a} on the last day of school.
When lessons end for the year, pupils decorate the {a} with paint.
Its engine makes less noise than a {a}.
Compared with a {a}, its motor is quieter.
""".strip().split("\n")
_PROBLEMS = """
{name} has {x} boxes with {y} pieces of {a} each, and gives {z} pieces away for a {b}. How many are left?
A shop sells a {a} for {x} dollars and a {b} for {y} dollars. How much do {z} of each cost together?
A train carries {y} tons of {a} in each of {x} wagons to the {b}, {z} times a day. How many tons is this?
{name} reads {x} pages on the {a} and {y} pages on the {b} each day. How many pages are read in {z} days?
To build a {a} with a {b}, {name} needs {x} screws and {y} nails. How many parts do {z} workers need?
""".strip().split("\n")
_EXAMINATION = (
    "During the annual examination of {a} inspectors in the district of {b}, candidate number {x} must "
    "decide whether a {c} or a {d} is to be registered first. Which rule applies?"
)


@dataclass
class Planted:
    """Rows, the questions of an evaluation, and what was planted.

    pairs: for each kind of duplicate the indices of the original and of its copy. numbers: as
    `pairs`, for problems whose numbers were changed, both of which must be kept. contaminated: indices.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    evaluation: list[dict[str, str]] = field(default_factory=list)
    pairs: dict[Kind, list[tuple[int, int]]] = field(default_factory=dict)
    numbers: list[tuple[int, int]] = field(default_factory=list)
    contaminated: list[int] = field(default_factory=list)


def plant(count: int, *, seed: int = 0) -> Planted:
    """`count` rows. Of 10,000 are 500 of each kind of duplicate, 200 other numbers and 50 contaminated."""
    draw = random.Random(seed)
    copies, problems, leaked = count // 20, count // 50, count // 200
    writer = _Writer(draw)
    texts = [writer.content() for _ in range(count - 3 * copies - 2 * problems - leaked)]
    dialogs = [content.worded(0) for content in texts]
    originals = draw.sample(range(len(texts)), 3 * copies)
    found: dict[str, list[tuple[int, int]]] = {
        kind: [] for kind in ("exact", "near", "paraphrase", "numbers")
    }
    make: dict[str, Callable[[int], tuple[str, str]]] = {
        "exact": lambda place: _respaced(dialogs[place], draw),
        "near": lambda place: _edited(dialogs[place], draw),
        "paraphrase": lambda place: texts[place].worded(1),
    }
    for number, (kind, copy) in enumerate(make.items()):
        for place in originals[number * copies : (number + 1) * copies]:
            found[kind].append((place, len(dialogs)))
            dialogs.append(copy(place))
    for _ in range(problems):
        found["numbers"].append((len(dialogs), len(dialogs) + 1))
        dialogs += writer.problem_twice()
    evaluation = [writer.examination() for _ in range(4 * leaked)]
    contaminated = list(range(len(dialogs), len(dialogs) + leaked))
    for question in draw.sample(evaluation, leaked):
        prompt, answer = writer.content().worded(0)
        dialogs.append((f"{prompt} Also answer this. {question.upper()}", answer))
    place_of = list(range(len(dialogs)))
    draw.shuffle(place_of)
    shuffled: list[Any] = [None] * len(dialogs)
    for place, (prompt, answer) in zip(place_of, dialogs, strict=True):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        shuffled[place] = {"messages": messages}
    moved = {kind: [(place_of[a], place_of[b]) for a, b in pairs] for kind, pairs in found.items()}
    numbers = moved.pop("numbers")
    questions = [{"question": question} for question in evaluation]
    return Planted(shuffled, questions, moved, numbers, [place_of[a] for a in contaminated])  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Content:
    """What a dialog is about.

    It can be worded in two ways, which differ in the question and in every second sentence of the answer.
    """

    question: int
    sentences: tuple[int, ...]
    things: tuple[str, ...]

    def worded(self, way: int) -> tuple[str, str]:
        first, second, *others = self.things
        prompt = _QUESTIONS[2 * self.question + way].format(a=first, b=second)
        answer = [
            _SENTENCES[2 * sentence + way * (place % 2)].format(a=thing)
            for place, (sentence, thing) in enumerate(zip(self.sentences, others, strict=True))
        ]
        return prompt, " ".join(answer)


class _Writer:
    """Writes dialogs that differ from each other in what they are about."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw

    def content(self) -> _Content:
        draw = self._draw
        sentences = tuple(draw.sample(range(len(_SENTENCES) // 2), 4))
        return _Content(draw.randrange(len(_QUESTIONS) // 2), sentences, self._things(6))

    def _things(self, count: int) -> tuple[str, ...]:
        nouns = iter(self._draw.sample(_NOUNS, 2 * count))
        return tuple(f"{noun} of the {next(nouns)}" for noun in nouns)

    def problem_twice(self) -> list[tuple[str, str]]:
        """A problem, and the same problem with other numbers."""
        draw = self._draw
        problem, name, things = draw.choice(_PROBLEMS), draw.choice(_NAMES), self._things(3)
        setting = " ".join(_SENTENCES[2 * place].format(a=things[2]) for place in draw.sample(range(12), 2))
        return [
            (
                f"{setting} {problem.format(name=name, a=things[0], b=things[1], x=x, y=y, z=z)}",
                f"We have {x} times {y} and {z}, so the answer is {x * y - z}.",
            )
            for x, y, z in (draw.sample(range(2, 50), 3), draw.sample(range(50, 99), 3))
        ]

    def examination(self) -> str:
        a, b, c, d = self._draw.sample(_NOUNS, 4)
        return _EXAMINATION.format(a=a, b=b, c=c, d=d, x=self._draw.randrange(10_000))


def _respaced(dialog: tuple[str, str], draw: random.Random) -> tuple[str, str]:
    prompt, answer = dialog
    return draw.choice(
        [(prompt, answer), (prompt.lower(), f"{answer}\n"), (prompt, answer.replace(". ", ".  "))]
    )


def _edited(dialog: tuple[str, str], draw: random.Random) -> tuple[str, str]:
    """One or two words of the answer are misspelt or replaced, or a few are added at its end."""
    prompt, answer = dialog
    words = answer.split()
    for place in draw.sample(range(len(words)), draw.randint(1, 2)):
        words[place] = draw.choice([words[place][:-1] + "x", "really", words[place] + "s"])
    return prompt, " ".join([*words, *draw.choice([[], ["I", "hope", "this", "helps!"]])])


def write(planted: Planted, directory: Path) -> None:
    """Write `rows.jsonl` and `evaluation.jsonl`."""
    for name, rows in (("rows", planted.rows), ("evaluation", planted.evaluation)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


def settings(directory: Path, encoder: Path, *, clusters: int | None = None) -> dict[str, Any]:
    """A curation of the rows that `write` has written."""
    exam = {"name": "exam", "path": str(directory / "evaluation.jsonl"), "columns": ["question"]}
    return {
        "run": str(directory / "run"),
        "sources": [{"name": "planted", "path": str(directory / "rows.jsonl")}],
        "steps": [
            {"kind": "contamination", "evaluations": [exam]},
            {"kind": "exact_duplicates"},
            {"kind": "near_duplicates"},
            {
                "kind": "semantic_duplicates",
                "encoder": str(encoder),
                "batch_size": 32,
                "devices": ["cpu"],
                "clusters": clusters,
                "threshold": THRESHOLD,
            },
        ],
    }


@dataclass(frozen=True)
class Found:
    """What a step found. planted: the rows or pairs that it should find. right: of the dropped rows."""

    step: str
    planted: int
    found: int
    dropped: int
    right: int

    @property
    def precision(self) -> float:
        """The share of the dropped rows that are planted, of which the other row is kept."""
        return self.right / self.dropped if self.dropped else 1.0

    @property
    def recall(self) -> float:
        return self.found / self.planted


def found(planted: Planted, run: Path) -> list[Found]:
    """What each step of a finished run found. A pair is found if one of its rows is dropped for the other."""
    dropped = _dropped(run)
    partner = {a: b for pairs in planted.pairs.values() for pair in pairs for a, b in (pair, pair[::-1])}
    results = []
    for step, kind in STEPS.items():
        others = {row: other for row, (by, other) in dropped.items() if by == step}
        if kind == "contaminated":
            hits = len(others.keys() & set(planted.contaminated))
            results.append(Found(step, len(planted.contaminated), hits, len(others), hits))
            continue
        right = [row for row, other in others.items() if partner.get(row) == other]
        pairs = planted.pairs[kind]
        hits = sum(others.get(a) == b or others.get(b) == a for a, b in pairs)
        results.append(Found(step, len(pairs), hits, len(others), len(right)))
    return results


def lost_problems(planted: Planted, run: Path) -> int:
    """The number of problems that were dropped for the same problem with other numbers."""
    dropped = _dropped(run)
    pairs = [(a, b) for pair in planted.numbers for a, b in (pair, pair[::-1])]
    return sum(a in dropped and dropped[a][1] == b for a, b in pairs)


def _dropped(run: Path) -> dict[int, tuple[str, int | None]]:
    """For the index of each dropped row, the step and the index of the row that it duplicates, if any."""
    notes = {}
    for name in ("rows", "dropped"):
        with (run / f"{name}.jsonl").open(encoding="utf-8") as file:
            for line in file:
                note = json.loads(line)["curation"]
                notes[int(note["place"].rpartition(":")[2]) - 1] = note
    index = {note["id"]: row for row, note in notes.items()}
    found = {}
    for row, note in notes.items():
        if "dropped_by" in note:
            step = note["dropped_by"]["step"]
            fields = note["steps"][step]
            found[row] = (step, index.get(fields.get("duplicate_of") or fields.get("nearest")))
    return found


def split_pairs(planted: Planted, run: Path) -> int:
    """The number of paraphrases whose rows are in different clusters, where they are never compared."""
    cluster = _column(run, "semantic_duplicates", ["cluster"])["cluster"].to_pylist()
    return sum(cluster[a] != cluster[b] for a, b in planted.pairs["paraphrase"])


def _dropped_by(run: Path) -> dict[int, str]:
    """The step that drops each dropped row, by its index."""
    with (run / "dropped.jsonl").open(encoding="utf-8") as file:
        notes = [json.loads(line)["curation"] for line in file]
    return {int(note["place"].rpartition(":")[2]) - 1: note["dropped_by"]["step"] for note in notes}


def directly_selected(run: Path, *, threshold: float) -> tuple[list[bool], list[bool]]:
    """Which rows `semantic_duplicates` keeps, and which the definition keeps, one row at a time in float64.

    A row is kept if its cosine to each row of its cluster that was kept before is less than the threshold, or
    if the prompts of the two rows differ in numbers alone. Only rows that the step has seen are given.
    """
    result = _column(run, "semantic_duplicates", ["cluster", "dropped"])
    vectors = _column(run, "semantic_duplicates.vectors", ["vector", "prompt", "masked"])
    cluster = result["cluster"].to_numpy(zero_copy_only=False)
    unit = np.stack(vectors["vector"].to_pylist()).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    prompt, masked = (np.array(vectors[name].to_pylist(), np.uint64) for name in ("prompt", "masked"))
    rows = [row for row in range(len(cluster)) if not np.isnan(cluster[row])]
    kept = {int(name): np.empty(0, np.int64) for name in np.unique(cluster[rows])}
    expected = []
    for row in rows:
        others = kept[int(cluster[row])]
        is_other_problem = (masked[others] == masked[row]) & (prompt[others] != prompt[row])
        expected.append(bool(((unit[others] @ unit[row] < threshold) | is_other_problem).all()))
        if expected[-1]:
            kept[int(cluster[row])] = np.append(others, row)
    return [result["dropped"][row].as_py() is None for row in rows], expected


def _column(run: Path, name: str, fields: list[str]) -> pa.Table:
    # The newest one, because each run with other settings has left a column.
    directory = max((run / "columns").glob(f"{name}-*"), key=lambda path: path.stat().st_mtime_ns)
    parts = sorted(directory.glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(part, columns=fields) for part in parts])


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        encoder = unpack_encoder(directory / "encoder")
        if encoder is None:
            sys.exit(WHY_ABSENT)
        planted = plant(count)
        write(planted, directory)
        print(f"{'step':31} planted  found  recall  dropped  right  precision")
        for clusters in (None, 8):
            run_with(directory, encoder, clusters=clusters)
            for each in found(planted, directory / "run"):
                if clusters is None or each.step == "semantic_duplicates":
                    print(_line(each, clusters))
            lost = lost_problems(planted, directory / "run")
            print(f"problems dropped for other numbers: {lost} of {2 * len(planted.numbers):,}")
            apart, pairs = split_pairs(planted, directory / "run"), planted.pairs["paraphrase"]
            print(f"paraphrases in different clusters: {apart:,} of {len(pairs):,}")
            kept, expected = directly_selected(directory / "run", threshold=THRESHOLD)
            wrong = sum(map(ne, kept, expected))
            print(f"greedy selection: {wrong:,} of {len(kept):,} rows differ from the definition")


def run_with(directory: Path, encoder: Path, *, clusters: int | None) -> None:
    """Curate the rows that `write` has written."""
    path = directory / "curation.yaml"
    path.write_text(yaml.safe_dump(settings(directory, encoder, clusters=clusters)))
    curate(load_curation(str(path)), console=make_console(quiet=True))


def _line(each: Found, clusters: int | None) -> str:
    name = f"{each.step}, {clusters} clusters" if clusters else each.step
    counts = f"{each.planted:7,} {each.found:6,} {each.recall:7.3f} {each.dropped:8,} {each.right:6,}"
    return f"{name:31} {counts} {each.precision:10.3f}"


if __name__ == "__main__":
    main()
