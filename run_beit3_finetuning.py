"""Fine-tune BEiT-3, or predict with it: flags → checks → assembly → train / evaluate. Names no task.

`torchrun --nproc_per_node=GPUS run_beit3_finetuning.py …`, or plain `python3 run_beit3_finetuning.py …` as one process.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import multiprocessing
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

# Read when torch is loaded. Threads that wait by spinning take the core away from the loader's processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import timm
import torch
from torch.utils.data import DataLoader

import utils
from beit3.data.augmentation import CROP_SCALE, INTERPOLATIONS
from beit3.data.image_text import ImageTextDataset
from beit3.data.images import screen_images
from beit3.data.loading import EpochSampler, EvaluationSampler, build_loader
from beit3.model.compilation import compile_layers
from beit3.model.weights import Checkpoint, load_weights, read_checkpoint
from beit3.system.atomic_files import atomic_write
from beit3.system.errors import BadImageError, CheckpointError, InputError
from beit3.system.machine import free_memory
from beit3.training.backends import DTYPES, Backend, BackendSettings, PlainBackend, choose_precision
from beit3.training.checkpoints import versions
from beit3.training.ema import ModelEma
from beit3.training.memory_estimate import GIGABYTE, training_demand
from engine_for_finetuning import EpochState, TrainingRun, Validation, evaluate, summarize, train_one_epoch, validate
from modeling_finetune import MODEL_NAMES, BEiT3Model
from optim_factory import cosine_schedule, create_optimizer, parameter_groups
from runs.state import Keeper, Keeping, Progress, find_resumable, write_log
from tasks import PLANNED, TASKS, Record, Task, TaskSettings

logger = logging.getLogger(__name__)

FORMAT = 1  # of the description inside checkpoints


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    _add_model_flags(parser.add_argument_group("model and task"))
    _add_optimizer_flags(parser.add_argument_group("optimizer and schedule"))
    _add_data_flags(parser.add_argument_group("data"))
    _add_run_flags(parser.add_argument_group("run"))
    _add_captioning_flags(parser.add_argument_group("captioning"))
    _add_imagenet_flags(parser.add_argument_group("ImageNet classification (not there yet)"))
    _add_deepspeed_flags(parser.add_argument_group("DeepSpeed"))
    return parser.parse_args(argv)


def _add_model_flags(group: Any) -> None:
    group.add_argument("--model", default="beit_base_patch16_224", metavar="NAME", help="beit3_base_patch16_480, …")
    group.add_argument("--task", required=True, choices=[*TASKS, *PLANNED], help="what to fine-tune for")
    group.add_argument("--input_size", type=int, default=224, help="side of the pictures, pixels; as in --model")
    group.add_argument("--drop_path", type=float, default=0.1, help="stochastic depth of the last layer, 0-1")
    group.add_argument("--checkpoint_activations", action="store_true", help="less memory for about a third more time")
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the encoder's layers for training: some minutes at the start, equal within rounding; meant "
        "for GPUs. Goes on without, and says so, where there is no compiler",
    )
    group.add_argument("--sentencepiece_model", type=Path, required=True, help="the tokenizer, beit3.spm")
    group.add_argument("--vocab_size", type=int, default=64010, help="rows of the token table")
    group.add_argument("--num_max_bpe_tokens", type=int, default=64, help="longest text, with <s> and </s>")
    group.add_argument("--model_ema", action="store_true", help="keep an average of the weights, validate it, save it")
    group.add_argument("--model_ema_decay", type=float, default=0.9999, help="per step")
    group.add_argument("--model_ema_force_cpu", action="store_true", help="keep the average in the CPU's memory")
    group.add_argument(
        "--finetune", default="", help="weights to start from or to predict with: .pth, .safetensors, folder"
    )
    group.add_argument("--model_key", default="model|module", help="where a .pth keeps its state dict")
    group.add_argument("--model_prefix", default="", help="put before each key of --finetune")


def _add_optimizer_flags(group: Any) -> None:
    group.add_argument("--opt", default="adamw", help="adamw, or a name timm knows")
    group.add_argument("--opt_eps", type=float, default=1e-8, help="epsilon of Adam")
    group.add_argument("--opt_betas", type=float, nargs=2, default=(0.9, 0.999), help="betas of Adam")
    group.add_argument("--clip_grad", type=float, default=None, help="largest L2 norm of the gradient")
    group.add_argument("--momentum", type=float, default=0.9, help="for --opt sgd and its like")
    group.add_argument("--weight_decay", type=float, default=0.05)
    group.add_argument("--lr", type=float, default=5e-4, help="highest learning rate")
    group.add_argument("--layer_decay", type=float, default=0.9, help="factor per layer from the top; 1 = none")
    group.add_argument(
        "--task_head_lr_weight", type=float, default=0, help="factor of the head; above 1 with --layer_decay 1"
    )
    group.add_argument("--warmup_lr", type=float, default=1e-6, help="no effect: the warm-up rises from 0")
    group.add_argument("--min_lr", type=float, default=1e-6, help="where the cosine ends")
    group.add_argument("--warmup_epochs", type=float, default=5)
    group.add_argument("--warmup_steps", type=int, default=-1, help="instead of --warmup_epochs when above 0")
    group.add_argument("--batch_size", type=int, default=64, help="per process")
    group.add_argument("--eval_batch_size", type=int, default=None, help="per process; default 1.5 times --batch_size")
    group.add_argument("--epochs", type=int, default=20)
    group.add_argument("--update_freq", type=int, default=1, help="batches per step")


def _add_data_flags(group: Any) -> None:
    group.add_argument("--data_path", type=Path, default=Path("dataset"), help="folder with pictures and index files")
    group.add_argument("--randaug", action="store_true", help="RandAugment on training pictures")
    group.add_argument("--train_interpolation", default="bicubic", choices=INTERPOLATIONS, help="of training pictures")
    group.add_argument(
        "--crop_scale", type=float, nargs=2, default=CROP_SCALE, help="share of the area a training crop keeps, 0-1"
    )
    group.add_argument(
        "--skip_bad_images",
        action="store_true",
        help="train on another row where a picture cannot be read, the same one each time; evaluation never does",
    )
    group.add_argument("--num_workers", type=int, default=10, help="loader processes per process")
    group.add_argument("--pin_mem", action="store_true", default=True, help="page-locked batches, for GPUs")
    group.add_argument("--no_pin_mem", action="store_false", dest="pin_mem")
    group.add_argument("--task_cache_path", default=None, help="no effect: ground truth lies beside the index")


def _add_run_flags(group: Any) -> None:
    group.add_argument("--output_dir", default="", help="checkpoints, log.txt, submissions; nothing is kept without")
    group.add_argument("--log_dir", default=None, help="TensorBoard files; default none")
    group.add_argument("--device", default="auto", help="auto (GPU if there is one), cuda, cpu")
    group.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "bf16", "fp16", "fp32"],
        help="auto: bf16 or fp16 on a GPU, fp32 on a CPU",
    )
    group.add_argument("--seed", type=int, default=0)
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="two runs of one command give bitwise equal weights on a GPU too, on one kind of GPU and of software, "
        "for some speed and memory; an operation that cannot do it ends the run. On a CPU runs are equal without it. "
        "Without it on a GPU: same examples and same random draws, but sums in changing order, so the last digits vary",
    )
    group.add_argument("--resume", default="", help="a full checkpoint to go on from, rather than the newest")
    group.add_argument(
        "--auto_resume",
        action="store_true",
        default=True,
        help="go on from the newest complete checkpoint in --output_dir, exactly as if nothing had happened",
    )
    group.add_argument("--no_auto_resume", action="store_false", dest="auto_resume")
    group.add_argument(
        "--force_resume", action="store_true", help="go on although data or recipe changed; otherwise refused"
    )
    group.add_argument("--save_ckpt", action="store_true", default=True)
    group.add_argument("--no_save_ckpt", action="store_false", dest="save_ckpt", help="write no checkpoint at all")
    group.add_argument("--save_ckpt_freq", type=int, default=5, help="epochs between checkpoints")
    group.add_argument("--save_ckpt_steps", type=int, default=0, help="steps between checkpoints in an epoch; 0 = none")
    group.add_argument(
        "--keep_checkpoints",
        type=int,
        default=3,
        help="full checkpoints kept, the newest ones; checkpoint-best and the one resumed from stay too; 0 = all",
    )
    group.add_argument(
        "--max_skipped_steps",
        type=int,
        default=25,
        help="so many steps in a row with a loss or gradient that is not finite end the training",
    )
    group.add_argument(
        "--timeout", type=float, default=1800, help="seconds to wait for another process or a loader's worker"
    )
    group.add_argument("--start_epoch", type=int, default=0, help="first epoch when nothing is resumed")
    group.add_argument("--eval", action="store_true", help="predict --split with --finetune and write the submission")
    group.add_argument("--split", default="test", help="what --eval predicts: test, test-dev, val")
    group.add_argument(
        "--dist_eval", action="store_true", help="accepted; processes always share the evaluation, each example once"
    )
    group.add_argument("--world_size", type=int, default=1, help="no effect: the launcher says")
    group.add_argument(
        "--local_rank", "--local-rank", type=int, default=-1, help="no effect: the launcher's environment says"
    )
    group.add_argument("--dist_on_itp", action="store_true", help="read ranks from Open MPI's variables")
    group.add_argument("--dist_url", default="env://", help="how processes find each other")


def _add_captioning_flags(group: Any) -> None:
    group.add_argument("--captioning_mask_prob", type=float, default=0.6, help="share of a caption's tokens hidden")
    group.add_argument(
        "--drop_worst_ratio", type=float, default=0.2, help="share of hidden tokens left out as too hard"
    )
    group.add_argument("--drop_worst_after", type=int, default=12000, help="steps before that begins")
    group.add_argument("--num_beams", type=int, default=3, help="beams of the search; 1 = greedy")
    group.add_argument("--length_penalty", type=float, default=0.6, help="exponent of the length that divides scores")
    group.add_argument("--label_smoothing", type=float, default=0.1, help="probability spread over other tokens, 0-1")
    group.add_argument(
        "--captions_per_image", type=int, default=1, help="captions learned in one pass over their picture"
    )


def _add_imagenet_flags(group: Any) -> None:
    group.add_argument("--nb_classes", type=int, default=1000)
    group.add_argument("--mixup", type=float, default=0)
    group.add_argument("--cutmix", type=float, default=0)
    group.add_argument("--cutmix_minmax", type=float, nargs="+", default=None)
    group.add_argument("--mixup_prob", type=float, default=1.0)
    group.add_argument("--mixup_switch_prob", type=float, default=0.5)
    group.add_argument("--mixup_mode", default="batch")
    group.add_argument("--color_jitter", type=float, default=0.4)
    group.add_argument("--aa", default="rand-m9-mstd0.5-inc1")
    group.add_argument("--smoothing", type=float, default=0.1)
    group.add_argument("--crop_pct", type=float, default=None)
    group.add_argument("--reprob", type=float, default=0.25)
    group.add_argument("--remode", default="pixel")
    group.add_argument("--recount", type=int, default=1)
    group.add_argument("--resplit", action="store_true")


def _add_deepspeed_flags(group: Any) -> None:
    group.add_argument("--enable_deepspeed", "--deepspeed", action="store_true", help="train with DeepSpeed")
    group.add_argument(
        "--zero_stage",
        type=int,
        default=1,
        choices=[0, 1, 2, 3],
        help="1 shares the optimizer state among processes, sums bf16 gradients in fp32 and skips a step whose "
        "gradient is broken, at the speed of 0; 2 and 3 share gradients and weights too, for models that do not fit",
    )
    group.add_argument("--initial_scale_power", type=int, default=16, help="log2 of the first loss scale in fp16")
    group.add_argument("--deepspeed_config", default=None, help="no effect: the configuration is made from the flags")
    group.add_argument("--deepscale", action="store_true", help="no effect: DeepSpeed's old name")
    group.add_argument("--deepscale_config", default=None, help="no effect: DeepSpeed's old name")


def model_name(args: argparse.Namespace, task: type[Task]) -> str:
    """The registered name: `--model` and the task's suffix, which may be there already."""
    suffix = f"_{task.model_suffix}"
    return args.model if args.model.endswith(suffix) else args.model + suffix


