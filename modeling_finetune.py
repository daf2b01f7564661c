"""The fine-tuning models of BEiT-3 and their registered names.

`create_model(name, vocab_size=…, drop_path_rate=…, checkpoint_activations=…)` builds one; `timm.create_model` does as
well after `import modeling_finetune`. Names are `beit3_<size>_patch16_<pixels>_<suffix>`; parameter names, shapes and
call signatures are those of the released models, so released weights load as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from beit3.model.contrastive import contrastive_loss
from beit3.model.encoder import BEiT3, EncoderConfig
from beit3.model.names import REGISTERED, SIZES, model_name
from beit3.model.weights import Checkpoint, LoadReport, load_weights
from beit3.system.late_import import when_imported

# Learns the embedded demo from nothing: no weights are released for it.
FROM_SCRATCH = {"tiny"}
VQA_ANSWERS = 3129
IMAGENET_CLASSES = 1000


@torch.no_grad()
def _truncated_normal_(tensor: Tensor, std: float) -> None:
    """Normal values of this standard deviation, cut at ±std, by the inverse of the distribution function.

    PyTorch's own draws again and again until all values are inside, a minute for a base model.
    """
    inside = math.erf(1 / math.sqrt(2))  # share of a normal distribution within one standard deviation
    tensor.uniform_(-inside, inside).erfinv_().mul_(std * math.sqrt(2)).clamp_(-std, std)


def _init_weights(module: nn.Module) -> None:
    """Fresh weights: linear layers truncated normal (std 0.02, cut at ±0.02), norms 1 and 0, tables normal at 0.02."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        _truncated_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def _init_from_scratch(module: nn.Module) -> None:
    """Fresh weights for a narrow model without pre-training: every layer keeps the variance of what it is given.

    At the released scale (0.02, made for wide pre-trained models) attention starts out uniform and token identities
    drown in the first layers' outputs; the demo then needs several times as many steps.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5)


class BEiT3Model(nn.Module):
    """What the five models share: the encoder under the name `beit3`, fresh weights, and no decay by name.

    final_norm: whether the encoder ends with a norm of its own.
    """

    final_norm: ClassVar[bool]

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.beit3 = BEiT3(config)

    def init_weights(self) -> None:
        self.apply(_init_weights)
        nn.init.normal_(self.beit3.vision_embed.cls_token, std=0.02)
        nn.init.normal_(self.beit3.vision_embed.mask_token, std=0.02)

    @property
    def num_layers(self) -> int:
        return self.beit3.config.layers

    @property
    def num_parameters(self) -> int:
        """Values of all parameters; to be asked before ZeRO-3 takes them apart."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_trained(self) -> int:
        """Of them, those that are not frozen; to be asked before ZeRO-3 as well."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def no_weight_decay(self) -> set[str]:
        """Parameters of two and more dimensions that get no weight decay all the same."""
        return {"beit3.encoder.embed_positions.A.weight", "beit3.vision_embed.cls_token", "logit_scale"}


class Pooler(nn.Module):
    """Norm, linear layer and tanh on the class token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, W) → (B, W), from position 0."""
        return torch.tanh(self.dense(self.norm(x[:, 0])))


class BEiT3ForVisualQuestionAnswering(BEiT3Model):
    """Picture and question → one logit per answer of the vocabulary."""

    final_norm = False

    def __init__(self, config: EncoderConfig, num_classes: int = VQA_ANSWERS) -> None:
        super().__init__(config)
        width = config.width
        self.pooler = Pooler(width)
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, num_classes)
        )
        self.init_weights()

    def forward(self, image: Tensor, question: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Args:
            image: (B, 3, H, H) in [-1, 1]. question: (B, T) token ids. padding_mask: (B, T), 1 = padding.

        Returns:
            Logits (B, answers).
        """
        # Only the class token is read, so the last layer computes that one position.
        features, _ = self.beit3(image, question, padding_mask, image_rows=1, text_rows=0)
        return self.head(self.pooler(features))


