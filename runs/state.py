"""Where a run stands and how it is kept: checkpoints out and in, the best and the last weights. Names no task.

What a checkpoint file is, is in `beit3.training.checkpoints`; here is which ones a run writes and goes on from.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import utils
from beit3.data.image_text import ImageTextDataset
from beit3.model.description import FORMAT, MODEL_FILE
from beit3.model.weights import as_tensor, write_weights
from beit3.system.errors import InputError
from beit3.training.backends import Backend, PlainBackend, choose_precision
from beit3.training.checkpoints import (
    Position,
    checkpoint_name,
    checkpoints_in,
    damage,
    differences,
    errors_named,
    position_of,
    prune,
    read_fingerprint,
    remove_unfinished,
    versions,
)
from beit3.training.ema import ModelEma
from engine_for_finetuning import EpochState, Validation
from runs.assembly import make_schedule
from runs.settings import Settings
from runs.together import refuse_together
from tasks.base import Task

logger = logging.getLogger(__name__)

# Flags that decide steps and came later, with the value that says what runs did before; "--flag" → value.
CAME_LATER = {"--new_head": False, "--freeze": "", "--mirror": True}
STEPS_VERSION = "version of the task's steps"  # in a fingerprint's recipe
HEAD = "meaning of the head"  # in a fingerprint's data, since 2026-11; earlier ones say nothing of it


@dataclass
class RunPosition:
    """Where a run stands: the epoch it is in, the steps done there, and the best validation so far."""

    epoch: int = 0
    step: int = 0
    best: float = -math.inf
    best_epoch: int = -1

    @property
    def place(self) -> Position:
        return self.epoch, self.step

    @property
    def without_improvement(self) -> int:
        """Validations in a row, up to the last one, that were not better than the best."""
        return self.epoch - 1 - self.best_epoch if self.best_epoch >= 0 else 0

    def patience_is_over(self, settings: Settings) -> bool:
        """Whether `--patience` ends the run here. An epoch that was begun is trained and validated first."""
        return self.step == 0 and 0 < settings.run.patience <= self.without_improvement

    def is_over(self, settings: Settings) -> bool:
        """Whether nothing is left to train."""
        return self.epoch >= settings.optimizer.epochs or self.patience_is_over(settings)


@dataclass(frozen=True)
class Keeping:
    """What is kept of a run, and what it goes on from.

    Attributes:
        folder: for checkpoints; None: nothing is kept.
        keep: full checkpoints that stay, 0 = all.
        resume: the checkpoint to go on from; None: the newest in the folder, if `auto_resume`.
        force: go on although data or recipe changed.
        fingerprint: what must be the same, see `beit3.training.checkpoints`.
        tokenizer: where the run's tokenizer comes from; None where it has no text.
        learning_rates: number of epochs → those of every step, were the run planned for so many.
        suffix: of the backend's checkpoints.
        any_world_size: whether the backend's checkpoints can go on with another number of processes.
    """

    folder: Path | None
    keep: int
    resume: Path | None
    auto_resume: bool
    force: bool
    fingerprint: Mapping[str, Any]
    tokenizer: str | None
    learning_rates: Callable[[int], Sequence[float]]
    suffix: str
    any_world_size: bool


def what_is_kept(settings: Settings, task: Task, fingerprint: dict[str, Any], steps_per_epoch: int) -> Keeping:
    run, deepspeed = settings.run, settings.deepspeed
    return Keeping(
        folder=Path(run.output_dir) if run.output_dir and run.save_ckpt else None,
        keep=run.keep_checkpoints,
        resume=Path(run.resume) if run.resume else None,
        auto_resume=run.auto_resume,
        force=run.force_resume,
        fingerprint=fingerprint,
        tokenizer=task.tokenizer.path if settings.task.uses_text else None,
        learning_rates=functools.partial(make_schedule, settings.optimizer, steps_per_epoch),
        suffix="" if deepspeed.enable_deepspeed else PlainBackend.suffix,
        any_world_size=not deepspeed.enable_deepspeed or deepspeed.zero_stage == 0,
    )


def make_fingerprint(
    settings: Settings,
    task: Task,
    process: utils.Process,
    train_set: ImageTextDataset,
    val_set: ImageTextDataset,
) -> dict[str, Any]:
    """What must be the same for a run to go on: plain values, see `beit3.training.checkpoints`."""
    optimizer = settings.optimizer
    recipe = settings.recipe()
    recipe["precision"] = choose_precision(settings.run.precision, process.device)
    recipe["pairs per step"] = optimizer.batch_size * optimizer.update_freq * process.world_size
    recipe[STEPS_VERSION] = settings.task.steps_version
    meaning = {"tokenizer": task.tokenizer.sha256} if settings.task.uses_text else {}
    if head := task.describe():  # the answers' texts are in no index file
        meaning[HEAD] = hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()
    return {
        "format": FORMAT,
        "versions": versions(),
        "world_size": process.world_size,
        "recipe": recipe,
        "data": {"training data": train_set.digest, "validation data": val_set.digest, **meaning},
    }


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
    refuse_together(problems)
    return utils.broadcast(path)


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
    if made["format"] > FORMAT:
        return [f"{path}: made by a later version of this toolkit (format {made['format']}); go on with that one"]
    if made["format"] == 1:
        made = _of_first_format(made, now)
    before = {name: value for name, value in CAME_LATER.items() if name in now["recipe"]}
    made = {**made, "recipe": {**before, **made["recipe"]}, "data": {**_head_of(now), **made["data"]}}
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
    if changed.keys() == {"--epochs"} and _same_so_far(keeping, made["recipe"]["--epochs"], path):
        logger.info("%s: %s; all learning rates so far are the same", path, changed["--epochs"])
    elif changed and not (keeping.force and "--freeze" not in changed):
        forced = ", or add --force_resume to go on all the same" if "--freeze" not in changed else ""
        problems.append(
            f"{path}: belongs to another run: {'; '.join(changed.values())}. {_advice(keeping, changed, path)}Choose "
            f"another --output_dir{forced}"
        )
    return problems


def _same_so_far(keeping: Keeping, epochs: int, path: Path) -> bool:
    """Whether a run planned for so many epochs took the steps up to its checkpoint that this one would have taken.

    It did in the warm-up, which does not depend on the number of epochs, and where the learning rate is constant.
    """
    position = position_of(path, keeping.suffix)
    if position is None:
        return False
    then, now = keeping.learning_rates(epochs), keeping.learning_rates(keeping.fingerprint["recipe"]["--epochs"])
    epoch, step = position
    done = epoch * (len(then) // epochs) + step
    return done <= len(now) and then[:done] == now[:done]


def _advice(keeping: Keeping, changed: Mapping[str, str], path: Path) -> str:
    """What a user should know of some changes; ends with a space where there is anything."""
    said = ""
    if "--epochs" in changed:
        said += (
            "The learning rate falls over all epochs, so another number of them is another run: to train further from "
            f"what this one has learned, give {path.parent / 'checkpoint-best'} to --finetune. "
        )
    if "--freeze" in changed:
        said += (
            "The optimizer of the run keeps values of the weights that it trained, so not even --force_resume takes "
            f"others: to train them from what the run has learned, give {path.parent / 'checkpoint-best'} to "
            "--finetune. "
        )
    if "tokenizer" in changed:
        said += f"The tokenizer of the run is kept in its checkpoint; this one is {keeping.tokenizer}. "
    return said


def _head_of(now: Mapping[str, Any]) -> dict[str, Any]:
    return {HEAD: now["data"][HEAD]} if HEAD in now["data"] else {}


def _of_first_format(made: dict[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint of before tasks had flags of their own: it names those of every task, which decided nothing."""
    recipe = {name: value for name, value in made["recipe"].items() if name in now["recipe"]}
    return {**made, "recipe": {**recipe, STEPS_VERSION: 1}}