def check_arguments(args: argparse.Namespace, task: type[Task]) -> list[str]:
    """Every mistake in the arguments that can be seen without loading anything."""
    problems = []
    name, ending = model_name(args, task), f"_{task.model_suffix}"
    if name not in MODEL_NAMES:
        known = sorted(n.removesuffix(ending) for n in MODEL_NAMES if n.endswith(ending))
        problems.append(f"--model {args.model}: unknown for --task {args.task}; one of {', '.join(known)}")
    elif f"_{args.input_size}_" not in name:
        pixels = name.removesuffix(ending).rpartition("_")[2]
        problems.append(f"--input_size {args.input_size}: {args.model} takes pictures of {pixels} pixels")
    if not args.sentencepiece_model.is_file():
        problems.append(f"--sentencepiece_model {args.sentencepiece_model}: no such file")
    for flag in ("finetune", "resume"):
        if getattr(args, flag) and not Path(getattr(args, flag)).exists():
            problems.append(f"--{flag} {getattr(args, flag)}: no such file or folder")
    if args.eval and not args.finetune and not args.resume:
        problems.append("--eval needs a checkpoint: --finetune FILE")
    if args.eval and not args.output_dir:
        problems.append("--eval needs --output_dir, where the submission is written")
    for flag in ("save_ckpt_steps", "keep_checkpoints"):
        if getattr(args, flag) < 0:
            problems.append(f"--{flag} {getattr(args, flag)}: at least 0 is needed")
    for flag in ("batch_size", "epochs", "update_freq", "save_ckpt_freq", "vocab_size", "max_skipped_steps", "timeout"):
        if getattr(args, flag) < 1:
            problems.append(f"--{flag} {getattr(args, flag)}: at least 1 is needed")
    for flag in ("drop_path", "model_ema_decay", "label_smoothing"):
        if not 0 <= getattr(args, flag) < 1:
            problems.append(f"--{flag} {getattr(args, flag)}: wanted 0 ≤ value < 1")
    if args.compile and args.enable_deepspeed and args.zero_stage == 3:
        problems.append("--compile: not with --zero_stage 3, which takes the layers' weights apart; use 0, 1 or 2")
    if not 0 < args.crop_scale[0] <= args.crop_scale[1] <= 1:
        problems.append(f"--crop_scale {args.crop_scale[0]} {args.crop_scale[1]}: wanted 0 < smallest ≤ largest ≤ 1")
    if args.eval_batch_size is not None and args.eval_batch_size < 1:
        problems.append(f"--eval_batch_size {args.eval_batch_size}: at least 1 is needed")
    return problems


