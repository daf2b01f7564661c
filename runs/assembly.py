"""The parts of a run, each made from the settings by one function."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import utils
from beit3.data.image_text import ImageTextDataset
from beit3.data.images import screen_images
from beit3.data.loading import EpochSampler, EvaluationSampler, build_loader
from beit3.data.tokenizer import Tokenizer
from beit3.model.compilation import compile_layers
from beit3.model.description import FORMAT
from beit3.model.weights import Checkpoint, load_weights, read_checkpoint
from beit3.system.errors import InputError
from beit3.training.backends import Backend, BackendSettings, PlainBackend, choose_precision, prediction_context
from beit3.training.ema import ModelEma
from beit3.training.freezing import freeze
from beit3.training.memory_estimate import GIGABYTE, Demand, training_demand
from modeling_finetune import BEiT3Model, create_model, load_model
from optim_factory import cosine_schedule, create_optimizer, layer_id, parameter_groups
from runs import output_folder
from runs.settings import OptimizerSettings, Settings
from runs.together import refuse_together
from tasks.base import Columns, Task, make_task
from tasks.checkpoint import other_tokenizer

logger = logging.getLogger(__name__)


def build_task(settings: Settings) -> Task:
    """The task, with what the checkpoint to predict with says of its head."""
    tokenizer = None if settings.tokenizer is None else Tokenizer(settings.tokenizer)
    task = make_task(settings.task, settings.data, tokenizer)
    for remark in settings.remarks:
        logger.warning("%s", remark)
    if tokenizer is not None and settings.data.sentencepiece_model is None:
        held_by = settings.model.finetune or settings.run.resume
        logger.info("tokenizer: the one that %s holds, SHA-256 %s", held_by, tokenizer.sha256[:12])
    if settings.checkpoint is not None:
        task.adopt(settings.checkpoint.description)
        task.meet_data()
    return task


def read_weights(settings: Settings) -> Checkpoint | None:
    """The weights to start from or to predict with; None where none are named."""
    if settings.checkpoint is not None and settings.checkpoint.weights is not None:
        return settings.checkpoint.weights
    named = settings.model.finetune or (settings.run.resume if settings.run.eval else "")
    return read_checkpoint(named, settings.model.model_key, settings.model.model_prefix) if named else None


def build_model(settings: Settings, task: Task, checkpoint: Checkpoint | None, device: torch.device) -> BEiT3Model:
    """The model on the CPU, with the checkpoint's weights in it if there is one; for training, frozen and compiled as
    asked for."""
    model_settings, head_rows = settings.model, None
    if checkpoint is not None and settings.task.uses_text:
        problems = other_tokenizer(checkpoint.path, checkpoint.description, task.tokenizer, held=False)
        if problems:
            raise InputError(problems)
    if settings.run.eval:
        assert checkpoint is not None  # the command line sees to that
        return _loaded_model(settings, task, checkpoint)
    if checkpoint is not None:
        checkpoint, head_rows = task.starting_head(checkpoint)
    # A head whose rows move has the size that the task wants; any other keeps that of the checkpoint.
    decides = {} if checkpoint is None or head_rows is not None else checkpoint.state_dict
    utils.seed_everything(settings.data.seed)
    model: Any = create_model(
        settings.model_name,
        vocab_size=model_settings.vocab_size,
        drop_path_rate=model_settings.drop_path,
        checkpoint_activations=model_settings.checkpoint_activations,
        **task.model_options(decides),
    )
    if checkpoint is not None:
        report = load_weights(model, checkpoint, new_head=True, head_rows=head_rows)
        logger.info("%s: %s", checkpoint.path, report)
    freeze(model, model_settings.freeze)
    if model_settings.compile:
        compile_layers(model.beit3, device)
    return model


def _loaded_model(settings: Settings, task: Task, checkpoint: Checkpoint) -> BEiT3Model:
    """The model to predict with."""
    options = task.model_options(checkpoint.state_dict)
    model, report = load_model(settings.model_name, checkpoint, vocab_size=settings.model.vocab_size, **options)
    logger.info("%s: %s", checkpoint.path, report)
    if settings.model.compile:
        logger.info("--compile is for training; prediction runs without")
    return model


def describe(settings: Settings, task: Task, data: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself, so that prediction needs no flag and no other file. data: digests."""
    text: dict[str, Any] = {}
    if settings.task.uses_text:
        text = {"num_max_bpe_tokens": settings.data.num_max_bpe_tokens, "tokenizer_sha256": task.tokenizer.sha256}
    # Not where files lie or how many workers load them: one run leaves the same checkpoint anywhere.
    flags = {name.removeprefix("--"): value for name, value in settings.recipe().items()}
    return {
        "format": FORMAT,
        "model": settings.model_name,
        "task": settings.task.trains_as,
        "image_size": settings.data.input_size,
        "vocab_size": settings.model.vocab_size,
        **text,
        **task.describe(),
        "flags": flags,
        "data": data,
    }


