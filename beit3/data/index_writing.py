"""What the makers of index files share: pictures in folders, mistakes in annotation files, progress, texts, a summary.

A maker writes nothing that reading (`index_table`) would refuse: what is wrong in the official files is found here,
with field, place and value, before the first file appears.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from beit3.data.index_table import MAX_LINE_BYTES
from beit3.data.json_stream import OnCharacters, stream_array
from beit3.data.tokenizer import UNK_ID, BatchEncoder
from beit3.system.errors import InputError

BATCH = 4096  # texts tokenized at a time
MAX_ID = (1 << 63) - 1  # what reading can hold
MUCH_UNKNOWN = 0.05  # share of <unk> above which texts and tokenizer hardly belong together
NEARLY_ALL = 0.9  # a file with this share of the official entries is taken for the official one
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")  # in any case

# COCO_train2014_000000000009.jpg, 000000000009.jpg; a leading dot marks what archivers and systems leave behind.
_NAME_WITH_ID = re.compile(r"(?!\.)(?:.*_)?([0-9]+)(?:" + "|".join(map(re.escape, PICTURE_ENDINGS)) + ")", re.I | re.S)

_COUNT_UNKNOWN = methodcaller("count", UNK_ID)

Row = TypeVar("Row")
Check = Callable[[Any], "str | None"]  # says what is wrong with a value, None where nothing is


# Values of annotation files


def wrong_id(value: Any) -> str | None:
    """What is wrong with an id: only a whole number that 64 bits hold is right. True is none, nor is 5.0."""
    if type(value) is not int:
        return "is not a whole number"
    return None if -MAX_ID <= value <= MAX_ID else "does not fit into 64 bits"


def wrong_string(value: Any) -> str | None:
    """What is wrong with a string that may be empty."""
    if type(value) is not str:
        return "is not a text"
    return "holds half a surrogate pair, which is no valid Unicode" if _is_broken(value) else None


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


def _is_broken(text: str) -> bool:
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
        self, path: Path, key: str, on_characters: OnCharacters | None = None, required: bool = True
    ) -> Iterator[Any]:
        """Yield the elements of an official file; a broken one ends where it breaks, and the next file is read."""
        try:
            yield from stream_array(path, key, on_characters, required)
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


# Folders and files


def missing_inputs(folders: Iterable[Path], files: Mapping[Path, str], written: Path) -> list[str]:
    """What is not there: folders, and files, each with where to get it; and whether `written` can be written to."""
    problems = [f"{folder}: no such folder" for folder in dict.fromkeys(folders) if not folder.is_dir()]
    if written.is_dir() and not os.access(written, os.W_OK | os.X_OK):
        problems.append(
            f"{written}: cannot be written to, and the index files belong there; give another data_path, "
            "and where the pictures are as image_path"
        )
    # Where a folder is missing, so is all in it.
    return problems + [
        f"{file}: missing; {remedy}" for file, remedy in files.items() if file.parent.is_dir() and not file.is_file()
    ]


class Pictures:
    """The pictures in the folders below `root`, links followed wherever they lead.

    Each folder is listed once: asking for every file is slow on network disks. A link that leads nowhere is no
    picture. `problems`: what is wrong with folders that were asked for. `missing`: folder → how many pictures `find`
    did not find in it.
    """

    def __init__(self, root: Path):
        self.root = root
        self.problems: list[str] = []
        self.missing: Counter[str] = Counter()
        self._names: dict[str, set[str]] = {}  # by folder
        self._by_stem: dict[str, dict[str, list[str]]] = {}  # folder → name without ending → names
        self._used: set[str] = set()  # folders of which a picture was wanted and found

    def names(self, folder: str) -> set[str]:
        """The names of the files in a folder; none where it cannot be listed."""
        if folder not in self._names:
            self._names[folder] = self._list(folder)
        return self._names[folder]

    def by_image_id(self, folder: str) -> dict[int, str]:
        """Image id → `folder/name` of the pictures that carry their id in their name, as COCO's do."""
        path, pictures = self.root / folder, dict[int, str]()
        problems = len(self.problems)
        for name in sorted(self.names(folder)):
            if (match := _NAME_WITH_ID.fullmatch(name)) is None:
                continue
            image_id = int(match[1])
            if _is_broken(name):
                self.problems.append(f"{path}: the name of {name!a} is not UTF-8; rename the file")
            elif image_id in pictures:
                self.problems.append(
                    f"{path}: {name!r} and {pictures[image_id]!r} are both image {image_id}; remove one"
                )
            else:
                pictures[image_id] = f"{folder}/{name}"
        if not pictures and len(self.problems) == problems and path.is_dir():
            self.problems.append(f"{path}: no picture in it, such as COCO_{folder}_000000000001.jpg")
        return pictures

    def find(self, path: str) -> str | None:
        """The picture under that path, or the one with another ending that a picture may have; None: not there."""
        folder, name = os.path.split(path)
        if name not in self.names(folder):
            names = self._of_stem(folder).get(os.path.splitext(name)[0], [])
            if len(names) > 1:
                what = f"{self.root / folder}: {names[0]!r} and {names[1]!r} are both there in place of {name!r}"
                self.problems.append(f"{what}; remove one")
            if len(names) != 1:
                self.missing[folder] += 1
                return None
            name = names[0]
        self._used.add(folder)
        return os.path.join(folder, name)

    def note_problems(self, findings: Findings) -> None:
        """Hand over what is wrong with the folders: with each, or that none of the pictures wanted is in it."""
        findings.broken_files += self.problems
        for folder in self._names.keys() - self._used:
            if (self.root / folder).is_dir():
                findings.broken_files.append(f"{self.root / folder}: none of the pictures wanted is in it")

    def _of_stem(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._by_stem:
            by_stem = self._by_stem[folder] = dict[str, list[str]]()
            for name in sorted(self.names(folder)):
                stem, ending = os.path.splitext(name)
                if ending.lower() in PICTURE_ENDINGS:
                    by_stem.setdefault(stem, []).append(name)
        return self._by_stem[folder]

    def _list(self, folder: str) -> set[str]:
        path = self.root / folder
        if not path.is_dir():
            self.problems.append(f"{path}: folder of pictures missing; put the pictures of {folder} there")
            return set()
        try:
            with os.scandir(path) as entries:
                return {entry.name for entry in entries if _is_file(entry)}
        except OSError as error:
            self.problems.append(f"{path}: cannot be listed ({error.strerror})")
            return set()


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()  # follows a link; asks the disk for links only
    except OSError:  # a link to itself, or into a folder that may not be entered
        return False


# Texts


class NumberTexts(dict[int, str]):
    """Number → its text, each made once: joined, they are the JSON of a list in half the time."""

    def __missing__(self, number: int) -> str:
        text = self[number] = str(number)
        return text


@dataclass
class TokenCount:
    """How many tokens a maker's texts have, and how many of them the tokenizer does not know."""

    tokens: int = 0
    unknown: int = 0

    def add(self, texts: list[list[int]]) -> None:
        self.tokens += sum(map(len, texts))
        self.unknown += sum(map(_COUNT_UNKNOWN, texts))

    def line(self) -> str:
        """One line for people, which shouts where the tokenizer hardly knows the texts."""
        share = self.unknown / max(self.tokens, 1)
        told = f"{100 * share:.2f} % of {self.tokens} tokens are <unk>"
        if share <= MUCH_UNKNOWN:
            return f"  {told}"
        return (
            f"  WARNING: {told}, above {100 * MUCH_UNKNOWN:.0f} %: the model cannot read those. Is this the tokenizer "
            "of the checkpoint, and are the texts in its language?"
        )


def tokenized(
    rows: Iterator[Row],
    text_of: Callable[[Row], str | None],
    encode: BatchEncoder,
    count: TokenCount,
    path: Path,
) -> Iterator[tuple[Row, list[int] | None]]:
    """Yield each row with the token ids of its text, None where it has none; `BATCH` rows are tokenized at a time."""
    while batch := list(islice(rows, BATCH)):
        texts = list(map(text_of, batch))
        try:
            encoded = encode([text for text in texts if text is not None])
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error
        count.add(encoded)
        ids = iter(encoded)
        for row, text in zip(batch, texts, strict=True):
            yield row, None if text is None else next(ids)


# What people see


def progress_bar(what: str, files: Iterable[Path], progress: bool | None) -> Any:
    """A bar over the bytes of the files; `progress` None: on a terminal only."""
    total = sum(file.stat().st_size for file in files)
    hidden = None if progress is None else not progress
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=hidden)


def print_summary(head: str, lines: Iterable[str], count: TokenCount | None = None) -> None:
    """What was written and what left out: a head, a line per file or remark, and how well the tokenizer fits."""
    print(head)
    for line in lines:
        print(f"  {line}")
    if count is not None:
        print(count.line())


def is_nearly(found: int, official: int) -> bool:
    """Whether a file with `found` entries is taken for the official one, so that it is worth telling what is short.

    By the number alone, as nothing else in the files is sure to stay; other people's data seldom come so near.
    """
    return NEARLY_ALL * official <= found <= official


def beside_official(counts: Mapping[str, tuple[int, int]]) -> str:
    """One line for people. counts: name → (found, in the official data)."""
    differing = [f"{found} {name} instead of {wanted}" for name, (found, wanted) in counts.items() if found != wanted]
    if not differing:
        return "as many as in the official data"
    return f"unlike the official data: {', '.join(differing)}"
