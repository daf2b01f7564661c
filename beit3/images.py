"""Pictures from files: decoded with every check a hostile file calls for, screened in bulk, normalised on the device.

Nothing here knows what a picture is for; `beit3.augmentation` turns decoded pictures into inputs of the model.
"""

from __future__ import annotations

import io
import os
import stat
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torchvision  # noqa: F401  registers torch.ops.image
from PIL import Image, ImageFile, UnidentifiedImageError

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}  # ending of a name → what must be inside
PIXEL_LIMIT = 50_000_000  # pixels; COCO's largest picture has 0.4 million, today's cameras reach 50 million
SCREEN_LIMIT = 20  # a folder with this many bad pictures needs mending, not a longer list

_BYTES_PER_PIXEL = 8  # uncompressed 16-bit RGBA, more than any honest file of the formats above needs
_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"
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
        path: a JPEG, PNG or WebP file whose name ends accordingly.
        pixel_limit: width x height that the header may announce, in pixels.

    Returns:
        uint8 (3, H, W), RGB, stored as (H, W, 3). The pixels are those of Pillow's `convert("RGB")`: transparency is
        dropped, the orientation noted in EXIF is not applied (as in the original's loader). One thing differs: of
        16-bit grey pictures the high byte is taken, where Pillow clips nearly everything to white.

    Raises:
        ImageError: the file is missing or no plain file, of another format than its name says, over the pixel limit,
            truncated or corrupt. Memory stays bounded by the pixel limit whatever the file claims.
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
    ending = os.path.splitext(path)[1].lower()
    if ending not in FORMATS:
        raise ImageError(path, f"a picture's name must end in one of {', '.join(FORMATS)}")
    too_large = f"more pixels than the limit of {pixel_limit / 1e6:g} megapixels"
    try:
        image = Image.open(io.BytesIO(data), formats=sorted(set(FORMATS.values())))
    except UnidentifiedImageError as error:
        start = bytes(data[:8])
        raise ImageError(path, f"not a JPEG, PNG or WebP picture, or its header is corrupt: {start!r}…") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # Pillow's own, higher limit
        raise ImageError(path, too_large) from error
    except Exception as error:  # as in decode_image
        raise ImageError(path, f"corrupt header ({_first_line(error)})") from error
    if image.format == "MPO":  # a JPEG with further pictures behind it, as some cameras write
        image.format = "JPEG"
    if image.format != FORMATS[ending]:
        raise ImageError(path, f"holds {image.format} data, which its name denies: rename or convert it")
    if image.width * image.height > pixel_limit:
        raise ImageError(path, f"{image.width}x{image.height}, {too_large}")
    return image


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
    if image.mode.startswith("I"):  # 16-bit grey
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
    """Whether the first and last bytes are those of a whole picture of the format that the name says."""
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return False
        size, descriptor = status.st_size, os.open(file, os.O_RDONLY)
        try:
            head, tail = os.pread(descriptor, 24, 0), os.pread(descriptor, 12, max(0, size - 12))
        finally:
            os.close(descriptor)
    except OSError:
        return False
    wanted = FORMATS.get(os.path.splitext(file)[1].lower())
    if wanted == "JPEG":
        return head.startswith(_JPEG_START) and tail.endswith(_JPEG_END)
    if wanted == "PNG":  # its first chunk is the header, so the size lies at a fixed place
        width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
        return head.startswith(_PNG_START) and tail == _PNG_END and 0 < width * height <= PIXEL_LIMIT
    if wanted == "WEBP":
        return head[:4] == b"RIFF" and head[8:12] == b"WEBP" and int.from_bytes(head[4:8], "little") + 8 == size
    return False


def _per_channel(value: float | Sequence[float], device: torch.device) -> float | torch.Tensor:
    """The value for the range [0, 255], fit to meet (B, 3, H, W)."""
    if isinstance(value, (int, float)):
        return 255.0 * value  # stays a number: nothing to copy to the device
    return torch.tensor([255.0 * channel for channel in value], device=device).reshape(3, 1, 1)


def _first_line(error: Exception) -> str:
    """What a decoder said, without the source file that torchvision's messages begin with and without later lines."""
    text = str(error).strip().splitlines()
    return (text[0].rsplit(".cpp", 1)[-1].lstrip(":0123456789, ") if text else "") or type(error).__name__
