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
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import numpy as np

from beit3.data import index_writing as writing
from beit3.data.findings import MAX_ID, Findings, shown, wrong_id, wrong_list, wrong_string, wrong_text
from beit3.data.index_description import describe_index, tokenizer_hash
from beit3.data.json_stream import OnCharacters
from beit3.data.tokenizer import BatchEncoder
from beit3.system.atomic_files import atomic_writes
from tasks.vqav2.answers import ANSWER_FILE, MIN_ANSWER_COUNT, answer_lines, build_answer_vocabulary, vote_score

NUM_REST_VAL_IMAGES = 1000  # validation images whose questions are kept for validating; the rest is for training
DESCRIPTION = "vqa.index.json"
VERSION = 1  # of the maker; raise it with every change of what is written
ANSWER = itemgetter("answer")
TEXT = itemgetter(2)  # of a Question
LINE = itemgetter(1)  # of a pair (image id, line of the index)

# What is wrong with the fields of a question, of an annotation, of an answer in it (which may be empty).
QUESTION = {"question_id": wrong_id, "image_id": wrong_id, "question": wrong_text}
ANNOTATION = {"question_id": wrong_id, "multiple_choice_answer": wrong_string, "answers": wrong_list}
ONE_ANSWER = {"answer": wrong_string}

Answers = tuple[list[str], list[str]]  # labels and their scores, as JSON writes them


# Question id, image id, text, answers (none where they are not known), position in the file. A million are made.
Question = tuple[int, int, str, Answers, int]


@dataclass(frozen=True)
class Split:
    """One of the four question files: the name of its index, of the official files, of the folder of pictures.

    num_questions, num_pictures: in the official file. num_kept_pictures: those with a question that has an answer in
    the vocabulary; all of them where there are no annotations.
    """

    index: str
    official: str
    folder: str
    annotated: bool
    num_questions: int
    num_pictures: int
    num_kept_pictures: int

    @property
    def questions(self) -> str:
        return f"v2_OpenEnded_mscoco_{self.official}_questions.json"

    @property
    def annotations(self) -> str:
        return f"v2_mscoco_{self.official}_annotations.json"


TRAIN = Split("train", "train2014", "train2014", True, 443757, 82783, 82774)
VAL = Split("val", "val2014", "val2014", True, 214354, 40504, 40503)
TEST = Split("test", "test2015", "test2015", False, 447793, 81434, 81434)
TEST_DEV = Split("test-dev", "test-dev2015", "test2015", False, 107394, 36807, 36807)  # a part of the test questions
OFFICIAL_FILES = (TRAIN, VAL, TEST, TEST_DEV)
OFFICIAL_ANSWERS = (3129, "net", 1)  # how many, the first of them, how many are empty

# "val" as a whole is for users; training reads trainable_val, validation rest_val.
INDEX_NAMES = ("train", "val", "trainable_val", "rest_val", "test", "test-dev")


def index_file(name: str) -> str:
    return f"vqa.{name}.jsonl"


