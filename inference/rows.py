"""What is asked: pictures in folders, or rows of a table, read as often as wanted and never held all at once."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from beit3.data.index_writing import PICTURE_ENDINGS
from beit3.system.atomic_files import sha256_of
from beit3.system.errors import InputError, printable

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")  # endings
IMAGE, QUESTION = "image", "question"  # columns
MAX_CELL = 1 << 20  # characters


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
    """Rows of a csv, tsv, jsonl or parquet file with the columns `image` and, where questions are asked, `question`.

    Paths in it start from the folder of the table. asks: whether the column of questions is needed.
    Raises InputError where the file is no such table. Rows that are wrong have a `problem`.
    """

    def __init__(self, path: Path, asks: bool) -> None:
        self.name, self.path, self.asks = str(path), path, asks
        if path.suffix.lower() == ".parquet":
            _parquet()
        try:
            self._check_columns()
            self._length = sum(1 for _ in self._entries())
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
        except (UnicodeDecodeError, csv.Error, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: no table in UTF-8 that can be read ({printable(str(error))[:100]})") from error
        if not self._length:
            raise InputError(f"{path}: has no row")

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Row]:
        for entry in self._entries():
            yield self._row(entry)

    def digest(self) -> str:
        with open(self.path, "rb") as file:
            return sha256_of(file)

    def _row(self, entry: Any) -> Row:
        if not isinstance(entry, dict):
            return Row("", "", None, "not a row with columns")
        image, question = entry.get(IMAGE), entry.get(QUESTION)
        shown = image if isinstance(image, str) else ""
        if not isinstance(image, str) or not image.strip():
            return Row(shown, "", None, f"no text in the column {IMAGE}")
        file = os.path.join(self.path.parent, image)
        if not self.asks:
            return Row(image, file, None)
        if not isinstance(question, str) or not question.strip():
            return Row(image, file, None, f"no text in the column {QUESTION}")
        return Row(image, file, question)

    def _check_columns(self) -> None:
        wanted = [IMAGE, QUESTION] if self.asks else [IMAGE]
        found = self._columns()
        if missing := [name for name in wanted if name not in found]:
            shown = printable(", ".join(found))[:200] or "none"
            raise InputError(f"{self.path}: has no column {' and no column '.join(missing)}; its columns are {shown}")

    def _columns(self) -> list[str]:
        kind = self.path.suffix.lower()
        if kind == ".parquet":
            return list(_parquet().ParquetFile(self.path).schema_arrow.names)
        if kind == ".jsonl":  # a row that lacks one is a bad row; only where all do it is no such table
            names = dict.fromkeys(name for entry in self._entries() if isinstance(entry, dict) for name in entry)
            return [str(name) for name in names]
        with open(self.path, encoding="utf-8-sig", newline="") as file:
            return next(csv.reader(file, delimiter=self._delimiter()), [])

    def _entries(self) -> Iterator[Any]:
        kind = self.path.suffix.lower()
        if kind == ".parquet":
            content = _parquet().ParquetFile(self.path)
            names = [name for name in (IMAGE, QUESTION) if name in content.schema_arrow.names]
            for batch in content.iter_batches(batch_size=1024, columns=names):
                yield from batch.to_pylist()
            return
        with open(self.path, encoding="utf-8-sig", newline="") as file:
            if kind == ".jsonl":
                for line in file:
                    if line.strip():
                        yield _parsed(line)
                return
            csv.field_size_limit(MAX_CELL)
            yield from csv.DictReader(file, delimiter=self._delimiter())

    def _delimiter(self) -> str:
        return "\t" if self.path.suffix.lower() == ".tsv" else ","


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None  # a row that is wrong, not the end of the table


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("parquet files need pyarrow, which is not installed: pip install pyarrow") from error
    return pyarrow.parquet


def find_rows(named: Sequence[str], question: str | None, asks: bool) -> Rows:
    """The rows of what the user named: pictures, folders, patterns, or one table.

    asks: whether the model answers questions.

    Raises:
        InputError: nothing there, or what is named does not go together.
    """
    tables = [name for name in named if Path(name).suffix.lower() in TABLES and not os.path.isdir(name)]
    if tables:
        if len(named) > 1:
            raise InputError(f"{tables[0]}: one table at a time, and nothing beside it")
        if question is not None:
            raise InputError(f"{tables[0]}: a table has its questions in the column {QUESTION}; leave {question!r} out")
        if not os.path.exists(tables[0]):
            raise InputError(f"{tables[0]}: no such file")
        return Table(Path(tables[0]), asks)
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
