"""Pictures are decoded as Pillow does it, whatever their names; hostile and broken files are refused by name."""

from __future__ import annotations

import io
import logging
import os
import pickle
import re
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, features

from beit3.data import decoder_warnings, images
from beit3.data.augmentation import resize
from beit3.data.images import ImageError, decode_image, normalize, screen_images
from beit3.system.errors import printable
from runs.session import tell_of_damaged_pictures
from utils import Process


def _gradient(width: int = 40, height: int = 30) -> Image.Image:
    """Smooth, so that JPEG keeps it, and different in every direction and channel."""
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 255 // (width + height - 2)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def _save(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def _by_pillow(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1).astype(int)


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, depth: int, color_type: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(kind, content) for kind, content in chunks)


KINDS = {
    "rgb.jpg": ("RGB", {"quality": 90}),
    "progressive.jpeg": ("RGB", {"quality": 90, "progressive": True}),
    "grey.jpg": ("L", {"quality": 90}),
    "cmyk.jpg": ("CMYK", {"quality": 90}),
    "UPPER.JPG": ("RGB", {"quality": 90, "format": "JPEG"}),
    "rgb.png": ("RGB", {}),
    "transparent.png": ("RGBA", {}),
    "palette.png": ("P", {}),
    "palette_transparent.png": ("P", {"transparency": bytes(range(256))}),
    "grey.png": ("L", {}),
    "grey_transparent.png": ("LA", {}),
    "two_tone.png": ("1", {}),
    "lossy.webp": ("RGB", {"quality": 80}),
    "lossless.webp": ("RGBA", {"lossless": True}),
    "rgb.bmp": ("RGB", {}),
    "palette.bmp": ("P", {}),
    "two_tone.bmp": ("1", {}),
    "still.gif": ("P", {}),
    "transparent.gif": ("P", {"transparency": 7}),
    "moving.GIF": ("RGB", {"format": "GIF", "save_all": True, "append_images": [Image.new("RGB", (40, 30))]}),
    "moving.webp": ("RGB", {"lossless": True, "save_all": True, "append_images": [Image.new("RGB", (40, 30))]}),
    "moving.png": ("RGB", {"save_all": True, "append_images": [Image.new("RGB", (40, 30))]}),
    "raw.tif": ("RGB", {}),
    "lzw.TIFF": ("RGB", {"format": "TIFF", "compression": "tiff_lzw"}),
    "deflate.tiff": ("RGBA", {"compression": "tiff_adobe_deflate"}),
    "jpeg.tiff": ("RGB", {"compression": "jpeg"}),
    "two_tone.tiff": ("1", {"compression": "group4"}),
    "cmyk.tiff": ("CMYK", {}),
    "float.tiff": ("F", {}),
    "pages.tiff": ("RGB", {"save_all": True, "append_images": [Image.new("RGB", (40, 30))]}),
    "two_views.jpg": ("RGB", {"format": "MPO", "save_all": True, "append_images": [Image.new("RGB", (40, 30))]}),
}


