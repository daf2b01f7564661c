"""`--compile`: the encoder's layers through torch.compile, in training.

Only a layer is compiled, not the model: all layers but the last share what is compiled, so it takes a minute and not
ten, and nothing around them has to be something a compiler understands. The encoder brings texts to few lengths
(16, 32, 64 …) then, because each new shape is compiled anew. Evaluation and generation run as they do without.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from beit3.model.encoder import BEiT3

logger = logging.getLogger(__name__)

# Shapes of one layer: inner and last layers, a few lengths of texts. PyTorch's own limit, 8, would end in silence.
MOST_SHAPES = 32


def compile_layers(encoder: BEiT3, device: torch.device) -> bool:
    """Have the encoder run its layers compiled in training; where that does not work here, say so in a line.

    Returns:
        Whether they will be compiled.
    """
    problem = compiler_problem(device)
    if problem is not None:
        logger.warning("--compile: goes on without, there is no working compiler here (%s)", problem)
        return False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
    encoder.compiled_layer = torch.compile(_call, dynamic=False)
    return True


def compiler_problem(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device here, in a line; None when it can. Takes seconds at its first use."""
    try:
        torch.compile(_probe, dynamic=False)(torch.ones(8, device=device, requires_grad=True)).sum().backward()
    except Exception as error:  # no C++ compiler, no Triton, an old GPU, a folder that cannot be written: all mean "no"
        return (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
    finally:
        torch._dynamo.reset()
    return None


def _probe(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x) * 2


def _call(layer: nn.Module, *inputs: object) -> Any:
    return layer(*inputs)
