"""The flags of making an index from people's own data. Needs no PyTorch.

`tasks.make_index` reads them, which `bash.sh` calls before a training; the training itself knows them and leaves them
alone, so that one command line serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit3.system.atomic_files import sha256_of
from beit3.system.flags import as_given, flag, flags_of
from sources.rows import TEST, TRAIN, VAL


@dataclass(frozen=True)
class SourceSettings:
    """Where own data comes from, and how it is read."""

    train: str | None = flag(None, "own data: a table, a JSON file, a pair of them joined by a comma, or a folder")
    val: str | None = flag(None, "the same for validation; default: a share of the training pictures")
    test: str | None = flag(None, "the same for test")
    columns: str = flag("", "our names for other columns: image=datei,question=frage,answers=antwort")
    val_fraction: float = flag(0.1, "share of the pictures kept for validation", above=0, below=1)
    val_seed: int = flag(0, "decides which pictures these are", at_least=0, at_most=2**63 - 1)
    skip_missing: bool = flag(False, "leave out rows whose picture is missing; otherwise they are an error")

    def named(self) -> dict[str, str]:
        """Split → the source that was named for it."""
        return {split: name for split, name in ((TRAIN, self.train), (VAL, self.val), (TEST, self.test)) if name}


@dataclass(frozen=True)
class AnswerSettings:
    """Which answers a model chooses from."""

    min_answer_count: int = flag(1, "an answer of fewer training rows is not learned", at_least=1, at_most=10**9)
    max_answers: int = flag(0, "the most frequent answers alone; 0 = all", at_least=0, at_most=1_000_000)
    answers: Path | None = flag(None, "file with the answers to learn, one per line, or answer2label.txt")
    normalize_answers: bool = flag(False, "count answers in the form of VQA v2: no case, punctuation, articles")


def chosen(settings: Any) -> dict[str, Any]:
    """What decides the content of an index beside its sources, in plain values; made with others, it is made again."""
    names = {each.name for kind in (SourceSettings, AnswerSettings) for each in flags_of(kind)} - {TRAIN, VAL, TEST}
    decide = {name: value for name, value in as_given(settings).items() if name in names}
    if decide.get("answers"):  # what stands in the file counts, not where it is
        decide["answers"] = _digest(Path(decide["answers"]))
    return decide


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return sha256_of(file)
    except OSError:
        return ""  # that it cannot be read is told when it is
