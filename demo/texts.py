"""What is asked and said about the demo's pictures."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from demo.scenes import CELLS, COLORS, MAX_THINGS, SHAPES, Scene, Thing

# Kind of question → (wording, question_type as in VQA v2: the words it begins with).
WORDINGS = {
    "color": (
        ("What color is the {}?", "what color is the"),
        ("What is the color of the {}?", "what is the color of the"),
        ("Which color does the {} have?", "which"),
    ),
    "shape": (
        ("What shape is {}?", "what"),
        ("Which shape is {}?", "which"),
        ("What is the shape of the {} thing?", "what is the"),
    ),
    "count": (
        ("How many shapes are there?", "how many"),
        ("How many shapes are in the picture?", "how many"),
        ("How many shapes do you see?", "how many"),
    ),
    "count kind": (
        ("How many {} are there?", "how many"),
        ("How many {} are in the picture?", "how many"),
        ("How many {} do you see?", "how many"),
    ),
    "exists": (
        ("Is there a {}?", "is there a"),
        ("Is there a {} in the picture?", "is there a"),
        ("Do you see a {}?", "do you"),
    ),
}
NUMBERS = tuple(str(number) for number in range(1, MAX_THINGS + 1))
ANSWERS = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "count": NUMBERS,
    "count kind": NUMBERS,
    "exists": ("yes", "no"),
}  # the answers that make sense to each kind of question; 12 in all
ANSWER_TYPES = {"color": "other", "shape": "other", "count": "number", "count kind": "number", "exists": "yes/no"}
_NUMBER_WORDS = ("no", "one", "two", "three")


@dataclass(frozen=True)
class Question:
    """A question about a picture with what everybody (or nearly) answers."""

    kind: str
    text: str
    type: str
    answer: str


class Questioner:
    """Asks about picture after picture so that the question alone tells as little as possible of its answer.

    It remembers how often each answer was right for each question and prefers those that were right less often.
    """

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.seen: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)  # (kind, subject) → answers

    def ask(self, scene: Scene) -> list[Question]:
        """Four or five different questions about a scene, in random order."""
        asked: dict[tuple[str, str], str] = {}
        wanted = ["color", "shape", "count", "exists"]
        if self.rng.random() < 0.5:
            wanted.append("count kind")
        for kind in wanted:
            choice = self._choose(kind, scene, asked)
            if choice is None:  # not one thing of that kind is alone, or the answer would be too easy to guess
                kind, choice = "exists", self._choose("exists", scene, asked)
            assert choice is not None, "there is always a thing to ask for"
            subject, answer = choice
            asked[kind, subject] = answer
            self.seen[kind, subject][answer] += 1
        questions = [self._word(kind, subject, answer) for (kind, subject), answer in asked.items()]
        self.rng.shuffle(questions)
        return questions

    def _choose(self, kind: str, scene: Scene, asked: dict[tuple[str, str], str]) -> tuple[str, str] | None:
        """(subject, answer) of the question of this kind whose answer is the least expected; None if there is none."""
        candidates = [choice for choice in _CANDIDATES[kind](scene) if (kind, choice[0]) not in asked]
        if kind == "exists":  # first the answer, then the subject: absent things are many, present ones few
            wanted = self.rng.choice(("yes", "no"))
            candidates = [choice for choice in candidates if choice[1] == wanted] or candidates
        if kind == "count kind":  # most kinds are there once
            candidates = [choice for choice in candidates if self._surplus(kind, *choice) < 3]
        if not candidates:
            return None
        self.rng.shuffle(candidates)
        return min(candidates, key=lambda choice: self._surplus(kind, *choice))

    def _surplus(self, kind: str, subject: str, answer: str) -> int:
        """How much more often this answer was right than the rarest other one."""
        seen = self.seen[kind, subject]
        others = [other for other in ANSWERS[kind] if other != answer]
        if kind == "count kind":
            others = [other for other in others if other != "3"]  # too rare to wait for
        return seen[answer] - min(seen[other] for other in others)

    def _word(self, kind: str, subject: str, answer: str) -> Question:
        wording, question_type = self.rng.choice(WORDINGS[kind])
        return Question(kind, wording.format(subject), question_type, answer)


def _lone_shapes(scene: Scene) -> list[tuple[str, str]]:
    """(shape, its colour) of each shape that is there once."""
    counts = Counter(thing.shape for thing in scene)
    return [(thing.shape, thing.color) for thing in scene if counts[thing.shape] == 1]


def _lone_colors(scene: Scene) -> list[tuple[str, str]]:
    """(colour, its shape) of each colour that is there once."""
    counts = Counter(thing.color for thing in scene)
    return [(thing.color, thing.shape) for thing in scene if counts[thing.color] == 1]


def _kinds(scene: Scene) -> list[tuple[str, str]]:
    """(kind in the plural, how many) of each shape and each colour that is there."""
    counts = Counter(f"{thing.shape}s" for thing in scene) + Counter(f"{thing.color} shapes" for thing in scene)
    return [(kind, str(count)) for kind, count in counts.items()]


def _present_and_missing(scene: Scene) -> list[tuple[str, str]]:
    """(colour and shape, yes or no): what is there, and what is not though its colour or its shape is."""
    present = {(thing.color, thing.shape) for thing in scene}
    colors, shapes = {thing.color for thing in scene}, {thing.shape for thing in scene}
    return [
        (f"{color} {shape}", "yes" if (color, shape) in present else "no")
        for color in COLORS
        for shape in SHAPES
        if color in colors or shape in shapes
    ]


_CANDIDATES: dict[str, Callable[[Scene], list[tuple[str, str]]]] = {  # scene → (subject, answer)
    "color": _lone_shapes,
    "shape": _lone_colors,
    "count": lambda scene: [("shapes", str(len(scene)))],
    "count kind": _kinds,
    "exists": _present_and_missing,
}


def ten_answers(question: Question, rng: random.Random) -> list[dict[str, object]]:
    """What ten people answer, as in VQA v2: all the same, or (one question in ten) one of them something else."""
    answers = [question.answer] * 10
    confidences = ["yes"] * 10
    if rng.random() < 0.1:
        odd = rng.randrange(10)
        answers[odd] = rng.choice([other for other in ANSWERS[question.kind] if other != question.answer])
        confidences[odd] = "maybe"
    return [
        {"answer": answer, "answer_confidence": confidence, "answer_id": i}
        for i, (answer, confidence) in enumerate(zip(answers, confidences, strict=True), 1)
    ]


def captions(scene: Scene, shade: str, rng: random.Random) -> list[str]:
    """Five different descriptions of a scene on a background of that shade ("black" or "dark blue")."""
    with_places = [f"{_a(thing)} {_place(thing, rng)}" for thing in scene]
    backwards = [f"{_a(thing)} {_place(thing, rng)}" for thing in reversed(scene)]
    things = _list(_grouped(scene))
    return [
        _sentence(_list(with_places)),
        _sentence(f"{rng.choice(('a picture of', 'a drawing with'))} {things}"),
        _sentence(f"there is {_list(backwards)}"),
        _sentence(f"{things} on a {shade} background"),
        _relation(scene, rng),
    ]


def tokens(caption: str) -> list[str]:
    """Lower-case words without punctuation, as in Karpathy's files."""
    return "".join(letter for letter in caption.lower() if letter.isalnum() or letter == " ").split()


