"""Reads the elements of one array or object in a large JSON file, one at a time, from gzip too."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from beit3.system.errors import InputError, printable

CHUNK = 1 << 20  # characters read at a time
MARGIN = 1 << 14  # characters of the window's end where an element may be cut off, so more is read first
MAX_VALUE = 1 << 26  # characters of one element; the largest of VQA v2 and COCO have a few thousand
# Above so many characters, a gzip file may hold no more than that many times its own bytes; annotations, which repeat
# themselves much, have about twenty times, and files made to fill a disk a thousand.
MAX_UNPACKED, MAX_RATIO = 1 << 28, 200

OnCharacters = Callable[[int], object]  # told how many characters were read since it was last told

_skip_space = re.compile(r"[ \t\n\r]*").match
_decode = json.JSONDecoder().raw_decode
_scan = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # the same without a layer of Python


def stream_array(
    path: str | os.PathLike[str], key: str | None, on_characters: OnCharacters | None = None, required: bool = True
) -> Iterator[Any]:
    """Yield the elements of the array that the top-level object in `path` holds under `key`; None: of the file's array.

    Only a window of the file is in memory, whatever the order of the object's other keys. `on_characters` is told the
    number of characters after each read, for progress bars; of a `.gz` file, the number of its bytes. Raises
    InputError for a file that is not UTF-8, not JSON, cut off, or, where it is `required`, has no such array; a mistake
    behind the array is found after its last element was yielded.
    """
    with _window(path, on_characters) as window:
        found = False
        if key is None:
            yield from window.elements("a list")
            window.end()
            return
        for name in window.names(f'an object holding "{key}"'):
            if name == key:
                found = True
                yield from window.elements(f'an array under "{key}"')
            else:
                window.skip()
    if required and not found:
        raise InputError(f'{path}: has no "{key}"; is it the file that its name says?')


def stream_members(
    path: str | os.PathLike[str], on_characters: OnCharacters | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of the top-level object in `path`; for the rest see `stream_array`."""
    with _window(path, on_characters) as window:
        for name in window.names("an object"):
            yield name, window.value()
        window.end()


