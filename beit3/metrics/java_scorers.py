"""METEOR and SPICE: the two caption metrics that exist as Java programs only. Both come with pycocoevalcap.

Whatever keeps one from running raises `LeftOut` with the reason in a line; nothing is ever downloaded, and no process
outlives its call. pycocoevalcap's own wrappers are not used: one waits for ever when its process stops halfway, the
other downloads half a gigabyte.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO

SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
SEPARATOR = "|||"  # between the fields of METEOR's protocol


class LeftOut(RuntimeError):
    """Why a metric could not be computed here, in one line."""


def meteor(
    predictions: Sequence[str], references: Sequence[Sequence[str]], timeout: float
) -> tuple[float, list[float]]:
    """METEOR 1.5 of the corpus and of each caption, 0 to 1, as pycocoevalcap's `Meteor` gives them.

    predictions: one tokenized caption per image; references: those of the same image, at least one each. Raises
    LeftOut where there is no Java, and when the program fails or needs more than `timeout` seconds.
    """
    folder = _package_folder() / "meteor"
    command = [_java(), "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    with tempfile.TemporaryFile() as complaints:
        try:
            with subprocess.Popen(
                command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, encoding="utf-8"
            ) as process:
                # A program that hangs is killed; then its output ends, and the dialogue below fails.
                watchdog = threading.Timer(timeout, process.kill)
                watchdog.start()
                try:
                    return _meteor_dialogue(process, predictions, references)
                finally:
                    watchdog.cancel()
                    process.kill()
        except (OSError, ValueError) as error:
            if watchdog.finished.is_set():
                pass
            raise LeftOut(_reason("METEOR", error, complaints, timeout)) from error


def _meteor_dialogue(
    process: subprocess.Popen[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, list[float]]:
    """Ask for the statistics of each caption, then for the scores of all of them. Raises OSError, ValueError."""
    assert process.stdin is not None and process.stdout is not None

    def ask(line: str) -> None:
        process.stdin.write(line + "\n")
        process.stdin.flush()

    statistics = []
    for prediction, its_references in zip(predictions, references, strict=True):
        fields = [*its_references, prediction.replace("  ", " ")]
        ask(f" {SEPARATOR} ".join(["SCORE", *(field.replace(SEPARATOR, "") for field in fields)]))
        statistics.append(process.stdout.readline().strip())
    ask(f" {SEPARATOR} ".join(["EVAL", *statistics]))
    scores = [float(process.stdout.readline()) for _ in predictions]  # float("") where the program has ended
    return float(process.stdout.readline()), scores
