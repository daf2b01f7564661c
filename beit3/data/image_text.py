"""What the data sets of pictures and texts share: rows of an index table, their pictures, their texts, batches of them.

What an example is depends on (seed, epoch, row) alone, so that any number of loader workers, and a run that was
resumed, see the same examples.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from beit3.data.index_table import IndexTable
from beit3.data.tokenizer import BOS_ID, EOS_ID, PAD_ID
from beit3.system.errors import BadImageError

logger = logging.getLogger(__name__)

# (path, key) → uint8 (3, H, W): decodes the picture and augments it, the same way for the same key.
Transform = Callable[[str, tuple[int, ...]], Tensor]
Item = dict[str, Any]

MAX_SUBSTITUTES = 10  # where so many pictures drawn at random are bad, the data needs mending
# The last number of a key (seed, epoch, row, use) tells what is drawn: none for a row's first picture.
CAPTION_MASK, SUBSTITUTE, FURTHER_PICTURE = 1, 2, 3
TEXT_MULTIPLE = 8  # batches are as long as their longest text, rounded up: few lengths, friendly to matrix units


class ImageTextDataset(Dataset[Item]):
    """What the data sets share: rows of an index table, their pictures and texts.

    table: has the columns "image_path" and, for `token_ids`, "text_segment". transform: see `Transform`.
    num_max_bpe_tokens: length of the longest text, `<s>` and `</s>` included. image_path: the folder that the pictures'
    paths start from; None: data_path.
    """

    picture_columns: ClassVar[tuple[str, ...]] = ("image_path",)  # of the table

    def __init__(
        self,
        data_path: str | os.PathLike[str],
        table: IndexTable,
        transform: Transform,
        num_max_bpe_tokens: int = 64,
        seed: int = 0,
        image_path: str | os.PathLike[str] | None = None,
    ):
        assert num_max_bpe_tokens >= 3, f"{num_max_bpe_tokens} tokens leave no room for text between <s> and </s>"
        self.data_path = os.fspath(data_path)
        self.image_path = self.data_path if image_path is None else os.fspath(image_path)
        self.table, self.transform, self.num_max_bpe_tokens, self.seed = table, transform, num_max_bpe_tokens, seed
        # Training may pass over pictures that cannot be read; evaluation tells of them when it has seen all others.
        self.skip_bad_images = self.report_bad_images = False
        # In shared memory: workers that live through many epochs see the number change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.table)

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take; the arrays are never written to, so forked workers share them."""
        return self.table.nbytes

    @property
    def digest(self) -> str:
        """SHA-256 of the index files read, in hexadecimal: tells whether a resumed run has the same data."""
        return self.table.digest

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the transform's key names, in loader workers too. Call it between two epochs."""
        self._epoch.fill_(epoch)

    def __getitem__(self, row: int) -> Item:
        """The example of a row; where its picture cannot be read, BadImageError.

        With `report_bad_images` instead nothing but "unreadable", which says why. With `skip_bad_images` the example of
        another row, which depends on (seed, epoch, row) alone; "bad_images" then counts the pictures passed over.
        """
        self.check_row(row)
        if self.report_bad_images:
            try:
                return self.example(row)
            except BadImageError as error:
                return {"unreadable": str(error)}
        if not self.skip_bad_images:
            return self.example(row)
        rng = np.random.default_rng([self.seed, self.epoch, row, SUBSTITUTE])
        others = rng.integers(len(self), size=MAX_SUBSTITUTES)
        for tries, candidate in enumerate([row, *others.tolist()]):
            try:
                return {**self.example(candidate), "bad_images": tries}
            except BadImageError as error:
                last = error
                logger.warning("%s; another row takes its place", error)
        raise last

    def example(self, row: int) -> Item:
        """What a row holds, its picture decoded and transformed. Raises BadImageError."""
        raise NotImplementedError

    def place(self, row: int) -> str:
        """`file:line` of the index that a row comes from."""
        return self.table.place(row)

    @property
    def collate(self) -> Callable[[Sequence[Item]], dict[str, Tensor]]:
        """Makes a batch of items; for the loader. A task whose items hold more than pictures and texts has its own."""
        return functools.partial(collate_image_text, num_max_bpe_tokens=self.num_max_bpe_tokens)

    def image_paths(self) -> list[str]:
        """The distinct pictures, relative to `image_path`."""
        columns = [self.table[name].texts for name in self.picture_columns]
        return list(dict.fromkeys(text.tobytes().decode() for texts in columns for text in texts))

    def load_image(self, row: int, number: int = 0) -> Tensor:
        """The transformed picture of a row, uint8 (3, H, W). Raises BadImageError naming file, row and index line.

        number: of the picture in its row, see `picture_columns`; the pictures of a row are drawn for independently.
        """
        path = os.path.join(self.image_path, self.table[self.picture_columns[number]][row])
        key = (self.seed, self.epoch, row)
        try:
            return self.transform(path, key if number == 0 else (*key, FURTHER_PICTURE, number))
        except Exception as error:  # whatever decoders throw, and the transform belongs to the caller
            reason = str(error) if path in str(error) else f"{path}: {error or type(error).__name__}"
            raise BadImageError(f"{reason} (row {row}, {self.table.place(row)})") from error

    def token_ids(self, row: int) -> Tensor:
        """`<s>`, the text of a row, `</s>`: int64 (T,), cut to `num_max_bpe_tokens`, not padded."""
        text = self.table["text_segment"][row][: self.num_max_bpe_tokens - 2]
        ids = np.empty(len(text) + 2, np.int64)
        ids[0], ids[1:-1], ids[-1] = BOS_ID, text, EOS_ID
        return torch.from_numpy(ids)

    def check_row(self, row: int) -> None:
        """Raise IndexError outside of 0 … len - 1; flat arrays would answer with something wrong."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a data set with {len(self)} rows")


def pad_text(token_ids: Sequence[Tensor], num_max_bpe_tokens: int) -> tuple[Tensor, Tensor]:
    """Texts of different lengths as one batch.

    token_ids: int64 (T_i,) each, at most `num_max_bpe_tokens` long. Returns ids (B, T) int64, filled up with `<pad>`,
    and padding_mask (B, T) bool, True = padding. T is the longest T_i rounded up to a multiple of 8, or
    `num_max_bpe_tokens` where that is less.
    """
    longest = max(len(ids) for ids in token_ids)
    assert longest <= num_max_bpe_tokens, f"a text of {longest} tokens where {num_max_bpe_tokens} is the most"
    width = min(-(-longest // TEXT_MULTIPLE) * TEXT_MULTIPLE, num_max_bpe_tokens)
    padded = torch.full((len(token_ids), width), PAD_ID, dtype=torch.int64)
    padding_mask = torch.ones((len(token_ids), width), dtype=torch.bool)
    for row, ids in enumerate(token_ids):
        padded[row, : len(ids)] = ids
        padding_mask[row, : len(ids)] = False
    return padded, padding_mask


def collate_image_text(items: Sequence[Item], num_max_bpe_tokens: int = 0) -> dict[str, Tensor]:
    """The part of a batch that all tasks share.

    Returns "image" uint8 (B, 3, H, W); "row" int64 (B,); for items with texts also "token_ids" int64 and "padding_mask"
    bool (B, T), see `pad_text`, which `num_max_bpe_tokens` is for.
    """
    batch = {
        "image": torch.stack([item["image"] for item in items]),
        "row": torch.tensor([item["row"] for item in items], dtype=torch.int64),
    }
    if "token_ids" in items[0]:
        batch["token_ids"], batch["padding_mask"] = pad_text([item["token_ids"] for item in items], num_max_bpe_tokens)
    return batch
