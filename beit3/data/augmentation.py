"""From a picture's file to the model's input: transforms for training and for evaluation.

Everything works on uint8, a quarter of the memory traffic of floats; `beit3.data.images.normalize` makes floats of the
whole batch on the device. Chance is a function: what happens to a picture depends on its key (seed, epoch, row) alone,
so any number of workers gives the same inputs, and a resumed run continues with them.

Inside, a picture is "planes": a contiguous uint8 array (3, S, S), RGB.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

from beit3.data.images import decode_image
from beit3.system.errors import InputError

Key = tuple[int, ...]  # (seed, epoch, row, …), none negative
Path = str | os.PathLike[str]

INTERPOLATIONS = ("bicubic", "bilinear", "random")  # random: one of the two others for each picture

CROP_SCALE = (0.5, 1.0)  # part of the picture's area
CROP_RATIO = (3 / 4, 4 / 3)  # width / height

# RandAugment: two operations, each applied with probability 0.5, at level 7 of 10 of what the level scales.
N_OPERATIONS, PROBABILITY = 2, 0.5
_LEVEL = 7 / 10
ENHANCE_FACTOR = _LEVEL * 1.8 + 0.1  # 1.36; 1 leaves the picture as it is
SHEAR = _LEVEL * 0.3  # pixels per pixel
TRANSLATION = int(_LEVEL * 10)  # pixels, whatever the picture's size
ROTATION = math.radians(_LEVEL * 30)  # 21°
FILL = 128  # grey for what lies outside the picture

_STRIP = 60  # rows


@dataclass(frozen=True)
class EvalTransform:
    """Resizes to size², not keeping the aspect, bicubically with antialiasing: as Pillow, within one grey level.

    upright: see `decode_image`.
    """

    size: int
    upright: bool = False

    def __call__(self, path: Path, key: Key = (0, 0, 0)) -> torch.Tensor:
        """uint8 (3, size, size), contiguous. The key is there to be called like `TrainTransform`; nothing is random.

        Raises:
            ImageError: see `decode_image`.
        """
        return self.resized(decode_image(path, upright=self.upright))

    def resized(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (3, H, W) → uint8 (3, size, size), contiguous."""
        return resize(pixels, self.size, "bicubic")


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, with `mirror` horizontal flip with probability 0.5, and with `randaug` RandAugment.

    The crop keeps a share of the picture's area within `crop_scale`.
    """

    size: int
    interpolation: str = "bicubic"
    randaug: bool = False
    crop_scale: tuple[float, float] = CROP_SCALE
    mirror: bool = True

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise InputError([f"interpolation {self.interpolation!r} is unknown; choose one of {known}"])

    def __call__(self, path: Path, key: Key) -> torch.Tensor:
        """uint8 (3, size, size), contiguous; a function of the file and the key.

        Raises:
            ImageError: see `decode_image`.
        """
        rng = np.random.default_rng(key)
        image = decode_image(path)
        _, full_height, full_width = image.shape
        top, left, height, width = crop_box(rng, full_height, full_width, self.crop_scale)
        interpolation = self.interpolation
        if interpolation == "random":
            interpolation = ("bicubic", "bilinear")[rng.integers(2)]
        resized = resize(image[:, top : top + height, left : left + width], self.size, interpolation)
        if rng.random() < 0.5 and self.mirror:
            resized = resized.flip(-1)
        if self.randaug:
            resized = torch.from_numpy(rand_augment(resized.numpy(), rng))
        return resized


def crop_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float] = CROP_SCALE
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random part of a picture, in pixels.

    Its share of the picture's area is uniform in `scale`, the logarithm of its ratio uniform in `CROP_RATIO`; boxes
    that stick out are drawn anew. After ten of them (a very long or high picture) it is the largest middle part
    within `CROP_RATIO`. Method: torchvision's RandomResizedCrop.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h = min(height, max(1, round(width / CROP_RATIO[0])))
    w = min(width, max(1, round(height * CROP_RATIO[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image: torch.Tensor, size: int, interpolation: str) -> torch.Tensor:
    """uint8 (3, H, W) → uint8 (3, size, size), contiguous, antialiased; `interpolation` is "bicubic" or "bilinear".

    Beside a dense copy it takes H x size x 3 bytes, as the rows are made narrow first: 94 MB for the highest picture
    that `decode_image` returns, at 480 pixels.
    """
    # PyTorch's uint8 kernel is fastest on dense pixels of (H, W, 3), which a crop is not; copying it pays.
    dense = image[None].contiguous(memory_format=torch.channels_last)  # (1, 3, H, W)
    resized = F.interpolate(dense, size=(size, size), mode=interpolation, antialias=True)
    return torch.from_numpy(np.ascontiguousarray(resized[0].numpy()))  # NumPy reorders twice as fast as PyTorch


def rand_augment(planes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Planes → planes: `N_OPERATIONS` drawn with replacement from `OPERATIONS`, each applied with `PROBABILITY`.

    Method: RandAugment, Cubuk et al. 2019, with the probability that the original adds.
    """
    operations = list(OPERATIONS.values())
    for _ in range(N_OPERATIONS):
        operation = operations[rng.integers(len(operations))]
        applied, sign = rng.random() < PROBABILITY, (-1, 1)[rng.integers(2)]
        if applied:
            planes = operation(planes, sign)
    return planes


