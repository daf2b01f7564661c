"""Mistakes in annotation files: what is wrong with a value, and all that is wrong with a file, told at once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from beit3.data.index_table import MAX_LINE_BYTES
from beit3.data.json_stream import OnCharacters, stream_array
from beit3.system.errors import InputError

MAX_ID = (1 << 63) - 1  # what reading can hold

Element = TypeVar("Element")
Check = Callable[[Any], "str | None"]  # says what is wrong with a value, None where nothing is


def wrong_id(value: Any) -> str | None:
    """What is wrong with an id: only a whole number that 64 bits hold is right. True is none, nor is 5.0."""
    if type(value) is not int:
        return "is not a whole number"
    return None if -MAX_ID <= value <= MAX_ID else "does not fit into 64 bits"


def wrong_string(value: Any) -> str | None:
    """What is wrong with a string that may be empty."""
    if type(value) is not str:
        return "is not a text"
    return "holds half a surrogate pair, which is no valid Unicode" if is_broken(value) else None


def wrong_text(value: Any) -> str | None:
    """What is wrong with a text that must say something."""
    return wrong_string(value) or (None if value.strip() else "is blank")


def wrong_path(value: Any) -> str | None:
    """What is wrong with a path that must lie below a folder."""
    if what := wrong_text(value):
        return what
    if "\0" in value:
        return "holds a zero byte"
    # An absolute path begins with an empty part.
    return None if {"", ".", ".."}.isdisjoint(value.split("/")) else "is not a path below the folder of pictures"


def wrong_list(value: Any) -> str | None:
    """What is wrong with a list that may be empty."""
    return None if type(value) is list else "is not a list"


def is_broken(text: str) -> bool:
    """Whether a text holds half a surrogate pair."""
    if text.isascii():  # nearly always, and known without looking
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def shown(value: Any) -> str:
    """A value as JSON writes it, in ASCII without control characters, cut to a length that a message can hold."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "…"


@dataclass
class Findings:
    """Mistakes in the official files, equal ones counted together: a wrong file has hundreds of thousands."""

    broken_files: list[str] = field(default_factory=list)
    examples: dict[str, list[str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def stream(
        self, path: Path, key: str | None, on_characters: OnCharacters | None = None, required: bool = True
    ) -> Iterator[Any]:
        """Yield the elements of an array in a file, see `stream_array`; a broken file ends where it breaks."""
        return self.until_broken(path, stream_array(path, key, on_characters, required))

    def until_broken(self, path: Path, elements: Iterator[Element]) -> Iterator[Element]:
        """Yield what a file holds up to where it breaks, and take note of that: so the next file is read too."""
        try:
            yield from elements
        except InputError as error:
            self.broken_files += error.problems
        except OSError as error:
            self.broken_files.append(f"{path}: cannot be read ({error.strerror})")

    def note(self, what: str, example: object) -> None:
        self.counts[what] += 1
        if self.counts[what] <= 5:
            self.examples.setdefault(what, []).append(str(example))

    def check_fields(self, path: Path, place: str, entry: Any, checks: Mapping[str, Check]) -> bool:
        """Whether an element is an object whose fields are right; notes each that is not, with place and value."""
        if type(entry) is not dict:
            self.note(f"{path}: not a JSON object", f"{place} is {shown(entry)}")
            return False
        right = True
        for name, check in checks.items():
            if name not in entry:
                self.note(f"{path}: `{name}` is missing", place)
            elif what := check(entry[name]):
                self.note(f"{path}: `{name}` {what}", f"{place} has {shown(entry[name])}")
            else:
                continue
            right = False
        return right

    def check_list(self, path: Path, place: str, entries: list[Any], checks: Mapping[str, Check]) -> bool:
        """`check_fields` for each element of a list within an element; one wrong element hides no other."""
        right = [self.check_fields(path, f"{place}[{n}]", entry, checks) for n, entry in enumerate(entries)]
        return all(right)

    def numbered(
        self, path: Path, key: str, id_name: str, checks: Mapping[str, Check], on_characters: OnCharacters | None
    ) -> Iterator[tuple[str, Any, Any, bool]]:
        """Yield (place, id, element, whether it is right) of the elements of an official file that carry an id.

        checks: see `check_fields`; they hold `id_name: wrong_id`. The id is None where it is wrong or another's.
        """
        place_of: dict[int, str] = {}
        for position, entry in enumerate(self.stream(path, key, on_characters)):
            place = f"{key}[{position}]"
            right = self.check_fields(path, place, entry, checks)
            number: Any = entry.get(id_name) if type(entry) is dict else None
            if wrong_id(number):
                number = None
            elif place_of.setdefault(number, place) != place:
                self.note(f"{path}: `{id_name}` of another image", f"{place} has {number}, as {place_of[number]}")
                number, right = None, False
            yield place, number, entry, right

    def check_line(self, line: str, path: Path, place: str) -> bool:
        """Whether a line of an index, which is ASCII, is as short as reading wants it; notes it if it is not."""
        if len(line) <= MAX_LINE_BYTES:
            return True
        self.note(f"{path}: too long, as a line of the index may have {MAX_LINE_BYTES} bytes", f"{place} ({len(line)})")
        return False

    def raise_any(self) -> None:
        """Raise an InputError with all that was noted, if anything was."""
        problems = list(self.broken_files)
        for what, examples in self.examples.items():
            hidden = self.counts[what] - len(examples)
            problems.append(f"{what}: {', '.join(examples)}" + (f" and {hidden} more" if hidden else ""))
        if problems:
            raise InputError(problems)
