"""Reads the elements of one array in a large JSON file, one at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from typing import IO, Any

from beit3.system.errors import InputError

CHUNK = 1 << 20  # characters read at a time
MARGIN = 1 << 14  # characters of the window's end where an element may be cut off, so more is read first
MAX_VALUE = 1 << 26  # characters of one element; the largest of VQA v2 and COCO have a few thousand

OnCharacters = Callable[[int], object]  # told how many characters were read since it was last told

_skip_space = re.compile(r"[ \t\n\r]*").match
_decode = json.JSONDecoder().raw_decode
_scan = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # the same without a layer of Python


def stream_array(
    path: str | os.PathLike[str], key: str, on_characters: OnCharacters | None = None, required: bool = True
) -> Iterator[Any]:
    """Yield the elements of the array that the top-level object in `path` holds under `key`.

    Only a window of the file is in memory, whatever the order of the object's other keys. `on_characters` is told the
    number of characters after each read, for progress bars. Raises InputError for a file that is not UTF-8, not
    JSON, cut off, or, where it is `required`, has no such array; a mistake behind the array is found after its last
    element was yielded.
    """
    with open(path, encoding="utf-8-sig") as file:
        window = _Window(file, os.fspath(path), on_characters)
        found = False
        window.take("{", f'an object holding "{key}"')
        closing = window.peek() == "}"
        while not closing:
            name = window.value()
            window.take(":", "a key and its value")
            if name == key:
                found = True
                yield from window.elements(f'an array under "{key}"')
            elif window.peek() == "[":
                for _ in window.elements():
                    pass
            else:
                window.value()
            closing = window.take(",}", "a comma or the end of the object") == "}"
    if required and not found:
        raise InputError(f'{path}: has no "{key}"; is it the file that its name says?')


class _Window:
    """The part of the file that is being parsed, and the place reached in it."""

    def __init__(self, file: IO[str], path: str, on_characters: OnCharacters | None):
        self.file, self.path, self.on_characters = file, path, on_characters
        self.text = ""
        self.at = 0
        self.dropped = 0  # characters of the file before `text`

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
        if self.on_characters is not None:
            self.on_characters(len(chunk))
        self.text = self.text[self.at :] + chunk
        self.dropped += self.at
        self.at = 0
        return bool(chunk)

    def error(self, what: str) -> InputError:
        return InputError(f"{self.path}: not valid JSON at character {self.dropped + self.at}: {what}; get it again")
