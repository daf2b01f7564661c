"""Imported once by the server that the tests' processes are forked from, so that each starts in a moment."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import run_beit3_finetuning  # noqa: F401
from beit3.training.deepspeed_backend import import_deepspeed

import_deepspeed()
