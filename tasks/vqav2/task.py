"""Visual question answering on VQAv2: the answer is one of a fixed list, scored by how many of ten people gave it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beit3.data.json_stream import stream_array
from beit3.model.losses import soft_answer_loss
from beit3.system.errors import InputError
from tasks.base import Record, Task, TaskSettings
from tasks.vqav2.answers import ANSWER_FILE, vqa_accuracy
from tasks.vqav2.dataset import VQAv2Dataset, read_answers
from tasks.vqav2.index import index_file

logger = logging.getLogger(__name__)

HEAD = "head.3.weight"
# What the official files call the splits; the demo has annotations of its test split too.
OFFICIAL_SPLITS = {"val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}


class VQAv2(Task):
    name = "vqav2"
    model_suffix = "vqav2"
    best_metric = "score"
    id_key = "question_id"
    trains_as = "vqav2"
    splits = ("test", "test-dev", "val")

    def __init__(self, settings: TaskSettings) -> None:
        super().__init__(settings)
        self._answers: list[str] | None = None

    @property
    def answers(self) -> list[str]:
        """Answer of each label: the checkpoint's own list, else `answer2label.txt` beside the data."""
        if self._answers is None:
            self._answers = read_answers(self.settings.data_path)
        return self._answers

    def check(self, training: bool) -> list[str]:
        problems = super().check(training)
        if problems:
            return problems
        folder = self.settings.data_path
        splits = ("train", "val") if training else (self.settings.split,)
        files = [index_file(name) for split in splits for name in VQAv2Dataset.SPLIT_FILES[split]]
        missing = [name for name in files if not (folder / name).is_file()]
        if training and not (folder / ANSWER_FILE).is_file():
            missing.append(ANSWER_FILE)
        if missing:
            problems.append(
                f"{folder}: {', '.join(missing)} not found. Make the index files once, in a Python shell: "
                "from datasets import VQAv2Dataset; from transformers import XLMRobertaTokenizer; "
                f'VQAv2Dataset.make_dataset_index(data_path="{folder}", '
                f'tokenizer=XLMRobertaTokenizer("{self.settings.sentencepiece_model}"), '
                f'annotation_data_path="{folder / "vqa"}")'
            )
        return problems

    @classmethod
    def make_index(cls, data_path: Path, tokenizer: str) -> None:
        names = [index_file(name) for files in VQAv2Dataset.SPLIT_FILES.values() for name in files]
        if all((data_path / name).is_file() for name in (*names, ANSWER_FILE)):
            return
        annotations = data_path / "vqa" if (data_path / "vqa").is_dir() else data_path
        VQAv2Dataset.make_dataset_index(data_path=data_path, tokenizer=tokenizer, annotation_data_path=annotations)

    def model_options(self, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        # A head that comes with the weights is kept as it is: its answers may be more than the data has.
        rows = state_dict[HEAD].shape[0] if HEAD in state_dict else len(self.answers)
        if len(self.answers) > rows:
            raise InputError(
                f"{len(self.answers)} answers, but the head of the checkpoint has {rows}: labels go beyond the head. "
                f"Make the index again with the annotation files the checkpoint was trained on"
            )
        return {"num_classes": rows}

    def describe(self) -> dict[str, Any]:
        return {"answers": self.answers}

    def adopt(self, description: Mapping[str, Any]) -> None:
        if "answers" in description:
            self._answers = list(description["answers"])
        elif not (self.settings.data_path / ANSWER_FILE).is_file():
            raise InputError(
                f"the checkpoint does not say what its answers are, and {self.settings.data_path / ANSWER_FILE}, "
                "which would, is not there; make_dataset_index writes it"
            )

    def dataset(self, split: str, training: bool) -> VQAv2Dataset:
        settings = self.settings
        transform = self.transform(training)
        return VQAv2Dataset(
            settings.data_path,
            split,
            transform,
            num_max_bpe_tokens=settings.num_max_bpe_tokens,
            vocab_size=min(settings.vocab_size, self.tokenizer.vocab_size),
            num_answers=len(self.answers),
            seed=settings.seed,
        )

    def output_values(self) -> int:
        return len(self.answers)

    def training_step(self, model: nn.Module, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        logits = model(image=batch["image"], question=batch["token_ids"], padding_mask=batch["padding_mask"])
        targets = torch.nn.functional.pad(batch["targets"], (0, logits.shape[1] - batch["targets"].shape[1]))
        return {"loss": soft_answer_loss(logits, targets)}

    def evaluation_step(self, model: nn.Module, batch: dict[str, Tensor]) -> list[Record]:
        logits = model(image=batch["image"], question=batch["token_ids"], padding_mask=batch["padding_mask"])
        labels = logits[:, : len(self.answers)].argmax(dim=1)  # a head may have more outputs than answers have names
        scores = batch["targets"].gather(1, labels[:, None]).squeeze(1)
        columns = zip(
            batch["row"].tolist(), batch["question_id"].tolist(), labels.tolist(), scores.tolist(), strict=True
        )
        return [
            {"row": row, "question_id": question, "answer": self.answers[label], "score": score}
            for row, question, label, score in columns
        ]

    def metrics(self, records: Sequence[Record]) -> dict[str, float]:
        return {"score": 100.0 * sum(record["score"] for record in records) / len(records)}

    def submission(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """One answer per question.

        Raises:
            InputError: a question has two answers, or, where the official question file is there, none.
        """
        answers = [{"question_id": record["question_id"], "answer": record["answer"]} for record in records]
        counts = Counter(answer["question_id"] for answer in answers)
        problems = [f"question {question} has {n} answers" for question, n in counts.items() if n > 1]
        file = self._official_file(f"v2_OpenEnded_mscoco_{OFFICIAL_SPLITS[self.settings.split]}_questions.json")
        if file is not None and self.settings.split != "val":  # validation is a part of the official file
            asked = {question["question_id"] for question in stream_array(file, "questions")}
            problems += [f"question {question} of {file} has no answer" for question in sorted(asked - counts.keys())]
            problems += [f"question {question} is not in {file}" for question in sorted(counts.keys() - asked)]
        if problems:
            raise InputError(
                [*problems, "are all test pictures on disk? Complete them and run make_dataset_index again"]
            )
        return answers

    def report(self, records: Sequence[Record]) -> dict[str, Any] | None:
        """Official accuracy on the predicted questions, and with the unindexed ones of the same pictures counted as 0.

        Questions none of whose answers is in the vocabulary are not in the index; the official score counts them.
        """
        file = self._official_file(f"v2_mscoco_{OFFICIAL_SPLITS[self.settings.split]}_annotations.json")
        if file is None:
            return None
        answers = {record["question_id"]: record["answer"] for record in records}
        annotations = list(stream_array(file, "annotations"))
        pictures = {annotation["image_id"] for annotation in annotations if annotation["question_id"] in answers}
        accuracy = vqa_accuracy(answers, (a for a in annotations if a["image_id"] in pictures))
        asked = accuracy["questions"] + accuracy["not_answered"]
        return {
            "split": self.settings.split,
            **accuracy,
            "overall_with_unindexed": accuracy["overall"] * accuracy["questions"] / max(asked, 1),
        }

    def report_lines(self, report: Mapping[str, Any]) -> list[str]:
        lines = [f"official VQA accuracy: {report['overall']:.2f} on {report['questions']} questions"]
        if report["not_answered"]:
            lines.append(
                f"  {report['overall_with_unindexed']:.2f} when the {report['not_answered']} questions of these "
                "pictures without an answer in the vocabulary count as wrong"
            )
        for part in ("answer_type", "question_type"):
            lines.append(f"  by {part.replace('_', ' ')}:")
            ranked = sorted(report[f"by_{part}"].items(), key=lambda item: -item[1])
            lines += [f"    {name:<28} {accuracy:6.2f}" for name, accuracy in ranked]
        return lines

    def _official_file(self, name: str) -> Path | None:
        folder = self.settings.data_path
        return next((path for path in (folder / "vqa" / name, folder / name) if path.is_file()), None)
