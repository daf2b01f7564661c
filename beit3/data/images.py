"""Pictures from files: decoded with every check a hostile file calls for, screened in bulk, normalised on the device.

Nothing here knows what a picture is for; `beit3.data.augmentation` turns decoded pictures into inputs of the model.
"""

from __future__ import annotations

import io
import os
import re
import stat
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torchvision  # noqa: F401  registers torch.ops.image
from PIL import Image, ImageFile, UnidentifiedImageError, features

FORMATS = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "BMP": "BMP", "GIF": "GIF", "TIFF": "TIFF", "AVIF": "AVIF"}
"""Pillow's names of the formats that are read → how people write them."""
PIXEL_LIMIT = 50_000_000  # pixels; COCO's largest picture has 0.4 million, today's cameras reach 50 million
SCREEN_LIMIT = 20  # a folder with this many bad pictures needs mending, not a longer list

_BYTES_PER_PIXEL = 8  # uncompressed 16-bit RGBA, more than any honest file of the formats above needs
_JPEG_END = b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"
_GIF_END = b"\x3b"
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
_HEAD = 256  # bytes that tell what a file is
_RGB = 3  # torchvision.io.ImageReadMode.RGB
_CHUNK = 512  # files per job when screening: a job per file would cost more than the check


class ImageError(ValueError):
    """A picture that is missing, refused or undecodable. The message starts with the file and says what is wrong."""

    def __init__(self, path: str | os.PathLike[str], problem: str):
        self.path, self.problem = os.fspath(path), problem
        super().__init__(f"{self.path}: {problem}")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # as itself out of a loader's worker
        return type(self), (self.path, self.problem)


def decode_image(path: str | os.PathLike[str], pixel_limit: int = PIXEL_LIMIT) -> torch.Tensor:
    """Reads and decodes one picture.

    Args:
        path: a JPEG, PNG, WebP, BMP, GIF, TIFF or AVIF file. Its content tells which; its name is of no account, as
            the official data of COCO, NLVR2 and ImageNet hold PNG under .jpg, JPEG under .png and PNG under .JPEG.
            Of several frames or pages it is the first. AVIF is read where Pillow was built with it.
        pixel_limit: width x height that the header may announce, in pixels.

    Returns:
        uint8 (3, H, W), RGB, stored as (H, W, 3). The pixels are those of Pillow's `convert("RGB")`: transparency is
        dropped, the orientation noted in EXIF is not applied (as in the original's loader). One thing differs: of
        16-bit grey pictures the high byte is taken, where Pillow clips nearly everything to white.

    Raises:
        ImageError: the file is missing or no plain file, of none of these formats, over the pixel limit, truncated or
            corrupt. Memory stays bounded by the pixel limit whatever the file claims.
    """
    data = _read(path, byte_limit=_BYTES_PER_PIXEL * pixel_limit)
    image = _open(path, data, pixel_limit)  # parses the header only
    try:
        if image.format == "JPEG" and image.mode in ("RGB", "L") and _jpeg_decoder is not None:
            return _jpeg_decoder(torch.frombuffer(data, dtype=torch.uint8), _RGB, False)
        if image.format == "PNG":
            _check_png_chunks(data)
        return _decode_with_pillow(image)
    except Exception as error:  # whatever a decoder throws at corrupt data, from zlib.error to IndexError
        raise ImageError(path, f"truncated or corrupt {image.format} data ({_first_line(error)})") from error


