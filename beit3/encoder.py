"""The BEiT-3 encoder: a pre-norm transformer with one set of weights per modality (multiway) and sub-layer norms.

Paper: Wang et al., "Image as a Foreign Language: BEiT Pretraining for All Vision and Vision-Language Tasks",
arXiv 2208.10442. Expert A serves image positions, expert B text positions. Parameter names and shapes are those of
the released weights.

Image and text stay two tensors from the embeddings to the last layer and meet only inside attention: an expert then
works on whole, contiguous tensors, and nothing is split and joined again around every linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# The released position tables count from 2 (a fairseq convention: rows 0 and 1 belong to no position).
FIRST_POSITION = 2
TEXT_POSITIONS = 1024


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of an encoder. Lengths in pixels (`image_size`, `patch_size`), widths in features."""

    width: int
    layers: int
    heads: int
    image_size: int
    patch_size: int = 16
    vocab_size: int = 64010
    drop_path_rate: float = 0.0
    checkpoint_activations: bool = False
    final_norm: bool = True

    @property
    def patches(self) -> int:
        """Patches of one picture, class token not counted."""
        return (self.image_size // self.patch_size) ** 2


class Multiway(nn.Module):
    """Two modules of one kind: `A` for image positions, `B` for text positions."""

    A: Any
    B: Any

    def __init__(self, image_expert: nn.Module, text_expert: nn.Module) -> None:
        super().__init__()
        self.A = image_expert
        self.B = text_expert


def _layer_norms(width: int) -> Multiway:
    return Multiway(nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5))


