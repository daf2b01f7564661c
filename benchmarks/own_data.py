"""The rows of own data: an index from one table, beside that of the same questions from the official JSON files."""

from __future__ import annotations

import csv
import io
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from benchmarks import memory
from benchmarks.questions import (
    PICTURES,
    QUESTIONS,
    TOKENIZER,
    make_annotations,
    make_questions,
    make_tree,
    scaled,
    time_and_memory_of_index,
)
from benchmarks.table import Line, Reach, Row, Settings
from datasets import VQADataset
from tasks.vqav2.index import OFFICIAL_FILES

GIGABYTES = 3.0  # what the index of a table of VQAv2's size may take
HEADER = ["image", "question", "answer", "question_id", "split"]
RENAMED = ["datei", "frage", "antwort", "nummer", "teil"]
SPLIT_OF = {"train": "train", "val": "val", "test": "train", "test-dev": "train"}


def make_table(tree: Path, scale: float, header: list[str]) -> tuple[Path, int]:
    """A CSV of all questions of a tree, each with one answer; how many rows it has."""
    table, rows = tree / f"{header[0]}.csv", 0
    answers = [entry["multiple_choice_answer"] for entry in make_annotations(OFFICIAL_FILES[0], scale, _words(tree))]
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for split in OFFICIAL_FILES:
            for asked in make_questions(split, scale, _words(tree)):
                image = f"{split.folder}/COCO_{split.folder}_{asked['image_id']:012}.jpg"
                answer = answers[rows % len(answers)]
                writer.writerow([image, asked["question"], answer, rows, SPLIT_OF[split.index]])
                rows += 1
    return table, rows


def _words(tree: Path) -> list[str]:
    return [f"wort{number}" for number in range(4000)]


def time_and_memory_of_table(tree: Path, table: Path, columns: str) -> tuple[float, float]:
    """Seconds, and megabytes of this process at its highest point."""
    started = time.perf_counter()
    with redirect_stdout(io.StringIO()):
        VQADataset.make_dataset_index(
            train=table, data_path=tree / "own", image_path=tree, tokenizer=str(tree / TOKENIZER), columns=columns,
            progress=False,
        )  # fmt: skip
    return time.perf_counter() - started, memory.process_memory("VmHWM")


def table_row(scale: float, settings: Settings) -> list[Line]:
    tree = make_tree(settings.folder, scale)
    table, count = make_table(tree, scale, HEADER)
    renamed, _ = make_table(tree, scale, RENAMED)
    names = ",".join(f"{ours}={theirs}" for ours, theirs in zip(HEADER, RENAMED, strict=True))
    official = sum(scaled(questions, scale) for questions in QUESTIONS.values())
    pictures = sum(scaled(number, scale) for number in PICTURES.values())
    json_seconds, _ = memory.in_fresh_process(time_and_memory_of_index, tree)
    seconds, megabytes = memory.in_fresh_process(time_and_memory_of_table, tree, table, "")
    renamed_seconds, _ = memory.in_fresh_process(time_and_memory_of_table, tree, renamed, names)
    what = f"index of own data, a CSV of {count} rows, {pictures} pictures; other side: VQAv2's from official JSON"
    return [
        Line(what, "questions/s", [count / seconds], [official / json_seconds], Reach("≥", 0.5)),
        Line("– its process at its peak", "GB", [megabytes / 1000], reach=Reach("≤", GIGABYTES, absolute=True)),
        Line(
            "– columns of other names; other side: ours", "questions/s", [count / renamed_seconds], [count / seconds],
            Reach("≥", 0.95),
        ),
    ]  # fmt: skip


def own_rows(settings: Settings) -> list[Row]:
    return [Row("index of own data from a CSV", partial(table_row, 0.05 if settings.quick else 1.0, settings))]
