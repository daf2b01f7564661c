"""The data set of people's own questions: that of VQAv2 with weights, and with what its scores are made from."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from beit3.data.image_text import Item, Transform
from beit3.data.index_table import Field, FloatField
from sources.making import make_from_python
from tasks.vqav2.dataset import QuestionDataset, collate_vqa
from tasks.vqav2.own_index import KIND
from tasks.vqav2.own_settings import SPLIT_FILES, VQASettings


class VQADataset(QuestionDataset):
    """Questions about people's own pictures, with soft-scored answers; splits "train", "val", "test".

    balance: rows of rare answers weigh more, so that each answer has the same sum of weights; their mean stays 1. An
    item has a "weight" besides, float, where any row's is not 1.
    """

    NAME: ClassVar[str] = "own data"
    SPLIT_FILES: ClassVar[Mapping[str, tuple[str, ...]]] = SPLIT_FILES
    HOW_TO_MAKE: ClassVar[str] = (
        'VQADataset.make_dataset_index(train="table.csv", data_path="…", tokenizer="…/beit3.spm") in a Python shell '
        "makes it"
    )

    def __init__(
        self,
        data_path: str | os.PathLike[str],
        split: str,
        transform: Transform,
        *,
        balance: bool = False,
        **options: Any,
    ):
        super().__init__(data_path, split, transform, **options)
        weights = self.table["weight"].astype(np.float64)
        if balance:
            weights = _balanced(weights, self.table["labels"], self.table["scores"])
        self.weights = None if (weights == 1).all() else weights.astype(np.float32)

    def further_fields(self) -> list[Field]:
        return [FloatField("weight", default=1.0)]

    def example(self, row: int) -> Item:
        item = super().example(row)
        return item if self.weights is None else {**item, "weight": float(self.weights[row])}

    @property
    def collate(self) -> Callable[[Sequence[Item]], dict[str, Tensor]]:
        return functools.partial(_collate, num_answers=self.num_answers, num_max_bpe_tokens=self.num_max_bpe_tokens)

    @functools.cached_property
    def said(self) -> list[dict[str, Any]]:
        """Of each row "question", "answers" (answer → votes) and "question_id", where its line says them."""
        names, found = ("question", "answers", "question_id"), []
        for file in self.table.files:
            with open(file, encoding="utf-8-sig") as lines:
                for line in lines:
                    if line.strip():
                        entry = json.loads(line)
                        found.append({name: entry[name] for name in names if name in entry})
        return found

    @staticmethod
    def make_dataset_index(
        train: str | os.PathLike[str],
        tokenizer: Any,
        data_path: str | os.PathLike[str] | None = None,
        image_path: str | os.PathLike[str] | None = None,
        *,
        val: str | os.PathLike[str] | None = None,
        test: str | os.PathLike[str] | None = None,
        progress: bool | None = None,
        **choices: Any,
    ) -> None:
        """Write the index files of own questions, all or none of them.

            VQADataset.make_dataset_index(
                train="vqa.csv", image_path="photos", data_path="index", tokenizer="beit3.spm")

        train, val, test: a table, JSON file, pair of JSON files joined by a comma, or folder, see docs/DATA.md; without
        `val` a share of the training pictures is kept for validation. tokenizer: beit3.spm, or a tokenizer of
        transformers. data_path: where the index goes, made where it is not there; None: beside the table. image_path:
        holds the pictures; None: the folder of the table. progress: show a bar; None: on a terminal only. choices:
        `columns`, `val_fraction`, `val_seed`, `min_answer_count`, `max_answers`, `answers`, `normalize_answers`,
        `skip_missing`, as the flags of these names.

        Writes `vqa.{train,val,test}.jsonl` and `answer2label.txt`, and prints what was read, left out and why. Raises
        InputError listing all that is wrong; nothing is written then.
        """
        splits = {"train": train, "val": val, "test": test}
        make_from_python(KIND, VQASettings, tokenizer, data_path, image_path, progress, **splits, **choices)


def _collate(items: Sequence[Item], num_answers: int, num_max_bpe_tokens: int) -> dict[str, Tensor]:
    """What `collate_vqa` gives, and "weight" float32 (B,) where items have one."""
    batch = collate_vqa(items, num_answers, num_max_bpe_tokens)
    if "weight" in items[0]:
        batch["weight"] = torch.tensor([item["weight"] for item in items], dtype=torch.float32)
    return batch


def _balanced(weights: np.ndarray, labels: Any, scores: Any) -> np.ndarray:
    """(N,) weights of mean 1, those of the rows of each best answer with the same sum; weights: (N,), of the rows."""
    best = np.full(len(labels), -1)
    for row in range(len(labels)):
        if len(labels[row]):
            best[row] = labels[row][int(np.argmax(scores[row]))]
    known = best >= 0
    sums = np.bincount(best[known], weights[known])[best[known]]
    balanced = weights.copy()
    balanced[known] = weights[known] / np.where(sums > 0, sums, 1.0)
    return balanced / max(balanced.mean(), np.finfo(np.float64).tiny)
