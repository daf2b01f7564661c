"""What libjpeg and libtiff warn of while they decode: caught, counted, and named once in the log.

libjpeg reads on after most damage and fills with grey what it could not read. Its only word about that goes to the
process's standard error, without the file's name, and torchvision hands nothing of it on; libtiff does the same. So the
descriptor of standard error is turned to a file in memory while one picture is decoded, which takes some microseconds.
"""

from __future__ import annotations

import logging
import mmap
import os
import re
import tempfile
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from beit3.system.errors import printable

NAMED_LIMIT = 100  # a collection with more damaged pictures needs a count, not a longer list

_logger = logging.getLogger(__name__)
_STDERR = 2
_DECODERS = re.compile(
    "(Corrupt JPEG data|Premature end of JPEG|Invalid SOS param|Inconsistent progression|Invalid component ID|"
    r"Warning: unknown JFIF|Unknown Adobe color|Application transferred too)|[\w.]+: .*\.$"
)  # how libjpeg's warnings begin, and the form of libtiff's: "function: sentence."
# One byte per picture, at a place that the hash of its path tells. Workers that are forked later share it with this
# process, so a picture is named once however many epochs see it. (Two pictures at one place are named and counted as
# one, which is rare as long as damaged pictures are.)
_seen = mmap.mmap(-1, 1 << 16)
_lock = threading.Lock()
_catch: tuple[int, int] | None = None  # process, descriptor; a forked process needs a file of its own


def count() -> int:
    """Pictures that were read with such a warning so far, in this process and in workers that it forked."""
    return len(_seen) - _seen[:].count(0)


@contextmanager
def listen(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around the decoding of one picture: takes the decoder's warnings from standard error and logs them with its path.

    Where the decoding raises, the exception says enough and nothing is logged. Standard error belongs to the whole
    process, so one thread decodes at a time, and what others write meanwhile is passed on afterwards. Where standard
    error is closed nothing is caught.
    """
    with _lock:
        try:
            catch = _open_catch()
            stderr = os.dup(_STDERR)
        except OSError:
            yield
            return
        os.dup2(catch, _STDERR)
        try:
            yield
        finally:
            os.dup2(stderr, _STDERR)
            os.close(stderr)
            said = _pass_on(_take(catch))
    if said:
        tell(path, said)


def _open_catch() -> int:
    global _catch
    if _catch is None or _catch[0] != os.getpid():
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("libjpeg")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        _catch = os.getpid(), descriptor
    return _catch[1]


def _take(catch: int) -> str:
    """What was written, most often nothing."""
    length = os.lseek(catch, 0, os.SEEK_CUR)
    if not length:
        return ""
    os.lseek(catch, 0, os.SEEK_SET)
    said = os.read(catch, length)
    os.lseek(catch, 0, os.SEEK_SET)
    os.ftruncate(catch, 0)
    return said.decode("utf-8", "replace")


def _pass_on(said: str) -> list[str]:
    """The decoder's warnings; what others wrote meanwhile goes where it was meant to go."""
    lines = said.splitlines(keepends=True)
    of_others = "".join(line for line in lines if not _DECODERS.match(line))
    if of_others:
        os.write(_STDERR, of_others.encode())
    return [line.strip() for line in lines if _DECODERS.match(line)]


def tell(path: str | os.PathLike[str], warnings: list[str]) -> None:
    place = zlib.crc32(os.fsencode(path)) % len(_seen)
    if _seen[place]:
        return
    _seen[place] = 1
    number = count()
    if number <= NAMED_LIMIT:
        _logger.warning("%s: damaged, read all the same (%s)", printable(os.fspath(path)), printable(warnings[0]))
    if number == NAMED_LIMIT:
        _logger.warning("%d damaged pictures so far; further ones are counted, not named", number)
