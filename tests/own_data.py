"""Made pictures and tables of own data, for tests."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from PIL import Image

from tests import reference

SPM = reference.MINI_COCO / "mini.spm"
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def make_picture(path: Path, colour: str = "red", shade: int = 0) -> None:
    """shade: makes pictures of one colour different from one another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), tuple(value + shade for value in COLOURS[colour])).save(path)


def write_csv(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def album(folder: Path, pictures: int = 30) -> Path:
    """So many pictures in nested folders of unicode names; `vqa.csv` asks two questions of each, `captions.csv` has
    one caption of each. Returns the folder of the pictures."""
    photos, questions, captions = folder / "Fotos", [], []
    for number in range(pictures):
        colour = list(COLOURS)[number % 3]
        name = f"{('Küche', '写真/a b')[number % 2]}/Bild {number}.png"
        make_picture(photos / name, colour, number // 3)
        questions += [[name, "What color is it?", colour], [name, "Is it red?", "yes" if colour == "red" else "no"]]
        captions.append([name, f"A {colour} wall."])
    write_csv(folder / "vqa.csv", ["image", "question", "answer"], questions)
    write_csv(folder / "captions.csv", ["image", "caption"], captions)
    return photos
