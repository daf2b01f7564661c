"""One epoch of training, and evaluation. Names no task: a task is known by its contract (`tasks.base`) alone."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import utils
from beit3.backends import Backend
from beit3.ema import ModelEma
from beit3.images import normalize
from datasets import EpochSampler, ImageTextDataset
from optim_factory import set_learning_rate
from tasks import Record, Task

logger = logging.getLogger(__name__)

# Reading a value from the device waits for all its work; so values are read once in that many steps.
READ_EVERY = 20


class Progress:
    """A bar on a terminal, a plain line now and then in a file; silent on all processes but the first."""

    def __init__(self, what: str, total: int, is_main: bool, done: int = 0, seconds_between_lines: float = 30) -> None:
        self.what, self.total, self.done = what, total, done
        self.seconds_between_lines = seconds_between_lines
        self.started = self.last_line = time.monotonic()
        self.first = done
        on_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc=what, dynamic_ncols=True) if is_main and on_terminal else None
        self.lines = is_main and not on_terminal

    def advance(self, text: str = "") -> None:
        self.done += 1
        if self.bar is not None:
            if text:
                self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif self.lines and text and time.monotonic() - self.last_line >= self.seconds_between_lines:
            self.last_line = time.monotonic()
            left = (self.last_line - self.started) / max(self.done - self.first, 1) * (self.total - self.done)
            logger.info("%s %d/%d  %s  %s left", self.what, self.done, self.total, text, _duration(left))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@dataclass
class Statistics:
    """Sums of per-step values, kept on the device and read rarely."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Means so far on this process. Waits for the device."""
        if not self.steps:
            return {}
        values = torch.stack(list(self.sums.values())).cpu() / self.steps
        return dict(zip(self.sums, values.tolist(), strict=True))


