"""Starts functions of the tests in several processes that form one process group, on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(function: Callable[..., Any], rank: int, count: int, port: int, queue: Any, arguments: tuple) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import torch

    import utils

    torch.set_num_threads(1)
    process = utils.start_processes("cpu", timeout_minutes=3)
    try:
        queue.put((rank, function(process, *arguments)))
    finally:
        utils.stop_processes()


def run_processes(function: Callable[..., Any], count: int, *arguments: Any, timeout: float = 300) -> list[Any]:
    """`function(process, *arguments)` in `count` processes; returns what each returned, in rank order.

    `function` must be at the top of a module. What it returns is pickled: use plain values and NumPy arrays.
    """
    context = multiprocessing.get_context("spawn")
    queue, port = context.Queue(), _free_port()
    processes = [
        context.Process(target=_run, args=(function, rank, count, port, queue, arguments)) for rank in range(count)
    ]
    for each in processes:
        each.start()
    try:
        results = dict(queue.get(timeout=timeout) for _ in processes)
        for each in processes:
            each.join(timeout=60)
            assert each.exitcode == 0, f"a process ended with {each.exitcode}"
    finally:
        for each in processes:
            each.kill()
    return [results[rank] for rank in range(count)]
