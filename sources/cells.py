"""What a cell means: text, answers, captions, a path, an id, a weight, a split. A function for each.

Each takes the cell of a typed table (JSON, Parquet) or, as all of them are text there, of CSV, and raises a Mistake.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

from beit3.data.findings import MAX_ID, is_broken, shown, wrong_id, wrong_path
from beit3.data.index_table import MAX_WEIGHT
from sources.rows import SPLIT_OF, Id


class Mistake(Exception):
    """A cell that is wrong. what: as "column answer …" goes on; found: the value, where it is worth showing."""

    def __init__(self, what: str, *found: Any) -> None:
        super().__init__(what)
        self.what, self.found = what, f" has {shown(found[0])}" if found else ""


class Blank(Mistake):
    """A cell that says nothing, where something is wanted."""

    def __init__(self) -> None:
        super().__init__("is empty")


class Picture(NamedTuple):
    """A picture that the table itself holds. path: "" where it has none."""

    path: str
    content: bytes


def is_blank(cell: Any) -> bool:
    """Whether a cell says nothing."""
    return cell is None or (type(cell) in (str, list) and not (cell.strip() if type(cell) is str else cell))


def text(cell: Any) -> str:
    """Without the white space around it."""
    if type(cell) is not str:
        raise _no_text(cell)
    stripped = cell.strip()
    if not stripped:
        raise Blank
    if not stripped.isascii() and is_broken(stripped):
        raise Mistake("holds half a surrogate pair, which is no valid Unicode", cell)
    return stripped


def _no_text(cell: Any) -> Mistake:
    if is_blank(cell):
        return Blank()
    number = type(cell) in (int, float, bool)
    return Mistake("is not a text" + (' (write it in quotes: "3")' if number else ""), cell)


def answers(cell: Any) -> dict[str, int]:
    """Answer → votes, from a text, several with "|" between them, a list of texts, or of objects as VQA v2 has."""
    if type(cell) is str and "|" not in cell:
        return {text(cell): 1}
    each = cell.split("|") if type(cell) is str and not is_blank(cell) else cell
    if type(each) is not list:
        raise _no_text(each)
    votes: dict[str, int] = {}
    for said in _texts([answer.get("answer") if type(answer) is dict else answer for answer in each]):
        votes[said] = votes.get(said, 0) + 1
    return votes


def answers_of_text(cell: str) -> dict[str, int]:
    """The same of a cell of CSV, where a list is written as JSON."""
    return answers(_listed(cell) if "[" in cell else cell)


def captions(cell: Any) -> tuple[str, ...]:
    """From a text or a list of texts."""
    return tuple(_texts(cell)) if type(cell) is list else (text(cell),)


def captions_of_text(cell: str) -> tuple[str, ...]:
    """The same of a cell of CSV, where a list is written as JSON."""
    return captions(_listed(cell))


def _texts(each: list[Any]) -> list[str]:
    if not each:
        raise Blank
    try:
        return list(map(text, each))
    except Blank:
        raise Mistake("is partly empty", each) from None


def _listed(cell: str) -> Any:
    if not cell.lstrip().startswith("["):
        return cell
    try:
        found = json.loads(cell)
    except RecursionError:
        raise Mistake("is nested too deeply") from None
    except ValueError:
        if cell.lstrip().startswith("['"):
            raise Mistake('is a list as Python writes it, not as JSON does: ["red", "blue"]', cell) from None
        return cell
    return found


def image(cell: Any) -> str | Picture:
    """A path below the folder of pictures, "./" taken away; or what Hugging Face's {bytes, path} holds."""
    if type(cell) is bytes:
        return Picture("", cell)
    if type(cell) is dict:
        content, path = cell.get("bytes"), cell.get("path")
        if type(content) is not bytes:
            return image(path)
        try:
            return Picture("" if is_blank(path) else str(image(path)), content)
        except Mistake:
            return Picture("", content)  # where it lay with whoever made the table
    path = text(cell)
    if (
        path[0] not in "/."
        and "/." not in path
        and "//" not in path
        and ":" not in path
        and "\\" not in path
        and "\0" not in path
        and path[-1] != "/"
    ):
        return path  # nearly all, and known without taking it apart
    if "://" in path or path.startswith("data:"):
        raise Mistake("is an address, not a file; download the pictures first", path)
    if re.match(r"[A-Za-z]:[\\/]", path):
        raise Mistake("is not a path below the folder of pictures", path)
    if "\\" in path:
        raise Mistake('has "\\" between folders, where "/" is wanted', path)
    path = "/".join(part for part in path.split("/") if part != ".")
    if what := wrong_path(path):
        raise Mistake(what if path else "is not a path below the folder of pictures", cell)
    return path


def identity(cell: Any) -> Id | None:
    """A whole number or a text; None where it is empty."""
    if is_blank(cell):
        return None
    if type(cell) is str:
        return text(cell)
    if what := wrong_id(cell):
        raise Mistake("is neither a text nor a whole number" if "whole" in what else what, cell)
    return int(cell)


def identity_of_text(cell: str) -> Id | None:
    """The same of a cell of CSV: digits are a number, but for those that a zero leads."""
    stripped = cell.strip()
    if not stripped.isdigit() or not stripped.isascii() or (stripped[0] == "0" and stripped != "0"):
        return stripped or None
    # A million digits take long to become a number.
    if len(stripped) > 19 or (number := int(stripped)) > MAX_ID:
        raise Mistake("does not fit into 64 bits", stripped)
    return number


def weight(cell: Any) -> float:
    """A finite number above or equal 0; 1 where it is empty."""
    if is_blank(cell):
        return 1.0
    if type(cell) in (int, float):
        try:
            number = float(cell)
        except OverflowError:
            number = math.inf
        if 0 <= number < MAX_WEIGHT:
            return number
    raise Mistake("is not a number of 0 or more", cell)


def weight_of_text(cell: str) -> float:
    """The same of a cell of CSV."""
    try:
        return weight(float(cell) if cell.strip() and "_" not in cell else cell)
    except ValueError:
        raise Mistake("is not a number of 0 or more", cell) from None


def split(cell: Any) -> str | None:
    """train, val or test, by one of the words for it; None where it is empty."""
    if is_blank(cell):
        return None
    if type(cell) is str and (found := SPLIT_OF.get(cell.strip().lower())):
        return found
    raise Mistake(f"is none of {', '.join(SPLIT_OF)}", cell)
