"""What the readers of published formats share: the shape of a source, checks of fields, ids that must not repeat."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from beit3.data.findings import Check, shown, wrong_id, wrong_list, wrong_path, wrong_string, wrong_text
from beit3.data.index_writing import PICTURE_ENDINGS
from sources.look import Look
from sources.rows import SPLIT_OF, Id, Reading, Row


class FormatSource:
    """One file of a published format; a `sources.rows.Source`. A format says what it is, and how rows come from it."""

    kind: str
    asks: bool
    unpacked_bytes = 0

    def __init__(self, path: Path):
        self.path = path
        self.files: Sequence[Path] = [path]
        self.pictures_from = path.parent

    @staticmethod
    def fits(look: Look) -> bool:
        """Whether a file that begins so is of this format."""
        raise NotImplementedError

    def rows(self, reading: Reading) -> Iterator[Row]:
        raise NotImplementedError


def wrong_number_or_text(value: Any) -> str | None:
    """What is wrong with an id that may be a whole number or a text."""
    return wrong_id(value) if type(value) is int else wrong_text(value) and "is neither a whole number nor a text"


def wrong_split(value: Any) -> str | None:
    """What is wrong with the name of a split."""
    return None if type(value) is str and value.lower() in SPLIT_OF else "is no split: train, val or test"


def wrong_texts(value: Any) -> str | None:
    """What is wrong with a list of texts that may be empty texts."""
    if what := wrong_list(value):
        return what
    wrong = [what for each in value if (what := wrong_string(each))]
    return f"holds what {wrong[0]}" if wrong else None


def wrong_picture_id(value: Any) -> str | None:
    """What is wrong with an id that a picture's file is named after."""
    return wrong_id(value) if type(value) is int else wrong_path(value)


def named_after(image_id: Id) -> str:
    """The name of the picture that is named after its id, as datasets on Open Images and Visual Genome do."""
    name = str(image_id)
    return name if name.lower().endswith(PICTURE_ENDINGS) else f"{name}.jpg"


def given(entry: Any, checks: Mapping[str, Check]) -> dict[str, Check]:
    """Those of the checks whose field the entry has: for fields that may be missing or null."""
    return {name: check for name, check in checks.items() if type(entry) is dict and entry.get(name) is not None}


def votes_of(answers: Iterable[str]) -> dict[str, int]:
    """Answer → how many gave it, in order of first appearance."""
    votes: dict[str, int] = {}
    for answer in answers:
        votes[answer] = votes.get(answer, 0) + 1
    return votes


class Once:
    """Ids that may come only once in a file."""

    def __init__(self, path: Path, name: str, reading: Reading):
        self.what = f"{path}: `{name}` of another entry"
        self.findings = reading.findings
        self.seen: set[Id] = set()

    def is_new(self, number: Id, place: str) -> bool:
        """Whether the id comes for the first time; noted if not."""
        if number in self.seen:
            self.findings.note(self.what, f"{place} has {shown(number)}")
            return False
        self.seen.add(number)
        return True
