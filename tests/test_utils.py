"""Processes: who is who under each launcher, where they meet, and how they agree to stop."""

import os
import signal

import pytest

import utils
from tests.workers import run_processes


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[03-05,9],cpu1", "gpu03"), ("gpu[7,9]", "gpu7"), ("node1,node2", "node1"), ("alone", "alone"), ("", "")],
)
def test_the_first_machine_of_a_slurm_list(nodes, first):
    assert utils._first_host(nodes) == first


def test_processes_meet_where_slurm_says_and_else_on_this_machine():
    job = {"SLURM_STEP_NODELIST": "gpu[03-05]", "SLURM_JOB_ID": "1234567"}
    assert utils._meeting_point(job) == {"MASTER_ADDR": "gpu03", "MASTER_PORT": "30067"}
    assert utils._meeting_point({}) == {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_ranks_come_from_the_launcher_that_is_there():
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    slurm = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    itp = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}
    assert utils._launcher_ranks({}, on_itp=False) is None
    assert utils._launcher_ranks({**torchrun, **itp}, on_itp=False) == (3, 8, 1)
    assert utils._launcher_ranks({**torchrun, **itp}, on_itp=True) == (5, 6, 2)
    assert utils._launcher_ranks({**slurm, "SLURM_STEP_ID": "0"}, on_itp=False) == (2, 4, 0)
    assert utils._launcher_ranks(slurm, on_itp=False) is None  # a shell inside an allocation


def stop_after(process, calls):
    stop = utils.StopSignal()
    stopped_at = None
    for call in range(calls):
        if call == 3 and process.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        try:
            stop.check()
        except utils.StopRequested as request:
            stopped_at = (call, request.signum)
            break
    stop.release()
    return stopped_at


def test_a_signal_to_one_process_stops_all_at_the_same_call():
    first, second = run_processes(stop_after, 2, 10)
    assert first == second == (4, signal.SIGTERM)
    assert run_processes(stop_after, 2, 3) == [None, None]


def test_the_signals_are_given_back():
    before = signal.getsignal(signal.SIGINT)
    stop = utils.StopSignal()
    assert signal.getsignal(signal.SIGINT) != before
    stop.release()
    assert signal.getsignal(signal.SIGINT) == before
