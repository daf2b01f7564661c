"""Where a run stands and how it is kept: checkpoints out and in, the best and the last weights. Names no task.

What a checkpoint file is, is in `beit3.training.checkpoints`; here is which ones a run writes and goes on from.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import utils
from beit3.model.weights import MODEL_FILE, write_weights
from beit3.system.atomic_files import atomic_write
from beit3.system.errors import InputError
from beit3.training.backends import Backend
from beit3.training.checkpoints import (
    Position,
    checkpoint_name,
    checkpoints_in,
    damage,
    differences,
    errors_named,
    prune,
    read_fingerprint,
    remove_unfinished,
)
from beit3.training.ema import ModelEma
from engine_for_finetuning import EpochState, Validation
from tasks import Task

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands: the epoch it is in, the steps done there, and the best validation so far."""

    epoch: int = 0
    step: int = 0
    best: float = -math.inf
    best_epoch: int = -1

    @property
    def position(self) -> Position:
        return self.epoch, self.step


@dataclass(frozen=True)
class Keeping:
    """What is kept of a run, and what it goes on from.

    Attributes:
        folder: for checkpoints; None: nothing is kept.
        keep: full checkpoints that stay, 0 = all.
        resume: the checkpoint to go on from; None: the newest in the folder, if `auto_resume`.
        force: go on although data or recipe changed.
        fingerprint: what must be the same, see `beit3.training.checkpoints`.
        suffix: of the backend's checkpoints.
        any_world_size: whether the backend's checkpoints can go on with another number of processes.
    """

    folder: Path | None
    keep: int
    resume: Path | None
    auto_resume: bool
    force: bool
    fingerprint: Mapping[str, Any]
    suffix: str
    any_world_size: bool


def find_resumable(keeping: Keeping, process: utils.Process) -> Path | None:
    """The checkpoint to go on from: complete, and of this run; None when there is nothing to go on from. Collective.

    Raises:
        InputError: on all processes; there are checkpoints but none is complete, or data or recipe changed.
    """
    path, problems = None, []
    if process.is_main:
        if keeping.folder is not None:
            remove_unfinished(keeping.folder)
        try:
            path = _newest_complete(keeping)
            problems = [] if path is None else _why_not(keeping, path)
        except InputError as error:
            problems = error.problems
    path, problems = utils.broadcast((path, problems))
    if problems:
        raise InputError(problems)
    return path


def _newest_complete(keeping: Keeping) -> Path | None:
    if keeping.resume is not None:
        candidates = [keeping.resume]
    elif keeping.auto_resume and keeping.folder is not None:
        candidates = checkpoints_in(keeping.folder, keeping.suffix)
    else:
        candidates = []
    damaged = []
    for path in candidates:
        harm = damage(path)
        if harm is None:
            return path
        damaged.append(harm)
        if len(damaged) < len(candidates):
            logger.warning("%s; going back to an older checkpoint", harm)
    if damaged:
        raise InputError([*damaged, "no complete checkpoint is left; --no_auto_resume starts anew"])
    return None


def _why_not(keeping: Keeping, path: Path) -> list[str]:
    """Reasons not to go on from a complete checkpoint."""
    made, now = read_fingerprint(path), keeping.fingerprint
    if made["versions"] != now["versions"]:
        logger.warning("%s: made with %s, this is %s; last digits may differ", path, made["versions"], now["versions"])
    deepspeed_then, deepspeed_now = path.is_dir(), not keeping.suffix
    if deepspeed_then != deepspeed_now:
        then, today = (("without", "with")[flag] + " --enable_deepspeed" for flag in (deepspeed_then, deepspeed_now))
        return [f"{path}: made {then}, this run is {today}; give it to --finetune, or start as it was made"]
    problems = []
    if made["world_size"] != now["world_size"] and not keeping.any_world_size:
        problems.append(
            f"{path}: made by {made['world_size']} processes, now there are {now['world_size']}; ZeRO keeps a part of "
            f"the state per process. Start {made['world_size']} processes, or begin anew from its weights: "
            f"--finetune {path} and another --output_dir"
        )
    changed = differences(made, now)
    if changed and not keeping.force:
        problems.append(
            f"{path}: belongs to another run: {'; '.join(changed)}. Choose another --output_dir, or add --force_resume "
            "to go on all the same"
        )
    return problems


