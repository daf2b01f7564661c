"""Processes: who is who under each launcher, where they meet, what they bring together, how they agree to stop."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch

import utils
from engine_for_finetuning import evaluate
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
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in a shell's background
    before = signal.getsignal(signal.SIGINT)
    stop = utils.StopSignal()
    assert signal.getsignal(signal.SIGINT) != before
    stop.release()
    assert signal.getsignal(signal.SIGINT) == before


def answers_of(rows):
    """Columns of tensors of several types and shapes, and of lists; each entry tells its row."""
    numbers = torch.tensor(rows, dtype=torch.int64)
    return {
        "row": numbers,
        "label": (numbers * 3).to(torch.int32),
        "large": numbers + 2**40,
        "right": numbers % 2 == 0,
        "byte": (200 + numbers).to(torch.uint8),
        "feature": numbers[:, None, None].float() / 3 + torch.arange(6).reshape(2, 3),
        "half": numbers.half()[:, None].expand(-1, 4),  # not contiguous
        "bf16": numbers.bfloat16(),
        "double": numbers.double() / 7,
        "caption": [f"row {row}, ä" for row in rows],
        "boxes": [[row] * (row % 3) for row in rows],
    }


def plain(columns):
    """Name → (type, values) in what can be sent between processes."""
    if columns is None:
        return None
    return {
        name: (str(value.dtype), value.tolist()) if isinstance(value, torch.Tensor) else ("list", value)
        for name, value in columns.items()
    }


def evaluate_batches(process, shares):
    """What `evaluate` says on each process of batches that are there without a data set."""
    batches = [
        {"unreadable": [rows]} if isinstance(rows, str) else {"row": torch.tensor(rows), "x": torch.tensor(rows)}
        for rows in shares[process.rank]
    ]
    calls = []

    def predict_step(model, batch):
        return {name: column for name, column in answers_of(batch["x"].tolist()).items() if name != "row"}

    columns, unreadable = evaluate(
        SimpleNamespace(predict_step=predict_step, prepare=lambda batch, *_: batch),
        torch.nn.Identity(),
        batches,
        process,
        autocast=torch.no_grad,
        check_stop=lambda: calls.append(1),
    )
    return plain(columns), unreadable, len(calls)


# Each is a list with the rows of each process; None: a process without batches, which has no columns at all.
ROWS = [
    [[4, 0, 2]],
    [[0, 2], [1, 3, 5, 7, 9]],
    [[], [0]],
    [[0], []],
    [None, [3, 1]],
    [[1], None, [5, 0, 2]],
]
# Each is a list with the batches of each process, lists of rows, or what is wrong with a picture.
BATCHES = [
    [[[0, 1, 2, 3], [4, 5, 6]]],
    [[[6, 2], [0]], [[5, 3, 1], [4]]],
    [[[0, 2], [4, 6]], [[1, 3], [5]]],
    [[[0]], []],
    [[], [[1, 0]]],
    [[[0, 3]], [[1], [4], [5]], []],
    [[[0], "b.jpg"], ["a.jpg"], [[2], [1]]],
    [["a.jpg"], [[1, 0]]],
    [[[0, 1, 2], [3]], [[1, 4], [5]], [[5, 6]]],  # a sampler that fills up: rows 1 and 5 are there twice
]


def bring_together(process):
    """What this process gets of each of `ROWS` and `BATCHES` that are for so many processes."""
    gathered = []
    for shares in (shares for shares in ROWS if len(shares) == process.world_size):
        rows = shares[process.rank]
        parts = utils.gather_columns({} if rows is None else answers_of(rows))
        gathered.append(None if parts is None else [plain(part) for part in parts])
    evaluated = [evaluate_batches(process, shares) for shares in BATCHES if len(shares) == process.world_size]
    return gathered, evaluated


@pytest.fixture(scope="module", params=[1, 2, 3])
def together(request):
    """The results of `bring_together` in so many processes, in rank order."""
    return run_processes(bring_together, request.param)


def test_columns_of_all_processes_arrive_at_the_first_alone(together):
    cases = [shares for shares in ROWS if len(shares) == len(together)]
    for number, shares in enumerate(cases):
        first, *others = [gathered[number] for gathered, _ in together]
        assert first == [{} if rows is None else plain(answers_of(rows)) for rows in shares]
        assert others == [None] * (len(shares) - 1)
    assert cases


def test_evaluation_has_each_row_once_and_in_order_on_the_first_process(together):
    cases = [shares for shares in BATCHES if len(shares) == len(together)]
    for number, shares in enumerate(cases):
        results = [evaluated[number] for _, evaluated in together]
        batches = [batch for share in shares for batch in share]
        rows = sorted({row for batch in batches if isinstance(batch, list) for row in batch})
        first, *others = [columns for columns, _, _ in results]
        assert first == plain(answers_of(rows))
        assert others == [None] * (len(shares) - 1)
        unreadable = [batch for batch in batches if isinstance(batch, str)]
        assert [told for _, told, _ in results] == [unreadable] * len(shares)
        # Every process asks equally often whether to stop; else one would wait for the others for ever.
        assert {calls for _, _, calls in results} == {max(len(batches) for batches in shares)}
    assert cases
