"""An exponential moving average of the weights, kept in fp32 whatever the model computes in.

In bf16 an average with decay 0.9999 never moves: the step is below the last digit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def applied_to(module: nn.Module, averages: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Inside, the module computes with the averages; afterwards with its own weights again. None: nothing is done.

    Parameters without an average, which are the frozen ones, are the same in both.
    """
    own = {}
    if averages is not None:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name in averages:
                    own[name] = parameter.detach().clone()
                    parameter.copy_(averages[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name in own:
                    parameter.copy_(own[name])


class ModelEma:
    """Averages of named parameters; those that are frozen need none.

    Attributes:
        averages: {name: fp32 tensor}, on the parameters' device or on the CPU.
        decay: in [0, 1); each update is average = decay · average + (1 - decay) · parameter.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], decay: float, on_cpu: bool = False) -> None:
        self.decay = decay
        self.averages = {
            name: tensor.detach().to("cpu" if on_cpu else tensor.device, torch.float32, copy=True)
            for name, tensor in parameters
        }

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Args: parameters: fp32 (name, tensor) pairs, the names of the start in any order; others are passed over."""
        new = {name: tensor.detach() for name, tensor in parameters if name in self.averages}
        averages = [self.averages[name] for name in new]
        values = [
            tensor.to(average.device, torch.float32) for tensor, average in zip(new.values(), averages, strict=True)
        ]
        torch._foreach_lerp_(averages, values, 1.0 - self.decay)

    def load(self, averages: dict[str, Tensor]) -> None:
        """Take saved averages over; every name must be there with its shape."""
        if averages.keys() != self.averages.keys():
            raise ValueError("the saved averages do not belong to this model")
        for name, average in self.averages.items():
            average.copy_(averages[name])