def task_settings(args: argparse.Namespace) -> TaskSettings:
    return TaskSettings(
        data_path=args.data_path,
        sentencepiece_model=args.sentencepiece_model,
        image_size=args.input_size,
        vocab_size=args.vocab_size,
        num_max_bpe_tokens=args.num_max_bpe_tokens,
        split=args.split,
        randaug=args.randaug,
        train_interpolation=args.train_interpolation,
        crop_scale=tuple(args.crop_scale),
        seed=args.seed,
        captioning_mask_prob=args.captioning_mask_prob,
        drop_worst_ratio=args.drop_worst_ratio,
        drop_worst_after=args.drop_worst_after,
        num_beams=args.num_beams,
        length_penalty=args.length_penalty,
        label_smoothing=args.label_smoothing,
        captions_per_image=args.captions_per_image,
    )


def check_all(args: argparse.Namespace) -> Task:
    """The task, when everything that can be checked without loading is right.

    Raises:
        InputError: listing every mistake.
    """
    if args.task not in TASKS:
        raise InputError(f"--task {args.task} is not there yet; there is {', '.join(TASKS)}")
    task = TASKS[args.task](task_settings(args))
    problems = check_arguments(args, type(task)) + task.check(training=not args.eval)
    if not problems and task.tokenizer.vocab_size > args.vocab_size:
        problems.append(
            f"--sentencepiece_model {args.sentencepiece_model} makes ids up to {task.tokenizer.vocab_size - 1}, "
            f"the model has --vocab_size {args.vocab_size}: is it the tokenizer of these weights?"
        )
    if problems:
        raise InputError(problems)
    return task


