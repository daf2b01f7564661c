"""Around a run: the processes join, errors become a sentence and an exit status, signals a stop that all agree on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch

import utils
from beit3.system.errors import BadImageError, CheckpointError, InputError
from runs.settings import Settings

logger = logging.getLogger(__name__)

Body = Callable[[Settings, utils.Process, utils.StopSignal], None]


def run(settings: Settings, body: Body) -> int:
    """`body` with the other processes that a launcher started, or alone; the exit status.

    0: done. 1: failed, and said why. 2: the user's input is wrong. 128 + signal: stopped by it.
    """
    utils.set_up_logging(is_main=True)
    status = 1
    try:
        status = _run(settings, body)
    except (InputError, ValueError) as error:  # the same on all processes, told once
        if int(os.environ.get("RANK", "0")) == 0:
            logger.error("%s", error)
        status = 2
    except (BadImageError, FloatingPointError, CheckpointError) as error:
        # From a loader's process it comes with that process's traceback; the last line is the message.
        logger.error("%s", str(error).strip().splitlines()[-1])
    except RuntimeError as error:
        told = explain(error)
        if told is None:
            raise
        logger.error("%s", told)
    finally:
        # After an error other processes may wait in a collective call; only leaving frees them.
        if status in (0, 2) or utils.world_size() == 1:
            utils.stop_processes()
    return status


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
    if flags.output_dir:
        Path(flags.output_dir).mkdir(parents=True, exist_ok=True)
    stop = utils.StopSignal(flags.timeout)
    try:
        body(settings, process, stop)
    except utils.StopRequested as request:
        goes_on = not flags.eval and flags.output_dir and flags.save_ckpt
        logger.info("%s%s", request, "; the same command goes on from here" if goes_on else "")
        return 128 + request.signum
    finally:
        stop.release()
    return 0


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
