"""Pictures as people have them: a file, Pillow's, an array, a tensor. They stand upright afterwards."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit3.data.images import PIXEL_LIMIT, SIDE_LIMIT, ImageError, decode_image, orientation_of, pixels_of, turned
from beit3.system.errors import InputError

WANTED = "a path, a PIL image, a uint8 array (H, W) or (H, W, 3), or a uint8 tensor (3, H, W)"


def is_one(pictures: Any) -> bool:
    """Whether this is one picture rather than several."""
    return isinstance(pictures, (str, os.PathLike, Image.Image, np.ndarray, Tensor))


def load_pixels(picture: Any) -> Tensor:
    """uint8 (3, H, W), RGB, upright.

    Raises:
        ImageError: a file that cannot be read, see `decode_image`.
        InputError: no picture at all, or one of another form than is wanted.
    """
    if isinstance(picture, (str, os.PathLike)):
        return decode_image(picture, upright=True)
    if isinstance(picture, Image.Image):
        _check_size(*picture.size)
        try:
            return turned(pixels_of(picture), orientation_of(picture))
        except Exception as error:  # whatever a decoder throws: the file is read only now
            raise ImageError(getattr(picture, "filename", "") or "a picture", f"cannot be decoded ({error})") from error
    if isinstance(picture, np.ndarray):
        return _of_array(picture)
    if isinstance(picture, Tensor):
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] not in (1, 3) or 0 in picture.shape:
            raise InputError(f"a tensor of {picture.dtype} {tuple(picture.shape)} is no picture; wanted {WANTED}")
        _check_size(picture.shape[2], picture.shape[1])
        return picture.cpu().expand(3, -1, -1)
    raise InputError(f"a {type(picture).__name__} is no picture; wanted {WANTED}")


def _check_size(width: int, height: int) -> None:
    if width * height > PIXEL_LIMIT or max(width, height) > SIDE_LIMIT:
        raise InputError(f"a picture of {width}x{height}; {PIXEL_LIMIT:,} pixels are the most, {SIDE_LIMIT:,} a side")


def _of_array(picture: np.ndarray) -> Tensor:
    grey = picture.ndim == 2
    colours = 1 if grey else picture.shape[-1] if picture.ndim == 3 else 0
    if picture.dtype != np.uint8 or colours not in (1, 3, 4) or 0 in picture.shape:
        raise InputError(f"an array of {picture.dtype} {picture.shape} is no picture; wanted {WANTED}")
    _check_size(picture.shape[1], picture.shape[0])
    planes = np.repeat(picture.reshape(*picture.shape[:2], 1), 3, axis=2) if colours == 1 else picture[:, :, :3]
    return torch.from_numpy(np.ascontiguousarray(planes)).permute(2, 0, 1)
