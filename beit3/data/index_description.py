"""What index files say of how they were made, in a small file beside them, and whether they still fit.

A description is looked at at every start, so nothing large is read: sizes and times of change first, and where these
differ some blocks of a file. It is written in one go with the index files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from beit3.data.tokenizer import BatchEncoder, Tokenizer
from beit3.system.atomic_files import sha256_of
from beit3.system.errors import InputError

FORMAT = 1  # of a description
BLOCK, BLOCKS = 1 << 14, 16  # bytes, and how many of them spread over a file, a quick digest is made of
MAX_DESCRIPTION = 1 << 20  # bytes; one has about two thousand


@dataclass
class Fit:
    """How an index fits what is there now, in sentences.

    Attributes:
        tokenizer: it was made with another tokenizer than the one asked about; nothing can be learned from it.
        stale: what has changed since, so that making it again would give another one.
        told: what is worth knowing and changes nothing.
        edited: names of index files that somebody changed.
    """

    tokenizer: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    edited: list[str] = field(default_factory=list)


def tokenizer_hash(encode: BatchEncoder) -> str | None:
    """SHA-256 of the file of the tokenizer that encodes; None for one of the user's own, which has no file."""
    owner = getattr(encode, "__self__", None)
    return owner.sha256 if isinstance(owner, Tokenizer) else None


def hash_of_file(tokenizer: str | os.PathLike[str]) -> tuple[str, str]:
    """The name for people and the SHA-256 of a tokenizer's file."""
    with open(tokenizer, "rb") as file:
        return os.fspath(tokenizer), sha256_of(file)


def said_of(data: Path, description: str, what: str, otherwise: Any) -> Any:
    """A value of a description, where there is one of the same type."""
    try:
        value = _read(data / description)[what]
    except (OSError, ValueError, KeyError, RecursionError):
        return otherwise
    return value if type(value) is type(otherwise) else otherwise


# Writing


def describe_index(
    data: Path,
    version: int,
    files: Mapping[str, IO[str]],
    official: Iterable[Path],
    pictures: Mapping[str, tuple[Path, int]],
    **more: Any,
) -> str:
    """The text of a description.

    Args:
        data: the folder of the index.
        version: of the maker.
        files: name → index file, written and still open.
        official: the files it was made from.
        pictures: name → (folder of pictures, how many of those wanted were missing).
        more: whatever else decided what was written, such as `tokenizer_sha256`.
    """
    described = {}
    for name, file in files.items():
        file.flush()  # the time of change stays what it is when the file is renamed
        facts = _facts(Path(file.name))
        with open(file.name, "rb") as content:
            lines = sum(block.count(b"\n") for block in iter(lambda: content.read(1 << 20), b""))
            content.seek(0)
            described[name] = {**facts, "lines": lines, "sha256": sha256_of(content)}
    content_of = {
        "format": FORMAT,
        "version": version,
        **more,
        "index_files": described,
        "official_files": {_name_from(data, path): _facts(path) for path in official},
        "pictures": {
            name: {**_count(folder), "missing": missing} for name, (folder, missing) in sorted(pictures.items())
        },
    }
    return json.dumps(content_of, indent=1) + "\n"


def _name_from(data: Path, path: Path) -> str:
    """The path from the data folder where it lies in there, so that the folder can move; else the whole path."""
    path = path.absolute()
    inside = path.is_relative_to(data.absolute())
    return path.relative_to(data.absolute()).as_posix() if inside else path.as_posix()


def _facts(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns, "digest": quick_digest(path)}