def training_sampler(settings: Settings, dataset: ImageTextDataset, process: utils.Process) -> EpochSampler:
    optimizer = settings.optimizer
    return EpochSampler(
        len(dataset),
        optimizer.batch_size,
        optimizer.update_freq,
        process.rank,
        process.world_size,
        settings.data.seed,
    )


def make_loader(
    settings: Settings,
    dataset: ImageTextDataset,
    sampler: EpochSampler | EvaluationSampler,
    process: utils.Process,
) -> DataLoader:
    pin = settings.data.pin_mem and process.device.type == "cuda"
    return build_loader(dataset, sampler, settings.data.num_workers, pin, settings.run.timeout)


def evaluation_loader(settings: Settings, dataset: ImageTextDataset, process: utils.Process) -> DataLoader:
    batch_size = settings.optimizer.eval_batch_size or int(1.5 * settings.optimizer.batch_size)
    sampler = EvaluationSampler(len(dataset), batch_size, process.rank, process.world_size)
    dataset.report_bad_images = True
    return make_loader(settings, dataset, sampler, process)


def problems_of_rows(task: Task, dataset: ImageTextDataset, split: str) -> list[str]:
    """`Task.check_rows`, with official files that cannot be read among the problems."""
    try:
        return task.check_rows(dataset, split)
    except InputError as error:
        return error.problems
    except OSError as error:
        return [f"{error.filename}: cannot be read ({error.strerror})"]


def problems_afterwards(
    task: Task, columns: Columns, unreadable: list[str], dataset: ImageTextDataset, split: str
) -> list[str]:
    """Why what was predicted is no complete submission. unreadable: what is wrong with pictures, see `evaluate`."""
    answered = len(columns["row"])
    if answered != len(dataset):
        return [f"{answered} predictions for {len(dataset)} examples", *unreadable]
    return problems_of_rows(task, dataset, split)


def check_prediction(task: Task, dataset: ImageTextDataset, split: str, folder: Path, process: utils.Process) -> None:
    """Whatever could spoil a prediction's end and can be known at its beginning, by the first process for all.

    Raises:
        InputError: on every process, before hours were spent.
    """
    problems: list[str] = []
    if process.is_main:
        problems = task.check_references(split, final=True) or problems_of_rows(task, dataset, split)
        problems += output_folder.check_room_for_predictions(folder, len(dataset))
        remark = task.remark(split)
        if remark is not None:
            logger.warning("%s", remark)
    refuse_together(problems)


def check_data(settings: Settings, process: utils.Process, task: Task, *datasets: ImageTextDataset) -> None:
    """Whatever of a training's data can be judged before an epoch is trained: right answers and pictures.

    Raises:
        InputError: on every process.
    """
    refuse_together(task.check_references("val", final=False) if process.is_main else [])
    check_pictures(settings, process, *datasets)


def check_room(
    settings: Settings, process: utils.Process, model: BEiT3Model, steps_per_epoch: int, resume_from: Path | None
) -> None:
    """That checkpoints fit on the disk, see `runs.output_folder.check_room`. Raises InputError on every process."""
    problems: list[str] = []
    if process.is_main:
        problems = output_folder.check_room(
            settings, model.num_parameters, steps_per_epoch, resume_from, model.num_trained
        )
    refuse_together(problems)


def check_pictures(settings: Settings, process: utils.Process, *datasets: ImageTextDataset) -> None:
    """A quick look at every picture before anything long starts, by the first process for all.

    Raises:
        InputError: on every process, listing the pictures that cannot be read, but for those that training may skip.
    """
    problems: list[str] = []
    if process.is_main:
        needed = [dataset for dataset in datasets if not dataset.skip_bad_images]
        paths = sorted({path for dataset in needed for path in dataset.image_paths()})
        problems = screen_images(paths, settings.data.image_path or settings.data.data_path)
    if problems:
        without = "" if settings.run.eval else "; --skip_bad_images trains without them"
        problems.append(f"mend or remove them{without}")
    refuse_together(problems)


