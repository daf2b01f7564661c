"""What the commands of this room share: which model to ask, and numbers within bounds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint and what released ones need beside it."""
    parser.add_argument("--checkpoint", type=Path, help="instead of FINETUNE")
    parser.add_argument("--tokenizer", type=Path, help="beit3.spm, for checkpoints that do not hold it (SPM)")
    parser.add_argument("--answers", type=Path, help="answer2label.txt, for checkpoints that do not hold it (ANSWERS)")


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (auto)")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="(auto)")


def within(kind: type[int] | type[float], low: float, high: float | None = None) -> Callable[[str], float]:
    """Reads a number that is at least `low` and at most `high`, for argparse's `type`."""

    def number(text: str) -> float:
        value = kind(text)
        if not (value >= low and (high is None or value <= high)):
            wanted = f"at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text}: {wanted} is wanted")
        return value

    return number