def stream_lines(path: str | os.PathLike[str], on_characters: OnCharacters | None = None) -> Iterator[tuple[int, Any]]:
    """Yield (number of the line from 1, its value) of a file with a JSON value on each line; for the rest see
    `stream_array`. Blank lines are counted and hold nothing."""
    with _window(path, on_characters) as window:
        for number, line in enumerate(window.lines(), start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except RecursionError:
                raise InputError(f"{path}, line {number}: not valid JSON: nested too deeply; mend it") from None
            except ValueError as error:
                what = str(error).split(":")[0]
                raise InputError(f"{path}, line {number}: not valid JSON: {what}; mend it") from None


def open_text(path: str | os.PathLike[str]) -> IO[str]:
    """A text file in UTF-8, with a byte order mark or without; unpacked while it is read where it ends in `.gz`."""
    if os.fspath(path).lower().endswith(".gz"):
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


@contextmanager
def _window(path: str | os.PathLike[str], on_characters: OnCharacters | None) -> Iterator[Window]:
    with open_text(path) as file:
        yield Window(file, os.fspath(path), on_characters)


class Window:
    """The part of the file that is being parsed, and the place reached in it."""

    def __init__(self, file: IO[str], path: str, on_characters: OnCharacters | None):
        self.file, self.path, self.on_characters = file, path, on_characters
        self.text = ""
        self.at = 0
        self.dropped = 0  # characters of the file before `text`
        buffer = getattr(file, "buffer", None)
        self.packed: Any = buffer.fileobj if isinstance(buffer, gzip.GzipFile) else None
        self.told = 0  # bytes of `packed` that `on_characters` was told

    def names(self, wanted: str) -> Iterator[str]:
        """Yield the keys of the object that starts here, and step behind it; who asks steps over each value."""
        self.take("{", wanted)
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            if self.peek() not in ('"', ""):
                raise self.error(f"a key in quotes expected, found {self.peek()!r}")
            name = self.value()
            self.take(":", "a key and its value")
            yield name
            if self.take(",}", "a comma or the end of the object") == "}":
                return

    def skip(self) -> None:
        """Step over the value that starts here, an array piece by piece, as it may be of any length."""
        if self.peek() == "[":
            for _ in self.elements():
                pass
        else:
            self.value()

    def end(self) -> None:
        """Nothing but white space may come."""
        if found := self.peek():
            raise self.error(f"the end of the file expected, found {found!r}")

    def lines(self) -> Iterator[str]:
        """Yield the lines from here on."""
        while True:
            end = self.text.find("\n", self.at)
            while end < 0:
                searched = len(self.text) - self.at
                if searched > MAX_VALUE:
                    raise self.error(f"no end of the line within {MAX_VALUE} characters")
                if not self.read_more():
                    if self.text:
                        yield self.text
                    return
                end = self.text.find("\n", searched)
            line, self.at = self.text[self.at : end], end + 1
            yield line

    def elements(self, wanted: str = "an array") -> Iterator[Any]:
        """Yield the elements of the array that starts here, and step behind it."""
        self.take("[", wanted)
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield from self._objects_in_sight()
            yield self.value()
            if self.take(",]", "a comma or the end of the array") == "]":
                return

    def _objects_in_sight(self) -> Iterator[Any]:
        """Yield elements from here on for as long as the next one is an object and no longer than `MARGIN`.

        Nearly all elements of an official file, and nothing has to be looked at twice for them.
        """
        self.peek()  # behind white space
        limit = len(self.text) - MARGIN
        while True:
            if self.at > limit:
                # Finding out by an error is slow: it counts the window's lines.
                limit = len(self.text) - MARGIN if self.read_more() else len(self.text)
            try:
                value, end = _scan(self.text, self.at)
            except (StopIteration, ValueError, RecursionError):
                return  # cut off or broken: `value` finds out
            if self.text.startswith(", {", end):
                self.at = end + 2
            elif self.text.startswith(",{", end):
                self.at = end + 1
            else:
                return
            yield value

    def value(self) -> Any:
        """Decode the whole value that starts here, and step behind it."""
        while True:
            if not self.peek():
                raise self.error("the file is cut off")
            try:
                value, end = _decode(self.text, self.at)
            except RecursionError:
                raise self.error("nested too deeply") from None
            except ValueError as error:  # cut off by the window's end, or really broken
                if len(self.text) - self.at > MAX_VALUE:
                    raise self.error(f"no end of the value within {MAX_VALUE} characters: {error}") from None
                if not self.read_more():
                    raise self.error(str(error).split(":")[0]) from None
                continue
            length = end - self.at
            # A number near the window's end may go on behind it, as "1" in front of ".5" or "e+5" does.
            if end + 2 < len(self.text) or not self.read_more():
                self.at += length
                return value

    def take(self, wanted: str, description: str) -> str:
        """Step over one of the characters `wanted` and return it."""
        found = self.peek()
        if not found or found not in wanted:
            raise self.error(f"{description} expected, found {found!r}" if found else "the file is cut off")
        self.at += 1
        return found

    def peek(self) -> str:
        """The next character that is not white space, "" at the end of the file."""
        while True:
            match = _skip_space(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.read_more():
                return ""

    def read_more(self) -> bool:
        """Drop what is done with and read on; False at the end of the file."""
        try:
            # A long value is read in ever larger pieces: the work of decoding it anew stays linear.
            chunk = self.file.read(max(CHUNK, len(self.text) - self.at))
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: not UTF-8 text ({error}); get the file again") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{self.path}: not a sound gzip file ({printable(str(error))}); get it again") from None
        read = len(chunk) if self.packed is None else self._unpacked(len(chunk))
        if self.on_characters is not None:
            self.on_characters(read)
        self.text = self.text[self.at :] + chunk
        self.dropped += self.at
        self.at = 0
        return bool(chunk)

    def _unpacked(self, length: int) -> int:
        """How many bytes of the gzip file were read since this was last asked; refuses one that swells without end."""
        now = self.packed.tell()
        unpacked = self.dropped + len(self.text) + length
        if unpacked > MAX_UNPACKED and unpacked > MAX_RATIO * now:
            raise InputError(
                f"{self.path}: unpacks to more than {MAX_RATIO} times its size; unpack it yourself if it is right"
            )
        read, self.told = now - self.told, now
        return read

    def error(self, what: str) -> InputError:
        return InputError(f"{self.path}: not valid JSON at character {self.dropped + self.at}: {what}; get it again")
