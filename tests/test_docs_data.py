"""The examples of docs/DATA.md are what the program reads: tables, published formats, and an index made by hand."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from beit3.data.tokenizer import Tokenizer
from datasets import CaptionDataset, VQADataset
from runs.command_line import read_settings
from sources.columns import NAMES
from sources.opening import open_source, sources_here
from sources.rows import SPLIT_OF, Reading, Row
from tasks.base import make_task
from tasks.make_index import main as make_index
from tasks.own_data import main as own_data
from tasks.recipe_by_size import plan
from tests.own_data import SPM, lines, make_picture
from tests.test_docs import ROOT, fences

PAGE = (ROOT / "docs" / "DATA.md").read_text(encoding="utf-8")
# Name of a file, which the paragraph before it says last → the content of its block.
BLOCK = re.compile(r"\n\n(?P<before>[^\n].*?)\n\n```(?:csv|jsonl?)\n(?P<content>.*?)```", re.DOTALL)
NAME = re.compile(r"`([\w.]+\.(?:csv|jsonl?))`")
EXAMPLES = {NAME.findall(each["before"])[-1]: each["content"] for each in BLOCK.finditer(PAGE)}
DOOR, WINDOWS, FARBE, GATE = (
    "What colour is the door?",
    "How many windows are there?",
    "Welche Farbe hat die Tür?",
    "Is the gate open?",
)


def read(folder: Path, name: str) -> tuple[str, list[Row], Reading]:
    for each, content in EXAMPLES.items():
        (folder / each).write_text(content, encoding="utf-8")
    reading = Reading()
    source = open_source(str(folder / name))
    rows = list(source.rows(reading))
    reading.findings.raise_any()
    return source.kind, rows, reading


def test_the_tables_say_what_the_page_says(tmp_path):
    votes = [{"red": 2, "dark red": 1}, {"3": 1}, {"grün": 1, "blau": 1}]
    images = ["garten/01.jpg", "garten/02.jpg", "haus.jpg", "hof.jpg"]
    for name, splits, last in (
        ("vqa.csv", ["train"] * 3 + ["val"], {"yes": 1}),
        ("vqa.jsonl", [None] * 3 + ["test"], None),
    ):
        rows = read(tmp_path, name)[1][:4]
        assert [row.image for row in rows] == images
        assert [row.question for row in rows] == [DOOR, WINDOWS, FARBE, GATE]
        assert [row.answers for row in rows] == [*votes, last]
        assert [row.question_id for row in rows] == [11, 12, 13, 14]
        assert [row.weight for row in rows] == [1, 2.5, 1, 1]
        assert [row.split for row in rows] == splits
    _, rows, _ = read(tmp_path, "captions.csv")
    assert [(row.image, row.captions, row.split) for row in rows[2:]] == [
        ("haus.jpg", ("Ein Haus mit grüner Tür.",), "train"),
        ("hof.jpg", ("A yard with an open gate.",), "val"),
    ]


FORMATS = {
    "questions.json": ("VQA questions and annotations", "", {"net": 2, "netting": 1}),
    "vizwiz_train.json": ("VizWiz", "VizWiz_train_00000000.jpg", {"basil leaves": 1, "basil": 1}),
    "train_balanced_questions.json": ("GQA", "2354786.jpg", {"no": 1}),
    "aokvqa_v1p0_train.json": ("A-OKVQA", "", {"ride": 2, "bus": 1, "taxi": 1}),
    "TextVQA_0.5.1_train.json": ("TextVQA", "003a8ae2ef43b901.jpg", {"nous les gosses": 1, "dakota": 2}),
    "captions_train.json": ("COCO captions", "COCO_val2014_000000391895.jpg", 1),
    "dataset_flickr30k.json": ("Karpathy's captions", "1000092795.jpg", 2),
    "TextCaps_0.1_train.json": ("TextCaps", "0054c91397f2fe05.jpg", 2),
    "llava.json": ("conversations", "part_1/997bb945.jpg", {"A dog.": 1}),
    "messages.jsonl": ("conversations", "a.jpg", {"Tea.": 1}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_example_of_a_published_format_is_read_as_that(name, tmp_path):
    kind, image, said = FORMATS[name]
    found, [row], reading = read(tmp_path, name)
    assert (found, row.image, row.answers or len(row.captions)) == (kind, image, said)
    assert not reading.left_out


def test_every_example_of_a_file_is_read_by_a_test():
    read_here = {*FORMATS, "annotations.json", "vqa.csv", "vqa.jsonl", "captions.csv"}
    assert EXAMPLES.keys() == read_here
    assert len(read_here) == sum(kind in ("csv", "json", "jsonl") for kind, _ in fences(PAGE))


def test_the_tables_of_columns_and_splits_are_complete():
    for ours, names in NAMES.items():
        [line] = re.findall(rf"^\| `{ours}` \| (.*)$", PAGE.split("## Columns")[1].split("`vqa.csv`:")[0], re.MULTILINE)
        called = line.split(" | ")[0]
        assert {ours, *re.findall(r"`(\w+)`", called)} == set(names)
        if ours == "split":
            assert set(re.findall(r"`(\w+)`", line)) == set(SPLIT_OF)


def test_the_table_of_pairs_per_step_is_what_is_planned():
    rows = re.findall(r"^\| (up to ([\d,]+)|more) \| (\d+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 4
    for _, most, pairs in rows:
        assert plan(int(most.replace(",", "") or 10**6), from_scratch=False).pairs == int(pairs)


@pytest.fixture
def by_hand(tmp_path, monkeypatch):
    """The index that the page's program makes, and pictures for it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(SPM, "beit3.spm")
    for shade, name in enumerate(("garten/01.jpg", "garten/02.jpg", "haus.jpg", "hof.jpg", "tor.jpg")):
        make_picture(Path("photos") / name, "green", shade)
    [program] = [block for kind, block in fences(PAGE) if kind == "python" and "answer2label" in block]
    exec(compile(program, "docs/DATA.md", "exec"), {})
    return tmp_path / "index"


