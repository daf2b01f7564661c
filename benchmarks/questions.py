"""Rows of the questions: the index at the size of VQAv2, and the data set in memory.

The official files are made up on the spot: as many questions and pictures as VQAv2 has, questions of the usual length
in invented words, pictures as links to a few real ones. The tokenizer is learned from the same words, so that a
question has about as many tokens as with the released one.
"""

from __future__ import annotations

import io
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece

from beit3.data.augmentation import EvalTransform
from benchmarks import memory
from benchmarks.peers import plain_index, plain_rows
from benchmarks.pictures import make_pictures
from benchmarks.table import Line, Reach, Row, Settings, interleave, rates
from datasets import VQAv2Dataset
from tasks.vqav2 import index as vqa_index
from tasks.vqav2.index import OFFICIAL_FILES, TEST, TEST_DEV, TRAIN, VAL, Split

# Questions and pictures of VQA v2.
QUESTIONS = {TRAIN: 443_757, VAL: 214_354, TEST: 447_793, TEST_DEV: 107_394}
PICTURES = {"train2014": 82_783, "val2014": 40_504, "test2015": 81_434}
ANSWERS = 3129
BEGINNINGS = "what color is the|what is the|is the|how many|is there a|where is the|why is the|are the|who is".split(
    "|"
)
SECONDS, GIGABYTES = 60.0, 3.0  # what the whole index may take
TOKENIZER = "invented.spm"


def make_tree(folder: Path, scale: float) -> Path:
    """Official files and pictures of `scale` times VQAv2, 0-1, and a tokenizer, in a folder of that scale."""
    tree = folder / f"vqa_{scale:g}"
    if (tree / TOKENIZER).exists():
        return tree
    rng = random.Random(0)
    words = ["".join(rng.choices(["ba", "ren", "to", "lis", "ku", "mor", "e", "a", "st"], k=3)) for _ in range(4000)]
    originals = make_pictures(tree / "originals", 8)
    for name, count in PICTURES.items():
        (tree / name).mkdir()
        for image_id in range(scaled(count, scale)):
            os.link(originals[image_id % 8], tree / name / f"COCO_{name}_{image_id:012}.jpg")
    for split in OFFICIAL_FILES:
        write_json(tree / split.questions, "questions", make_questions(split, scale, words))
        if split.annotated:
            write_json(tree / split.annotations, "annotations", make_annotations(split, scale, words))
    texts = [question["question"] for question in make_questions(VAL, 0.1, words)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=2000, hard_vocab_limit=False,
        bos_id=1, eos_id=2, unk_id=0, minloglevel=2,
    )  # fmt: skip
    (tree / TOKENIZER).write_bytes(model.getvalue())  # last: it says that all is there
    return tree


def scaled(count: int, scale: float) -> int:
    return max(1, int(count * scale))


def make_questions(split: Split, scale: float, words: list[str]) -> Iterator[dict[str, Any]]:
    rng = random.Random(split.official)
    pictures = scaled(PICTURES[split.folder], scale)
    for number in range(scaled(QUESTIONS[split], scale)):
        text = " ".join([rng.choice(BEGINNINGS), *rng.choices(words, k=rng.randint(2, 5))]) + "?"
        yield {"image_id": number % pictures, "question": text, "question_id": number}


def make_annotations(split: Split, scale: float, words: list[str]) -> Iterator[dict[str, Any]]:
    rng = random.Random(split.official)
    for question in make_questions(split, scale, words):
        answer, other = rng.choices(words[: max(2, scaled(ANSWERS, scale))], k=2)
        given = [answer] * 7 + [other] * 3
        yield {
            "question_type": "what",
            "multiple_choice_answer": answer,
            "answers": [{"answer": one, "answer_confidence": "yes", "answer_id": n + 1} for n, one in enumerate(given)],
            "image_id": question["image_id"],
            "answer_type": "other",
            "question_id": question["question_id"],
        }


def write_json(path: Path, key: str, entries: Iterator[dict[str, Any]]) -> None:
    """An official file: one object, whose `key` holds the entries."""
    with path.open("w", encoding="utf-8") as file:
        file.write(f'{{"data_type": "mscoco", "{key}": [')
        for number, entry in enumerate(entries):
            file.write((", " if number else "") + json.dumps(entry))
        file.write("]}")


# The index


def make_index(tree: Path) -> None:
    with redirect_stdout(io.StringIO()):  # it prints a summary
        VQAv2Dataset.make_dataset_index(tree, tree / TOKENIZER, tree, progress=False)


def indexed_tree(folder: Path, scale: float) -> Path:
    """`make_tree`, with the index made."""
    tree = make_tree(folder, scale)
    if not (tree / vqa_index.index_file("train")).exists():
        make_index(tree)
    return tree


