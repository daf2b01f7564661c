"""Whatever stands in the place of a linear layer takes effect as if it were called: adapters, hooks, quantised weights.

Each model with a stand-in is compared with one that has a plain linear layer of the same effect.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from beit3.model.encoder import EncoderConfig
from modeling_finetune import BEiT3ForCaptioning, BEiT3ForVisualQuestionAnswering
from tasks.captioning.generation import generate
from tests import reference

VOCABULARY = 24
MASK = VOCABULARY - 1
WIDTH = 32


def make_model(kind: type[nn.Module], **changes) -> nn.Module:
    config = {"width": WIDTH, "layers": 3, "heads": 4, "image_size": 32, "vocab_size": VOCABULARY, **changes}
    options = {"num_classes": 5} if kind is BEiT3ForVisualQuestionAnswering else {}
    model = kind(EncoderConfig(final_norm=kind.final_norm, **config), **options)
    reference.fill(model)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)  # otherwise attention hardly depends on queries and keys
    return model.train()


def captioning_logits(model: nn.Module) -> Tensor:
    ids, padding = reference.tokens(2, [7, 4], vocab_size=VOCABULARY, width=7)
    return model(reference.images(1, 2, 32), ids, padding, 1 - padding)


def answer_logits(model: nn.Module) -> Tensor:
    """Of VQA, whose last layer computes one row of the picture and none of the text."""
    ids, padding = reference.tokens(2, [7, 4], vocab_size=VOCABULARY, width=7)
    return model(reference.images(1, 2, 32), ids, padding)


def captions(model: nn.Module) -> Tensor:
    found = generate(model, reference.images(4, 3, 32), mask_id=MASK, num_beams=3, max_tokens=8, num_return=3)
    return torch.cat([found.scores, found.token_ids.flatten(1)], dim=1)


WAYS_THROUGH = {
    "captioning": (BEiT3ForCaptioning, captioning_logits),
    "vqa": (BEiT3ForVisualQuestionAnswering, answer_logits),
    "generation": (BEiT3ForCaptioning, captions),
}


class LowRank(nn.Module):
    """W x + b + B A x: a linear layer with an adapter of rank 2 around it."""

    def __init__(self, linear: nn.Linear, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear, self.dropout = linear, nn.Dropout(dropout)
        self.down = nn.Linear(linear.in_features, 2, bias=False)
        self.up = nn.Linear(2, linear.out_features, bias=False)
        generator = torch.Generator().manual_seed(7)
        for weight in (self.down.weight, self.up.weight):
            nn.init.normal_(weight, std=0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(self.dropout(x)))


class LinearWithAdapter(nn.Linear):
    """A subclass with its own forward, as libraries of adapters and of quantised layers have it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


