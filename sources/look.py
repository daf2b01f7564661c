"""What the beginning of a file looks like, for telling formats apart without reading them."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from beit3.data.json_stream import Window, open_text
from beit3.system.errors import InputError

BEGINNING = 1 << 17  # characters that are looked at; entries of published files have a few thousand
MAX_KEYS = 100  # of an object, more tell nothing new

NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Look:
    """The beginning of a JSON file. What lies behind it is not known, nor whether the file is sound.

    Attributes:
        kind: "object", "list", "lines" (an object on each) or "" for what is no JSON.
        entry: keys of the first element of a list, or of the object on the first line.
        inside: key of the object → keys of the object it holds, or of the first element of the list that it holds;
            in the order of the file, as far as it was seen.
    """

    kind: str = ""
    entry: frozenset[str] = NOTHING
    inside: Mapping[str, frozenset[str]] = field(default_factory=dict)


def look_at(path: Path) -> Look:
    """A look at a file, `.gz` or not. Raises InputError where it cannot be opened."""
    try:
        with open_text(path) as file:
            beginning = file.read(BEGINNING)
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error):
        return Look()  # its reader says what is wrong
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    window = Window(io.StringIO(beginning), str(path), None)
    first = window.peek()
    if first == "[":
        return Look("list", entry=frozenset(_element_keys(window)))
    if first != "{":
        return Look()
    inside: dict[str, frozenset[str]] = {}
    whole = False
    with suppress(InputError):  # the beginning ends there, or is broken there
        for name in window.names("an object"):
            inside[name] = NOTHING
            window.peek()  # behind white space
            inner = Window(io.StringIO(window.text[window.at :]), str(path), None)
            inside[name] = frozenset(_element_keys(inner) if inner.peek() == "[" else _keys(inner))
            window.skip()
            if len(inside) == MAX_KEYS:
                break
        else:
            whole = True
    named_lines = path.name.lower().removesuffix(".gz").endswith(".jsonl")
    if named_lines or (whole and window.peek() == "{"):
        return Look("lines", entry=frozenset(inside))
    return Look("object", inside=inside)


def _element_keys(window: Window) -> Iterator[str]:
    """Keys of the first element of the list that starts here."""
    window.at += 1
    return _keys(window)


def _keys(window: Window) -> Iterator[str]:
    """Keys of the object that starts here, none where it is none; the window is left anywhere in it."""
    if window.peek() == "{":
        with suppress(InputError):
            for number, name in enumerate(window.names("an object")):
                yield name
                if number == MAX_KEYS:
                    return
                window.skip()
