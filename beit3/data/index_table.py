"""Index files (one JSON object per line) in memory: checked line by line, then held in a few flat arrays.

A Python object per row would cost over a kilobyte per row, and loader workers would copy it all as they touch it (the
reference counts lie beside the data). Flat arrays cost some 60 bytes per row and are shared by forked workers.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from beit3.system.errors import MAX_LISTED, InputError

MAX_WEIGHT = 1e30  # of a row
MAX_LINE_BYTES = 1 << 20  # a line of VQAv2 has some 200 bytes

Problem = tuple[int, str]  # row, what is wrong with it


class RaggedArray:
    """Rows of different lengths, held end to end: row i is `values[offsets[i]:offsets[i + 1]]`."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray):
        self.values, self.offsets = values, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.offsets.nbytes

    def row_of(self, index: int) -> int:
        """The row that `values[index]` belongs to."""
        return int(np.searchsorted(self.offsets, index, side="right")) - 1


class StringColumn:
    """One string per row, each distinct string held once as UTF-8."""

    def __init__(self, strings: Sequence[str], numbers: np.ndarray):
        encoded = [string.encode() for string in strings]
        self.texts = RaggedArray(np.frombuffer(b"".join(encoded), np.uint8), _offsets(map(len, encoded)))
        self.numbers = numbers  # (rows,), which string

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, row: int) -> str:
        return self.texts[int(self.numbers[row])].tobytes().decode()

    @property
    def nbytes(self) -> int:
        return self.texts.nbytes + self.numbers.nbytes


Column = np.ndarray | RaggedArray | StringColumn


class IndexTable:
    """The rows of one or several index files, one after the other."""

    def __init__(self, columns: dict[str, Column], files: list[str], starts: list[int], num_rows: int, digest: str):
        self.columns = columns
        self.files, self.starts, self.num_rows = files, starts, num_rows
        self.digest = digest  # SHA-256 over the content of the files, in hexadecimal

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, name: str) -> Any:
        """The column of that name; its `[row]` is an int, a numpy view or a str."""
        return self.columns[name]

    def place(self, row: int) -> str:
        """`file:line` of a row."""
        return _place(self.files, self.starts, row)

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in self.columns.values())


class IntField:
    """An integer per row. `count`: where given, values must be in [0, count)."""

    def __init__(self, name: str, count: int | None = None):
        self.name, self.count = name, count
        self.values = array("q")

    def add(self, value: Any) -> None:
        if type(value) is not int:
            raise ValueError(f"an integer expected, found {_shorten(value)}")
        if self.count is not None and not 0 <= value < self.count:
            raise ValueError(f"{value} is not in 0 … {self.count - 1}")
        self.values.append(value)

    def add_blank(self) -> None:
        self.values.append(0)

    def problems(self) -> Iterator[Problem]:
        return iter(())

    def finish(self) -> np.ndarray:
        return _compact(np.asarray(self.values))


class FloatField:
    """A finite number of at least 0 per row, such as a weight; `default` where a line does not say it."""

    def __init__(self, name: str, default: float):
        self.name, self.default = name, default
        self.values = array("f")

    def add(self, value: Any) -> None:
        if type(value) not in (int, float) or not 0 <= value < MAX_WEIGHT:
            raise ValueError(f"a number of at least 0 expected, found {_shorten(value)}")
        self.values.append(value)

    def add_blank(self) -> None:
        self.values.append(self.default)

    def problems(self) -> Iterator[Problem]:
        return iter(())

    def finish(self) -> np.ndarray:
        return np.asarray(self.values)


class ListField:
    """A list of numbers per row; the kinds below say which numbers."""

    typecode: str
    types: frozenset[type]
    wanted: str

    def __init__(self, name: str):
        self.name = name
        self.values = array(self.typecode)
        self.ends = array("q", [0])

    def add(self, value: Any) -> None:
        # Types are looked at before the array is: it would take True for 1.
        if type(value) is not list or not self.types.issuperset(map(type, value)):
            raise ValueError(f"a list of {self.wanted} expected, found {_shorten(value)}")
        self.values.extend(value)
        self.ends.append(len(self.values))

    def add_blank(self) -> None:
        self.ends.append(len(self.values))

    def is_good(self, values: np.ndarray) -> np.ndarray:
        """Which of the values are allowed."""
        raise NotImplementedError

    def problems(self) -> Iterator[Problem]:
        rows = self.finish()
        named = -1
        for index in np.flatnonzero(~self.is_good(rows.values)).tolist():
            row = rows.row_of(index)
            if row != named:  # one bad value names the row
                yield row, f"{self.name}: {rows.values[index]} is not one of the {self.wanted}"
                named = row

    def finish(self) -> RaggedArray:
        return RaggedArray(_compact(np.asarray(self.values)), _compact(np.asarray(self.ends)))


