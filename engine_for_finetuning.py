"""One epoch of training, and evaluation. Names no task: a task is known by its contract (`tasks.base`) alone."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import utils
from beit3.data.image_text import ImageTextDataset
from beit3.data.loading import EpochSampler
from beit3.system.errors import UnreadableError
from beit3.system.progress_bar import ProgressBar
from beit3.training.backends import Backend
from beit3.training.ema import ModelEma
from optim_factory import set_learning_rate
from tasks.base import Columns, Scores, Task

logger = logging.getLogger(__name__)

# Reading a value from the device waits for all its work; so values are read once in that many steps.
READ_EVERY = 20
COUNTED = "steps counted"  # name among the sums of a saved state
MAX_ROWS_NAMED = 20


@dataclass
class Statistics:
    """Sums of values over steps or micro batches, kept on the device and read rarely."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counted: Tensor | float = 0.0  # of them, those that count for means

    def add(self, values: Mapping[str, Tensor], counts: Tensor | float = 1.0) -> None:
        """`counts`: () 1.0, or 0.0 where the values are zeros because the step was skipped."""
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.counted = self.counted + counts

    def read(self) -> dict[str, float]:
        """Means so far on this process; empty when no step counted. Waits for the device."""
        if not self.sums:
            return {}
        *sums, counted = torch.stack([*self.sums.values(), self._counted()]).cpu().tolist()
        return {name: total / counted for name, total in zip(self.sums, sums, strict=True)} if counted else {}

    def to_plain(self) -> dict[str, Tensor]:
        return {**{name: total.cpu() for name, total in self.sums.items()}, COUNTED: self._counted().cpu()}

    @classmethod
    def from_plain(cls, plain: Sequence[Mapping[str, Tensor]]) -> Statistics:
        """The mean of what several processes had."""
        sums = {name: torch.stack([each[name] for each in plain]).mean(dim=0) for name in plain[0]}
        return cls(counted=sums.pop(COUNTED), sums=sums)

    def _counted(self) -> Tensor:
        device = next(iter(self.sums.values())).device if self.sums else None
        return torch.as_tensor(self.counted, dtype=torch.float32, device=device)


