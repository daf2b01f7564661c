"""People's own tables as plain rows: a row of the table is a question with its answers, or a picture's captions."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice, repeat
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
    parse_columns,
    two_of_one,
)
from sources.raw_tables import TABLE_ENDINGS, Cells, RawTable, Wrong, open_table
from sources.rows import TEST, Id, Reading, Row
from sources.text_files import TableError

__all__ = ["TABLE_ENDINGS", "TableSource", "parse_columns"]

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
_SAID = {True: _AT[ANSWERS], False: _AT[CAPTIONS]}  # asks → what makes a row more than a test
_ROWS_AT_A_TIME, _PICTURES_AT_A_TIME = 1024, 16
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
        findings, unit = reading.findings, self._table.unit
        told, said_nothing, ids = 0, array("q"), _Ids()
        raw = self._raw_rows(reading)
        while batch := list(islice(raw, _PICTURES_AT_A_TIME if self.unpacked_bytes else _ROWS_AT_A_TIME)):
            numbers, found = zip(*batch, strict=True)
            for number, row in self._batch(findings, numbers, found):
                if row[_SAID[self.asks]]:
                    told += 1
                elif row.split != TEST:
                    said_nothing.append(number)
                if row.question_id is not None:
                    ids.add(row.question_id, number)
                yield row
        if told:  # else the whole table is one for tests
            [column] = [field.column for field in self._fields if field.at == _SAID[self.asks]]
            for number in said_nothing:
                findings.note(f"{self.files[0]}: column {_named(column)} is empty", f"{unit} {number}")
        for first, second in ids.doubles():
            what = f"{self.files[0]}: `{QUESTION_ID}` of another row"
            findings.note(what, f"{unit} {second} has that of {unit} {first}")

    def _raw_rows(self, reading: Reading) -> Iterator[tuple[int, Cells]]:
        """The rows that can be taken apart, up to where the file can be read no further; the others are noted."""
        findings, length = reading.findings, 0
        try:
            for number, found in self._table.rows([field.column for field in self._fields], reading.on_bytes):
                length += 1
                if type(found) is Wrong:
                    place = f"{self._table.unit} {number} {found.detail}".rstrip()
                    findings.note(f"{self.files[0]}: {found.what}", place)
                else:
                    yield number, found
        except TableError as error:
            findings.broken_files += error.problems
        else:
            if not length:
                findings.broken_files.append(f"{self.files[0]}: has no row")

    def _batch(self, findings: Findings, numbers: Sequence[int], found: Sequence[Cells]) -> Iterator[tuple[int, Row]]:
        """The sound rows of some, with their numbers. A column at a time: that takes half the time."""
        places = [f"{self._table.unit} {number}" for number in numbers]
        wrong: set[int] = set()
        columns: list[Iterable[Any]] = [places, *map(repeat, Row("", "")[1:])]
        for field, column in zip(self._fields, zip(*found, strict=True), strict=True):
            try:
                columns[field.at] = list(map(field.convert, column))
            except Mistake:
                columns[field.at] = self._one_by_one(findings, field, places, column, wrong)
        if self.unpacked_bytes or self._prefix:
            images = list(map(self._picture, numbers, columns[_AT[IMAGE]]))
            columns[_AT[IMAGE]], columns[_AT["content"]] = zip(*images, strict=True)
        rows = zip(numbers, map(Row, *columns), strict=True)
        yield from (each for n, each in enumerate(rows) if n not in wrong) if wrong else rows

    def _one_by_one(
        self, findings: Findings, field: _Field, places: Sequence[str], column: Sequence[Any], wrong: set[int]
    ) -> list[Any]:
        """What the cells of a column mean, some of which are wrong: these are noted, and the numbers of their rows."""
        meant = []
        for number, cell in enumerate(column):
            value = Row._field_defaults.get(field.ours, "")
            try:
                value = field.convert(cell)
            except Blank:
                # Without answers or captions it may be a row for tests.
                if field.ours not in (ANSWERS, CAPTIONS):
                    findings.note(f"{self.files[0]}: column {_named(field.column)} is empty", places[number])
                    wrong.add(number)
            except Mistake as mistake:
                what = f"{self.files[0]}: column {_named(field.column)} {mistake.what}"
                findings.note(what, f"{places[number]}{mistake.found}")
                wrong.add(number)
            meant.append(value)
        return meant

    def _picture(self, number: int, image: str | Picture) -> tuple[str, bytes | None]:
        """The path of a picture, and the picture itself where the table holds it."""
        if type(image) is not Picture:
            return f"{self._prefix}{image}", None
        return f"{self._prefix}{image.path or f'{number:08d}{_ending(image.content)}'}", image.content


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
