"""Starts functions of the tests, or the entry point itself, in several processes that form one group, on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _join_group(rank: int, count: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    # Who started the tests may have them ignored (nohup, a shell's background); these processes are to hear them.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.set_num_threads(1)


def _run(function: Callable[..., Any], rank: int, count: int, port: int, queue: Any, arguments: tuple) -> None:
    import utils

    _join_group(rank, count, port)
    process = utils.start_processes("cpu", timeout_seconds=180)
    try:
        queue.put((rank, function(process, *arguments)))
    finally:
        utils.stop_processes()


def run_processes(function: Callable[..., Any], count: int, *arguments: Any, timeout: float = 300) -> list[Any]:
    """`function(process, *arguments)` in `count` processes; returns what each returned, in rank order.

    `function` must be at the top of a module. What it returns is pickled: use plain values and NumPy arrays.
    """
    queue, port = _context.Queue(), _free_port()
    processes = [
        _context.Process(target=_run, args=(function, rank, count, port, queue, arguments)) for rank in range(count)
    ]
    for each in processes:
        each.start()
    try:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < count:
            try:
                results.update([queue.get(timeout=0.5)])
            except Empty:
                statuses = [each.exitcode for each in processes]
                assert not any(statuses) and time.monotonic() < deadline, f"processes ended with {statuses}"
        for each in processes:
            each.join(timeout=60)
            assert each.exitcode == 0, f"a process ended with {each.exitcode}"
    finally:
        for each in processes:
            each.kill()
    return [results[rank] for rank in range(count)]


@dataclass(frozen=True)
class Ended:
    """How the processes of a run ended: exit statuses (negative: by that signal) and what they said, by rank."""

    statuses: list[int]
    outputs: list[str]

    @property
    def output(self) -> str:
        return "\n".join(self.outputs)


class Run:
    """The entry point in `count` processes; as torchrun does, the others are ended when one fails.

    prepare: `prepare(rank, *arguments)` is called in each process before the entry point; at the top of a module.
    """

    def __init__(
        self, argv: Sequence[str], count: int = 1, prepare: Callable[..., None] | None = None, arguments: tuple = ()
    ) -> None:
        self.folder = tempfile.TemporaryDirectory()
        port = _free_port()
        self.files = [Path(self.folder.name) / f"{rank}.txt" for rank in range(count)]
        self.processes = [
            _context.Process(target=_run_main, args=(list(argv), rank, count, port, str(file), prepare, arguments))
            for rank, file in enumerate(self.files)
        ]
        for each in self.processes:
            each.start()

    def outputs(self) -> list[str]:
        return [file.read_text(errors="replace") if file.exists() else "" for file in self.files]

    def wait_for(self, text: str, timeout: float = 120) -> None:
        """Until the first process has said `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.outputs()[0]:
            assert time.monotonic() < deadline, f"not said in {timeout} s: {text}\n{self.outputs()}"
            assert self.processes[0].is_alive(), f"ended before it said: {text}\n{self.outputs()}"
            time.sleep(0.02)

    def send(self, signum: int, ranks: Sequence[int] | None = None) -> None:
        for rank, each in enumerate(self.processes):
            if (ranks is None or rank in ranks) and each.is_alive():
                os.kill(each.pid or 0, signum)

    def wait(self, timeout: float = 180, grace: float = 10) -> Ended:
        """For all to end; `grace`: seconds that the others have to end by themselves once one has failed."""
        deadline = time.monotonic() + timeout
        while any(each.exitcode is None for each in self.processes):
            if any(each.exitcode for each in self.processes):
                deadline = min(deadline, time.monotonic() + grace)
                grace = timeout
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            time.sleep(0.02)
        ended = Ended([each.exitcode or 0 for each in self.processes], self.outputs())
        self.folder.cleanup()
        return ended


def _run_main(
    argv: list[str], rank: int, count: int, port: int, file: str, prepare: Callable[..., None] | None, arguments: tuple
) -> None:
    output = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    _join_group(rank, count, port)
    if prepare is not None:
        prepare(rank, *arguments)
    import run_beit3_finetuning

    status = 1
    try:
        status = run_beit3_finetuning.main(argv)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    finally:
        for child in multiprocessing.active_children():
            child.kill()  # as the entry point does when it is a program of its own
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
