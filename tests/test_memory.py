"""The memory model: what it says is kept for the backward pass is what PyTorch keeps; sums are those done by hand."""

from functools import partial

import pytest
import torch

from beit3.model.encoder import EncoderConfig
from beit3.training.backends import BUCKET, BackendSettings
from beit3.training.memory_estimate import Demand, training_demand
from benchmarks import memory
from benchmarks.models import LENGTHS, VOCABULARY, make_batch, make_config, our_loss
from modeling_finetune import HEADS, VQA_ANSWERS

TINY = EncoderConfig(width=128, layers=4, heads=4, image_size=64, vocab_size=1000)
GB = 1e9


def demand(config: EncoderConfig = TINY, parameters: int = 10_000_000, zero: bool = False, **changes) -> Demand:
    settings = {"precision": "fp32", "batch_size": 8} | {
        name: changes.pop(name) for name in ("precision", "batch_size", "zero_stage") if name in changes
    }
    known = {"device": "cpu", "text_tokens": 16, "output_values": 100}
    return training_demand(config, parameters, BackendSettings(**settings), zero=zero, **known | changes)


def kept_per_picture(task: str, config: EncoderConfig, dtype: str) -> float:
    """Bytes that one more picture keeps until the backward pass, counted."""
    model = HEADS[task](config).train()

    def forward(pictures: int) -> torch.Tensor:
        batch = make_batch(task, pictures, config.image_size, torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            return our_loss(task, model, batch)

    three, one = (memory.kept_for_backward(partial(forward, pictures)) for pictures in (3, 1))
    return (three - one) / 2 * 1e6


@pytest.mark.parametrize("recomputes", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("task", ["vqav2", "captioning"])
def test_activations_are_what_pytorch_keeps(task, precision, recomputes, monkeypatch):
    monkeypatch.setattr("beit3.model.recompute.recomputes", lambda *_: recomputes)
    monkeypatch.setattr("beit3.training.memory_estimate.recomputes", lambda *_: recomputes)
    config = make_config(task, "base", 224)
    config = EncoderConfig(**{**vars(config), "layers": 4, "drop_path_rate": 0.1})
    # Texts of the measured batch, 16 tokens after rounding up; its longest text's tokens beside <s> are hidden.
    outputs = VQA_ANSWERS if task == "vqav2" else VOCABULARY * round(0.65 * max(LENGTHS[task]))
    settings = BackendSettings(precision=precision, batch_size=1)
    estimate = training_demand(
        config, 0, settings, device="cpu", text_tokens=16, output_values=outputs, causal_text=task == "captioning"
    )
    # The gradient of the loss is made before the first of what is kept is freed: two arrays of fp32.
    gradient = 2 * 4 * outputs
    assert estimate.per_picture == pytest.approx(kept_per_picture(task, config, precision) + gradient, rel=0.1)


def test_recomputing_keeps_the_inputs_of_layers_and_one_layer():
    config = EncoderConfig(**{**vars(TINY), "recompute_activations": True})
    few, many = (demand(EncoderConfig(**{**vars(config), "layers": layers})).per_picture for layers in (4, 14))
    assert many - few == 10 * 128 * (17 + 16) * 4


def test_plain_pytorch_in_fp32():
    expected = demand(parameters=10_000_000)
    joint = 2 * 4 * 3 * 128**2  # of two experts in four layers: q, k, v in one
    assert expected.weights == 4 * 10_000_000 + 4 * joint
    assert expected.gradients == 4 * 10_000_000
    assert expected.optimizer == 8 * 10_000_000
    assert expected.average == 0
    assert demand(average=True).average == 4 * 10_000_000
    assert demand(world_size=2).gradients == 8 * 10_000_000


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [
        (0, 2 * 8e6, 2 * 8e6 + 4 * 8e6, 12 * 8e6),
        (1, 2 * 8e6, 2 * 8e6 + 4 * 2e6 + 2 * 8e6 + 4 * 8e6, 12 * 2e6),
        (2, 2 * 8e6, 2 * 2e6 + 4 * 2e6 + 2 * 8e6, 12 * 2e6),
        (3, 2 * 2e6, 2 * 2e6 + 4 * 2e6 + 2 * 8e6, 12 * 2e6),
    ],
)
def test_zero_shares_out_among_processes(stage, weights, gradients, optimizer):
    joint = 2 * 4 * 3 * 128**2
    found = demand(parameters=8_000_000, zero=True, zero_stage=stage, precision="bf16", world_size=4)
    assert (found.weights, found.gradients, found.optimizer) == (weights + 2 * joint, gradients, optimizer)


def test_what_is_under_way_between_processes_is_no_more_than_a_bucket():
    small, large = (demand(parameters=n, zero=True, zero_stage=1, world_size=1).gradients for n in (10**7, 10**9))
    assert small == (4 + 4 + 4) * 10**7
    assert large == (4 + 4) * 10**9 + 4 * BUCKET


def test_what_fits():
    one = Demand(weights=1 * GB, gradients=1 * GB, optimizer=2 * GB, average=0, per_picture=0.5 * GB, pictures=8)
    assert one.total == 8 * GB
    assert one.fits(9 * GB) and not one.fits(8.8 * GB)  # a tenth is left free
    assert one.most_pictures(10 * GB) == 10  # 9 GB without that tenth, 4 of them fixed
    assert one.most_pictures(1 * GB) == 0
    assert str(one) == "8.0 GB: weights 1.00, gradients 1.00, optimizer 2.00, activations 8 × 0.500"


def test_advice_keeps_the_pairs_per_step_and_does_not_propose_what_is_on():
    demand = Demand(10, 10, 20, 0, per_picture=10, pictures=12)  # 160 bytes, of them 40 fixed
    assert demand.advice(200, update_freq=2, zero_stage=0, recomputes=False) is None
    advice = demand.advice(120, update_freq=2, zero_stage=0, recomputes=False)  # room for 6 pictures
    assert "--batch_size 6 --update_freq 4" in advice
    assert "--checkpoint_activations" in advice and "--zero_stage 2" in advice
    advice = demand.advice(110, update_freq=2, zero_stage=2, recomputes=True)  # 5 do not divide 24
    assert advice == "that may not fit: --batch_size 4 --update_freq 6"
    assert "smaller model" in demand.advice(44, update_freq=2, zero_stage=2, recomputes=True)
