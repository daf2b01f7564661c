"""METEOR and SPICE: the caption metrics that exist as Java programs only. Both come with pycocoevalcap.

Whatever keeps one from running raises `LeftOut` with the reason in a line. Nothing is ever downloaded, and no process
outlives its call. pycocoevalcap's own wrappers are not used: the one for METEOR waits for ever once its process has
stopped halfway, the one for SPICE downloads its models.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")  # in pycocoevalcap/spice/lib
SEPARATOR = "|||"  # between the fields of a line of METEOR's protocol


class LeftOut(RuntimeError):
    """Why a metric could not be computed here, in one line."""


def meteor_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], timeout: float
) -> tuple[float, list[float]]:
    """METEOR 1.5 of all captions together and of each, 0 to 1, as pycocoevalcap's `Meteor` gives them.

    predictions: a tokenized caption per image; references: the tokenized captions of the same image, at least one.
    Raises LeftOut where there is no Java, and when the program fails or takes more than `timeout` seconds.
    """
    options = "-stdio -l en -norm".split()
    command = [_java(), "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", *options]
    folder = _pycocoevalcap() / "meteor"
    started = time.monotonic()
    with tempfile.TemporaryFile() as complaints:
        try:
            with subprocess.Popen(
                command,
                cwd=folder,
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                encoding="utf-8",
            ) as process:
                # Killing a program that hangs ends its output, at which the dialogue fails.
                watchdog = threading.Timer(timeout, process.kill)
                watchdog.start()
                try:
                    return _meteor_dialogue(process, predictions, references)
                finally:
                    watchdog.cancel()
                    process.kill()
        except (OSError, ValueError) as error:
            if time.monotonic() - started >= timeout:
                raise LeftOut(f"it took more than {timeout:g} seconds") from error
            raise LeftOut(f"its program failed: {_last_line(complaints) or error}") from error


def _meteor_dialogue(
    process: subprocess.Popen[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, list[float]]:
    """Ask for the statistics of each caption, then for the scores of all. OSError or ValueError when it ends early."""
    requests, answers = process.stdin, process.stdout
    assert requests is not None and answers is not None
    statistics = []
    for prediction, its_references in zip(predictions, references, strict=True):
        fields = [*its_references, prediction.replace("  ", " ")]
        fields = [field.replace(SEPARATOR, "") for field in fields]
        requests.write(f" {SEPARATOR} ".join(["SCORE", *fields]) + "\n")
        requests.flush()
        statistics.append(answers.readline().strip())
    requests.write(f" {SEPARATOR} ".join(["EVAL", *statistics]) + "\n")
    requests.flush()
    scores = [float(answers.readline()) for _ in predictions]
    return float(answers.readline()), scores


def spice_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], timeout: float
) -> tuple[float, list[float]]:
    """SPICE, the mean and of each caption, 0 to 1 (NaN where neither caption nor references have a scene graph).

    Arguments and errors as for `meteor_scores`; also LeftOut while the models are not on the disk.
    """
    command = [_java(), "-Dfile.encoding=UTF-8", "-Xmx8G", "-jar", "spice-1.0.jar"]
    folder = _pycocoevalcap() / "spice"
    missing = [name for name in SPICE_MODELS if not (folder / "lib" / name).is_file()]
    if missing:
        raise LeftOut(f"its models are not on the disk ({' and '.join(missing)} in pycocoevalcap/spice/lib)")
    captions = [
        {"image_id": row, "test": prediction, "refs": list(its_references)}
        for row, (prediction, its_references) in enumerate(zip(predictions, references, strict=True))
    ]
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as complaints:
        asked, answered = Path(scratch, "captions.json"), Path(scratch, "scores.json")
        asked.write_text(json.dumps(captions), encoding="utf-8")
        command += [str(asked), "-out", str(answered), "-subset", "-silent"]
        try:
            subprocess.run(
                command, cwd=folder, env=_environment(), stdin=subprocess.DEVNULL, stdout=complaints, stderr=complaints,
                timeout=timeout, check=True,
            )  # fmt: skip
            scores = _read_spice(json.loads(answered.read_text(encoding="utf-8")), len(captions))
        except subprocess.TimeoutExpired as error:
            raise LeftOut(f"it took more than {timeout:g} seconds") from error
        except (OSError, ValueError, KeyError, TypeError, subprocess.CalledProcessError) as error:
            raise LeftOut(f"its program failed: {_last_line(complaints) or error}") from error
    return sum(scores) / len(scores), scores


def _read_spice(results: list[dict[str, Any]], count: int) -> list[float]:
    """The F-scores, by row. None, which SPICE writes where a score is undefined, becomes NaN as in pycocoevalcap."""
    by_row = {result["image_id"]: result["scores"]["All"]["f"] for result in results}
    return [float("nan" if by_row[row] is None else by_row[row]) for row in range(count)]


def _environment() -> dict[str, str]:
    """Without the settings that somebody made for Java programs in general, such as too little memory."""
    general = ("JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "JDK_JAVA_OPTIONS", "CLASSPATH")
    return {name: value for name, value in os.environ.items() if name not in general}


def _java() -> str:
    java = shutil.which("java")
    if java is None:
        raise LeftOut("there is no java on the PATH")
    return java


def _pycocoevalcap() -> Path:
    """Its folder; it is a namespace package, which has no file of its own."""
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise LeftOut("pycocoevalcap is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _last_line(complaints: IO[bytes]) -> str:
    """The last line a program complained with, without the stack trace that Java writes behind it."""
    complaints.seek(0)
    lines = [line.strip() for line in complaints.read().decode("utf-8", "replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith(("at ", "..."))]
    return lines[-1] if lines else ""
