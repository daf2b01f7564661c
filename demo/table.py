"""Pictures and a table of questions, as people bring them: `python -m demo.make --table OUT_DIR`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from demo.village import ANIMALS, COLORS, FLOORS, FLYERS, SEASONS, SKIES, VIEWS, Scene

PICTURES = 300
QUESTIONS_PER_PICTURE = 3

WORDINGS = {
    "time": ("Is it day, evening or night?", "What time of day is it?"),
    "season": ("Which season is it?", "What season does the picture show?"),
    "behind": ("What is behind the house?", "What do you see behind the house?"),
    "floors": ("How many floors does the house have?", "How many floors has this house?"),
    "color": ("What color are the walls of the house?", "In which color is the house painted?"),
    "car": ("What color is the car?", "Which color was chosen for the car?"),
    "animal": ("Which animal is there?", "What animal do you see?"),
    "flyer": ("What is flying in the sky?", "What flies up there?"),
    "fence": ("Is there a fence?", "Does the house have a fence?"),
}
VALUES = {
    "time": tuple(SKIES), "season": tuple(SEASONS), "behind": tuple(VIEWS), "floors": FLOORS, "color": tuple(COLORS),
    "car": tuple(COLORS), "animal": tuple(ANIMALS), "flyer": tuple(FLYERS), "fence": (True, False),
}

@dataclass(frozen=True)
class Picture:
    name: str
    scene: Scene
    questions: tuple[tuple[str, str], ...]


def answer(scene: Scene, kind: str) -> str:
    value = getattr(scene, kind)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def plan(seed: int) -> list[Picture]:
    rng = random.Random(f"table {seed}")
    columns = {}
    for kind, values in VALUES.items():
        column = [values[i % len(values)] for i in range(PICTURES)]
        rng.shuffle(column)
        columns[kind] = column
    asked = Counter()
    told = Counter()
    worded = Counter()
    out = []
    for i in range(PICTURES):
        scene = Scene(**{k: c[i] for k, c in columns.items()})
        kinds = list(WORDINGS)
        rng.shuffle(kinds)
        kinds = sorted(kinds, key=lambda k: (asked[k], told[k, answer(scene, k)]))[:3]
        qs = []
        for k in kinds:
            asked[k] += 1
            told[k, answer(scene, k)] += 1
            text = min(WORDINGS[k], key=lambda t: worded[t, answer(scene, k)])
            worded[text, answer(scene, k)] += 1
            qs.append((text, answer(scene, k)))
        rng.shuffle(qs)
        out.append(Picture(f"{i:03d}.jpg", scene, tuple(qs)))
    return out
