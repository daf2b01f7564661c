"""The data set of VQAv2: questions about COCO pictures, each with the soft scores of its answers."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from beit3.data.image_text import ImageTextDataset, Item, Transform, collate_image_text
from beit3.data.index_table import Field, IntField, IntListField, PathField, ScoreListField, TokenField, read_index
from beit3.system.errors import InputError
from tasks.vqav2 import answers
from tasks.vqav2.index import index_file, make_dataset_index
from tasks.vqav2.settings import SPLIT_FILES


class QuestionDataset(ImageTextDataset):
    """Questions about pictures with soft-scored answers.

    An item is a dict: "image" uint8 (3, H, W); "token_ids" int64 (T,), see `token_ids`; "labels" int64 (A,) and
    "scores" float32 (A,), the answers given and their scores in [0, 1], both empty in the test splits; "question_id";
    "row".

    split: one of SPLIT_FILES, which says the index files that it is made of.
    vocab_size: rows of the model's text embedding. num_answers: outputs of the model's head. image_path: holds the
    pictures; None: data_path does.
    Raises InputError listing the bad lines of the index, each with file and line.
    """

    NAME: ClassVar[str]  # for people
    SPLIT_FILES: ClassVar[Mapping[str, tuple[str, ...]]]
    HOW_TO_MAKE: ClassVar[str]

    def __init__(
        self,
        data_path: str | os.PathLike[str],
        split: str,
        transform: Transform,
        *,
        vocab_size: int = 64010,
        num_max_bpe_tokens: int = 64,
        num_answers: int = 3129,
        seed: int = 0,
        image_path: str | os.PathLike[str] | None = None,
    ):
        if split not in self.SPLIT_FILES:
            raise InputError(f"{self.NAME} has no split {split!r}; there are {', '.join(self.SPLIT_FILES)}")
        table = read_index(
            [Path(data_path) / index_file(name) for name in self.SPLIT_FILES[split]],
            [
                PathField("image_path", data_path if image_path is None else image_path),
                TokenField("text_segment", vocab_size),
                IntListField("labels", num_answers, distinct=True),
                ScoreListField("scores"),
                IntField("qid"),
                *self.further_fields(),
            ],
            how_to_make=self.HOW_TO_MAKE,
            same_length=[("labels", "scores")],
        )
        super().__init__(data_path, table, transform, num_max_bpe_tokens, seed, image_path)
        self.num_answers = num_answers

    def further_fields(self) -> list[Field]:
        """What a line says beside."""
        return []

    def example(self, row: int) -> Item:
        return {
            "image": self.load_image(row),
            "token_ids": self.token_ids(row),
            "labels": torch.from_numpy(self.table["labels"][row].astype(np.int64)),
            "scores": torch.from_numpy(self.table["scores"][row].copy()),
            "question_id": int(self.table["qid"][row]),
            "row": row,
        }

    @property
    def collate(self) -> Callable[[Sequence[Item]], dict[str, Tensor]]:
        """Makes a batch of items, see `collate_vqa`."""
        return functools.partial(collate_vqa, num_answers=self.num_answers, num_max_bpe_tokens=self.num_max_bpe_tokens)


class VQAv2Dataset(QuestionDataset):
    """VQA v2: "train" (vqa.train + vqa.trainable_val), "val" (vqa.rest_val), "test" and "test-dev"."""

    NAME: ClassVar[str] = "VQAv2"
    SPLIT_FILES: ClassVar[Mapping[str, tuple[str, ...]]] = SPLIT_FILES
    HOW_TO_MAKE: ClassVar[str] = (
        'VQAv2Dataset.make_dataset_index(data_path="…", tokenizer=XLMRobertaTokenizer("…/beit3.spm"), '
        'annotation_data_path="…") in a Python shell makes it'
    )

    make_dataset_index = staticmethod(make_dataset_index)


def read_answers(data_path: str | os.PathLike[str]) -> list[str]:
    """The answers of VQAv2 at the index of their label, from `answer2label.txt` in the data folder.

    Raises InputError where the file is missing or names bad lines of it.
    """
    return answers.read_answers(Path(data_path) / answers.ANSWER_FILE)


def collate_vqa(items: Sequence[Item], num_answers: int, num_max_bpe_tokens: int) -> dict[str, Tensor]:
    """A batch of `VQAv2Dataset`.

    Returns what `collate_image_text` does, "targets" float32 (B, answers) in [0, 1] and "question_id" int64 (B,).
    """
    batch = collate_image_text(items, num_max_bpe_tokens)
    batch["targets"] = torch.zeros(len(items), num_answers)
    for target, item in zip(batch["targets"], items, strict=True):
        target[item["labels"]] = item["scores"]
    batch["question_id"] = torch.tensor([item["question_id"] for item in items], dtype=torch.int64)
    return batch