# How pictures are named in the official data of COCO, NLVR2 and ImageNet, and in other people's folders.
MISNAMED = {
    "COCO_val2014_000000320612.jpg": ("PNG", "RGB", {}),
    "dev-850-0-img0.png": ("JPEG", "RGB", {}),
    "n02105855_2933.JPEG": ("PNG", "RGB", {}),
    "n02077923_14822.JPEG": ("JPEG", "CMYK", {}),
    "palette.jpg": ("PNG", "P", {"transparency": bytes(range(256))}),
    "web.jpg": ("WEBP", "RGB", {"lossless": True}),
    "moving.jpg": ("GIF", "RGB", {}),
    "scan.png": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "bitmap.webp": ("BMP", "RGB", {}),
    "no_ending": ("JPEG", "RGB", {}),
    "photo.2014.backup": ("PNG", "RGB", {}),
    ".hidden": ("GIF", "RGB", {}),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", MISNAMED)
def test_the_content_tells_the_format_and_the_name_is_of_no_account(tmp_path, name):
    format, mode, options = MISNAMED[name]
    path = _save(tmp_path / name, _gradient().convert(mode), format=format, **options)
    difference = np.abs(decode_image(path).numpy().astype(int) - _by_pillow(path)).max()
    assert difference <= (1 if format == "JPEG" else 0)
    assert screen_images([name], tmp_path) == []


def test_a_ycck_jpeg_has_pillows_pixels(tmp_path):
    path = _save(tmp_path / "a.jpg", _gradient().convert("CMYK"))
    content = bytearray(path.read_bytes())
    content[content.index(b"Adobe") + 11] = 2  # the note of Adobe's that says YCCK instead of CMYK
    as_cmyk = decode_image(path)
    path.write_bytes(content)
    assert np.array_equal(decode_image(path).numpy(), _by_pillow(path))
    assert not torch.equal(decode_image(path), as_cmyk)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
def test_avif_is_read_under_any_name(tmp_path):
    path = _save(tmp_path / "a.jpg", _gradient(), format="AVIF")
    assert np.array_equal(decode_image(path).numpy(), _by_pillow(path))


def test_avif_without_pillows_help_is_refused_saying_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(images.features, "check", lambda name: False)
    path = tmp_path / "a.avif"
    path.write_bytes(b"\0\0\0\x1cftypavif" + bytes(100))
    with pytest.raises(ImageError, match="an AVIF picture, which the installed Pillow cannot read"):
        decode_image(path)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # Pillow's, about the test's own decoding
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_picture_has_the_pixels_that_pillow_sees(tmp_path, name):
    mode, options = KINDS[name]
    path = _save(tmp_path / name, _gradient().convert(mode), **options)
    pixels = decode_image(path)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 30, 40)
    assert pixels.permute(1, 2, 0).is_contiguous()  # resizing is fast on this layout only
    assert np.abs(pixels.numpy().astype(int) - _by_pillow(path)).max() <= (1 if mode in ("RGB", "L") else 0)


