"""Tables as they stand in their files: columns, and rows of cells with their places. Nothing knows what a column means.

CSV, TSV, JSON lines, a JSON list of objects, and Parquet; all but Parquet packed by gzip too. A row that is wrong by
itself is yielded as a `Wrong`; what makes the rest of the file unreadable is raised as a `TableError`.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from beit3.data.findings import shown
from sources.text_files import MAX_CELL, MAX_ROW, Lines, OnBytes, TableError, check_file, text_blocks

_TEXT_ENDINGS = (".csv", ".tsv", ".jsonl", ".json")
TABLE_ENDINGS = (*_TEXT_ENDINGS, *(f"{ending}.gz" for ending in _TEXT_ENDINGS), ".parquet")
_END = 1 << 12  # characters at the end of what was read, where a value may just be cut off

_decode = json.JSONDecoder().raw_decode
_skip_space = re.compile(r"[ \t\n\r]*").match
_LAST_KEY = re.compile(r'.*"([^"\\]{1,80})"\s*:\s*["\[{]', re.DOTALL)


class Wrong(NamedTuple):
    """A row that cannot be taken apart. what: the same for equal mistakes; detail: of this row."""

    what: str
    detail: str = ""


Cells = tuple[Any, ...]


class RawTable(Protocol):
    """A table in a file.

    Attributes:
        kind: for people, such as "CSV table".
        path: the file.
        columns: their names, each once, in the order of the file.
        unit: what rows are counted in: "line" of the file, or "row" from 1.
        typed: whether cells may be other things than text.
        picture_bytes: column that may hold pictures themselves → how much room it takes.
    """

    kind: str
    path: Path
    columns: Sequence[str]
    unit: str
    typed: bool
    picture_bytes: Mapping[str, int]

    def rows(self, names: Sequence[str], on_bytes: OnBytes | None = None) -> Iterator[tuple[int, Cells | Wrong]]:
        """Yield where each row begins, and its cells under these columns; None where a row lacks one."""
        ...


def open_table(path: Path) -> RawTable:
    """The table in a file, by the ending of its name. Raises TableError, a subclass of InputError, if there is none."""
    name = path.name.lower()
    if not name.endswith(TABLE_ENDINGS):
        raise TableError(f"{path}: no table by its name; tables end in {', '.join(TABLE_ENDINGS)}")
    if name.endswith(".parquet"):
        from sources.raw_parquet import ParquetTable

        return ParquetTable(path)
    check_file(path)
    kinds: dict[str, Callable[[Path], RawTable]] = {
        ".csv": lambda path: DelimitedTable(path, "CSV table", ","),
        ".tsv": lambda path: DelimitedTable(path, "TSV table", "\t"),
        ".jsonl": JsonLinesTable,
        ".json": JsonListTable,
    }
    return kinds[Path(name.removesuffix(".gz")).suffix](path)


def check_once(path: Path, columns: Iterable[str]) -> None:
    """Raise a TableError where two columns have one name; columns without a name may be several."""
    if twice := [shown(name) for name, count in Counter(columns).items() if count > 1 and name.strip()]:
        raise TableError(f"{path}: has more than one column {' and '.join(twice[:5])}; rename all but one of them")


def large(column: str) -> str:
    return f"column {shown(column)} has a cell of more than {MAX_CELL >> 20} MiB"


class DelimitedTable:
    """Cells between commas or tabs, quoted where they hold such or line ends; all of them text."""

    unit, typed = "line", False
    picture_bytes: Mapping[str, int] = {}

    def __init__(self, path: Path, kind: str, delimiter: str) -> None:
        self.path, self.kind, self._delimiter = path, kind, delimiter
        self.columns: Sequence[str] = ()
        self.columns = next((cells for _, cells in self._rows()), [])
        if len(self.columns) == 1 and (others := [each for each in ",;\t|" if each in self.columns[0]]):
            raise TableError(
                f"{path}: line 1: cells are separated by {shown(others[0])}, and {shown(delimiter)} is what a "
                f"{kind[:3]} file has; save it with that"
            )
        check_once(path, self.columns)

    def rows(self, names: Sequence[str], on_bytes: OnBytes | None = None) -> Iterator[tuple[int, Cells | Wrong]]:
        pick, width = _picker([self.columns.index(name) for name in names]), len(self.columns)
        several = Wrong(f"not as many cells as the header, which has {width}")
        rows = self._rows(on_bytes)
        next(rows, None)
        for line, cells in rows:
            if len(cells) != width:
                yield line, several._replace(detail=f"has {len(cells)}")
            else:
                yield line, pick(cells)

    def _rows(self, on_bytes: OnBytes | None = None) -> Iterator[tuple[int, list[str]]]:
        """The header and all rows that are not empty, as they stand there."""
        csv.field_size_limit(2 * MAX_ROW)
        lines = Lines(self.path, on_bytes)
        reader = csv.reader(_closed(lines), delimiter=self._delimiter, strict=True)
        line = 0
        try:
            for cells in reader:
                begin, line, lines.taken = line + 1, reader.line_num, 0
                characters = len("".join(cells))
                if lines.cut or characters > MAX_CELL:
                    self._check_size(begin, cells, lines.cut)
                if characters:  # spreadsheets leave rows of commas alone
                    yield begin, cells
        except csv.Error:
            if lines.cut:
                self._check_size(line + 1, [], True)
            raise TableError(
                f"{self.path}: line {line + 1}: a quote opens in the row that begins here, and does not close at the "
                'end of its cell; a quote within a quoted cell is written ""'
            ) from None

    def _check_size(self, line: int, cells: Sequence[str], cut: bool) -> None:
        longest = max(range(len(cells)), key=lambda n: len(cells[n]), default=0)
        if cells and len(cells[longest]) > MAX_CELL:
            name = self.columns[longest] if longest < len(self.columns) else str(longest + 1)
            raise TableError(f"{self.path}: line {line}: {large(name)}; is a quote open?")
        if cut:
            raise TableError(f"{self.path}: line {line}: has more than {MAX_ROW >> 20} MiB; is a quote open?")


def _closed(lines: Lines) -> Iterator[str]:
    """The lines, with a last cell that was cut off closed, so that it is told which one it is."""
    for line in lines:
        yield line.rstrip('"') if lines.cut else line
    if lines.cut:
        yield '"\n'


def _picker(positions: Sequence[int]) -> Callable[[Sequence[str]], Cells]:
    if len(positions) > 1:
        return itemgetter(*positions)  # type: ignore[return-value]
    return lambda cells: tuple(cells[n] for n in positions)


class _JsonTable:
    """Objects; their columns are all names that any of them has."""

    kind, unit, typed = "JSON table", "row", True
    picture_bytes: Mapping[str, int] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        found: dict[str, None] = {}
        for _, entry, _ in self._entries(None):
            if type(entry) is dict and not entry.keys() <= found.keys():
                found |= dict.fromkeys(entry)
        self.columns: Sequence[str] = list(found)

    def rows(self, names: Sequence[str], on_bytes: OnBytes | None = None) -> Iterator[tuple[int, Cells | Wrong]]:
        for number, entry, length in self._entries(on_bytes):
            if type(entry) is Wrong:
                yield number, entry
            elif type(entry) is not dict:
                yield number, Wrong("not a JSON object", f"is {shown(entry)}")
            else:
                if length > MAX_CELL:
                    self._check_size(number, entry)
                yield number, tuple(map(entry.get, names))

    def _entries(self, on_bytes: OnBytes | None) -> Iterator[tuple[int, Any, int]]:
        """Number, value or Wrong, and length in characters of each row."""
        raise NotImplementedError

    def _check_size(self, number: int, entry: dict[str, Any]) -> None:
        for name, value in entry.items():
            if len(value if type(value) is str else json.dumps(value)) > MAX_CELL:
                raise TableError(f"{self.path}: {self.unit} {number}: {large(name)}")

    def _too_long(self, number: int, text: str) -> TableError:
        key = _LAST_KEY.match(text[:MAX_CELL])
        what = large(key[1]) if key else f"has more than {MAX_ROW >> 20} MiB"
        return TableError(f"{self.path}: {self.unit} {number}: {what}")


class JsonLinesTable(_JsonTable):
    """A JSON object on each line."""

    unit = "line"

    def _entries(self, on_bytes: OnBytes | None) -> Iterator[tuple[int, Any, int]]:
        lines = Lines(self.path, on_bytes)
        for number, line in enumerate(lines, 1):
            if lines.cut:
                raise self._too_long(number, line)
            lines.taken = 0
            if line.isspace():
                continue
            entry: Any
            try:
                entry = json.loads(line)
            except RecursionError:
                entry = Wrong("JSON that is nested too deeply")
            except ValueError:
                entry = Wrong("not valid JSON")
            yield number, entry, len(line)


class JsonListTable(_JsonTable):
    """One list of JSON objects."""

    def _entries(self, on_bytes: OnBytes | None) -> Iterator[tuple[int, Any, int]]:
        window = _Window(text_blocks(self.path, on_bytes))
        if not (first := window.peek()):
            return
        if first != "[":
            raise TableError(
                f"{self.path}: a list of objects, [{{…}}, …], is wanted, and it begins with {shown(first)}; a file "
                "with an object on each line ends in .jsonl"
            )
        window.at += 1
        number, found = 0, window.peek()
        while found != "]":
            number += 1
            yield number, *self._value(window, number)
            if (found := window.peek()) not in (",", "]"):
                what = f"a comma or ] is wanted behind it, not {shown(found)}" if found else "the file is cut off"
                raise TableError(f"{self.path}: row {number}: {what}")
            if found == ",":
                window.at += 1
        window.at += 1
        if left := window.peek():
            raise TableError(f"{self.path}: {shown(left)} stands behind the end of the list")

    def _value(self, window: _Window, number: int) -> tuple[Any, int]:
        try:
            return window.value()
        except RecursionError:
            what = "JSON that is nested too deeply"
        except ValueError as error:
            unfinished = "Unterminated" in str(error) or getattr(error, "pos", 0) >= len(window.text) - _END
            if len(window.text) - window.at > MAX_ROW and unfinished:
                raise self._too_long(number, window.text[window.at :]) from None
            # An open text is told where it opens, all else where it is not what was wanted.
            ends = getattr(error, "pos", 0) >= len(window.text.rstrip()) or "Unterminated" in str(error)
            what = "the file is cut off" if ends else f"not valid JSON ({str(error).split(':')[0]})"
        raise TableError(f"{self.path}: row {number}: {what}")


class _Window:
    """What was read of a JSON file and is not done with, `text`, and the place in it that was reached, `at`."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self._blocks, self.text, self.at = blocks, "", 0

    def peek(self) -> str:
        """The next character that is not white space, "" at the end of the file."""
        while True:
            found = _skip_space(self.text, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self.text) or not self._read_more():
                return self.text[self.at : self.at + 1]

    def value(self) -> tuple[Any, int]:
        """The value that begins here, and its length. Raises ValueError if there is none, or none within `MAX_ROW`."""
        self.peek()
        while True:
            try:
                value, end = _decode(self.text, self.at)
            except ValueError:
                if len(self.text) - self.at > MAX_ROW or not self._read_more():
                    raise
                continue
            if end < len(self.text) or not self._read_more():  # a number may go on
                length = end - self.at
                self.at = end
                return value, length

    def _read_more(self) -> bool:
        block = next(self._blocks, "")
        self.text, self.at = self.text[self.at :] + block, 0
        return bool(block)
