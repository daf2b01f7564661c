"""The demo of own data: names, table and balance as promised, answers true of the pixels, the same bytes each time."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from beit3.system.errors import InputError
from demo.contact_sheet import describe_table
from demo.make import Settings, main, plan_pictures
from demo.table import make_table

ROOT = Path(__file__).parent.parent
PIXELS = 3  # per unit of the drawing, 64 x 48 units

SKIES = {"day": (80, 165, 245), "evening": (170, 110, 190), "night": (8, 10, 40)}
GROUNDS = {"spring": (150, 215, 110), "summer": (75, 150, 60), "autumn": (190, 140, 70), "winter": (205, 220, 240)}
VIEWS = {"mountains": (95, 100, 115), "sea": (25, 120, 175), "forest": (10, 70, 50)}
COLORS = {
    "red": (205, 30, 35),
    "yellow": (245, 205, 40),
    "green": (20, 130, 60),
    "blue": (35, 75, 215),
    "white": (250, 250, 250),
    "purple": (130, 45, 165),
}
ANIMALS = {
    "pig": (250, 150, 170),
    "duck": (245, 210, 20),
    "cat": (15, 15, 20),
    "fox": (240, 115, 25),
    "elephant": (125, 140, 165),
}
FLYERS = {"balloon": (225, 25, 40), "plane": (250, 250, 252), "kite": (250, 165, 20), "ufo": (45, 220, 70)}
ROOF, WOOD = (225, 100, 50), (110, 70, 40)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return make_table(tmp_path_factory.mktemp("made") / "table")


@pytest.fixture(scope="module")
def rows(demo) -> list[dict[str, str]]:
    with open(demo / "vqa.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def _digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# What is to be seen, found out from the pixels


def _distance(pixels: np.ndarray, color: Sequence[int]) -> np.ndarray:
    return np.abs(pixels.astype(int) - color).sum(axis=-1)


def _nearest(pixels: np.ndarray, colors: Mapping[str, tuple[int, ...]]) -> str:
    color = np.median(pixels.reshape(-1, 3), axis=0)
    return min(colors, key=lambda name: _distance(color, colors[name]))


def _most(pixels: np.ndarray, colors: Mapping[str, tuple[int, ...]]) -> str:
    """Of which colour there are most pixels."""
    return max(colors, key=lambda name: int((_distance(pixels, colors[name]) < 30).sum()))


def _see(path: Path) -> dict[str, str]:
    """What is asked → the answer. Places are in units of the drawing, those where a thing is wherever it may be put."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape == (48 * PIXELS, 64 * PIXELS, 3)

    def part(left: float, top: float, right: float, bottom: float) -> np.ndarray:
        return pixels[round(top * PIXELS) : round(bottom * PIXELS), round(left * PIXELS) : round(right * PIXELS)]

    sides = [part(10, 41.3, 11, 42.3), part(54, 41.3, 55, 42.3)]  # on one of them the car
    ground = np.median(part(0, 47.7, 64, 48).reshape(-1, 3), axis=0)
    car = max(sides, key=lambda side: _distance(np.median(side.reshape(-1, 3), axis=0), tuple(ground)))
    roof_top = np.argmax(_distance(part(30, 0, 31, 48).mean(axis=1), ROOF) < 60) / PIXELS
    outer = [part(0, 24, 17, 29), part(47, 24, 64, 29)]  # beside the house
    corners = [part(0, 0, 18, 12), part(46, 0, 64, 12)]
    return {
        "time": _nearest(part(30, 0, 34, 1), SKIES),
        "season": _nearest(part(0, 47.7, 64, 48), GROUNDS),
        "behind": _most(np.concatenate(outer, axis=1), VIEWS),
        "floors": str(round((28 - roof_top) / 8)),  # the roof of one floor begins 20 units from above
        "walls": _nearest(part(25, 26.4, 39, 27.6), COLORS),
        "car": _nearest(car, COLORS),
        "animal": _nearest(part(30.5, 40, 32.5, 42), ANIMALS),
        "flyer": _most(np.concatenate(corners, axis=1), FLYERS),
        "fence": "yes" if _distance(np.median(part(0, 32.3, 3, 32.9).reshape(-1, 3), axis=0), WOOD) < 45 else "no",
    }


ASKED = {
    "time": r"day, evening or night|time of day",
    "season": "season",
    "behind": "behind the house",
    "floors": "How many floors",
    "walls": r"(color).*house",
    "car": r"(color).*car",
    "animal": "animal",
    "flyer": r"fl(ying|ies)",
    "fence": "fence",
}


def _kind(question: str) -> str:
    (kind,) = [kind for kind, pattern in ASKED.items() if re.search(pattern, question)]
    return kind


def test_every_answer_is_true_of_the_pixels(demo, rows):
    seen = {name: _see(demo / name) for name in {row["image"] for row in rows}}
    wrong = [row for row in rows if seen[row["image"]][_kind(row["question"])] != row["answer"]]
    assert wrong == []


# Counts and balance


def test_there_are_300_pictures_900_questions_and_30_answers(demo, rows):
    assert len(rows) == 900 and list(rows[0]) == ["image", "question", "answer"]
    assert set(Counter(row["image"] for row in rows).values()) == {3}
    assert len({row["image"] for row in rows}) == 300
    assert len({row["answer"] for row in rows}) == 30
    assert len({(row["image"], _kind(row["question"])) for row in rows}) == 900  # nothing is asked twice of a picture
    assert len(set(_digests(demo).values())) == 303  # no two pictures are equal


