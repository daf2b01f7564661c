"""DeepSpeed behind the methods of `beit3.training.backends`. Imported only when it is asked for."""

from __future__ import annotations

import copy
import importlib
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from beit3.model.description import MODEL_FILE
from beit3.model.weights import load_untrusted, write_weights
from beit3.system.atomic_files import atomic_write
from beit3.system.errors import CheckpointError, InputError
from beit3.training.backends import BUCKET, DTYPES, BackendSettings, StepOutcome
from beit3.training.checkpoints import errors_named, replace_folder, write_manifest
from beit3.training.ema import applied_to

logger = logging.getLogger(__name__)

STATE = "state"  # folder of the engine's own files in a checkpoint


def import_deepspeed() -> Any:
    """DeepSpeed with its start-up chatter off.

    Raises:
        InputError: it is not installed or does not import.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It calls what torch.distributed has given new names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        import deepspeed
    except Exception as error:  # it fails in many ways at import (compilers, CUDA versions): all mean "not usable"
        raise InputError(
            [
                f"--enable_deepspeed: DeepSpeed cannot be imported ({type(error).__name__}: {error}); "
                "install requirements.txt, or leave the flag out to train with plain PyTorch"
            ]
        ) from error
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


def engine_config(settings: BackendSettings, world_size: int, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration as a value. What its defaults changed between versions is written out.

    num_parameters: those that are trained.
    """
    stage, precision = settings.zero_stage, settings.precision
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.batch_size,
        "gradient_accumulation_steps": settings.update_freq,
        "train_batch_size": settings.batch_size * settings.update_freq * world_size,
        "gradient_clipping": settings.clip_grad or 0.0,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": min(BUCKET, num_parameters),
            "allgather_bucket_size": BUCKET,  # takes no memory
        },
        # Our optimizer is torch.optim.AdamW(fused=True); DeepSpeed's own would compile for minutes.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
        if stage in (1, 2):
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": settings.initial_scale_power, "loss_scale": 0}
    return config


