"""Writing files so that nobody ever finds half of one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

UNFINISHED = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")  # names of files that are being written, or were when killed


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` only when the block ends without an error.

    `mode` is "w" (text, UTF-8, "\\n" line ends) or "wb". On an error, Ctrl-C included, what `path` held before stays.
    """
    with atomic_writes([path], mode) as (file,):
        yield file


@contextlib.contextmanager
def atomic_writes(paths: Sequence[str | os.PathLike[str]], mode: str = "w") -> Iterator[list[IO[Any]]]:
    """Open several files that are written aside and all renamed to `paths` at the end, in the order given.

    Until every file is on the disk (fsync) none is renamed. A kill exactly between two renames can still leave new
    and old files side by side, each of them whole.
    """
    assert mode in ("w", "wb"), mode
    targets = [Path(path) for path in paths]
    # In the same folder, because a rename is atomic within a file system only; hidden, because listings should not
    # pick up what a kill -9 left. Opened by "x", so the permissions are those of any other new file.
    asides = [target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp") for target in targets]
    with contextlib.ExitStack() as cleaning:
        files: list[IO[Any]] = []
        for aside in asides:
            # Before opening: Ctrl-C between the two then leaves nothing behind.
            cleaning.callback(aside.unlink, missing_ok=True)
            files.append(cleaning.enter_context(_open_new(aside, mode)))
        yield files
        for file in files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for aside, target in zip(asides, targets, strict=True):
            os.replace(aside, target)
        for folder in {target.parent for target in targets}:
            sync(folder)


def _open_new(path: Path, mode: str) -> IO[Any]:
    if mode == "wb":
        return open(path, "xb")
    return open(path, "x", encoding="utf-8", newline="\n")


def sha256_of(file: IO[bytes]) -> str:
    """SHA-256 in hexadecimal of what is left to read of an open file."""
    digest = hashlib.sha256()
    while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk; some network file systems refuse that, and lose nothing."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
