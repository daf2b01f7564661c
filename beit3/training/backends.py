"""Training backends: plain PyTorch and DeepSpeed behind the same methods, so that the engine knows neither.

A step is `update_freq` times (inside `micro_step`: forward, `backward`), then `step`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from beit3.model.weights import load_untrusted
from beit3.system.atomic_files import atomic_write
from beit3.training.checkpoints import errors_named
from beit3.training.ema import applied_to

# Values of gradients that DeepSpeed gathers before it sends them. Its own default, 5e8, takes one to two gigabytes for
# any model.
BUCKET = 50_000_000
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 where the GPU has it, fp16 on an older GPU, fp32 on a CPU.

    Raises:
        ValueError: fp16 is asked for on a CPU.
    """
    if precision == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    return precision


def prediction_context(precision: str, device: torch.device) -> Any:
    """Makes the context of a forward pass without a backend, in a precision that `choose_precision` takes."""
    chosen = choose_precision(precision, device)
    return nullcontext if chosen == "fp32" else functools.partial(torch.autocast, device.type, DTYPES[chosen])


@dataclass(frozen=True)
class BackendSettings:
    """How to take a step.

    Attributes:
        precision: "bf16", "fp16" or "fp32"; weights and optimizer state are fp32 in every case.
        update_freq: micro batches per step; their losses are averaged.
        clip_grad: largest L2 norm of the gradient, None = no clipping.
        batch_size: pairs per micro batch and process.
        zero_stage: DeepSpeed's ZeRO stage, 0-3.
        initial_scale_power: log2 of the first loss scale (fp16).
        timeout_seconds: how long a process waits for another.
    """

    precision: str = "fp32"
    update_freq: int = 1
    clip_grad: float | None = None
    batch_size: int = 1
    zero_stage: int = 1
    initial_scale_power: int = 16
    timeout_seconds: float = 1800


class StepOutcome(NamedTuple):
    """What became of a step, on the device and not waited for.

    Attributes:
        grad_norm: () L2 norm of the gradient before clipping, None where it is not known.
        skipped: () 1.0 when the gradient was no finite number and nothing was changed, else 0.0; alike on all
            processes.
    """

    grad_norm: Tensor | None
    skipped: Tensor


class Backend(Protocol):
    """What the engine asks of a backend.

    Attributes:
        model: call this in training and evaluation.
        optimizer: has `param_groups`.
        module: the same without wrappers.
        input_dtype: dtype of pictures handed to the model.
        settings: how steps are taken.
        suffix: of checkpoint names, "" for a folder.
    """

    model: nn.Module
    module: nn.Module
    settings: BackendSettings
    optimizer: Any
    input_dtype: torch.dtype
    suffix: str

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro batch; `last` of its step."""
        ...

    def autocast(self) -> AbstractContextManager[None]:
        """Around a forward pass without a backward pass."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add a micro batch's gradient: () mean loss of its pairs."""
        ...

    def step(self) -> StepOutcome:
        """Clip, update, clear; a step whose gradient is broken changes nothing."""
        ...

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Names and whole fp32 values of all parameters. Collective."""
        ...

    def evaluation_model(self, averages: Mapping[str, Tensor] | None = None) -> AbstractContextManager[nn.Module]:
        """The whole model, with `averages` as its weights where given, for as long as the block lasts.

        Entering is collective; what is computed inside needs no other process.
        """
        ...

    def save(self, path: Path, extra: dict[str, Any]) -> None:
        """Write everything needed to go on, and `extra`, to `path`, complete or not at all. Collective.

        Args:
            extra: plain values and tensors; holds at least "fingerprint" and "description".

        Raises:
            CheckpointError: it could not be written.
        """
        ...

    def load(self, path: Path) -> dict[str, Any]:
        """Take a saved state over; returns its `extra`. Collective."""
        ...


class PlainBackend:
    """PyTorch alone: autocast, DistributedDataParallel when there are several processes."""

    suffix = ".pth"

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: BackendSettings) -> None:
        self.device = next(model.parameters()).device
        self.settings = settings
        self.optimizer = optimizer
        self.module = model
        self.input_dtype = torch.float32
        self.distributed = dist.is_initialized() and dist.get_world_size() > 1
        self.model: nn.Module = model
        if self.distributed:
            # The class token's gradient is a view of a larger one; nothing is wrong, and it cannot be had otherwise.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            devices = [self.device] if self.device.type == "cuda" else None
            # Some released parameters take no part in a task (the mask token, parts of the last layer).
            self.model = DistributedDataParallel(model, device_ids=devices, find_unused_parameters=True)
        self.scaler = torch.amp.GradScaler(
            self.device.type, init_scale=2.0**settings.initial_scale_power, enabled=settings.precision == "fp16"
        )

    def autocast(self) -> AbstractContextManager[None]:
        if self.settings.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.settings.precision])

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        if isinstance(self.model, DistributedDataParallel) and not last:
            with self.model.no_sync():
                yield
        else:
            yield

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss / self.settings.update_freq).backward()

    def step(self) -> StepOutcome:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:  # no part in this task: decays like the others, as under DeepSpeed
                parameter.grad = torch.zeros_like(parameter)
        self.scaler.unscale_(self.optimizer)
        limit = self.settings.clip_grad
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        skipped = (~torch.isfinite(norm)).float()
        self._update_unless(skipped)
        self.optimizer.zero_grad(set_to_none=True)
        return StepOutcome(norm, skipped)

    def _update_unless(self, skipped: Tensor) -> None:
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # looks for broken gradients itself
            self.scaler.update()
        elif self.optimizer.defaults.get("fused"):
            # The fused kernels read this flag on the device (it is how GradScaler tells them), so nobody waits.
            self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not skipped:
            self.optimizer.step()

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.module.named_parameters()

    @contextmanager
    def evaluation_model(self, averages: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        with applied_to(self.module, averages):
            yield self.module

    def save(self, path: Path, extra: dict[str, Any]) -> None:
        if not dist.is_initialized() or dist.get_rank() == 0:
            content = {
                "model": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                **extra,
            }
            with errors_named(path), atomic_write(path, "wb") as file:
                torch.save(content, file)
        if self.distributed:
            dist.barrier()

    def load(self, path: Path) -> dict[str, Any]:
        content = load_untrusted(path)
        self.module.load_state_dict(content.pop("model"))
        self.optimizer.load_state_dict(content.pop("optimizer"))
        self.scaler.load_state_dict(content.pop("scaler"))
        return content