def _linears(width: int) -> Multiway:
    return Multiway(nn.Linear(width, width), nn.Linear(width, width))


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class Attention(nn.Module):
    """Multi-head attention with a projection per modality and a LayerNorm before the output projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = _linears(width)
        self.v_proj = _linears(width)
        self.q_proj = _linears(width)
        self.out_proj = _linears(width)
        self.inner_attn_ln = _layer_norms(width)

    def project(self, expert: str, x: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the first `rows` positions (None = all) and keys and values of all positions of one modality.

        Args:
            expert: "A" (image) or "B" (text).
            x: (B, N, W), after the layer's first norm.

        Returns:
            q (B, rows, H, D), k (B, N, H, D), v (B, N, H, D).
        """
        q_proj, k_proj, v_proj = (getattr(p, expert) for p in (self.q_proj, self.k_proj, self.v_proj))
        if rows is None:
            # One wide product instead of three: the input is read once.
            weight = torch.cat([q_proj.weight, k_proj.weight, v_proj.weight])  # (3W, W)
            bias = torch.cat([q_proj.bias, k_proj.bias, v_proj.bias])
            q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
        else:
            q, k, v = q_proj(x[:, :rows]), k_proj(x), v_proj(x)
        return tuple(part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax attention at scale D**-0.5.

        Args:
            q: (B, Q, H, D). k, v: (B, K, H, D).
            mask: bool, broadcastable to (B, H, Q, K), True = may attend; None = everything.

        Returns:
            (B, Q, H*D).
        """
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        return out.transpose(1, 2).flatten(2)

    def output(self, expert: str, x: Tensor) -> Tensor:
        """(B, N, W) of attended values → (B, N, W) of one modality's output."""
        return getattr(self.out_proj, expert)(getattr(self.inner_attn_ln, expert)(x))


class FeedForward(nn.Module):
    """Two linear layers around GELU (erf form) and a LayerNorm."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.ffn_layernorm = nn.LayerNorm(hidden, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        # gelu evaluates half-precision inputs in fp32 inside the kernel, as the released model did by hand.
        return self.fc2(self.ffn_layernorm(F.gelu(self.fc1(x))))


@dataclass(frozen=True)
class AttentionRule:
    """Who may look at what.

    Attributes:
        mask: bool, True = may attend; None = everything. Its keys are the joint sequence (image, then text). With
            `image_sees_text` it speaks for every query: (B, 1, 1, P+1+T); without, for text queries only:
            (B, 1, T, P+1+T).
        image_sees_text: False when image queries attend to image keys alone (captioning).
    """

    mask: Tensor | None = None
    image_sees_text: bool = True


class EncoderLayer(nn.Module):
    """One multiway layer: attention over both modalities, then a feed-forward of each."""

    def __init__(self, config: EncoderConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.self_attn = Attention(config.width, config.heads)
        self.self_attn_layer_norm = _layer_norms(config.width)
        self.ffn = Multiway(*(FeedForward(config.width, 4 * config.width) for _ in range(2)))
        self.final_layer_norm = _layer_norms(config.width)

    def forward(
        self,
        image: Tensor | None,
        text: Tensor | None,
        rule: AttentionRule,
        image_rows: int | None = None,
        text_rows: int | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Args:
            image: (B, P+1, W) or None. text: (B, T, W) or None.
            image_rows, text_rows: compute only that many leading positions of a modality (None = all, 0 = none).
                Their values are those of the whole layer; keys and values always come from all positions.

        Returns:
            The two modalities with `*_rows` positions each; None where there is nothing to compute.
        """
        streams = {e: (x, rows) for e, x, rows in (("A", image, image_rows), ("B", text, text_rows)) if x is not None}
        attended = self._attention(streams, rule)
        outputs = {expert: streams[expert][0][:, : values.shape[1]] for expert, values in attended.items()}
        scale = self._drop_path_scale(next(iter(outputs.values())))
        for expert, x in outputs.items():
            outputs[expert] = _add(x, self.self_attn.output(expert, attended[expert]), scale)
        scale = self._drop_path_scale(next(iter(outputs.values())))
        for expert, x in outputs.items():
            branch = getattr(self.ffn, expert)(getattr(self.final_layer_norm, expert)(x))
            outputs[expert] = _add(x, branch, scale)
        return outputs.get("A"), outputs.get("B")

    def _attention(self, streams: dict[str, tuple[Tensor, int | None]], rule: AttentionRule) -> dict[str, Tensor]:
        """Attended values of each modality that has rows to compute: {expert: (B, rows, W)}."""
        norm = {expert: getattr(self.self_attn_layer_norm, expert)(x) for expert, (x, _) in streams.items()}
        projected = {e: self.self_attn.project(e, norm[e], rows) for e, (_, rows) in streams.items()}
        queries = {expert: q for expert, (q, _, _) in projected.items() if q.shape[1] > 0}
        keys = _join([k for _, k, _ in projected.values()], 1)
        values = _join([v for _, _, v in projected.values()], 1)
        if rule.image_sees_text:
            joint = self.self_attn.attend(_join(list(queries.values()), 1), keys, values, rule.mask)
            parts = joint.split([q.shape[1] for q in queries.values()], dim=1)
            return dict(zip(queries, parts, strict=True))
        attended = {}
        if "A" in queries:
            attended["A"] = self.self_attn.attend(queries["A"], projected["A"][1], projected["A"][2], None)
        if "B" in queries:
            attended["B"] = self.self_attn.attend(queries["B"], keys, values, rule.mask)
        return attended

    def _drop_path_scale(self, like: Tensor) -> Tensor | None:
        """(B, 1, 1) of 0 or 1/keep, one draw per sample for both modalities; None when nothing is dropped."""
        if not self.training or self.drop_path_rate == 0.0:
            return None
        keep = 1.0 - self.drop_path_rate
        kept = torch.empty(like.shape[0], 1, 1, dtype=torch.float32, device=like.device).bernoulli_(keep)
        return (kept / keep).to(like.dtype)


def _add(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return x + branch
    return torch.addcmul(x, branch, scale.to(branch.dtype)) if x.dtype == branch.dtype else x + branch * scale


class _Layers(nn.Module):
    """Position tables, layers and the final norm; holds the names under `beit3.encoder.`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.embed_positions = Multiway(
            nn.Embedding(config.patches + 1 + FIRST_POSITION, config.width),
            nn.Embedding(TEXT_POSITIONS, config.width),
        )
        deepest = max(config.layers - 1, 1)
        self.layers = nn.ModuleList(
            EncoderLayer(config, config.drop_path_rate * depth / deepest) for depth in range(config.layers)
        )
        if config.final_norm:
            self.layer_norm = _layer_norms(config.width)


class _PatchEmbedding(nn.Module):
    """A picture in patches with a class token in front; holds the names under `beit3.vision_embed.`."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        # In the released weights, used by pre-training alone.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, H) → (B, P+1, W), class token first, then patches row by row."""
        patches = self.proj(image).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.to(patches.dtype).expand(patches.shape[0], -1, -1), patches], dim=1)


