"""`--check`: looks at everything a training needs, trains nothing, and says what it would take and what it can reach.

One process and one device are looked at; with several the times are divided by their number.
"""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import utils
from beit3.data.image_text import ImageTextDataset
from beit3.data.images import screen_images
from beit3.system.errors import InputError, printable
from beit3.system.machine import free_memory
from beit3.training.backends import Backend
from beit3.training.memory_estimate import GIGABYTE
from runs import assembly, output_folder
from runs.settings import Settings
from sources.pictures import same_content
from tasks.base import Task

logger = logging.getLogger(__name__)

MEASURED_STEPS = 3
SECONDS_TO_MEASURE = 30.0  # for these steps; where a step takes longer, smaller ones are measured
SHOWN = 5


def check(settings: Settings, process: utils.Process, stop: utils.StopSignal) -> int:
    """The body of `--check`; 0, or 2 where something must be mended first, which is told last.

    Raises:
        InputError: something is wrong without which nothing can be looked at.
    """
    started = time.monotonic()
    task = assembly.build_task(settings)
    train_set, val_set = task.dataset("train", training=True), task.dataset("val", training=False)
    problems = task.check_references("val", final=False)
    _tell("data", task.looked_at(train_set, val_set))
    problems += _look_at_pictures(settings, train_set, {"validation": val_set, **_test_set(task)})
    stop.check()
    if not problems:  # the steps read pictures
        problems += _look_at_the_machine(settings, process, task, train_set, val_set)
    _tell("time of this check", [f"{time.monotonic() - started:.0f} s"])
    for problem in problems:
        logger.error("to be mended: %s", problem)
    if not problems:
        logger.info("nothing has to be mended; the same command without --check trains")
    return 2 if problems else 0


def _tell(title: str, lines: Any) -> None:
    logger.info("%s", title)
    for line in lines:
        logger.info("  %s", line)


def _test_set(task: Task) -> dict[str, ImageTextDataset]:
    """The test rows, where they are there. Raises InputError where their index is broken."""
    try:
        return {"test": task.dataset("test", training=False)}
    except InputError as error:
        if all(": missing; " in problem for problem in error.problems):
            return {}
        raise


def _look_at_pictures(
    settings: Settings, train_set: ImageTextDataset, others: dict[str, ImageTextDataset]
) -> list[str]:
    """Tell which pictures are the same; returns those that cannot be read or are over the limits."""
    root = Path(settings.data.image_path or settings.data.data_path)
    train_paths = train_set.image_paths()
    paths = {what: dataset.image_paths() for what, dataset in others.items()}
    every = sorted({path for each in (train_paths, *paths.values()) for path in each})
    unreadable = screen_images(every, root)
    first = same_content(root, every)
    double = {path: other for path, other in first.items() if path != other}
    readable = f"{len(unreadable)} cannot be read or are over the limits" if unreadable else "all of them can be read"
    lines = [f"{len(every)} files; {readable}"]
    if double:
        shown = "; ".join(f"{path} is {other}" for path, other in itertools.islice(double.items(), SHOWN))
        lines.append(f"{len(double)} have the content of another: {printable(shown)}" + _more(len(double)))
    learned = {first[path] for path in train_paths}
    for what, its_paths in paths.items():
        if shared := [path for path in its_paths if first[path] in learned]:
            shown = printable(", ".join(shared[:SHOWN]))
            lines.append(
                f"{len(shared)} of {what} are in training too, so its score says too much: {shown}{_more(len(shared))}"
            )
    _tell("pictures", lines)
    return unreadable


def _more(count: int) -> str:
    return f" and {count - SHOWN} more" if count > SHOWN else ""