def test_answers_are_balanced(rows):
    of_kind: dict[str, Counter[str]] = defaultdict(Counter)
    of_text: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        of_kind[_kind(row["question"])][row["answer"]] += 1
        of_text[row["question"]][row["answer"]] += 1
    assert set(of_kind) == set(ASKED) and len(of_text) == 18
    for counts in of_kind.values():
        assert abs(counts.total() - 100) <= 1
        assert min(counts.values()) > 0.7 * max(counts.values())
    assert min(Counter(row["answer"] for row in rows).values()) >= 15
    assert all(max(counts.values()) < 0.6 * counts.total() for counts in of_text.values())


def test_who_never_looks_is_right_in_less_than_a_third(rows):
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        answers[row["question"]][row["answer"]] += 1
    assert sum(max(counts.values()) for counts in answers.values()) / len(rows) < 1 / 3


def test_no_answer_depends_on_left_and_right(rows):
    """Training mirrors pictures and leaves their answers as they are."""
    for row in rows:
        assert not re.search(r"\b(left|right|side)\b", f"{row['question']} {row['answer']}")


def test_its_questions_are_not_those_of_the_other_demo(rows):
    other = {question.text for picture in plan_pictures(Settings()) for question in picture.questions}
    assert not {row["question"] for row in rows} & other


# Names and the file


def test_names_are_nested_in_several_scripts_and_good_on_every_system(rows):
    names = {PurePosixPath(row["image"]) for row in rows}
    assert {len(name.parts) for name in names} == {2, 3, 4}
    assert {name.suffix for name in names} == {".jpg", ".jpeg", ".JPG"}
    assert len({str(name).casefold() for name in names}) == 300
    letters = {unicodedata.name(letter).split()[0] for name in names for letter in str(name) if letter.isalpha()}
    assert letters == {"LATIN", "CYRILLIC", "CJK"}
    assert any(" " in str(name) for name in names) and any("," in str(name) for name in names)
    for name in names:
        assert unicodedata.is_normalized("NFC", str(name)) and len(str(name).encode()) < 120
        for part in name.parts:
            assert not set(part) & set('<>:"|?*\\') and part == part.strip(" .") and part.isprintable()


def test_the_file_is_as_rfc_4180_wants_it(demo, rows):
    content = (demo / "vqa.csv").read_bytes()
    assert content.startswith(b"image,question,answer\r\n") and content.endswith(b"\r\n")
    assert content.count(b"\n") == content.count(b"\r\n") == 901
    quoted = '"фото/дача, лето/снимок 250.jpg"'
    assert quoted in content.decode("utf-8")
    assert '"Is it day, evening or night?"' in content.decode("utf-8")
    assert "Bilder/Küche/böses Bild 017.jpg" in {row["image"] for row in rows}


def test_the_tokenizer_knows_every_text(demo, rows):
    model = sentencepiece.SentencePieceProcessor(model_file=str(demo / "demo.spm"))
    assert [model.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    for text in {row["question"] for row in rows} | {"Why isn't ZEBRA 42 jumping?!"}:
        ids = model.encode(text)
        assert 0 not in ids and model.decode(ids) == text
    assert max(len(model.encode(row["question"])) for row in rows) <= 10  # 12 with <s> and </s>
    assert model.get_piece_size() <= 300


# Making it


def test_the_command_line_makes_the_same_bytes_in_another_process(demo, tmp_path):
    command = [sys.executable, "-m", "demo.make", "--table", str(tmp_path / "new" / "again")]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONUTF8": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == f"The demo is in {tmp_path / 'new' / 'again'}\n"
    assert _digests(tmp_path / "new" / "again") == _digests(demo)
    assert (demo / "demo.json").read_text() == json.dumps({"made_by": "demo.make --table", "version": 1, "seed": 0})


def test_another_seed_makes_other_pictures_under_the_same_names(demo, tmp_path):
    mine, other = _digests(demo), _digests(make_table(tmp_path / "other", seed=1))
    assert mine.keys() == other.keys()
    assert [name for name in mine if mine[name] == other[name]] == ["demo.spm"]  # the texts are the same ones


def test_making_it_again_changes_nothing_and_something_else_is_kept(demo, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in [demo, *demo.rglob("*")]}
    assert make_table(demo) == demo
    with pytest.raises(InputError, match=r"holds a demo with other settings, .*'seed': 0"):
        make_table(demo, seed=1)
    assert {path: path.stat().st_mtime_ns for path in [demo, *demo.rglob("*")]} == before
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something that is no demo"):
        make_table(tmp_path)
    assert os.listdir(tmp_path) == ["mine.txt"]


@pytest.mark.parametrize("flag", [["--train", "20"], ["--val", "20"], ["--test", "20"], ["--blind"]])
def test_flags_of_the_other_demo_are_refused_with_it(tmp_path, capfd, flag):
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "demo"), "--table", *flag])
    assert caught.value.code == 2 and "leave out --train" in capfd.readouterr().err
    assert os.listdir(tmp_path) == []


def test_pictures_for_a_contact_sheet_come_from_everywhere(demo, rows):
    described = describe_table(demo, 6)
    assert [str(path.relative_to(demo)) for path, _ in described] == [rows[3 * 50 * i]["image"] for i in range(6)]
    assert described[0][1] == [f"{row['question']} {row['answer']}" for row in rows[:3]]