class BEiT3ForCaptioning(BEiT3Model):
    """Picture and partly masked caption → logits of the masked tokens."""

    final_norm = True

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.mlm_head = nn.Linear(config.width, config.vocab_size)
        self.init_weights()

    def forward(
        self,
        image: Tensor,
        text_ids: Tensor,
        padding_mask: Tensor | None,
        language_masked_pos: Tensor | None = None,
        masked_index: Tensor | None = None,
    ) -> Tensor:
        """Args:
            image: (B, 3, H, H) in [-1, 1]. text_ids: (B, T), or (B*N, T): N captions of each picture, one after the
                other; the picture is then computed once for all of them. padding_mask: as text_ids, 1 = padding.
            language_masked_pos: as text_ids, 1 = predict here.
            masked_index: (n,) int64, the same positions as numbers in the flattened text_ids, in place of
                language_masked_pos: how many there are is then known without waiting for the device.

        Returns:
            Logits (masked positions, vocabulary), row-major over (sample, position).
        """
        _, text = self.beit3(image, text_ids, padding_mask, causal_text=True, image_rows=0)
        if masked_index is not None:
            return self.mlm_head(text.flatten(0, 1).index_select(0, masked_index))
        if language_masked_pos is None:
            raise ValueError("which positions to predict? Give language_masked_pos or masked_index")
        return self.mlm_head(text[language_masked_pos.bool()])


