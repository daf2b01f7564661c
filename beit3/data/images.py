"""Pictures from files: decoded with every check a hostile file calls for, screened in bulk, normalised on the device.

Nothing here knows what a picture is for; `beit3.data.augmentation` turns decoded pictures into inputs of the model.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import stat
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError, features

from beit3.data import decoder_warnings
from beit3.data.picture_files import (
    FORMATS,
    HEAD,
    HEADER_LIMIT,
    CutOff,
    check_gif,
    check_jpeg,
    check_png,
    check_tiff,
    describe_stranger,
    format_of,
    tile_pixels,
)
from beit3.system.errors import printable

PIXEL_LIMIT = 50_000_000  # pixels; COCO's largest picture has 0.4 million, today's cameras reach 50 million
SIDE_LIMIT = 65_535  # pixels, as in JPEG; resizing needs memory in proportion to the height, whatever the width
SCREEN_LIMIT = 20  # a folder with this many bad pictures needs mending, not a longer list

_BYTES_PER_PIXEL = 8  # uncompressed 16-bit RGBA, more than any honest file of the formats above needs
_JPEG_END, _PNG_END, _GIF_END = b"\xff\xd9", b"\x00\x00\x00\x00IEND\xaeB`\x82", b"\x3b"
_FIRST = HEADER_LIMIT + (1 << 17)  # bytes that are read before a large file is judged
_RGB = 3  # torchvision.io.ImageReadMode.RGB
_SCREEN_HEAD = 1 << 14  # bytes; the size of nearly every JPEG stands in them, behind a preview at most
_SCREEN_BYTES = 1 << 22  # a progressive JPEG of more is left to the loading
_ORIENTATION = 0x0112  # tag of EXIF
# Orientation of EXIF → whether rows and columns change places, and what is flipped then: -1 left-right, -2 upside down.
_TURNS = {
    1: (False, []), 2: (False, [-1]), 3: (False, [-1, -2]), 4: (False, [-2]),
    5: (True, []), 6: (True, [-1]), 7: (True, [-1, -2]), 8: (True, [-2]),
}  # fmt: skip
_CHUNK = 512  # files per job when screening: a job per file would cost more than the check


class ImageError(ValueError):
    """A picture that is missing, refused or undecodable. The message starts with the file and says what is wrong.

    Both come from a stranger's file, so the message shows their control characters as escapes.
    """

    def __init__(self, path: str | os.PathLike[str], problem: str):
        self.path, self.problem = os.fspath(path), problem
        super().__init__(printable(f"{self.path}: {problem}"))

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # as itself out of a loader's worker
        return type(self), (self.path, self.problem)


def decode_image(path: str | os.PathLike[str], pixel_limit: int = PIXEL_LIMIT, upright: bool = False) -> torch.Tensor:
    """Reads and decodes one picture.

    Args:
        path: a JPEG, PNG, WebP, BMP, GIF, TIFF or AVIF file. Its content tells which; its name is of no account, as
            the official data of COCO, NLVR2 and ImageNet hold PNG under .jpg, JPEG under .png and PNG under .JPEG.
            Of several frames or pages it is the first. AVIF is read where Pillow was built with it.
        pixel_limit: width x height that the header may announce, in pixels; each side may have `SIDE_LIMIT`.
        upright: turn the picture as its EXIF data say, as phones want it. Data sets leave it as it is stored, as the
            original's loader does.

    Returns:
        uint8 (3, H, W), RGB. The pixels are those of Pillow's `convert("RGB")`, stored as (H, W, 3): transparency is
        dropped, the orientation noted in EXIF is not applied without `upright` (Pillow applies a TIFF's).
        One thing differs: of 16-bit grey pictures the high byte is taken, where older releases of Pillow clip nearly
        everything to white. A damaged JPEG that Pillow reads is read; what libjpeg said of it goes to the log, see
        `beit3.data.decoder_warnings`. Damage that libjpeg does not notice shows as wrong colours without a word.

    Raises:
        ImageError: the file is missing or no plain file, of none of these formats, over a limit, truncated or corrupt.
            Memory stays bounded by the pixel limit whatever the file claims.
    """
    try:
        with _open_file(path, byte_limit=_BYTES_PER_PIXEL * pixel_limit) as file:
            return _decode(path, file, pixel_limit, upright)
    except OSError as error:
        raise ImageError(path, error.strerror or str(error)) from error


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
    be removed one day. Pillow does the work then. Its library alone is loaded, as `import torchvision` takes longer
    than PyTorch itself.
    """
    found = importlib.util.find_spec("torchvision")  # looks for it, does not import it
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        for library in sorted(Path(folder).glob("image*.so")):
            try:
                torch.ops.load_library(str(library))
                return torch.ops.image.decode_jpeg
            except (AttributeError, OSError, RuntimeError):  # of another PyTorch, or without the decoder
                continue
    return None


_jpeg_decoder = _find_jpeg_decoder()
# Pillow warns of harmless oddities (a wrong note in a TIFF) without naming a file; what is not harmless it raises.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def _open_file(path: str | os.PathLike[str], byte_limit: int) -> io.FileIO:
    """A plain file of at most `byte_limit` bytes, open and not buffered."""
    status = os.stat(path)  # before opening: opening a pipe would wait for ever
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(path, "not a file")
    if status.st_size == 0:
        raise ImageError(path, "empty file")
    if status.st_size > byte_limit:
        raise ImageError(path, f"file of {status.st_size} bytes, more than the {byte_limit} a picture may have")
    return io.FileIO(path)


def _decode(path: str | os.PathLike[str], file: io.FileIO, pixel_limit: int, upright: bool) -> torch.Tensor:
    size = os.fstat(file.fileno()).st_size
    data = _read(file, min(size, _FIRST))
    format = format_of(data[:HEAD])
    if format is None:
        raise ImageError(path, describe_stranger(bytes(data[:HEAD])))
    if format == "AVIF" and not features.check("avif"):
        raise ImageError(path, "an AVIF picture, which the installed Pillow cannot read: install Pillow 11.3 or newer")
    try:
        data, source = _check_structure(format, data, file, size)
        image = _open(path, format, source, pixel_limit)  # parses the header only
        if format == "TIFF":  # libtiff writes to standard error too
            with decoder_warnings.listen(path):
                return pixels_of(image)
        by_torchvision = format == "JPEG" and image.mode in ("RGB", "L") and _jpeg_decoder is not None
        pixels = _decode_jpeg(path, data, image) if by_torchvision else pixels_of(image)
        # Afterwards: to read the notes of a PNG Pillow decodes it, and passes over what is damaged.
        return turned(pixels, orientation_of(image)) if upright else pixels
    except ImageError:
        raise
    except Exception as error:  # whatever a decoder throws at corrupt data, from zlib.error to IndexError
        raise ImageError(path, f"truncated or corrupt {FORMATS[format]} data ({_first_line(error)})") from error


def _read(file: io.FileIO, count: int) -> bytearray:
    """The next `count` bytes, fewer where the file ends."""
    data = bytearray(count)
    view, filled = memoryview(data), 0
    while filled < count and (more := file.readinto(view[filled:])):
        filled += more
    view.release()
    del data[filled:]
    return data


def _check_structure(format: str, data: bytearray, file: io.FileIO, size: int) -> tuple[bytearray, BinaryIO]:
    """(what of the file is in memory, what a decoder may read from), after the checks of `beit3.data.picture_files`."""
    if format == "JPEG":
        width, height, _ = check_jpeg(data)
        if size > len(data):  # what lies behind the picture, films of phones among them, is not read
            data += _read(file, min(size, len(data) + _BYTES_PER_PIXEL * width * height) - len(data))
            check_jpeg(data)
        return data, io.BytesIO(data)
    if format in ("PNG", "WEBP", "AVIF"):  # their decoders want the whole file in any case
        data += _read(file, size - len(data))
        if format == "PNG":
            check_png(data)
        return data, io.BytesIO(data)
    source = io.BytesIO(data) if len(data) == size else io.BufferedReader(file)
    if format == "GIF":
        check_gif(data)
    if format == "TIFF":
        check_tiff(source, size)
    source.seek(0)
    return data, source


def _open(path: str | os.PathLike[str], format: str, source: BinaryIO, pixel_limit: int) -> Image.Image:
    """The picture with its header read and judged, its pixels still undecoded."""
    too_large = f"more pixels than the limit of {pixel_limit / 1e6:g} megapixels"
    try:
        image = Image.open(source, formats=[format])
    except UnidentifiedImageError as error:
        source.seek(0)
        start = source.read(16)
        raise ImageError(path, f"begins as {FORMATS[format]} data but its header is corrupt: {start!r}…") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # Pillow's own, higher limit
        raise ImageError(path, too_large) from error
    except Exception as error:  # as in _decode
        raise ImageError(path, f"corrupt header of {FORMATS[format]} data ({_first_line(error)})") from error
    image.format = format  # Pillow says MPO of a JPEG with further pictures behind it, as some cameras write
    if image.width * image.height > pixel_limit:
        raise ImageError(path, f"{image.width}x{image.height}, {too_large}")
    if max(image.size) > SIDE_LIMIT:
        raise ImageError(path, f"{image.width}x{image.height}, more than the {SIDE_LIMIT} pixels that a side may have")
    if format == "TIFF" and tile_pixels(image.tag_v2) > pixel_limit:  # type: ignore[attr-defined]
        raise ImageError(path, f"a tile of {too_large}")
    return image


def _decode_jpeg(path: str | os.PathLike[str], data: bytearray, image: Image.Image) -> torch.Tensor:
    """By torchvision; what that refuses and Pillow reads is read, as Pillow is what others load their pictures with."""
    assert _jpeg_decoder is not None
    try:
        with decoder_warnings.listen(path):
            return _jpeg_decoder(torch.frombuffer(data, dtype=torch.uint8), _RGB, False)
    except RuntimeError as error:
        refusal = error
    try:
        pixels = pixels_of(image)
    except Exception:
        raise refusal from None  # its words say more
    decoder_warnings.tell(path, [_first_line(refusal)])
    return pixels


def orientation_of(image: Image.Image) -> int:
    """1-8 as in EXIF, 1 = upright; 1 where nothing or nonsense is noted."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # notes that are damaged; the picture need not be
        return 1
    return orientation if orientation in _TURNS else 1


def turned(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """(3, H, W) → the upright picture, (3, H, W) or (3, W, H). orientation: see `orientation_of`."""
    transpose, flips = _TURNS[orientation]
    if transpose:
        pixels = pixels.mT
    return pixels.flip(flips) if flips else pixels


def pixels_of(image: Image.Image) -> torch.Tensor:
    """A picture of Pillow's as uint8 (3, H, W), stored as (H, W, 3), RGB."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # other libraries switch it on for the whole process
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # 16-bit grey
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        pixels = np.repeat(grey[:, :, None], 3, axis=2)
    elif image.mode == "P" and "transparency" in image.info:
        pixels = np.array(image.convert("RGBA").convert("RGB"))  # same colours; Pillow warns about the direct way
    else:
        pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))  # converting would copy it
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
    """Whether the first and last bytes are those of a whole picture of one format, of a size within the limits."""
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return False
        size, descriptor = status.st_size, os.open(file, os.O_RDONLY)
        try:
            head = os.pread(descriptor, _SCREEN_HEAD, 0)
            tail = os.pread(descriptor, 12, max(0, size - 12)) if size > len(head) else head[-12:]
            format = format_of(head)
            if format == "JPEG":
                return tail.endswith(_JPEG_END) and _jpeg_header_is_sound(head, descriptor, size)
        finally:
            os.close(descriptor)
    except OSError:
        return False
    if format == "PNG":  # its first chunk is the header, so the size lies at a fixed place
        width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
        return tail == _PNG_END and _within_limits(width, height)
    if format == "WEBP":
        return int.from_bytes(head[4:8], "little") + 8 == size
    if format == "GIF":
        width, height = int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little")
        return tail.endswith(_GIF_END) and _within_limits(width, height)
    return False  # the others are decoded: their ends tell nothing, and collections of them are rare