def _look_at_the_machine(
    settings: Settings, process: utils.Process, task: Task, train_set: ImageTextDataset, val_set: ImageTextDataset
) -> list[str]:
    """Memory, disk, seconds of a step, hours of the training; returns what is wrong."""
    try:
        sampler = assembly.training_sampler(settings, train_set, process)
        room = free_memory(process.device)
        checkpoint = assembly.read_weights(settings)
        model = assembly.build_model(settings, task, checkpoint, process.device)
    except InputError as error:
        return error.problems
    del checkpoint
    _tell("model", [f"{settings.model_name}, {model.num_parameters / 1e6:.1f} M parameters"])
    demand = assembly.memory_demand(settings, task, model, process)
    one = output_folder.checkpoint_bytes(settings, model.num_parameters, model.num_trained)
    free = output_folder.free_bytes(Path(settings.run.output_dir or "."))
    problems = output_folder.check_room(
        settings, model.num_parameters, sampler.steps_per_epoch, None, model.num_trained
    )
    optimizer = settings.optimizer
    pairs = optimizer.batch_size * optimizer.update_freq * process.world_size
    most = demand.most_pictures(room)
    lines = [
        f"memory: {demand}; {room / GIGABYTE:.1f} GB are free",
        f"disk: a full checkpoint takes {one / GIGABYTE:.2f} GB, {(free or 0) / GIGABYTE:.1f} GB are free",
    ]
    if not demand.fits(room):
        advice = assembly.memory_advice(settings, demand, room)
        _tell("machine", lines)
        return [*problems, f"memory: {advice}"]
    each = pairs // process.world_size
    batch = max(size for size in range(1, min(most, each) + 1) if each % size == 0)
    lines.append(f"proposed: --batch_size {batch} --update_freq {each // batch}, for {pairs} pairs per step")
    step, validation, measured = _measure(settings, process, task, model.to(process.device), train_set, val_set)
    steps = optimizer.epochs * sampler.steps_per_epoch
    rows = len(val_set)
    seconds = steps * step * pairs / process.world_size + optimizer.epochs * rows * validation
    lines += [
        f"speed: {_duration(step * pairs / process.world_size)} per step of {pairs} pairs ({measured}), "
        f"{_duration(validation * rows)} per validation of {rows} rows",
        f"training: {optimizer.epochs} epochs of {sampler.steps_per_epoch} steps, about {_duration(seconds)}",
    ]
    _tell("machine", lines)
    return problems


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.0f} hours"


def _measure(
    settings: Settings,
    process: utils.Process,
    task: Task,
    model: Any,
    train_set: ImageTextDataset,
    val_set: ImageTextDataset,
) -> tuple[float, float, str]:
    """Seconds of a pair in training and in validation, by a few steps from which nothing is kept; and how."""
    plain = replace(settings, deepspeed=replace(settings.deepspeed, enable_deepspeed=False))
    backend = assembly.build_backend(plain, model, process)
    rows = itertools.cycle(range(len(train_set)))
    first = _seconds(process, partial(_train, task, backend, process, train_set, [next(rows)]))
    fitting = int(SECONDS_TO_MEASURE / MEASURED_STEPS / max(first, 1e-6))
    size = max(1, min(settings.optimizer.batch_size, fitting, len(train_set)))
    batches = [list(itertools.islice(rows, size)) for _ in range(MEASURED_STEPS)]
    times = [_seconds(process, partial(_train, task, backend, process, train_set, batch)) for batch in batches]
    shown = list(range(min(size, len(val_set))))
    predict = _seconds(process, partial(_predict, settings, task, model, process, val_set, shown))
    how = f"measured on {MEASURED_STEPS} steps of {size}, decoding included, without workers"
    return sorted(times)[MEASURED_STEPS // 2] / size, predict / len(shown), how


def _seconds(process: utils.Process, work: Any) -> float:
    started = time.monotonic()
    work()
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)
    return time.monotonic() - started


def _batch(task: Task, dataset: ImageTextDataset, rows: list[int], process: utils.Process, dtype: Any) -> Any:
    return task.prepare(dataset.collate([dataset.example(row) for row in rows]), process.device, dtype)


def _train(task: Task, backend: Backend, process: utils.Process, dataset: ImageTextDataset, rows: list[int]) -> None:
    """A step of learning rate 0, whose gradients are as usual."""
    backend.model.train()
    for group in backend.optimizer.param_groups:
        group["lr"] = 0.0
    batch = _batch(task, dataset, rows, process, backend.input_dtype)
    with backend.micro_step(last=True):
        with backend.autocast():
            outputs = task.training_step(backend.model, batch, 0)
        backend.backward(outputs["loss"])
    backend.step()


def _predict(
    settings: Settings, task: Task, model: Any, process: utils.Process, dataset: ImageTextDataset, rows: list[int]
) -> None:
    model.eval()
    with torch.no_grad(), assembly.autocast(settings, process)():
        task.predict_step(model, _batch(task, dataset, rows, process, torch.float32))
