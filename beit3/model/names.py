"""The models there are: sizes, and at how many pixels each is registered for which head. Needs no PyTorch.

A registered name is `beit3_<size>_patch16_<pixels>_<suffix>`; the suffix says which head of `modeling_finetune` it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

# Sizes of the encoder.
SIZES = {
    "tiny": {"width": 128, "layers": 4, "heads": 4},
    "base": {"width": 768, "layers": 12, "heads": 12},
    "large": {"width": 1024, "layers": 24, "heads": 16},
}
PATCH = 16  # pixels

# Which (size, pixels) exist per suffix: the released ones, and tiny for the demo.
REGISTERED = {
    "vqav2": [
        ("tiny", 64),
        ("base", 384),
        ("base", 480),
        ("large", 384),
        ("large", 480),
        ("large", 768),
    ],
    "captioning": [("tiny", 64), ("base", 224), ("base", 480), ("large", 480)],
    "retrieval": [("base", 224), ("base", 384), ("large", 384)],
    "nlvr2": [("base", 224), ("large", 224)],
    "imageclassification": [("base", 224), ("large", 224)],
}


def model_name(size: str, pixels: int, suffix: str) -> str:
    return f"beit3_{size}_patch{PATCH}_{pixels}_{suffix}"


def names_with(suffix: str) -> list[str]:
    """The registered names with this head, without the suffix, as `--model` takes them."""
    return [model_name(size, pixels, suffix).removesuffix(f"_{suffix}") for size, pixels in REGISTERED[suffix]]


def pixels_of(name: str) -> int:
    """Side of the pictures of a model, from its name without the suffix."""
    return int(name.rpartition("_")[2])


def layers_of(name: str) -> int:
    """Layers of a registered model, from its name with or without the suffix."""
    return SIZES[name.split("_")[1]]["layers"]


# A parameter that only a model with this head has.
TELLING = {
    "vqav2": "pooler.dense.weight",
    "captioning": "mlm_head.weight",
    "retrieval": "logit_scale",
    "nlvr2": "head.dense1.weight",
    "imageclassification": "fc_norm.weight",
}


def suffix_by_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The head that a checkpoint's parameters belong to; None where there is none, as after pre-training."""
    found = [suffix for suffix, name in TELLING.items() if name in shapes]
    return found[0] if len(found) == 1 else None


def name_by_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The `--model` whose encoder has these shapes (parameter name → shape); None where there is none such."""
    text = shapes.get("beit3.text_embed.weight")
    table = shapes.get("beit3.encoder.embed_positions.A.weight")
    layers = {name.split(".")[3] for name in shapes if name.startswith("beit3.encoder.layers.")}
    if text is None or table is None or len(text) != 2 or len(table) != 2:
        return None
    pixels = PATCH * math.isqrt(max(0, table[0] - 3))  # two unused rows and the class token come first
    for size, shape in SIZES.items():
        if (shape["width"], shape["layers"]) == (text[1], len(layers)):
            return f"beit3_{size}_patch{PATCH}_{pixels}"
    return None
