"""The pictures of people's own data: where they are, which ones are the same, and those that a source holds itself."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from unicodedata import normalize

from beit3.data.index_writing import PICTURE_ENDINGS
from beit3.data.picture_files import format_of
from sources.rows import Id, Row

QUICK = 1 << 14  # bytes at each end of a file that are compared before all of it is
ENDING_OF = {"JPEG": ".jpg", "TIFF": ".tif"}  # of Pillow's formats whose ending is not their name


class PictureFinder:
    """The pictures below a folder, by the path that a row says, or by their id where it says none.

    Each folder is listed once, when first asked for; links are followed wherever they lead.
    """

    def __init__(self, root: Path):
        self.root = root
        self._files: dict[str, set[str]] = {}  # folder → names of the files in it
        self._found: dict[str, str | None] = {}
        self._by_id: dict[str, list[str]] | None = None

    def find(self, row: Row) -> str | None:
        """The picture of a row as a path from the root, with "/" between folders; None where it is not there.

        A picture without an ending in its name is found with any that pictures have.
        """
        named = row.image or f"\0{row.image_id}"
        if named not in self._found:
            self._found[named] = self._by_path(row.image) if row.image else self._by_number(row.image_id)
        return self._found[named]

    def _by_path(self, path: str) -> str | None:
        return self._as_written(path) or (None if path.isascii() else self._composed(path))

    def _composed(self, path: str) -> str | None:
        """The picture whose name has the same letters, which Unicode lets be written in two ways ("é", "e" and an
        accent), as file systems of one kind and tables of another do."""
        folder = ""
        for part in path.split("/"):
            names = self._names(folder)
            found = [name for name in names if normalize("NFC", name) == normalize("NFC", part)]
            if len(found) != 1:
                return None
            folder = f"{folder}/{found[0]}" if folder else found[0]
        return self._as_written(folder)

    def _names(self, folder: str) -> list[str]:
        try:
            return os.listdir(self.root / folder)
        except OSError:
            return []

    def _as_written(self, path: str) -> str | None:
        folder, _, name = path.rpartition("/")
        files = self._list(folder)
        if name in files:
            return path
        if os.path.splitext(name)[1].lower() in PICTURE_ENDINGS:
            return None
        found = [path + ending for ending in PICTURE_ENDINGS if name + ending in files]
        return found[0] if len(found) == 1 else None

    def _by_number(self, image_id: Id | None) -> str | None:
        """`COCO_val2014_000000000042.jpg`, `000000000042.jpg` and `42.jpg` are 42; `n161313.jpg` is n161313."""
        if self._by_id is None:
            self._by_id = defaultdict(list)
            for folder, names in _folders(self.root):
                inside = os.path.relpath(folder, self.root).replace(os.sep, "/")
                for name in names:
                    stem, ending = os.path.splitext(name)
                    if ending.lower() in PICTURE_ENDINGS and not name.startswith("."):
                        last = stem.rpartition("_")[2]
                        key = str(int(last)) if _is_number(last) else stem
                        self._by_id[key].append(name if inside == "." else f"{inside}/{name}")
        wanted = str(image_id)
        found = self._by_id.get(str(int(wanted)) if _is_number(wanted) else wanted, [])
        return found[0] if len(found) == 1 else None

    def _list(self, folder: str) -> set[str]:
        if folder not in self._files:
            path = self.root / folder
            try:
                with os.scandir(path) as entries:
                    self._files[folder] = {entry.name for entry in entries if _is_file(entry)}
            except OSError:
                self._files[folder] = set()
        return self._files[folder]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 19


def _folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Every folder below, links followed, once each however links lead in circles, with the names of its files."""
    seen: set[tuple[int, int]] = set()
    for folder, inner, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inner.sort()
        yield folder, names


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False


def same_content(root: Path, paths: Iterable[str]) -> dict[str, str]:
    """Path → the first path with the same content, itself where there is none before it.

    Files of different sizes are different, so few are read: of those of one size both ends, and where these are the
    same, all.
    """
    first_of: dict[str, str] = {}
    by_size: defaultdict[int, list[str]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        first_of[path] = path
        by_size[_size(root / path)].append(path)
    for size, alike in by_size.items():
        if size > 0 and len(alike) > 1:
            for group in _groups(root, alike, QUICK):
                for same in _groups(root, group, None) if size > 2 * QUICK else [group]:
                    first_of.update(dict.fromkeys(same, same[0]))
    return first_of


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _groups(root: Path, paths: list[str], quick: int | None) -> list[list[str]]:
    """Those of one digest, of which there are several. quick: bytes of each end that count; None: all."""
    groups: defaultdict[bytes, list[str]] = defaultdict(list)
    for path in paths:
        digest = hashlib.sha256()
        try:
            with open(root / path, "rb") as file:
                if quick is None:
                    while block := file.read(1 << 20):
                        digest.update(block)
                else:
                    digest.update(file.read(quick))
                    file.seek(max(0, os.fstat(file.fileno()).st_size - quick))
                    digest.update(file.read(quick))
        except OSError:
            continue  # that it cannot be read is found elsewhere
        groups[digest.digest()].append(path)
    return [group for group in groups.values() if len(group) > 1]


def choose_pictures(same: Mapping[str, str], fraction: float, seed: int) -> set[str]:
    """The pictures kept for validation: a share of all, at least one, never one of two with the same content.

    same: see `same_content`. Depends on the set of names and the seed, on no order.
    """
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for path, first in same.items():
        groups[first].append(path)
    ranked = sorted(groups.values(), key=lambda group: hashlib.sha256(f"{seed}:{min(group)}".encode()).digest())
    wanted, chosen = max(1, round(fraction * len(same))), set[str]()
    for group in ranked[:-1]:  # one group at least is left to learn from
        if len(chosen) >= wanted:
            break
        if 2 * len(group) <= len(same):  # one picture under so many names would leave too little to learn from
            chosen.update(group)
    return chosen


def unpacked_name(content: bytes, name: str) -> str | None:
    """The name under which a picture that a source holds is kept: what it was called, and its digest, which tells
    two of one name apart. None where it is no picture."""
    format = format_of(content[:64])
    if format is None:
        return None
    stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in os.path.splitext(os.path.basename(name))[0])[:60]
    ending = ENDING_OF.get(format, f".{format.lower()}")
    stem = stem.encode()[:150].decode(errors="ignore")  # file systems count bytes
    return f"{stem or 'picture'}_{hashlib.sha256(content).hexdigest()[:16]}{ending}"