def _jpeg_header_is_sound(head: bytes, descriptor: int, size: int) -> bool:
    """Whether a JPEG's size is within the limits and its scans are not too many; True where `head` does not tell."""
    try:
        width, height, progressive = check_jpeg(head)
        if progressive and len(head) < size <= _SCREEN_BYTES:
            check_jpeg(os.pread(descriptor, size, 0))  # counts the scans
    except CutOff:
        return len(head) < size  # it holds a preview or a colour profile of some size
    except ValueError:
        return False
    return _within_limits(width, height)


def _within_limits(width: int, height: int) -> bool:
    return 0 < width * height <= PIXEL_LIMIT and max(width, height) <= SIDE_LIMIT


def _per_channel(value: float | Sequence[float], device: torch.device) -> float | torch.Tensor:
    """The value for the range [0, 255], fit to meet (B, 3, H, W)."""
    if isinstance(value, (int, float)):
        return 255.0 * value  # stays a number: nothing to copy to the device
    return torch.tensor([255.0 * channel for channel in value], device=device).reshape(3, 1, 1)


def _first_line(error: Exception) -> str:
    """What a decoder said, without the source file that torchvision's messages begin with and without later lines."""
    text = str(error).strip().splitlines()
    line = text[0] if text else ""
    if ".cpp" in line:
        line = line.rsplit(".cpp", 1)[-1].lstrip(":0123456789, ")
    return line or type(error).__name__
