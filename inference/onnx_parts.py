"""A model's weights in the form that ONNX runtimes compute fast, and the files made of it.

The modules here compute what the models of `modeling_finetune` compute, from the same weights, but take no decision by
the values of their inputs and hold q, k and v as one matrix, ready to multiply: an exporter would write its making into
the graph, and a quantizer takes only matrices that stand in the file. `inference.onnx_checks` compares the two.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.model.encoder import TEXT_POSITIONS, EncoderLayer

OPSET = 18  # of ONNX; runtimes since 2023 know it
HIDDEN = -1e9  # added to a score of attention; softmax makes 0 of it


class _Product(nn.Module):
    """Linear layers of one input side by side: (…, in) → (…, out of all). `scale` multiplies the first one's output."""

    weight: Tensor
    bias: Tensor

    def __init__(self, *linears: nn.Linear, scale: float = 1.0) -> None:
        super().__init__()
        scales = [scale] + [1.0] * (len(linears) - 1)
        pairs = list(zip(linears, scales, strict=True))
        weight = torch.cat([linear.weight.detach() * each for linear, each in pairs])
        self.register_buffer("weight", weight.t().contiguous())  # as a product of matrices reads it
        self.register_buffer("bias", torch.cat([linear.bias.detach() * each for linear, each in pairs]))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class _Expert(nn.Module):
    """One modality of a layer. expert: "A" (image) or "B" (text)."""

    def __init__(self, layer: EncoderLayer, expert: str) -> None:
        super().__init__()
        attention, ffn = layer.self_attn, getattr(layer.ffn, expert)
        projections = [getattr(each, expert) for each in (attention.q_proj, attention.k_proj, attention.v_proj)]
        size = projections[0].out_features // attention.heads
        self.heads = attention.heads
        self.first_norm = getattr(layer.self_attn_layer_norm, expert)
        self.project = _Product(*projections, scale=size**-0.5)  # attention wants its scores at this scale
        self.inner_norm = getattr(attention.inner_attn_ln, expert)
        self.out = _Product(getattr(attention.out_proj, expert))
        self.second_norm = getattr(layer.final_layer_norm, expert)
        self.fc1, self.fc2 = _Product(ffn.fc1), _Product(ffn.fc2)
        self.ffn_norm = ffn.ffn_layernorm

    def projected(self, x: Tensor) -> Tensor:
        """(N, P, W) → (N, P, 3W): q, k and v."""
        return self.project(self.first_norm(x))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows attention: x and attended values (N, P, W) → (N, P, W)."""
        x = x + self.out(self.inner_norm(attended))
        return x + self.fc2(self.ffn_norm(F.gelu(self.fc1(self.second_norm(x)))))


def _in_heads(projected: Tensor, heads: int) -> list[Tensor]:
    """(N, P, 3W) → q, k, v, (N, heads, P, D) each."""
    return [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in projected.chunk(3, dim=-1)]


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Softmax attention on queries that are scaled already, (N, heads, Q, D) → (N, Q, W). hidden: added to scores."""
    scores = q @ k.transpose(-1, -2)
    if hidden is not None:
        scores = scores + hidden
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


