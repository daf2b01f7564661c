"""Results as files: csv, tsv, jsonl, parquet."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from beit3.system.atomic_files import atomic_write
from beit3.system.errors import InputError

OUTPUTS = (".csv", ".tsv", ".jsonl", ".parquet")  # endings
NUMBERS = ("confidence", "score")
Told = dict[str, Any]  # a row of results
_ROWS = 1024  # of parquet, written at a time


def check_output(output: Path, overwrite: bool) -> list[str]:
    """What is wrong with the file that results shall go to."""
    if output.suffix.lower() not in OUTPUTS:
        return [f"--output {output}: {', '.join(OUTPUTS)} are the kinds of files that results can go to"]
    if output.suffix.lower() == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            return ["--output: parquet files need pyarrow, which is not installed: pip install pyarrow"]
    if output.is_dir():
        return [f"--output {output}: is a folder, a file is wanted"]
    if output.exists() and not overwrite:
        return [f"--output {output}: is there already; --overwrite writes it anew"]
    folder = output.parent
    if not folder.is_dir():
        return [f"--output {output}: the folder {folder} is not there"]
    return [] if os.access(folder, os.W_OK | os.X_OK) else [f"--output {output}: {folder} cannot be written to"]


def write_results(output: Path, entries: Iterable[Told], asks: bool, top: int) -> None:
    """All rows into a file of the kind that its ending says, whole or not at all.

    asks: whether they are answers; otherwise captions. top: how many of them a row tells at most.
    """
    kind = output.suffix.lower()
    with atomic_write(output, "wb" if kind == ".parquet" else "w") as file:
        if kind == ".jsonl":
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        elif kind == ".parquet":
            _write_parquet(file, entries, columns_of(asks, top))
        else:
            delimiter = "\t" if kind == ".tsv" else ","
            writer = csv.DictWriter(file, columns_of(asks, top), delimiter=delimiter, lineterminator="\n")
            writer.writeheader()
            writer.writerows(flat(entry) for entry in entries)


def columns_of(asks: bool, top: int) -> list[str]:
    """The columns of a table of results."""
    what, how = ("answer", "confidence") if asks else ("caption", "score")
    more = [f"{name}_{place}" for place in range(2, top + 1) for name in (what, how)]
    return ["image", *(["question"] if asks else []), what, how, *more, *(["note"] if asks else []), "error"]


def flat(entry: Told) -> Told:
    """A row of results as a row of a table: the second answer is `answer_2`, and so on."""
    # A lone carriage return would end the row for whoever reads it.
    row = {
        name: value.replace("\r\n", "\n").replace("\r", "\n") if isinstance(value, str) else value
        for name, value in entry.items()
        if name != "top"
    }
    for place, other in enumerate(entry.get("top", ())[1:], start=2):
        row |= {f"{name}_{place}": value for name, value in other.items()}
    return row


def _write_parquet(file: IO[bytes], entries: Iterable[Told], columns: list[str]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("parquet files need pyarrow, which is not installed: pip install pyarrow") from error
    kinds = {name: pyarrow.float64() if name.split("_")[0] in NUMBERS else pyarrow.string() for name in columns}
    schema = pyarrow.schema(list(kinds.items()))
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        rows: list[Told] = []
        for entry in entries:
            rows.append({**dict.fromkeys(columns), **flat(entry)})
            if len(rows) == _ROWS:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                rows = []
        if rows:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
