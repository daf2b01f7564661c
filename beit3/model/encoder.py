"""The BEiT-3 encoder: a pre-norm transformer with one set of weights per modality (multiway) and sub-layer norms.

Paper: Wang et al., "Image as a Foreign Language: BEiT Pretraining for All Vision and Vision-Language Tasks",
arXiv 2208.10442. Expert A serves image positions, expert B text positions. Parameter names and shapes are those of
the released weights.

Image and text stay two tensors from the embeddings to the last layer and meet only inside attention: an expert then
works on whole, contiguous tensors, and nothing is split and joined again around every linear layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.model.recompute import recomputed, recomputed_on_cpu

# The released position tables count from 2 (a fairseq convention: rows 0 and 1 belong to no position).
FIRST_POSITION = 2
TEXT_POSITIONS = 1024


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of an encoder, and how it is trained.

    Attributes:
        width: features of a position. heads: of attention, `width / heads` features each.
        image_size, patch_size: side of a picture and of a patch, in pixels.
        drop_path_rate: of the last layer, see `BEiT3._draw_drop_path`.
        recompute_activations: keep only the inputs of layers in training and compute each layer again in the backward
            pass.
        final_norm: whether a norm follows the last layer.
    """

    width: int
    layers: int
    heads: int
    image_size: int
    patch_size: int = 16
    vocab_size: int = 64010
    drop_path_rate: float = 0.0
    recompute_activations: bool = False
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


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the module gives `F.linear(x, module.weight, module.bias)` and does nothing else.

    Not so for adapters and quantised layers, be they other classes (subclasses of nn.Linear too, which
    torch.nn.utils.parametrize makes), hooks, another `forward` of this one module, or another class of tensor as its
    weight.
    """
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    # DeepSpeed's own hooks (ZeRO-3) gather a module's parameters; reading `module.weight` gathers them just as well.
    if any(not str(hook.__module__).startswith("deepspeed.") for each in hooks for hook in each.values()):
        return False
    return module.bias is not None and type(module.weight) in (nn.Parameter, Tensor)


def _join(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


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

    def joint_projection(self, expert: str) -> tuple[Tensor, Tensor] | None:
        """Weight (3W, W) and bias (3W,) of q, k and v of one modality as one linear layer.

        This is the only place that reads these weights. None where one of the three is more than a plain nn.Linear, for
        instance an adapter or a quantised layer: such a module must be called to take effect.
        """
        parts = [getattr(projection, expert) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        if not all(is_plain_linear(part) for part in parts):
            return None
        return torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])

    def project(
        self, expert: str, x: Tensor, rows: int | None = None, joint: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the first `rows` positions (None = all) and keys and values of all positions of one modality.

        Args:
            expert: "A" (image) or "B" (text).
            x: (B, N, W), after the layer's first norm.
            joint: what `joint_projection(expert)` gave, for a caller that needs it often.

        Returns:
            q (B, rows, H, D), k (B, N, H, D), v (B, N, H, D).
        """
        # With fewer queries than keys there is no joint product, so nothing is read and the modules are called.
        if rows is None and joint is None:
            joint = self.joint_projection(expert)
        if rows is None and joint is not None:
            # One wide product instead of three: the input is read once.
            q, k, v = F.linear(x, *joint).chunk(3, dim=-1)  # (B, N, 3W) → three of (B, N, W)
        else:
            q_proj, k_proj, v_proj = (getattr(each, expert) for each in (self.q_proj, self.k_proj, self.v_proj))
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
        norm, projection = getattr(self.inner_attn_ln, expert), getattr(self.out_proj, expert)
        return recomputed_on_cpu(lambda attended: projection(norm(attended)), x)