def part_row(scale: float, settings: Settings) -> list[Line]:
    """Both sides make the whole index of a small part."""
    from transformers import XLMRobertaTokenizer  # slow to import

    tree = make_tree(settings.folder, scale)
    tokenizer = XLMRobertaTokenizer(str(tree / TOKENIZER))
    make_index(tree)
    count = plain_index(tree, tokenizer, tree / "plain")
    check_index(tree)
    calls: list[Callable[[], object]] = [
        partial(make_index, tree),
        partial(plain_index, tree, tokenizer, tree / "plain"),
    ]
    our_times, peer_times = interleave(calls, settings.repeats)
    what = f"VQAv2 index, {count} questions; other side: tokenized one by one, files whole in memory"
    return [Line(what, "questions/s", rates(count, our_times), rates(count, peer_times), Reach("≥", 5))]


def check_index(tree: Path) -> None:
    """Raises RuntimeError unless the index files of the two sides hold the same."""
    for split in OFFICIAL_FILES:
        ours = plain_rows([tree / vqa_index.index_file(split.index)])
        peer = plain_rows([tree / "plain" / f"{split.index}.jsonl"])
        if ours != peer or not ours:
            raise RuntimeError(f"the {split.index} index of the two sides differs ({len(ours)} and {len(peer)} lines)")


def whole_row(scale: float, settings: Settings) -> list[Line]:
    tree = make_tree(settings.folder, scale)
    seconds, megabytes = memory.in_fresh_process(time_and_memory_of_index, tree)
    count = sum(scaled(questions, scale) for questions in QUESTIONS.values())
    pictures = sum(scaled(pictures, scale) for pictures in PICTURES.values())
    what = f"whole VQAv2 index, {count} questions, {pictures} pictures"
    limits = (Reach("≤", SECONDS, absolute=True), Reach("≤", GIGABYTES, absolute=True)) if scale == 1 else (None, None)
    return [
        Line(what, "s", [seconds], reach=limits[0]),
        Line("– its process at its peak, everything counted", "GB", [megabytes / 1000], reach=limits[1]),
    ]


def time_and_memory_of_index(tree: Path) -> tuple[float, float]:
    """Seconds, and megabytes of this process at its highest point."""
    started = time.perf_counter()
    make_index(tree)
    return time.perf_counter() - started, memory.process_memory("VmHWM")


# The data set in memory


def dataset_row(scale: float, settings: Settings) -> list[Line]:
    tree = indexed_tree(settings.folder, scale)
    ours, peer = (memory.in_fresh_process(held_per_question, tree, name) for name in ("ours", "peer"))
    if ours[0] != peer[0]:
        raise RuntimeError(f"the two sides read {ours[0]} and {peer[0]} questions")
    arrays = open_index(tree, "train").nbytes / ours[0]
    what = f"data set in memory, {ours[0]} questions, growth of the process per question"
    return [
        Line(what, "B", [ours[1]], [peer[1]]),
        Line("– of that in arrays of the data set", "B", [arrays], reach=Reach("≤", 80, absolute=True)),
        # "No growth" with room for what any process grows by while it works.
        Line("– further growth in a worker that reads all", "B", [ours[2]], [peer[2]], Reach("≤", 8, absolute=True)),
    ]


def held_per_question(tree: Path, side: str) -> tuple[int, float, float]:
    """Number of questions, bytes that this process grows by for each, bytes that a forked worker grows by for each."""
    if side == "ours":
        open_index(tree, "val")  # what is set up once, is set up
    memory.give_back_freed_memory()
    before = memory.process_memory("VmRSS")
    rows = open_index(tree, "train") if side == "ours" else plain_rows(train_files(tree))
    memory.give_back_freed_memory()
    per_question = 1e6 / len(rows)
    held = (memory.process_memory("VmRSS") - before) * per_question
    return len(rows), held, in_fork(rows) * per_question


def train_files(tree: Path) -> list[Path]:
    return [tree / vqa_index.index_file(name) for name in VQAv2Dataset.SPLIT_FILES["train"]]


def open_index(tree: Path, split: str) -> VQAv2Dataset:
    return VQAv2Dataset(tree, split, EvalTransform(224))


def in_fork(rows: Any) -> float:
    """Megabytes that a forked process comes to own while it reads all rows, pictures left out."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        for row in range(min(1000, len(rows))):  # what is set up once, is set up
            read_row(rows, row)
        before = memory.own_memory()
        for row in range(len(rows)):
            read_row(rows, row)
        os.write(sending, str(memory.own_memory() - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(sending)
    with os.fdopen(receiving) as answer:
        return float(answer.read())


def read_row(rows: Any, row: int) -> tuple[Any, ...]:
    """What a worker takes of a row beside its picture."""
    if isinstance(rows, list):
        entry = rows[row]
        return entry["image_path"], entry["text_segment"], entry["labels"], entry["scores"], entry["qid"]
    table = rows.table
    return (
        table["image_path"][row], rows.token_ids(row), table["labels"][row], table["scores"][row], table["qid"][row],
    )  # fmt: skip


def index_rows(settings: Settings) -> list[Row]:
    return [
        Row("VQAv2 index, a part", partial(part_row, 0.005 if settings.quick else 0.09, settings)),
        Row("whole VQAv2 index", partial(whole_row, 0.02 if settings.quick else 1.0, settings)),
    ]


def dataset_rows(settings: Settings) -> list[Row]:
    return [Row("data set in memory", partial(dataset_row, 0.02 if settings.quick else 0.2, settings))]
