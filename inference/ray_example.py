"""Many pictures on a cluster that is not torchrun's: an example for Ray Data, which is not needed for anything else.

    python3 -m inference.ray_example CHECKPOINT QUESTIONS.csv FOLDER [ACTORS]

The table has the columns image and question; paths of pictures start from the table's folder, which all machines see.
Each actor holds one model. FOLDER receives the answers as parquet files.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np


class Asker:
    """An actor: batches of rows in, the same rows with `answer`, `confidence` and `error` out."""

    def __init__(self, checkpoint: str, folder: str) -> None:
        from inference import load  # here, so that it is loaded where the actor runs

        self.model, self.folder = load(checkpoint), folder

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        told = [self._ask(*pair) for pair in zip(batch["image"].tolist(), batch["question"].tolist(), strict=True)]
        answers, confidences, errors = zip(*told, strict=True)
        return {**batch, "answer": list(answers), "confidence": list(confidences), "error": list(errors)}

    def _ask(self, image: str, question: str) -> tuple[str, float, str]:
        """One row. A picture that cannot be read or a question that is none costs itself only."""
        try:
            best = self.model.answer(os.path.join(self.folder, image), question, top=1)[0]
        except (ValueError, OSError) as error:
            return "", 0.0, str(error)
        return best.text, best.confidence, ""


def answer_table(checkpoint: Path, table: Path, output: Path, actors: int = 1) -> None:
    """Answer a csv with `actors` models at a time, into parquet files in the folder `output`."""
    import ray

    rows = ray.data.read_csv(str(table.resolve()))
    # A machine with GPUs gives one to each actor.
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    arguments = (str(checkpoint.resolve()), str(table.resolve().parent))
    answered = rows.map_batches(
        Asker, fn_constructor_args=arguments, batch_size=16, concurrency=actors, num_gpus=gpus or None
    )
    answered.write_parquet(str(output.resolve()))


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    checkpoint, table, folder = map(Path, sys.argv[1:4])
    answer_table(checkpoint, table, folder, actors=int(sys.argv[4]) if len(sys.argv) == 5 else 1)
