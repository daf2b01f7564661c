"""What a run says and writes: the log, TensorBoard files, the scores of each epoch, the results of a prediction."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from beit3.data.image_text import ImageTextDataset
from beit3.system.atomic_files import atomic_write
from beit3.system.errors import CheckpointError, InputError
from engine_for_finetuning import TrainingRun, Validation
from runs.output_folder import set_aside
from runs.settings import Settings
from tasks.base import Columns, Task

logger = logging.getLogger(__name__)


def open_writer(settings: Settings, is_main: bool, first_step: int) -> Any:
    """TensorBoard's writer, on the first process and where a folder is named. What stands at `first_step` or later,
    from a killed run that wrote beyond its checkpoint, is void."""
    if not settings.run.log_dir or not is_main:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        return Teller(SummaryWriter(settings.run.log_dir, purge_step=first_step), settings.run.log_dir)
    except Exception as error:  # it only tells of the run, which goes on without
        _without(f"--log_dir {settings.run.log_dir}: no TensorBoard files", error)
        return None


class Teller:
    """A TensorBoard writer that falls silent when it fails, as on a full disk, instead of ending the run."""

    def __init__(self, writer: Any, folder: str) -> None:
        self.writer, self.folder = writer, folder

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if self.writer is None:
            return
        try:
            self.writer.add_scalar(name, value, step)
        except Exception as error:
            self.writer = None
            _without(f"--log_dir {self.folder}: no more TensorBoard files", error)


def _without(what: str, error: Exception) -> None:
    reason = next(iter(str(error).strip().splitlines()), "")[:200] or type(error).__name__
    logger.warning("%s (%s); the run goes on without", what, reason)


def announce(settings: Settings, run: TrainingRun, validation_examples: int) -> None:
    process = run.process
    size = f"{run.num_parameters / 1e6:.1f} M parameters"
    if run.num_trained != run.num_parameters:
        size = f"of {size} {run.num_trained / 1e6:.1f} M are trained"
    logger.info(
        "%s: %s, %d training and %d validation examples, %d steps of %d pairs per epoch, %s on %d × %s",
        settings.model_name, size, len(run.dataset), validation_examples,
        run.sampler.steps_per_epoch, run.sampler.global_batch,
        run.backend.settings.precision, process.world_size, process.device.type,
    )  # fmt: skip


def log_epoch(
    output_dir: str, run: TrainingRun, epoch: int, training: Mapping[str, float], validation: Validation
) -> None:
    entry: dict[str, float] = {f"train_{name}": value for name, value in training.items()}
    entry |= {f"val_{name}": value for name, value in validation.scores.items()}
    logger.info("epoch %d: %s", epoch, "  ".join(f"{name} {value:.4g}" for name, value in entry.items()))
    entry |= {"epoch": epoch, "n_parameters": run.num_trained}
    if output_dir and run.process.is_main:
        for name, content in validation.files.items():
            with _only_tells(Path(output_dir) / f"{name}_e{epoch}.json") as path:
                write_json(path, content)
        with _only_tells(Path(output_dir) / "log.txt") as path:
            write_log(path, entry)


@contextlib.contextmanager
def _only_tells(path: Path) -> Iterator[Path]:
    """Around the writing of a file without which the run is worth as much: what fails is told, and passed over."""
    try:
        if path.is_dir():
            logger.warning("%s: is a folder, a file is wanted; renamed to %s", path, set_aside(path).name)
        yield path
    except (OSError, ValueError) as error:
        _without(f"{path}: not written", error)


def write_log(path: Path, entry: Mapping[str, Any]) -> None:
    """Add an epoch's line; lines of this epoch and later ones are from before a crash and go.

    A file with a line that is no log line is set aside; the lines that are go into the new file too.
    """
    lines, damage = _read_log(path)
    if damage is not None:
        logger.warning("%s: %s; renamed to %s, the log goes on without it", path, damage, set_aside(path).name)
    earlier = [line for epoch, line in lines if epoch < entry["epoch"]]
    with atomic_write(path) as file:
        file.writelines(f"{line}\n" for line in [*earlier, json.dumps(dict(entry))])


def _read_log(path: Path) -> tuple[list[tuple[int, str]], str | None]:
    """The lines of a log with their epochs, and what is wrong with the first that is none; None: nothing."""
    try:
        content = path.read_bytes() if os.path.lexists(path) else b""
    except OSError as error:
        return [], f"cannot be read ({error.strerror})"
    lines, damage = [], None
    for number, raw in enumerate(content.split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8").strip()
            entry = json.loads(line) if line else None
        except (ValueError, RecursionError):  # ValueError: not UTF-8, not JSON
            damage = damage or f"line {number} is no JSON in UTF-8"
            continue
        if isinstance(entry, dict) and type(entry.get("epoch")) is int:
            lines.append((entry["epoch"], line))
        elif line:
            damage = damage or f"line {number} does not say its epoch"
    return lines, damage


def write_results(
    folder: Path, task: Task, columns: Columns, dataset: ImageTextDataset, split: str, problems: list[str]
) -> bool:
    """The submission, then what it is worth where the right answers are known, and what the user should know of it.

    problems: why it is no complete submission. What was computed is kept all the same, under another name, and nothing
    that fails afterwards takes it away. Returns whether all is well.
    """
    submission = task.submission(columns, dataset, split)
    name = task.submission_file(split)
    well = not problems
    if submission is not None:
        file = keep_json(folder, f"{name}.json" if well else f"{name}.incomplete.json", submission)
        well = well and file.parent == folder
        logger.info("%s: %d predictions", file, len(submission))
    rows = "predictions.jsonl" if not problems else "predictions.incomplete.jsonl"
    keep_rows(folder, rows, task.predictions(columns, dataset))
    remark = task.remark(split)
    if remark is not None:
        logger.warning("%s", remark)
    if problems:
        logger.error("%s", InputError([*problems, "so the submission was written under another name and not scored"]))
        return False
    try:
        scores = task.score(columns, dataset, split, final=True)
    except Exception as error:  # the predictions are worth more than what is said of them
        logger.error("the predictions are written, scoring them failed: %s: %s", type(error).__name__, error)
        return False
    for name, content in scores.files.items():
        well = keep_json(folder, f"{name}.json", content).parent == folder and well
    if scores.report is None:
        return well
    file = keep_json(folder, f"{task.report_file(split)}.json", scores.report, indent=2)
    for line in scores.lines:
        logger.info("%s", line)
    logger.info("scores written to %s", file)
    return well and file.parent == folder


def keep_rows(folder: Path, name: str, rows: Iterator[Mapping[str, Any]]) -> None:
    """Write a file with a line of JSON per row, where there are rows; it only tells, so nothing ends where it fails."""
    first = next(rows, None)
    if first is None:
        return
    with _only_tells(folder / name) as path, atomic_write(path) as file:
        for row in itertools.chain([first], rows):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        logger.info("%s: each answer with its confidence or score", path)


def keep_json(folder: Path, name: str, content: Any, indent: int | None = None) -> Path:
    """Write a result into the folder or, where that fails after all, wherever this machine keeps temporary files.

    Returns:
        Where it is.

    Raises:
        CheckpointError: neither can be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)  # it was there when the run began
        write_json(folder / name, content, indent)
        return folder / name
    except OSError as error:
        try:
            elsewhere = Path(tempfile.mkdtemp(prefix="predictions-"))
            write_json(elsewhere / name, content, indent)
        except OSError as again:
            raise CheckpointError(
                f"{folder / name}: cannot be written ({error.strerror}), nor can {tempfile.gettempdir()} "
                f"({again.strerror}); make room and run the same command again"
            ) from error
        logger.error("%s: cannot be written (%s); written to %s", folder / name, error.strerror, elsewhere / name)
        return elsewhere / name


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    with atomic_write(path) as file:
        json.dump(content, file, indent=indent)