def official_files(folder: Path) -> list[Path]:
    """The six files that an index is made from."""
    questions = [folder / split.questions for split in OFFICIAL_FILES]
    return questions + [folder / split.annotations for split in OFFICIAL_FILES if split.annotated]


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
def make_dataset_index(
    data_path: str | os.PathLike[str],
    tokenizer: Any,
    annotation_data_path: str | os.PathLike[str],
    seed: int = 0,
    progress: bool | None = None,
    image_path: str | os.PathLike[str] | None = None,
) -> None:
    """Write the index files of VQAv2 into `data_path`, all or none of them.

        VQAv2Dataset.make_dataset_index(
            data_path="…", tokenizer=XLMRobertaTokenizer("…/beit3.spm"), annotation_data_path="…")

    data_path: holds the COCO pictures in `train2014/`, `val2014/`, `test2015/`; only pictures that are there are
    indexed. tokenizer: see `beit3.data.tokenizer.as_batch_encoder`; the path of beit3.spm does as well.
    annotation_data_path: holds the six official files, unpacked. seed: decides which 1000 validation pictures
    are kept for validation (`vqa.rest_val`); the questions of the others are training data
    (`vqa.trainable_val`). progress: show a bar; None: on a terminal only. image_path: holds the pictures'
    folders, which may lie on a disk that is only read; None: data_path does.

    Writes `vqa.{train,val,trainable_val,rest_val,test,test-dev}.jsonl` and `answer2label.txt`, and prints what
    was written and what left out. Raises InputError listing what is missing or wrong; nothing is written then.
    """
    data, official = Path(data_path), Path(annotation_data_path)
    pictures = writing.Pictures(data if image_path is None else Path(image_path))
    files = official_files(official)
    source = "unpack it from https://visualqa.org/download.html (VQA v2) into annotation_data_path"
    folders = dict.fromkeys(split.folder for split in OFFICIAL_FILES)
    picture_of = {folder: pictures.by_image_id(folder) for folder in folders}
    encode = writing.check_inputs_and_tokenizer(
        tokenizer, [data, official, pictures.root], dict.fromkeys(files, source), data, pictures.problems
    )
    findings, tokens = Findings(), writing.TokenCount()
    with writing.progress_bar("VQAv2 index", files, progress) as bar:
        labels, answers = _read_labels(official, findings, bar.update)
        builders = {
            split: SplitBuilder(split, official, picture_of[split.folder], labels.get(split), encode, findings, tokens)
            for split in OFFICIAL_FILES
        }
        missing: dict[str, set[int]] = {}

        def describe(written: Mapping[str, IO[str]]) -> str:
            for split, builder in builders.items():
                missing.setdefault(split.folder, set()).update(builder.missing_pictures)
            folders = {name: (pictures.root / name, len(ids)) for name, ids in missing.items()}
            hashed = tokenizer_hash(encode)
            return describe_index(data, VERSION, written, files, folders, tokenizer_sha256=hashed, seed=seed)

        rest_val = _write_files(data, builders, answers, seed, findings, bar.update, describe)
    head = f"VQAv2 index written to {data}: {len(answers)} answers in {ANSWER_FILE}"
    writing.print_summary(head, _summary_lines(builders, rest_val, answers), tokens)


def _write_files(
    data: Path,
    builders: dict[Split, SplitBuilder],
    answers: list[str],
    seed: int,
    findings: Findings,
    on_characters: OnCharacters,
    describe: Callable[[Mapping[str, IO[str]]], str],
) -> tuple[int, int]:
    """Write all index files and what describes them, or none; returns how many questions and pictures `rest_val` has.

    describe: makes the description of the files that are written, name → file.
    """
    names = {name: index_file(name) for name in INDEX_NAMES} | {"answers": ANSWER_FILE}
    targets = [data / name for name in (*names.values(), DESCRIPTION)]
    with atomic_writes(targets) as (*files, description):
        file_of = dict(zip(names, files, strict=True))
        file_of["answers"].writelines(answer_lines(answers))
        for split in (TRAIN, TEST, TEST_DEV):
            file_of[split.index].writelines(map(LINE, builders[split].lines(on_characters)))
        val = list(builders[VAL].lines(on_characters))
        rest_val = choose_rest_val((image for image, _ in val), seed)
        file_of["val"].writelines(map(LINE, val))
        file_of["rest_val"].writelines(line for image, line in val if image in rest_val)
        file_of["trainable_val"].writelines(line for image, line in val if image not in rest_val)
        findings.raise_any()
        description.write(describe(dict(zip(names.values(), files, strict=True))))
    return sum(image in rest_val for image, _ in val), len(rest_val)


def choose_rest_val(image_ids: Iterable[int], seed: int, count: int = NUM_REST_VAL_IMAGES) -> set[int]:
    """`count` of the images, all when there are no more. Depends on the set of images and the seed, on no order."""
    ranked = sorted(set(image_ids), key=lambda image: hashlib.sha256(f"{seed}:{image}".encode()).digest())
    return set(ranked[:count])


class Numbering(dict[str, int]):
    """Text → its number, by order of first appearance. Raises TypeError for what is no text of valid Unicode."""

    def __missing__(self, text: str) -> int:
        if wrong_string(text):
            raise TypeError(text)
        number = self[text] = len(self)
        return number


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
        self.labels = list(map(writing.NumberTexts().__getitem__, labels[kept].tolist()))
        self.scores = list(map(scores.__getitem__, np.minimum(np.asarray(self.votes)[kept], 10).tolist()))
        self.label_ends = np.concatenate([[0], np.cumsum(kept)])[np.asarray(self.ends)].tolist()

    def of(self, row: int) -> Answers:
        start, end = self.label_ends[row], self.label_ends[row + 1]
        return self.labels[start:end], self.scores[start:end]