class Answering(nn.Module):
    """Picture and question → a logit for each answer.

    answers: how many of the head's outputs have a name. mean, std: of the task's pictures, in [0, 1].
    """

    image_experts: Any  # _Expert of each layer
    text_experts: Any

    def __init__(self, model: Any, answers: int, mean: float, std: float) -> None:
        super().__init__()
        self.beit3, self.pooler, self.head = model.beit3, model.pooler, model.head
        self.answers, self.mean, self.std = answers, mean, std
        self.image_experts = nn.ModuleList(_Expert(layer, "A") for layer in model.beit3.encoder.layers)
        self.text_experts = nn.ModuleList(_Expert(layer, "B") for layer in model.beit3.encoder.layers)

    def forward(self, image: Tensor, token_ids: Tensor, padding_mask: Tensor) -> Tensor:
        """image: (N, 3, S, S) uint8. token_ids: (N, T) int64. padding_mask: (N, T) bool, True = padding.

        Returns:
            Logits (N, answers).
        """
        x = self.beit3.embed_image(_normalised(image, self.mean, self.std))
        text = self.beit3.embed_text(token_ids, padding_mask)
        positions = x.shape[1]
        hidden = torch.zeros_like(padding_mask, dtype=x.dtype).masked_fill(padding_mask, HIDDEN)
        hidden = F.pad(hidden, (positions, 0))[:, None, None, :]  # (N, 1, 1, P+1+T)
        last = len(self.image_experts) - 1
        for number, (of_image, of_text) in enumerate(zip(self.image_experts, self.text_experts, strict=True)):
            projected = torch.cat([of_image.projected(x), of_text.projected(text)], dim=1)
            q, k, v = _in_heads(projected, of_image.heads)
            if number == last:  # the head reads the class token alone
                x = of_image.finish(x[:, :1], _attend(q[:, :, :1], k, v, hidden))
            else:
                attended = _attend(q, k, v, hidden)
                x = of_image.finish(x, attended[:, :positions])
                text = of_text.finish(text, attended[:, positions:])
        return self.head(self.pooler(x))[:, : self.answers]


class PictureEncoder(nn.Module):
    """Picture → keys and values of each layer, for `CaptionStep`. mean, std: as in `Answering`."""

    experts: Any  # _Expert of each layer

    def __init__(self, model: Any, mean: float, std: float) -> None:
        super().__init__()
        self.beit3, self.mean, self.std = model.beit3, mean, std
        self.experts = nn.ModuleList(_Expert(layer, "A") for layer in model.beit3.encoder.layers)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, S, S) uint8 → keys and values, (layers, N, heads, P+1, D) each."""
        x = self.beit3.embed_image(_normalised(image, self.mean, self.std))
        keys, values = [], []
        last = len(self.experts) - 1
        for number, expert in enumerate(self.experts):
            q, k, v = _in_heads(expert.projected(x), expert.heads)
            keys.append(k)
            values.append(v)
            if number < last:  # of the last layer only keys and values are wanted
                x = expert.finish(x, _attend(q, k, v))
        return torch.stack(keys), torch.stack(values)


class CaptionStep(nn.Module):
    """The newest token of a caption → logits of the next one.

    The model fills in a mask: the newest token stands in front of `<mask>`, and what is predicted there is the next
    token. Keys and values of the newest token are handed on; those of the mask are not.
    """

    pair_rule: Tensor
    experts: Any  # _Expert of each layer

    def __init__(self, model: Any, mask_id: int) -> None:
        super().__init__()
        self.beit3, self.mask_id = model.beit3, mask_id
        self.experts = nn.ModuleList(_Expert(layer, "B") for layer in model.beit3.encoder.layers)
        self.head = _Product(model.mlm_head)
        # A token does not see the mask behind it; the mask sees both.
        self.register_buffer("pair_rule", torch.tensor([[0.0, HIDDEN], [0.0, 0.0]]))

    def forward(
        self, token_ids: Tensor, image_keys: Tensor, image_values: Tensor, text_keys: Tensor, text_values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Args:
            token_ids: (N,) int64, the newest token of each caption; `<s>` at first.
            image_keys, image_values: of `PictureEncoder`, (layers, N, heads, P+1, D).
            text_keys, text_values: what the step before gave, (layers, N, heads, t, D); t = 0 at first.

        Returns:
            Logits (N, vocabulary), and text_keys and text_values with t + 1 positions.
        """
        known = text_keys.shape[3]
        pairs = torch.stack([token_ids, torch.full_like(token_ids, self.mask_id)], dim=1)  # (N, 2)
        x = self.beit3.embed_text(pairs, None, first_position=known)  # (N, 2, W)
        hidden = F.pad(self.pair_rule, (image_keys.shape[3] + known, 0))  # (2, P+1+t+2)
        keys, values = [], []
        last = len(self.experts) - 1
        for number, expert in enumerate(self.experts):
            q, k, v = _in_heads(expert.projected(x), expert.heads)
            keys.append(torch.cat([text_keys[number], k[:, :, :1]], dim=2))
            values.append(torch.cat([text_values[number], v[:, :, :1]], dim=2))
            every_key = torch.cat([image_keys[number], keys[-1], k[:, :, 1:]], dim=2)
            every_value = torch.cat([image_values[number], values[-1], v[:, :, 1:]], dim=2)
            if number == last:  # the token's own output is of no use any more
                x, q, hidden = x[:, 1:], q[:, :, 1:], hidden[1:]
            x = expert.finish(x, _attend(q, every_key, every_value, hidden))
        if self.beit3.config.final_norm:
            x = self.beit3.encoder.layer_norm.B(x)
        return self.head(x[:, 0]), torch.stack(keys), torch.stack(values)


