"""Fine-tune BEiT-3, or predict with it: settings → parts → train or predict. Names no task.

`torchrun --nproc_per_node=GPUS run_beit3_finetuning.py …`, or plain `python3 run_beit3_finetuning.py …` as one process.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# Read when torch is loaded. Threads that wait by spinning take the core away from the loader's processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from beit3.system.errors import InputError, UnreadableError
from beit3.system.terminal import for_terminal, print_anywhere
from runs import cause
from runs.command_line import read_settings
from runs.settings import Settings

if TYPE_CHECKING:
    import utils
    from engine_for_finetuning import EpochState, TrainingRun
    from runs.state import Keeper, RunPosition


def main(argv: list[str] | None = None) -> int:
    """Read the command line, then train or predict; the exit status."""
    print_anywhere()
    try:
        settings = read_settings(argv)
    except InputError as error:  # all processes of a launcher read the same line; one of them tells
        if int(os.environ.get("RANK", "0")) == 0:
            print(for_terminal(f"error: {error}"), file=sys.stderr)
            cause.leave(str(error))
        return 2
    # PyTorch is loaded from here on, so that help and mistakes in the flags are told at once.
    from runs import check, session

    return session.run(settings, check.check if settings.run.check else predict if settings.run.eval else train)


def train(settings: Settings, process: utils.Process, stop: utils.StopSignal) -> int:
    """Fine-tune, validate after each epoch, keep the best; the exit status.

    Raises:
        utils.StopRequested: after a checkpoint was written from which the same command goes on.
    """
    from beit3.system.machine import free_memory
    from engine_for_finetuning import EpochState, TrainingRun
    from runs import assembly, log, state
    from utils import StopRequested

    # What is learned from, and whether there is a run to go on with.
    task = assembly.build_task(settings)
    checkpoint = assembly.read_weights(settings)
    train_set, val_set = task.dataset("train", training=True), task.dataset("val", training=False)
    train_set.skip_bad_images = settings.data.skip_bad_images
    assembly.check_data(settings, process, task, train_set, val_set)
    sampler = assembly.training_sampler(settings, train_set, process)
    fingerprint = state.make_fingerprint(settings, task, process, train_set, val_set)
    keeping = state.what_is_kept(settings, task, fingerprint, sampler.steps_per_epoch)
    resume_from = state.find_resumable(keeping, process)

    # What learns.
    room = free_memory(process.device)
    model = assembly.build_model(settings, task, checkpoint, process.device)
    num_parameters, num_trained = model.num_parameters, model.num_trained
    assembly.check_room(settings, process, model, sampler.steps_per_epoch, resume_from)
    assembly.announce_memory(settings, task, model, process, room)
    model = model.to(process.device)
    del checkpoint  # its memory is not needed any more
    backend = assembly.build_backend(settings, model, process)
    ema = assembly.build_average(settings, backend)

    # Where it begins.
    description = assembly.describe(settings, task, fingerprint["data"])
    tokenizer = task.tokenizer.content if settings.task.uses_text else None
    keeper = state.Keeper(keeping, process, backend, task, description, tokenizer, ema, resume_from)
    position, epoch_state = keeper.start(settings)
    steps = sampler.steps_per_epoch

    def after_step(epoch: int, epoch_state: EpochState) -> None:
        position.step = epoch_state.step
        every = settings.run.save_ckpt_steps
        if every and (epoch * steps + epoch_state.step) % every == 0 and epoch_state.step < steps:
            keeper.save(position, epoch_state)
        stop.check()

    run = TrainingRun(
        task,
        backend,
        process,
        dataset=train_set,
        sampler=sampler,
        loader=assembly.make_loader(settings, train_set, sampler, process),
        val_loader=assembly.evaluation_loader(settings, val_set, process),
        schedule=assembly.make_schedule(settings.optimizer, steps),
        update_freq=settings.optimizer.update_freq,
        seed=settings.data.seed,
        after_step=after_step,
        check_stop=stop.check,
        ema=ema,
        writer=log.open_writer(settings, process.is_main, position.epoch * steps + position.step),
        max_skipped_steps=settings.run.max_skipped_steps,
        num_parameters=num_parameters,
        num_trained=num_trained,
    )
    log.announce(settings, run, len(val_set))
    try:
        while not position.is_over(settings):
            one_epoch(settings, run, keeper, position, epoch_state)
            epoch_state = EpochState()
    except (StopRequested, UnreadableError):  # on all processes alike
        keeper.save(position, epoch_state)
        raise
    keeper.finish(settings, position)
    return 0


def one_epoch(
    settings: Settings, run: TrainingRun, keeper: Keeper, position: RunPosition, epoch_state: EpochState
) -> None:
    """What is left of an epoch: training, validation, log, checkpoints; `position` then stands at the next one."""
    from engine_for_finetuning import EpochState, summarize, train_one_epoch, validate
    from runs import log

    epoch = position.epoch
    speed = {}
    if epoch_state.step < run.sampler.steps_per_epoch:
        speed["images_per_second"] = train_one_epoch(run, epoch, epoch_state)
    training = {**summarize(run, epoch, epoch_state), **speed}
    validation = validate(run, epoch)
    keeper.keep_best(settings, position, validation)
    log.log_epoch(settings.run.output_dir, run, epoch, training, validation)
    position.epoch, position.step = epoch + 1, 0
    if (epoch + 1) % settings.run.save_ckpt_freq == 0 or position.is_over(settings):
        keeper.save(position, EpochState())


def predict(settings: Settings, process: utils.Process, stop: utils.StopSignal) -> int:
    """Answer a split with a checkpoint, write the submission and, where they can be known, scores; the exit status.

    Raises:
        InputError: before the first batch, for whatever can be known by then.
        utils.StopRequested: nothing was written.
    """
    from engine_for_finetuning import evaluate
    from runs import assembly, log

    task, split, folder = assembly.build_task(settings), settings.data.split, Path(settings.run.output_dir)
    checkpoint = assembly.read_weights(settings)
    dataset = task.dataset(split, training=False)
    assembly.check_prediction(task, dataset, split, folder, process)
    assembly.check_pictures(settings, process, dataset)
    model = assembly.build_model(settings, task, checkpoint, process.device).to(process.device)
    columns, unreadable = evaluate(
        task,
        model,
        assembly.evaluation_loader(settings, dataset, process),
        process,
        autocast=assembly.autocast(settings, process),
        what=f"predicting {split}",
        check_stop=stop.check,
    )
    if columns is None:  # not the first process
        return 0
    problems = assembly.problems_afterwards(task, columns, unreadable, dataset, split)
    return 0 if log.write_results(folder, task, columns, dataset, split, problems) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        for child in multiprocessing.active_children():
            child.kill()  # a loader's worker that hangs would be waited for