def backend_settings(settings: Settings, process: utils.Process) -> BackendSettings:
    return BackendSettings(
        precision=choose_precision(settings.run.precision, process.device),
        update_freq=settings.optimizer.update_freq,
        clip_grad=settings.optimizer.clip_grad,
        batch_size=settings.optimizer.batch_size,
        zero_stage=settings.deepspeed.zero_stage,
        initial_scale_power=settings.deepspeed.initial_scale_power,
        timeout_seconds=settings.run.timeout,
    )


def build_backend(settings: Settings, model: BEiT3Model, process: utils.Process) -> Backend:
    """Optimizer and what takes its steps: plain PyTorch or DeepSpeed."""
    o, how = settings.optimizer, backend_settings(settings, process)
    groups = parameter_groups(model, o.weight_decay, o.layer_decay, o.task_head_lr_weight)
    optimizer = create_optimizer(groups, o.opt, lr=o.lr, eps=o.opt_eps, betas=o.opt_betas, momentum=o.momentum)
    if settings.deepspeed.enable_deepspeed:
        from beit3.training.deepspeed_backend import DeepSpeedBackend

        return DeepSpeedBackend(model, optimizer, how)
    return PlainBackend(model, optimizer, how)


def build_average(settings: Settings, backend: Backend) -> ModelEma | None:
    """The average of the trained weights, where one is asked for."""
    model = settings.model
    if not model.model_ema:
        return None
    trained = {name for name, parameter in backend.module.named_parameters() if parameter.requires_grad}
    parameters = ((name, value) for name, value in backend.full_parameters() if name in trained)
    return ModelEma(parameters, model.model_ema_decay, model.model_ema_force_cpu)


def make_schedule(optimizer: OptimizerSettings, steps_per_epoch: int, epochs: int | None = None) -> list[float]:
    """Learning rate of every step of the whole run; epochs: None: as many as the settings say."""
    return cosine_schedule(
        optimizer.lr,
        optimizer.min_lr,
        epochs=optimizer.epochs if epochs is None else epochs,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=optimizer.warmup_epochs,
        warmup_steps=optimizer.warmup_steps,
    )


def memory_demand(settings: Settings, task: Task, model: BEiT3Model, process: utils.Process) -> Demand:
    """What a step of the training takes."""
    return training_demand(
        model.beit3.config,
        model.num_parameters,
        backend_settings(settings, process),
        trained=model.num_trained,
        layers_below=layers_below(model),
        device=process.device.type,
        text_tokens=task.text_tokens(),
        output_values=task.output_values(model),
        causal_text=task.causal_text,
        zero=settings.deepspeed.enable_deepspeed,
        world_size=process.world_size,
        average=settings.model.model_ema and not settings.model.model_ema_force_cpu,
    )


def memory_advice(settings: Settings, demand: Demand, room: float) -> str | None:
    """What to do where `room` bytes may be too few; None where they are enough."""
    deepspeed = settings.deepspeed
    return demand.advice(
        room,
        update_freq=settings.optimizer.update_freq,
        zero_stage=deepspeed.zero_stage if deepspeed.enable_deepspeed else 0,
        recomputes=settings.model.checkpoint_activations,
    )


def announce_memory(settings: Settings, task: Task, model: BEiT3Model, process: utils.Process, room: float) -> None:
    """Say what the training will take of `room` bytes, and what to do where that is not enough."""
    demand = memory_demand(settings, task, model, process)
    logger.info("memory per process on %s, about %s; %.1f GB are free", process.device.type, demand, room / GIGABYTE)
    advice = memory_advice(settings, demand, room)
    if advice is not None:
        logger.warning("%s", advice)


def layers_below(model: BEiT3Model) -> int:
    """Layers below the lowest trained parameter, which have no backward pass."""
    layers = model.num_layers
    return max(0, min(layer_id(name, layers) for name, each in model.named_parameters() if each.requires_grad) - 1)


def autocast(settings: Settings, process: utils.Process) -> Any:
    """Makes the context of a forward pass in the precision of a prediction."""
    return prediction_context(settings.run.precision, process.device)
