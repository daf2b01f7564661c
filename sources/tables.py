"""People's own tables as plain rows: a row of the table is a question with its answers, or a picture's captions."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from beit3.data.findings import Findings, shown
from beit3.system.errors import InputError
from sources import cells
from sources.cells import Blank, Mistake, Picture
from sources.columns import (
    ANSWERS,
    CAPTIONS,
    IMAGE,
    IMAGE_ID,
    QUESTION,
    QUESTION_ID,
    SPLIT,
    WEIGHT,
    find_columns,
    lacks,
    two_of_one,
)
from sources.raw_tables import RawTable, Wrong, open_table
from sources.rows import TEST, Id, Reading, Row
from sources.text_files import TableError

# Our name → what its cells mean, where all of them are text and where they are typed.
_CONVERT: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    IMAGE: (cells.image, cells.image),
    QUESTION: (cells.text, cells.text),
    ANSWERS: (cells.answers_of_text, cells.answers),
    CAPTIONS: (cells.captions_of_text, cells.captions),
    SPLIT: (cells.split, cells.split),
    QUESTION_ID: (cells.identity_of_text, cells.identity),
    IMAGE_ID: (cells.identity_of_text, cells.identity),
    WEIGHT: (cells.weight_of_text, cells.weight),
}
_AT = {name: position for position, name in enumerate(Row._fields)}
_CONTENT = _AT["content"]
_ENDINGS = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp",
            b"II*\0": ".tif", b"MM\0*": ".tif"}  # fmt: skip


class _Field(NamedTuple):
    """A column that is read. at: its place in `Row`."""

    ours: str
    column: str
    at: int
    convert: Callable[[Any], Any]


class TableSource:
    """The rows of one table; see `sources.rows.Source`.

    path: a file that ends as `TABLE_ENDINGS` has it. columns: our name → the file's, where it is not one of
    `sources.columns.NAMES`. prefix: what stands before each path of a picture, such as "train/". asks: whether the rows
    are questions, or captions; None: as the columns say. A table without answers or captions is one for tests.
    Raises InputError where the file is no table, or columns are missing or not clear.
    """

    def __init__(self, path: Path, columns: Mapping[str, str] = {}, prefix: str = "", asks: bool | None = None) -> None:
        self._table = table = open_table(path)
        self.kind, self.files, self.pictures_from, self._prefix = table.kind, [path], path.parent, prefix
        if not table.columns:
            _, row = next(table.rows([]), (0, Wrong("is empty")))
            raise InputError(f"{path}: {row.what if type(row) is Wrong else 'has no column'}")
        found, problems = _unambiguous(table, find_columns(path, table.columns, columns))
        if asks is None and QUESTION in found and CAPTIONS in found:
            both = [found[QUESTION], found[CAPTIONS]]
            if len(kept := _filled(table, both)) == 2:
                said = " and ".join(map(shown, both))
                problems.append(
                    f"{path}: has questions and captions (the columns {said}); say which, by --task vqa or captioning"
                )
            asks = both[0] in kept
        self.asks = asks if asks is not None else QUESTION in found
        wanted = [QUESTION, CAPTIONS] if asks is None else [QUESTION] if asks else []
        if IMAGE not in found:
            problems.append(lacks(path, [IMAGE], table.columns))
        if wanted and found.keys().isdisjoint(wanted):
            problems.append(lacks(path, wanted, table.columns))
        if problems:
            raise InputError(problems)
        ignored = {CAPTIONS} if self.asks else {QUESTION, ANSWERS}
        self._fields = [
            _Field(ours, column, _AT[ours], _CONVERT[ours][table.typed])
            for ours, column in found.items()
            if ours not in ignored
        ]
        self.unpacked_bytes = table.picture_bytes.get(found[IMAGE], 0)

    def rows(self, reading: Reading) -> Iterator[Row]:
        """All sound rows, in the order of the file; what is wrong with the others is noted."""
        path, findings = self.files[0], reading.findings
        unclaimed, ids = array("q"), _Ids()
        told = length = 0
        try:
            for number, found in self._table.rows([field.column for field in self._fields], reading.on_bytes):
                length += 1
                place = f"{self._table.unit} {number}"
                if type(found) is Wrong:
                    findings.note(f"{path}: {found.what}", f"{place} {found.detail}".rstrip())
                elif (row := self._row(findings, place, found)) is not None:
                    if row[_SAID[self.asks]]:
                        told += 1
                    elif row.split != TEST:
                        unclaimed.append(number)
                    if row.question_id is not None:
                        ids.add(row.question_id, number)
                    yield row
        except TableError as error:
            findings.broken_files += error.problems
            return
        if not length:
            findings.broken_files.append(f"{path}: has no row")
        self._note_empty(findings, unclaimed if told else ())
        for first, second in ids.doubles():
            unit = self._table.unit
            findings.note(f"{path}: `{QUESTION_ID}` of another row", f"{unit} {second} has that of {unit} {first}")

    def _row(self, findings: Findings, place: str, found: Sequence[Any]) -> Row | None:
        """A row, None where something in it is wrong, which is noted."""
        values: list[Any] = [place, "", None, None, (), None, None, None, 1.0, None]
        sound = True
        for (ours, column, at, convert), cell in zip(self._fields, found, strict=True):
            try:
                values[at] = convert(cell)
            except Mistake as mistake:
                if type(mistake) is Blank and ours in (ANSWERS, CAPTIONS) and cells.is_blank(cell):
                    continue  # a mistake where other rows have them
                findings.note(f"{self.files[0]}: column {_named(column)} {mistake.what}", f"{place}{mistake.found}")
                sound = False
        if not sound:
            return None
        if type(picture := values[1]) is Picture:
            number = place.rpartition(" ")[2]
            values[1], values[_CONTENT] = picture.path or f"{number:0>8}{_ending(picture.content)}", picture.content
        if self._prefix:
            values[1] = self._prefix + values[1]
        return Row(*values)

    def _note_empty(self, findings: Findings, numbers: Sequence[int]) -> None:
        wanted = ANSWERS if self.asks else CAPTIONS
        for number in numbers:
            [column] = [field.column for field in self._fields if field.ours == wanted]
            findings.note(f"{self.files[0]}: column {_named(column)} is empty", f"{self._table.unit} {number}")


_SAID = {True: _AT[ANSWERS], False: _AT[CAPTIONS]}  # asks → what makes a row more than a test


class _Ids:
    """Ids and where they were, in 16 bytes for each: a dictionary of a million takes some hundred megabytes."""

    def __init__(self) -> None:
        self._keys, self._numbers = array("q"), array("q")

    def add(self, identity: Id, number: int) -> None:
        self._keys.append(identity if type(identity) is int else hash(("text", identity)))
        self._numbers.append(number)

    def doubles(self) -> Iterator[tuple[int, int]]:
        """Yield (number of the first, number of another) for each id that was there before, in the order of rows."""
        keys, numbers = np.frombuffer(self._keys, np.int64), np.frombuffer(self._numbers, np.int64)
        order = np.argsort(keys, kind="stable")
        starts = np.r_[True, keys[order][1:] != keys[order][:-1]] if len(keys) else np.empty(0, bool)
        firsts = order[np.maximum.accumulate(np.where(starts, np.arange(len(keys)), 0))]
        yield from sorted(
            zip(numbers[firsts[~starts]].tolist(), numbers[order[~starts]].tolist(), strict=True),
            key=lambda pair: pair[1],
        )


def _unambiguous(table: RawTable, found: Mapping[str, Sequence[str]]) -> tuple[dict[str, str], list[str]]:
    """Our name → the column that it is; and where it is not clear. Of several, empty ones count as not there."""
    settled, problems = {}, []
    for ours, names in found.items():
        kept = [name for name in names if name in _filled(table, names)] if len(names) > 1 else list(names)
        if len(kept) > 1:
            problems.append(two_of_one(table.path, ours, kept))
        settled[ours] = (kept or names)[0]
    return settled, problems


def _filled(table: RawTable, names: Sequence[str]) -> Collection[str]:
    """Those of the columns that are not empty in all rows."""
    found: set[str] = set()
    for _, row in table.rows(names):
        if type(row) is not Wrong:
            found.update(name for name, cell in zip(names, row, strict=True) if not cells.is_blank(cell))
            if len(found) == len(names):
                break
    return found


def _named(column: str) -> str:
    """A column's name in a message: as it stands there, where that cannot be misread."""
    return column if column.isidentifier() and len(column) <= 80 else shown(column)


def _ending(content: bytes) -> str:
    """What the name of a picture should end in, by its first bytes."""
    return next((ending for start, ending in _ENDINGS.items() if content.startswith(start)), ".jpg")
