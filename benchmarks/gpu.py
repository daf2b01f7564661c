"""Rows of a GPU: how fast and how large training and generation are, and whether the loader keeps up.

Operations are counted as the original does them, so that doing less shows as faster: 1 multiply-add is 2, training is 3
times the forward pass. A training step is the toolkit's own, optimizer included: bf16, `PlainBackend`, fused AdamW.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from beit3.data.augmentation import TrainTransform
from beit3.data.tokenizer import EOS_ID
from beit3.system.machine import cores
from beit3.training.backends import BackendSettings, PlainBackend
from benchmarks import models
from benchmarks.models import MASK_ID, TASK_NAMES, make_batch, make_config, our_loss
from benchmarks.pictures import make_pictures
from benchmarks.table import Line, Reach, Row, Settings, rates, seconds
from modeling_finetune import HEADS
from optim_factory import create_optimizer, parameter_groups
from tasks.captioning.generation import generate
from tests import reference

PIXELS = 480
# (task, size): GFLOP of training on one picture, the original's count; images/s wanted of an H200.
TRAINING = {
    ("vqav2", "base"): (598, 590),
    ("vqav2", "large"): (2027, 195),
    ("captioning", "base"): (577, 615),
    ("captioning", "large"): (1955, 200),
}
GENERATION = {"base": 1000, "large": 400}  # captions/s wanted of an H200
BATCH = {"base": 64, "large": 32}
STEPS = 10  # per measurement


def peak_row(settings: Settings) -> list[Line]:
    return [Line("matrix product, 8192³, bf16", "TFLOP/s", matmul_peak(settings.device, 8192, settings.repeats))]


def matmul_peak(device: torch.device, size: int, repeats: int) -> list[float]:
    """TFLOP/s of a square bf16 matrix product, as measured."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))

    def products() -> None:
        for _ in range(STEPS):
            torch.mm(a, b)

    seconds(products, device)
    return [STEPS * 2 * size**3 / seconds(products, device) / 1e12 for _ in range(repeats)]


def training_row(task: str, size: str, settings: Settings) -> list[Line]:
    device, pictures = settings.device, BATCH[size]
    gigaflop, wanted = TRAINING[task, size]
    torch.cuda.reset_peak_memory_stats(device)
    steps = training_steps(task, size, PIXELS, pictures, device)
    seconds(steps, device)
    speeds = rates(STEPS * pictures, [seconds(steps, device) for _ in range(settings.repeats)])
    gigabytes = torch.cuda.max_memory_allocated(device) / 1e9
    teraflops = [speed * gigaflop / 1000 for speed in speeds]
    peak = statistics.median(matmul_peak(device, 8192, settings.repeats))
    what = f"training, {TASK_NAMES[task]}, {size}, {PIXELS} px, bf16, batch {pictures}, optimizer included"
    return [
        Line(what, "images/s", speeds, reach=Reach("≥", wanted, absolute=True)),
        Line("– by the original's count of operations", "TFLOP/s", teraflops),
        Line("– share of the matrix product's", "%", [100 * each / peak for each in teraflops]),
        Line("– memory at its peak, everything counted", "GB", [gigabytes]),
    ]


def training_steps(task: str, size: str, pixels: int, pictures: int, device: torch.device) -> Callable[[], None]:
    """A function that takes `STEPS` optimizer steps on one batch, which is on the device already."""
    model = HEADS[task](make_config(task, size, pixels)).to(device).train()
    optimizer = create_optimizer(parameter_groups(model, weight_decay=0.01), lr=1e-5)
    backend = PlainBackend(model, optimizer, BackendSettings(precision="bf16", batch_size=pictures))
    batch = make_batch(task, pictures, pixels, device)

    def steps() -> None:
        for _ in range(STEPS):
            with backend.micro_step(last=True):
                with backend.autocast():
                    loss = our_loss(task, backend.model, batch)
                backend.backward(loss)
            backend.step()

    return steps


def generation_row(size: str, settings: Settings) -> list[Line]:
    """Without a side to compare with: `models.generation_row` has that."""
    device, pictures = settings.device, BATCH[size]
    model: Any = HEADS["captioning"](make_config("captioning", size, PIXELS)).to(device).eval()
    reference.fill(model)
    with torch.no_grad():
        model.mlm_head.bias[EOS_ID] = -50.0  # captions of full length
    images = reference.images(9, pictures, PIXELS).to(device)

    def captions() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            generate(model, images, mask_id=MASK_ID, num_beams=3, max_tokens=16)

    seconds(captions, device)
    speeds = rates(pictures, [seconds(captions, device) for _ in range(settings.repeats)])
    what = f"generation, 3 beams, {size}, {PIXELS} px, bf16, captions of 13 tokens, batch {pictures}"
    return [Line(what, "images/s", speeds, reach=Reach("≥", GENERATION[size], absolute=True))]


class Pictures(Dataset[Tensor]):
    """Training pictures, the same few files again and again."""

    def __init__(self, paths: list[str], count: int, pixels: int) -> None:
        self.paths, self.count, self.transform = paths, count, TrainTransform(pixels, randaug=True)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Tensor:
        return self.transform(self.paths[row % len(self.paths)], (0, 0, row))


def loader_row(pictures: int, settings: Settings) -> list[Line]:
    """All cores at once, batches in page-locked memory, as in a training."""
    workers = cores()
    dataset = Pictures(make_pictures(settings.folder / "pictures", 64), pictures, PIXELS)
    loader = DataLoader(
        dataset, batch_size=16, num_workers=workers, persistent_workers=True, pin_memory=settings.device.type == "cuda"
    )

    def epoch() -> None:
        for _ in loader:
            pass

    seconds(epoch)  # starts the workers
    speeds = rates(pictures, [seconds(epoch) for _ in range(settings.repeats)])
    what = f"loader, {PIXELS} px, with RandAugment, {workers} workers"
    wanted = Reach("≥", TRAINING["vqav2", "base"][1], absolute=True)
    return [Line(what, "images/s", speeds, reach=wanted)]


def gpu_rows(settings: Settings) -> list[Row]:
    sizes = ["base"] if settings.quick else ["base", "large"]
    rows = [Row("matrix product", partial(peak_row, settings))]
    for size in sizes:
        for task in TASK_NAMES:
            name = f"{TASK_NAMES[task]}, {size}"
            rows.append(Row(f"training, {name}", partial(training_row, task, size, settings)))
            # The other side keeps whole score matrices: a smaller batch for both.
            compared = partial(models.train_row, task, size, PIXELS, "bf16", BATCH[size] // 4, settings)
            rows.append(Row(f"train step, {name}", compared))
        rows.append(Row(f"generation, {size}", partial(generation_row, size, settings)))
    return [
        *rows,
        Row("generation, both sides", partial(models.generation_row, "base", 224, 32, 16, settings)),
        Row("encoder forward", partial(models.encoder_row, "base", PIXELS, "bf16", 16, settings)),
        Row("captions of a picture together", partial(models.captions_together_row, "base", PIXELS, 5, settings)),
        Row("caption loss", partial(models.loss_row, 512, settings)),
        Row("loader", partial(loader_row, 1024 if settings.quick else 8192, settings)),
    ]
