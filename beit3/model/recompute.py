"""Recomputing activations: what is cheap is computed again in the backward pass, and not kept in memory until then.

PyTorch's `torch.utils.checkpoint` does it. It has nothing to do with the checkpoints that a run saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

WIDE = 600  # features of a position; the smallest released model has 768


def recomputed(function: Callable[..., Any], *inputs: object) -> Any:
    """`function(*inputs)`, of which only the inputs are kept; the backward pass calls the function a second time.

    The second call draws the same random numbers. The layers of this toolkit draw none, but a module that somebody puts
    into them, such as an adapter with dropout, may.
    """
    return checkpoint(function, *inputs, use_reentrant=False)


def recomputes(device: str, features: int) -> bool:
    """Whether `recomputed_on_cpu` recomputes, for a device and the features of a position.

    On a CPU norms cost little beside matrix products, and their outputs are a third of what would be kept
    (docs/PERFORMANCE.md has the numbers). Where a position has few features, as in the demo's model, preparing to
    recompute takes as long as recomputing. On a GPU norms are bound by memory, so there all is kept; whoever wants less
    has `--checkpoint_activations`, which recomputes whole layers.
    """
    return device == "cpu" and features >= WIDE


def recomputed_on_cpu(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """`function(*inputs)`; where `recomputes` says so, only the inputs are kept.

    It is for something cheap followed by a matrix product, such as a norm and a linear layer. The product is not
    computed twice: PyTorch ends the second call as soon as it has what the backward pass needs, which is the input of
    the product.

    Args:
        inputs: (B, N, features) each, or (B, N, heads, features of a head).
    """
    first = inputs[0]
    again = recomputes(first.device.type, math.prod(first.shape[2:]))
    # A compiler decides for itself what it keeps.
    if again and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return recomputed(function, *inputs)
    return function(*inputs)
