"""The settings of a run: a frozen dataclass per concern, every flag once. Needs no PyTorch.

The flags of data stand in `tasks.settings`, because tasks read them; those of a task in its folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit3.model.description import About
from beit3.system.flags import deciding, flag
from tasks.settings import DataSettings, TaskSettings


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and from which weights."""

    model: str = flag(
        "beit_base_patch16_224",  # of the released command line, where it names no model either
        "beit3_base_patch16_480, …",
        decides_steps=True,
        said_by="model",
        essential=True,
        default_shown=False,
    )
    finetune: str = flag(
        "",
        "weights to start from or to predict with: .pth, .safetensors, folder",
        decides_steps=True,
        essential=True,
    )
    model_key: str = flag("model|module", "where a .pth keeps its state dict")
    model_prefix: str = flag("", "put before each key of --finetune")
    vocab_size: int = flag(
        64010, "rows of the token table", at_least=4, at_most=10_000_000, decides_steps=True, said_by="vocab_size"
    )
    freeze: str = flag(
        "",
        "what is not trained: embeddings, text, image (the weights of one modality), encoder or head-only (alike: all "
        "but the head), or a number of layers from below, with the embeddings; several joined by commas",
        decides_steps=True,
    )
    drop_path: float = flag(0.1, "stochastic depth of the last layer", at_least=0, below=1, decides_steps=True)
    checkpoint_activations: bool = flag(False, "recompute activations: less memory for about a third more time")
    compile: bool = flag(
        False,
        "torch.compile the encoder's layers for training: some minutes at the start, equal within rounding; meant "
        "for GPUs. Goes on without, and says so, where there is no compiler",
    )
    model_ema: bool = flag(False, "keep an average of the weights, validate it, save it", decides_steps=True)
    model_ema_decay: float = flag(0.9999, "per step", at_least=0, below=1, decides_steps=True)
    model_ema_force_cpu: bool = flag(False, "keep the average in the CPU's memory")


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer, schedule, and how many pairs a step takes."""

    batch_size: int = flag(64, "pairs per process and batch", at_least=1, at_most=1_000_000, essential=True)
    update_freq: int = flag(1, "batches per step", at_least=1, at_most=1_000_000, essential=True)
    eval_batch_size: int | None = flag(
        None, "per process; default 1.5 times --batch_size", at_least=1, at_most=1_000_000
    )
    epochs: int = flag(
        20, "passes over the training data", at_least=1, at_most=100_000, decides_steps=True, essential=True
    )
    lr: float = flag(5e-4, "highest learning rate", at_least=0, at_most=1000, decides_steps=True, essential=True)
    min_lr: float = flag(1e-6, "where the cosine ends", at_least=0, at_most=1000, decides_steps=True)
    warmup_epochs: float = flag(
        5, "in which the learning rate rises from 0", at_least=0, at_most=100_000, decides_steps=True
    )
    warmup_steps: int = flag(
        -1, "instead of --warmup_epochs when above 0", at_least=-1, at_most=10**9, decides_steps=True
    )
    weight_decay: float = flag(0.05, "of AdamW, not on biases and norms", at_least=0, at_most=1000, decides_steps=True)
    layer_decay: float = flag(
        0.9, "factor of the learning rate per layer from the top; 1 = none", above=0, at_most=1, decides_steps=True
    )
    task_head_lr_weight: float = flag(
        0,
        "factor of the head's learning rate; above 1 with --layer_decay 1",
        at_least=0,
        at_most=1_000_000,
        decides_steps=True,
    )
    clip_grad: float | None = flag(
        None,
        "largest L2 norm of the gradient; without it nothing is clipped",
        above=0,
        at_most=10**9,
        decides_steps=True,
    )
    opt: str = flag("adamw", "adamw, or a name timm knows", decides_steps=True)
    opt_eps: float = flag(1e-8, "epsilon of Adam", at_least=0, at_most=1, decides_steps=True)
    opt_betas: tuple[float, float] = flag((0.9, 0.999), "betas of Adam", at_least=0, below=1, decides_steps=True)
    momentum: float = flag(0.9, "for --opt sgd and its like", at_least=0, below=1, decides_steps=True)


@dataclass(frozen=True)
class RunSettings:
    """Where a run computes, what it keeps, what it goes on from."""

    output_dir: str = flag("output", "checkpoints, log.txt, submissions; '' keeps nothing", essential=True)
    log_dir: str | None = flag(None, "TensorBoard files; default none")
    eval: bool = flag(False, "predict --split with --finetune and write the submission", essential=True)
    check: bool = flag(
        False,
        "look at data, memory, disk and speed, train nothing: exit status 2 with what must be mended",
        essential=True,
    )
    device: str = flag("auto", "auto (GPU if there is one), cuda, cpu")
    precision: str = flag(
        "auto", "auto: bf16 or fp16 on a GPU, fp32 on a CPU", choices=("auto", "bf16", "fp16", "fp32")
    )
    deterministic: bool = flag(
        False,
        "two runs of one command give bitwise equal weights on a GPU too, on one kind of GPU and of software, "
        "for some speed and memory; an operation that cannot do it ends the run. On a CPU runs are equal without it. "
        "Without it on a GPU: same examples and same random draws, but sums in changing order, so the last digits vary",
    )
    resume: str = flag("", "a full checkpoint to go on from, rather than the newest")
    auto_resume: bool = flag(
        True,
        "go on from the newest complete checkpoint in --output_dir, exactly as if nothing had happened",
        no="begin anew whatever --output_dir holds",
    )
    force_resume: bool = flag(False, "go on although data or recipe changed; otherwise refused")
    save_ckpt: bool = flag(True, "write checkpoints", no="write no checkpoint at all")
    save_ckpt_freq: int = flag(5, "epochs between checkpoints", at_least=1, at_most=100_000)
    save_ckpt_steps: int = flag(0, "steps between checkpoints in an epoch; 0 = none", at_least=0, at_most=10**9)
    keep_checkpoints: int = flag(
        3,
        "full checkpoints kept, the newest ones; checkpoint-best and the one resumed from stay too; 0 = all",
        at_least=0,
        at_most=1_000_000,
    )
    max_skipped_steps: int = flag(
        25,
        "so many steps in a row with a loss or gradient that is not finite end the training",
        at_least=1,
        at_most=10**9,
    )
    timeout: float = flag(
        1800, "seconds to wait for another process or a loader's worker", at_least=1, at_most=10_000_000
    )
    patience: int = flag(
        0,
        "training ends when so many validations in a row were not better than the best one; 0 = never",
        at_least=0,
        at_most=100_000,
    )
    start_epoch: int = flag(0, "first epoch when nothing is resumed", at_least=0, at_most=100_000)
    dist_on_itp: bool = flag(False, "read ranks from Open MPI's variables")
    dist_url: str = flag("env://", "how processes find each other")


@dataclass(frozen=True)
class DeepSpeedSettings:
    """Whether DeepSpeed takes the steps, and how."""

    enable_deepspeed: bool = flag(
        False, "train with DeepSpeed", decides_steps=True, also=("--deepspeed",), essential=True
    )
    zero_stage: int = flag(
        1,
        "1 shares the optimizer state among processes, sums bf16 gradients in fp32 and skips a step whose "
        "gradient is broken, at the speed of 0; 2 and 3 share gradients and weights too, for models that do not fit",
        choices=(0, 1, 2, 3),
        decides_steps=True,
    )
    initial_scale_power: int = flag(16, "log2 of the first loss scale in fp16", at_least=0, at_most=32)


CONCERNS = {
    "model": ModelSettings,
    "data": DataSettings,
    "optimizer": OptimizerSettings,
    "run": RunSettings,
    "deepspeed": DeepSpeedSettings,
}
TITLES = {
    "model": "model",
    "data": "data",
    "optimizer": "optimizer and schedule",
    "run": "run",
    "deepspeed": "DeepSpeed",
}


@dataclass(frozen=True)
class Settings:
    """All settings of a run.

    Attributes:
        task: of the task's own class; its flags stand there.
        tokenizer: the tokenizer's file or its content; None for a task without text.
        checkpoint: what the checkpoint to predict with says of itself; None in training.
        ignored: flags that were given and do nothing, each with the reason.
        remarks: what is worth knowing of the data before a run begins.
        assumed: what nobody said and was concluded, in sentences.
    """

    task: TaskSettings
    model: ModelSettings
    data: DataSettings
    optimizer: OptimizerSettings
    run: RunSettings
    deepspeed: DeepSpeedSettings
    tokenizer: Path | bytes | None = None
    checkpoint: About | None = None
    ignored: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def model_name(self) -> str:
        """The registered name: `--model` and the task's suffix, which may be there already."""
        suffix = f"_{self.task.model_suffix}"
        return self.model.model.removesuffix(suffix) + suffix

    @property
    def concerns(self) -> list[Any]:
        return [self.model, self.data, self.optimizer, self.run, self.deepspeed, self.task]

    def recipe(self) -> dict[str, Any]:
        """The flags that decide the steps of the run, with their values."""
        decide: dict[str, Any] = {"task": self.task.name}
        for concern in self.concerns:
            decide |= deciding(concern)
        if not self.deepspeed.enable_deepspeed:
            del decide["zero_stage"]
        if not self.task.uses_text:
            del decide["num_max_bpe_tokens"]
        return {f"--{name}": value for name, value in decide.items()}