def quick_digest(path: Path) -> str:
    """SHA-256 over the size and blocks from all over a file, its first and last among them; all of a small file."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for number in range(BLOCKS):
            file.seek(max(size - BLOCK, 0) * number // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _count(folder: Path) -> dict[str, int]:
    """How many files are in a folder of pictures, and when it changed last; zeros where it cannot be listed."""
    try:
        modified = folder.stat().st_mtime_ns
        return {"modified_ns": modified, "files": len(os.listdir(folder))}
    except OSError:
        return {"modified_ns": 0, "files": 0}


# Looking


def look(
    data: Path,
    description: str,
    version: int,
    pictures: Path | None = None,
    tokenizer: tuple[str, str] | None = None,
    thorough: bool = False,
) -> Fit:
    """Whether the index in `data` fits.

    Args:
        description: name of the file that describes it.
        version: of today's maker.
        pictures: the folder that the folders of pictures are in; None: `data`.
        tokenizer: (name for people, SHA-256) of the one that will be used; None: the index holds no texts that count.
        thorough: read index files whole where their time of change differs.
    """
    file, fit = data / description, Fit()
    if not file.is_file():
        fit.told.append(f"{data}: {description} is not there, which says what the index was made from; taken as it is")
        return fit
    try:
        said = _read(file)
        _look_at_files(data, said, fit, thorough, description)
        _look_at_pictures(data if pictures is None else pictures, said, fit)
        made_with = said.get("tokenizer_sha256")
        if tokenizer is not None and made_with is None:
            fit.told.append(f"{data}: the index was made with a tokenizer that has no file, so none can be compared")
        elif tokenizer is not None and made_with != tokenizer[1]:
            fit.tokenizer.append(
                f"{data}: the index was made with another tokenizer, of SHA-256 {str(made_with)[:12]}; the tokenizer "
                f"{tokenizer[0]} has {tokenizer[1][:12]}, so the same number would mean another word"
            )
        if said["version"] != version:
            fit.stale.append(f"its maker had version {said['version']}, today's has {version}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fit = Fit(told=[f"{file}: cannot be read ({str(error)[:100]!a}); the index is taken as it is"])
    return fit


def _read(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_DESCRIPTION:
        raise ValueError(f"{file.stat().st_size} bytes")
    said = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise ValueError("another format")
    return said


def _look_at_files(data: Path, said: Mapping[str, Any], fit: Fit, thorough: bool, description: str) -> None:
    for name, facts in said["official_files"].items():
        path = data / name  # a whole path stays one
        if path.is_file() and _changed(path, facts):
            fit.stale.append(f"{path} has changed")
    for name, facts in said["index_files"].items():
        path = data / name
        if path.is_file() and _changed(path, facts, thorough):
            fit.edited.append(name)
    if fit.edited:
        fit.told.append(f"{data}: {', '.join(fit.edited)} changed since {description} was written")


def _changed(path: Path, facts: Mapping[str, Any], thorough: bool = False) -> bool:
    status = path.stat()
    if status.st_size != facts["bytes"]:
        return True
    if status.st_mtime_ns == facts["modified_ns"]:
        return False
    if not thorough:
        return quick_digest(path) != facts["digest"]
    with open(path, "rb") as file:
        return sha256_of(file) != facts["sha256"]


def _look_at_pictures(root: Path, said: Mapping[str, Any], fit: Fit) -> None:
    for name, facts in said["pictures"].items():
        folder = root / name
        if not facts["missing"] or not folder.is_dir() or folder.stat().st_mtime_ns == facts["modified_ns"]:
            continue
        more = len(os.listdir(folder)) - facts["files"]
        if more > 0:
            fit.stale.append(f"{folder} has {more} more files than when {facts['missing']} pictures were missing there")


def make_unless_it_fits(
    data: Path, names: Sequence[str], fit: Callable[[], Fit], make: Callable[[], None], official: Iterable[Path]
) -> None:
    """Make an index that is not there, or that does not fit any more, and say why. What somebody edited is kept.

    Args:
        names: the index files.
        fit: looks at them; called where all are there.
        official: the files it is made from; without them it can only be kept.

    Raises:
        InputError: made with another tokenizer, and edited, so that making it again would lose something.
    """
    if not all((data / name).is_file() for name in names):
        make()
        return
    found = fit()
    for line in found.told:
        print(line)
    reasons = [*found.tokenizer, *found.stale]
    if not reasons:
        return
    why = "; ".join(reasons)
    if found.edited and found.tokenizer:
        raise InputError(f"{why}. Move {', '.join(found.edited)} elsewhere and run this again to have the index made")
    if found.edited:
        print(f"{data}: the index is kept although it is out of date, because making it again would undo that: {why}")
    elif not found.tokenizer and not all(path.is_file() for path in official):
        print(f"{data}: the index is kept although it is out of date, because the official files are gone: {why}")
    else:
        print(f"{data}: the index is made again: {why}")
        make()