class Keeper:
    """Writes the checkpoints of a run and takes them over again.

    description: what the model is, for files of weights. resumed_from: as `find_resumable` found it.
    """

    def __init__(
        self,
        keeping: Keeping,
        process: utils.Process,
        backend: Backend,
        task: Task,
        description: Mapping[str, Any],
        ema: ModelEma | None,
        resumed_from: Path | None,
    ) -> None:
        self.keeping, self.process, self.backend, self.task = keeping, process, backend, task
        self.description, self.ema, self.resumed_from = description, ema, resumed_from
        self.started = self.saved = (0, 0)  # where this process began, and its newest checkpoint stands

    def start(self, first_epoch: int) -> tuple[Progress, EpochState]:
        """Where the run begins: at its checkpoint, whose state is taken over, or at `first_epoch`. Collective."""
        progress, state = Progress(first_epoch), EpochState()
        if self.resumed_from is not None:
            extra = self.backend.load(self.resumed_from)
            progress = Progress(**extra["progress"])
            state = EpochState.from_states(extra["states"], self.process.rank, self.process.world_size)
            if self.ema is not None and extra["ema"] is not None:
                self.ema.load(extra["ema"])
            logger.info("%s: going on with epoch %d, step %d", self.resumed_from, progress.epoch, progress.step)
        self.started = self.saved = progress.position
        return progress, state

    def save(self, progress: Progress, state: EpochState) -> None:
        """Write everything needed to go on from here, unless that was done. Collective."""
        folder = self.keeping.folder
        if folder is None or progress.position == self.saved:
            return
        self.saved = progress.position
        path = folder / (checkpoint_name(progress.position) + self.keeping.suffix)
        extra = {
            "fingerprint": dict(self.keeping.fingerprint),
            "description": dict(self.description),
            "progress": asdict(progress),
            "states": utils.gather(state.to_plain()),
            "ema": None if self.ema is None else self.ema.averages,
        }
        self.backend.save(path, extra)
        if self.process.is_main:
            prune(path, self.keeping.suffix, self.keeping.keep, self.resumed_from)

    def keep_best(self, progress: Progress, validation: Validation) -> None:
        """Write `checkpoint-best` when the validation metric improved.

        Where validation cannot be scored, the last epoch counts as the best. Collective.
        """
        if validation.score is not None and validation.score <= progress.best:
            return
        progress.best_epoch = progress.epoch
        if validation.score is not None:
            progress.best = validation.score
        facts = {
            "epoch": progress.epoch,
            self.task.best_metric: validation.score,
            "from": "average" if validation.averaged else "weights",
        }
        averages = self.ema.averages if self.ema is not None and validation.averaged else None
        self._write_weights("checkpoint-best", {"", self.keeping.suffix}, facts, averages)

    def finish(self, progress: Progress) -> None:
        """Write the last weights as `checkpoint-last` and say what came out. Collective."""
        if self.keeping.folder is not None:
            was_finished = self.started == progress.position
            if not (was_finished and (self.keeping.folder / "checkpoint-last" / MODEL_FILE).is_file()):
                self._write_weights("checkpoint-last", {""}, {"epoch": progress.epoch - 1, "from": "weights"}, None)
        if progress.best > -math.inf:
            metric = self.task.best_metric
            logger.info("best validation %s %.2f, after epoch %d", metric, progress.best, progress.best_epoch)

    def _write_weights(
        self, name: str, suffixes: set[str], facts: Mapping[str, Any], averages: Mapping[str, Any] | None
    ) -> None:
        """The whole weights in fp32: a folder with `model.safetensors` for the suffix "", and one `.pth` file."""
        if self.keeping.folder is None:
            return
        named = averages.items() if averages is not None else self.backend.full_parameters()
        weights = {parameter: tensor.detach().float().cpu() for parameter, tensor in named}
        if self.process.is_main:
            for suffix in sorted(suffixes):
                path = self.keeping.folder / f"{name}{suffix}"
                with errors_named(path):
                    write_weights(path, weights, {**self.description, **facts})
        utils.barrier()


def write_log(path: Path, entry: Mapping[str, Any]) -> None:
    """Add an epoch's line; lines of this epoch and later ones are from before a crash and go."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    earlier = [line for line in lines if json.loads(line)["epoch"] < entry["epoch"]]
    with atomic_write(path) as file:
        file.writelines(f"{line}\n" for line in [*earlier, json.dumps(dict(entry))])
