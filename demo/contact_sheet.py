"""Pictures with lines of text under them on one sheet, for looking at data and for the README.

`python -m demo.contact_sheet DEMO_DIR SHEET.png` shows the first pictures of a split with a caption and all questions;
with `--submission submit_….json` the pictures and what a model said of them. Of a demo that is a table (see
`demo.table`) it shows pictures at equal distances.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from demo.table import TABLE

_MARGIN = 12  # pixels, as everything here
_FONT_SIZE = 13


def contact_sheet(
    pictures: Sequence[tuple[str | os.PathLike[str], Sequence[str]]], columns: int = 4, width: int = 256
) -> Image.Image:
    """Draws pictures, each with its lines of text below, row by row.

    Args:
        pictures: (file, lines); lines that are too long are wrapped.
        width: of a picture on the sheet, in pixels; small ones are enlarged without smoothing.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    images, texts = [], []
    for path, lines in pictures:
        with Image.open(path) as opened:
            images.append(_fit(opened.convert("RGB"), width))
        texts.append("\n".join(_wrap(line, font, width) for line in lines))
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    heights = [
        image.height + 2 * _MARGIN + int(ruler.multiline_textbbox((0, 0), text, font)[3])
        for image, text in zip(images, texts, strict=True)
    ]
    row_heights = [max(heights[start : start + columns]) for start in range(0, len(heights), columns)]
    sheet = Image.new("RGB", (columns * (width + _MARGIN) + _MARGIN, sum(row_heights) + _MARGIN), "white")
    pencil = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        row, column = divmod(i, columns)
        x, y = _MARGIN + column * (width + _MARGIN), _MARGIN + sum(row_heights[:row])
        sheet.paste(image, (x, y))
        pencil.multiline_text((x, y + image.height + _MARGIN // 2), text, "black", font)
    return sheet


def _fit(image: Image.Image, width: int) -> Image.Image:
    method = Image.Resampling.NEAREST if image.width < width else Image.Resampling.BICUBIC
    return image.resize((width, width * image.height // image.width), method)


def _wrap(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    rows = [""]
    for word in line.split():
        longer = f"{rows[-1]} {word}".strip()
        if rows[-1] and font.getlength(longer) > width:
            rows.append(word)
        else:
            rows[-1] = longer
    return "\n".join(rows)


def describe_demo(demo: Path, subset: str, count: int) -> list[tuple[Path, list[str]]]:
    """The first pictures of "train2014" or "val2014" with their first caption and all questions and answers."""
    images = json.loads((demo / "dataset_coco.json").read_text(encoding="utf-8"))["images"]
    questions = json.loads((demo / f"vqa/v2_OpenEnded_mscoco_{subset}_questions.json").read_text(encoding="utf-8"))
    annotations = json.loads((demo / f"vqa/v2_mscoco_{subset}_annotations.json").read_text(encoding="utf-8"))
    answers = {row["question_id"]: row["multiple_choice_answer"] for row in annotations["annotations"]}
    described = []
    for image in [image for image in images if image["filepath"] == subset][:count]:
        asked = [row for row in questions["questions"] if row["image_id"] == image["cocoid"]]
        lines = [image["sentences"][0]["raw"], *(f"{row['question']} {answers[row['question_id']]}" for row in asked)]
        described.append((demo / subset / image["filename"], lines))
    return described


def describe_table(demo: Path, count: int) -> list[tuple[Path, list[str]]]:
    """So many pictures of the table, at equal distances, with all questions and answers."""
    lines: dict[str, list[str]] = {}
    with open(demo / TABLE, encoding="utf-8", newline="") as table:
        for row in csv.DictReader(table):
            lines.setdefault(row["image"], []).append(f"{row['question']} {row['answer']}")
    pictures = list(lines)
    return [(demo / name, lines[name]) for name in pictures[:: max(1, len(pictures) // count)][:count]]


def describe_submission(demo: Path, submission: Path, count: int) -> list[tuple[Path, list[str]]]:
    """The first test pictures with the captions, or the questions and answers, of a file that prediction.sh wrote.

    Wrong answers are marked. Captions are of val2014 pictures (Karpathy's test split), answers of test2015.
    """
    said = json.loads(submission.read_text(encoding="utf-8"))
    if "caption" in said[0]:
        return [
            (demo / "val2014" / f"COCO_val2014_{entry['image_id']:012d}.jpg", [entry["caption"]])
            for entry in said[:count]
        ]
    questions = json.loads((demo / "vqa/v2_OpenEnded_mscoco_test2015_questions.json").read_text(encoding="utf-8"))
    annotations = json.loads((demo / "vqa/v2_mscoco_test2015_annotations.json").read_text(encoding="utf-8"))
    answers = {entry["question_id"]: entry["answer"] for entry in said}
    truths = {row["question_id"]: row["multiple_choice_answer"] for row in annotations["annotations"]}
    lines: dict[int, list[str]] = {}
    for row in questions["questions"]:
        answer, truth = answers[row["question_id"]], truths[row["question_id"]]
        marked = answer if answer == truth else f"{answer} (wrong: {truth})"
        lines.setdefault(row["image_id"], []).append(f"{row['question']} {marked}")
    return [
        (demo / "test2015" / f"COCO_test2015_{image:012d}.jpg", asked) for image, asked in list(lines.items())[:count]
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.contact_sheet", description=__doc__.splitlines()[0])
    parser.add_argument("demo_dir", type=Path, help="a folder made by demo.make")
    parser.add_argument("sheet", type=Path, help="the picture to write, .png or .jpg")
    parser.add_argument("--subset", choices=("train2014", "val2014"), default="val2014", help="(%(default)s)")
    parser.add_argument("--count", type=int, default=8, help="pictures on the sheet (%(default)s)")
    parser.add_argument("--submission", type=Path, help="show what a model said, instead of the truth")
    given = parser.parse_args(arguments)
    if given.submission:
        described = describe_submission(given.demo_dir, given.submission, given.count)
    elif (given.demo_dir / TABLE).is_file():
        described = describe_table(given.demo_dir, given.count)
    else:
        described = describe_demo(given.demo_dir, given.subset, given.count)
    contact_sheet(described).save(given.sheet, optimize=True)


if __name__ == "__main__":
    main()