class DeepSpeedBackend:
    """A DeepSpeed engine with our own optimizer, whose learning rate we set."""

    suffix = ""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: BackendSettings) -> None:
        deepspeed = import_deepspeed()
        self.settings = settings
        num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.config = engine_config(settings, dist.get_world_size(), num_trained)
        # ZeRO-3 leaves the model in pieces, which only all processes in step can compute with.
        self._whole = copy.deepcopy(model).cpu() if settings.zero_stage == 3 else None
        # Of weights that are not trained the engine has no fp32 values beside those that it computes with.
        self._frozen: dict[str, Tensor] = {}
        if settings.zero_stage == 3 or settings.precision != "fp32":
            frozen = (item for item in model.named_parameters() if not item[1].requires_grad)
            self._frozen = {name: parameter.detach().to("cpu", torch.float32) for name, parameter in frozen}
        self._broken = False
        with _its_prints_in_our_log(), _without_cpu_op():
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=self.config, dist_init_required=False
            )
        _limit_waiting(timedelta(seconds=settings.timeout_seconds))
        self.engine.checkpoint_engine.load = _safe_load
        if settings.zero_stage == 0 and settings.precision == "fp32":
            optimizer.register_step_pre_hook(self._drop_broken_gradients)
        self.model: nn.Module = self.engine
        self.module = model
        self.input_dtype = DTYPES[settings.precision]

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()  # the engine holds the weights in the dtype it computes in

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        yield
        if not last:
            self.engine.step()  # counts the micro batch; nothing is updated before the last one

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)  # divides by update_freq itself

    def step(self) -> StepOutcome:
        self._broken = False
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        skipped = self._broken or not self.engine.was_step_applied()
        return StepOutcome(
            None if norm is None else torch.as_tensor(norm, dtype=torch.float32), torch.tensor(float(skipped))
        )

    def _drop_broken_gradients(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """In fp32 at stage 0 DeepSpeed does not look. An optimizer leaves parameters without a gradient alone."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._broken = not torch.isfinite(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
        if self._broken:
            for parameter in parameters:
                parameter.grad = None

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.module.named_parameters():
            if name in self._frozen:
                yield name, self._frozen[name]
                continue
            whole = safe_get_full_fp32_param(parameter)
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty stub between uses
            yield name, parameter.detach() if whole is None else whole.view(shape)

    @contextmanager
    def evaluation_model(self, averages: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        if self._whole is None:
            with applied_to(self.module, averages):
                yield self.module
            return
        weights = self.full_parameters() if averages is None else [*self._frozen.items(), *averages.items()]
        whole = self._whole.to(self.engine.device, self.input_dtype)
        own = dict(whole.named_parameters())
        with torch.no_grad():
            for name, value in weights:
                own[name].copy_(value)
        try:
            yield whole
        finally:
            whole.cpu()

    def save(self, path: Path, extra: dict[str, Any]) -> None:
        """The engine's files, and the whole weights as one file of their own, in a folder renamed when complete."""
        aside = path.with_name(f".{path.name}.tmp")
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        dist.barrier()
        try:
            with errors_named(path):
                aside.mkdir(parents=True, exist_ok=True)
                self.engine.save_checkpoint(str(aside), tag=STATE, client_state=extra, save_latest=False)
                weights = {name: tensor.detach().float().cpu() for name, tensor in self.full_parameters()}
                dist.barrier()  # every process has written its part
                if dist.get_rank() == 0:
                    held = extra.get("tokenizer")
                    tokenizer = None if held is None else held.numpy().tobytes()
                    write_weights(aside, weights, extra["description"], tokenizer)
                    with atomic_write(aside / "deepspeed_config.json") as file:
                        json.dump(self.config, file, indent=2)
                    write_manifest(aside, extra["fingerprint"])
                    replace_folder(aside, path)
        except CheckpointError:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        dist.barrier()

    def load(self, path: Path) -> dict[str, Any]:
        loaded, extra = self.engine.load_checkpoint(str(path), tag=STATE)
        if loaded is None:  # DeepSpeed's way to say that it found nothing
            raise InputError([f"{path}: DeepSpeed found no state in it"])
        if self._frozen:
            with safe_open(path / MODEL_FILE, framework="pt") as file:
                self._frozen = {name: file.get_tensor(name) for name in self._frozen}
        return extra


@contextmanager
def _its_prints_in_our_log() -> Iterator[None]:
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        for line in filter(None, printed.getvalue().splitlines()):
            logger.debug("%s", line)


def _limit_waiting(timeout: timedelta) -> None:
    """The groups that DeepSpeed makes would wait for a lost process for half an hour, whatever the default group does.

    Older releases of torch have the setter under a private name only; where neither is there, DeepSpeed's limit stays.
    """
    module = dist.distributed_c10d
    set_timeout = getattr(module, "set_timeout", None) or getattr(module, "_set_pg_timeout", None)
    if set_timeout is not None:
        for group in list(module._world.pg_map):
            set_timeout(timeout, group)


@contextmanager
def _without_cpu_op() -> Iterator[None]:
    """On a CPU DeepSpeed compiles an op of its own at its first use, for minutes and without a word.

    The op adds up tensors in inference over several processes, which no training asks for; so it is not built.
    """
    # By its name: as an attribute of `deepspeed.comm`, `torch` is PyTorch.
    communication: Any = importlib.import_module("deepspeed.comm.torch")
    build = getattr(communication, "build_shm_op", None)
    if build is None:  # releases that have no such op
        yield
        return
    communication.build_shm_op = lambda: None
    try:
        yield
    finally:
        communication.build_shm_op = build


def _safe_load(path: str, map_location: object = None) -> Any:
    """In place of DeepSpeed's own loading, which unpickles anything: tensors, plain values and four of its classes."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    classes = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)
    return load_untrusted(Path(path), also={f"{kind.__module__}.{kind.__qualname__}": kind for kind in classes})