def describe_model(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    """What a checkpoint says of itself, so that prediction needs no other file."""
    return {
        "format": FORMAT,
        "model": model_name(args, type(task)),
        "task": task.trains_as,
        "image_size": args.input_size,
        "vocab_size": args.vocab_size,
        "num_max_bpe_tokens": args.num_max_bpe_tokens,
        "tokenizer_sha256": task.tokenizer.sha256,
        **task.describe(),
    }


def check_description(description: dict[str, Any], args: argparse.Namespace, task: Task) -> None:
    """A checkpoint that says what it is must be what the command line says.

    Raises:
        InputError: listing every difference.
    """
    said = {
        "model": model_name(args, type(task)),
        "task": task.trains_as,
        "image_size": args.input_size,
        "vocab_size": args.vocab_size,
        "tokenizer_sha256": task.tokenizer.sha256,
    }
    problems = [
        f"{args.finetune}: made with {key} {description[key]}, the command line says {value}"
        for key, value in said.items()
        if key in description and description[key] != value
    ]
    if problems:
        raise InputError(problems)


def build_model(args: argparse.Namespace, task: Task, checkpoint: Checkpoint | None) -> BEiT3Model:
    """The model on the CPU, with the checkpoint's weights in it if there is one."""
    utils.seed_everything(args.seed)
    model: Any = timm.create_model(
        model_name(args, type(task)),
        vocab_size=args.vocab_size,
        drop_path_rate=args.drop_path,
        checkpoint_activations=args.checkpoint_activations,
        **task.model_options({} if checkpoint is None else checkpoint.state_dict),
    )
    if checkpoint is not None:
        report = load_weights(model, checkpoint, new_head=not args.eval)
        logger.info("%s: %s", checkpoint.path, report)
    return model


def make_loader(
    args: argparse.Namespace,
    dataset: ImageTextDataset,
    sampler: EpochSampler | EvaluationSampler,
    process: utils.Process,
) -> DataLoader:
    return build_loader(
        dataset, sampler, args.num_workers, args.pin_mem and process.device.type == "cuda", args.timeout
    )


def evaluation_loader(args: argparse.Namespace, dataset: ImageTextDataset, process: utils.Process) -> DataLoader:
    batch_size = args.eval_batch_size or int(1.5 * args.batch_size)
    sampler = EvaluationSampler(len(dataset), batch_size, process.rank, process.world_size)
    return make_loader(args, dataset, sampler, process)


def check_pictures(args: argparse.Namespace, process: utils.Process, *datasets: ImageTextDataset) -> None:
    """A quick look at every picture before anything long starts, by the first process for all.

    Raises:
        InputError: on every process, listing the pictures that cannot be read, but for those that training may skip.
    """
    problems: list[str] = []
    if process.is_main:
        needed = [dataset for dataset in datasets if not dataset.skip_bad_images]
        paths = sorted({path for dataset in needed for path in dataset.image_paths()})
        problems = screen_images(paths, args.data_path)
    problems = utils.broadcast(problems)
    if problems:
        raise InputError(problems)


def backend_settings(args: argparse.Namespace, process: utils.Process) -> BackendSettings:
    return BackendSettings(
        precision=choose_precision(args.precision, process.device),
        update_freq=args.update_freq,
        clip_grad=args.clip_grad,
        batch_size=args.batch_size,
        zero_stage=args.zero_stage,
        initial_scale_power=args.initial_scale_power,
        timeout_seconds=args.timeout,
    )


def build_backend(args: argparse.Namespace, model: BEiT3Model, settings: BackendSettings) -> Backend:
    groups = parameter_groups(model, args.weight_decay, args.layer_decay, args.task_head_lr_weight)
    optimizer = create_optimizer(
        groups, args.opt, lr=args.lr, eps=args.opt_eps, betas=tuple(args.opt_betas), momentum=args.momentum
    )
    if args.enable_deepspeed:
        from beit3.training.deepspeed_backend import DeepSpeedBackend

        return DeepSpeedBackend(model, optimizer, settings)
    return PlainBackend(model, optimizer, settings)


def train(args: argparse.Namespace, task: Task, process: utils.Process, stop: utils.StopSignal) -> None:
    """Fine-tune, validate after each epoch, keep the best.

    Raises:
        utils.StopRequested: after a checkpoint was written from which the same command goes on.
    """
    checkpoint = read_checkpoint(args.finetune, args.model_key, args.model_prefix) if args.finetune else None
    train_set, val_set = task.dataset("train", training=True), task.dataset("val", training=False)
    train_set.skip_bad_images = args.skip_bad_images
    check_pictures(args, process, train_set, val_set)
    sampler = EpochSampler(
        len(train_set), args.batch_size, args.update_freq, process.rank, process.world_size, args.seed
    )
    keeping = what_is_kept(args, make_fingerprint(args, task, process, train_set, val_set))
    resume_from = find_resumable(keeping, process)
    room = free_memory(process.device)
    model = build_model(args, task, checkpoint)
    num_parameters, settings = model.num_parameters, backend_settings(args, process)
    announce_memory(args, task, model, settings, process, room)
    model = model.to(process.device)
    checkpoint = None  # its memory is not needed any more
    if args.compile:
        compile_layers(model.beit3, process.device)
    backend = build_backend(args, model, settings)
    ema = None
    if args.model_ema:
        ema = ModelEma(backend.full_parameters(), args.model_ema_decay, args.model_ema_force_cpu)
    if not args.finetune and resume_from is None:
        logger.info("no --finetune: training starts from fresh weights")
    keeper = Keeper(keeping, process, backend, task, describe_model(args, task), ema, resume_from)
    progress, state = keeper.start(args.start_epoch)

    def after_step(epoch: int, state: EpochState) -> None:
        progress.step = state.step
        done = epoch * sampler.steps_per_epoch + state.step
        if args.save_ckpt_steps and done % args.save_ckpt_steps == 0 and state.step < sampler.steps_per_epoch:
            keeper.save(progress, state)
        stop.check()

    run = TrainingRun(
        task,
        backend,
        process,
        dataset=train_set,
        sampler=sampler,
        loader=make_loader(args, train_set, sampler, process),
        schedule=make_schedule(args, sampler.steps_per_epoch),
        update_freq=args.update_freq,
        seed=args.seed,
        after_step=after_step,
        check_stop=stop.check,
        ema=ema,
        writer=_open_writer(args, process, progress.epoch * sampler.steps_per_epoch + progress.step),
        max_skipped_steps=args.max_skipped_steps,
        num_parameters=num_parameters,
    )
    val_loader = evaluation_loader(args, val_set, process)
    _announce(args, run, len(val_set))
    try:
        while progress.epoch < args.epochs:
            _one_epoch(args, run, keeper, progress, state, val_loader)
            state = EpochState()
    except utils.StopRequested:
        keeper.save(progress, state)
        raise
    keeper.finish(progress)


def announce_memory(
    args: argparse.Namespace,
    task: Task,
    model: BEiT3Model,
    settings: BackendSettings,
    process: utils.Process,
    room: float,
) -> None:
    """Say what the training will take of `room` bytes, and what to do where that is not enough."""
    demand = training_demand(
        model.beit3.config,
        model.num_parameters,
        settings,
        device=process.device.type,
        text_tokens=task.text_tokens(),
        output_values=task.output_values(),
        causal_text=task.causal_text,
        zero=args.enable_deepspeed,
        world_size=process.world_size,
        average=args.model_ema and not args.model_ema_force_cpu,
    )
    logger.info("memory per process on %s, about %s; %.1f GB are free", process.device.type, demand, room / GIGABYTE)
    advice = demand.advice(room, args.zero_stage if args.enable_deepspeed else 0)
    if advice is not None:
        logger.warning("%s", advice)


def make_schedule(args: argparse.Namespace, steps_per_epoch: int) -> list[float]:
    """Learning rate of every step of the whole run."""
    return cosine_schedule(
        args.lr,
        args.min_lr,
        epochs=args.epochs,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=args.warmup_epochs,
        warmup_steps=args.warmup_steps,
    )


def _announce(args: argparse.Namespace, run: TrainingRun, validation_examples: int) -> None:
    process = run.process
    logger.info(
        "%s: %.1f M parameters, %d training and %d validation examples, %d steps of %d pairs per epoch, %s on %d × %s",
        model_name(args, type(run.task)), run.num_parameters / 1e6, len(run.dataset), validation_examples,
        run.sampler.steps_per_epoch, run.sampler.global_batch,
        run.backend.settings.precision, process.world_size, process.device.type,
    )  # fmt: skip


def _one_epoch(
    args: argparse.Namespace,
    run: TrainingRun,
    keeper: Keeper,
    progress: Progress,
    state: EpochState,
    val_loader: DataLoader,
) -> None:
    """What is left of an epoch: training, validation, log, checkpoints; `progress` then stands at the next one."""
    epoch, steps = progress.epoch, run.sampler.steps_per_epoch
    training = {}
    if state.step < steps:
        training["images_per_second"] = train_one_epoch(run, epoch, state)
    training = {**summarize(run, epoch, state), **training}
    validation = validate(run, val_loader, epoch)
    keeper.keep_best(progress, validation)
    _log_epoch(args, run, epoch, training, validation)
    progress.epoch, progress.step = epoch + 1, 0
    if (epoch + 1) % args.save_ckpt_freq == 0 or epoch + 1 == args.epochs:
        keeper.save(progress, EpochState())


# What decides the steps of a run, beside its data. Other flags may change when it is resumed.
RECIPE = """model task input_size drop_path vocab_size num_max_bpe_tokens model_ema model_ema_decay finetune opt
    opt_eps opt_betas clip_grad momentum weight_decay lr layer_decay task_head_lr_weight min_lr warmup_epochs
    warmup_steps epochs randaug train_interpolation crop_scale skip_bad_images seed captioning_mask_prob
    drop_worst_ratio drop_worst_after label_smoothing captions_per_image enable_deepspeed""".split()


def make_fingerprint(
    args: argparse.Namespace,
    task: Task,
    process: utils.Process,
    train_set: ImageTextDataset,
    val_set: ImageTextDataset,
) -> dict[str, Any]:
    """What must be the same for a run to go on: plain values, see `beit3.training.checkpoints`."""
    recipe = {f"--{name}": getattr(args, name) for name in RECIPE}
    recipe["precision"] = choose_precision(args.precision, process.device)
    recipe["pairs per step"] = args.batch_size * args.update_freq * process.world_size
    if args.enable_deepspeed:
        recipe["--zero_stage"] = args.zero_stage
    return {
        "format": FORMAT,
        "versions": versions(),
        "world_size": process.world_size,
        "recipe": json.loads(json.dumps(recipe)),  # tuples become lists, as they come back from a file
        "data": {
            "training data": train_set.digest,
            "validation data": val_set.digest,
            "tokenizer": task.tokenizer.sha256,
        },
    }


def what_is_kept(args: argparse.Namespace, fingerprint: dict[str, Any]) -> Keeping:
    return Keeping(
        folder=Path(args.output_dir) if args.output_dir and args.save_ckpt else None,
        keep=args.keep_checkpoints,
        resume=Path(args.resume) if args.resume else None,
        auto_resume=args.auto_resume,
        force=args.force_resume,
        fingerprint=fingerprint,
        suffix="" if args.enable_deepspeed else PlainBackend.suffix,
        any_world_size=not args.enable_deepspeed or args.zero_stage == 0,
    )


def _open_writer(args: argparse.Namespace, process: utils.Process, first_step: int) -> Any:
    if not args.log_dir or not process.is_main:
        return None
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    return SummaryWriter(args.log_dir, purge_step=first_step)  # what a killed run wrote beyond its checkpoint is void


def _log_epoch(
    args: argparse.Namespace, run: TrainingRun, epoch: int, training: dict[str, float], validation: Validation
) -> None:
    entry: dict[str, float] = {f"train_{name}": value for name, value in training.items()}
    entry |= {f"val_{name}": value for name, value in validation.scores.items()}
    logger.info("epoch %d: %s", epoch, "  ".join(f"{name} {value:.4g}" for name, value in entry.items()))
    entry |= {"epoch": epoch, "n_parameters": run.num_parameters}
    if args.output_dir and run.process.is_main:
        for name, content in validation.files.items():
            with atomic_write(Path(args.output_dir) / name) as file:
                json.dump(content, file)
        write_log(Path(args.output_dir) / "log.txt", entry)


def predict(args: argparse.Namespace, task: Task, process: utils.Process, stop: utils.StopSignal) -> None:
    """Answer a split with a checkpoint; write the submission, and the scores where the right answers are known.

    Raises:
        utils.StopRequested: nothing was written.
    """
    checkpoint = read_checkpoint(args.finetune or args.resume, args.model_key, args.model_prefix)
    check_description(checkpoint.description, args, task)
    task.adopt(checkpoint.description)
    dataset = task.dataset(args.split, training=False)
    check_pictures(args, process, dataset)
    model = build_model(args, task, checkpoint).to(process.device)
    if args.compile:
        logger.info("--compile is for training; prediction runs without")
    precision = choose_precision(args.precision, process.device)
    autocast = (
        nullcontext
        if precision == "fp32"
        else functools.partial(torch.autocast, process.device.type, DTYPES[precision])
    )
    loader = evaluation_loader(args, dataset, process)
    what = f"predicting {args.split}"
    records = evaluate(task, model, loader, process, autocast=autocast, what=what, check_stop=stop.check)
    if len(records) != len(dataset):
        raise RuntimeError(f"{len(records)} predictions for {len(dataset)} examples")
    if process.is_main:
        _write_results(Path(args.output_dir), task, records)


def _write_results(folder: Path, task: Task, records: list[Record]) -> None:
    submission = folder / task.submission_file()
    with atomic_write(submission) as file:
        json.dump(task.submission(records), file)
    logger.info("%s: %d predictions", submission, len(records))
    report = task.report(records)
    if report is None:
        return
    with atomic_write(folder / task.report_file()) as file:
        json.dump(report, file, indent=2)
    for line in task.report_lines(report):
        logger.info("%s", line)
    logger.info("scores written to %s", folder / task.report_file())


def make_deterministic() -> None:
    """Every operation in one order, or an error. On a GPU; a CPU does so anyway."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Of the kinds of attention these have no backward pass in a fixed order.
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def run_with(args: argparse.Namespace) -> int:
    """Train or predict; the exit status."""
    process = utils.start_processes(
        args.device, on_itp=args.dist_on_itp, init_method=args.dist_url, timeout_seconds=args.timeout
    )
    utils.set_up_logging(process.is_main)
    task = check_all(args)
    if args.deterministic:
        make_deterministic()
    if args.output_dir:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    stop = utils.StopSignal(args.timeout)
    try:
        (predict if args.eval else train)(args, task, process, stop)
    except utils.StopRequested as request:
        kept = "" if args.eval or not (args.output_dir and args.save_ckpt) else "; the same command goes on from here"
        logger.info("%s%s", request, kept)
        return 128 + request.signum
    finally:
        stop.release()
    return 0


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    utils.set_up_logging(is_main=True)
    status = 1
    try:
        status = run_with(args)
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


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        for child in multiprocessing.active_children():
            child.kill()  # a loader's worker that hangs would be waited for