class BEiT3(nn.Module):
    """Encoder of pictures, texts, or both.

    Source of the layout: the released weights; see `EncoderConfig` for sizes.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        if config.image_size % config.patch_size or config.width % config.heads:
            raise ValueError(
                f"image_size {config.image_size} must be a multiple of patch_size {config.patch_size}, "
                f"and width {config.width} of heads {config.heads}"
            )
        self.config = config
        self.text_embed = nn.Embedding(config.vocab_size, config.width)
        self.vision_embed = _PatchEmbedding(config.width, config.patch_size)
        self.encoder = _Layers(config)

    def embed_image(self, image: Tensor) -> Tensor:
        """(B, 3, H, H) in [-1, 1] → (B, P+1, W)."""
        size = self.config.image_size
        if image.shape[-2:] != (size, size):
            raise ValueError(f"pictures are {tuple(image.shape[-2:])} pixels, this model takes ({size}, {size})")
        x = self.vision_embed(image)
        return x + self.encoder.embed_positions.A.weight[FIRST_POSITION:].to(x.dtype)

    def embed_text(self, text_ids: Tensor, padding_mask: Tensor | None, first_position: int = 0) -> Tensor:
        """Token ids (B, T) → (B, T, W); rows of padding are 0. Text position t uses row t + 2 of its table."""
        start = FIRST_POSITION + first_position
        if start + text_ids.shape[1] > TEXT_POSITIONS:
            raise ValueError(f"a text of {text_ids.shape[1]} tokens is longer than {TEXT_POSITIONS - start}")
        x = self.text_embed(text_ids) + self.encoder.embed_positions.B.weight[start : start + text_ids.shape[1]]
        return x if padding_mask is None else x.masked_fill(padding_mask.unsqueeze(-1), 0.0)

    def forward(
        self,
        image: Tensor | None = None,
        text_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        *,
        causal_text: bool = False,
        image_rows: int | None = None,
        text_rows: int | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Args:
            image: (B, 3, H, H) in [-1, 1], or None. text_ids: (B, T) token ids, or None.
            padding_mask: (B, T) bool or integer, 1 = padding.
            causal_text: text attends to the picture and to itself and earlier text, the picture to itself only. The
                texts may then be (B*N, T): rows i*N … i*N+N-1 are texts of picture i, which is computed once for all.
            image_rows, text_rows: how many leading positions of the last layer are wanted (None = all, 0 = none).

        Returns:
            Features of the picture (B, image_rows, W) and of the text (B, text_rows, W); None where not wanted.
        """
        if image is None and text_ids is None:
            raise ValueError("the encoder needs a picture, a text, or both")
        padding_mask = None if padding_mask is None or text_ids is None else padding_mask.bool()
        x_image = None if image is None else self.embed_image(image)
        x_text = None if text_ids is None else self.embed_text(text_ids, padding_mask)
        texts = _texts_per_image(x_image, x_text)
        assert texts == 1 or (causal_text and text_rows in (None, 0)), "several texts per picture need causal_text"
        rule = attention_rule(x_image, x_text, padding_mask, causal_text)
        if x_text is not None and texts > 1:
            x_text = x_text.unflatten(0, (-1, texts)).flatten(1, 2)  # (B, N*T, W): the texts of a picture in one row
        *inner, last = self.encoder.layers
        for layer in inner:
            x_image, x_text = self._run(layer, x_image, x_text, rule)
        x_image, x_text = self._run(last, x_image, x_text, rule, image_rows, text_rows)
        if self.config.final_norm:
            norm = self.encoder.layer_norm
            x_image = None if x_image is None else norm.A(x_image)
            x_text = None if x_text is None else norm.B(x_text)
        if x_text is not None and texts > 1:
            x_text = x_text.unflatten(1, (texts, -1)).flatten(0, 1)
        return x_image, x_text

    def _run(self, layer: nn.Module, *inputs: object) -> tuple[Tensor | None, Tensor | None]:
        if self.config.checkpoint_activations and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


def _texts_per_image(image: Tensor | None, text: Tensor | None) -> int:
    """N of texts (B*N, T, W) and pictures (B, P+1, W); 1 where one of them is missing."""
    if image is None or text is None:
        return 1
    texts, rest = divmod(text.shape[0], image.shape[0])
    if rest or not texts:
        raise ValueError(f"{text.shape[0]} texts cannot be shared evenly among {image.shape[0]} pictures")
    return texts


def attention_rule(
    image: Tensor | None, text: Tensor | None, padding_mask: Tensor | None, causal_text: bool
) -> AttentionRule:
    """The rule for one batch, built once and used by every layer.

    Args:
        image: (B, P+1, W) or None. text: (B, T, W) or None; (B*N, T, W) for N texts of each picture, whose mask is
            (B, 1, N*T, P+1+N*T). padding_mask: of the shape of the texts, bool, True = padding, or None.
    """
    if text is None:
        return AttentionRule()
    batch, length = text.shape[:2]
    image_keys = 0 if image is None else image.shape[1]
    if padding_mask is not None and padding_mask.device.type == "cpu" and not bool(padding_mask.any()):
        padding_mask = None  # nothing to hide: attention without a mask is faster; free to ask on a CPU only
    if padding_mask is None and not causal_text:
        return AttentionRule()
    attend = torch.ones(batch, 1, length, length, dtype=torch.bool, device=text.device)  # True = may attend
    if causal_text:
        attend = attend.tril()
    if padding_mask is not None:
        attend = attend & ~padding_mask[:, None, None, :]
    if not causal_text:
        attend = attend[:, :, :1]  # one row serves every query
    texts = _texts_per_image(image, text)
    if texts > 1:
        # Texts of one picture stand in one row and do not see each other: blocks along the diagonal.
        same_text = torch.eye(texts, dtype=torch.bool, device=text.device)[:, None, :, None]  # (N, 1, N, 1)
        blocks = same_text & attend.view(-1, texts, length, 1, length)  # (B, N, T, N, T)
        attend = blocks.flatten(3).flatten(1, 2).unsqueeze(1)  # (B, 1, N*T, N*T)
    mask = F.pad(attend, (image_keys, 0), value=True)
    return AttentionRule(mask, image_sees_text=not causal_text)
