"""Processes, signals and logging.

One process is a world of size 1 by the same code: `barrier`, `gather` and `broadcast` then do nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from beit3.system.terminal import for_terminal

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


def _first_host(node_list: str) -> str:
    """The first machine of a list as SLURM writes it: "gpu[03-05,9],cpu1" → "gpu03"."""
    prefix, bracket, rest = node_list.split(",")[0].partition("[")
    return prefix + re.split(r"[-,\]]", rest)[0] if bracket else prefix


def _meeting_point(environment: Mapping[str, str]) -> dict[str, str]:
    """Where processes find each other when the launcher does not say: SLURM's first machine, a port by the job."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    job = int(environment.get("SLURM_JOB_ID", "0"))
    return {"MASTER_ADDR": _first_host(nodes) or "127.0.0.1", "MASTER_PORT": str(29500 + job % 1000)}


def start_processes(
    device: str = "auto", *, on_itp: bool = False, init_method: str = "env://", timeout_seconds: float = 1800
) -> Process:
    """Join the other processes a launcher started, or be a world of one.

    Also a single process has a process group (in memory, no port), because DeepSpeed asks for one. A process that
    waits for another longer than `timeout_seconds` gives up with an error.
    """
    ranks = _launcher_ranks(os.environ, on_itp)
    rank, world_size, local_rank = ranks or (0, 1, 0)
    # DeepSpeed and torch read these; a launcher other than torchrun does not set all of them.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    chosen = resolve_device(device, local_rank)
    if not dist.is_initialized():
        where: dict[str, Any] = {"init_method": init_method} if world_size > 1 else {"store": dist.HashStore()}
        for name, value in _meeting_point(os.environ).items():
            os.environ.setdefault(name, value)
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
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


def gather_columns(columns: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The columns of every process, in rank order, on process 0; None on the others. Collective.

    columns: name → tensor (N, …) on the CPU or list (N). N may differ among processes; one without rows may have no
    columns at all. Tensors travel as tensors: nothing is pickled but lists, and other processes keep nothing.
    """
    if world_size() == 1:
        return [dict(columns)]
    tensors = {name: value for name, value in columns.items() if isinstance(value, torch.Tensor)}
    lists = {name: value for name, value in columns.items() if name not in tensors}
    layouts = gather({name: (tuple(value.shape), value.dtype) for name, value in tensors.items()})
    main = dist.get_rank() == 0
    everyone: list[Any] | None = [None] * world_size() if main else None
    dist.gather_object(lists, everyone, dst=0)
    received: list[dict[str, Any]] = [dict(each) for each in everyone] if everyone is not None else []
    for rank, layout in enumerate(layouts):
        for name, (shape, dtype) in layout.items():
            if rank == 0 and main:
                received[0][name] = tensors[name]
            elif rank == dist.get_rank():
                dist.send(_on_wire(tensors[name]), dst=0)
            elif main:
                buffer = _on_wire(torch.empty(shape, dtype=dtype))
                dist.recv(buffer, src=rank)
                received[rank][name] = buffer.cpu().view(dtype).reshape(shape)
    return received if main else None


def _on_wire(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes (N,), which every backend can send, from where the backend of the process group can send them."""
    content = tensor.contiguous().flatten().view(torch.uint8)
    return content.cuda() if dist.get_backend() == "nccl" else content


def broadcast(value: T) -> T:
    """Process 0's value on every process. Collective; values must pickle."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class StopRequested(Exception):
    """The run was asked to stop, and all processes know; `signum` says by which signal."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(f"stopped by {signal.Signals(signum).name}")


class StopSignal:
    """Turns SIGTERM, Ctrl-C and SIGHUP (a closed terminal) into a stop at a moment that all processes agree on.

    A second signal, later than the echo that launchers send of the first, ends the process at once. A launcher that is
    gone (kill -9, or out of memory) counts as SIGTERM: nobody would end its processes, and the same command, started
    again, would meet them.
    """

    ECHO_SECONDS = 3.0

    def __init__(self, timeout_seconds: float = 1800) -> None:
        self._received = 0
        self._first_time = 0.0
        # One that is ignored stays so: nohup asks for that.
        numbers = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        # The flags meet on the CPU and one call late, so that asking never waits for a GPU.
        self._group: Any = None
        if world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self._asked: tuple[Any, torch.Tensor] | None = None

    def _handle(self, number: int, frame: Any) -> None:
        if self._received and time.monotonic() - self._first_time > self.ECHO_SECONDS:
            raise SystemExit(128 + number)
        if not self._received:
            self._received, self._first_time = number, time.monotonic()
            name = signal.Signals(number).name
            self._say(f"{name}: finishing this step, then stopping; a second one stops at once")

    def _say(self, text: str) -> None:
        """Not through logging: a signal may have come while it was writing. The terminal may be gone."""
        if not dist.is_initialized() or dist.get_rank() == 0:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{text}\n".encode())

    def _look_for_launcher(self) -> None:
        if self._launcher is not None and not self._received and os.getppid() != self._launcher:
            self._received, self._first_time = signal.SIGTERM, time.monotonic()
            self._say(f"the launcher, process {self._launcher}, is gone: finishing this step, then stopping")

    def check(self) -> None:
        """Collective, once per step.

        Raises:
            StopRequested: on all processes at the same call, when one has received a signal or lost its launcher.
        """
        self._look_for_launcher()
        signum = self._received if self._group is None else self._agreed()
        if signum:
            raise StopRequested(signum)

    def _agreed(self) -> int:
        earlier = self._asked
        flag = torch.tensor([self._received])
        self._asked = (dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True), flag)
        if earlier is None:
            return 0
        work, answer = earlier
        work.wait()
        return int(answer)

    def release(self) -> None:
        """Give the signals back to whoever had them."""
        if self._asked is not None:
            with contextlib.suppress(RuntimeError):  # another process may be gone already
                self._asked[0].wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)


def seed_everything(*parts: int) -> None:
    """Make what PyTorch draws next a function of `parts` (seed, step, process, …) alone, on every device."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def make_deterministic() -> None:
    """Every operation in one order, or an error. On a GPU; a CPU does so anyway."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Of the kinds of attention these have no backward pass in a fixed order.
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


class TerminalFriendlyHandler(logging.StreamHandler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(for_terminal(self.format(record)), file=sys.stderr)
        except (OSError, ValueError):
            self.handleError(record)


def set_up_logging(is_main: bool) -> None:
    """Process 0 speaks at INFO, the others at WARNING, each line with the time; libraries at WARNING."""
    handler = TerminalFriendlyHandler()
    name = "" if is_main else f"{socket.gethostname()}:{os.environ.get('LOCAL_RANK', '?')} "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {name}%(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    # It reports a machine without a GPU as something amiss.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    for ours in (
        "beit3",
        "datasets",
        "tasks",
        "engine_for_finetuning",
        "runs",
        "modeling_finetune",
        "run_beit3_finetuning",
        "__main__",
    ):
        logging.getLogger(ours).setLevel(logging.INFO if is_main else logging.WARNING)