@dataclass
class EpochState:
    """How far an epoch has come on this process: what a checkpoint inside it has to hold.

    Attributes:
        step: optimizer steps done; all of the epoch's when only its validation is left.
        whole, recent: of the epoch, and since values were last shown.
        flags: () each, 1.0 for a step that was skipped; of the steps since values were last read.
        skipped_in_row: steps that were skipped up to then, without one between them that was not.
        bad_images: pictures that others took the place of.
    """

    step: int = 0
    whole: Statistics = field(default_factory=Statistics)
    recent: Statistics = field(default_factory=Statistics)
    flags: list[Tensor] = field(default_factory=list)
    skipped_in_row: int = 0
    bad_images: int = 0

    def to_plain(self) -> dict[str, Any]:
        """For a checkpoint: plain values and tensors on the CPU."""
        flags = [flag.cpu() for flag in self.flags]
        return {**vars(self), "whole": self.whole.to_plain(), "recent": self.recent.to_plain(), "flags": flags}

    @classmethod
    def from_states(cls, plain: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> EpochState:
        """The state of process `rank` from those of all that saved; where these were more or fewer, their mean."""
        same = len(plain) == world_size
        mine = [plain[rank]] if same else plain
        statistics = {name: Statistics.from_plain([each[name] for each in mine]) for name in ("whole", "recent")}
        bad_images = sum(each["bad_images"] for each in mine) if same or rank == 0 else 0
        return cls(**{**mine[0], **statistics, "bad_images": bad_images})


@dataclass
class TrainingRun:
    """What stays the same over the epochs of a run.

    Attributes:
        dataset, sampler, loader: of the training pictures; the loader reads the dataset in the sampler's order.
        val_loader: of the validation pictures, this process's share.
        schedule: learning rate of every step of the whole run.
        update_freq: micro batches per step.
        seed: with the step and the process, decides what drop path draws.
        after_step: called after every step with the epoch and its state; may raise to leave the epoch. Collective.
        check_stop: called between two batches of evaluation; may raise to leave it. Collective.
        max_skipped_steps: that many steps in a row with a broken gradient end the training.
        num_parameters: of the whole model. num_trained: of them, those that are not frozen.
    """

    task: Task
    backend: Backend
    process: utils.Process
    dataset: ImageTextDataset
    sampler: EpochSampler
    loader: DataLoader
    val_loader: DataLoader
    schedule: Sequence[float]
    update_freq: int
    seed: int
    after_step: Callable[[int, EpochState], None]
    check_stop: Callable[[], None]
    ema: ModelEma | None = None
    writer: Any = None
    max_skipped_steps: int = 25
    num_parameters: int = 0
    num_trained: int = 0


def train_one_epoch(run: TrainingRun, epoch: int, state: EpochState) -> float:
    """Train for the steps of one epoch that are not done yet; `state` is brought forward with each of them.

    Returns:
        Images per second, of all processes together.

    Raises:
        FloatingPointError: too many steps in a row had a broken gradient, or all steps of the epoch.
    """
    backend, process = run.backend, run.process
    steps_per_epoch = run.sampler.steps_per_epoch
    backend.model.train()
    run.dataset.set_epoch(epoch)
    run.sampler.set_epoch(epoch, state.step)
    bar = ProgressBar(f"epoch {epoch}", steps_per_epoch, process.is_main, done=state.step)
    batches = iter(run.loader)
    window = _Window()
    started, images = time.monotonic(), 0
    while state.step < steps_per_epoch:
        step = epoch * steps_per_epoch + state.step
        set_learning_rate(backend.optimizer, run.schedule[step])
        outcome = _optimizer_step(run, batches, step)
        images += len(outcome.rows) * process.world_size
        state.step += 1
        state.bad_images += outcome.bad_images
        for statistics in (state.whole, state.recent):
            statistics.add(outcome.values, 1.0 - outcome.skipped)
        state.flags.append(outcome.skipped)
        window.images += len(outcome.rows) * process.world_size
        if (step + 1) % READ_EVERY == 0 or state.step == steps_per_epoch:
            window = _Window(_show(run, state, window, step, outcome.rows))
        bar.advance(window.text)
        run.after_step(epoch, state)
    bar.close()
    if state.step and not float(state.whole.counted):
        raise FloatingPointError(
            f"all {state.step} steps of epoch {epoch} had a loss or gradient that is not finite and were skipped: "
            "nothing was learned. Lower --lr or raise --warmup_epochs, use --precision bf16 or fp32"
        )
    return images / (time.monotonic() - started)


@dataclass
class _Outcome:
    """Of one optimizer step on this process; the values are zeros when it was skipped."""

    values: dict[str, Tensor]
    skipped: Tensor
    rows: list[int]
    bad_images: int


@dataclass
class _Window:
    """The steps since values were last read from the device."""

    text: str = ""  # what the one before had to say
    images: int = 0
    started: float = field(default_factory=time.monotonic)


def _show(run: TrainingRun, state: EpochState, window: _Window, step: int, rows: Sequence[int]) -> str:
    """Read the values of the steps up to `step`, note them, and look for broken gradients; returns a line on them."""
    means = state.recent.read()
    flags = torch.stack([flag.to(run.process.device) for flag in state.flags]).cpu().tolist()
    rate = window.images / (time.monotonic() - window.started)
    state.recent, state.flags = Statistics(), []
    if run.writer is not None:
        for name, value in {**means, "lr": run.schedule[step], "images_per_second": rate}.items():
            run.writer.add_scalar(f"train/{name}", value, step)
    for number, skipped in enumerate(flags, start=step + 1 - len(flags)):
        state.skipped_in_row = state.skipped_in_row + 1 if skipped else 0
        if skipped and run.process.is_main:
            logger.warning("step %d: the gradient is not finite; the step was skipped on all processes", number)
    if state.skipped_in_row >= run.max_skipped_steps:
        raise FloatingPointError(_why_training_stops(run, state.skipped_in_row, step, rows))
    return _progress_text(means, run.schedule[step], rate)


def _why_training_stops(run: TrainingRun, in_row: int, step: int, rows: Sequence[int]) -> str:
    shares = []
    for rank, places in enumerate(utils.gather([run.dataset.place(row) for row in rows])):
        more = f", … ({len(places)} in all)" if len(places) > MAX_ROWS_NAMED else ""
        shares.append(f"process {rank}: {', '.join(places[:MAX_ROWS_NAMED])}{more}")
    return (
        f"{in_row} steps in a row had a loss or gradient that is not finite, the last of them step {step}, with the "
        f"rows of {'; '.join(shares)}. Training stops; the weights are finite and the last checkpoint is untouched. "
        "Lower --lr or raise --warmup_epochs, use --precision bf16 or fp32, or look at these rows"
    )


def summarize(run: TrainingRun, epoch: int, state: EpochState) -> dict[str, float]:
    """Of a finished epoch: means over all processes, the last learning rate, what was left out. Collective."""
    means = _mean_over_processes(state.whole.read())
    last = (epoch + 1) * run.sampler.steps_per_epoch - 1
    counts = {
        "skipped_steps": state.step - int(state.whole.counted),
        "bad_images": sum(utils.gather(state.bad_images)),
    }
    return {**means, "lr": run.schedule[last], **{name: count for name, count in counts.items() if count}}


def _optimizer_step(run: TrainingRun, batches: Iterator[dict[str, Tensor]], step: int) -> _Outcome:
    """One step of `update_freq` micro batches."""
    backend, device = run.backend, run.process.device
    utils.seed_everything(run.seed, step, run.process.rank)
    values, rows, bad_images = Statistics(), [], 0
    for micro in range(run.update_freq):
        batch = next(batches)
        rows += batch["row"].tolist()
        bad_images += int(batch.pop("bad_images", 0))
        batch = run.task.prepare(batch, device, backend.input_dtype)
        with backend.micro_step(last=micro == run.update_freq - 1):
            with backend.autocast():
                outputs = run.task.training_step(backend.model, batch, step)
            backend.backward(_spread_nan(outputs["loss"]))
        values.add(outputs)
    norm, skipped = backend.step()
    if run.ema is not None:
        run.ema.update(backend.full_parameters())
    means = {name: total / run.update_freq for name, total in values.sums.items()}
    if norm is not None:
        means["grad_norm"] = norm.to(device)
    skipped = skipped.to(device)
    # Of a skipped step they may be no numbers, which a weight of 0 would not take out of a sum.
    means = {name: torch.where(skipped > 0, 0.0, mean) for name, mean in means.items()}
    return _Outcome(means, skipped, rows, bad_images)


def _spread_nan(loss: Tensor) -> Tensor:
    """A loss that is no finite number gets NaN gradients, also where its own would be finite (that of an infinite
    cross-entropy is), so that every process sees the step as broken."""
    return loss * torch.where(torch.isfinite(loss), 1.0, math.nan)


def _progress_text(means: Mapping[str, float], lr: float, images_per_second: float) -> str:
    shown = "  ".join(f"{name} {value:.4g}" for name, value in means.items() if name != "grad_norm")
    return f"{shown}  lr {lr:.2e}  {images_per_second:.0f} images/s"


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
        lines: what a person is told of the best one at the end; on the first process only.
        calibration: what makes the confidences of these weights mean something, in plain values; on the first process
            only, None where the task has none.
    """

    scores: dict[str, float]
    score: float | None
    averaged: bool
    files: Mapping[str, Any]
    calibration: Mapping[str, float] | None = None
    lines: Sequence[str] = ()


def validate(run: TrainingRun, epoch: int) -> Validation:
    """Score the weights, and their average when one is kept. Collective."""
    metric = run.task.best_metric
    plain = _score(run, f"validation after epoch {epoch}")
    if run.ema is None:
        return _as_validation(plain, plain.metrics, metric, averaged=False)
    averaged = _score(run, f"validation of the average after epoch {epoch}", run.ema.averages)
    better = metric in averaged.metrics and averaged.metrics[metric] > plain.metrics[metric]
    every = {**plain.metrics, **{f"ema_{name}": value for name, value in averaged.metrics.items()}}
    return _as_validation(averaged if better else plain, every, metric, averaged=better)


def _as_validation(best: Scores, every: dict[str, float], metric: str, averaged: bool) -> Validation:
    calibration = None if best.calibration is None else best.calibration.to_plain()
    return Validation(every, best.metrics.get(metric), averaged, best.files, calibration, best.lines)


def _score(run: TrainingRun, what: str, averages: Mapping[str, Tensor] | None = None) -> Scores:
    """On processes other than the first it has the metrics alone."""
    backend = run.backend
    with backend.evaluation_model(averages) as model:
        columns, unreadable = evaluate(
            run.task,
            model,
            run.val_loader,
            run.process,
            autocast=backend.autocast,
            input_dtype=backend.input_dtype,
            what=what,
            check_stop=run.check_stop,
        )
    if unreadable:  # a score without them would not compare with that of another epoch
        more = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
        raise UnreadableError(f"{what}: {unreadable[0]}{more}; mend it, and the same command goes on from here")
    scores = Scores()
    if columns is not None:
        scores = run.task.score(columns, run.val_loader.dataset, "val", final=False)  # type: ignore[arg-type]
    return replace(scores, metrics=utils.broadcast(scores.metrics))


def evaluate(
    task: Task,
    model: nn.Module,
    loader: DataLoader,
    process: utils.Process,
    *,
    autocast: Any,
    input_dtype: torch.dtype = torch.float32,
    what: str = "evaluation",
    check_stop: Callable[[], None] = lambda: None,
) -> tuple[Columns | None, list[str]]:
    """What the task predicts of all examples, each exactly once and in the order of their rows. Collective.

    Args:
        model: computes without other processes, because they may have fewer batches.
        loader: this process's share of the examples; it may be empty. Batches name pictures that cannot be read under
            "unreadable", where their data set has `report_bad_images`.
        autocast: makes the context of a forward pass, as `Backend.autocast`.
        check_stop: called after each batch, on every process equally often; may raise.

    Returns:
        The columns of `predict_step` and "row", on the CPU; None on all processes but the first. On all of them, what
        is wrong with the pictures that could not be read; their rows are missing in the columns.

    Raises:
        UnreadableError: on all processes; no picture could be read.
        FloatingPointError: on all processes; what the model computed for some examples are no numbers.
    """
    model.eval()
    predicted: list[dict[str, Any]] = []
    unreadable: list[str] = []
    bar = ProgressBar(what, len(loader), process.is_main)
    started, images = time.monotonic(), 0
    batches = iter(loader)
    with torch.no_grad():
        # Every process goes round equally often, so that all of them are there when one is told to stop.
        for _ in range(max(utils.gather(len(loader)))):
            batch = next(batches, None) or {}
            unreadable += batch.pop("unreadable", ())
            if batch:
                rows = batch["row"]
                batch = task.prepare(batch, process.device, input_dtype)
                with autocast():
                    predicted.append({"row": rows, **task.predict_step(model, batch)})
                images += len(rows) * process.world_size
                bar.advance(f"{images / (time.monotonic() - started):.0f} images/s")
            check_stop()
    bar.close()
    columns = join_columns(predicted)
    _refuse_broken(columns, loader, what)
    unreadable = [problem for problems in utils.gather(unreadable) for problem in problems]
    if unreadable and not any(utils.gather(len(predicted))):
        raise UnreadableError(f"{what}: none of {len(unreadable)} pictures could be read; the first: {unreadable[0]}")
    return _by_row(utils.gather_columns(columns)), unreadable


def _refuse_broken(columns: dict[str, Any], loader: DataLoader, what: str) -> None:
    """Take "finite" off the columns of this process; raise on all processes where it is False for one. Collective.

    An argmax over NaN is an answer like any other, so nobody would notice.
    """
    broken = []
    if (finite := columns.pop("finite", None)) is not None:
        place = loader.dataset.place  # type: ignore[attr-defined]
        broken = [place(row) for row in columns["row"][~finite].tolist()]
    everyone = [place for places in utils.gather(broken) for place in places]
    if everyone:
        more = f", … ({len(everyone)} in all)" if len(everyone) > MAX_ROWS_NAMED else ""
        raise FloatingPointError(
            f"{what}: the model's numbers are not finite for {', '.join(everyone[:MAX_ROWS_NAMED])}{more}. Use "
            "--precision bf16 or fp32, or another checkpoint"
        )


def join_columns(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Columns of several batches, or processes, as one: tensors (N, …) on the CPU, and lists."""
    joined: dict[str, Any] = {}
    for name in parts[0] if parts else ():
        values = [part[name] for part in parts]
        if isinstance(values[0], Tensor):
            joined[name] = torch.cat([value.cpu() for value in values])
        else:
            joined[name] = [entry for value in values for entry in value]
    return joined


def _by_row(parts: Sequence[Mapping[str, Any]] | None) -> Columns | None:
    """Columns of all processes in the order of rows, each row once; None where they are not."""
    if parts is None:
        return None
    columns = join_columns([part for part in parts if part])
    rows = columns["row"].tolist()
    order = torch.tensor(sorted({row: place for place, row in enumerate(rows)}.values(), key=rows.__getitem__))
    return {
        name: column[order] if isinstance(column, Tensor) else [column[place] for place in order.tolist()]
        for name, column in columns.items()
    }
