"""Parquet tables, read by pyarrow: some rows at a time, and the columns that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from beit3.system.errors import InputError, printable
from sources.raw_tables import Cells, Wrong, check_once, large
from sources.text_files import MAX_CELL, OnBytes, TableError, check_file

BATCH_BYTES, MOST_ROWS = 1 << 24, 4096  # of a batch, at most; bytes as they are told by the file


class ParquetTable:
    """A table in a Parquet file. Pictures are bytes, or Hugging Face's {bytes, path}."""

    kind, unit, typed = "Parquet table", "row", True

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise InputError(
                f"{path}: parquet files need pyarrow, which is not installed: pip install pyarrow"
            ) from error
        check_file(path)
        self.path, self._open = path, pyarrow.parquet.ParquetFile
        self._broken = (pyarrow.ArrowException, OSError, ValueError)
        try:
            with self._open(path) as file:
                self.columns: Sequence[str] = list(file.schema_arrow.names)
                self._bytes_of, self._length = _bytes_of(file.metadata), file.metadata.num_rows
                binary = [each.name for each in file.schema_arrow if "binary" in str(each.type)]
        except self._broken as error:
            raise self._unreadable(error) from error
        self.picture_bytes: Mapping[str, int] = {name: self._bytes_of.get(name, 0) for name in binary}
        check_once(path, self.columns)

    def rows(self, names: Sequence[str], on_bytes: OnBytes | None = None) -> Iterator[tuple[int, Cells | Wrong]]:
        a_row = sum(self._bytes_of.get(name, 0) for name in names) // max(self._length, 1)
        number, told, size = 0, 0, self.path.stat().st_size
        try:
            with self._open(self.path, pre_buffer=False, buffer_size=1 << 16) as file:
                rows = min(MOST_ROWS, max(1, BATCH_BYTES // max(a_row, 1)))
                for batch in file.iter_batches(rows, columns=list(names), use_threads=False):
                    columns = [batch.column(name) for name in names]
                    for name, column in zip(names, columns, strict=True):
                        if column.nbytes > MAX_CELL and name not in self.picture_bytes:
                            self._check_size(name, column, number)
                    for cells in zip(*(column.to_pylist() for column in columns), strict=True):
                        number += 1
                        yield number, cells
                    if on_bytes is not None:  # how far it is in the file is known by the rows alone
                        at = size * number // self._length
                        on_bytes(at - told)
                        told = at
        except self._broken as error:
            if isinstance(error, TableError):
                raise
            raise self._unreadable(error) from error

    def _check_size(self, name: str, column: Any, rows: int) -> None:
        for number, cell in enumerate(column.to_pylist(), rows + 1):
            if len(cell if type(cell) is str else repr(cell)) > MAX_CELL:
                raise TableError(f"{self.path}: row {number}: {large(name)}")

    def _unreadable(self, error: Exception) -> TableError:
        return TableError(f"{self.path}: no Parquet file that can be read ({printable(str(error))[:100]})")


def _bytes_of(metadata: Any) -> dict[str, int]:
    """Column → its bytes."""
    names = sorted(metadata.schema.to_arrow_schema().names, key=len, reverse=True)
    found: dict[str, int] = {}
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            path = column.path_in_schema  # of a struct with its field behind a dot; names may have dots too
            name = next((each for each in names if path == each or path.startswith(f"{each}.")), path)
            found[name] = found.get(name, 0) + column.total_uncompressed_size
    return found
