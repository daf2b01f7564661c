"""The five models against values of the released code, and the encoder against a slow one written straight down."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

from beit3.model.encoder import AttentionRule, BEiT3, EncoderConfig
from beit3.model.recompute import recomputes
from modeling_finetune import MODEL_NAMES, create_model
from tests import reference


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def logits():
    return reference.load("logits.json")


@pytest.fixture(scope="module")
def texts():
    return reference.tokens(200, [20, 9])


@pytest.mark.parametrize("name", sorted(reference.load("state_dicts.json")))
def test_names_and_shapes_are_those_of_the_released_model(name):
    released = reference.load("state_dicts.json")[name]
    expected = dict(released["other"])
    for layer in range(released["layers"]):
        for parameter, shape in released["per_layer (beit3.encoder.layers.<i>.)"].items():
            expected[f"beit3.encoder.layers.{layer}.{parameter}"] = shape
    with torch.device("meta"):
        model = timm.create_model(name)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected
    assert dict(model.named_parameters()).keys() == expected.keys()


@pytest.mark.parametrize("order", ["timm, modeling_finetune", "modeling_finetune, timm"])
def test_timm_builds_the_models_whichever_was_imported_first(order):
    build = "timm.create_model('beit3_tiny_patch16_64_captioning', vocab_size=8)"
    code = f"import {order}\nassert type({build}) is modeling_finetune.BEiT3ForCaptioning"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True, timeout=120)


def test_a_name_that_is_not_registered_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"beit3_huge: no such model; there are beit3_tiny.*beit3_large"):
        create_model("beit3_huge")


def test_all_fifteen_released_names_are_registered():
    assert set(reference.load("state_dicts.json")) <= set(MODEL_NAMES)


@pytest.mark.slow
def test_vqa_logits_are_those_of_the_released_code(logits, texts):
    model = reference.build("beit3_base_patch16_384_vqav2")
    with torch.no_grad():
        result = model(image=reference.images(100, 2, 384), question=texts[0], padding_mask=texts[1])
    assert result.shape == (2, 3129)
    close(result[:, :16], logits["vqav2"])
    close(result.abs().sum().reshape(1), logits["vqav2_sum"])


@pytest.mark.slow
def test_captioning_logits_are_those_of_the_released_code(logits, texts):
    masked = torch.zeros(2, 20, dtype=torch.long)
    masked[0, 3:8] = 1
    masked[1, 2:5] = 1
    model = reference.build("beit3_base_patch16_224_captioning")
    with torch.no_grad():
        result = model(reference.images(101, 2, 224), texts[0], texts[1], masked)
    close(result[:, :16], logits["captioning"])
    close(result.abs().sum().reshape(1), logits["captioning_sum"])


@pytest.mark.slow
def test_retrieval_features_and_loss_are_those_of_the_released_code(logits, texts):
    model = reference.build("beit3_base_patch16_224_retrieval")
    image = reference.images(101, 2, 224)
    with torch.no_grad():
        vision, language = model(image=image, text_description=texts[0], padding_mask=texts[1], only_infer=True)
        loss = model(image=image, text_description=texts[0], padding_mask=texts[1])[0]
    close(vision[:, :16], logits["retrieval_v"])
    close(language[:, :16], logits["retrieval_l"])
    close(loss.reshape(1), logits["retrieval_loss"])
    close(vision.norm(dim=1), [1.0, 1.0])


@pytest.mark.slow
def test_nlvr2_logits_are_those_of_the_released_code(logits, texts):
    model = reference.build("beit3_base_patch16_224_nlvr2")
    with torch.no_grad():
        result = model(
            image_a=reference.images(101, 2, 224),
            image_b=reference.images(102, 2, 224),
            text_description=texts[0],
            padding_mask=texts[1],
        )
    close(result, logits["nlvr2"])


@pytest.mark.slow
def test_image_classification_logits_are_those_of_the_released_code(logits):
    model = reference.build("beit3_base_patch16_224_imageclassification")
    with torch.no_grad():
        close(model(image=reference.images(101, 2, 224))[:, :16], logits["imageclassification"])


SMALL = EncoderConfig(width=32, layers=3, heads=4, image_size=32, patch_size=16, vocab_size=50)


def small_encoder(**changes) -> BEiT3:
    encoder = BEiT3(EncoderConfig(**{**SMALL.__dict__, **changes}))
    reference.fill(encoder)
    return encoder


def slow_encoder(encoder: BEiT3, image, text_ids, padding, causal):
    """The encoder as the specification words it: one joint sequence, matmul, softmax, one position after another."""
    weights = encoder.state_dict()
    width, heads = encoder.config.width, encoder.config.heads

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    patches = F.conv2d(image, weights["vision_embed.proj.weight"], weights["vision_embed.proj.bias"], stride=16)
    patches = patches.flatten(2).transpose(1, 2)
    x_image = torch.cat([weights["vision_embed.cls_token"].expand(len(image), -1, -1), patches], 1)
    x_image = x_image + weights["encoder.embed_positions.A.weight"][2 : 2 + x_image.shape[1]]
    x_text = weights["text_embed.weight"][text_ids]
    x_text = x_text + weights["encoder.embed_positions.B.weight"][2 : 2 + text_ids.shape[1]]
    x = torch.cat([x_image, x_text * (1 - padding[..., None])], 1)
    split, total = x_image.shape[1], x.shape[1]

    def per_expert(function, x):
        return torch.cat([function("A", x[:, :split]), function("B", x[:, split:])], 1)

    forbidden = torch.zeros(len(x), total, total)
    forbidden[:, :, split:] += padding[:, None, :]
    if causal:
        forbidden[:, :split, split:] = 1
        forbidden[:, split:, split:] += torch.ones(total - split, total - split).triu(1)
    # ruff: noqa: B023  the small functions below are called where they stand
    for layer in range(encoder.config.layers):
        at = f"encoder.layers.{layer}"
        h = per_expert(lambda e, y: norm(f"{at}.self_attn_layer_norm.{e}", y), x)
        q, k, v = (
            per_expert(lambda e, y, p=p: linear(f"{at}.self_attn.{p}_proj.{e}", y), h).unflatten(2, (heads, -1))
            for p in "qkv"
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(width // heads)
        scores = scores.masked_fill(forbidden[:, None] > 0, -math.inf)
        h = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        h = per_expert(lambda e, y: norm(f"{at}.self_attn.inner_attn_ln.{e}", y), h)
        x = x + per_expert(lambda e, y: linear(f"{at}.self_attn.out_proj.{e}", y), h)
        h = per_expert(lambda e, y: norm(f"{at}.final_layer_norm.{e}", y), x)
        h = per_expert(lambda e, y: linear(f"{at}.ffn.{e}.fc1", y), h)
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
        h = per_expert(lambda e, y: norm(f"{at}.ffn.{e}.ffn_layernorm", y), h)
        x = x + per_expert(lambda e, y: linear(f"{at}.ffn.{e}.fc2", y), h)
    x = per_expert(lambda e, y: norm(f"encoder.layer_norm.{e}", y), x)
    return x[:, :split], x[:, split:]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[7, 7], [7, 3]])
def test_the_encoder_equals_a_slow_joint_sequence_encoder(causal, lengths):
    encoder = small_encoder().eval()
    image = reference.images(1, 2, 32)
    ids, padding = reference.tokens(2, lengths, vocab_size=50, width=7)
    expected_image, expected_text = slow_encoder(encoder, image, ids, padding, causal)
    with torch.no_grad():
        got_image, got_text = encoder(image, ids, padding, causal_text=causal)
    torch.testing.assert_close(got_image, expected_image, rtol=1e-4, atol=1e-5)
    valid = padding == 0
    torch.testing.assert_close(got_text[valid], expected_text[valid], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_computing_fewer_rows_of_the_last_layer_changes_no_output_and_no_gradient(causal):
    encoder = small_encoder().train().double()  # in fp32 processors differ in the last digits of sums
    image = reference.images(1, 2, 32).double()
    ids, padding = reference.tokens(2, [7, 4], vocab_size=50, width=7)
    rows = {"image_rows": 0} if causal else {"image_rows": 1, "text_rows": 0}
    gradients = []
    for options in ({}, rows):
        encoder.zero_grad()
        x_image, x_text = encoder(image, ids, padding, causal_text=causal, **options)
        wanted = x_text if causal else x_image[:, :1]
        wanted.sin().sum().backward()
        gradients.append({n: p.grad for n, p in encoder.named_parameters()})
    whole, fewer = gradients
    for name, gradient in whole.items():
        other = torch.zeros(()) if fewer[name] is None else fewer[name]
        zero = torch.zeros(()) if gradient is None else gradient
        torch.testing.assert_close(other.expand_as(zero).double(), zero.double(), rtol=1e-9, atol=1e-11, msg=name)


def test_padding_never_changes_a_result():
    encoder = small_encoder().eval()
    image = reference.images(1, 1, 32)
    ids, _ = reference.tokens(2, [5], vocab_size=50, width=5)
    longer = F.pad(ids, (0, 6), value=1)
    with torch.no_grad():
        short_image, short_text = encoder(image, ids, torch.zeros_like(ids))
        long_image, long_text = encoder(image, longer, longer == 1)
    torch.testing.assert_close(short_image, long_image)
    torch.testing.assert_close(short_text, long_text[:, :5])


def test_a_caption_position_sees_the_picture_and_earlier_text_only():
    encoder = small_encoder().eval()
    image = reference.images(1, 1, 32)
    ids, _ = reference.tokens(2, [6], vocab_size=50, width=6)
    changed = ids.clone()
    changed[0, 4] = 33
    with torch.no_grad():
        image_before, before = encoder(image, ids, None, causal_text=True)
        image_after, after = encoder(image, changed, None, causal_text=True)
    torch.testing.assert_close(image_before, image_after, rtol=0, atol=0)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_recomputing_layers_gives_the_same_gradients():
    results = []
    for recompute in (False, True):
        encoder = small_encoder(recompute_activations=recompute, drop_path_rate=0.5).train()
        torch.manual_seed(3)
        ids, padding = reference.tokens(2, [7, 4], vocab_size=50, width=7)
        x_image, _ = encoder(reference.images(1, 2, 32), ids, padding)
        x_image.sin().sum().backward()
        results.append(encoder.encoder.layers[0].ffn.A.fc1.weight.grad)
    torch.testing.assert_close(*results)


def test_drop_path_drops_whole_samples_of_both_modalities_and_scales_the_others():
    encoder = small_encoder(drop_path_rate=0.5).train()
    torch.manual_seed(0)
    first, middle, last = encoder._draw_drop_path(torch.zeros(4000, 1, 1))
    assert first.shape == (2, 4000, 1, 1) and set(first.flatten().tolist()) == {1.0}
    torch.testing.assert_close(middle.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert set(last.flatten().tolist()) == {0.0, 2.0}
    assert abs(last.mean().item() - 1.0) < 0.05
    assert (last[0] != last[1]).any()  # attention and feed-forward are dropped each by itself
    assert encoder.eval()._draw_drop_path(torch.zeros(4, 1, 1)) == [None, None, None]


def test_a_dropped_sample_goes_past_a_layer_unchanged():
    layer = small_encoder().encoder.layers[-1]
    image, text = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    drop_path = torch.tensor([[0.0, 2.0], [0.0, 2.0]])[:, :, None, None]
    x_image, x_text = layer(image, text, AttentionRule(), drop_path)
    torch.testing.assert_close((x_image[0], x_text[0]), (image[0], text[0]), rtol=0, atol=0)
    assert not torch.allclose(x_image[1], image[1]) and not torch.allclose(x_text[1], text[1])


def test_wide_layers_on_a_cpu_recompute_norms():
    assert recomputes("cpu", 768) and not recomputes("cpu", 4 * 128) and not recomputes("cuda", 768)


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_recomputed_in_the_backward_pass_changes_no_gradient(causal, monkeypatch):
    encoder = small_encoder().train()
    ids, padding = reference.tokens(2, [7, 4], vocab_size=50, width=7)
    gradients = []
    for again in (False, True):
        monkeypatch.setattr("beit3.model.recompute.recomputes", lambda *_, again=again: again)
        encoder.zero_grad()
        image, text = encoder(reference.images(1, 2, 32), ids, padding, causal_text=causal)
        (image.sin().sum() + text.cos().sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in encoder.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_bf16_logits_stay_near_fp32():
    model = reference.build("beit3_tiny_patch16_64_vqav2", vocab_size=50, num_classes=12)
    ids, padding = reference.tokens(2, [7, 4], vocab_size=50, width=7)
    with torch.no_grad():
        exact = model(reference.images(1, 2, 64), ids, padding)
        half = model.bfloat16()(reference.images(1, 2, 64).bfloat16(), ids, padding)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("size", "text", "message"),
    [(48, 7, r"pictures are \(48, 48\) pixels, this model takes \(32, 32\)"), (32, 1023, "longer than 1022")],
)
def test_wrong_shapes_are_named(size, text, message):
    encoder = small_encoder()
    with pytest.raises(ValueError, match=message):
        encoder(reference.images(1, 1, size), torch.zeros(1, text, dtype=torch.long), None)