def test_the_index_made_by_hand_is_taken_and_scored_by_its_scores(by_hand):
    (by_hand / "vqa.val.jsonl").write_text((by_hand / "vqa.train.jsonl").read_text())
    flags = ["--task", "vqa", "--model", "beit3_tiny_patch16_64", "--data_path", str(by_hand), "--vocab_size", "512"]
    flags += ["--image_path", "photos", "--sentencepiece_model", "beit3.spm", "--finetune", "", "--output_dir", "out"]
    settings = read_settings(flags)
    task = make_task(settings.task, settings.data, Tokenizer(SPM))
    val = task.dataset("val", training=False)
    # The answers are red, green, yes, no; of "red" 1 and "green" 0.6 the second is said.
    said = {"label": torch.tensor([1, 1, 2, 2]), "row": torch.arange(4)}
    scores = task.score(said, val, "val", final=True)
    assert scores.metrics["score"] == pytest.approx(100 * (0.6 + 1 + 1 + 0) / 4)
    assert scores.report["questions_without_answers"] == 0
    assert len(task.dataset("train", training=True)) == 4


def test_lines_that_are_shown_have_the_fields_that_a_table_gives(tmp_path):
    for shade, name in enumerate(("garten/01.jpg", "garten/02.jpg", "haus.jpg", "hof.jpg", "tor.jpg")):
        make_picture(tmp_path / name, "blue", shade)
    for name in ("vqa.csv", "captions.csv"):
        (tmp_path / name).write_text(EXAMPLES[name], encoding="utf-8")
    VQADataset.make_dataset_index(train=tmp_path / "vqa.csv", tokenizer=SPM, progress=False)
    CaptionDataset.make_dataset_index(train=tmp_path / "captions.csv", tokenizer=SPM, progress=False)
    made = [
        lines(tmp_path / "vqa.train.jsonl")[1],
        lines(tmp_path / "vqa.val.jsonl")[0],
        lines(tmp_path / "captioning.train.jsonl")[0],
        lines(tmp_path / "captioning.val.jsonl")[0],
    ]
    shown = [json.loads(line) for line in PAGE.splitlines() if line.startswith('{"image_path"')]
    assert [entry.keys() for entry in shown] == [entry.keys() for entry in made]
    for entry, own in zip(shown, made, strict=True):  # the tokens are those of another tokenizer
        assert {**entry, "text_segment": 0, "labels": 0} == {**own, "text_segment": 0, "labels": 0}


def test_mistakes_are_told_as_the_page_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("haus.jpg", "hof.jpg", "tor.jpg"):
        make_picture(Path("photos") / name)
    good = ["haus.jpg", DOOR, "red"]
    several = [good, ["hous.jpg", WINDOWS, "3"], ["hof.jpg", "", "yes"], ["../tor.jpg", "Is it open?", "no"]]
    several.append(["hof.jpg", "Is it open?", "no", "yes"])
    tables = [
        (["image", "question", "answer"], several, ","),
        (["image", "question", "answer"], [good], ";"),
        (["datei", "frage", "antwort"], [good], ","),
    ]
    shown = [block for _, block in fences(PAGE) if block.startswith("error: ")]
    assert len(shown) == len(tables)
    for block, (header, rows, delimiter) in zip(shown, tables, strict=True):
        text = io.StringIO()
        csv.writer(text, delimiter=delimiter).writerows([header, *rows])
        Path("vqa.csv").write_text(text.getvalue(), encoding="utf-8")
        status = own_data("", "", "photos", "--train", "vqa.csv")
        status = status or make_index("vqa", ".", str(SPM), "photos", "--train", "vqa.csv")
        assert (status, capsys.readouterr().err) == (2, block)
        assert not Path("vqa.train.jsonl").exists()


@pytest.mark.parametrize(
    "name",
    [
        "metadata.jsonl",
        "train/metadata.csv",
        "train.csv",
        "train-00000-of-00002.parquet",
        "data/train-00000-of-00002.parquet",
    ],
)
def test_a_folder_as_the_page_shows_is_taken_for_own_data(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    program = f"PYTHON={sys.executable}; source scripts/environment.sh; DATA_PATH={tmp_path} is_own_data"
    assert subprocess.run(["bash", "-c", program], cwd=ROOT, timeout=60, check=False).returncode == 0
    assert sources_here(tmp_path)