class IntListField(ListField):
    """A list of integers in [0, count) per row, such as labels. `distinct`: no value twice in a row."""

    typecode, types = "q", frozenset({int})

    def __init__(self, name: str, count: int, distinct: bool = False):
        self.count, self.distinct = count, distinct
        self.wanted = f"integers 0 … {count - 1}"
        super().__init__(name)

    def is_good(self, values: np.ndarray) -> np.ndarray:
        return (values >= 0) & (values < self.count)

    def add(self, value: Any) -> None:
        super().add(value)
        if self.distinct and len(set(value)) < len(value):
            self.ends.pop()
            raise ValueError(f"{_shorten(value)} holds a value twice")


class TokenField(IntListField):
    """The token ids of a text, without `<s>` and `</s>`. `optional`: null is allowed and gives an empty row."""

    def __init__(self, name: str, vocab_size: int, optional: bool = False):
        super().__init__(name, vocab_size)
        self.optional = optional
        self.wanted = f"token ids 0 … {vocab_size - 1} (the vocabulary has {vocab_size})"

    def add(self, value: Any) -> None:
        if value is None and self.optional:
            return self.add_blank()
        if value is None or value == []:
            raise ValueError("the text is empty")
        return super().add(value)


class ScoreListField(ListField):
    """A list of numbers in [0, 1] per row, such as soft scores; held in float32."""

    typecode, types, wanted = "d", frozenset({int, float}), "numbers from 0 to 1"

    def is_good(self, values: np.ndarray) -> np.ndarray:
        return (values >= 0) & (values <= 1)  # False for NaN

    def finish(self) -> RaggedArray:
        return RaggedArray(np.asarray(self.values, np.float32), _compact(np.asarray(self.ends)))


class StringField:
    """A string per row, such as an identifier."""

    def __init__(self, name: str):
        self.name = name
        self.number_of: dict[str, int] = {}
        self.numbers = array("i")

    def add(self, value: Any) -> None:
        number = self.number_of.get(value) if type(value) is str else None
        if number is None:
            self.check_new(value)
            number = self.number_of.setdefault(value, len(self.number_of))
        self.numbers.append(number)

    def add_blank(self) -> None:
        self.numbers.append(-1)

    def check_new(self, value: Any) -> None:
        """Raise ValueError for a string that is not allowed; called once for each distinct one."""
        if type(value) is not str or not value or "\0" in value:
            raise ValueError(f"a string expected, found {_shorten(value)}")
        value.encode()  # UnicodeEncodeError, a ValueError, for half a surrogate pair

    def problems(self) -> Iterator[Problem]:
        return iter(())

    def finish(self) -> StringColumn:
        return StringColumn(list(self.number_of), _compact(np.asarray(self.numbers)))


class PathField(StringField):
    """A path below the folder `root`, in the words of the index: links are followed wherever they lead.

    An index cannot make links, only the owner of the folder can, who wants them: COCO on another disk, say.
    """

    def __init__(self, name: str, root: str | os.PathLike[str]):
        super().__init__(name)
        self.root = os.fspath(root)

    def check_new(self, value: Any) -> None:
        super().check_new(value)
        if os.path.isabs(value) or ".." in value.split("/"):
            raise ValueError(f"{value!r} must be relative to the data folder, without '..'")

    def problems(self) -> Iterator[Problem]:
        """Look at each folder once, and at no file: start-up stays fast on slow disks."""
        first: dict[str, int] = {}  # folder → number of its first picture
        for path, number in self.number_of.items():
            first.setdefault(os.path.dirname(path), number)
        missing = [folder for folder in first if not os.path.isdir(os.path.join(self.root, folder))]
        numbers = np.asarray(self.numbers)
        for folder in missing[:MAX_LISTED]:
            row = int(np.argmax(numbers == first[folder]))
            yield row, f"{self.name}: {self.root} has no folder {folder!r}; pictures are looked for there"


Field = IntField | FloatField | IntListField | ScoreListField | StringField


