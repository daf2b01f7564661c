"""What people bring, as plain rows: every reader of a table, a file or a folder yields these and knows nothing else.

A reader makes no index and looks at no picture. What is wrong with its file it notes in `Reading.findings`, all of it,
and yields the rows that are sound; whoever reads raises what was found before anything is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from beit3.data.findings import Findings

Id = int | str

TRAIN, VAL, TEST = SPLITS = ("train", "val", "test")
# What people call the splits; compared in lower case.
SPLIT_OF = {
    "train": TRAIN, "training": TRAIN, "restval": TRAIN,
    "val": VAL, "valid": VAL, "validation": VAL, "dev": VAL,
    "test": TEST, "testing": TEST,
}  # fmt: skip


class Row(NamedTuple):
    """One example.

    Attributes:
        place: where it stands in its file, for people: "line 17", "annotations[3]".
        image: the picture as the file names it, with "/" between folders; "" where only `image_id` tells which it is.
        question: None for a caption.
        answers: answer → how many gave it, in order of first appearance; None where they are not known (a test).
        captions: what people wrote; empty for a question, and where they are not known.
        split: "train", "val" or "test" where the row says it.
        question_id, image_id: where the file has them.
        weight: how much the row counts in training, above or equal 0.
        content: the picture's file itself, where the source holds pictures.
    """

    place: str
    image: str
    question: str | None = None
    answers: Mapping[str, int] | None = None
    captions: Sequence[str] = ()
    split: str | None = None
    question_id: Id | None = None
    image_id: Id | None = None
    weight: float = 1.0
    content: bytes | None = None


@dataclass
class Reading:
    """What comes out of reading sources beside their rows.

    Attributes:
        findings: mistakes, equal ones counted together.
        left_out: why a row was left out → how many were; `examples` has the first five places of each.
        on_bytes: told how much was read since it was last told, for a progress bar.
    """

    findings: Findings = field(default_factory=Findings)
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    on_bytes: Callable[[int], object] | None = None

    def leave_out(self, why: str, path: Path, place: str) -> None:
        self.left_out[why] += 1
        if self.left_out[why] <= 5:
            self.examples.setdefault(why, []).append(f"{path}, {place}")


class Source(Protocol):
    """Something that holds rows.

    Attributes:
        kind: for people, such as "CSV table" or "GQA".
        files: that it reads.
        asks: whether its rows are questions; else they are captions.
        pictures_from: the folder that `Row.image` starts from where nobody says otherwise.
        unpacked_bytes: about how much room the pictures take that it holds itself; 0 where it holds none.
    """

    @property
    def kind(self) -> str: ...

    @property
    def files(self) -> Sequence[Path]: ...

    @property
    def asks(self) -> bool: ...

    @property
    def pictures_from(self) -> Path: ...

    @property
    def unpacked_bytes(self) -> int: ...

    def rows(self, reading: Reading) -> Iterator[Row]:
        """All rows, in the order of the file. May be called several times."""
        ...
