"""Schedule, parameter groups and training steps against the values of the released recipe."""

import math

import pytest
import torch
from torch import nn

from modeling_finetune import create_model
from optim_factory import cosine_schedule, create_optimizer, layer_id, lr_scale, parameter_groups, set_learning_rate
from tasks.captioning.losses import drop_worst, masked_token_losses
from tasks.vqav2.task import soft_answer_loss
from tests import reference


def test_the_schedule_is_that_of_the_released_recipe():
    expected = reference.load("training.json")["cosine_schedule_epochs10_iters37_warmup1"]
    assert cosine_schedule(3e-5, 1e-6, epochs=10, steps_per_epoch=37, warmup_epochs=1) == pytest.approx(
        expected, rel=1e-12
    )


def test_warm_up_steps_override_epochs_and_work_without_them():
    assert cosine_schedule(1.0, 0.0, epochs=1, steps_per_epoch=4, warmup_epochs=0, warmup_steps=2) == [
        0.0,
        1.0,
        1.0,
        0.5,
    ]


def test_a_warm_up_longer_than_the_training_is_cut_and_one_of_nothing_starts_at_the_top():
    assert cosine_schedule(1.0, 0.0, epochs=1, steps_per_epoch=3, warmup_epochs=5) == [0.0, 0.5, 1.0]
    assert cosine_schedule(1.0, 0.0, epochs=1, steps_per_epoch=2, warmup_epochs=0) == [1.0, 0.5]


def test_groups_of_the_captioning_recipe_are_those_of_the_released_code():
    with torch.device("meta"):
        model = create_model("beit3_base_patch16_224_captioning", vocab_size=1000)
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.9)
    found = sorted(
        (g["weight_decay"], g["lr_scale"], len(g["params"]), sum(p.numel() for p in g["params"])) for g in groups
    )
    expected = [tuple(group) for group in reference.load("training.json")["captioning"]["groups"]]
    assert [g[2:] for g in found] == [g[2:] for g in expected]
    assert [g[0] for g in found] == [g[0] for g in expected]
    assert [g[1] for g in found] == pytest.approx([g[1] for g in expected])


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("beit3.text_embed.weight", 0),
        ("beit3.vision_embed.proj.weight", 0),
        ("beit3.encoder.embed_positions.B.weight", 0),
        ("beit3.encoder.layers.0.ffn.A.fc1.weight", 1),
        ("beit3.encoder.layers.11.self_attn.q_proj.B.bias", 12),
        ("beit3.encoder.layer_norm.A.weight", 13),
        ("pooler.dense.weight", 13),
        ("head.3.weight", 13),
    ],
)
def test_layer_ids(name, layer):
    assert layer_id(name, 12) == layer


def test_the_head_weight_counts_without_layer_decay_only_and_not_for_the_pooler():
    assert lr_scale("head.0.weight", 12, 1.0, 20) == 20
    assert lr_scale("pooler.dense.weight", 12, 1.0, 20) == 1
    assert lr_scale("head.0.weight", 12, 0.9, 20) == 1
    assert lr_scale("head.0.weight", 12, 1.0, 0) == 1


def test_vqa_recipe_spares_norms_biases_positions_and_class_token_from_decay():
    with torch.device("meta"):
        model = create_model("beit3_tiny_patch16_64_vqav2", vocab_size=100)
    groups = parameter_groups(model, weight_decay=0.01, layer_decay=1.0, task_head_lr_weight=20)
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decays["beit3.encoder.embed_positions.A.weight"] == 0
    assert decays["beit3.vision_embed.cls_token"] == 0
    assert decays["pooler.norm.weight"] == decays["head.1.weight"] == decays["head.0.bias"] == 0
    assert decays["beit3.encoder.embed_positions.B.weight"] == decays["beit3.text_embed.weight"] == 0.01
    assert {group["lr_scale"] for group in groups for name in group["names"] if name.startswith("head")} == {20}


