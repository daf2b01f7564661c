"""The order in which rows come, and the loader that brings them: the same for any number of workers.

dataset = VQAv2Dataset(data_path, "train", transform, seed=seed)
sampler = EpochSampler(len(dataset), batch_size, update_freq, rank, world_size, seed)
loader = build_loader(dataset, sampler, num_workers=4, pin_memory=True)
for epoch in range(epochs):
    dataset.set_epoch(epoch)  # reaches workers that are running already
    sampler.set_epoch(epoch)
    for batch in loader: …
"""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from beit3.data.image_text import ImageTextDataset, Item
from beit3.system.errors import InputError
from beit3.system.machine import cores


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
    """A batch of the items that could be read; what was wrong with the others is its "unreadable"."""
    unreadable = [item["unreadable"] for item in items if "unreadable" in item]
    if unreadable:
        items = [item for item in items if "unreadable" not in item]
    batch: dict[str, Any] = collate(items) if items else {}
    if unreadable:
        batch["unreadable"] = unreadable
    elif "bad_images" in items[0]:
        batch["bad_images"] = sum(item["bad_images"] for item in items)
    return batch


class DeafLoader(DataLoader[dict[str, Any]]):
    """A loader whose workers are deaf to Ctrl-C, SIGTERM and SIGHUP, from their first moment on.

    Launchers and terminals send signals to all processes; when to stop is for the process that trains to say.
    """

    def __iter__(self) -> Any:
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        held = signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # which a worker inherits
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
    return DeafLoader(
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
