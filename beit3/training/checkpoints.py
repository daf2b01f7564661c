"""Full checkpoints, from which a run goes on: complete or absent, and found by being complete, not by a pointer.

Names say how far a run was: `checkpoint-<epoch>` after an epoch and its validation, `checkpoint-<epoch>-<step>` inside
one. Plain PyTorch writes one `.pth` file, whose zip container holds a CRC-32 of every part; DeepSpeed writes a folder,
whose `manifest.json` holds size and SHA-256 of every file. Both are written aside and renamed, and both hold a
fingerprint: the versions, the number of processes, and what of recipe and data decides the steps.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import platform
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from beit3.model.untrusted import check_file, check_plain, load_untrusted
from beit3.system.atomic_files import UNFINISHED, atomic_write, sha256_of, sync
from beit3.system.errors import CheckpointError, InputError, printable

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
ASIDE = re.compile(r"\.checkpoint-.*\.tmp")  # folders that are being written, or were when killed

Position = tuple[int, int]  # epoch, and optimizer steps done in it


def checkpoint_name(position: Position) -> str:
    """`checkpoint-<epoch>` when `position` is the start of an epoch and the one before was validated."""
    epoch, step = position
    return f"checkpoint-{epoch - 1}" if step == 0 else f"checkpoint-{epoch}-{step}"


def position_of(path: Path, suffix: str) -> Position | None:
    """Where a run with this checkpoint goes on; None for other files."""
    match = re.fullmatch(rf"checkpoint-(\d+)(?:-(\d+))?{re.escape(suffix)}", path.name)
    if match is None:
        return None
    epoch, step = match.groups()
    return (int(epoch) + 1, 0) if step is None else (int(epoch), int(step))


def checkpoints_in(folder: Path, suffix: str) -> list[Path]:
    """Those with this ending ("" = folders), complete or not, the one furthest on first."""
    found = []
    for path in folder.glob("checkpoint-*"):
        position = position_of(path, suffix)
        if position is not None and path.is_dir() == (not suffix):
            found.append((position, path))
    return [path for _, path in sorted(found, reverse=True)]


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None when it is complete. Reads all of it."""
    try:
        if path.is_dir():
            _check_folder(path)
        else:
            check_file(path)
            if not zipfile.is_zipfile(path):
                return f"{path}: damaged, or no checkpoint of this toolkit"
    except InputError as error:
        return str(error)
    return None


def read_fingerprint(path: Path) -> dict[str, Any]:
    """What a complete checkpoint says of the run that made it.

    Raises:
        InputError: it is no checkpoint of a run of this toolkit.
    """
    content = _read_manifest(path) if path.is_dir() else load_untrusted(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("fingerprint"), Mapping):
        raise InputError(f"{path}: holds weights only; give it to --finetune, or resume from a full checkpoint")
    fingerprint = dict(content["fingerprint"])
    check_plain(fingerprint, path, "fingerprint")
    for part in ("versions", "recipe", "data"):
        if not isinstance(fingerprint.get(part), dict):
            raise InputError(f"{path}: not a checkpoint of this toolkit, {part} in its fingerprint is no mapping")
    for part in ("format", "world_size"):
        number = fingerprint.get(part)
        if type(number) is not int or number < 1:  # True is an int too
            raise InputError(f"{path}: not a checkpoint of this toolkit, {part} in its fingerprint is no number")
    return fingerprint


def versions() -> dict[str, str]:
    """Of what computes: the promise of bitwise equal runs holds among equal ones."""
    return {"python": platform.python_version(), "torch": str(torch.__version__)}


def differences(made: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What of recipe and data changed between two fingerprints: name → a phrase."""
    changed = {}
    for part in ("recipe", "data"):
        before, after = made.get(part, {}), now.get(part, {})
        for name in sorted(before.keys() | after.keys()):
            old, new = before.get(name), after.get(name)
            if old != new:
                changed[name] = f"{name} was {_short(old)}, is {_short(new)}"
    return changed


def write_manifest(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Sizes and hashes of all files of a folder that is being written."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    with atomic_write(folder / MANIFEST) as file:
        json.dump({"fingerprint": fingerprint, "files": files}, file, indent=1)


@contextlib.contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """A save that fails says which file, and that nothing older was harmed.

    Raises:
        CheckpointError: for what operating system and the writers of torch and safetensors raise.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        full = _full_disk(error)
        if full is not None:
            reason = f"disk full: {full}"
        raise CheckpointError(
            f"{path}: could not be written ({reason}). Nothing half-written is left and older checkpoints are as they "
            "were; make room on the disk and run the same command again"
        ) from error


def _full_disk(error: BaseException | None) -> str | None:
    """What the system said where the disk, or the user's share of it, is full; writers hide that in other errors."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return str(error)
        # Rust, in which safetensors is written, ends its messages so: 28 is ENOSPC, 122 EDQUOT.
        if isinstance(error, SafetensorError) and re.search(r"os error (28|122)\b", str(error)):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def replace_folder(aside: Path, path: Path) -> None:
    """Rename a complete folder to its name, once all of it is on the disk; what stood there before goes."""
    for file in aside.rglob("*"):
        sync(file)
    sync(aside)
    discard(path)
    os.replace(aside, path)
    sync(path.parent)


def discard(path: Path) -> None:
    """Remove a file or folder so that no part of it is ever found under its name."""
    if path.is_dir():
        aside = path.with_name(f".{path.name}.removed.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """What was being written when a run was killed."""
    for path in [*folder.glob(".*.tmp"), *folder.glob("checkpoint-*/.*.tmp")]:
        if ASIDE.fullmatch(path.name) or UNFINISHED.fullmatch(path.name):
            logger.info("%s: removed, a save that was not finished", path)
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def prune(written: Path, suffix: str, keep: int, spare: Path | None) -> None:
    """Keep the newest `keep` checkpoints (0: all) of the folder of `written`, which is complete and the newest.

    `spare`, the one the run was resumed from, stays. Checkpoints that claim to be further on are damaged or belong to
    a run that was given up: they are renamed, so that nobody goes on from them.
    """
    everything = checkpoints_in(written.parent, suffix)
    place = everything.index(written)
    for path in everything[:place]:
        stale = path.with_name(f"{path.name}.stale")
        discard(stale)
        os.replace(path, stale)
        logger.warning("%s: further on than this run; renamed to %s", path, stale.name)
    if keep:
        for path in everything[place + keep :]:
            if spare is None or not spare.exists() or not path.samefile(spare):
                discard(path)


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return sha256_of(file)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder}: not complete, {MANIFEST} cannot be read ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise InputError(f"{folder}: {MANIFEST} is not one of this toolkit")
    for name, facts in content["files"].items():
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        if not (inside and isinstance(facts, dict) and {"bytes", "sha256"} <= facts.keys()):
            raise InputError(f"{folder}: {MANIFEST} is not one of this toolkit ({printable(name)[:80]})")
    return content


def _check_folder(folder: Path) -> None:
    problems = []
    for name, wanted in _read_manifest(folder)["files"].items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{file}: missing")
        elif file.stat().st_size != wanted["bytes"]:
            problems.append(f"{file}: has {file.stat().st_size} bytes, was written with {wanted['bytes']}")
        elif _file_sha256(file) != wanted["sha256"]:
            problems.append(f"{file}: altered since it was written")
    if problems:
        raise InputError(problems)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
