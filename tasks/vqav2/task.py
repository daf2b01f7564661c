"""Visual question answering on VQAv2: the answer is one of a fixed list, scored by how many of ten people gave it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.data.image_text import ImageTextDataset
from beit3.data.json_stream import stream_array
from beit3.model.weights import Checkpoint, HeadRows
from beit3.system.errors import InputError, printable
from tasks.base import Answer, Columns, Scores, Task, told_twice
from tasks.calibration import fit
from tasks.looking import of_texts
from tasks.vqav2.answers import ANSWER_FILE, MIN_PEOPLE, answers_said, rows_by_text, vqa_accuracy
from tasks.vqav2.dataset import QuestionDataset, VQAv2Dataset, read_answers
from tasks.vqav2.looking import look
from tasks.vqav2.settings import HEAD

logger = logging.getLogger(__name__)

HEAD_BIAS = "head.3.bias"
# What the official files call the splits; the demo has annotations of its test split too.
OFFICIAL_SPLITS = {"val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}


class VQAv2(Task):
    best_metric = "score"

    _answers: list[str] | None = None
    _data_answers: list[str] | None = None

    @property
    def answers(self) -> list[str]:
        """Answer of each row of the head: the checkpoint's own list, else that of the data."""
        return self.data_answers if self._answers is None else self._answers

    @property
    def data_answers(self) -> list[str]:
        """Answer of each label of the index: `answer2label.txt` beside it, where it is not there the checkpoint's."""
        if self._data_answers is None:
            there = self._answers is None or (self.data.data_path / ANSWER_FILE).is_file()
            self._data_answers = read_answers(self.data.data_path) if there else self._answers
        assert self._data_answers is not None
        return self._data_answers

    def model_options(self, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        # A head that comes with the weights is kept as it is: its answers may be more than the data has.
        rows = state_dict[HEAD].shape[0] if HEAD in state_dict else len(self.answers)
        if len(self.answers) > rows:
            raise InputError(
                f"{len(self.answers)} answers, but the head of the checkpoint has {rows} rows and does not say what "
                "they mean: labels go beyond the head. Make the index again with the annotation files the checkpoint "
                "was trained on, or train with --new_head, which starts the head afresh"
            )
        return {"num_classes": rows}

    def starting_head(self, checkpoint: Checkpoint) -> tuple[Checkpoint, HeadRows | None]:
        """Rows follow their answers, because two lists seldom give an answer the same number."""
        state = checkpoint.state_dict
        if self.settings.new_head:
            kept = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
            return replace(checkpoint, state_dict=kept), None
        said = answers_said(checkpoint.description)
        if said is None or HEAD not in state:
            return checkpoint, None
        if len(said) > state[HEAD].shape[0]:
            raise InputError(
                f"{checkpoint.path}: says {len(said)} answers, but its head has {state[HEAD].shape[0]} rows; start "
                "the head afresh with --new_head"
            )
        told = _what_becomes(said, self.answers)
        return checkpoint, HeadRows((HEAD, HEAD_BIAS), rows_by_text(said, self.answers), told)

    def describe(self) -> dict[str, Any]:
        return {"answers": self.answers}

    def adopt(self, description: Mapping[str, Any]) -> None:
        super().adopt(description)
        self._answers = answers_said(description)

    def meet_data(self) -> None:
        if self._answers is not None:
            unknown = sum(number < 0 for number in rows_by_text(self._answers, self.data_answers))
            if unknown:
                logger.warning(
                    "%d of the %d answers in %s are none of the checkpoint's %d, so it never gives them",
                    unknown, len(self.data_answers), self.data.data_path / ANSWER_FILE, len(self._answers),
                )  # fmt: skip
        elif not (self.data.data_path / ANSWER_FILE).is_file():
            raise InputError(
                f"the checkpoint does not say what its answers are, and {self.data.data_path / ANSWER_FILE}, "
                "which would, is not there; make_dataset_index writes it"
            )

    def dataset(self, split: str, training: bool) -> QuestionDataset:
        return VQAv2Dataset(
            self.data.data_path,
            split,
            self.transform(training),
            num_max_bpe_tokens=self.data.num_max_bpe_tokens,
            vocab_size=self.tokenizer.vocab_size,
            num_answers=len(self.data_answers),
            seed=self.data.seed,
            image_path=self.data.image_path,
        )

    def output_values(self, model: Any) -> int:
        return len(self.answers)

    def training_step(self, model: nn.Module, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        logits = model(image=batch["image"], question=batch["token_ids"], padding_mask=batch["padding_mask"])
        targets = F.pad(batch["targets"], (0, logits.shape[1] - batch["targets"].shape[1]))
        return {"loss": soft_answer_loss(logits, targets)}

    def predict_step(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
        """ "label" int64 (B,): the number of the answer; "labels" int32 and "logits" fp32 (B, K): those of the K best
        answers, that one first; "finite" bool (B,): whether the logits are numbers."""
        logits = model(image=batch["image"], question=batch["token_ids"], padding_mask=batch["padding_mask"])
        known = logits[:, : len(self.answers)]  # a head may have more outputs than answers
        # Stable: of equal logits the first answer comes first, as argmax has it.
        labels = known.sort(dim=1, descending=True, stable=True).indices[:, : self.settings.most_answers]
        return {
            "label": labels[:, 0],
            "labels": labels.int(),
            "logits": known.gather(1, labels).float(),
            "finite": logits.isfinite().all(dim=1),
        }

    def told(self, columns: Columns) -> list[list[Answer]]:
        confidences = self.calibration.confidence(columns["logits"].numpy()).tolist()
        return [
            [Answer(self.answers[label], confidence) for label, confidence in zip(labels, of_row, strict=True)]
            for labels, of_row in zip(columns["labels"].tolist(), confidences, strict=True)
        ]

    def predictions(self, columns: Columns, dataset: ImageTextDataset) -> Iterator[dict[str, Any]]:
        labels, scores = dataset.table["labels"], dataset.table["scores"]
        known = labels.values.size > 0  # test splits have no labels
        given = self._soft_scores(columns, dataset) if known else ()
        for place, (row, told) in enumerate(zip(columns["row"].tolist(), self.told(columns), strict=True)):
            best = told[0]
            entry = {
                "question_id": int(dataset.table["qid"][row]),
                "image": dataset.table["image_path"][row],
                "question": self.tokenizer.decode(dataset.table["text_segment"][row].tolist()),
                "answer": best.text,
                "confidence": round(best.confidence, 6),
                "top": [{"answer": each.text, "confidence": round(each.confidence, 6)} for each in told],
            }
            if known:
                right = zip(labels[row].tolist(), scores[row].tolist(), strict=True)
                entry["right_answers"] = {self.data_answers[label]: round(score, 6) for label, score in right}
                entry["score"] = round(given[place], 6)
            yield entry

    def score(self, columns: Columns, dataset: ImageTextDataset, split: str, final: bool) -> Scores:
        """The mean soft score of the rows' own labels; after a prediction also the official accuracy."""
        known = dataset.table["labels"].values.size > 0  # test splits have no labels
        scores = self._soft_scores(columns, dataset) if known else []
        metrics = {"score": 100.0 * sum(scores) / len(columns["row"])} if known else {}
        report = self._official_report(columns, dataset, split) if final else None
        calibration = None
        if known and not final and "logits" in columns:
            calibration = fit(columns["logits"].numpy(), self._scores_of_best(columns, dataset))
        lines = _report_lines(report) if report is not None else ()
        return Scores(metrics, report, lines, calibration=calibration)

    def looked_at(self, train: ImageTextDataset, val: ImageTextDataset) -> list[str]:
        said = look(train, val, self.data_answers, self.tokenizer.decode)
        return [*super().looked_at(train, val), *said, of_texts(train, "questions")]

    def check_rows(self, dataset: ImageTextDataset, split: str) -> list[str]:
        """Questions that are asked twice, or, where the official question file is there, missing or not in it."""
        counts = Counter(dataset.table["qid"][:].tolist())
        problems = told_twice(counts, "question", "answers")
        file = self._official_file(f"v2_OpenEnded_mscoco_{OFFICIAL_SPLITS[split]}_questions.json")
        if file is not None and split != "val":  # validation is a part of the official file
            try:
                asked = {question["question_id"] for question in stream_array(file, "questions")}
            except (KeyError, TypeError):
                return [*problems, f"{file}: an element of `questions` has no `question_id`; download the file again"]
            problems += [
                f"question {q} of {file} has no answer, it is not in the index" for q in sorted(asked - counts.keys())
            ]
            problems += [f"question {question} is not in {file}" for question in sorted(counts.keys() - asked)]
        if problems:
            problems.append("are all pictures of the split on the disk? Complete them and make the index again")
        return problems

    def check_references(self, split: str, final: bool) -> list[str]:
        """The official annotations, read through once: they score a prediction at its end."""
        file = self._annotations(split) if final else None
        if file is None:
            return []
        try:
            for place, annotation in enumerate(stream_array(file, "annotations")):
                wrong = _wrong_annotation(annotation)
                if wrong is not None:
                    return [f"{file}: annotations[{place}] {wrong}; is it the official file, as it was downloaded?"]
        except InputError as error:
            return error.problems
        except OSError as error:
            return [f"{file}: cannot be read ({error.strerror})"]
        return []

    def remark(self, split: str) -> str | None:
        if split != "test-dev":
            return None
        return (
            "--split test-dev answers the questions of test-dev alone; the VQA server refuses that in both of its "
            "phases, because it wants all of test2015. For the server use --split test"
        )

    def submission(self, columns: Columns, dataset: ImageTextDataset, split: str) -> list[dict[str, Any]]:
        """One answer for each row; that each question has just one is for `check_rows` to see."""
        questions, answers = self._question_ids(columns, dataset), self._answer_texts(columns)
        return [{"question_id": q, "answer": answer} for q, answer in zip(questions, answers, strict=True)]

    def _soft_scores(self, columns: Columns, dataset: ImageTextDataset) -> list[float]:
        # Rows of the head and labels of the index may number the answers in two ways; the texts decide.
        labels = np.array(rows_by_text(self.data_answers, self.answers))
        return _soft_scores(columns["row"].numpy(), labels[columns["label"].numpy()], dataset)

    def _scores_of_best(self, columns: Columns, dataset: ImageTextDataset) -> np.ndarray:
        """What each of the K best answers of each row is worth, (N, K) in [0, 1]."""
        best = columns["labels"].unbind(dim=1)
        return np.stack([self._soft_scores({**columns, "label": each}, dataset) for each in best], axis=1)

    def _question_ids(self, columns: Columns, dataset: ImageTextDataset) -> list[int]:
        return dataset.table["qid"][columns["row"].numpy()].tolist()

    def _answer_texts(self, columns: Columns) -> list[str]:
        return [self.answers[label] for label in columns["label"].tolist()]

    def _official_report(self, columns: Columns, dataset: ImageTextDataset, split: str) -> dict[str, Any] | None:
        """Official accuracy on the predicted questions, and with the unindexed ones of the same pictures counted as 0.

        Questions none of whose answers is in the vocabulary are not in the index; the official score counts them.
        None where the annotations are not there.
        """
        file = self._annotations(split)
        if file is None:
            return None
        answers = dict(zip(self._question_ids(columns, dataset), self._answer_texts(columns), strict=True))
        annotations = list(stream_array(file, "annotations"))
        pictures = {annotation["image_id"] for annotation in annotations if annotation["question_id"] in answers}
        accuracy = vqa_accuracy(answers, (a for a in annotations if a["image_id"] in pictures))
        asked = accuracy["questions"] + accuracy["not_answered"]
        share = accuracy["questions"] / max(asked, 1)
        name = "overall" if "overall" in accuracy else "exact_match"
        unindexed = {f"{name}_with_unindexed": accuracy[name] * share}
        return {"split": split, **accuracy, **unindexed}

    def _annotations(self, split: str) -> Path | None:
        return self._official_file(f"v2_mscoco_{OFFICIAL_SPLITS[split]}_annotations.json")

    def _official_file(self, name: str) -> Path | None:
        folder = self.data.data_path
        return next((path for path in (folder / "vqa" / name, folder / name) if path.is_file()), None)


def _wrong_annotation(annotation: Any) -> str | None:
    """What the official accuracy could not work with in an element of `annotations`."""
    if not isinstance(annotation, dict):
        return "is no object"
    for name in ("question_id", "image_id"):
        if type(annotation.get(name)) is not int:
            return f"has no whole number as `{name}`"
    for name in ("answer_type", "question_type"):
        if not isinstance(annotation.get(name), str):
            return f"has no text as `{name}`"
    given = annotation.get("answers")
    if not isinstance(given, list) or not all(isinstance(a, dict) and isinstance(a.get("answer"), str) for a in given):
        return "has no list of answers, each with its `answer`, as `answers`"
    return None


def soft_answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy against soft scores, mean over everything, times the number of answers.

    Args:
        logits: (B, answers). targets: (B, answers), float in [0, 1].

    Returns:
        () in fp32.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float()) * targets.shape[1]


def _what_becomes(old: Sequence[str], new: Sequence[str]) -> str:
    """Of the head's rows, for people; "" where all stay as they are."""
    if list(old) == list(new):
        return ""
    kept = len(set(old) & set(new))
    return f"{kept} answers kept, {len(set(new)) - kept} new, {len(set(old)) - kept} gone"


def _soft_scores(rows: np.ndarray, predicted: np.ndarray, dataset: ImageTextDataset) -> list[float]:
    """Of each prediction the score, 0-1, that its row's labels give it; 0 where it is none of them.

    rows, predicted: (N,) int64, the row and the label of the index; -1: an answer that has no label.
    """
    labels, scores = dataset.table["labels"], dataset.table["scores"]
    # The labels of all rows lie end to end: an entry counts for its row when the label is the predicted one.
    row_of_entry = np.repeat(np.arange(len(labels)), labels.lengths)
    wanted = np.full(len(labels), -1)  # labels are 0 or more
    wanted[rows] = predicted
    hits = np.flatnonzero(labels.values == wanted[row_of_entry])
    by_row = np.zeros(len(labels))
    by_row[row_of_entry[hits]] = scores.values[hits]  # a label stands once in a row
    return by_row[rows].tolist()


def _report_lines(report: Mapping[str, Any]) -> list[str]:
    lines, name = [], "overall"
    if "overall" in report:
        lines.append(f"official VQA accuracy: {report['overall']:.2f} on {report['questions']} questions")
    else:
        name = "exact_match"
    if "exact_match" in report:
        lines += [
            f"exact match: {report['exact_match']:.2f} on {report['questions_of_few_people']} questions",
            f"  these have the answers of fewer than {MIN_PEOPLE} people, which the formula of the official VQA "
            "accuracy needs",
        ]
    if report["not_answered"]:
        lines.append(
            f"  {report[f'{name}_with_unindexed']:.2f} when the {report['not_answered']} questions of these "
            "pictures without an answer in the vocabulary count as wrong"
        )
    for part in ("answer_type", "question_type"):
        lines.append(f"  by {part.replace('_', ' ')}:")
        ranked = sorted(report[f"by_{part}"].items(), key=lambda item: -item[1])
        lines += [f"    {printable(name):<28} {accuracy:6.2f}" for name, accuracy in ranked]
    return lines
