"""What the makers of index files share: what must be there, pictures in folders, texts, progress, a summary.

A maker writes nothing that reading (`index_table`) would refuse: what is wrong in the official files is found
(`findings`), with field, place and value, before the first file appears.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from beit3.data.findings import Findings, is_broken
from beit3.data.tokenizer import UNK_ID, BatchEncoder, as_batch_encoder
from beit3.system.errors import InputError

BATCH = 4096  # texts tokenized at a time
MUCH_UNKNOWN = 0.05  # share of <unk> above which texts and tokenizer hardly belong together
NEARLY_ALL = 0.9  # a file with this share of the official entries is taken for the official one
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")  # in any case

# COCO_train2014_000000000009.jpg, 000000000009.jpg; a leading dot marks what archivers and systems leave behind.
_NAME_WITH_ID = re.compile(r"(?!\.)(?:.*_)?([0-9]+)(?:" + "|".join(map(re.escape, PICTURE_ENDINGS)) + ")", re.I | re.S)

_COUNT_UNKNOWN = methodcaller("count", UNK_ID)

Row = TypeVar("Row")


# Folders and files


def check_inputs(
    folders: Iterable[Path], files: Mapping[Path, str], written: Path, problems: Iterable[str] = ()
) -> None:
    """Raise an InputError where a folder or a file is missing, or `written` cannot be written to.

    files: each with where to get it. problems: what else is wrong, told with it.
    """
    found = [f"{folder}: no such folder" for folder in dict.fromkeys(folders) if not folder.is_dir()]
    if written.is_dir() and not os.access(written, os.W_OK | os.X_OK):
        found.append(
            f"{written}: cannot be written to, and the index files belong there; give another data_path, "
            "and where the pictures are as image_path"
        )
    # Where a folder is missing, so is all in it.
    found += [
        f"{file}: missing; {remedy}" for file, remedy in files.items() if file.parent.is_dir() and not file.is_file()
    ]
    if found := [*found, *problems]:
        raise InputError(found)


def check_inputs_and_tokenizer(
    tokenizer: Any, folders: Iterable[Path], files: Mapping[Path, str], written: Path, problems: Iterable[str] = ()
) -> BatchEncoder:
    """`check_inputs`, and what encodes texts, see `as_batch_encoder`; a tokenizer that cannot is told with the rest."""
    try:
        encode = as_batch_encoder(tokenizer)
    except InputError as error:
        check_inputs(folders, files, written, [*problems, *error.problems])
        raise
    check_inputs(folders, files, written, problems)
    return encode


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
            if is_broken(name):
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