def prepare(batch: Mapping[str, Tensor], task: Task, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch on the device, its uint8 pictures (B, 3, H, W) normalised there."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    for name, value in moved.items():
        if value.dtype == torch.uint8 and value.ndim == 4:
            moved[name] = normalize(value, task.image_mean, task.image_std, dtype)
    return moved


@dataclass
class TrainingRun:
    """What stays the same over the epochs of a run.

    Attributes:
        dataset, sampler, loader: of the training pictures; the loader reads the dataset in the sampler's order.
        schedule: learning rate of every step of the whole run.
        update_freq: micro batches per step.
        seed: with the step and the process, decides what drop path draws.
    """

    task: Task
    backend: Backend
    process: utils.Process
    dataset: ImageTextDataset
    sampler: EpochSampler
    loader: DataLoader
    schedule: Sequence[float]
    update_freq: int
    seed: int
    ema: ModelEma | None = None
    writer: Any = None


def train_one_epoch(run: TrainingRun, epoch: int, steps_per_epoch: int) -> dict[str, float]:
    """Train for the steps of one epoch.

    Returns:
        Means over the epoch and all processes (loss, …), the last learning rate, and images per second.

    Raises:
        FloatingPointError: the loss or the gradient is no number any more.
    """
    backend, process = run.backend, run.process
    backend.model.train()
    run.dataset.set_epoch(epoch)
    run.sampler.set_epoch(epoch)
    progress = Progress(f"epoch {epoch}", steps_per_epoch, process.is_main)
    epoch_statistics, recent = Statistics(), Statistics()
    batches = iter(run.loader)
    started = last_read = time.monotonic()
    images, text = 0, ""
    for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
        set_learning_rate(backend.optimizer, run.schedule[step])
        values, images_of_step = _optimizer_step(run, batches, step)
        images += images_of_step * process.world_size
        epoch_statistics.add(values)
        recent.add(values)
        if recent.steps == READ_EVERY or step + 1 == (epoch + 1) * steps_per_epoch:
            means = recent.read()
            _stop_if_not_finite(means, step, recent.steps)
            rate = recent.steps * images_of_step * process.world_size / (time.monotonic() - last_read)
            text = _progress_text(means, run.schedule[step], rate)
            if run.writer is not None:
                for name, value in {**means, "lr": run.schedule[step], "images_per_second": rate}.items():
                    run.writer.add_scalar(f"train/{name}", value, step)
            recent, last_read = Statistics(), time.monotonic()
        progress.advance(text)
    progress.close()
    means = _mean_over_processes(epoch_statistics.read())
    return {**means, "lr": run.schedule[step], "images_per_second": images / (time.monotonic() - started)}


def _optimizer_step(run: TrainingRun, batches: Iterator[dict[str, Tensor]], step: int) -> tuple[dict[str, Tensor], int]:
    """One step of `update_freq` micro batches: (values for the statistics, pictures seen on this process)."""
    backend, device = run.backend, run.process.device
    utils.seed_everything(run.seed, step, run.process.rank)
    values, images = Statistics(), 0
    for micro in range(run.update_freq):
        batch = prepare(next(batches), run.task, device, backend.input_dtype)
        images += len(batch["row"])
        with backend.micro_step(last=micro == run.update_freq - 1):
            with backend.autocast():
                outputs = run.task.training_step(backend.model, batch, step)
            backend.backward(outputs["loss"])
        values.add(outputs)
    norm = backend.step()
    if run.ema is not None:
        run.ema.update(backend.full_parameters())
    means = {name: total / run.update_freq for name, total in values.sums.items()}
    if norm is not None:
        means["grad_norm"] = norm.to(device)
    return means, images


def _progress_text(means: Mapping[str, float], lr: float, images_per_second: float) -> str:
    shown = "  ".join(f"{name} {value:.4g}" for name, value in means.items() if name != "grad_norm")
    return f"{shown}  lr {lr:.2e}  {images_per_second:.0f} images/s"


def _stop_if_not_finite(means: Mapping[str, float], step: int, steps: int) -> None:
    broken = [f"{name} is {value}" for name, value in means.items() if name == "loss" and not math.isfinite(value)]
    if broken:
        raise FloatingPointError(
            f"{', '.join(broken)} between steps {step - steps + 1} and {step}; training stops. "
            "Lower --lr or raise --warmup_epochs, or use --precision bf16 or fp32; the last checkpoint is untouched."
        )


def _mean_over_processes(means: dict[str, float]) -> dict[str, float]:
    everyone = utils.gather(means)
    return {name: sum(each[name] for each in everyone) / len(everyone) for name in means}


@dataclass(frozen=True)
class Validation:
    """What validation after an epoch gave.

    Attributes:
        scores: all of them; those of the averaged weights begin with "ema_".
        score: the better one of the task's best metric; None when the right answers are not known.
        averaged: whether the averaged weights gave it.
        files: what the task keeps of it, name → JSON content; on the first process only.
    """

    scores: dict[str, float]
    score: float | None
    averaged: bool
    files: dict[str, Any]


def validate(run: TrainingRun, loader: DataLoader, epoch: int) -> Validation:
    """Score the weights, and their average when one is kept. Collective."""
    metric = run.task.best_metric
    scores, files = _score(run, loader, epoch, f"validation after epoch {epoch}")
    if run.ema is None:
        return Validation(scores, scores.get(metric), False, files)
    with run.ema.applied_to(run.backend.module):
        averaged, averaged_files = _score(run, loader, epoch, f"validation of the average after epoch {epoch}")
    better = metric in averaged and averaged[metric] > scores[metric]
    every = {**scores, **{f"ema_{name}": value for name, value in averaged.items()}}
    return Validation(every, (averaged if better else scores).get(metric), better, averaged_files if better else files)


def _score(run: TrainingRun, loader: DataLoader, epoch: int, what: str) -> tuple[dict[str, float], dict[str, Any]]:
    backend = run.backend
    records = evaluate(
        run.task,
        backend.model,
        loader,
        run.process,
        autocast=backend.autocast,
        input_dtype=backend.input_dtype,
        what=what,
    )
    scores: dict[str, float] = {}
    files: dict[str, Any] = {}
    if run.process.is_main:
        scores = run.task.metrics(records)
        files = run.task.validation_files(records, epoch)
    return utils.broadcast(scores), files


def evaluate(
    task: Task,
    model: nn.Module,
    loader: DataLoader,
    process: utils.Process,
    *,
    autocast: Any,
    input_dtype: torch.dtype = torch.float32,
    what: str = "evaluation",
) -> list[Record]:
    """Records of all examples, each exactly once and in the order of their rows, on every process. Collective.

    Args:
        loader: this process's share of the examples.
        autocast: makes the context of a forward pass, as `Backend.autocast`.
    """
    model.eval()
    records: list[Record] = []
    progress = Progress(what, len(loader), process.is_main)
    started, images = time.monotonic(), 0
    with torch.no_grad():
        for batch in loader:
            batch = prepare(batch, task, process.device, input_dtype)
            with autocast():
                records += task.evaluation_step(model, batch)
            images += len(batch["row"]) * process.world_size
            progress.advance(f"{images / (time.monotonic() - started):.0f} images/s")
    progress.close()
    by_row = {record["row"]: record for share in utils.gather(records) for record in share}
    return [by_row[row] for row in sorted(by_row)]
