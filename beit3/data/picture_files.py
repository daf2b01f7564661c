"""What a picture's file is, told from its content, and whether a decoder may see it.

The checks here come before any decoder. They look only at how a file is built, and refuse what would cost a decoder
minutes or gigabytes though its picture is small. Each raises ValueError with what is wrong.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO, Literal

FORMATS = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "BMP": "BMP", "GIF": "GIF", "TIFF": "TIFF", "AVIF": "AVIF"}
"""Pillow's names of the formats that are read → how people write them."""

HEAD = 256  # bytes that tell what a file is
HEADER_LIMIT = 1 << 24  # bytes before the pixels of a JPEG or GIF; profiles and depth maps of phones take up to 10 MB
SCAN_LIMIT = 50  # passes over a JPEG's pixels; real progressive files have about 10, each costs a pass of the decoder
TAG_LIMIT = 1_000_000  # values of one numeric TIFF tag; a strip per row needs 65,535

_SCANNED_PIXELS = 10**9  # scans x pixels: 20 scans of the largest picture that is read take some three seconds
_JUNK_LIMIT = 1 << 16  # bytes between a JPEG's segments: Pillow passes over them one by one
_SEGMENT_LIMIT = 2000  # a colour profile has up to 255, ten megabytes of notes have 160
_CHUNK_LIMIT = 100_000  # of a PNG; at the usual 8 KiB each, more than the largest file that is read
_PNG_START = b"\x89PNG\r\n\x1a\n"
# What each format begins with; a dot stands for any byte. AVIF's last two brands are those of other pictures too.
_STARTS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": re.escape(_PNG_START),
    "WEBP": rb"RIFF....WEBP",
    "BMP": rb"BM",
    "GIF": rb"GIF8[79]a",
    "TIFF": rb"II\*\0|MM\0\*|II\+\0|MM\0\+",
    "AVIF": rb"....ftyp(avif|avis|mif1|msf1)",
}
# What people have and what is not read: a start, and what to call it in the refusal.
_STRANGERS = {
    rb"....(jP  |ftypjp2)|\xff\x4f\xff\x51": "a JPEG 2000 picture",
    rb"....ftyp(heic|heix|hevc|heim|heis)": "a HEIC picture",
    rb"....JXL |\xff\x0a": "a JPEG XL picture",
    rb"....ftyp|\x1a\x45\xdf\xa3": "a video",
    rb"%!PS|\xc5\xd0\xd3\xc6": "a PostScript file",
    rb"%PDF": "a PDF file",
    rb"8BPS": "a Photoshop file",
    rb"P[1-7]\s": "a netpbm picture",
    rb"(?i)\s*(<\?xml[^>]*>\s*)?(<!doctype svg|<svg)": "an SVG drawing",
    rb"(?i)\s*<(!doctype html|html|head|body)": "an HTML page",
    rb"\s*<": "a page of markup",
    rb"version https://git-lfs": "a Git LFS pointer, not the file itself",
    rb"PK\x03\x04": "a zip archive",
    rb"\x1f\x8b": "a gzip archive",
    rb"\0{16}": "zeros",
}
_JPEG_MARKER = re.compile(rb"\xff([\x01-\xfe])", re.DOTALL)
_JPEG_MARKER_IN_PIXELS = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])", re.DOTALL)  # restarts belong to the pixels
_FRAME_MARKERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # each kind of frame; the others are tables
_FRAME_SIZE = struct.Struct(">HH")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_TAG_SIZES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}  # bytes of numeric types
_POINTER_TAGS = {34665, 34853, 40965}  # to further directories: EXIF, GPS, interoperability


class CutOff(ValueError):
    """The header of a picture is not there whole."""


def format_of(head: bytes | bytearray) -> str | None:
    """Pillow's name of the format that a file with these first bytes has; None if it is none that is read."""
    for format, start in _STARTS.items():
        if re.match(start, head, re.DOTALL):
            return format
    return None


def describe_stranger(head: bytes) -> str:
    """For a file of no known format: what was wanted, what it seems to be, and its first bytes."""
    *names, last = FORMATS.values()
    seems = next((name for start, name in _STRANGERS.items() if re.match(start, head, re.DOTALL)), "something else")
    return f"not a {', '.join(names)} or {last} picture but {seems}: {head[:16]!r}…"