class BEiT3ForRetrieval(BEiT3Model):
    """Picture and text → unit-norm features of each; in training also the symmetric contrastive loss."""

    final_norm = True

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.language_head = nn.Linear(config.width, config.width, bias=False)
        self.vision_head = nn.Linear(config.width, config.width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.init_weights()

    def forward(
        self,
        image: Tensor | None = None,
        text_description: Tensor | None = None,
        padding_mask: Tensor | None = None,
        only_infer: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """Args:
            image: (B, 3, H, H) or None. text_description: (B, T) or None. padding_mask: (B, T), 1 = padding.

        Returns:
            Features (B, W) of picture and of text, None where not given; without `only_infer` the loss () comes first.
        """
        vision = language = None
        if image is not None:
            features, _ = self.beit3(image, image_rows=1)
            vision = F.normalize(self.vision_head(features[:, 0]), dim=-1)
        if text_description is not None:
            _, features = self.beit3(None, text_description, padding_mask, text_rows=1)
            language = F.normalize(self.language_head(features[:, 0]), dim=-1)
        if only_infer:
            return vision, language
        if vision is None or language is None:
            raise ValueError("the contrastive loss needs pictures and texts; give both, or only_infer=True")
        return contrastive_loss(vision, language, self.logit_scale.exp()), vision, language


class TwoLayerHead(nn.Module):
    """LayerNorm, Linear, LayerNorm, GELU, Linear; both linear layers start at a thousandth of the usual scale."""

    def __init__(self, width: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.dense1 = nn.Linear(width, hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.dense2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense2(F.gelu(self.norm2(self.dense1(self.norm1(x)))))


class BEiT3ForVisualReasoning(BEiT3Model):
    """Two pictures and a statement → logits of false and true."""

    final_norm = True

    def __init__(self, config: EncoderConfig, num_classes: int = 2) -> None:
        super().__init__(config)
        self.head = TwoLayerHead(4 * config.width, 2 * config.width, num_classes)
        self.init_weights()
        with torch.no_grad():
            for dense in (self.head.dense1, self.head.dense2):
                dense.weight.mul_(0.001)

    def forward(
        self, image_a: Tensor, image_b: Tensor, text_description: Tensor, padding_mask: Tensor | None = None
    ) -> Tensor:
        """Args:
            image_a, image_b: (B, 3, H, H). text_description: (B, T). padding_mask: (B, T), 1 = padding.

        Returns:
            Logits (B, 2).
        """
        image = torch.cat([image_a, image_b])
        text = torch.cat([text_description, text_description])
        padding_mask = None if padding_mask is None else torch.cat([padding_mask, padding_mask])
        vision, language = self.beit3(image, text, padding_mask, image_rows=1, text_rows=1)
        features_a, features_b = torch.cat([vision[:, 0], language[:, 0]], dim=-1).chunk(2)
        return self.head(torch.cat([features_a, features_b], dim=-1))


class BEiT3ForImageClassification(BEiT3Model):
    """Picture → logits of the classes, from the mean of the patches."""

    final_norm = False

    def __init__(self, config: EncoderConfig, num_classes: int = IMAGENET_CLASSES) -> None:
        super().__init__(config)
        self.fc_norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, num_classes)
        self.init_weights()
        with torch.no_grad():
            self.head.weight.mul_(0.001)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, H) → logits (B, classes)."""
        features, _ = self.beit3(image)
        return self.head(self.fc_norm(features[:, 1:].mean(1)))


HEADS: dict[str, type[BEiT3Model]] = {
    "vqav2": BEiT3ForVisualQuestionAnswering,
    "captioning": BEiT3ForCaptioning,
    "retrieval": BEiT3ForRetrieval,
    "nlvr2": BEiT3ForVisualReasoning,
    "imageclassification": BEiT3ForImageClassification,
}


def _entry_point(suffix: str, size: str, pixels: int) -> Callable[..., BEiT3Model]:
    head = HEADS[suffix]

    def build(
        pretrained: bool = False,
        vocab_size: int = 64010,
        drop_path_rate: float = 0.0,
        checkpoint_activations: bool = False,
        **options: object,
    ) -> BEiT3Model:
        if pretrained:
            raise ValueError("weights are not downloaded: give a released file to --finetune")
        for handed_over_by_timm in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            options.pop(handed_over_by_timm, None)
        config = EncoderConfig(
            **SIZES[size],
            image_size=pixels,
            vocab_size=vocab_size,
            drop_path_rate=drop_path_rate,
            recompute_activations=checkpoint_activations,
            final_norm=head.final_norm,
        )
        model = head(config, **options)
        return model.apply(_init_from_scratch) if size in FROM_SCRATCH else model

    build.__name__ = build.__qualname__ = model_name(size, pixels, suffix)
    build.__doc__ = f"BEiT-3 {size} at {pixels} pixels: {head.__name__}."
    return build


def register(suffix: str, size: str, pixels: int) -> None:
    """Make a model known to `create_model` and to timm."""
    build = _entry_point(suffix, size, pixels)
    BUILDERS[build.__name__] = globals()[build.__name__] = build


def create_model(name: str, **options: Any) -> BEiT3Model:
    """The model of a registered name with fresh weights. Raises ValueError for a name that is not registered."""
    if name not in BUILDERS:
        raise ValueError(f"{name}: no such model; there are {', '.join(BUILDERS)}")
    return BUILDERS[name](**options)


class _Unfilled(TorchFunctionMode):
    """What would fill tensors does nothing: on "meta" they have no values, and to find that out PyTorch loads its
    compiler, which takes seconds."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        in_place = function.__name__.endswith("_") and not function.__name__.startswith(("_", "requires_grad"))
        if in_place:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def load_model(name: str, checkpoint: Checkpoint, **options: Any) -> tuple[BEiT3Model, LoadReport]:
    """The model with a checkpoint's weights, to predict with; on the CPU, where they lie in the file that holds them.

    No fresh weights are drawn for it and nothing is copied, so it is there in no time.

    Raises:
        InputError: weights are missing or do not fit.
    """
    with torch.device("meta"), _Unfilled():
        model = create_model(name, **options)
    return model.eval(), load_weights(model, checkpoint, new_head=False, assign=True)


def _register_with_timm() -> None:
    from timm.models import register_model

    for build in BUILDERS.values():
        register_model(build)


BUILDERS: dict[str, Callable[..., BEiT3Model]] = {}
for _suffix, _variants in REGISTERED.items():
    for _size, _pixels in _variants:
        register(_suffix, _size, _pixels)
MODEL_NAMES = list(BUILDERS)
# Importing timm takes seconds, and nothing but its users needs it.
when_imported("timm.models", _register_with_timm)
