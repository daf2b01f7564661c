"""Makes the index files of VQAv2 from the six official files, in one pass over each.

What the index says is fixed by the released models: which answers are in the vocabulary and in which order, the soft
scores, which questions are dropped. How it is made is ours: the official files (half a gigabyte) are streamed, the
questions tokenized in batches and written at once; only numbers stay in memory.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from beit3.data.index_table import is_inside
from beit3.data.json_stream import stream_array
from beit3.data.tokenizer import BatchEncoder, as_batch_encoder
from beit3.system.atomic_files import atomic_writes
from beit3.system.errors import InputError
from tasks.vqav2.answers import ANSWER_FILE, MIN_ANSWER_COUNT, answer_lines, build_answer_vocabulary, vote_score

NUM_REST_VAL_IMAGES = 1000  # validation images whose questions are kept for validating; the rest is for training
BATCH = 4096  # questions tokenized at a time
ANSWER = itemgetter("answer")
LINE = itemgetter(1)  # of a pair (image id, line of the index)

Progress = Callable[[int], object]
Answers = tuple[list[str], list[str]]  # labels and their scores, as JSON writes them
Question = tuple[int, int, str, Answers]  # question id, image id, text; no answers where they are not known


@dataclass(frozen=True)
class Split:
    """One of the four question files: the name of its index, of the official files, of the folder of pictures."""

    index: str
    official: str
    folder: str
    annotated: bool

    @property
    def questions(self) -> str:
        return f"v2_OpenEnded_mscoco_{self.official}_questions.json"

    @property
    def annotations(self) -> str:
        return f"v2_mscoco_{self.official}_annotations.json"


TRAIN = Split("train", "train2014", "train2014", annotated=True)
VAL = Split("val", "val2014", "val2014", annotated=True)
TEST = Split("test", "test2015", "test2015", annotated=False)
TEST_DEV = Split("test-dev", "test-dev2015", "test2015", annotated=False)  # a part of the test questions
SPLITS = (TRAIN, VAL, TEST, TEST_DEV)

# "val" as a whole is for users; training reads trainable_val, validation rest_val.
INDEX_NAMES = ("train", "val", "trainable_val", "rest_val", "test", "test-dev")


def index_file(name: str) -> str:
    return f"vqa.{name}.jsonl"


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Nothing made here refers to itself, and looking for what does would take a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@without_garbage_collection()
def make_vqa_index(
    data_path: str | os.PathLike[str],
    tokenizer: Any,
    annotation_data_path: str | os.PathLike[str],
    seed: int = 0,
    progress: bool | None = None,
) -> None:
    """Write `vqa.{train,val,trainable_val,rest_val,test,test-dev}.jsonl` and `answer2label.txt` into `data_path`.

    See `datasets.VQAv2Dataset.make_dataset_index`, which is how users call it.
    """
    data, official = Path(data_path), Path(annotation_data_path)
    problems = _missing_inputs(data, official)
    pictures: dict[str, dict[int, str]] = {}
    for folder in dict.fromkeys(split.folder for split in SPLITS):
        pictures[folder], found = list_pictures(data, folder)
        problems += found
    try:
        encode = as_batch_encoder(tokenizer)
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(problems)

    findings = Findings()
    with _progress_bar(official, progress) as bar:
        labels, answers = _read_labels(official, findings, bar.update)
        builders = {
            split: SplitBuilder(split, official, pictures[split.folder], labels.get(split), encode, findings)
            for split in SPLITS
        }
        targets = [data / index_file(name) for name in INDEX_NAMES] + [data / ANSWER_FILE]
        with atomic_writes(targets) as files:
            file_of = dict(zip((*INDEX_NAMES, "answers"), files, strict=True))
            file_of["answers"].writelines(answer_lines(answers))
            for split in (TRAIN, TEST, TEST_DEV):
                file_of[split.index].writelines(map(LINE, builders[split].lines(bar.update)))
            val = list(builders[VAL].lines(bar.update))
            rest_val = choose_rest_val((image for image, _ in val), seed)
            file_of["val"].writelines(map(LINE, val))
            file_of["rest_val"].writelines(line for image, line in val if image in rest_val)
            file_of["trainable_val"].writelines(line for image, line in val if image not in rest_val)
            findings.raise_any()
    _print_summary(data, builders.values(), len(answers), len(rest_val), sum(image in rest_val for image, _ in val))


def choose_rest_val(image_ids: Iterable[int], seed: int, count: int = NUM_REST_VAL_IMAGES) -> set[int]:
    """`count` of the images, all when there are no more. Depends on the set of images and the seed, on no order."""
    ranked = sorted(set(image_ids), key=lambda image: hashlib.sha256(f"{seed}:{image}".encode()).digest())
    return set(ranked[:count])


def list_pictures(data: Path, folder: str) -> tuple[dict[int, str], list[str]]:
    """The pictures in a COCO folder, image id → `folder/file name`, and what is wrong with it."""
    pictures: dict[int, str] = {}
    root, path = os.path.realpath(data), data / folder
    if not path.is_dir():
        return {}, [f"{path}: folder of pictures missing; put the COCO pictures of {folder} there"]
    if not is_inside(root, os.fspath(path)):
        return {}, [f"{path}: leads out of {data} through a link, which reading refuses; put the folder itself there"]
    problems = []
    with os.scandir(path) as entries:
        for entry in entries:
            match = re.fullmatch(r"(?!\.)(?:.*_)?(\d+)\.jpg", entry.name)
            if match is None:
                continue
            image_id = int(match[1])
            if image_id in pictures:
                problems.append(f"{path}: {entry.name} and {pictures[image_id]} are both image {image_id}; remove one")
            elif entry.is_symlink() and not is_inside(root, entry.path):
                problems.append(f"{path}: {entry.name} is a link out of {data}, which reading refuses; copy the file")
            pictures[image_id] = f"{folder}/{entry.name}"
    if not pictures:
        problems.append(f"{path}: no picture in it, such as COCO_{folder}_000000000001.jpg")
    return pictures, problems


class Numbering(dict[str, int]):
    """Text → its number, by order of first appearance. Raises TypeError for what is no text."""

    def __missing__(self, text: str) -> int:
        if type(text) is not str:
            raise TypeError(f"{text!r} is not a text")
        number = self[text] = len(self)
        return number


class NumberTexts(dict[int, str]):
    """Number → its text, each made once: joined, they are the JSON of a list in half the time."""

    def __missing__(self, number: int) -> str:
        text = self[number] = str(number)
        return text


@dataclass
class Findings:
    """Mistakes in the official files, equal ones counted together: a wrong file has hundreds of thousands."""

    broken_files: list[str] = field(default_factory=list)
    examples: dict[str, list[str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def stream(self, path: Path, key: str, progress: Progress) -> Iterator[Any]:
        """Yield the elements of an official file; a broken one ends where it breaks, and the next file is read."""
        try:
            yield from stream_array(path, key, progress)
        except InputError as error:
            self.broken_files += error.problems

    def note(self, what: str, example: object) -> None:
        self.counts[what] += 1
        if self.counts[what] <= 5:
            self.examples.setdefault(what, []).append(str(example))

    def raise_any(self) -> None:
        """Raise an InputError with all that was noted, if anything was."""
        problems = list(self.broken_files)
        for what, examples in self.examples.items():
            hidden = self.counts[what] - len(examples)
            problems.append(f"{what}: {', '.join(examples)}" + (f" and {hidden} more" if hidden else ""))
        if problems:
            raise InputError(problems)


class Labels:
    """Answers of the annotated questions of one split, as flat arrays: distinct raw answers with their votes."""

    def __init__(self) -> None:
        self.row_of: dict[int, int] = {}  # question id → row
        self.image_ids: list[int] = []  # -1: the file does not say
        self.answers, self.votes, self.ends = array("i"), array("i"), array("q", [0])
        self.labels: list[str] = []
        self.scores: list[str] = []
        self.label_ends: list[int] = []

    def add(self, question_id: int, image_id: int, answers: Iterable[int], votes: Iterable[int]) -> None:
        """Add an annotation: the numbers of its answers, in order of first appearance, and how many gave each."""
        self.row_of[question_id] = len(self.image_ids)
        self.image_ids.append(image_id)
        self.answers.extend(answers)
        self.votes.extend(votes)
        self.ends.append(len(self.answers))

    def resolve(self, label_of: np.ndarray) -> None:
        """Keep the answers that have a label. label_of: (numbers of answers,), -1 = not in the vocabulary."""
        labels = label_of[np.asarray(self.answers)]
        kept = labels >= 0
        scores = [json.dumps(vote_score(count)) for count in range(11)]
        self.labels = list(map(NumberTexts().__getitem__, labels[kept].tolist()))
        self.scores = list(map(scores.__getitem__, np.minimum(np.asarray(self.votes)[kept], 10).tolist()))
        self.label_ends = np.concatenate([[0], np.cumsum(kept)])[np.asarray(self.ends)].tolist()

    def of(self, row: int) -> Answers:
        start, end = self.label_ends[row], self.label_ends[row + 1]
        return self.labels[start:end], self.scores[start:end]


def _read_labels(official: Path, findings: Findings, progress: Progress) -> tuple[dict[Split, Labels], list[str]]:
    """The labels of the annotated splits, and the answer vocabulary, which comes from both of them."""
    numbers = Numbering()  # of the raw answers
    multiple_choice: Counter[str] = Counter()
    labels = {}
    for split in (TRAIN, VAL):  # in this order: it decides the labels
        labels[split] = _read_annotations(official / split.annotations, numbers, multiple_choice, findings, progress)
    answers = build_answer_vocabulary(multiple_choice)
    if not answers and not findings.broken_files:
        what = f"{official}: the vocabulary is empty, as no answer is the most common one {MIN_ANSWER_COUNT} times"
        findings.note(f"{what}; distinct answers", len(numbers))
    findings.raise_any()
    label_of = np.full(len(numbers), -1)
    for label, answer in enumerate(answers):
        if answer in numbers:
            label_of[numbers[answer]] = label
    for split_labels in labels.values():
        split_labels.resolve(label_of)
    return labels, answers


def _read_annotations(
    path: Path, numbers: Numbering, multiple_choice: Counter[str], findings: Findings, progress: Progress
) -> Labels:
    """Read an annotation file; `numbers` and `multiple_choice` take in what is new."""
    labels = Labels()
    for position, entry in enumerate(findings.stream(path, "annotations", progress)):
        try:
            question_id, image_id = entry["question_id"], entry.get("image_id", -1)
            votes: dict[str, int] = {}
            for answer in map(ANSWER, entry["answers"]):
                votes[answer] = votes.get(answer, 0) + 1
            most_common = entry["multiple_choice_answer"]
            answers = list(map(numbers.__getitem__, votes))
            typed = type(question_id) is type(image_id) is int and type(most_common) is str
        except (KeyError, TypeError, AttributeError):
            typed = False
        if not typed:
            findings.note(f"{path}: not an annotation of VQA v2; number in the file, from 0", position)
        elif question_id in labels.row_of:
            findings.note(f"{path}: annotated more than once; question_id", question_id)
        else:
            multiple_choice[most_common] += 1
            labels.add(question_id, image_id, answers, votes.values())
    return labels


class SplitBuilder:
    """Turns the questions of one split into lines of its index, and counts what it leaves out."""

    def __init__(
        self,
        split: Split,
        official: Path,
        pictures: dict[int, str],
        labels: Labels | None,
        encode: BatchEncoder,
        findings: Findings,
    ):
        self.split, self.labels, self.encode, self.findings = split, labels, encode, findings
        self.questions_path, self.annotations_path = official / split.questions, official / split.annotations
        self.pictures = pictures
        self.num_lines = 0
        self.paths: dict[int, str] = {}  # of the pictures that have questions, as JSON
        self.without_picture = 0
        self.missing_pictures: set[int] = set()
        self.without_label = 0

    def lines(self, progress: Progress) -> Iterator[tuple[int, str]]:
        """Yield (image id, line of the index) in the order of the question file."""
        kept = self._kept(self._questions(progress))
        text_of, join = NumberTexts().__getitem__, ", ".join
        while batch := list(islice(kept, BATCH)):
            for (question_id, image_id, _, answers), ids in zip(batch, self._tokenize(batch), strict=True):
                if not ids:
                    self.findings.note(f"{self.questions_path}: empty question text; question_id", question_id)
                    continue
                self.num_lines += 1
                path = self.paths.get(image_id)
                if path is None:
                    path = self.paths[image_id] = json.dumps(self.pictures[image_id])
                labels, scores = answers
                yield (
                    image_id,
                    f'{{"image_path": {path}, "text_segment": [{join(map(text_of, ids))}], '
                    f'"labels": [{join(labels)}], "scores": [{join(scores)}], "qid": {question_id}}}\n',
                )
        if not self.num_lines and not self.findings.broken_files:
            what = f"{self.questions_path}: no question left ({self.without_label} without an answer in the vocabulary)"
            self.findings.note(f"{what}; questions without picture in {self.split.folder}/", self.without_picture)

    def _tokenize(self, batch: list[Question]) -> list[list[int]]:
        try:
            return self.encode([text for _, _, text, _ in batch])
        except ValueError as error:
            raise InputError(f"{self.questions_path}: {error}") from error

    def _questions(self, progress: Progress) -> Iterator[tuple[int, int, str]]:
        """Yield (question id, image id, text) of the well-formed questions; note what is wrong with ids."""
        seen: set[int] = set()
        for position, entry in enumerate(self.findings.stream(self.questions_path, "questions", progress)):
            try:
                question_id, image_id, text = entry["question_id"], entry["image_id"], entry["question"]
            except (KeyError, TypeError):
                question_id = image_id = text = None
            if not (type(question_id) is type(image_id) is int and type(text) is str):
                self.findings.note(f"{self.questions_path}: not a question; number in the file, from 0", position)
            elif question_id in seen:
                self.findings.note(f"{self.questions_path}: asked more than once; question_id", question_id)
            else:
                seen.add(question_id)
                yield question_id, image_id, text
        if self.labels is not None and not self.findings.broken_files:
            for question_id in self.labels.row_of.keys() - seen:
                what = f"{self.annotations_path}: annotations of questions that {self.split.questions} does not have"
                self.findings.note(f"{what}; question_id", question_id)

    def _kept(self, questions: Iterable[tuple[int, int, str]]) -> Iterator[Question]:
        """Yield the questions that have a picture and a label."""
        answers: Answers = ([], [])
        for question_id, image_id, text in questions:
            if self.labels is not None:
                row = self.labels.row_of.get(question_id, -1)
                if row < 0:
                    what = f"{self.annotations_path}: no annotation of questions in {self.split.questions}"
                    self.findings.note(f"{what}; question_id", question_id)
                    continue
                if self.labels.image_ids[row] not in (-1, image_id):
                    what = f"{self.annotations_path}: another image_id than in {self.split.questions}"
                    self.findings.note(f"{what}; question_id", question_id)
                answers = self.labels.of(row)
            if image_id not in self.pictures:
                self.without_picture += 1
                self.missing_pictures.add(image_id)
            elif self.labels is not None and not answers[0]:
                self.without_label += 1
            else:
                yield question_id, image_id, text, answers


def _missing_inputs(data: Path, official: Path) -> list[str]:
    """What of the folders and official files is not there."""
    problems = [f"{folder}: no such folder" for folder in dict.fromkeys((data, official)) if not folder.is_dir()]
    names = [split.questions for split in SPLITS] + [split.annotations for split in (TRAIN, VAL)]
    missing = [name for name in names if not (official / name).is_file()]
    source = "unpack it from https://visualqa.org/download.html (VQA v2) into annotation_data_path"
    return problems + [f"{official / name}: missing; {source}" for name in missing]


def _progress_bar(official: Path, progress: bool | None) -> Any:
    """A bar over the bytes of all official files; `progress` None: on a terminal only."""
    files = [split.questions for split in SPLITS] + [split.annotations for split in (TRAIN, VAL)]
    total = sum((official / name).stat().st_size for name in files)
    hidden = None if progress is None else not progress
    return tqdm(total=total, unit="B", unit_scale=True, desc="VQAv2 index", disable=hidden)


def _print_summary(
    data: Path, builders: Iterable[SplitBuilder], num_answers: int, rest_val_images: int, rest_val_lines: int
) -> None:
    print(f"VQAv2 index written to {data}: {num_answers} answers in {ANSWER_FILE}")
    for builder in builders:
        parts = [f"{builder.num_lines} questions of {len(builder.paths)} images"]
        if builder.without_picture:
            parts.append(f"{builder.without_picture} left out, {len(builder.missing_pictures)} pictures are missing")
        if builder.without_label:
            parts.append(f"{builder.without_label} left out, no answer of theirs is in the vocabulary")
        print(f"  {index_file(builder.split.index)}: {'; '.join(parts)}")
        if builder.split is VAL:
            lines, images = builder.num_lines - rest_val_lines, len(builder.paths) - rest_val_images
            print(f"    {index_file('rest_val')}: {rest_val_lines} questions of {rest_val_images} images (validation)")
            print(f"    {index_file('trainable_val')}: {lines} questions of {images} images (training, as is train)")