def check_jpeg(data: bytearray | bytes) -> tuple[int, int, bool]:
    """(width, height, progressive) of a JPEG whose segments up to its pixels lie in `data`.

    Layout (ITU T.81): segments of 0xFF, a marker, two bytes of length and content; then scans of pixels.
    """
    size, components, position, junk, segments = (0, 0, False), 0, 2, 0, 0
    while True:
        found = _JPEG_MARKER.search(data, position, position + _JUNK_LIMIT)
        if found is None and len(data) - position < _JUNK_LIMIT:
            raise CutOff("its header goes on beyond its end")
        junk += found.start() - position if found else _JUNK_LIMIT
        if found is None or junk >= _JUNK_LIMIT:
            raise ValueError(f"its header has {junk} or more bytes that mean nothing")
        marker, position, segments = found[1][0], found.end(), segments + 1
        if position > HEADER_LIMIT or segments > _SEGMENT_LIMIT:
            raise ValueError(f"a header of more than {HEADER_LIMIT} bytes or {_SEGMENT_LIMIT} segments")
        if marker == _START_OF_SCAN:
            break
        if marker in _FRAME_MARKERS:
            height, width = _FRAME_SIZE.unpack(data[position + 3 : position + 7].ljust(4, b"\0"))
            size = width, height, marker & 3 == 2
            components = data[position + 7] if position + 7 < len(data) else 0
        if marker != 1 and not 0xD0 <= marker <= 0xD9:  # these have no content
            position += max(2, int.from_bytes(data[position : position + 2], "big"))
    several = size[2] or data[position + 2 : position + 3] != bytes([components])  # else decoders stop after one scan
    limit = min(SCAN_LIMIT, max(20, _SCANNED_PIXELS // max(1, size[0] * size[1])))
    if several and data.count(b"\xff\xda", position) >= limit:  # what lies behind the picture counts here too
        _count_scans(data, position, limit)
    return size


def _count_scans(data: bytearray | bytes, position: int, limit: int) -> None:
    """Raises ValueError if a JPEG whose first scan begins at `position` has more than `limit` of them."""
    scans, segments = 1, 0
    while scans <= limit and segments <= _SEGMENT_LIMIT:
        found = _JPEG_MARKER_IN_PIXELS.search(data, position)
        if found is None or found[1][0] == _END_OF_IMAGE:
            return
        scans, segments, position = scans + (found[1][0] == _START_OF_SCAN), segments + 1, found.end()
        position += int.from_bytes(data[position : position + 2], "big")
    raise ValueError(f"more than {limit} scans; progressive pictures have about 10")


def check_png(data: bytearray) -> None:
    """Every critical chunk up to the last must be there and sound: Pillow stops looking once it has enough pixels.

    Layout: 8 bytes, then chunks of length (4 bytes), kind (4), content, CRC-32 of kind and content (4).
    """
    view, start = memoryview(data), len(_PNG_START)
    for _ in range(_CHUNK_LIMIT):
        if start + 12 > len(data):
            raise ValueError("its end is missing")
        length = int.from_bytes(view[start : start + 4], "big")
        kind, end = bytes(view[start + 4 : start + 8]), start + 8 + length
        if end + 4 > len(data):
            raise ValueError("its end is missing")
        if kind[:1].isupper() and zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ValueError(f"wrong checksum of chunk {kind.decode('latin-1')} at byte {start}")
        if kind == b"IEND":
            return
        start = end + 4
    raise ValueError(f"more than {_CHUNK_LIMIT} chunks")


def check_gif(data: bytearray) -> None:
    """The first frame must begin within `HEADER_LIMIT`: Pillow goes through comments piece by piece.

    Layout: 13 bytes and a palette, then blocks. A "!" begins an extension of sub-blocks, a "," a frame.
    """
    position = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0)
    pieces = 0
    while data[position : position + 1] == b"!" and pieces <= _CHUNK_LIMIT:
        position += 2
        while position < len(data) and data[position] and pieces <= _CHUNK_LIMIT:
            position, pieces = position + 1 + data[position], pieces + 1
        position, pieces = position + 1, pieces + 1
    if data[position : position + 1] != b",":
        raise ValueError(f"no frame within its first {min(position, len(data))} bytes")


def check_tiff(file: BinaryIO, size: int) -> None:
    """The first directory's tags must fit into the file together, and be numbers of a sane count each.

    Tags may overlap and point anywhere, so a file of a megabyte could hold a hundred tags of a megabyte each. Layout:
    byte order, version (42, or 43 for BigTIFF), offset of a directory; it has a count and entries of tag, type, count
    and value or offset.
    """
    file.seek(0)
    head = file.read(16)
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    big = 43 in head[2:4]
    directories, total, seen = [int.from_bytes(head[8:16] if big else head[4:8], order)], 0, 0
    while directories and seen < 4:
        file.seek(min(directories.pop(), size))
        seen += 1
        count = int.from_bytes(file.read(8 if big else 2), order)
        if count > 65535:
            raise ValueError(f"a directory of {count} tags")
        entry, width = (20, 8) if big else (12, 4)
        entries = file.read(count * entry)
        for start in range(0, len(entries) - entry + 1, entry):
            tag, kind = (int.from_bytes(entries[start + at : start + at + 2], order) for at in (0, 2))
            values = int.from_bytes(entries[start + 4 : start + 4 + width], order)
            total += values * _TAG_SIZES.get(kind, 1)
            if total > size or (values > TAG_LIMIT and kind in _TAG_SIZES):
                raise ValueError(f"tag {tag} claims {values} values")
            if tag in _POINTER_TAGS:
                directories.append(int.from_bytes(entries[start + 4 + width : start + entry], order))
    file.seek(0)


def tile_pixels(tags: Mapping[int, Any]) -> int:
    """Pixels of a TIFF's tile, whose sides the tags 322 and 323 tell; 0 if it has strips, which its size bounds."""
    width, height = tags.get(322, 0), tags.get(323, 0)
    return width * height if isinstance(width, int) and isinstance(height, int) else 0
