"""Rows of the loader: pictures per second and core, from a JPEG on the disk to a batch, training transform.

One process and one thread. The other side is Pillow, with floats made in the worker; here pictures stay uint8, and the
device makes floats of them. Both sides draw the same crops, flips and operations.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit3.data.augmentation import TrainTransform
from beit3.data.image_text import Transform
from beit3.data.images import normalize
from benchmarks.peers import PillowTransform
from benchmarks.table import Line, Reach, Row, Settings, interleave, rates

BATCH = 16
QUALITY = 92  # of the JPEGs: some 100 KB each, as COCO's are (its pictures are 640 × 480 too)


def make_pictures(folder: Path, count: int) -> list[str]:
    """JPEGs of 640 × 480 pixels that compress like photographs: soft blobs with some noise. Paths of them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        path = folder / f"{number:012}.jpg"
        if not path.exists():
            rng = np.random.default_rng(number)
            coarse = Image.fromarray(rng.integers(0, 256, (31, 41, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC)).astype(float)
            noisy = smooth + rng.normal(0, 6, smooth.shape)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)
        paths.append(str(path))
    return paths


def load(transform: Transform, paths: list[str]) -> Tensor:
    """The last batch of those that the pictures make."""
    for start in range(0, len(paths), BATCH):
        rows = range(start, min(start + BATCH, len(paths)))
        batch = torch.stack([transform(paths[row], (0, 0, row)) for row in rows])
    return batch


def loader_row(pixels: int, randaug: bool, pictures: int, settings: Settings) -> list[Line]:
    paths = make_pictures(settings.folder / "pictures", pictures)
    transforms: list[Transform] = [TrainTransform(pixels, randaug=randaug), PillowTransform(pixels, randaug)]
    with one_thread():
        check_pictures(*(load(transform, paths[:BATCH]) for transform in transforms))
        calls = [partial(load, transform, paths) for transform in transforms]
        our_times, peer_times = interleave(calls, settings.many_repeats)
    kilobytes = statistics.mean(Path(path).stat().st_size for path in paths) / 1000
    what = f"loader, {pixels} px, {'with' if randaug else 'without'} RandAugment, JPEGs of {kilobytes:.0f} KB, one core"
    wanted = Reach("≥", 2.0 if randaug else 2.5)
    return [Line(what, "images/s", rates(pictures, our_times), rates(pictures, peer_times), wanted)]


def check_pictures(ours: Tensor, peer: Tensor) -> None:
    """Raises RuntimeError unless uint8 and float pictures (B, 3, H, W) agree within half a grey level on average.

    Single pixels may differ more: at an edge to the grey outside Pillow does not blend, this toolkit does.
    """
    difference = (normalize(ours) - peer).abs().mean().item() * 127.5
    if difference > 0.5:
        raise RuntimeError(f"pictures of the two sides differ by {difference:.2f} grey levels on average")


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def loader_rows(settings: Settings) -> list[Row]:
    pictures = 64 if settings.quick else 256
    return [
        Row(
            f"loader, {pixels} px, {'with' if randaug else 'without'} RandAugment",
            partial(loader_row, pixels, randaug, pictures, settings),
        )
        for pixels in (224, 480)
        for randaug in (False, True)
    ]
