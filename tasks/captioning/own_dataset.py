"""The data set of people's own captions: that of COCO with weights, under file names of its own."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from beit3.data.image_text import Item
from beit3.data.index_table import Field, FloatField
from sources.making import make_from_python
from sources.rows import SPLITS
from tasks.captioning.dataset import CaptioningDataset, collate_captions
from tasks.captioning.index import OWN
from tasks.captioning.own_index import KIND
from tasks.captioning.own_settings import OwnCaptioningSettings


class CaptionDataset(CaptioningDataset):
    """Pictures of people's own with captions to fill in ("train"), or to caption ("val", "test").

    In training an item has "weights" besides, float32 (N,), one per caption, where any caption's is not 1.
    """

    SPLITS: ClassVar[Mapping[str, tuple[str, ...]]] = {OWN: SPLITS}
    MAKERS: ClassVar[Mapping[str, str]] = {
        OWN: 'CaptionDataset.make_dataset_index(train="table.csv", data_path="…", tokenizer="…/beit3.spm")'
    }

    def __init__(self, *parts: Any, source: str = OWN, **options: Any):
        super().__init__(*parts, source=source, **options)
        weights: np.ndarray = self.table["weight"]
        self.weights = weights if self.has_text and (weights != 1).any() else None

    def further_fields(self) -> list[Field]:
        return [FloatField("weight", default=1.0)]

    def example(self, row: int) -> Item:
        item = super().example(row)
        if self.weights is not None:
            item["weights"] = torch.from_numpy(self.weights[[row] if self.lines is None else self.lines[row]])
        return item

    @property
    def collate(self) -> Callable[[Sequence[Item]], dict[str, Tensor]]:
        return functools.partial(_collate, num_max_bpe_tokens=self.num_max_bpe_tokens)

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
        """Write the index files of own captions, all or none of them.

            CaptionDataset.make_dataset_index(train="captions.csv", image_path="photos", tokenizer="beit3.spm")

        The arguments are those of `VQADataset.make_dataset_index`, without those about answers. Writes
        `captioning.{train,val,test}.jsonl` and, where captions are known, `captioning.{val,test}.references.json`,
        which scores compare with. Raises InputError listing all that is wrong; nothing is written then.
        """
        splits = {"train": train, "val": val, "test": test}
        make_from_python(KIND, OwnCaptioningSettings, tokenizer, data_path, image_path, progress, **splits, **choices)


def _collate(items: Sequence[Item], num_max_bpe_tokens: int) -> dict[str, Tensor]:
    """What `collate_captions` gives, and where items have weights "token_weight" float32 (n,), those of the captions
    that the n hidden tokens belong to."""
    batch = collate_captions(items, num_max_bpe_tokens)
    if "weights" in items[0]:
        most = max(len(item["weights"]) for item in items)
        of_text = torch.zeros(len(items) * most)
        for number, item in enumerate(items):
            of_text[number * most : number * most + len(item["weights"])] = item["weights"]
        batch["token_weight"] = of_text[batch["masked_index"] // batch["masked_ids"].shape[1]]
    return batch