def _relation(scene: Scene, rng: random.Random) -> str:
    """Where two of the things stand to each other, or what the only one is like."""
    if len(scene) == 1:
        thing = scene[0]
        return _sentence(f"the {thing.shape} {_place(thing, rng)} is {thing.color}")
    one, other = rng.sample(scene, 2)
    (row, column), (other_row, other_column) = divmod(one.cell, 2), divmod(other.cell, 2)
    words = []
    if row != other_row:
        words.append("above" if row < other_row else "below")
    if column != other_column:
        words.append("to the left of" if column < other_column else "to the right of")
    where = " and ".join(words)
    looks = Counter((thing.color, thing.shape) for thing in scene)
    first, second = (
        f"{'the' if looks[thing.color, thing.shape] == 1 else 'a'} {thing.color} {thing.shape}"
        for thing in (one, other)
    )
    if (one.color, one.shape) == (other.color, other.shape):
        first, second = f"one {one.color} {one.shape}", "the other" if looks[one.color, one.shape] == 2 else "another"
    return _sentence(f"{first} is {where} {second}")


def _grouped(scene: Scene) -> list[str]:
    """Things that look the same together: "two red circles", "a blue square"."""
    counts = Counter((thing.color, thing.shape) for thing in scene)
    return [
        f"a {color} {shape}" if count == 1 else f"{_NUMBER_WORDS[count]} {color} {shape}s"
        for (color, shape), count in counts.items()
    ]


def _a(thing: Thing) -> str:
    return f"a {thing.color} {thing.shape}"


def _place(thing: Thing, rng: random.Random) -> str:
    return rng.choice(("at the {}", "in the {} corner")).format(CELLS[thing.cell])


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
