"""Pairs of files as VQA v1 and v2 have them, and OK-VQA, the balanced real and abstract subsets, and many others.

https://visualqa.org/vqa_v2_teaser.html (the formats stand under "Download"), https://okvqa.allenai.org/download.html

    questions:   {"questions": [{"question_id": 458752000, "image_id": 458752, "question": "What is this photo …"}, …]}
    annotations: {"annotations": [{"question_id": 458752000, "answers": [{"answer": "net"}, … ten of them]}, …]}

Ids may be texts. Without annotations the questions are those of a test. A picture is known by its id alone. Answers are
as people typed them, `answer` rather than `raw_answer`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

from beit3.data.findings import is_broken, shown, wrong_list, wrong_string, wrong_text
from beit3.system.errors import InputError
from sources.look import NOTHING, Look
from sources.readers.base import FormatSource, Once, given, votes_of, wrong_number_or_text
from sources.rows import Id, Reading, Row

_QUESTION = {"question_id": wrong_number_or_text, "image_id": wrong_number_or_text, "question": wrong_text}
_ANNOTATION = {"question_id": wrong_number_or_text, "answers": wrong_list}
_IMAGE_ID = {"image_id": wrong_number_or_text}
_ANSWER = {"answer": wrong_string}
_answer_of = itemgetter("answer")


class VqaPairs(FormatSource):
    kind, asks = "VQA questions and annotations", True

    def __init__(self, path: Path, annotations: Path | None = None):
        """path: the questions. annotations: None: those beside them under the usual name, if they are there."""
        super().__init__(path)
        self.annotations = annotations or _annotations_beside(path)
        self.files = [path] if self.annotations is None else [path, self.annotations]

    @staticmethod
    def fits(look: Look) -> bool:
        return look.kind == "object" and "questions" in look.inside

    @staticmethod
    def annotates(look: Look) -> bool:
        """Whether a file that begins so holds the annotations of such a pair."""
        return look.inside.get("annotations", NOTHING) >= _ANNOTATION.keys()

    def rows(self, reading: Reading) -> Iterator[Row]:
        """The questions in their order."""
        annotated = None if self.annotations is None else _Annotations(self.annotations, reading)
        findings, ids = reading.findings, Once(self.path, "question_id", reading)
        for number, entry in enumerate(findings.stream(self.path, "questions", reading.on_bytes)):
            place = f"questions[{number}]"
            if not findings.check_fields(self.path, place, entry, _QUESTION):
                continue
            question_id, image_id = entry["question_id"], entry["image_id"]
            if not ids.is_new(question_id, place):
                continue
            votes = None
            if annotated is not None and (votes := annotated.votes(question_id, image_id, place)) is None:
                continue
            yield Row(place, "", entry["question"], votes, question_id=question_id, image_id=image_id)
        if annotated is not None and not findings.broken_files:
            annotated.note_unasked(ids.seen, self.path)


class _Annotations:
    """Question id → votes, as flat arrays: half a million dicts would take a gigabyte."""

    def __init__(self, path: Path, reading: Reading):
        self.path, self.findings = path, reading.findings
        self.row_of: dict[Id, int] = {}
        self.image_ids: list[Id | None] = []  # None: the file does not say
        self.number_of: dict[str, int] = {}  # distinct answers, by order of first appearance
        self.answers, self.counts, self.ends = array("i"), array("i"), array("q", [0])
        # What is wrong is noted once, and has no row then.
        self.wrong: set[Id] = set()
        for number, entry in enumerate(self.findings.stream(path, "annotations", reading.on_bytes)):
            self._add(f"annotations[{number}]", entry)
        self.texts = list(self.number_of)

    def _add(self, place: str, entry: Any) -> None:
        right = self.findings.check_fields(self.path, place, entry, _ANNOTATION | given(entry, _IMAGE_ID))
        question_id: Any = entry.get("question_id") if type(entry) is dict else None
        if not right or not self._answers_right(place, entry["answers"]):
            if wrong_number_or_text(question_id) is None:
                self.wrong.add(question_id)
        elif question_id in self.row_of:
            what = f"{self.path}: `question_id` of another entry"
            self.findings.note(what, f"{place} has {shown(question_id)}")
        else:
            votes = votes_of(map(_answer_of, entry["answers"]))
            self.row_of[question_id] = len(self.image_ids)
            self.image_ids.append(entry.get("image_id"))
            for answer in votes:
                self.answers.append(self.number_of.setdefault(answer, len(self.number_of)))
            self.counts.extend(votes.values())
            self.ends.append(len(self.answers))

    def _answers_right(self, place: str, answers: list[Any]) -> bool:
        try:  # nearly all are, and known at once
            if not is_broken("".join(map(_answer_of, answers))):
                return True
        except (KeyError, TypeError, IndexError):
            pass
        return self.findings.check_list(self.path, f"{place}.answers", answers, _ANSWER)

    def votes(self, question_id: Id, image_id: Id, place: str) -> dict[str, int] | None:
        """The votes for a question, None where there is no sound annotation, which is noted."""
        row = self.row_of.get(question_id)
        if row is None:
            if question_id not in self.wrong and not self.findings.broken_files:
                self.findings.note(f"{self.path}: no annotation of a question", f"{place} ({shown(question_id)})")
            return None
        if self.image_ids[row] not in (None, image_id):
            example = f"{place} has {shown(image_id)}, its annotation {shown(self.image_ids[row])}"
            self.findings.note(f"{self.path}: another `image_id` than the question has", example)
            return None
        start, end = self.ends[row], self.ends[row + 1]
        answers = map(self.texts.__getitem__, self.answers[start:end])
        return dict(zip(answers, self.counts[start:end], strict=True))

    def note_unasked(self, asked: set[Id], questions: Path) -> None:
        """Note annotations of questions that there are not."""
        for question_id in self.row_of.keys() - asked:
            what = f"{self.path}: annotations of questions that {questions.name} does not have; question_id"
            self.findings.note(what, shown(question_id))


def usual_annotations(questions: Path) -> list[str]:
    """The names that the annotations of a questions file may have.

    `v2_OpenEnded_mscoco_train2014_questions.json` has `v2_mscoco_train2014_annotations.json`.
    """
    before, found, after = questions.name.rpartition("questions")
    if not found:
        return []
    ends = dict.fromkeys([after, after.removesuffix(".gz"), f"{after}.gz"])
    stems = dict.fromkeys([before, before.replace("OpenEnded_", ""), before.replace("MultipleChoice_", "")])
    return [f"{stem}annotations{end}" for stem in stems for end in ends if not end.endswith(".gz.gz")]


def _annotations_beside(questions: Path) -> Path | None:
    found = [path for name in usual_annotations(questions) if (path := questions.with_name(name)).is_file()]
    if len(found) > 1:
        named = " and ".join(path.name for path in found)
        raise InputError(f"{questions}: {named} both look like its annotations; name the pair as QUESTIONS,ANNOTATIONS")
    return found[0] if found else None
