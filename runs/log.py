"""What a run says and writes: the log, TensorBoard files, the scores of each epoch, the results of a prediction."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beit3.data.image_text import ImageTextDataset
from beit3.system.atomic_files import atomic_write
from engine_for_finetuning import TrainingRun, Validation
from runs.settings import Settings
from tasks.base import Columns, Task

logger = logging.getLogger(__name__)


def open_writer(settings: Settings, is_main: bool, first_step: int) -> Any:
    """TensorBoard's writer, on the first process and where a folder is named. What stands at `first_step` or later,
    from a killed run that wrote beyond its checkpoint, is void."""
    if not settings.run.log_dir or not is_main:
        return None
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    return SummaryWriter(settings.run.log_dir, purge_step=first_step)


def announce(settings: Settings, run: TrainingRun, validation_examples: int) -> None:
    process = run.process
    logger.info(
        "%s: %.1f M parameters, %d training and %d validation examples, %d steps of %d pairs per epoch, %s on %d × %s",
        settings.model_name, run.num_parameters / 1e6, len(run.dataset), validation_examples,
        run.sampler.steps_per_epoch, run.sampler.global_batch,
        run.backend.settings.precision, process.world_size, process.device.type,
    )  # fmt: skip


def log_epoch(
    output_dir: str, run: TrainingRun, epoch: int, training: Mapping[str, float], validation: Validation
) -> None:
    entry: dict[str, float] = {f"train_{name}": value for name, value in training.items()}
    entry |= {f"val_{name}": value for name, value in validation.scores.items()}
    logger.info("epoch %d: %s", epoch, "  ".join(f"{name} {value:.4g}" for name, value in entry.items()))
    entry |= {"epoch": epoch, "n_parameters": run.num_parameters}
    if output_dir and run.process.is_main:
        for name, content in validation.files.items():
            write_json(Path(output_dir) / f"{name}_e{epoch}.json", content)
        write_log(Path(output_dir) / "log.txt", entry)


def write_log(path: Path, entry: Mapping[str, Any]) -> None:
    """Add an epoch's line; lines of this epoch and later ones are from before a crash and go."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    earlier = [line for line in lines if json.loads(line)["epoch"] < entry["epoch"]]
    with atomic_write(path) as file:
        file.writelines(f"{line}\n" for line in [*earlier, json.dumps(dict(entry))])


def write_results(folder: Path, task: Task, columns: Columns, dataset: ImageTextDataset, split: str) -> None:
    """The submission, then what it is worth where the right answers are known."""
    submission = task.submission(columns, dataset, split)
    if submission is not None:
        file = folder / f"{task.submission_file(split)}.json"
        write_json(file, submission)
        logger.info("%s: %d predictions", file, len(submission))
    scores = task.score(columns, dataset, split, final=True)
    for name, content in scores.files.items():
        write_json(folder / f"{name}.json", content)
    if scores.report is None:
        return
    file = folder / f"{task.report_file(split)}.json"
    write_json(file, scores.report, indent=2)
    for line in scores.lines:
        logger.info("%s", line)
    logger.info("scores written to %s", file)


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    with atomic_write(path) as file:
        json.dump(content, file, indent=indent)