def _identity(planes: np.ndarray, sign: int) -> np.ndarray:
    return planes


def _by_pillow(operation: Callable[[Image.Image], Image.Image], planes: np.ndarray, sign: int) -> np.ndarray:
    """For operations that treat each channel by itself: Pillow reads and writes grey planes without copies."""
    return np.stack([np.asarray(operation(Image.fromarray(plane))) for plane in planes])


def _brighten(plane: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(plane).enhance(ENHANCE_FACTOR)


def _sharpen(planes: np.ndarray, sign: int) -> np.ndarray:
    """What Pillow's ImageEnhance.Sharpness does, exactly, and six times as fast.

    smooth = (sum of the 3x3 neighbourhood + 4 x its centre) / 13, rounded; result = smooth + 1.36 x (pixel - smooth),
    cut off below. Pixels at the border stay as they are.
    """
    sharp = planes.copy()
    for plane, target in zip(planes, sharp, strict=True):
        values = plane.astype(np.int16)  # 3315 = 13 x 255 is the largest sum
        center = values[1:-1, 1:-1]
        smooth = values[:-2] + values[1:-1]
        smooth += values[2:]
        smooth = smooth[:, :-2] + smooth[:, 1:-1] + smooth[:, 2:]
        smooth += 4 * center
        smooth = (2 * smooth + 13) // 26
        detail = center - smooth
        detail *= _SHARPEN_PERCENT
        detail //= 100
        detail += center
        target[1:-1, 1:-1] = np.clip(detail, 0, 255, out=detail)
    return sharp


def _translate(axis: int, planes: np.ndarray, sign: int) -> np.ndarray:
    """Content moves by `TRANSLATION` pixels towards lower indices (sign 1) or higher ones."""
    moved = np.full_like(planes, FILL)
    low, high = slice(None, -TRANSLATION), slice(TRANSLATION, None)
    source, target = (high, low) if sign > 0 else (low, high)
    np.moveaxis(moved, axis, 0)[target] = np.moveaxis(planes, axis, 0)[source]
    return moved


def _warp(kind: str, planes: np.ndarray, sign: int) -> np.ndarray:
    """Bilinear, with the grey outside blended in at the edge. About three times as fast as Pillow's."""
    centered = torch.from_numpy(np.subtract(planes, FILL, dtype=np.float32))[None]  # (1, 3, S, S); 0 is FILL
    warped = np.empty_like(planes)
    # In strips: the time would else go into fresh memory for whole pictures of floats, not into sampling.
    for start, grid in zip(range(0, planes.shape[1], _STRIP), _source_grids(kind, sign, planes.shape[1]), strict=True):
        strip = F.grid_sample(centered, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0].numpy()
        strip += FILL + 0.5  # in [0.5, 255.5]: cutting off rounds
        warped[:, start : start + _STRIP] = strip
    return warped


@lru_cache(maxsize=12)  # two sizes; 1.8 MB each at 480 pixels
def _source_grids(kind: str, sign: int, size: int) -> tuple[torch.Tensor, ...]:
    """Strips (1, up to _STRIP rows, S, 2): for each pixel where it comes from, (x, y) in [-1, 1] over the picture.

    Shears have the upper left corner as their fixed point (as Pillow's and OpenCV's matrices do), rotations the middle.
    """
    y, x = np.mgrid[:size, :size] + 0.5  # centres of pixels
    if kind == "shear_x":
        x = x + sign * SHEAR * y
    elif kind == "shear_y":
        y = y + sign * SHEAR * x
    else:
        assert kind == "rotate", kind
        sine, cosine, middle = sign * math.sin(ROTATION), math.cos(ROTATION), size / 2
        x, y = x - middle, y - middle
        x, y = cosine * x - sine * y + middle, sine * x + cosine * y + middle
    grid = torch.from_numpy(np.stack([x, y], axis=-1)[None] * (2 / size) - 1).to(torch.float32)
    return grid.split(_STRIP, dim=1)


_SHARPEN_PERCENT = round(100 * (ENHANCE_FACTOR - 1))  # 36

OPERATIONS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {  # (planes, sign) → planes
    "Identity": _identity,
    "AutoContrast": partial(_by_pillow, ImageOps.autocontrast),
    "Equalize": partial(_by_pillow, ImageOps.equalize),
    "Brightness": partial(_by_pillow, _brighten),
    "Sharpness": _sharpen,
    "ShearX": partial(_warp, "shear_x"),
    "ShearY": partial(_warp, "shear_y"),
    "TranslateX": partial(_translate, 2),
    "TranslateY": partial(_translate, 1),
    "Rotate": partial(_warp, "rotate"),
}
