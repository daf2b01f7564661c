import logging
import os

# Threads that wait by spinning take the core away from the loader and from other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Equal to the last bit are runs on equally many threads; those that tests fork have one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import utils

SLOW_TIMEOUT = 1800  # seconds after which a slow test that hangs is ended


def pytest_collection_modifyitems(items):
    # The longest file first, so that no process is left alone with it at the end.
    items.sort(key=lambda item: item.path.name != "test_scripts.py")
    for item in items:
        if "slow" in item.keywords and "timeout" not in item.keywords:
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """What the entry point sets up for its log is taken back, so that no test hears another's.

    Before the test too: fixtures of a whole module run before this one.
    """
    _take_back_our_log()
    yield
    _take_back_our_log()


def _take_back_our_log():
    root = logging.getLogger()
    root.handlers[:] = [handler for handler in root.handlers if not isinstance(handler, utils.TerminalFriendlyHandler)]
    root.setLevel(logging.WARNING)
