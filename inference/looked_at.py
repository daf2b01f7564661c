"""What an answer looked at: how much of it came from each patch of the picture, through the attention of all layers.

In every layer the weights of attention are multiplied by the gradient of the answer's logit, and what speaks against
the answer is left out; followed back from the class token through the layers, this says which patches reached the
answer (H. Chefer et al., Generic Attention-model Explainability, ICCV 2021, self-attention). On the demo's questions
about one of three shapes docs/PAGE.md tells how often the brightest patch lies in the cell of the shape asked about.

It shows where what the answer was made of came from, not why it was given, and nothing of what happens between two
layers other than attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from inference.predictor import Predictor

LONGER_SIDE = 640  # pixels of the picture that the map is laid over; pictures are enlarged or shrunk to it
_WEAK, _STRONG = (214.0, 40.0, 40.0), (255.0, 224.0, 64.0)  # colours of the map, RGB, 0-255
_COVER = 0.8  # of the picture by the colour where the map is strongest


class _Weights(TorchFunctionMode):
    """Keeps the weights of each attention that is computed within, (B, H, Q, K), which the fused kernel does not give.

    The model is neither changed nor told, and other threads are not concerned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.of_layers: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """As `F.scaled_dot_product_attention` with a bool mask, True = may attend; in separate steps."""
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        weights = scores.softmax(dim=-1)
        if not weights.requires_grad:  # nothing before needs a gradient, where parameters are frozen
            weights.requires_grad_()
        self.of_layers.append(weights)
        return weights @ v


def looked_at(predictor: Predictor, picture: Any, question: str, said: str | None = None) -> Tensor:
    """How much of an answer came from each patch: fp32 (S/16, S/16) on the CPU for a model of S pixels, row by row.

    The values are at least 0 and add up to 1; all are 0 where no patch spoke for the answer. They are computed in fp32
    whatever the predictor's precision, and leave no gradient behind. A call takes five times as long as an answer and
    keeps the attention weights of all layers meanwhile: 1.4 GB more for the base model at 480 pixels.

    said: the answer, one of those that are told; None: the best one.

    Raises:
        InputError, ImageError: as `Predictor.answer`.
        FloatingPointError: what the model computed are no numbers.
    """
    batch = predictor.task.prepare(
        predictor.collate([predictor.item(picture, question)]), predictor.device, torch.float32
    )
    with torch.enable_grad(), torch.autocast(predictor.device.type, enabled=False), _Weights() as weights:
        columns = predictor.task.predict_step(predictor.model, batch)
        if not bool(columns["finite"]):
            raise FloatingPointError("the model's numbers are not finite; use another checkpoint")
        place = 0 if said is None else _place(predictor, columns, said)
        gradients = torch.autograd.grad(columns["logits"][0, place], weights.of_layers)
        reached = followed_back([each.detach()[0] for each in weights.of_layers], [each[0] for each in gradients])
    config = predictor.model.beit3.config
    patches = reached[1 : 1 + config.patches].cpu()
    side = config.image_size // config.patch_size
    return (patches / patches.sum().clamp_min(torch.finfo(torch.float32).tiny)).reshape(side, side)


def _place(predictor: Predictor, columns: dict[str, Any], said: str) -> int:
    """Of an answer among those that are told; 0 where it is none of them."""
    values = {name: value.detach().cpu() for name, value in columns.items()}
    told: Any = predictor.task.told(values)[0]
    return next((place for place, each in enumerate(told) if each.text == said), 0)


def followed_back(weights: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """How much each position reached the first one: (K,), at least 0.

    weights, gradients: (H, Q, K) of each layer, the first layer first; Q leading positions of the K were computed.
    """
    reached = torch.zeros(weights[0].shape[-1], device=weights[0].device)
    reached[0] = 1.0  # the class token, which the answer is read from
    for weight, gradient in zip(reversed(weights), reversed(gradients), strict=True):
        flow = (weight * gradient).clamp_min(0).mean(dim=0)  # (Q, K): from position k to position q
        reached = reached + reached[: flow.shape[0]] @ flow
    return reached


def overlay(pixels: Tensor, heat: Tensor) -> Tensor:
    """The picture in grey with the map over it, from red to yellow: uint8 (H', W', 3), the longer side `LONGER_SIDE`.

    pixels: uint8 (3, H, W). heat: (h, w), at least 0, over the whole picture; the largest value is the brightest.
    """
    scale = LONGER_SIDE / max(pixels.shape[1:])
    size = [max(1, round(length * scale)) for length in pixels.shape[1:]]
    picture = F.interpolate(pixels[None].float(), size, mode="bilinear", antialias=True)[0]
    grey = (picture * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=0)  # (H', W'), as Pillow's "L"
    largest = heat.max().clamp_min(torch.finfo(torch.float32).tiny)
    strength = F.interpolate((heat.float() / largest)[None, None], size, mode="bilinear")[0, 0]  # (H', W') in [0, 1]
    weak, strong = (torch.tensor(colour)[:, None, None] for colour in (_WEAK, _STRONG))
    colour = weak + (strong - weak) * strength
    cover = _COVER * strength
    return ((1 - cover) * grey + cover * colour).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
