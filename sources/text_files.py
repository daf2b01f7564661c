"""Text files of strangers as blocks and lines: packed by gzip or not, UTF-8 or refused, a piece in memory at a time."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO

from beit3.system.errors import InputError, printable

BLOCK = 1 << 18  # bytes read at a time
MAX_CELL = 1 << 20  # characters
MAX_ROW = 1 << 23  # characters; an answer and a question have a few hundred
# gzip packs a thousandfold at most, and tables that people fill in tenfold.
MOST_PACKED, PACKED_MATTERS = 200, 1 << 23  # times; bytes

OnBytes = Callable[[int], object]  # told how many bytes of the file were read since it was last told

_OTHERS = {  # how files begin that are no text
    codecs.BOM_UTF16_LE: "is written in UTF-16; save it as UTF-8",
    codecs.BOM_UTF16_BE: "is written in UTF-16; save it as UTF-8",
    b"PK\x03\x04": "is a spreadsheet (Excel, OpenDocument) or a ZIP file, not text; export the table as CSV in UTF-8",
    b"\xd0\xcf\x11\xe0": "is an Excel file, not text; export the table as CSV in UTF-8",
    b"PAR1": "is a Parquet file; let its name end in .parquet",
    b"\x1f\x8b": "is packed by gzip; let its name end in .gz",
}


class TableError(InputError):
    """A table that cannot be read on: one problem, which begins with the file."""


def check_file(path: Path) -> None:
    """Raise a TableError where there is no such file."""
    if path.is_dir():
        raise TableError(f"{path}: is a folder; name the table in it")
    if not path.exists():
        raise TableError(f"{path}: no such file")


def text_blocks(path: Path, on_bytes: OnBytes | None = None) -> Iterator[str]:
    """Yield the text of a file in pieces of about `BLOCK` characters, which end anywhere.

    A name that ends in .gz is unpacked. Raises TableError for what cannot be read, is packed wrong or beyond all
    measure, is not UTF-8 (a byte order mark is passed over), or holds zero bytes.
    """
    check_file(path)
    packed = path.name.lower().endswith(".gz")
    try:
        with open(path, "rb") as file, gzip.GzipFile(fileobj=file) if packed else nullcontext(file) as stream:
            yield from _decoded(path, file, stream, packed, on_bytes)
    except gzip.BadGzipFile as error:
        raise TableError(f"{path}: is not packed by gzip, as its name says ({printable(str(error))})") from None
    except zlib.error as error:
        raise TableError(f"{path}: what gzip packed is damaged ({error}); get the file again") from None
    except EOFError:
        raise TableError(f"{path}: is cut off: what gzip packed has no end; get the file again") from None
    except OSError as error:
        raise TableError(f"{path}: cannot be read ({error.strerror or error})") from error


def _decoded(
    path: Path, file: IO[bytes], stream: IO[bytes] | gzip.GzipFile, packed: bool, on_bytes: OnBytes | None
) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines, unpacked, told = 1, 0, 0
    while True:
        block = stream.read(BLOCK)
        if not unpacked:
            for start, what in _OTHERS.items():
                if block.startswith(start):
                    raise TableError(f"{path}: {what}")
        unpacked += len(block)
        at = file.tell()
        if packed and unpacked > max(PACKED_MATTERS, MOST_PACKED * at):
            raise TableError(
                f"{path}: unpacks to more than {MOST_PACKED} times its size, as no table does; unpack it yourself "
                "if it is right"
            )
        if on_bytes is not None:
            on_bytes(at - told)
        told = at
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line = lines + error.object[: error.start].count(b"\n")
            place = f"line {line}, byte {unpacked - len(error.object) + error.start + 1} of the file"
            value = f"0x{error.object[error.start]:02x}"
            raise TableError(f"{path}: {place}: {value} is not UTF-8; save the table as UTF-8") from None
        if not block:
            return
        if (zero := text.find("\0")) >= 0:
            line = lines + text.count("\n", 0, zero)
            raise TableError(f"{path}: line {line}: holds a zero byte; save the table as UTF-8 text")
        lines += text.count("\n")
        yield text.removeprefix("\ufeff") if unpacked == len(block) else text


class Lines:
    """The lines of a text file with their ends: "\\n", "\\r\\n" or "\\r".

    Attributes:
        taken: characters since whoever reads set it to 0, as is to be done for each row.
        cut: a row has more than `MAX_ROW` characters; the lines end within it.
    """

    def __init__(self, path: Path, on_bytes: OnBytes | None = None) -> None:
        self.path, self.on_bytes = path, on_bytes
        self.taken, self.cut = 0, False

    def __iter__(self) -> Iterator[str]:
        rest = ""
        for block in text_blocks(self.path, self.on_bytes):
            rest += block
            # A "\r" at the end may be half of "\r\n".
            end = rest.rfind("\n") + 1 or rest.rfind("\r", 0, len(rest) - 1) + 1
            yield from self._counted(rest[:end])
            rest = rest[end:]
            if self.cut or self.taken + len(rest) > MAX_ROW:
                self.cut = True
                yield rest
                return
        yield from self._counted(rest)

    def _counted(self, text: str) -> Iterator[str]:
        for line in io.StringIO(text, newline=""):
            self.taken += len(line)
            if self.taken > MAX_ROW:
                self.cut = True
                yield line
                return
            yield line