def _read_labels(
    official: Path, findings: Findings, on_characters: OnCharacters
) -> tuple[dict[Split, Labels], list[str]]:
    """The labels of the annotated splits, and the answer vocabulary, which comes from both of them."""
    numbers = Numbering()  # of the raw answers
    multiple_choice: Counter[str] = Counter()
    labels = {}
    for split in (TRAIN, VAL):  # in this order: it decides the labels
        labels[split] = _read_annotations(
            official / split.annotations, numbers, multiple_choice, findings, on_characters
        )
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
    path: Path, numbers: Numbering, multiple_choice: Counter[str], findings: Findings, on_characters: OnCharacters
) -> Labels:
    """Read an annotation file; `numbers` and `multiple_choice` take in what is new."""
    labels = Labels()
    for position, entry in enumerate(findings.stream(path, "annotations", on_characters)):
        try:
            question_id, image_id = entry["question_id"], entry.get("image_id", -1)
            votes: dict[str, int] = {}
            for answer in map(ANSWER, entry["answers"]):
                votes[answer] = votes.get(answer, 0) + 1
            most_common = entry["multiple_choice_answer"]
            answers = list(map(numbers.__getitem__, votes))
            right = (
                type(question_id) is type(image_id) is int
                and -MAX_ID <= question_id <= MAX_ID
                and -MAX_ID <= image_id <= MAX_ID
                and (most_common in multiple_choice or wrong_string(most_common) is None)
                and type(entry["answers"]) is list
            )
        except (KeyError, TypeError, AttributeError):
            right = False
        if not right:
            _note_annotation(path, f"annotations[{position}]", entry, findings)
        elif question_id in labels.row_of:
            findings.note(f"{path}: annotated more than once; question_id", question_id)
        else:
            multiple_choice[most_common] += 1
            labels.add(question_id, image_id, answers, votes.values())
    return labels


