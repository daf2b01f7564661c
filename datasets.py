"""The data sets: one class per task that makes its index files and reads them, and the order in which rows come.

An index file has one JSON object per line; paths in it are relative to the data folder. What an example is depends on
(seed, epoch, row) alone and the order of rows on (seed, epoch), so that any number of loader workers, and a run that
was resumed, see the same examples in the same order.

    dataset = VQAv2Dataset(data_path, "train", transform, seed=seed)
    sampler = EpochSampler(len(dataset), batch_size, update_freq, rank, world_size, seed)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate, persistent_workers=True, …)
    for epoch in range(epochs):
        dataset.set_epoch(epoch)  # reaches workers that are running already
        sampler.set_epoch(epoch)
        for batch in loader: …
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from beit3 import answers, captioning_index, vqa_index
from beit3.answers import normalize_word
from beit3.errors import BadImageError, InputError
from beit3.index_table import (
    IndexTable,
    IntField,
    IntListField,
    PathField,
    RaggedArray,
    ScoreListField,
    TokenField,
    read_index,
)
from beit3.machine import cores
from beit3.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID

__all__ = [
    "CaptioningDataset",
    "EpochSampler",
    "EvaluationSampler",
    "ImageTextDataset",
    "VQAv2Dataset",
    "build_loader",
    "collate_captions",
    "collate_image_text",
    "collate_vqa",
    "mask_caption",
    "normalize_word",
    "pad_text",
    "read_answers",
]

logger = logging.getLogger(__name__)

# (path, (seed, epoch, row)) → uint8 (3, H, W): decodes the picture and augments it, the same way for the same key.
Transform = Callable[[str, tuple[int, int, int]], Tensor]
Item = dict[str, Any]

MAX_SUBSTITUTES = 10  # where so many pictures drawn at random are bad, the data needs mending
TEXT_MULTIPLE = 8  # batches are as long as their longest text, rounded up: few lengths, friendly to matrix units


class ImageTextDataset(Dataset[Item]):
    """What the data sets share: rows of an index table, their pictures and texts.

    table: has the columns "image_path" and, for `token_ids`, "text_segment". transform: see `Transform`.
    num_max_bpe_tokens: length of the longest text, `<s>` and `</s>` included.
    """

    def __init__(
        self,
        data_path: str | os.PathLike[str],
        table: IndexTable,
        transform: Transform,
        num_max_bpe_tokens: int = 64,
        seed: int = 0,
    ):
        assert num_max_bpe_tokens >= 3, f"{num_max_bpe_tokens} tokens leave no room for text between <s> and </s>"
        self.data_path = os.fspath(data_path)
        self.table, self.transform, self.num_max_bpe_tokens, self.seed = table, transform, num_max_bpe_tokens, seed
        # Training may go on without pictures that cannot be read; evaluation never does.
        self.skip_bad_images = False
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
        """The example of a row; with `skip_bad_images`, that of another row where the picture cannot be read.

        Which row depends on (seed, epoch, row) alone; "bad_images" then counts the pictures passed over.
        """
        self.check_row(row)
        if not self.skip_bad_images:
            return self.example(row)
        # The last number tells this use of the key from that of the picture's augmentation.
        others = np.random.default_rng([self.seed, self.epoch, row, 2]).integers(len(self), size=MAX_SUBSTITUTES)
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
        """The distinct pictures, relative to the data folder."""
        texts = self.table["image_path"].texts
        return [texts[number].tobytes().decode() for number in range(len(texts))]

    def load_image(self, row: int, column: str = "image_path") -> Tensor:
        """The transformed picture of a row, uint8 (3, H, W). Raises BadImageError naming file, row and index line."""
        path = os.path.join(self.data_path, self.table[column][row])
        try:
            return self.transform(path, (self.seed, self.epoch, row))
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


class VQAv2Dataset(ImageTextDataset):
    """Questions about COCO pictures with soft-scored answers (VQA v2).

    An item is a dict: "image" uint8 (3, H, W); "token_ids" int64 (T,), see `token_ids`; "labels" int64 (A,) and
    "scores" float32 (A,), the answers given and their scores in [0, 1], both empty in the test splits; "question_id";
    "row".

    split: "train" (vqa.train + vqa.trainable_val), "val" (vqa.rest_val), "test" or "test-dev".
    vocab_size: rows of the model's text embedding. num_answers: outputs of the model's head.
    Raises InputError listing the bad lines of the index, each with file and line.
    """

    SPLIT_FILES = {  # noqa: RUF012  never changed
        "train": ("train", "trainable_val"),
        "val": ("rest_val",),
        "test": ("test",),
        "test-dev": ("test-dev",),
    }

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
    ):
        if split not in self.SPLIT_FILES:
            raise InputError(f"VQAv2 has no split {split!r}; there are {', '.join(self.SPLIT_FILES)}")
        table = read_index(
            [Path(data_path) / vqa_index.index_file(name) for name in self.SPLIT_FILES[split]],
            [
                PathField("image_path", data_path),
                TokenField("text_segment", vocab_size),
                IntListField("labels", num_answers, distinct=True),
                ScoreListField("scores"),
                IntField("qid"),
            ],
            how_to_make='VQAv2Dataset.make_dataset_index(data_path="…", tokenizer=XLMRobertaTokenizer("…/beit3.spm"), '
            'annotation_data_path="…") in a Python shell makes it',
            same_length=[("labels", "scores")],
        )
        super().__init__(data_path, table, transform, num_max_bpe_tokens, seed)
        self.num_answers = num_answers

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

    @staticmethod
    def make_dataset_index(
        data_path: str | os.PathLike[str],
        tokenizer: Any,
        annotation_data_path: str | os.PathLike[str],
        seed: int = 0,
        progress: bool | None = None,
    ) -> None:
        """Write the index files of VQAv2 into `data_path`, all or none of them.

            VQAv2Dataset.make_dataset_index(
                data_path="…", tokenizer=XLMRobertaTokenizer("…/beit3.spm"), annotation_data_path="…")

        data_path: holds the COCO pictures in `train2014/`, `val2014/`, `test2015/`; only pictures that are there are
        indexed. tokenizer: see `beit3.tokenizer.as_batch_encoder`; the path of beit3.spm does as well.
        annotation_data_path: holds the six official files, unpacked. seed: decides which 1000 validation pictures
        are kept for validation (`vqa.rest_val`); the questions of the others are training data
        (`vqa.trainable_val`). progress: show a bar; None: on a terminal only.

        Writes `vqa.{train,val,trainable_val,rest_val,test,test-dev}.jsonl` and `answer2label.txt`, and prints what
        was written and what left out. Raises InputError listing what is missing or wrong; nothing is written then.
        """
        vqa_index.make_vqa_index(data_path, tokenizer, annotation_data_path, seed, progress)


class CaptioningDataset(ImageTextDataset):
    """Pictures with captions to fill in ("train"), or pictures to caption ("val", "test").

    An item is a dict: "image" uint8 (3, H, W); "image_id"; "row". In training also three lists with an entry per
    caption, int64 (T,), int64 (T,) and bool (T,): "token_ids", see `token_ids`; "masked_ids", the same with some
    tokens hidden, see `mask_caption`; "language_masked_pos", True where. What is hidden depends on (seed, epoch, line
    of the caption), and how the picture is augmented on (seed, epoch, line of the item's first caption).

    source: "coco_captioning" or "nocaps" (which has no training split of its own).
    vocab_size, mask_id: of the tokenizer; by default its last id is `<mask>`. mask_prob: share of a caption's tokens
    that are hidden, 0-1. captions_per_image: a row is a picture with up to that many of its captions, each caption in
    one row; 1: a row is a line of the index.
    Raises InputError listing the bad lines of the index, each with file and line.
    """

    SPLITS = {  # noqa: RUF012  never changed
        captioning_index.COCO: captioning_index.SPLITS,
        captioning_index.NOCAPS: tuple(captioning_index.NOCAPS_FILES),
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
    ):
        if split not in self.SPLITS[source]:
            raise InputError(f"{source} has no split {split!r}; there are {', '.join(self.SPLITS[source])}")
        maker = {
            captioning_index.COCO: 'make_coco_captioning_dataset_index(data_path="…", '
            'tokenizer=XLMRobertaTokenizer("…/beit3.spm"))',
            captioning_index.NOCAPS: 'make_nocaps_captioning_dataset_index(data_path="…")',
        }
        self.has_text = split == "train"
        table = read_index(
            [Path(data_path) / captioning_index.index_file(source, split)],
            [
                PathField("image_path", data_path),
                TokenField("text_segment", vocab_size, optional=not self.has_text),
                IntField("image_id"),
            ],
            how_to_make=f"CaptioningDataset.{maker[source]} in a Python shell makes it",
        )
        super().__init__(data_path, table, transform, num_max_bpe_tokens, seed)
        self.vocab_size, self.mask_prob = vocab_size, mask_prob
        self.mask_id = vocab_size - 1 if mask_id is None else mask_id
        self.lines = None  # of the index that belong to each row; None: line and row are the same
        if self.has_text and captions_per_image > 1:
            self.lines = _lines_by_picture(table["image_path"].numbers, captions_per_image)

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
        rng = np.random.default_rng([self.seed, self.epoch, line, 1])
        return mask_caption(token_ids, self.mask_prob, self.mask_id, self.vocab_size, rng)

    @property
    def collate(self) -> Callable[[Sequence[Item]], dict[str, Tensor]]:
        """Makes a batch of items, see `collate_captions`."""
        return functools.partial(collate_captions, num_max_bpe_tokens=self.num_max_bpe_tokens)

    @staticmethod
    def make_coco_captioning_dataset_index(
        data_path: str | os.PathLike[str], tokenizer: Any, progress: bool | None = None
    ) -> None:
        """Write the index files of COCO captioning into `data_path`, all or none of them.

            CaptioningDataset.make_coco_captioning_dataset_index(
                data_path="…", tokenizer=XLMRobertaTokenizer("…/beit3.spm"))

        data_path: holds Karpathy's `dataset_coco.json` and the COCO pictures in `train2014/` and `val2014/`; only
        pictures that are there are indexed. tokenizer: see `beit3.tokenizer.as_batch_encoder`; the path of beit3.spm
        does as well. progress: show a bar; None: on a terminal only.

        Writes `coco_captioning.{train,val,test}.jsonl` and, for the scores, the captions people wrote as
        `coco_captioning.{val,test}.references.json` in COCO's format; prints what was written and what left out.
        Raises InputError listing what is missing or wrong; nothing is written then.
        """
        captioning_index.make_coco_captioning_index(data_path, tokenizer, progress)

    @staticmethod
    def make_nocaps_captioning_dataset_index(data_path: str | os.PathLike[str], progress: bool | None = None) -> None:
        """Write the index files of nocaps, `nocaps.{val,test}.jsonl`, into `data_path`, both or none.

        data_path: holds `nocaps_val_4500_captions.json`, `nocaps_test_image_info.json` and the pictures in `val/` and
        `test/`. Otherwise as `make_coco_captioning_dataset_index`, which makes the training data.
        """
        captioning_index.make_nocaps_index(data_path, progress)


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


def read_answers(data_path: str | os.PathLike[str]) -> list[str]:
    """The answers of VQAv2 at the index of their label, from `answer2label.txt` in the data folder.

    Raises InputError where the file is missing or names bad lines of it.
    """
    return answers.read_answers(Path(data_path) / answers.ANSWER_FILE)


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


def collate_image_text(items: Sequence[Item], num_max_bpe_tokens: int) -> dict[str, Tensor]:
    """The part of a batch that all tasks on pictures and texts share.

    Returns "image" uint8 (B, 3, H, W); "token_ids" int64 and "padding_mask" bool (B, T), see `pad_text`; "row" int64
    (B,).
    """
    token_ids, padding_mask = pad_text([item["token_ids"] for item in items], num_max_bpe_tokens)
    return {
        "image": torch.stack([item["image"] for item in items]),
        "token_ids": token_ids,
        "padding_mask": padding_mask,
        "row": torch.tensor([item["row"] for item in items], dtype=torch.int64),
    }


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


def collate_captions(items: Sequence[Item], num_max_bpe_tokens: int) -> dict[str, Tensor]:
    """A batch of `CaptioningDataset`.

    Returns "image" uint8 (B, 3, H, W); "image_id" and "row" int64 (B,). In training also, for B*N texts, those of
    picture i in rows i*N … i*N+N-1 (N: the most captions that an item has; a row of nothing but padding stands for one
    that is not there): "token_ids" and "masked_ids" int64 (B*N, T), "padding_mask" and "language_masked_pos" bool
    (B*N, T); "masked_index" int64 (n,), the masked positions as numbers in the flattened texts, and "targets" int64
    (n,), the tokens that belong there.
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
    batch["language_masked_pos"] = torch.zeros_like(batch["padding_mask"])
    for number, item in enumerate(items):
        for text, positions in enumerate(item["language_masked_pos"], start=number * most):
            batch["language_masked_pos"][text, : len(positions)] = positions
    batch["masked_index"] = batch["language_masked_pos"].flatten().nonzero().squeeze(1)
    batch["targets"] = batch["token_ids"].flatten()[batch["masked_index"]]
    return batch


class EpochSampler(Sampler[list[int]]):
    """The batches of one process in training; give it to the loader as `batch_sampler`.

    The order of rows is a permutation by (seed, epoch) alone. An optimizer step takes the next `global_batch` =
    batch_size * update_freq * world_size rows of it; of these, micro batch u is the u-th stretch of
    world_size * batch_size rows, and each process takes its own batch_size of the stretch. Rows that do not fill a
    step are left out, others in each epoch. So a run on another number of processes with the same global batch takes
    the same steps.

    Raises InputError where the rows do not fill one step.
    """

    def __init__(self, num_rows: int, batch_size: int, update_freq: int, rank: int, world_size: int, seed: int):
        assert 0 <= rank < world_size and batch_size > 0 and update_freq > 0
        self.num_rows, self.batch_size, self.update_freq = num_rows, batch_size, update_freq
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.global_batch = batch_size * update_freq * world_size
        if num_rows < self.global_batch:
            raise InputError(
                f"the training data has {num_rows} rows, one optimizer step takes {self.global_batch} (batch_size "
                f"{batch_size} * update_freq {update_freq} * {world_size} processes); lower batch_size or update_freq"
            )
        self.steps_per_epoch = num_rows // self.global_batch
        self.epoch = self.start_step = 0

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch of the next iteration, and the optimizer step in it to begin with (when resuming)."""
        assert 0 <= start_step <= self.steps_per_epoch, f"step {start_step} of {self.steps_per_epoch}"
        self.epoch, self.start_step = epoch, start_step

    def order(self) -> np.ndarray:
        """All rows in the order of this epoch, (num_rows,)."""
        return np.random.default_rng([self.seed, self.epoch]).permutation(self.num_rows)

    def __len__(self) -> int:
        """Batches of the next iteration: `update_freq` per optimizer step."""
        return (self.steps_per_epoch - self.start_step) * self.update_freq

    def __iter__(self) -> Iterator[list[int]]:
        used = self.order()[: self.steps_per_epoch * self.global_batch]
        # (micro batches of the epoch, processes, rows)
        mine = used.reshape(-1, self.world_size, self.batch_size)[:, self.rank]
        for rows in mine[self.start_step * self.update_freq :]:
            yield rows.tolist()


class EvaluationSampler(Sampler[list[int]]):
    """The batches of one process in evaluation: rows rank, rank + world_size, … in order.

    Over all processes each row comes exactly once. The last batch may be smaller, and a process may have fewer rows
    than others or none.
    """

    def __init__(self, num_rows: int, batch_size: int, rank: int, world_size: int):
        assert 0 <= rank < world_size and batch_size > 0
        self.rows, self.batch_size = range(rank, num_rows, world_size), batch_size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.rows), self.batch_size):
            yield list(self.rows[start : start + self.batch_size])


def _collate(collate: Callable[[Sequence[Item]], dict[str, Tensor]], items: Sequence[Item]) -> dict[str, Any]:
    batch: dict[str, Any] = collate(items)
    if "bad_images" in items[0]:
        batch["bad_images"] = sum(item["bad_images"] for item in items)
    return batch


class _Loader(DataLoader[dict[str, Any]]):
    """A loader whose workers are deaf to Ctrl-C and SIGTERM, from their first moment on.

    Launchers and terminals send signals to all processes; when to stop is for the process that trains to say.
    """

    def __iter__(self) -> Any:
        held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))  # which a worker inherits
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)


def build_loader(
    dataset: ImageTextDataset,
    sampler: EpochSampler | EvaluationSampler,
    num_workers: int,
    pin_memory: bool,
    timeout_seconds: float = 1800,
) -> DataLoader[dict[str, Any]]:
    """Batches of one process in the order of `sampler`.

    num_workers: processes that load pictures; they live through all epochs. No more are started than there are
    batches, or cores to run on. pin_memory: page-locked batches, copied to a GPU while it computes. timeout_seconds: a
    worker that brings nothing for so long is an error (RuntimeError), as is one that died.
    """
    num_workers = min(num_workers, len(sampler), cores())
    return _Loader(
        dataset,
        batch_sampler=sampler,
        collate_fn=functools.partial(_collate, dataset.collate),
        num_workers=num_workers,
        timeout=timeout_seconds if num_workers else 0,
        # Where it can be had: forked workers share the rows of the data set, others get copies.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
    )
