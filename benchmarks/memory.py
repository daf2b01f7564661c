"""How much memory something takes, by three measures; every line of the table says which one it is.

On a GPU: the most that was allocated. On a CPU: what PyTorch keeps for the backward pass, which is exact, or the growth
of a process's memory at its highest point, which counts temporaries too.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MEGABYTE = 1e6


def peak_allocated(call: Callable[[], object], device: torch.device) -> float:
    """Megabytes that a call allocates on a GPU at its highest point, beyond what was there before."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / MEGABYTE


def kept_for_backward(forward: Callable[[], Tensor]) -> float:
    """Megabytes that autograd keeps of a forward pass, each storage counted once, parameters not counted."""
    noted: list[weakref.ref[Tensor]] = []

    def note(tensor: Tensor) -> Tensor:
        kept = tensor.detach()  # with its history, an output that is kept would hold itself and never be freed
        if not isinstance(tensor, torch.nn.Parameter):
            noted.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()  # alive until its storages are counted
    # Recomputing hands over its inputs where no gradient is wanted too, and lets go of them at once.
    storages = [tensor.untyped_storage() for each in noted if (tensor := each()) is not None]
    total = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) / MEGABYTE
    del loss
    return total


def in_fresh_process(call: Callable[..., Any], *arguments: object) -> Any:
    """What `call(*arguments)` returns in a process of its own, whose memory holds nothing else.

    Raises RuntimeError where that process dies. `call` is a function of a module, not a closure.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sending, call, arguments))
    process.start()
    sending.close()
    try:
        result = receiving.recv()
    except EOFError:
        result = RuntimeError(f"the process of {call.__name__} died")
    process.join()
    if isinstance(result, Exception):
        raise RuntimeError(f"{call.__name__}: {result}") from result
    return result


def _send_result(sending: Connection, call: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    try:
        sending.send(call(*arguments))
    except Exception as error:  # told where it was asked for
        sending.send(error)


def peak_growth(call: Callable[[], object]) -> float:
    """Megabytes by which this process grows during a call, at its highest point. For a fresh process."""
    give_back_freed_memory()
    before = process_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest point counts from here on
    call()
    return process_memory("VmHWM") - before


def process_memory(field: str) -> float:
    """Megabytes of this process: "VmRSS" now, "VmHWM" at the highest point."""
    return _kilobytes("/proc/self/status", field) * 1024 / MEGABYTE


def own_memory() -> float:
    """Megabytes that this process shares with no other."""
    return _kilobytes("/proc/self/smaps_rollup", "Private_Dirty") * 1024 / MEGABYTE


def give_back_freed_memory() -> None:
    """Collect garbage, and have the C library hand freed memory back, so that what is left is in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _kilobytes(file: str, field: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"{file} has no {field}")
