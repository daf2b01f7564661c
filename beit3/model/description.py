"""What a checkpoint says of itself: task, model, sizes, tokenizer, what its head means, flags and data it came from.

Read before PyTorch is loaded where that can be done: the description of a `.safetensors` file stands in its header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beit3.system.errors import InputError

FORMAT = 2  # of the description; 1 held no tokenizer, flags and data
MODEL_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.spm"
BEST = "checkpoint-best"
MAX_HEADER = 1 << 26  # bytes; a large model's has some hundred thousand


@dataclass(frozen=True)
class About:
    """A checkpoint without its weights.

    Attributes:
        path: as it was named.
        description: plain values; empty for files made elsewhere.
        shapes: parameter name → shape.
        tokenizer: the tokenizer's file, or its content; None where the checkpoint holds none.
        weights: the whole checkpoint, where it had to be read for all this (a `beit3.model.weights.Checkpoint`).
    """

    path: Path
    description: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tokenizer: Path | bytes | None = None
    weights: Any = None


def answers_at_once(path: Path) -> Path | None:
    """The safetensors file whose header says all; None for a checkpoint that PyTorch has to open.

    In the output folder of a run that is the best checkpoint's.
    """
    if path.suffix == ".safetensors":
        return path
    return next((file for file in (path / MODEL_FILE, path / BEST / MODEL_FILE) if file.is_file()), None)


def about(path: Path, model_key: str = "model|module", prefix: str = "") -> About:
    """Read what a checkpoint says of itself. A `.pth` file is opened by PyTorch, which takes a moment to load.

    Raises:
        InputError: no checkpoint, or one that cannot be read.
    """
    file = answers_at_once(path)
    if file is not None:
        description, shapes = _of_safetensors(file)
        tokenizer = file.with_name(TOKENIZER_FILE)
        return About(path, description, shapes, tokenizer if tokenizer.is_file() else None)
    from beit3.model.weights import read_checkpoint

    checkpoint = read_checkpoint(path, model_key, prefix)
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.state_dict.items()}
    return About(path, checkpoint.description, shapes, checkpoint.tokenizer, checkpoint)


def _of_safetensors(file: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Description and shapes. Layout: 8 bytes with the length of the JSON header, then the header."""
    try:
        with open(file, "rb") as content:
            length = int.from_bytes(content.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(content.read(length).decode("utf-8"))
        description = json.loads(header.pop("__metadata__", {}).get("description", "{}"))
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        if not isinstance(description, dict):
            raise ValueError("its description is no JSON object")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file}: not a readable safetensors file ({error})") from error
    return description, shapes
