"""Pictures and a table of questions, as people bring them: `python -m demo.make --table OUT_DIR`.

OUT_DIR then holds

    Bilder/ Photos/ 写真/ …     300 pictures of 192 x 144 pixels in folders of several depths, named in three scripts
    vqa.csv                     900 questions with the columns image, question and answer; 30 different answers
    demo.spm                    a SentencePiece model trained on the questions, in XLM-RoBERTa's order of pieces
    demo.json                   how it was made

Nothing that is asked depends on left and right: pictures are mirrored in training, their answers are not.
"""

from __future__ import annotations

import csv
import os
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.making import make_folder, train_tokenizer
from demo.village import ANIMALS, COLORS, FLOORS, FLYERS, SEASONS, SKIES, VIEWS, Scene, draw

VERSION = 1  # of what is made from the same seed; raise it with every change of the bytes
PICTURES = 300
QUESTIONS_PER_PICTURE = 3
TABLE = "vqa.csv"

# Field of a scene → its values.
VALUES: dict[str, tuple[Any, ...]] = {
    "time": tuple(SKIES),
    "season": tuple(SEASONS),
    "behind": tuple(VIEWS),
    "floors": FLOORS,
    "color": tuple(COLORS),
    "car": tuple(COLORS),
    "animal": tuple(ANIMALS),
    "flyer": tuple(FLYERS),
    "fence": (True, False),
}
# Field of a scene → how one asks for it.
WORDINGS = {
    "time": ("Is it day, evening or night?", "What time of day is it?"),
    "season": ("Which season is it?", "What season does the picture show?"),
    "behind": ("What is behind the house?", "What do you see behind the house?"),
    "floors": ("How many floors does the house have?", "How many floors high is the house?"),
    "color": ("What color are the walls of the house?", "In which color is the house painted?"),
    "car": ("What color is the car?", "Which color does the car have?"),
    "animal": ("Which animal is there?", "What animal do you see?"),
    "flyer": ("What is flying in the sky?", "What flies up there?"),
    "fence": ("Is there a fence?", "Does the house have a fence?"),
}
# Folder → how its pictures are called, by number. Letters with accents are one character each, as keyboards make them.
_NAMES = {
    "Bilder/Küche": "böses Bild {:03d}.jpg",
    "Bilder/Ausflüge/Öland 2023": "Häuschen_{:03d}.jpg",
    "Photos/Été à la campagne": "maison n° {:03d}.jpeg",
    "Photos": "IMG_{:03d}.JPG",
    "写真/村": "家{:03d}.jpg",
    "фото/дача, лето": "снимок {:03d}.jpg",
}


@dataclass(frozen=True)
class Picture:
    """One picture of the plan: its name, with "/" between folders, and (question, answer) of all that is asked."""

    name: str
    scene: Scene
    questions: list[tuple[str, str]]


def make_table(out: str | os.PathLike[str], seed: int = 0) -> Path:
    """Makes pictures, table and tokenizer in the folder `out`, see `make_folder`; another seed, other pictures."""
    marker = {"made_by": "demo.make --table", "version": VERSION, "seed": seed}
    return make_folder(out, marker, lambda folder: _write(folder, seed))


def plan(seed: int) -> list[Picture]:
    """All pictures with what they show and what is asked about them; nothing is drawn yet.

    Each value of a field is shown equally often, each field asked for equally often, each of its answers too, within
    what the pictures allow: a question alone tells as little as possible of its answer.
    """
    rng = random.Random(f"table {seed}")
    scenes = _scenes(rng)
    used: Counter[tuple[str, ...]] = Counter()
    pictures = []
    for number, scene in enumerate(scenes):
        fields = rng.sample(list(WORDINGS), len(WORDINGS))
        fields.sort(key=lambda field: (len(VALUES[field]) * used[field, answer(scene, field)], used[(field,)]))
        questions = []
        for field in fields[:QUESTIONS_PER_PICTURE]:
            said = answer(scene, field)
            text = min(WORDINGS[field], key=lambda text: used[text, said])
            used.update([(field,), (field, said), (text, said)])
            questions.append((text, said))
        rng.shuffle(questions)
        pictures.append(Picture(_name(number), scene, questions))
    return pictures


def answer(scene: Scene, field: str) -> str:
    value = getattr(scene, field)
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _scenes(rng: random.Random) -> list[Scene]:
    columns = {field: [values[i % len(values)] for i in range(PICTURES)] for field, values in VALUES.items()}
    for column in columns.values():
        rng.shuffle(column)
    return [Scene(**{field: column[i] for field, column in columns.items()}) for i in range(PICTURES)]


def _name(number: int) -> str:
    folder, name = list(_NAMES.items())[number * len(_NAMES) // PICTURES]
    return f"{folder}/{name.format(number)}"


def _write(folder: Path, seed: int) -> None:
    pictures = plan(seed)
    for picture in pictures:
        file = folder / picture.name
        file.parent.mkdir(parents=True, exist_ok=True)
        draw(picture.scene, random.Random(f"picture {seed} {picture.name}")).save(file, "JPEG", quality=92)
    with open(folder / TABLE, "w", encoding="utf-8", newline="") as lines:
        table = csv.writer(lines)  # as RFC 4180 wants it: commas, quotation marks where needed, CR LF
        table.writerow(("image", "question", "answer"))
        table.writerows((picture.name, *question) for picture in pictures for question in picture.questions)
    texts = dict.fromkeys(text for wordings in WORDINGS.values() for text in wordings)
    (folder / "demo.spm").write_bytes(train_tokenizer(texts))
