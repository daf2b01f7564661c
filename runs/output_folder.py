"""The folder that a run writes to: whether it can be written, whether its disk has room, and whose it is right now."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import psutil

from beit3.system.errors import InputError, printable
from beit3.training.checkpoints import checkpoints_in, position_of
from runs.settings import Settings

logger = logging.getLogger(__name__)

LOCK_FILE = ".in_use.lock"
BYTES_PER_PREDICTION = 500  # of submission and report together; an answer or a caption is seldom longer
GIGABYTE = 1e9


def why_not_writable(folder: Path) -> str | None:
    """Make the folder where it is not there, and try to write in it; what is wrong, or None.

    A file is really written, because permissions do not tell of a disk that is read-only or full.
    """
    try:
        for part in (folder, *folder.parents):
            if part.exists() and not part.is_dir():
                return f"--output_dir {folder}: {part} is a file where a folder is needed; choose another folder"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".trial.") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return (
            f"--output_dir {folder}: cannot be written ({error.strerror}; {_free_text(folder)}); make it writable, or "
            "choose another folder"
        )
    return None


def free_bytes(folder: Path) -> int | None:
    """What an ordinary user can still write there; None where the system does not say."""
    for part in (folder, *folder.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(part).free
    return None


def _free_text(folder: Path) -> str:
    free = free_bytes(folder)
    return "free bytes are not known" if free is None else f"{free} bytes are free"


def checkpoint_bytes(settings: Settings, num_parameters: int, num_trained: int) -> int:
    """Of one full checkpoint, about: fp32 weights; of those that are trained what the optimizer keeps, the average."""
    # Adam keeps two values for each weight; of other optimizers one is assumed, so that no run is refused wrongly.
    values = 2 if "adam" in settings.optimizer.opt.lower() else 1
    values += settings.model.model_ema
    copies = 1 + settings.deepspeed.enable_deepspeed  # the whole weights lie beside the engine's own files
    return 4 * (copies * num_parameters + values * num_trained)


def check_room(
    settings: Settings,
    num_parameters: int,
    steps_per_epoch: int,
    resume_from: Path | None,
    num_trained: int | None = None,
) -> list[str]:
    """Problems where not one checkpoint fits on the disk; warns where not all that are to be kept may fit.

    Call it on the first process, before the training. resume_from: see `runs.state.find_resumable`.
    num_trained: of the parameters; None: all.
    """
    run, folder = settings.run, Path(settings.run.output_dir)
    free = free_bytes(folder) if run.output_dir and run.save_ckpt else None
    if free is None or _is_finished(settings, resume_from):
        return []
    trained = num_parameters if num_trained is None else num_trained
    one, weights = checkpoint_bytes(settings, num_parameters, trained), 4 * num_parameters
    every = settings.optimizer.epochs / run.save_ckpt_freq
    if run.save_ckpt_steps:
        every += settings.optimizer.epochs * steps_per_epoch / run.save_ckpt_steps
    kept = max(1, min(run.keep_checkpoints or every, every))
    # The new one is complete before the oldest goes. The best is written as a folder and, by plain PyTorch, a .pth.
    total = int((kept + 1) * one + (3 if settings.deepspeed.enable_deepspeed else 4) * weights)
    left = max(total - _bytes_of_checkpoints(folder), one)
    facts = (
        f"--output_dir {folder}: {free} bytes are free ({free / GIGABYTE:.2f} GB); one checkpoint takes about {one}, "
        f"all that this run keeps about {total} ({total / GIGABYTE:.2f} GB)"
    )
    if free < one:
        return [f"{facts}. Not even one fits: make room, or choose another disk"]
    if free < left:
        logger.warning("%s. They may not fit: make room, or lower --keep_checkpoints", facts)
    return []


def _is_finished(settings: Settings, resume_from: Path | None) -> bool:
    if resume_from is None:
        return False
    position = position_of(resume_from, resume_from.suffix)
    return position is not None and position[0] >= settings.optimizer.epochs


def _bytes_of_checkpoints(folder: Path) -> int:
    paths = [*checkpoints_in(folder, ""), *checkpoints_in(folder, ".pth"), *folder.glob("checkpoint-[bl]*")]
    files = {file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])}
    return sum(file.stat().st_size for file in files if file.is_file())


def check_room_for_predictions(folder: Path, predictions: int) -> list[str]:
    """The problem that submission and report will not fit on the disk; empty where they do."""
    free, needed = free_bytes(folder), BYTES_PER_PREDICTION * predictions
    if free is None or free >= needed:
        return []
    return [
        f"--output_dir {folder}: {free} bytes are free, {predictions} predictions may take {needed}; make room, or "
        "choose another disk"
    ]


class Lock:
    """Keeps a second training out of a folder for as long as this process lives.

    A POSIX record lock rather than `flock`: a loader's worker that outlives a killed training would go on holding the
    latter, and network file systems know the former better. Neither is held by a process that is gone.
    """

    SECONDS_BETWEEN_TRIES = 0.2
    TRIES = 5  # before another is believed to hold it: it may be just ending, or not have said yet who it is

    def __init__(self, folder: Path, patience_seconds: float = 1800) -> None:
        """Take the lock.

        patience_seconds: how long to wait for a training whose launcher is gone to write its checkpoint and end.

        Raises:
            InputError: another training holds it.
        """
        self.path = folder / LOCK_FILE
        self._file: IO[str] | None = None
        told, refused, until = False, 0, time.monotonic() + patience_seconds
        while not self._taken():
            holder = self._holder()
            waits = _is_orphan(holder) and time.monotonic() < until
            refused = 0 if waits else refused + 1
            if refused == self.TRIES:
                raise InputError(
                    f"--output_dir {folder}: a training writes there already: process {holder.get('pid', '?')} on "
                    f"{holder.get('host', 'a host that is not known')}, started {holder.get('started', '?')}. Wait for "
                    "it, stop it, or choose another --output_dir"
                )
            if waits and not told:
                told = True
                logger.info(
                    "%s: process %s, whose launcher is gone, is writing its checkpoint; waiting for it to end",
                    folder, holder["pid"],
                )  # fmt: skip
            time.sleep(self.SECONDS_BETWEEN_TRIES)

    def _taken(self) -> bool:
        """Try once. Where the file system has no locks, that is told and counts as taken."""
        with contextlib.ExitStack() as cleaning:
            try:
                file = cleaning.enter_context(open(self.path, "a+", encoding="utf-8"))
            except OSError as error:  # of another user, perhaps
                raise InputError(
                    f"{self.path}: cannot be opened ({error.strerror}); remove it if no training writes there, or "
                    "choose another --output_dir"
                ) from error
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return False
            except OSError as error:
                logger.warning(
                    "%s: its file system has no locks (%s); see to it that no second training writes there",
                    self.path.parent, error.strerror,
                )  # fmt: skip
                self.path.unlink(missing_ok=True)
                return True
            if not _is_at(file, self.path):  # the one that held it has just ended, and removed the file
                return self._taken()
            file.truncate(0)
            facts = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": datetime.now().astimezone().isoformat(timespec="seconds"),
                "launcher": os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None,
            }
            file.write(json.dumps(facts) + "\n")
            file.flush()
            cleaning.pop_all()
            self._file = file
            return True

    def _holder(self) -> dict[str, Any]:
        """Who holds it, as far as the file tells; a file may hold anything."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if isinstance(content, dict):
                return {
                    name: printable(value)[:100] if isinstance(value, str) else value
                    for name, value in content.items()
                    if type(value) in (str, int)
                }
        return {}

    def release(self) -> None:
        """Remove the file, then let go of it: whoever opened it meanwhile sees that it is gone and tries again."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                if _is_at(self._file, self.path):
                    self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _is_orphan(holder: dict[str, Any]) -> bool:
    """Whether the launcher of a training on this machine is gone: it has noticed by its next step, and ends."""
    launcher, pid = holder.get("launcher"), holder.get("pid")
    if holder.get("host") != socket.gethostname() or type(launcher) is not int or type(pid) is not int:
        return False
    try:
        return psutil.Process(pid).ppid() != launcher
    except psutil.Error:  # it has ended meanwhile, or its number means nothing here, as in a container
        return False


def set_aside(path: Path) -> Path:
    """Rename a file or folder that is damaged, beside itself, to a name that is free; that name."""
    taken = {int(match[1] or 1) for other in path.parent.iterdir() if (match := _damaged_name(path, other))}
    number = max(taken, default=0) + 1
    aside = path.with_name(f"{path.name}.damaged" + (f"-{number}" if number > 1 else ""))
    os.replace(path, aside)
    return aside


def _damaged_name(path: Path, other: Path) -> re.Match[str] | None:
    return re.fullmatch(rf"{re.escape(path.name)}\.damaged(?:-(\d+))?", other.name)