class Doubled(Tensor):
    """A weight that counts twice, as a quantised weight is more than its numbers: only F.linear knows how to use it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            with torch._C.DisableTorchFunctionSubclass():
                x, weight, bias = args
                return F.linear(x, 2 * weight.detach().as_subclass(Tensor), bias)
        return super().__torch_function__(function, types, args, kwargs or {})


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def halve_some(linear: nn.Linear) -> Tensor:
    return (torch.arange(linear.weight.numel()).reshape(linear.weight.shape) % 3 > 0).float()


def with_hook(linear: nn.Linear) -> nn.Module:
    linear.register_forward_hook(lambda module, inputs, out: out + F.linear(inputs[0], module.weight))
    return linear


def with_pre_hook(linear: nn.Linear) -> nn.Module:
    linear.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    return linear


def with_own_forward(linear: nn.Linear) -> nn.Module:
    linear.forward = lambda x: F.linear(x, 2 * linear.weight, linear.bias)
    return linear


def pruned(linear: nn.Linear) -> nn.Module:
    """torch.nn.utils.prune makes the weight anew before each call, and only then."""
    prune.custom_from_mask(linear, "weight", halve_some(linear))
    linear.weight = linear.weight.detach() * 0  # what is read without a call is out of date
    return linear


def subclassed(linear: nn.Linear) -> nn.Module:
    linear.__class__ = LinearWithAdapter
    return linear


def quantised(linear: nn.Linear) -> nn.Module:
    linear.weight = nn.Parameter(linear.weight.detach().clone().as_subclass(Doubled), requires_grad=False)
    return linear


def without_bias(linear: nn.Linear) -> nn.Module:
    linear.bias = None
    return linear


def low_rank_weight(linear: nn.Linear) -> Tensor:
    adapter = LowRank(linear)
    return linear.weight + adapter.up.weight @ adapter.down.weight


def doubled_weight(linear: nn.Linear) -> Tensor:
    return 2 * linear.weight


# What is put in the place of a linear layer → the weight that a plain one of the same effect has.
STAND_INS: dict[str, tuple[Callable[[nn.Linear], nn.Module], Callable[[nn.Linear], Tensor]]] = {
    "adapter around it": (LowRank, low_rank_weight),
    "subclass": (subclassed, doubled_weight),
    "hook": (with_hook, doubled_weight),
    "hook before it": (with_pre_hook, doubled_weight),
    "its own forward": (with_own_forward, doubled_weight),
    "parametrization": (
        lambda linear: parametrize.register_parametrization(linear, "weight", Twice()),
        doubled_weight,
    ),
    "pruned": (pruned, lambda linear: linear.weight * halve_some(linear)),
    "quantised weight": (quantised, doubled_weight),
    "no bias": (without_bias, lambda linear: linear.weight.clone()),
}
QKV = [f"self_attn.{part}_proj.{expert}" for part in "qkv" for expert in "AB"]
OTHERS = [f"self_attn.out_proj.{e}" for e in "AB"] + [f"ffn.{e}.fc{number}" for e in "AB" for number in (1, 2)]


def put(model: nn.Module, name: str, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, make(model.get_submodule(name)))
    return model


def merge(model: nn.Module, name: str, weight: Callable[[nn.Linear], Tensor], bias: bool) -> nn.Module:
    linear = model.get_submodule(name)
    linear.weight = nn.Parameter(weight(linear).detach().clone())
    if not bias:
        nn.init.zeros_(linear.bias)
    return model


def check_stand_in(stand_in: str, way: str, place: str, layers: tuple[int, ...]) -> bool:
    """Both models give the same; returns whether that is something else than without the stand-in."""
    kind, through = WAYS_THROUGH[way]
    make, weight = STAND_INS[stand_in]
    plain, merged, model = (make_model(kind) for _ in range(3))
    for layer in layers:
        name = f"beit3.encoder.layers.{layer}.{place}"
        put(model, name, make)
        merge(merged, name, weight, bias=stand_in != "no bias")
    found = through(model)
    torch.testing.assert_close(found, through(merged), rtol=1e-5, atol=1e-5)
    return not torch.allclose(found, through(plain), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", WAYS_THROUGH)
@pytest.mark.parametrize(
    ("stand_in", "place"),
    [("adapter around it", place) for place in QKV]
    + [(stand_in, place) for stand_in in list(STAND_INS)[1:] for place in (QKV[0], QKV[3], QKV[5])],
)
def test_a_stand_in_for_q_k_or_v_takes_effect(stand_in, place, way):
    changed = check_stand_in(stand_in, way, place, layers=(0, 1, 2))
    # Softmax does not depend on the bias of the keys, so leaving that one out is no change.
    assert changed or (stand_in == "no bias" and "k_proj" in place)


@pytest.mark.parametrize("way", WAYS_THROUGH)
@pytest.mark.parametrize("place", OTHERS)
@pytest.mark.parametrize("stand_in", ["adapter around it", "hook"])
def test_a_stand_in_for_another_layer_takes_effect(stand_in, place, way):
    assert check_stand_in(stand_in, way, place, layers=(0, 1))


@pytest.mark.parametrize("place", ["k_proj.A", "v_proj.B", "q_proj.A"])
def test_a_stand_in_in_vqas_last_layer_takes_effect(place):
    assert check_stand_in("adapter around it", "vqa", f"self_attn.{place}", layers=(2,))


@pytest.mark.parametrize("stand_in", ["adapter around it", "subclass", "hook", "quantised weight"])
def test_a_stand_in_for_the_captioning_head_takes_effect_in_generation(stand_in):
    make, weight = STAND_INS[stand_in]
    model, merged = (make_model(BEiT3ForCaptioning) for _ in range(2))
    put(model, "mlm_head", make)
    merge(merged, "mlm_head", weight, bias=True)
    torch.testing.assert_close(captions(model), captions(merged), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(captions(model), captions(make_model(BEiT3ForCaptioning)), rtol=1e-3, atol=1e-3)


def test_a_stand_in_for_the_patch_embedding_need_not_have_a_weight():
    model, expected = make_model(BEiT3ForCaptioning), captions(make_model(BEiT3ForCaptioning))
    model.beit3.vision_embed.proj = nn.Sequential(model.beit3.vision_embed.proj)
    torch.testing.assert_close(captions(model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("place", ["self_attn.q_proj.A", "self_attn.v_proj.B", "ffn.A.fc1"])
def test_the_gradient_of_an_adapter_is_that_of_the_merged_weight_by_the_chain_rule(place):
    name = f"beit3.encoder.layers.1.{place}"
    merged = merge(make_model(BEiT3ForCaptioning), name, low_rank_weight, bias=True)
    model = put(make_model(BEiT3ForCaptioning), name, LowRank)
    for each in (model, merged):
        captioning_logits(each).sin().sum().backward()
    adapter, of_weight = model.get_submodule(name), merged.get_submodule(name).weight.grad
    expected = [of_weight @ adapter.down.weight.T, adapter.up.weight.T @ of_weight]
    torch.testing.assert_close([adapter.up.weight.grad, adapter.down.weight.grad], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recomputed", ["norms", "layers"])
@pytest.mark.parametrize("place", ["self_attn.q_proj.A", "self_attn.out_proj.B", "ffn.A.fc1", "ffn.B.fc2"])
def test_recomputing_draws_an_adapters_dropout_as_before(place, recomputed, monkeypatch):
    gradients = []
    for again in (False, True):
        layers = again and recomputed == "layers"
        monkeypatch.setattr("beit3.model.recompute.recomputes", lambda *_, again=again: again and recomputed == "norms")
        model = make_model(BEiT3ForCaptioning, recompute_activations=layers)
        put(model, f"beit3.encoder.layers.1.{place}", lambda linear: LowRank(linear, dropout=0.5))
        torch.manual_seed(11)
        captioning_logits(model).sin().sum().backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_plain_layers_are_one_product_and_deepspeeds_hooks_do_not_change_that():
    attention = make_model(BEiT3ForCaptioning).beit3.encoder.layers[0].self_attn
    weight, bias = attention.joint_projection("B")
    assert weight.shape == (3 * WIDTH, WIDTH) and bias.shape == (3 * WIDTH,)

    def gather(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        pytest.fail("a layer was called, which is not needed")

    gather.__module__ = "deepspeed.runtime.zero.parameter_offload"
    hook = attention.q_proj.B.register_forward_pre_hook(gather)
    attention.project("B", torch.randn(1, 2, WIDTH))
    hook.remove()
    attention.q_proj.B.register_forward_pre_hook(lambda *_: None)
    assert attention.joint_projection("B") is None and attention.joint_projection("A") is not None


def test_a_copy_of_a_model_with_an_adapter_gives_the_same():
    model = put(make_model(BEiT3ForCaptioning), "beit3.encoder.layers.1.self_attn.q_proj.A", LowRank)
    torch.testing.assert_close(captioning_logits(copy.deepcopy(model)), captioning_logits(model), rtol=0, atol=0)
