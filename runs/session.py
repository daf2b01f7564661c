"""Around a run: the processes join, errors become a sentence and an exit status, signals a stop that all agree on."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import utils
from beit3.data import decoder_warnings
from beit3.system.errors import BadImageError, CheckpointError, InputError
from runs import cause
from runs.output_folder import Lock, why_not_writable
from runs.settings import Settings
from runs.together import SharedRefusal, refuse_together

logger = logging.getLogger(__name__)

# Most mistakes are found by all processes alike. Where the first has found it too, the launcher ends the others within
# this time, so it is told once; where only another one has (it has no GPU, say), that one tells.
SECONDS_FOR_THE_FIRST = 5.0

Body = Callable[[Settings, utils.Process, utils.StopSignal], int]


def run(settings: Settings, body: Body) -> int:
    """`body` with the other processes that a launcher started, or alone; the exit status.

    0: done. 1: failed, and said why. 2: the user's input is wrong. 128 + signal: stopped by it.
    """
    utils.set_up_logging(is_main=True)
    status = 1
    try:
        status = _run(settings, body)
    except (InputError, ValueError) as error:
        status = 2
        first = os.environ.get("RANK", "0") == "0"
        if not first and not isinstance(error, SharedRefusal):
            time.sleep(SECONDS_FOR_THE_FIRST)
        if first or not isinstance(error, SharedRefusal):
            tell(str(error))
    except (BadImageError, FloatingPointError, CheckpointError) as error:
        # From a loader's process it comes with that process's traceback; the last line is the message.
        tell(str(error).strip().splitlines()[-1])
    except RuntimeError as error:
        told = explain(error)
        if told is None:
            raise
        tell(told)
    finally:
        # After an error other processes may wait in a collective call; only leaving frees them.
        if status in (0, 2) or utils.world_size() == 1:
            utils.stop_processes()
    return status


def tell(message: str) -> None:
    """Say why the run ends, to the user and to the launcher."""
    logger.error("%s", message)
    cause.leave(message)


def _run(settings: Settings, body: Body) -> int:
    flags = settings.run
    process = utils.start_processes(
        flags.device, on_itp=flags.dist_on_itp, init_method=flags.dist_url, timeout_seconds=flags.timeout
    )
    utils.set_up_logging(process.is_main)
    if settings.ignored:
        logger.warning("flags without effect: %s", "; ".join(settings.ignored))
    for sentence in settings.assumed:
        logger.info("%s", sentence)
    if flags.deterministic:
        utils.make_deterministic()
    trains = not flags.eval and not flags.check
    if trains or flags.eval:
        check_output(flags.output_dir)
    kept_in = Path(flags.output_dir) if flags.output_dir and trains else None
    keeps_nothing = not flags.output_dir and trains
    with hold(kept_in, process, flags.timeout / 2):  # the other processes wait too
        stop = utils.StopSignal(flags.timeout)
        if keeps_nothing:
            logger.warning("--output_dir '': no checkpoint and no log of this training will be kept")
        try:
            status = body(settings, process, stop)
            tell_of_damaged_pictures(process)
            return status
        except utils.StopRequested as request:
            goes_on = kept_in is not None and flags.save_ckpt
            logger.info("%s%s", request, "; the same command goes on from here" if goes_on else "")
            return 128 + request.signum
        finally:
            stop.release()
            if keeps_nothing:
                logger.warning("--output_dir '': nothing of this training was kept")


def tell_of_damaged_pictures(process: utils.Process) -> None:
    """How many pictures were read although they are damaged; each was named, but that was long ago. Collective."""
    damaged = sum(utils.gather(decoder_warnings.count()))
    if damaged and process.is_main:
        logger.warning("%d damaged pictures were read all the same; the log names the first of them", damaged)


def check_output(output_dir: str) -> None:
    """That every process can write to the folder, which is made where it is not there. Collective.

    Raises:
        InputError: on all processes, when one cannot.
    """
    problem = why_not_writable(Path(output_dir)) if output_dir else None
    refuse_together(list(dict.fromkeys(each for each in utils.gather(problem) if each is not None)))


@contextlib.contextmanager
def hold(folder: Path | None, process: utils.Process, patience_seconds: float) -> Iterator[None]:
    """Keep other trainings out of the folder while the block runs; the first process does, for all. Collective.

    Raises:
        InputError: on all processes, when another training is there.
    """
    lock, problems = None, []
    if folder is not None and process.is_main:
        try:
            lock = Lock(folder, patience_seconds)
        except InputError as error:
            problems = error.problems
    refuse_together(problems)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def explain(error: RuntimeError) -> str | None:
    """What PyTorch's errors about lost processes mean to a user; None for any other error."""
    text = str(error)
    if "DataLoader worker" in text or "DataLoader timed out" in text:
        return (
            f"a loader's worker died or hung ({text.splitlines()[0]}). Was memory short, or a disk away? The same "
            "command goes on from the last checkpoint; --num_workers 0 loads without workers"
        )
    if isinstance(error, torch.distributed.DistError) or "imed out" in text or "onnection" in text:
        return (
            f"another process died or did not answer within --timeout ({text.splitlines()[0][:200]}). The same command "
            "goes on from the last checkpoint"
        )
    return None