def _normalised(image: Tensor, mean: float, std: float) -> Tensor:
    """uint8 → fp32, as `beit3.data.images.normalize`."""
    return (image.float() - 255.0 * mean) / (255.0 * std)


def write_answering(module: Answering, file: Path) -> None:
    """The ONNX file of a model that answers: inputs image, token_ids, padding_mask; output logits."""
    size = module.beit3.config.image_size
    pictures, texts = torch.export.Dim("N"), torch.export.Dim("T", max=TEXT_POSITIONS - 2)
    inputs = (
        torch.zeros(2, 3, size, size, dtype=torch.uint8),
        torch.zeros(2, 5, dtype=torch.int64),
        torch.zeros(2, 5, dtype=torch.bool),
    )
    shapes = ({0: pictures}, {0: pictures, 1: texts}, {0: pictures, 1: texts})
    _write(module, inputs, shapes, ["image", "token_ids", "padding_mask"], ["logits"], file)


def write_encoder(module: PictureEncoder, file: Path) -> None:
    """The ONNX file of the pictures' half: input image; outputs image_keys, image_values."""
    size = module.beit3.config.image_size
    inputs = (torch.zeros(2, 3, size, size, dtype=torch.uint8),)
    _write(module, inputs, ({0: torch.export.Dim("N")},), ["image"], ["image_keys", "image_values"], file)


def write_step(module: CaptionStep, file: Path) -> None:
    """The ONNX file of a step of the search: the arguments and results of `CaptionStep.forward` by these names."""
    config = module.beit3.config
    rows, known = torch.export.Dim("N"), torch.export.Dim("t", max=TEXT_POSITIONS - 4)
    size = config.width // config.heads
    of_image = torch.zeros(config.layers, 2, config.heads, config.patches + 1, size)
    of_text = torch.zeros(config.layers, 2, config.heads, 3, size)
    inputs = (torch.zeros(2, dtype=torch.int64), of_image, of_image.clone(), of_text, of_text.clone())
    shapes = ({0: rows}, {1: rows}, {1: rows}, {1: rows, 3: known}, {1: rows, 3: known})
    names = ["token_ids", "image_keys", "image_values", "text_keys", "text_values"]
    _write(module, inputs, shapes, names, ["logits", "new_text_keys", "new_text_values"], file)


def _write(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    shapes: Sequence[Any],
    input_names: list[str],
    output_names: list[str],
    file: Path,
) -> None:
    """Trace the module and write it; the weights go to `<file>.data` beside it, as a file of ONNX ends at 2 GB."""
    with warnings.catch_warnings(), torch.no_grad():
        # It warns that two inputs share a dimension, which is what they are to do.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            inputs,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=tuple(shapes),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None, "the exporter without dynamo was asked"
        program.save(file, external_data=True)


def quantized(file: Path, target: Path) -> None:
    """The same model with the weights of its products in int8, a scale for each output; activations are quantised as
    they come."""
    import logging

    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # it advises a preparation that its graph has had already
    try:
        quantize_dynamic(
            file,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            # Processors without VNNI add two products in 16 bits; 7 bits of weight never overflow there.
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )
    finally:
        logging.disable(logging.NOTSET)
