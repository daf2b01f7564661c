"""What a checkpoint says of itself: task, model, sizes, tokenizer, what its head means, flags and data it came from.

Read before PyTorch is loaded where that can be done: the description of a `.safetensors` file stands in its header.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beit3.system.errors import InputError, printable

FORMAT = 2  # of the description; 1 held no tokenizer, flags and data
MODEL_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.spm"
BEST = "checkpoint-best"
MAX_HEADER = 1 << 26  # bytes; a large model's has some hundred thousand
MAX_NAME = 100  # characters of a name in a description


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
        check_description(description, path)
        tokenizer = file.with_name(TOKENIZER_FILE)
        return About(path, description, shapes, tokenizer if tokenizer.is_file() else None)
    from beit3.model.weights import read_checkpoint

    checkpoint = read_checkpoint(path, model_key, prefix)
    check_description(checkpoint.description, path)
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.state_dict.items()}
    return About(path, checkpoint.description, shapes, checkpoint.tokenizer, checkpoint)


def check_description(description: Mapping[str, Any], path: Path) -> None:
    """What a description says has the form in which it is written; bounds of numbers are those of the flags.

    Raises:
        InputError: listing every part that has not. A stranger's file may say anything.
    """
    problems = []
    for name, (fits, wanted) in FORMS.items():
        if name in description and not fits(description[name]):
            found = printable(repr(description[name])[:MAX_NAME])
            problems.append(f"{path}: its description says {name} {found}; {wanted} is wanted, is the file damaged?")
    if problems:
        raise InputError(problems)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable()


def _is_whole(value: Any) -> bool:
    return type(value) is int  # True is an int too


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(text, str) for text in value)


# Part of a description → whether a value has its form, and the form in words.
FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "task": (_is_name, "a name"),
    "model": (_is_name, "a name"),
    "image_size": (_is_whole, "a whole number"),
    "vocab_size": (_is_whole, "a whole number"),
    "num_max_bpe_tokens": (_is_whole, "a whole number"),
    "tokenizer_sha256": (_is_hash, "a SHA-256 in hexadecimal"),
    "answers": (_are_texts, "a list of texts"),
}


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
        if not all(type(side) is int for shape in shapes.values() for side in shape):
            raise ValueError("a shape of other things than whole numbers")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file}: not a readable safetensors file ({printable(str(error))[:200]})") from error
    return description, shapes
