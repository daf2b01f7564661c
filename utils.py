"""Processes and logging. Imports nothing of ours.

One process is a world of size 1 by the same code: `barrier`, `gather` and `broadcast` then do nothing.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Process:
    """This process among all: `rank` of `world_size`, `local_rank` on its machine, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def _launcher_ranks(environment: Mapping[str, str], on_itp: bool) -> tuple[int, int, int] | None:
    """(rank, world size, local rank) as torchrun, Open MPI (`--dist_on_itp`) or SLURM tell, or None."""
    tables = {
        "OMPI_COMM_WORLD_RANK": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        "RANK": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        "SLURM_PROCID": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    }
    if not on_itp:
        del tables["OMPI_COMM_WORLD_RANK"]
        # A shell inside a SLURM allocation has these variables too; only a step started by srun has its own step id.
        if environment.get("SLURM_STEP_ID") is None:
            del tables["SLURM_PROCID"]
    for names in tables.values():
        if all(name in environment for name in names):
            rank, world_size, local_rank = (int(environment[name]) for name in names)
            return rank, world_size, local_rank
    return None


def resolve_device(name: str, local_rank: int) -> torch.device:
    """`auto` is the GPU of this process if there is one, else the CPU; any other name is taken at its word.

    Raises:
        ValueError: a GPU is asked for and there is none for this process.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine shows no GPU to PyTorch; use --device auto or --device cpu")
    if device.index is None:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} found; "
                "start as many processes as there are GPUs (GPUS=N bash bash.sh)"
            )
        device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def start_processes(
    device: str = "auto", *, on_itp: bool = False, init_method: str = "env://", timeout_minutes: float = 30
) -> Process:
    """Join the other processes a launcher started, or be a world of one.

    Also a single process has a process group (in memory, no port), because DeepSpeed asks for one.
    """
    ranks = _launcher_ranks(os.environ, on_itp)
    rank, world_size, local_rank = ranks or (0, 1, 0)
    # DeepSpeed and torch read these; a launcher other than torchrun does not set all of them.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    chosen = resolve_device(device, local_rank)
    if not dist.is_initialized():
        where: dict[str, Any] = {"init_method": init_method} if world_size > 1 else {"store": dist.HashStore()}
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=timeout_minutes),
            device_id=chosen if chosen.type == "cuda" else None,
            **where,
        )
    return Process(rank, world_size, local_rank, chosen)


def stop_processes() -> None:
    """Leave the process group; does nothing when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def gather(value: T) -> list[T]:
    """The value of every process, in rank order, on every process. Collective; values must pickle."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Process 0's value on every process. Collective; values must pickle."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def seed_everything(*parts: int) -> None:
    """Make what PyTorch draws next a function of `parts` (seed, step, process, …) alone, on every device."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


class _TerminalFriendlyHandler(logging.StreamHandler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except (OSError, ValueError):
            self.handleError(record)


def set_up_logging(is_main: bool) -> None:
    """Process 0 speaks at INFO, the others at WARNING, each line with the time; libraries at WARNING."""
    handler = _TerminalFriendlyHandler()
    name = "" if is_main else f"{socket.gethostname()}:{os.environ.get('LOCAL_RANK', '?')} "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {name}%(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    # It reports a machine without a GPU as something amiss.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    for ours in ("beit3", "datasets", "tasks", "engine_for_finetuning", "modeling_finetune", "__main__"):
        logging.getLogger(ours).setLevel(logging.INFO if is_main else logging.WARNING)
