"""Which column of a table is which: the names that people give them, and those that they choose by `--columns`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from beit3.data.findings import shown
from beit3.system.errors import InputError

IMAGE, QUESTION, ANSWERS, CAPTIONS = "image", "question", "answers", "captions"
SPLIT, QUESTION_ID, IMAGE_ID, WEIGHT = "split", "question_id", "image_id", "weight"

# Our name → what a column may be called; in any case, white space around it passed over.
NAMES = {
    IMAGE: ("image", "file_name", "file", "image_path", "path", "filename", "img"),
    QUESTION: ("question", "query", "prompt"),
    ANSWERS: ("answers", "answer", "response", "label"),
    CAPTIONS: ("captions", "caption", "text", "title", "sentences"),
    SPLIT: ("split",),
    QUESTION_ID: ("question_id",),
    IMAGE_ID: ("image_id",),
    WEIGHT: ("weight",),
}
_MEANING = {name: ours for ours, names in NAMES.items() for name in names}
MOST_SHOWN = 20  # columns


def parse_columns(text: str) -> dict[str, str]:
    """What `--columns` says, `image=datei,question=frage`, as our name → the file's name.

    Any of our names for a column will do, such as answer for answers. A name of the file may hold "=" and white space
    within; a comma in it is written "\\,". Raises InputError with all that is wrong.
    """
    found: dict[str, str] = {}
    problems = []
    for part in re.split(r"(?<!\\),", text):
        name, equals, theirs = (each.strip() for each in part.replace("\\,", ",").partition("="))
        ours = _MEANING.get(name.lower())
        if not part.strip():
            problems.append(f"--columns {shown(text)}: nothing stands before or behind a comma")
        elif not equals:
            problems.append(f'--columns: {shown(part)} has no "="; write it as in image=datei,question=frage')
        elif ours is None:
            problems.append(unknown(name))
        elif not theirs:
            problems.append(f"--columns: {name}= lacks the name of the file's column")
        elif ours in found:
            problems.append(f"--columns: {ours} is given twice, as {shown(found[ours])} and {shown(theirs)}")
        else:
            found[ours] = theirs
    if problems:
        raise InputError(problems)
    return found


def find_columns(path: Path, there: Sequence[str], chosen: Mapping[str, str]) -> dict[str, list[str]]:
    """Our name → the file's columns that may be it, in the order of the file.

    there: the columns of the file. chosen: our name → the file's, as people say it; nothing else is then taken for it.
    Raises InputError where a chosen column is not there.
    """
    found: dict[str, list[str]] = {}
    problems = []
    for said, name in chosen.items():
        if not (ours := _MEANING.get(_plain(said), "")):
            problems.append(unknown(said))
            continue
        alike = [each for each in there if each == name] or [each for each in there if _plain(each) == _plain(name)]
        found[ours] = alike[:1]
        if not alike:
            close = get_close_matches(name, there, 1)
            hint = f"; {shown(close[0])} is there" if close else ""
            problems.append(f"{path}: has no column {shown(name)} for {ours}; {listed(there)}{hint}")
    if problems:
        raise InputError(problems)
    fixed, taken = set(found), {name for names in found.values() for name in names}
    for name in there:
        ours = _MEANING.get(_plain(name), "")
        if ours and ours not in fixed and name not in taken:
            found.setdefault(ours, []).append(name)
    return found


def unknown(name: str) -> str:
    return f"--columns: {shown(name)} is no column that is known; they are {', '.join(NAMES)}"


def two_of_one(path: Path, ours: str, names: Sequence[str]) -> str:
    """What is said where several columns may be one."""
    both = " and ".join(map(shown, names))
    return f"{path}: the columns {both} both mean {ours}; choose one, as in --columns {ours}={escaped(names[0])}"


def lacks(path: Path, wanted: Sequence[str], there: Sequence[str]) -> str:
    """What is said where none of these columns is there."""
    known = {name: ours for ours in wanted for name in NAMES[ours]}
    for name in there:
        if close := get_close_matches(_plain(name), known, 1, 0.75):
            hint = f"if {shown(name)} is it: --columns {known[close[0]]}={escaped(name)}"
            break
    else:
        hint = f"if one of them is it: --columns {wanted[0]}=NAME"
    return f"{path}: has no column {' or '.join(wanted)}; {listed(there)}; {hint}"


def listed(there: Sequence[str]) -> str:
    hidden = len(there) - MOST_SHOWN
    return f"its columns are {', '.join(map(shown, there[:MOST_SHOWN]))}" + (f" and {hidden} more" * (hidden > 0))


def escaped(name: str) -> str:
    """A file's name for a column as `--columns` wants it."""
    return name.strip().replace(",", "\\,") if name.isprintable() else "…"


def _plain(name: str) -> str:
    return name.strip().lower()