def screen_images(
    paths: Sequence[str], data_path: str | os.PathLike[str] = "", workers: int = 8, limit: int = SCREEN_LIMIT
) -> list[str]:
    """Looks through many pictures before a training starts, so that it does not die of one after hours.

    The check is cheap: each must exist and have the right first and last bytes. Those that do not are decoded, and
    only what really cannot be is reported; a file damaged in its middle is found when it is loaded. 120,000 pictures
    on a local disk take a few seconds.

    Args:
        paths: names relative to `data_path`, best without repeats.
        workers: threads; they help where a file system takes its time to answer.
        limit: the screening stops at this many problems.

    Returns:
        up to `limit` problems, each naming its file, in the order of `paths`; empty if all is well.
    """
    folder = os.fspath(data_path)
    files = [os.path.join(folder, path) for path in paths]
    pool = ThreadPoolExecutor(max(1, workers))
    problems: list[str] = []
    try:
        jobs: list[Future[list[str]]] = [
            pool.submit(_screen_chunk, files[start : start + _CHUNK], limit) for start in range(0, len(files), _CHUNK)
        ]
        for job in jobs:
            problems += job.result()
            if len(problems) >= limit:
                break
    finally:
        pool.shutdown(cancel_futures=True)
    return problems[:limit]


def normalize(
    images: torch.Tensor,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """uint8 (B, 3, H, W) → `dtype` of the same shape and device, (value / 255 - mean) / std: range [-1, 1] by default.

    Computed in fp32 and rounded to `dtype` once. `mean` and `std` are for the range [0, 1], one value or one per
    channel.
    """
    assert images.dtype == torch.uint8, f"expected uint8 pictures, got {images.dtype}"
    center, spread = (_per_channel(value, images.device) for value in (mean, std))  # number or (3, 1, 1)
    return images.to(torch.float32).sub_(center).div_(spread).to(dtype)


def _find_jpeg_decoder() -> Callable[[torch.Tensor, int, bool], torch.Tensor] | None:
    """torchvision's JPEG decoder, a third faster than Pillow's; None where a release of torchvision has none.

    Taken from beneath `torchvision.io.decode_jpeg` because that warns at every call since torchvision 0.29: it is to
    be removed one day. Pillow does the work then.
    """
    try:
        return torch.ops.image.decode_jpeg
    except (AttributeError, RuntimeError):
        return None


_jpeg_decoder = _find_jpeg_decoder()


def _read(path: str | os.PathLike[str], byte_limit: int) -> bytearray:
    """The bytes of a plain file of at most `byte_limit` bytes."""
    try:
        status = os.stat(path)  # before opening: opening a pipe would wait for ever
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(path, "not a file")
        if status.st_size == 0:
            raise ImageError(path, "empty file")
        if status.st_size > byte_limit:
            raise ImageError(path, f"file of {status.st_size} bytes, more than the {byte_limit} a picture may have")
        data = bytearray(status.st_size)
        with open(path, "rb") as file:
            del data[file.readinto(data) :]
    except OSError as error:
        raise ImageError(path, error.strerror or str(error)) from error
    return data


def _open(path: str | os.PathLike[str], data: bytearray, pixel_limit: int) -> Image.Image:
    """The picture with its header read and judged, its pixels still undecoded."""
    head = bytes(data[:_HEAD])
    format = _format_of(head)
    if format is None:
        raise ImageError(path, f"not a {_known_formats()} picture but {_describe_stranger(head)}")
    if format == "AVIF" and not features.check("avif"):
        raise ImageError(path, "an AVIF picture, which the installed Pillow cannot read: install Pillow 11.3 or newer")
    too_large = f"more pixels than the limit of {pixel_limit / 1e6:g} megapixels"
    try:
        image = Image.open(io.BytesIO(data), formats=[format])
    except UnidentifiedImageError as error:
        raise ImageError(path, f"begins as {FORMATS[format]} data but its header is corrupt: {head[:16]!r}…") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # Pillow's own, higher limit
        raise ImageError(path, too_large) from error
    except Exception as error:  # as in decode_image
        raise ImageError(path, f"corrupt header of {FORMATS[format]} data ({_first_line(error)})") from error
    image.format = format  # Pillow says MPO of a JPEG with further pictures behind it, as some cameras write
    if image.width * image.height > pixel_limit:
        raise ImageError(path, f"{image.width}x{image.height}, {too_large}")
    return image


def _format_of(head: bytes) -> str | None:
    """Pillow's name of the format that a file with these first bytes has; None if it is none that is read."""
    for format, start in _STARTS.items():
        if re.match(start, head, re.DOTALL):
            return format
    return None


def _known_formats() -> str:
    *names, last = FORMATS.values()
    return f"{', '.join(names)} or {last}"


def _describe_stranger(head: bytes) -> str:
    """What a file of no known format seems to be, and its first bytes."""
    for start, name in _STRANGERS.items():
        if re.match(start, head, re.DOTALL):
            return f"{name}: {head[:16]!r}…"
    return f"something else: {head[:16]!r}…"


def _check_png_chunks(data: bytearray) -> None:
    """Raises ValueError unless every critical chunk up to the last is there and sound.

    Pillow stops looking once it has enough pixels, right or wrong. Layout: PNG specification, section 5.3.
    """
    view, start = memoryview(data), len(_PNG_START)
    while start + 12 <= len(data):
        length = int.from_bytes(view[start : start + 4], "big")
        kind, end = bytes(view[start + 4 : start + 8]), start + 8 + length
        if end + 4 > len(data):
            break
        if kind[:1].isupper() and zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ValueError(f"wrong checksum of chunk {kind.decode('latin-1')} at byte {start}")
        if kind == b"IEND":
            return
        start = end + 4
    raise ValueError("its end is missing")


def _decode_with_pillow(image: Image.Image) -> torch.Tensor:
    """uint8 (3, H, W), stored as (H, W, 3); for what torchvision does not decode, or not to RGB of 8 bits."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # other libraries switch it on for the whole process
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # 16-bit grey
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        pixels = np.repeat(grey[:, :, None], 3, axis=2)
    elif image.mode == "P" and "transparency" in image.info:
        pixels = np.array(image.convert("RGBA").convert("RGB"))  # same colours; Pillow warns about the direct way
    else:
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _screen_chunk(files: Sequence[str], limit: int) -> list[str]:
    """Problems of the first `limit` bad files."""
    problems: list[str] = []
    for file in files:
        if _looks_whole(file):
            continue
        try:
            decode_image(file)
        except ImageError as error:
            problems.append(str(error))
            if len(problems) == limit:
                break
    return problems


def _looks_whole(file: str) -> bool:
    """Whether the first and last bytes are those of a whole picture of one format."""
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return False
        size, descriptor = status.st_size, os.open(file, os.O_RDONLY)
        try:
            head, tail = os.pread(descriptor, 32, 0), os.pread(descriptor, 12, max(0, size - 12))
        finally:
            os.close(descriptor)
    except OSError:
        return False
    format = _format_of(head)
    if format == "JPEG":
        return tail.endswith(_JPEG_END)
    if format == "PNG":  # its first chunk is the header, so the size lies at a fixed place
        width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
        return tail == _PNG_END and 0 < width * height <= PIXEL_LIMIT
    if format == "WEBP":
        return int.from_bytes(head[4:8], "little") + 8 == size
    if format == "GIF":
        width, height = int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little")
        return tail.endswith(_GIF_END) and 0 < width * height <= PIXEL_LIMIT
    return False  # the others are decoded: their ends tell nothing, and collections of them are rare


def _per_channel(value: float | Sequence[float], device: torch.device) -> float | torch.Tensor:
    """The value for the range [0, 255], fit to meet (B, 3, H, W)."""
    if isinstance(value, (int, float)):
        return 255.0 * value  # stays a number: nothing to copy to the device
    return torch.tensor([255.0 * channel for channel in value], device=device).reshape(3, 1, 1)


def _first_line(error: Exception) -> str:
    """What a decoder said, without the source file that torchvision's messages begin with and without later lines."""
    text = str(error).strip().splitlines()
    return (text[0].rsplit(".cpp", 1)[-1].lstrip(":0123456789, ") if text else "") or type(error).__name__