class Keeper:
    """Writes the checkpoints of a run and takes them over again.

    description: what the model is, for files of weights. tokenizer: content of its file, which goes into every
    checkpoint. resumed_from: as `find_resumable` found it.
    """

    def __init__(
        self,
        keeping: Keeping,
        process: utils.Process,
        backend: Backend,
        task: Task,
        description: Mapping[str, Any],
        tokenizer: bytes | None,
        ema: ModelEma | None,
        resumed_from: Path | None,
    ) -> None:
        self.keeping, self.process, self.backend, self.task = keeping, process, backend, task
        self.description, self.tokenizer, self.ema, self.resumed_from = description, tokenizer, ema, resumed_from
        self.told_of_best: Sequence[str] = ()  # of the best validation, where it was one of this process
        self.started = self.saved = (0, 0)  # where this process began, and its newest checkpoint stands

    def start(self, settings: Settings) -> tuple[RunPosition, EpochState]:
        """Where the run begins: at its checkpoint, whose state is taken over, or at `--start_epoch`. Collective."""
        position, state = RunPosition(settings.run.start_epoch), EpochState()
        if self.resumed_from is not None:
            extra = self.backend.load(self.resumed_from)
            position = RunPosition(**extra["progress"])
            state = EpochState.from_states(extra["states"], self.process.rank, self.process.world_size)
            if self.ema is not None and extra["ema"] is not None:
                self.ema.load(extra["ema"])
            if position.is_over(settings):
                logger.info("%s: already finished after epoch %d", self.resumed_from, position.epoch - 1)
            else:
                logger.info("%s: going on with epoch %d, step %d", self.resumed_from, position.epoch, position.step)
        elif not settings.model.finetune:
            logger.info("no --finetune: training starts from fresh weights")
        self.started = self.saved = position.place
        return position, state

    def save(self, position: RunPosition, state: EpochState) -> None:
        """Write everything needed to go on from here, unless that was done. Collective."""
        folder = self.keeping.folder
        if folder is None or position.place == self.saved:
            return
        self.saved = position.place
        path = folder / (checkpoint_name(position.place) + self.keeping.suffix)
        extra = {
            "tokenizer": None if self.tokenizer is None else as_tensor(self.tokenizer),
            "fingerprint": dict(self.keeping.fingerprint),
            "description": dict(self.description),
            "progress": asdict(position),
            "states": utils.gather(state.to_plain()),
            "ema": None if self.ema is None else self.ema.averages,
        }
        self.backend.save(path, extra)
        if self.process.is_main:
            prune(path, self.keeping.suffix, self.keeping.keep, self.resumed_from)

    def keep_best(self, settings: Settings, position: RunPosition, validation: Validation) -> None:
        """Write `checkpoint-best` when the validation metric improved.

        Where validation cannot be scored, the last epoch counts as the best. Collective.
        """
        if validation.score is None and settings.run.patience and position.best_epoch < 0:
            logger.warning("--patience has no effect: validation gives no %s here to improve", self.task.best_metric)
        if validation.score is not None and validation.score <= position.best:
            return
        position.best_epoch = position.epoch
        if validation.score is not None:
            position.best = validation.score
        facts = {
            "epoch": position.epoch,
            "metric": self.task.best_metric,
            self.task.best_metric: validation.score,
            "from": "average" if validation.averaged else "weights",
        }
        if validation.calibration is not None:
            facts["calibration"] = dict(validation.calibration)
        self.told_of_best = validation.lines
        averages = self.ema.averages if self.ema is not None and validation.averaged else None
        self._write_weights("checkpoint-best", {"", self.keeping.suffix}, facts, averages)

    def finish(self, settings: Settings, position: RunPosition) -> None:
        """Write the last weights as `checkpoint-last` and say what came out. Collective."""
        if position.epoch < settings.optimizer.epochs:
            logger.info(
                "no improvement for %d epochs: training ends after epoch %d of %d",
                position.without_improvement, position.epoch - 1, settings.optimizer.epochs,
            )  # fmt: skip
        if self.keeping.folder is not None:
            was_finished = self.started == position.place
            if not (was_finished and (self.keeping.folder / "checkpoint-last" / MODEL_FILE).is_file()):
                self._write_weights("checkpoint-last", {""}, {"epoch": position.epoch - 1, "from": "weights"}, None)
        if position.best > -math.inf:
            metric = self.task.best_metric
            logger.info("best validation %s %.2f, after epoch %d", metric, position.best, position.best_epoch)
        for line in self.told_of_best:
            logger.info("%s", line)

    def _write_weights(
        self, name: str, suffixes: set[str], facts: Mapping[str, Any], averages: Mapping[str, Any] | None
    ) -> None:
        """The whole weights in fp32: a folder with `model.safetensors` for the suffix "", and one `.pth` file."""
        if self.keeping.folder is None:
            return
        averages = averages or {}  # frozen parameters have none
        whole = ((each, averages.get(each, tensor)) for each, tensor in self.backend.full_parameters())
        weights = {parameter: tensor.detach().float().cpu() for parameter, tensor in whole}
        if self.process.is_main:
            for suffix in sorted(suffixes):
                path = self.keeping.folder / f"{name}{suffix}"
                with errors_named(path):
                    write_weights(path, weights, {**self.description, **facts}, self.tokenizer)
        utils.barrier()