def test_the_learning_rate_of_a_group_is_the_schedule_times_its_scale():
    model = nn.Linear(2, 2)
    optimizer = create_optimizer([{"params": list(model.parameters()), "lr_scale": 0.25, "weight_decay": 0.0}], lr=1.0)
    set_learning_rate(optimizer, 0.1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="--opt adamv is not known"):
        create_optimizer([{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": 1.0}], "adamv", lr=1.0)


def test_soft_answer_loss_is_the_mean_cross_entropy_times_the_answers():
    logits = torch.tensor([[0.0, 2.0], [-1.0, 0.5]])
    targets = torch.tensor([[1.0, 0.3], [0.0, 0.6]])
    expected = 0.0
    for x, y in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        expected -= y * math.log(p) + (1 - y) * math.log(1 - p)
    assert soft_answer_loss(logits, targets).item() == pytest.approx(expected / 4 * 2, rel=1e-6)


def divergence(logits, targets, smoothing):
    """The definition, term by term."""
    n, vocab = logits.shape
    q = torch.full((n, vocab), smoothing / (vocab - 1))
    q[torch.arange(n), targets] = 1 - smoothing
    terms = torch.where(q > 0, q * (q.clamp_min(1e-30).log() - logits.log_softmax(1)), torch.zeros(()))
    return terms.sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_masked_token_loss_is_the_divergence_from_the_smoothed_target(smoothing, dtype):
    torch.manual_seed(0)
    logits = torch.randn(5, 11).to(dtype).requires_grad_()
    exact = logits.detach().float().clone().requires_grad_()
    targets = torch.tensor([0, 3, 10, 3, 7])
    weights = torch.tensor([0.5, 0.0, 1.0, 2.0, 1.0])  # dropped positions count nothing
    got, expected = masked_token_losses(logits, targets, smoothing), divergence(exact, targets, smoothing)
    with torch.no_grad():
        untouched = masked_token_losses(logits, targets, smoothing)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(untouched, expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad((got * weights).sum(), logits)
    (expected * weights).sum().backward()
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(gradient.float(), exact.grad, rtol=tolerance, atol=tolerance)
    assert gradient.dtype == dtype


def test_the_loss_leaves_the_logits_as_they_are_for_whoever_needs_them_too():
    torch.manual_seed(1)
    logits, targets = torch.randn(3, 5, requires_grad=True), torch.tensor([1, 2, 4])
    before = logits.detach().clone()
    squares = logits.square().sum()  # its backward pass reads the logits
    loss = masked_token_losses(logits, targets, 0.1).sum()
    (of_loss,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (squares + loss).backward()
    torch.testing.assert_close(logits.detach(), before, rtol=0, atol=0)
    torch.testing.assert_close(logits.grad, of_loss + 2 * before)


def test_the_worst_share_of_losses_is_left_out():
    values = torch.tensor([5.0, 1.0, 3.0, 2.0, 4.0])
    assert drop_worst(values, 0.2).item() == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert drop_worst(values, 0.5).item() == pytest.approx((1 + 2) / 2)
    assert drop_worst(values, 0.0).item() == pytest.approx(3.0)


@pytest.mark.slow
def test_eight_steps_of_the_captioning_recipe_follow_the_released_code():
    expected = reference.load("training.json")["captioning"]
    model = reference.build("beit3_base_patch16_224_captioning").train()
    optimizer = create_optimizer(parameter_groups(model, 0.05, 0.9), lr=1e-4)
    schedule = cosine_schedule(1e-4, 1e-6, epochs=2, steps_per_epoch=4, warmup_epochs=1)
    assert schedule == pytest.approx(expected["sched"])
    lengths = [20, 18, 16, 14]
    for step in range(8):
        set_learning_rate(optimizer, schedule[step])
        ids, padding = reference.tokens(2000 + step, lengths)
        masked = torch.zeros_like(ids, dtype=torch.bool)
        for row, length in enumerate(lengths):
            masked[row, 1:length:2] = True
        logits = model(reference.images(1000 + step, 4, 224), ids.masked_fill(masked, 999), padding, masked)
        loss = drop_worst(masked_token_losses(logits, ids[masked], 0.1), 0.2 if step > 3 else 0.0)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        assert loss.item() == pytest.approx(expected["losses"][step], rel=1e-4)
        assert norm.item() == pytest.approx(expected["grad_norms"][step], rel=1e-4)