def read_index(
    files: Sequence[str | os.PathLike[str]],
    fields: Sequence[Field],
    how_to_make: str,
    same_length: Iterable[tuple[str, str]] = (),
) -> IndexTable:
    """Read index files into one table, rows in the order of files and lines.

    fields: fresh field objects, one per key wanted of each line; other keys are ignored. how_to_make: said in the error
    for a missing or empty file. same_length: pairs of list fields that must have equally many entries.
    Raises one InputError that lists the first problems found, each with file and line.
    """
    names = [os.fspath(file) for file in files]
    missing = [f"{name}: missing; {how_to_make}" for name in names if not Path(name).is_file()]
    if missing:
        raise InputError(missing)
    reader = _Reader(fields)
    for name in names:
        reader.read(name)
    found = [*reader.problems, *(problem for field in fields for problem in islice(field.problems(), MAX_LISTED))]
    columns: dict[str, Column] = {field.name: field.finish() for field in fields}
    if not found:  # the fields of a bad line are blank, so their lengths say nothing
        found = [problem for pair in same_length for problem in _unequal_lengths(columns, *pair)]
    if found:
        found.sort(key=lambda problem: problem[0])
        raise InputError([f"{_place(names, reader.starts, row)}: {what}" for row, what in found])
    if reader.num_rows == 0:
        raise InputError(f"{', '.join(names)}: no line in it; {how_to_make}")
    return IndexTable(columns, names, reader.starts, reader.num_rows, reader.digest.hexdigest())


class _Reader:
    """Hands each line to the fields. A bad line gets a row as well, so that row and line number stay in step.

    A byte order mark at the start, "\\r\\n" and blank lines at the end are what editors add. A blank line between
    others is refused: no editor adds one, so something was there, or lines are not what they seem.
    """

    def __init__(self, fields: Sequence[Field]):
        self.fields = [(field.name, field) for field in fields]
        self.problems: list[Problem] = []
        self.starts: list[int] = []
        self.num_rows = 0
        self.digest = hashlib.sha256()

    def read(self, path: str) -> None:
        """Read a file; stops early where the problems fill an error message."""
        self.starts.append(self.num_rows)
        blank_lines = 0  # since the last line that was not
        with open(path, "rb") as file:
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b"")):
                content = line.removeprefix(BOM_UTF8) if number == 0 else line
                if not content.strip() and len(line) <= MAX_LINE_BYTES:
                    self.digest.update(line)
                    blank_lines += 1
                    continue
                for _ in range(min(blank_lines, MAX_LISTED)):
                    self.add_blank_row("not JSON: a blank line between others; take it out")
                blank_lines = 0
                if len(self.problems) >= MAX_LISTED:
                    return
                if len(line) > MAX_LINE_BYTES:
                    self.add_blank_row(f"longer than {MAX_LINE_BYTES} bytes; not read further")
                    return
                self.digest.update(line)
                self.add_line(content)
                if len(self.problems) >= MAX_LISTED:
                    return

    def add_line(self, line: bytes) -> None:
        try:
            entry = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            self.add_blank_row(f"not JSON: {error}")
            return
        if type(entry) is not dict:
            self.add_blank_row(f"a JSON object expected, found {_shorten(entry)}")
            return
        for name, field in self.fields:
            try:
                field.add(entry[name])
            except KeyError:
                if not isinstance(field, FloatField):  # it has a default
                    self.problems.append((self.num_rows, f"{name} is missing"))
                field.add_blank()
            except (ValueError, OverflowError) as error:
                self.problems.append((self.num_rows, f"{name}: {error}"))
                field.add_blank()
        self.num_rows += 1

    def add_blank_row(self, problem: str) -> None:
        self.problems.append((self.num_rows, problem))
        for _, field in self.fields:
            field.add_blank()
        self.num_rows += 1


def _unequal_lengths(columns: Mapping[str, Any], left: str, right: str) -> list[Problem]:
    rows = np.flatnonzero(columns[left].lengths != columns[right].lengths)[:MAX_LISTED].tolist()
    return [(row, f"{left} has {len(columns[left][row])} entries, {right} {len(columns[right][row])}") for row in rows]


def _place(files: list[str], starts: list[int], row: int) -> str:
    number = bisect_right(starts, row) - 1  # an empty file has the start of the next one: the last of them is it
    return f"{files[number]}:{row - starts[number] + 1}"


def _offsets(lengths: Iterable[int]) -> np.ndarray:
    return _compact(np.cumsum([0, *lengths], dtype=np.int64))


def _compact(values: np.ndarray) -> np.ndarray:
    """The integers in the smallest of uint16, int32, int64 that holds them all."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    for dtype in (np.uint16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return values.astype(dtype)
    return values.astype(np.int64)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
