"""The data set of captioning: pictures with partly hidden captions to learn from, or pictures to caption."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from beit3.data.image_text import CAPTION_MASK, ImageTextDataset, Item, Transform, pad_text
from beit3.data.index_table import Field, IntField, PathField, RaggedArray, TokenField, read_index
from beit3.data.tokenizer import UNK_ID
from beit3.system.errors import InputError
from tasks.captioning import index as captioning_index


class CaptioningDataset(ImageTextDataset):
    """Pictures with captions to fill in ("train"), or pictures to caption ("val", "test").

    An item is a dict: "image" uint8 (3, H, W); "image_id"; "row". In training also three lists with an entry per
    caption, int64 (T,), int64 (T,) and bool (T,): "token_ids", see `token_ids`; "masked_ids", the same with some
    tokens hidden, see `mask_caption`; "language_masked_pos", True where. What is hidden depends on (seed, epoch, line
    of the caption), and how the picture is augmented on (seed, epoch, line of the item's first caption).

    source: "coco_captioning" or "nocaps" (which has no training split of its own).
    vocab_size, mask_id: of the tokenizer; by default its last id is `<mask>`. mask_prob: share of a caption's tokens
    that are hidden, 0-1. captions_per_image: a row is a picture with up to that many of its captions, each caption in
    one row; 1: a row is a line of the index. image_path: holds the pictures; None: data_path does.
    Raises InputError listing the bad lines of the index, each with file and line.
    """

    SPLITS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        captioning_index.COCO: captioning_index.COCO_SPLITS,
        captioning_index.NOCAPS: tuple(captioning_index.NOCAPS_FILES),
    }
    MAKERS: ClassVar[Mapping[str, str]] = {
        captioning_index.COCO: 'CaptioningDataset.make_coco_captioning_dataset_index(data_path="…", '
        'tokenizer=XLMRobertaTokenizer("…/beit3.spm"))',
        captioning_index.NOCAPS: 'CaptioningDataset.make_nocaps_captioning_dataset_index(data_path="…")',
    }

    def __init__(
        self,
        data_path: str | os.PathLike[str],
        split: str,
        transform: Transform,
        *,
        source: str = captioning_index.COCO,
        vocab_size: int = 64002,
        mask_id: int | None = None,
        num_max_bpe_tokens: int = 64,
        mask_prob: float = 0.6,
        captions_per_image: int = 1,
        seed: int = 0,
        image_path: str | os.PathLike[str] | None = None,
    ):
        if split not in self.SPLITS[source]:
            raise InputError(f"{source} has no split {split!r}; there are {', '.join(self.SPLITS[source])}")
        self.has_text = split == "train"
        table = read_index(
            [Path(data_path) / captioning_index.index_file(source, split)],
            [
                PathField("image_path", data_path if image_path is None else image_path),
                TokenField("text_segment", vocab_size, optional=not self.has_text),
                IntField("image_id"),
                *self.further_fields(),
            ],
            how_to_make=f"{self.MAKERS[source]} in a Python shell makes it",
        )
        super().__init__(data_path, table, transform, num_max_bpe_tokens, seed, image_path)
        self.vocab_size, self.mask_prob = vocab_size, mask_prob
        self.mask_id = vocab_size - 1 if mask_id is None else mask_id
        self.lines = None  # of the index that belong to each row; None: line and row are the same
        if self.has_text and captions_per_image > 1:
            self.lines = _lines_by_picture(table["image_path"].numbers, captions_per_image)

    def further_fields(self) -> list[Field]:
        """What a line says beside."""
        return []

    def __len__(self) -> int:
        return len(self.table) if self.lines is None else len(self.lines)

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + (0 if self.lines is None else self.lines.nbytes)

    def place(self, row: int) -> str:
        return self.table.place(row if self.lines is None else int(self.lines[row][0]))

    def example(self, row: int) -> Item:
        lines = [row] if self.lines is None else self.lines[row].tolist()
        item: Item = {"image": self.load_image(lines[0]), "image_id": int(self.table["image_id"][lines[0]]), "row": row}
        if self.has_text:
            item["token_ids"] = [self.token_ids(line) for line in lines]
            masked = [self._mask(line, ids) for line, ids in zip(lines, item["token_ids"], strict=True)]
            item["masked_ids"], item["language_masked_pos"] = map(list, zip(*masked, strict=True))
        return item

    def _mask(self, line: int, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        # The last number tells this use of the key from that of the picture's augmentation.
        rng = np.random.default_rng([self.seed, self.epoch, line, CAPTION_MASK])
        return mask_caption(token_ids, self.mask_prob, self.mask_id, self.vocab_size, rng)

    @property
    def collate(self) -> Callable[[Sequence[Item]], dict[str, Tensor]]:
        """Makes a batch of items, see `collate_captions`."""
        return functools.partial(collate_captions, num_max_bpe_tokens=self.num_max_bpe_tokens)

    make_coco_captioning_dataset_index = staticmethod(captioning_index.make_coco_captioning_dataset_index)
    make_nocaps_captioning_dataset_index = staticmethod(captioning_index.make_nocaps_captioning_dataset_index)


def _lines_by_picture(pictures: np.ndarray, most: int) -> RaggedArray:
    """Lines (rows,) of the same picture in groups of up to `most`, pictures in order of first appearance."""
    order = np.argsort(pictures, kind="stable")  # pictures are numbered as they first appear
    starts_picture = np.diff(pictures[order], prepend=-1) != 0
    first = np.flatnonzero(starts_picture)
    place = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))  # among the picture's lines
    return RaggedArray(order.astype(np.int32), np.append(np.flatnonzero(place % most == 0), len(order)))


def mask_caption(
    token_ids: Tensor, mask_prob: float, mask_id: int, vocab_size: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Hide tokens of a caption, for the model to fill in.

    Of n tokens, max(1, min(round(n * mask_prob), n - 1)) are chosen, `<s>` never. A chosen token becomes `<mask>` with
    probability 0.8, stays itself with 0.1, and becomes a random id from `<unk>` on with 0.1 (as in BERT).

    token_ids: int64 (n,), `<s>` and `</s>` included. Returns the ids after hiding, (n,), and bool (n,), True = chosen.
    """
    n = len(token_ids)
    count = max(1, min(int(n * mask_prob + 0.5), n - 1))
    chosen = 1 + rng.permutation(n - 1)[:count]
    chance, random_ids = rng.random(count), rng.integers(UNK_ID, vocab_size, count)
    hidden = token_ids.numpy().copy()
    hidden[chosen] = np.where(chance < 0.8, mask_id, np.where(chance < 0.9, hidden[chosen], random_ids))
    language_masked_pos = np.zeros(n, bool)
    language_masked_pos[chosen] = True
    return torch.from_numpy(hidden), torch.from_numpy(language_masked_pos)


def collate_captions(items: Sequence[Item], num_max_bpe_tokens: int) -> dict[str, Tensor]:
    """A batch of `CaptioningDataset`.

    Returns "image" uint8 (B, 3, H, W); "image_id" and "row" int64 (B,). In training also, for B*N texts, those of
    picture i in rows i*N … i*N+N-1 (N: the most captions that an item has; a row of nothing but padding stands for one
    that is not there): "token_ids" and "masked_ids" int64 (B*N, T), "padding_mask" bool (B*N, T); "masked_index"
    int64 (n,), the masked positions as numbers in the flattened texts, and "targets" int64 (n,), the tokens that belong
    there.
    """
    batch = {
        "image": torch.stack([item["image"] for item in items]),
        "image_id": torch.tensor([item["image_id"] for item in items], dtype=torch.int64),
        "row": torch.tensor([item["row"] for item in items], dtype=torch.int64),
    }
    if "token_ids" not in items[0]:
        return batch
    most = max(len(item["token_ids"]) for item in items)
    nothing = [torch.empty(0, dtype=torch.int64)] * most
    texts, masked = (
        [text for item in items for text in (item[key] + nothing)[:most]] for key in ("token_ids", "masked_ids")
    )
    batch["token_ids"], batch["padding_mask"] = pad_text(texts, num_max_bpe_tokens)
    batch["masked_ids"], _ = pad_text(masked, num_max_bpe_tokens)
    chosen = torch.zeros_like(batch["padding_mask"])  # True = hidden
    for number, item in enumerate(items):
        for text, positions in enumerate(item["language_masked_pos"], start=number * most):
            chosen[text, : len(positions)] = positions
    batch["masked_index"] = chosen.flatten().nonzero().squeeze(1)
    batch["targets"] = batch["token_ids"].flatten()[batch["masked_index"]]
    return batch