class FeedForward(nn.Module):
    """Two linear layers around GELU (erf form) and a LayerNorm."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.ffn_layernorm = nn.LayerNorm(hidden, eps=1e-5)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        """x (B, N, W) → (B, N, W). `norm` is the layer's, which is applied to x first."""
        # A norm is recomputed together with the linear layer behind it, so its output need not be kept.
        # gelu evaluates half-precision inputs in fp32 inside the kernel, as the released model did by hand.
        hidden = F.gelu(recomputed_on_cpu(lambda x: self.fc1(norm(x)), x))  # (B, N, 4W)
        return recomputed_on_cpu(lambda hidden: self.fc2(self.ffn_layernorm(hidden)), hidden)


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

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config.width, config.heads)
        self.self_attn_layer_norm = _layer_norms(config.width)
        self.ffn = Multiway(*(FeedForward(config.width, 4 * config.width) for _ in range(2)))
        self.final_layer_norm = _layer_norms(config.width)

    def forward(
        self,
        image: Tensor | None,
        text: Tensor | None,
        rule: AttentionRule,
        drop_path: Tensor | None = None,
        image_rows: int | None = None,
        text_rows: int | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """One layer over both modalities.

        Args:
            image: (B, P+1, W) or None. text: (B, T, W) or None.
            drop_path: (2, B, 1, 1) factors of attention and of the feed-forward, 0 or 1/keep for each sample, the same
                for both modalities; None = nothing is dropped.
            image_rows, text_rows: compute only that many leading positions of a modality (None = all, 0 = none).
                Their values are those of the whole layer; keys and values always come from all positions.

        Returns:
            The two modalities with `*_rows` positions each; None where there is nothing to compute.
        """
        streams = {e: (x, rows) for e, x, rows in (("A", image, image_rows), ("B", text, text_rows)) if x is not None}
        attended = self._attention(streams, rule)
        # Everything behind attention treats each position by itself, so positions without queries can be left out: a
        # modality has as many rows from here on as attention gave it, and one without rows is gone.
        outputs = {expert: streams[expert][0][:, : values.shape[1]] for expert, values in attended.items()}
        of_attention, of_ffn = (None, None) if drop_path is None else drop_path  # (B, 1, 1) each
        for expert, x in outputs.items():
            outputs[expert] = _add(x, self.self_attn.output(expert, attended[expert]), of_attention)
        for expert, x in outputs.items():
            outputs[expert] = _add(x, getattr(self.ffn, expert)(x, getattr(self.final_layer_norm, expert)), of_ffn)
        return outputs.get("A"), outputs.get("B")

    def _project(self, expert: str, x: Tensor, rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
        norm = getattr(self.self_attn_layer_norm, expert)
        return recomputed_on_cpu(lambda x: self.self_attn.project(expert, norm(x), rows), x)

    def _attention(self, streams: dict[str, tuple[Tensor, int | None]], rule: AttentionRule) -> dict[str, Tensor]:
        """Attended values of each modality that has rows to compute: {expert: (B, rows, W)}."""
        projected = {e: self._project(e, x, rows) for e, (x, rows) in streams.items()}
        queries = {expert: q for expert, (q, _, _) in projected.items() if q.shape[1] > 0}
        keys, values = ([each[part] for each in projected.values()] for part in (1, 2))
        if rule.image_sees_text:
            # Everybody sees the same keys: one call with the modalities behind one another, (B, P+1+T, H, D).
            q, k, v = (_join(parts, 1) for parts in ([*queries.values()], keys, values))
            parts = self.self_attn.attend(q, k, v, rule.mask).split([q.shape[1] for q in queries.values()], dim=1)
            return dict(zip(queries, parts, strict=True))
        # The picture sees only itself, the text sees both: two calls. One call would compute the picture's scores for
        # the text only to hide them, and its mask would keep the fast kernel away from the picture's many queries.
        attended = {}
        if "A" in queries:
            attended["A"] = self.self_attn.attend(queries["A"], projected["A"][1], projected["A"][2], None)
        if "B" in queries:
            # Joining copies the picture's keys and values; the copy is recomputed rather than kept.
            def of_text(q: Tensor, *keys_and_values: Tensor) -> Tensor:
                half = len(keys_and_values) // 2  # keys of each modality, then values of each
                k, v = _join(keys_and_values[:half], 1), _join(keys_and_values[half:], 1)
                return self.self_attn.attend(q, k, v, rule.mask)

            attended["B"] = recomputed_on_cpu(of_text, queries["B"], *keys, *values)
        return attended


def _add(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """x + branch (B, N, W), each sample of the branch times its factor of drop path (B, 1, 1)."""
    if scale is None:
        return x + branch
    # One kernel where dtypes are equal. Under autocast the branch may be in half precision; the sum is then in fp32.
    return torch.addcmul(x, branch, scale.to(branch.dtype)) if x.dtype == branch.dtype else x + branch * scale


class _Layers(nn.Module):
    """Position tables, layers and the final norm; holds the names under `beit3.encoder.`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.embed_positions = Multiway(
            nn.Embedding(config.patches + 1 + FIRST_POSITION, config.width),
            nn.Embedding(TEXT_POSITIONS, config.width),
        )
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
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
        patches = self.proj(image).flatten(2).transpose(1, 2)  # (B, W, H/16, H/16) → (B, P, W)
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
        # What runs a layer in training, where somebody has a faster way than calling it (beit3.model.compilation).
        self.compiled_layer: Callable[..., Any] | None = None

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
        """Features of pictures and texts.

        Args:
            image: (B, 3, H, H) in [-1, 1], or None. text_ids: (B, T) token ids, or None.
            padding_mask: (B, T) bool or integer, 1 = padding.
            causal_text: a text position attends to the picture, to itself and to earlier text; the picture attends only
                to itself. There may then be N texts for each picture, which is computed once for all of them:
                text_ids (B*N, T), where rows i*N … i*N+N-1 are the texts of picture i.
            image_rows, text_rows: how many leading positions of the last layer are wanted (None = all, 0 = none).

        Returns:
            Features of the picture (B, image_rows, W) and of the text (B, text_rows, W); None where not wanted.
        """
        if image is None and text_ids is None:
            raise ValueError("the encoder needs a picture, a text, or both")
        padding_mask = None if padding_mask is None or text_ids is None else padding_mask.bool()
        x_image = None if image is None else self.embed_image(image)
        x_text = None if text_ids is None else self.embed_text(text_ids, padding_mask)
        length = 0 if x_text is None else x_text.shape[1]
        if x_text is not None and self._compiled is not None:
            # The compiler's padding is cut off at the end. It is marked as padding, so nobody attends to it.
            x_text, padding_mask = _in_few_lengths(x_text, padding_mask)
        texts = _texts_per_image(x_image, x_text)
        # Several texts stand in one row below: leading rows of that row would be those of the first text alone, and
        # with a picture that sees its texts they would see each other through it.
        assert texts == 1 or (causal_text and text_rows in (None, 0)), "several texts per picture need causal_text"
        rule = attention_rule(x_image, x_text, padding_mask, causal_text, always_mask=self._compiled is not None)
        if x_text is not None and texts > 1:
            x_text = x_text.unflatten(0, (-1, texts)).flatten(1, 2)  # (B, N*T, W): the texts of a picture in one row
        some = x_text if x_image is None else x_image
        assert some is not None
        drop_path = self._draw_drop_path(some)  # for each layer
        # Only the last layer may leave out positions: all of them are keys and values of the layer behind.
        *inner, last = self.encoder.layers
        for layer, factors in zip(inner, drop_path, strict=False):
            x_image, x_text = self._run(layer, x_image, x_text, rule, factors)
        x_image, x_text = self._run(last, x_image, x_text, rule, drop_path[-1], image_rows, text_rows)
        if self.config.final_norm:
            norm = self.encoder.layer_norm
            x_image = None if x_image is None else norm.A(x_image)
            x_text = None if x_text is None else norm.B(x_text)
        if x_text is not None and texts > 1:
            x_text = x_text.unflatten(1, (texts, -1)).flatten(0, 1)  # (B, N*T, W) → (B*N, T, W)
        return x_image, None if x_text is None else x_text[:, :length]

    @property
    def _compiled(self) -> Callable[..., Any] | None:
        return self.compiled_layer if self.training else None

    def _run(self, layer: nn.Module, *inputs: object) -> tuple[Tensor | None, Tensor | None]:
        call: Callable[..., Any] = layer if self._compiled is None else functools.partial(self._compiled, layer)
        if self.config.recompute_activations and self.training and torch.is_grad_enabled():
            return recomputed(call, *inputs)
        return call(*inputs)

    def _draw_drop_path(self, like: Tensor) -> list[Tensor | None]:
        """For each layer, (2, B, 1, 1) factors of its two branches; None when nothing is dropped.

        The rate rises linearly over the layers, from 0 (Huang et al., arXiv 1603.09382).
        """
        layers, rate = self.config.layers, self.config.drop_path_rate
        if not self.training or rate == 0.0:
            return [None] * layers
        # Drawn for all layers at once, so that a layer itself draws nothing and can be compiled as it is. Dividing by
        # the share that is kept leaves the expected output what it is without drop path.
        keep = 1.0 - torch.linspace(0.0, rate, layers, device=like.device)[:, None, None, None, None]
        kept = torch.rand(layers, 2, like.shape[0], 1, 1, device=like.device) < keep  # (layers, 2, B, 1, 1)
        return list((kept / keep).to(like.dtype).unbind())


def _in_few_lengths(x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Texts (B, T, W) and their mask (B, T), filled up with padding to a length of 16, 32, 64 and so on.

    Each length that the compiler has not seen costs a compilation.
    """
    if padding_mask is None:
        padding_mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    # (T-1).bit_length() is the exponent of the smallest power of two that T fits into.
    more = max(16, 1 << (x.shape[1] - 1).bit_length()) - x.shape[1]
    return F.pad(x, (0, 0, 0, more)), F.pad(padding_mask, (0, more), value=True)


def _texts_per_image(image: Tensor | None, text: Tensor | None) -> int:
    """N of texts (B*N, T, W) and pictures (B, P+1, W); 1 where one of them is missing."""
    if image is None or text is None:
        return 1
    texts, rest = divmod(text.shape[0], image.shape[0])
    if rest or not texts:
        raise ValueError(f"{text.shape[0]} texts cannot be shared evenly among {image.shape[0]} pictures")
    return texts


def _hides_nothing(padding_mask: Tensor) -> bool:
    """Whether nothing is padded. False on a GPU, where the answer would have to be waited for."""
    return padding_mask.device.type == "cpu" and not bool(padding_mask.any())


def attention_rule(
    image: Tensor | None,
    text: Tensor | None,
    padding_mask: Tensor | None,
    causal_text: bool,
    always_mask: bool = False,
) -> AttentionRule:
    """The rule for one batch, built once and used by every layer.

    Args:
        image: (B, P+1, W) or None. text: (B, T, W) or None; (B*N, T, W) for N texts of each picture, whose mask is
            (B, 1, N*T, P+1+N*T). padding_mask: of the shape of the texts, bool, True = padding, or None.
        always_mask: make a mask even where there is nothing to hide, as compiled layers want the same inputs each time.
    """
    if text is None:
        return AttentionRule()
    batch, length = text.shape[:2]
    image_keys = 0 if image is None else image.shape[1]
    if padding_mask is not None and not always_mask and _hides_nothing(padding_mask):
        padding_mask = None  # attention without a mask is faster
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
