"""Weights, pictures and tokens that the reference values in `data/` were computed with (see data/README.md)."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeling_finetune import create_model

DATA = Path(__file__).parent / "data"
MINI_COCO = DATA / "mini_coco"


def load(name: str) -> Any:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def fill(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter a value that depends on its name, its shape and the seed alone."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            random = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
            normal = torch.from_numpy(np.asarray(random.standard_normal(tuple(tensor.shape)), dtype=np.float32))
            if name == "logit_scale":
                tensor.fill_(2.0)
            elif tensor.ndim == 1 and name.endswith(".weight"):
                tensor.copy_(1 + 0.1 * normal)
            else:
                tensor.copy_(0.05 * normal)


def build(name: str, vocab_size: int = 1000, seed: int = 0, **options: Any) -> nn.Module:
    model = create_model(name, vocab_size=vocab_size, drop_path_rate=0.0, **options)
    fill(model, seed)
    return model.eval()


def images(seed: int, batch: int, size: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).uniform(-1, 1, (batch, 3, size, size)).astype(np.float32))


def tokens(seed: int, lengths: list[int], vocab_size: int = 1000, width: int = 20) -> tuple[Tensor, Tensor]:
    """Token ids (B, width) and padding mask (B, width), 1 = padding, of texts with these lengths."""
    ids = np.random.RandomState(seed).randint(4, vocab_size - 1, (len(lengths), width))
    padding = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, 0], ids[row, length - 1], ids[row, length:] = 0, 2, 1
        padding[row, length:] = 1
    return torch.from_numpy(ids), torch.from_numpy(padding)
