"""What is asked: pictures in folders, or rows of a table, read as often as wanted and never held all at once."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from beit3.data.index_writing import PICTURE_ENDINGS
from beit3.system.atomic_files import sha256_of
from beit3.system.errors import InputError, printable
from sources.columns import IMAGE, QUESTION, find_columns, two_of_one
from sources.raw_tables import TABLE_ENDINGS, Cells, Wrong, open_table
from sources.text_files import TableError


@dataclass(frozen=True)
class Row:
    """image: as it was given, which the results repeat; file: where it is. problem: why it cannot be asked."""

    image: str
    file: str
    question: str | None
    problem: str | None = None


class Rows(Protocol):
    """Iterating begins anew each time; the same rows in the same order."""

    name: str

    def __iter__(self) -> Iterator[Row]: ...

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """Changes when the rows do."""
        ...


class Pictures:
    """Pictures with one question for all of them, or none."""

    def __init__(self, name: str, files: Sequence[str], question: str | None) -> None:
        self.name, self.files, self.question = name, files, question

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Row]:
        for file in self.files:
            yield Row(file, file, self.question)

    def digest(self) -> str:
        said = "\0".join([*self.files, self.question or ""])
        return hashlib.sha256(said.encode(errors="surrogateescape")).hexdigest()


class Table:
    """Rows of a table, see `sources.raw_tables`, with the columns `image` and, where questions are asked, `question`.

    Paths in it start from the folder of the table. asks: whether the column of questions is needed. columns: our name
    → the file's; other names that people give these columns are known, see `sources.columns`.
    Raises InputError where the file is no such table. Rows that are wrong have a `problem`.
    """

    def __init__(self, path: Path, asks: bool, columns: Mapping[str, str] = {}) -> None:
        self.name, self.path = str(path), path
        try:
            self._table = open_table(path)
            self._names = self._find(asks, columns)
            self._length = sum(1 for _ in self._table.rows(self._names))
        except TableError as error:
            what = str(error).removeprefix(f"{path}: ")
            raise InputError(f"{path}: no table in UTF-8 that can be read ({what})") from error
        if not self._length:
            raise InputError(f"{path}: has no row")

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Row]:
        for _, cells in self._table.rows(self._names):
            yield self._row(cells)

    def digest(self) -> str:
        with open(self.path, "rb") as file:
            content = sha256_of(file)
        return hashlib.sha256("\0".join([content, *self._names]).encode()).hexdigest()

    def _row(self, cells: Cells | Wrong) -> Row:
        if isinstance(cells, Wrong):
            return Row("", "", None, f"not a row with columns: {' '.join(cells).strip()}")
        image, question = (*cells, None)[:2]
        shown = image if isinstance(image, str) else ""
        if not shown.strip():
            return Row(shown, "", None, f"no text in the column {self._names[0]}")
        file = os.path.join(self.path.parent, shown)
        if len(self._names) == 1:
            return Row(shown, file, None)
        if not isinstance(question, str) or not question.strip():
            return Row(shown, file, None, f"no text in the column {self._names[1]}")
        return Row(shown, file, question)

    def _find(self, asks: bool, columns: Mapping[str, str]) -> list[str]:
        """The file's names of the columns that are read. Where one has our name, it is that one."""
        wanted, there = [IMAGE, QUESTION] if asks else [IMAGE], self._table.columns
        found = find_columns(self.path, there, {name: name for name in wanted if name in there} | dict(columns))
        if missing := [name for name in wanted if name not in found]:
            shown = printable(", ".join(there))[:200] or "none"
            raise InputError(f"{self.path}: has no column {' and no column '.join(missing)}; its columns are {shown}")
        if several := [two_of_one(self.path, name, found[name]) for name in wanted if len(found[name]) > 1]:
            raise InputError(several)
        return [found[name][0] for name in wanted]


def find_rows(named: Sequence[str], question: str | None, asks: bool, columns: Mapping[str, str] | None = None) -> Rows:
    """The rows of what the user named: pictures, folders, patterns, or one table.

    asks: whether the model answers questions. columns: of a table, our name → the file's.

    Raises:
        InputError: nothing there, or what is named does not go together.
    """
    tables = [name for name in named if name.lower().endswith(TABLE_ENDINGS) and not os.path.isdir(name)]
    if tables:
        if len(named) > 1:
            raise InputError(f"{tables[0]}: one table at a time, and nothing beside it")
        if question is not None:
            raise InputError(f"{tables[0]}: a table has its questions in the column {QUESTION}; leave {question!r} out")
        if not os.path.exists(tables[0]):
            raise InputError(f"{tables[0]}: no such file")
        return Table(Path(tables[0]), asks, columns or {})
    if columns:
        raise InputError(f"--columns: for tables; {named[0]} is none")
    if asks and question is None:
        raise InputError(f'the model answers questions, and none is asked: {named[0]} "What colour is the car?"')
    if not asks and question is not None:
        raise InputError(
            f"the model writes captions and answers no questions; leave {question!r} out, or name a checkpoint that "
            "answers (FINETUNE=…)"
        )
    files: list[str] = []
    problems: list[str] = []
    for name in named:
        found, problem = _pictures(name)
        files += found
        problems += [] if problem is None else [problem]
    if problems:
        raise InputError(problems)
    return Pictures(named[0] if len(named) == 1 else f"{len(files)} pictures", files, question)


def _pictures(name: str) -> tuple[list[str], str | None]:
    """The pictures that a name stands for, and why there are none."""
    if os.path.isdir(name):
        try:
            found = [os.path.join(name, each) for each in sorted(os.listdir(name)) if is_picture(each)]
        except OSError as error:
            return [], f"{name}: cannot be listed ({error.strerror})"
        return found, None if found else f"{name}: no picture in this folder ({', '.join(PICTURE_ENDINGS)})"
    if os.path.exists(name):
        return [name], None
    if glob.has_magic(name):
        found = sorted(each for each in glob.glob(name, recursive=True) if os.path.isfile(each))
        return found, None if found else f"{name}: no file fits the pattern"
    return [], f"{name}: no such file or folder"


def is_picture(name: str) -> bool:
    """Whether a name ends as pictures do; a leading dot marks what archivers and systems leave behind."""
    return name.lower().endswith(PICTURE_ENDINGS) and not name.startswith(".")