def _note_annotation(path: Path, place: str, entry: Any, findings: Findings) -> None:
    """Note each wrong field of an annotation that has one."""
    optional = {"image_id": wrong_id} if type(entry) is dict and "image_id" in entry else {}
    findings.check_fields(path, place, entry, ANNOTATION | optional)
    if type(entry) is dict and type(entry.get("answers")) is list:
        findings.check_list(path, f"{place}.answers", entry["answers"], ONE_ANSWER)


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
        tokens: writing.TokenCount,
    ):
        self.split, self.labels, self.encode, self.findings, self.tokens = split, labels, encode, findings, tokens
        self.questions_path, self.annotations_path = official / split.questions, official / split.annotations
        self.pictures = pictures
        self.num_questions = self.num_lines = 0
        self.asked: set[int] = set()  # images that have questions
        self.paths: dict[int, str] = {}  # of the pictures that have questions, as JSON
        self.without_picture = 0
        self.missing_pictures: set[int] = set()
        self.without_label = 0

    def lines(self, on_characters: OnCharacters) -> Iterator[tuple[int, str]]:
        """Yield (image id, line of the index) in the order of the question file."""
        kept = self._kept(self._questions(on_characters))
        text_of, join = writing.NumberTexts().__getitem__, ", ".join
        for question, ids in writing.tokenized(kept, TEXT, self.encode, self.tokens, self.questions_path):
            question_id, image_id, text, (labels, scores), position = question
            if not ids:
                what = f"{self.questions_path}: the tokenizer leaves nothing of `question`"
                self.findings.note(what, f"questions[{position}] has {shown(text)}")
                continue
            path = self.paths.get(image_id)
            if path is None:
                path = self.paths[image_id] = json.dumps(self.pictures[image_id])
            line = (
                f'{{"image_path": {path}, "text_segment": [{join(map(text_of, ids))}], '
                f'"labels": [{join(labels)}], "scores": [{join(scores)}], "qid": {question_id}}}\n'
            )
            if self.findings.check_line(line, self.questions_path, f"questions[{position}]"):
                self.num_lines += 1
                yield image_id, line
        if not self.num_lines and not self.findings.broken_files:
            what = f"{self.questions_path}: no question left ({self.without_label} without an answer in the vocabulary)"
            self.findings.note(f"{what}; questions without picture in {self.split.folder}/", self.without_picture)

    def _questions(self, on_characters: OnCharacters) -> Iterator[tuple[int, int, str, int]]:
        """Yield (question id, image id, text, position) of the sound questions; note what is wrong with others."""
        seen: set[int] = set()
        for position, entry in enumerate(self.findings.stream(self.questions_path, "questions", on_characters)):
            try:
                question_id, image_id, text = entry["question_id"], entry["image_id"], entry["question"]
                plain = (
                    type(question_id) is type(image_id) is int
                    and -MAX_ID <= question_id <= MAX_ID
                    and -MAX_ID <= image_id <= MAX_ID
                    and type(text) is str
                    and text.isascii()
                    and text.strip() != ""
                )
            except (KeyError, TypeError):
                plain = False
            # What is plain, nearly all, needs no closer look.
            if not plain and not self.findings.check_fields(
                self.questions_path, f"questions[{position}]", entry, QUESTION
            ):
                continue
            if question_id in seen:
                self.findings.note(f"{self.questions_path}: asked more than once; question_id", question_id)
            else:
                seen.add(question_id)
                yield question_id, image_id, text, position
        self.num_questions = len(seen)
        if self.labels is not None and not self.findings.broken_files:
            for question_id in self.labels.row_of.keys() - seen:
                what = f"{self.annotations_path}: annotations of questions that {self.split.questions} does not have"
                self.findings.note(f"{what}; question_id", question_id)

    def _kept(self, questions: Iterable[tuple[int, int, str, int]]) -> Iterator[Question]:
        """Yield the questions that have a picture and a label."""
        answers: Answers = ([], [])
        for question_id, image_id, text, position in questions:
            self.asked.add(image_id)
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
                yield question_id, image_id, text, answers, position

    def official_line(self) -> str | None:
        """How the counts compare with the official ones; None where this is not the official file."""
        split = self.split
        if not writing.is_nearly(self.num_questions, split.num_questions):
            return None
        found = len(self.asked) - len(self.missing_pictures)
        counts = {
            "questions": (self.num_questions, split.num_questions),
            "pictures": (found, split.num_pictures),
            "pictures with a kept question": (len(self.paths), split.num_kept_pictures),
        }
        return writing.beside_official(counts)


def _summary_lines(builders: dict[Split, SplitBuilder], rest_val: tuple[int, int], answers: list[str]) -> Iterator[str]:
    """rest_val: its questions and pictures."""
    if all(writing.is_nearly(builders[split].num_questions, split.num_questions) for split in (TRAIN, VAL)):
        yield f"{ANSWER_FILE}: {_official_answers_line(answers)}"
    for split, builder in builders.items():
        parts = [f"{builder.num_lines} questions of {len(builder.paths)} images"]
        if builder.without_picture:
            parts.append(f"{builder.without_picture} left out, {len(builder.missing_pictures)} pictures are missing")
        if builder.without_label:
            parts.append(f"{builder.without_label} left out, no answer of theirs is in the vocabulary")
        yield f"{index_file(split.index)}: {'; '.join(parts)}"
        if (official := builder.official_line()) is not None:
            yield f"  {official}"
        if split is VAL:
            lines, images = builder.num_lines - rest_val[0], len(builder.paths) - rest_val[1]
            yield f"  {index_file('rest_val')}: {rest_val[0]} questions of {rest_val[1]} images (validation)"
            yield f"  {index_file('trainable_val')}: {lines} questions of {images} images (training, as is train)"


def _official_answers_line(answers: list[str]) -> str:
    found = (len(answers), answers[0], answers.count(""))
    if found == OFFICIAL_ANSWERS:
        return "as many answers as in the official data, in their order"
    told = [
        f"{number} answers, the first {shown(first)}, {blank} empty"
        for number, first, blank in (found, OFFICIAL_ANSWERS)
    ]
    return f"unlike the official data: {told[0]} instead of {told[1]}; released heads do not fit"
