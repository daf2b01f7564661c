"""`python -m tasks.recipe_by_size TASK DATA_PATH FINETUNE SPM [FLAGS]`: how long to learn from so many rows, as flags.

Few rows want small steps and many passes over them: what matters is the number of steps, as a model that has taken too
few has not learned, and one pass over 800 rows has only fifty. Prints the pairs per step, then the flags; on standard
error a line that says why.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from beit3.data.index_description import said_of
from beit3.data.tokenizer import Tokenizer
from beit3.model.description import about, answers_at_once
from beit3.system.errors import InputError
from tasks.make_index import last_given

STEPS = 1500  # of a training from pre-trained weights, where the rows are few
STEPS_FROM_SCRATCH = 750
PAIRS_FROM_SCRATCH = 32
# Up to so many rows → pairs per step; more take as many as published.
PAIRS = ((1_000, 16), (5_000, 32), (50_000, 64))
MOST_PAIRS = 128
FEWEST_EPOCHS, MOST_EPOCHS, MOST_EPOCHS_FROM_SCRATCH = 10, 40, 100
RELEASED = 64010  # rows of the token table of released weights
ROUNDED = 64  # fresh tables have a multiple of this
WARM_UP = 0.1  # share of all steps, but no more than an epoch of a large data set


@dataclass(frozen=True)
class Plan:
    """pairs: per step. warmup_steps: in which the learning rate rises."""

    pairs: int
    epochs: int
    warmup_steps: int


def plan(rows: int, from_scratch: bool, epochs: int | None = None) -> Plan:
    """How to learn from so many training rows. epochs: those that the user wants; the warm-up then fits them."""
    pairs = next((pairs for most, pairs in PAIRS if rows <= most), MOST_PAIRS)
    if from_scratch:
        pairs = PAIRS_FROM_SCRATCH
    pairs = max(1, min(pairs, rows))
    per_epoch = max(1, rows // pairs)
    steps, most = (STEPS_FROM_SCRATCH, MOST_EPOCHS_FROM_SCRATCH) if from_scratch else (STEPS, MOST_EPOCHS)
    epochs = epochs or min(most, max(FEWEST_EPOCHS, math.ceil(steps / per_epoch)))
    return Plan(pairs, epochs, max(1, round(WARM_UP * epochs * per_epoch)))


def main(task: str, data_path: str, finetune: str, spm: str, *flags: str) -> int:
    finetune = last_given(flags, "--finetune") or finetune
    index = Path(data_path) / f"{task}.train.jsonl"
    with open(index, "rb") as file:
        rows = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    made = plan(rows, from_scratch=not finetune, epochs=_epochs_in(flags))
    start = "from fresh weights" if not finetune else "from pre-trained weights"
    print(
        f"{rows} training rows, {start}: {made.pairs} pairs per step, {made.epochs} epochs, {made.warmup_steps} steps "
        "of warm-up; flags of your own count more",
        file=sys.stderr,
    )
    print(made.pairs)
    sides = said_of(Path(data_path), f"{task}.index.json", "sides", 0)
    if sides:
        print(f"{sides} rows say left or right, so pictures are not mirrored: --no_mirror", file=sys.stderr)
    vocabulary = f"--vocab_size {_vocabulary(finetune, spm)}"
    print(f"--epochs {made.epochs} --warmup_steps {made.warmup_steps} {vocabulary}{' --no_mirror' * bool(sides)}")
    return 0


def _epochs_in(flags: Sequence[str]) -> int | None:
    """The last `--epochs` that the user gave; None for none, or one that the program will refuse."""
    given = last_given(flags, "--epochs")
    return int(given) if given is not None and re.fullmatch("[1-9][0-9]{0,5}", given) else None


def _vocabulary(finetune: str, spm: str) -> int:
    """Rows of the token table: those that the weights say; of fresh ones what the tokenizer needs."""
    try:
        if not finetune:
            return -(-Tokenizer(spm).vocab_size // ROUNDED) * ROUNDED
        said = about(Path(finetune)).description if answers_at_once(Path(finetune)) is not None else {}
    except (InputError, OSError):
        said = {}  # the program says what is wrong with it
    size = said.get("vocab_size")
    return size if type(size) is int else RELEASED


if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
