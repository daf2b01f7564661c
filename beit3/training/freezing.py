"""`--freeze`: which parameters are not trained, by their names. Needs no PyTorch.

A frozen parameter gets no gradient, no optimizer state, no weight decay and no average, and below the lowest trained
one there is no backward pass.
"""

from __future__ import annotations

import re
from typing import Any

# What can be named → the parameters that freeze. Heads of tasks stand outside of `beit3.` and are always trained.
PARTS = {
    "embeddings": re.compile(r"beit3\.(text_embed|vision_embed|encoder\.embed_positions)\."),
    "text": re.compile(r"beit3\.(text_embed\.|.*\.B\.)"),
    "image": re.compile(r"beit3\.(vision_embed\.|.*\.A\.)"),
    "encoder": re.compile(r"beit3\."),
    "head-only": re.compile(r"beit3\."),
}
_LAYER = re.compile(r"beit3\.encoder\.layers\.(\d+)\.")
_NUMBER = re.compile(r"[0-9]{1,4}")


def problem_of(given: str, layers: int | None) -> str | None:
    """What is wrong with a value of `--freeze`, in a sentence; None where nothing is.

    Args:
        layers: of the model; None where it is not known, so that any number will do.
    """
    for part in _parts(given):
        is_number = _NUMBER.fullmatch(part) is not None
        if part not in PARTS and not (is_number and (layers is None or int(part) <= layers)):
            most = "" if layers is None else f" up to {layers}, which this model has"
            return (
                f"--freeze {given}: {part[:40] or repr(part)} is none of {', '.join(PARTS)} and no number of layers"
                f"{most}; several are joined by commas, as in text,2"
            )
    return None


def is_frozen(given: str, name: str) -> bool:
    """Whether a value of `--freeze` that `problem_of` approves of freezes the parameter of this name."""
    return any(_freezes(part, name) for part in _parts(given))


def freeze(model: Any, given: str) -> None:
    """Take the parameters that a value of `--freeze` names out of the training of a model."""
    for name, parameter in model.named_parameters():
        if is_frozen(given, name):
            parameter.requires_grad_(False)


def _parts(given: str) -> list[str]:
    return [part.strip() for part in given.split(",")] if given else []


def _freezes(part: str, name: str) -> bool:
    if part in PARTS:
        return PARTS[part].match(name) is not None
    # Layers from below. What lies below a frozen layer would be trained through it, so the embeddings go with them.
    layer = _LAYER.match(name)
    return int(layer.group(1)) < int(part) if layer else PARTS["embeddings"].match(name) is not None