def test_jpegs_are_decoded_by_torchvision_and_without_it_by_pillow_to_the_same_pixels(tmp_path, monkeypatch):
    path = _save(tmp_path / "a.jpg", _gradient())
    calls = []
    decoder = images._jpeg_decoder
    monkeypatch.setattr(images, "_jpeg_decoder", lambda *arguments: calls.append(1) or decoder(*arguments))
    fast = decode_image(path)
    assert calls == [1]
    monkeypatch.setattr(images, "_jpeg_decoder", None)
    assert (decode_image(path).int() - fast.int()).abs().max() <= 1


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path):
    rows = b"".join(b"\x00" + struct.pack(">3H", *row) for row in [(0, 255, 256), (0x1234, 0x8000, 0xFFFF)])
    (tmp_path / "deep.png").write_bytes(_png(3, 2, 16, 0, rows))
    expected = torch.tensor([[0, 0, 1], [0x12, 0x80, 0xFF]], dtype=torch.uint8)
    assert torch.equal(decode_image(tmp_path / "deep.png"), expected.expand(3, 2, 3))


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_sixteen_bit_grey_tiff_keeps_its_high_byte(tmp_path, byte_order):
    values = np.array([[0, 255, 256], [0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    mode = "I;16" if byte_order == "<" else "I;16B"
    image = Image.frombytes(mode, (3, 2), values.astype(f"{byte_order}u2").tobytes())
    path = _save(tmp_path / "deep.tif", image)
    expected = torch.tensor([[0, 0, 1], [0x12, 0x80, 0xFF]], dtype=torch.uint8)
    assert torch.equal(decode_image(path), expected.expand(3, 2, 3))


def test_the_orientation_in_exif_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90°"
    path = _save(tmp_path / "turned.jpg", _gradient(), exif=exif)
    assert decode_image(path).shape == (3, 30, 40)
    assert np.abs(decode_image(path).numpy().astype(int) - _by_pillow(path)).max() <= 1


@pytest.mark.parametrize(
    "make, problem",
    [
        (lambda path: None, "No such file"),
        (lambda path: path.write_bytes(b""), "empty file"),
        (lambda path: path.mkdir(), "not a file"),
        (lambda path: os.mkfifo(path), "not a file"),  # and does not wait for a writer
        (lambda path: path.write_bytes(b"no picture at all"), "not a JPEG, .* but something else: b.no p"),
        (lambda path: path.write_bytes(b"\n<!DOCTYPE html><html>404"), "but an HTML page"),
        (lambda path: path.write_bytes(b"<?xml version='1.0'?>\n<svg/>"), "but an SVG drawing"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "but a Git LFS pointer"),
        (lambda path: path.write_bytes(bytes(1000)), "but zeros"),
        (lambda path: path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(100)), "but a HEIC picture"),
        (lambda path: _gradient().save(path, "JPEG2000"), "but a JPEG 2000 picture"),
        (lambda path: _gradient().save(path, "EPS"), "but a PostScript file"),
        (lambda path: _gradient().save(path, "PDF"), "but a PDF file"),
        (lambda path: _gradient().save(path, "PPM"), "but a netpbm picture"),
        (lambda path: _gradient().save(path, "ICO"), "but something else"),
        (
            lambda path: path.write_bytes(b"\xff\xd8\xff\xe0 and no more"),
            "JPEG data .its header goes on beyond its end",
        ),
        (lambda path: path.write_bytes(b"BM and no more"), "of BMP data|begins as BMP data but its header is corrupt"),
    ],
)
def test_what_is_no_picture_is_refused_naming_the_file_and_what_it_is(tmp_path, make, problem):
    path = tmp_path / "COCO_1.jpg"
    make(path)
    with pytest.raises(ImageError, match=problem) as caught:
        decode_image(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_the_pixel_limit_is_inclusive(tmp_path):
    path = _save(tmp_path / "a.jpg", _gradient(40, 30))
    assert decode_image(path, pixel_limit=1200).shape == (3, 30, 40)
    with pytest.raises(ImageError, match=r"40x30, more pixels than the limit of 0\.001199 megapixels"):
        decode_image(path, pixel_limit=1199)


def _claiming(format: str, width: int, height: int) -> bytes:
    """A small picture whose header claims another size."""
    if format == "PNG":
        return _png(width, height, 8, 2, b"")
    buffer = io.BytesIO()
    _gradient(16, 16).save(buffer, format, lossless=True)
    data = bytearray(buffer.getvalue())
    if format == "JPEG":
        frame = data.index(b"\xff\xc0")  # start of frame: marker, length 2, precision 1, height 2, width 2
        data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    else:
        bits = data.index(b"VP8L") + 9  # 14 bits of width - 1, 14 of height - 1
        flags = struct.unpack_from("<I", data, bits)[0] >> 28 << 28
        struct.pack_into("<I", data, bits, flags | (height - 1) << 14 | (width - 1))
    return bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "format, width, height",
    [
        ("JPEG", 8000, 8000),
        ("JPEG", 11000, 11000),
        ("JPEG", 60000, 60000),
        ("PNG", 8000, 8000),
        ("PNG", 11000, 11000),
        ("PNG", 2_000_000_000, 2_000_000_000),
        ("WEBP", 8000, 8000),
        ("WEBP", 16383, 16383),
    ],
)  # below and above the limits at which Pillow warns and refuses by itself
def test_a_header_that_claims_too_many_pixels_is_refused_before_decoding(tmp_path, monkeypatch, format, width, height):
    path = tmp_path / f"bomb.{format.lower()}"
    path.write_bytes(_claiming(format, width, height))
    monkeypatch.setattr(images, "_jpeg_decoder", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(images, "pixels_of", lambda _: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="more pixels than the limit of 50 megapixels"):
        decode_image(path)


def test_a_side_has_at_most_65535_pixels_whatever_the_other_is(tmp_path):
    rows = zlib.compress(bytes(2 * 49_000_000), 9)  # a filter and a pixel per row; 95 kB
    header = struct.pack(">IIBBBBB", 1, 49_000_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*chunk) for chunk in chunks)
    (tmp_path / "line.png").write_bytes(content)
    with pytest.raises(ImageError, match="1x49000000, more than the 65535 pixels that a side may have"):
        decode_image(tmp_path / "line.png")
    assert len(screen_images(["line.png"], tmp_path)) == 1
    for size, fits in [((65535, 1), True), ((1, 65535), True), ((65536, 1), False), ((1, 65536), False)]:
        _save(tmp_path / "long.png", Image.new("1", size))
        assert (screen_images(["long.png"], tmp_path) == []) == fits


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's account of memory")
@pytest.mark.parametrize("height, width", [(65535, 1), (65535, 762), (762, 65535), (7000, 7000), (65535, 100)])
def test_resizing_takes_less_than_400_megabytes_for_any_picture_that_is_read(height, width):
    def resident(name: str) -> int:  # kB
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    inside = torch.full((height + 1, width + 1, 3), 7, dtype=torch.uint8).permute(2, 0, 1)[:, 1:, 1:]  # a crop
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    assert (resize(inside, 768, "bicubic") == 7).all()
    assert resident("VmHWM") - before < 400_000


def test_a_huge_file_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "huge.jpg"
    path.touch()
    os.truncate(path, 1 << 40)  # sparse: takes no room
    with pytest.raises(ImageError, match="file of 1099511627776 bytes, more than the 400000000"):
        decode_image(path)


@pytest.mark.parametrize("someone_tolerates_truncation", [False, True])
@pytest.mark.parametrize("name", ["rgb.jpg", "progressive.jpeg", "cmyk.jpg", "rgb.png", "palette.png", "lossy.webp"])
def test_a_truncated_picture_is_refused_wherever_it_is_cut(tmp_path, monkeypatch, name, someone_tolerates_truncation):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", someone_tolerates_truncation)
    mode, options = KINDS[name]
    path = _save(tmp_path / name, _gradient(200, 150).convert(mode), **options)
    whole = path.read_bytes()
    decode_image(path)
    for kept in [1, 20, 100, len(whole) // 2, len(whole) * 9 // 10, len(whole) - 13, len(whole) - 2]:
        path.write_bytes(whole[:kept])
        with pytest.raises(ImageError):
            decode_image(path)


def test_corrupt_png_data_is_refused_saying_what_is_wrong(tmp_path):
    path = _save(tmp_path / "a.png", _gradient(200, 150))
    data = bytearray(path.read_bytes())
    data[100] ^= 1  # in the pixels, whose chunk begins after the signature (8 bytes) and the header (25)
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"a\.png: truncated or corrupt PNG data \(wrong checksum of chunk IDAT at"):
        decode_image(path)


def test_corrupt_jpeg_data_is_refused_with_the_decoders_words(tmp_path):
    path = _save(tmp_path / "a.jpg", _gradient(200, 150))
    data = bytearray(path.read_bytes())
    tables = data.index(b"\xff\xc4")  # Huffman tables: marker, length 2, class and number 1, 16 counts
    data[tables + 5 : tables + 21] = b"\xff" * 16
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"a\.jpg: truncated or corrupt JPEG data \([A-Za-z].*\)$"):
        decode_image(path)


def _jpeg(**options) -> bytes:
    buffer = io.BytesIO()
    _gradient(200, 150).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _tiff(*tags: tuple[int, int, int, int], behind: bytes = b"") -> bytes:
    """Little-endian, of 10 x 10 grey pixels; a tag is (number, type, count, value)."""
    sizes = [(256, 3, 1, 10), (257, 3, 1, 10), (258, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    entries = sorted([*sizes, *tags])
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4) + behind


def _gif_with(blocks: bytes) -> bytes:
    buffer = io.BytesIO()
    _gradient().convert("P").save(buffer, "GIF")
    start = 13 + (3 << (buffer.getvalue()[10] & 7) + 1)  # behind the palette
    return buffer.getvalue()[:start] + blocks + buffer.getvalue()[start:]


def _with_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again until there are `count`."""
    whole = _jpeg(progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:-2] + whole[last:-2] * (count - whole.count(b"\xff\xda")) + b"\xff\xd9"


_TEN_MEGABYTES = 10_000_000
COSTLY = {
    "zeros": (lambda: bytes(_TEN_MEGABYTES), "but zeros"),
    "a start and zeros": (lambda: b"\xff\xd8\xff" + bytes(_TEN_MEGABYTES), "bytes that mean nothing"),
    "a start and fill": (lambda: b"\xff\xd8" + b"\xff" * _TEN_MEGABYTES, "bytes that mean nothing"),
    "many segments": (lambda: _jpeg()[:2] + b"\xff\xfe\x00\x02" * 2001 + _jpeg()[2:], "or 2000 segments"),
    "a long header": (lambda: _jpeg()[:2] + (b"\xff\xe5\xff\xff" + bytes(65533)) * 300 + _jpeg()[2:], "header of more"),
    "400 scans": (lambda: _with_scans(400), "more than 50 scans"),
    "51 scans": (lambda: _with_scans(51), "more than 50 scans"),
    "many chunks": (lambda: _png(9, 9, 8, 0, b"")[:33] + _png_chunk(b"teSt", b"") * 100_001, "more than 100000 chunks"),
    "long comments": (lambda: _gif_with(b"!\xfe" + (b"\xff" + b"a" * 255) * 100_001 + b"\0"), "no frame within"),
    "a GIF of zeros": (lambda: _gif_with(bytes(_TEN_MEGABYTES)), "no frame within its first [0-9]{3} bytes"),
    "many offsets": (lambda: _tiff((273, 4, 1_000_001, 9), behind=bytes(5_000_000)), "tag 273 claims 1000001"),
    "overlapping tags": (lambda: _tiff((40000, 7, 900, 9), (40001, 7, 900, 9), behind=bytes(1000)), "tag 40001 claims"),
    "tags of EXIF": (lambda: _tiff((34665, 4, 1, 86), behind=struct.pack("<HHHII", 1, 1, 7, 9999, 9)), "tag 1 claims"),
    "a huge tile": (
        lambda: _tiff(*[(tag, 4, 1, 40000) for tag in (322, 323)], (324, 4, 1, 9), (325, 4, 1, 9), (259, 3, 1, 8)),
        "a tile of more pixels than",
    ),
}  # small pictures, or none, that would cost a decoder minutes or gigabytes


@pytest.mark.parametrize("name", COSTLY)
def test_a_file_built_to_cost_time_or_memory_never_reaches_a_decoder(tmp_path, monkeypatch, name):
    make, problem = COSTLY[name]
    (tmp_path / "a.jpg").write_bytes(make())
    monkeypatch.setattr(images, "_jpeg_decoder", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(images, "pixels_of", lambda _: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=problem):
        decode_image(tmp_path / "a.jpg")
    if name not in ("a long header", "long comments", "a GIF of zeros"):  # their ends look right; found when loaded
        [found] = screen_images(["a.jpg"], tmp_path)
        assert re.search(problem, found)


def test_what_honest_files_have_much_of_is_read(tmp_path):
    whole = _jpeg()
    (tmp_path / "scans.jpg").write_bytes(_with_scans(50))
    (tmp_path / "profile.jpg").write_bytes(whole[:2] + (b"\xff\xe2\xff\xff" + bytes(65533)) * 200 + whole[2:])
    (tmp_path / "film.jpg").write_bytes(whole + b"\xff\xda" * 1000)  # what phones put behind a picture
    (tmp_path / "odd.jpg").write_bytes(whole[:2] + b"\xff\xff\xff\x00\x01" + whole[2:])
    (tmp_path / "comment.gif").write_bytes(_gif_with(b"!\xfe" + (b"\xff" + b"a" * 255) * 1000 + b"\0"))
    for path in tmp_path.iterdir():
        assert np.abs(decode_image(path).numpy().astype(int) - _by_pillow(path)).max() <= 1
    assert screen_images([path.name for path in tmp_path.iterdir()], tmp_path) == []


def test_behind_a_large_jpeg_only_what_its_picture_needs_is_read(tmp_path, monkeypatch):
    path = tmp_path / "film.jpg"
    path.write_bytes(_jpeg())
    os.truncate(path, 300_000_000)  # sparse
    read, whole = [], images._read
    monkeypatch.setattr(images, "_read", lambda file, count: read.append(count) or whole(file, count))
    assert decode_image(path).shape == (3, 150, 200)
    assert sum(read) < 20_000_000


@pytest.fixture
def no_picture_warned_of(monkeypatch):
    monkeypatch.setattr(decoder_warnings, "_seen", bytearray(1 << 16))


def _damaged() -> dict[str, bytes]:
    """JPEGs that Pillow reads and libjpeg warns of → how the warning goes on."""
    whole, marked = _jpeg(), _jpeg(restart_marker_blocks=4)
    middle, table = len(whole) // 2, whole.index(b"\xff\xdb")
    second = marked.index(b"\xff\xd1")
    return {
        "premature end of data": whole[:middle] + b"\xff\xd9",
        "extraneous bytes before marker 0xdb": whole[:table] + b"\1\2\3" + whole[table:],
        "extraneous bytes before marker 0xd9": whole[:-2] + b"\1\2\3" * 5 + whole[-2:],
        "found marker 0xd4 instead of RST1": marked[:second] + b"\xff\xd4" + marked[second + 2 :],
    }


@pytest.mark.parametrize("warning", _damaged())
def test_a_damaged_jpeg_that_pillow_reads_is_read_and_named_once(
    tmp_path, caplog, capfd, no_picture_warned_of, warning
):
    path = tmp_path / "damaged\x1b[2J.jpg"
    path.write_bytes(_damaged()[warning])
    first = decode_image(path)
    assert torch.equal(decode_image(path), first)
    assert np.abs(first.numpy().astype(int) - _by_pillow(path)).max() <= 1
    [message] = caplog.messages
    assert "damaged\\x1b[2J.jpg: damaged, read all the same (Corrupt JPEG data: " in message and warning in message
    assert decoder_warnings.count() == 1
    assert "JPEG" not in capfd.readouterr().err


def test_the_end_of_a_run_says_how_many_pictures_were_damaged(caplog, no_picture_warned_of):
    process = Process(0, 1, 0, torch.device("cpu"))
    tell_of_damaged_pictures(process)
    assert not caplog.records
    for name in ("a.jpg", "b.jpg", "a.jpg"):
        decoder_warnings.tell(name, ["Corrupt JPEG data: x"])
    caplog.clear()
    tell_of_damaged_pictures(process)
    assert caplog.messages == ["2 damaged pictures were read all the same; the log names the first of them"]


def test_sound_pictures_and_refused_ones_are_not_counted_as_damaged(tmp_path, caplog, no_picture_warned_of):
    decode_image(_save(tmp_path / "a.jpg", _gradient()))
    (tmp_path / "a.jpg").write_bytes(_jpeg()[:1000])
    with pytest.raises(ImageError):
        decode_image(tmp_path / "a.jpg")
    assert decoder_warnings.count() == 0 and caplog.messages == []


def test_what_torchvision_refuses_and_pillow_reads_is_read(tmp_path, monkeypatch, caplog, no_picture_warned_of):
    def refuse(*_):
        raise RuntimeError("decode_jpeg.cpp:171, Image is incomplete")

    path = _save(tmp_path / "a.jpg", _gradient())
    monkeypatch.setattr(images, "_jpeg_decoder", refuse)
    assert np.array_equal(decode_image(path).numpy(), _by_pillow(path))
    assert "Image is incomplete" in caplog.text


def test_damaged_pictures_are_named_up_to_a_hundred_and_counted_beyond(tmp_path, caplog, no_picture_warned_of):
    for number in range(105):
        decoder_warnings.tell(f"{number}.jpg", ["Corrupt JPEG data: x"])
    assert decoder_warnings.count() == 105
    assert len(caplog.messages) == 101 and "further ones are counted" in caplog.messages[-1]


def test_a_forked_worker_and_its_parent_name_a_picture_once_between_them(tmp_path, caplog):
    path = tmp_path / "damaged.jpg"
    path.write_bytes(_damaged()["premature end of data"])
    before = decoder_warnings.count()
    child = os.fork()
    if not child:
        logging.disable()
        decode_image(path)
        os._exit(0)
    os.waitpid(child, 0)
    assert decoder_warnings.count() == before + 1
    decode_image(path)
    assert decoder_warnings.count() == before + 1 and caplog.messages == []


def test_what_others_write_to_standard_error_while_a_picture_is_decoded_is_passed_on(
    capfd, caplog, no_picture_warned_of
):
    with decoder_warnings.listen("a.jpg"):
        os.write(2, b"someone else's words\nCorrupt JPEG data: x\n")
    assert capfd.readouterr().err == "someone else's words\n"
    assert caplog.messages == ["a.jpg: damaged, read all the same (Corrupt JPEG data: x)"]


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
def test_a_damaged_tiff_is_refused_without_a_raw_word_on_the_terminal(tmp_path, capfd, compression):
    path = _save(tmp_path / "a.tif", _gradient(200, 150), compression=compression)
    data = bytearray(path.read_bytes())
    data[300:340] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(ImageError, match="corrupt TIFF data"):
        decode_image(path)
    assert capfd.readouterr().err == ""


def test_control_characters_of_names_are_shown_as_escapes(tmp_path):
    with pytest.raises(ImageError) as caught:
        decode_image(tmp_path / "a\x1b[2J\nscore: 99.9\r\u2028.jpg")
    assert str(caught.value).startswith(f"{tmp_path}/a\\x1b[2J\\nscore: 99.9\\r\\u2028.jpg: No such file")
    assert caught.value.path.endswith("\u2028.jpg")  # the name itself stays


def test_printable_keeps_letters_of_all_languages_and_escapes_the_rest():
    assert printable("Straße 猫 é “x”") == "Straße 猫 é “x”"
    assert printable("a\tb\x7f\x9b1m\u202eevil\u200b\udcff") == "a\\tb\\x7f\\x9b1m\\u202eevil\\u200b\\udcff"


def test_an_error_survives_the_way_out_of_a_worker():
    error = pickle.loads(pickle.dumps(ImageError("train2014/x.jpg", "empty file")))
    assert type(error) is ImageError and str(error) == "train2014/x.jpg: empty file"


def test_screening_reports_what_cannot_be_read_in_order_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_CHUNK", 3)
    whole = _save(tmp_path / "good.jpg", _gradient()).read_bytes()
    (tmp_path / "padded.jpg").write_bytes(whole + b"\x00" * 16)  # odd at its end, but every decoder reads it
    (tmp_path / "cut.jpg").write_bytes(whole[:-30])
    (tmp_path / "empty.jpg").touch()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "bomb.png").write_bytes(_claiming("PNG", 60000, 60000))
    for name in ["good.png", "good.webp"]:
        _gradient().save(tmp_path / name)
    _gradient().save(tmp_path / "misnamed.png", "WEBP")
    _gradient().save(tmp_path / "cut.gif")
    (tmp_path / "cut.gif").write_bytes((tmp_path / "cut.gif").read_bytes()[:-30])
    for name in ["good.gif", "good.bmp", "good.tif"]:
        _gradient().save(tmp_path / name)
    (tmp_path / "cut.tif").write_bytes((tmp_path / "good.tif").read_bytes()[:-300])
    (tmp_path / "page.jpg").write_bytes(b"<html>404</html>")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:-1])
    (tmp_path / "cut.webp").write_bytes((tmp_path / "good.webp").read_bytes()[:-1])
    good = ["good.jpg", "padded.jpg", "good.png", "good.webp", "misnamed.png", "good.gif", "good.bmp", "good.tif"]
    bad = ["cut.webp", "cut.jpg", "missing.jpg", "empty.jpg", "pipe.jpg", "bomb.png", "page.jpg", "cut.png"]
    bad += ["cut.gif", "cut.tif"]
    problems = screen_images([*good, *bad, *good], tmp_path, workers=3)
    assert [problem.split(": ")[0] for problem in problems] == [str(tmp_path / name) for name in bad]
    assert "No such file" in problems[2] and "empty" in problems[3] and "HTML" in problems[6]


def test_screening_decodes_only_what_looks_odd(tmp_path, monkeypatch):
    names = [_save(tmp_path / f"good.{ending}", _gradient()).name for ending in ("jpg", "png", "webp")]
    monkeypatch.setattr(images, "decode_image", lambda path: pytest.fail(f"decoded {path}"))
    assert screen_images(names, tmp_path) == []


def test_screening_lists_twenty_problems_and_looks_no_further(tmp_path, monkeypatch):
    screened = []

    def screen_slowly(files, limit):
        screened.append(files)
        time.sleep(0.01)
        return [f"{file}: bad" for file in files[:15]]

    monkeypatch.setattr(images, "_screen_chunk", screen_slowly)
    problems = screen_images([f"{i}.jpg" for i in range(50_000)], tmp_path, workers=1)
    numbers = [*range(15), *range(512, 517)]
    assert problems == [f"{tmp_path}/{i}.jpg: bad" for i in numbers]
    assert len(screened) < 20  # of 98


def test_screening_a_missing_folder_decodes_twenty_files_of_it_and_no_more(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(images, "decode_image", lambda file: calls.append(file) or decode_image(file))
    problems = screen_images([f"{i}.jpg" for i in range(512)], tmp_path / "missing")
    assert problems == [f"{tmp_path}/missing/{i}.jpg: No such file or directory" for i in range(20)]
    assert len(calls) == 20


def test_screening_nothing_finds_nothing(tmp_path):
    assert screen_images([], tmp_path) == []


def test_normalised_values_are_in_minus_one_to_one():
    levels = torch.tensor([0, 51, 102, 255], dtype=torch.uint8).reshape(1, 1, 2, 2).expand(2, 3, 2, 2)
    result = normalize(levels)
    assert result.dtype == torch.float32 and result.shape == (2, 3, 2, 2)
    torch.testing.assert_close(result[1, 2], torch.tensor([[-1.0, -0.6], [-0.2, 1.0]]))


def test_normalising_takes_a_mean_and_deviation_per_channel():
    white = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    result = normalize(white, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    torch.testing.assert_close(result.flatten(), torch.tensor([2.2489083, 2.4285714, 2.64]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normalising_to_half_precision_rounds_once(dtype):
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    exact = (torch.arange(256, dtype=torch.float64) / 255 - 0.485) / 0.229
    assert torch.equal(normalize(levels, 0.485, 0.229, dtype)[0, 0].flatten(), exact.to(torch.float32).to(dtype))


def test_normalising_what_is_normalised_already_is_a_mistake():
    with pytest.raises(AssertionError, match="expected uint8"):
        normalize(torch.zeros(1, 3, 2, 2))
