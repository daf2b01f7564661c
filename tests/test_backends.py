"""Plain PyTorch and DeepSpeed take the same steps; state goes out and comes back."""

import itertools
import math

import numpy as np
import pytest
import torch

import modeling_finetune  # noqa: F401
from beit3.training.backends import BackendSettings, PlainBackend, choose_precision
from beit3.training.deepspeed_backend import DeepSpeedBackend, engine_config
from beit3.training.ema import ModelEma, applied_to
from engine_for_finetuning import _spread_nan
from modeling_finetune import create_model
from optim_factory import create_optimizer, parameter_groups, set_learning_rate
from tasks.vqav2.task import soft_answer_loss
from tests import reference
from tests.workers import run_processes

BACKENDS = {"plain": PlainBackend, "deepspeed": DeepSpeedBackend}
STEPS, GLOBAL_BATCH = 10, 8


def make(kind, **settings):
    torch.manual_seed(0)
    model = create_model("beit3_tiny_patch16_64_vqav2", vocab_size=60, num_classes=5)
    reference.fill(model)
    groups = parameter_groups(model, weight_decay=0.05, task_head_lr_weight=2)
    optimizer = create_optimizer(groups, lr=1e-3, eps=1e-6)
    return BACKENDS[kind](model, optimizer, BackendSettings(**settings))


def take_steps(backend, rank, world_size, first=0, last=STEPS):
    """Steps on the same global batches however they are shared among processes and micro batches."""
    settings, norms = backend.settings, []
    backend.model.train()
    for step in range(first, last):
        set_learning_rate(backend.optimizer, 1e-3 * (step + 1) / STEPS)
        images = reference.images(100 + step, GLOBAL_BATCH, 64)
        ids, padding = reference.tokens(200 + step, [8, 5, 7, 6, 8, 4, 8, 3], vocab_size=60, width=8)
        targets = torch.from_numpy(np.random.RandomState(300 + step).uniform(0, 1, (GLOBAL_BATCH, 5)))
        for micro in range(settings.update_freq):
            start = (micro * world_size + rank) * settings.batch_size
            rows = slice(start, start + settings.batch_size)
            with backend.micro_step(last=micro == settings.update_freq - 1):
                with backend.autocast():
                    logits = backend.model(images[rows].to(backend.input_dtype), ids[rows], padding[rows])
                    loss = soft_answer_loss(logits, targets[rows])
                backend.backward(loss)
        norm, skipped = backend.step()
        assert float(skipped) == 0
        norms.append(math.nan if norm is None else float(norm))
    return norms


def weights(backend):
    return {name: value.detach().float().numpy().copy() for name, value in backend.full_parameters()}


def train_in_process(process, kind, options):
    backend = make(kind, **options)
    norms = take_steps(backend, process.rank, process.world_size)
    return weights(backend), norms


@pytest.fixture(scope="module")
def one_process_plain():
    return run_processes(train_in_process, 1, "plain", {"batch_size": 8, "clip_grad": 2.0})[0]


LAYOUTS = [(1, 1), (1, 2), (2, 1), (2, 2)]  # processes, micro batches per step


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "update_freq"), LAYOUTS)
@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_every_backend_takes_the_steps_of_one_plain_process(one_process_plain, stage, processes, update_freq):
    expected, norms = one_process_plain
    kind = "plain" if stage is None else "deepspeed"
    options = {"batch_size": GLOBAL_BATCH // processes // update_freq, "update_freq": update_freq, "clip_grad": 2.0}
    for got, got_norms in run_processes(train_in_process, processes, kind, {**options, "zero_stage": stage or 0}):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, atol=1e-5, err_msg=name)
        known = [(a, b) for a, b in zip(got_norms, norms, strict=True) if not math.isnan(a)]
        assert all(a == pytest.approx(b, rel=1e-4) for a, b in known)
        assert known or stage == 0


def train_captioning(process, kind, options):
    """Steps of the captioning model: a text row per picture, loss on the masked tokens."""
    torch.manual_seed(0)
    model = create_model("beit3_tiny_patch16_64_captioning", vocab_size=60)
    reference.fill(model)
    optimizer = create_optimizer(parameter_groups(model, weight_decay=0.05), lr=1e-3, eps=1e-6)
    backend = BACKENDS[kind](model, optimizer, BackendSettings(**options))
    backend.model.train()
    for step in range(3):
        images = reference.images(100 + step, GLOBAL_BATCH, 64)
        ids, padding = reference.tokens(200 + step, [8] * GLOBAL_BATCH, vocab_size=60, width=8)
        masked = torch.zeros_like(ids, dtype=torch.bool)
        masked[:, 1::2] = True
        start = process.rank * options["batch_size"]
        rows = slice(start, start + options["batch_size"])
        with backend.micro_step(last=True):
            with backend.autocast():
                logits = backend.model(
                    images[rows].to(backend.input_dtype),
                    ids[rows],
                    padding[rows].bool(),
                    language_masked_pos=masked[rows],
                )
                loss = torch.nn.functional.cross_entropy(logits.float(), ids[rows][masked[rows]])
            backend.backward(loss)
        backend.step()
    return weights(backend)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_captioning_takes_the_steps_of_plain_pytorch_at_every_stage(stage):
    (expected,) = run_processes(train_captioning, 1, "plain", {"batch_size": 8})
    for got in run_processes(train_captioning, 2, "deepspeed", {"batch_size": 4, "zero_stage": stage}):
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_stays_near_fp32_at_every_stage(one_process_plain, stage):
    expected, _ = one_process_plain
    options = {"batch_size": 4, "precision": "bf16", "clip_grad": 2.0, "zero_stage": stage}
    start = weights(make("plain"))
    moved = np.mean([np.abs(value - start[name]).mean() for name, value in expected.items()])
    for got, _ in run_processes(train_in_process, 2, "deepspeed", options):
        away = np.mean([np.abs(got[name] - value).mean() for name, value in expected.items()])
        assert away < 0.5 * moved  # a run that went anywhere else would be at 1 or more


def break_a_step(process, kind, options, everywhere):
    """Step 1 of 3 has a NaN loss, on process 1 alone or everywhere: weights around it, and what was told."""
    backend = make(kind, **options)
    told, history = [], [weights(backend)]
    step = backend.step
    backward = backend.backward
    number = 0

    def counted():
        nonlocal number
        outcome = step()
        told.append(float(outcome.skipped))
        history.append(weights(backend))
        number += 1
        return outcome._replace(skipped=torch.zeros(()))

    def broken(loss):
        hit = number == 1 and (everywhere or process.rank == process.world_size - 1)
        backward(loss * math.nan if hit else loss)

    backend.step, backend.backward = counted, broken
    take_steps(backend, process.rank, process.world_size, last=3)
    same = [all(np.array_equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(history)]
    finite = all(np.isfinite(value).all() for value in history[-1].values())
    return told, same, finite


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stage", "precision"),
    [
        ("plain", 0, "fp32"), ("plain", 0, "bf16"), *[("deepspeed", stage, "fp32") for stage in range(4)],
        *[("deepspeed", stage, "bf16") for stage in range(4)],
    ],
)  # fmt: skip
def test_a_gradient_broken_on_one_process_skips_the_step_on_all(kind, stage, precision):
    options = {"batch_size": 4, "zero_stage": stage, "precision": precision}
    for told, same, finite in run_processes(break_a_step, 2, kind, options, False):
        assert told == [0, 1, 0]
        assert same == [False, True, False]
        assert finite


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_broken_step_is_skipped_whatever_the_optimizer(name):
    torch.manual_seed(0)
    model = create_model("beit3_tiny_patch16_64_vqav2", vocab_size=60, num_classes=5)
    optimizer = create_optimizer(parameter_groups(model, weight_decay=0.05), name, lr=1e-3)
    backend = PlainBackend(model, optimizer, BackendSettings(batch_size=8))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad[0] = math.inf
    before = weights(backend)
    assert float(backend.step().skipped) == 1
    assert all(np.array_equal(before[name], value) for name, value in weights(backend).items())


def test_an_infinite_loss_with_a_finite_gradient_is_broken_too():
    x = torch.tensor([1.0], requires_grad=True)
    loss = (x * torch.tensor([1.0])).sum() + torch.inf
    loss.backward()
    assert x.grad == 1  # or there is nothing to show
    x.grad = None
    _spread_nan((x * torch.tensor([1.0])).sum() + torch.inf).backward()
    assert torch.isnan(x.grad)
    x.grad = None
    _spread_nan((3 * x).sum()).backward()
    assert x.grad == 3


def test_clipping_scales_the_gradient_to_the_limit(one_process_plain):
    _, norms = one_process_plain
    assert max(norms) > 2.0  # or clipping was not tested at all


def save_and_resume(process, kind, folder):
    options = {"batch_size": GLOBAL_BATCH // process.world_size, "zero_stage": 1}
    path = folder / f"checkpoint-0{BACKENDS[kind].suffix}"
    undisturbed = make(kind, **options)
    take_steps(undisturbed, process.rank, process.world_size, last=3)
    undisturbed.save(path, {"fingerprint": {}, "description": {"answers": ["a"]}, "progress": {"epoch": 3}})
    take_steps(undisturbed, process.rank, process.world_size, first=3)
    resumed = make(kind, **options)
    with torch.no_grad():
        for parameter in resumed.module.parameters():
            parameter.add_(0.5)
    extra = resumed.load(path)
    take_steps(resumed, process.rank, process.world_size, first=3)
    return weights(undisturbed), weights(resumed), extra["progress"], extra["description"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "processes"), [("plain", 1), ("deepspeed", 1), ("deepspeed", 2)])
def test_a_resumed_run_is_bitwise_the_undisturbed_one(tmp_path, kind, processes):
    for undisturbed, resumed, progress, description in run_processes(save_and_resume, processes, kind, tmp_path):
        assert progress == {"epoch": 3}
        assert description == {"answers": ["a"]}
        for name, value in undisturbed.items():
            assert np.array_equal(resumed[name], value), name


def test_parameters_without_a_part_in_the_task_decay_too():
    backend = make("plain", batch_size=GLOBAL_BATCH)
    before = backend.module.beit3.vision_embed.mask_token.detach().clone()
    take_steps(backend, 0, 1, last=1)
    after = backend.module.beit3.vision_embed.mask_token
    torch.testing.assert_close(after, before * (1 - 1e-3 / STEPS * 0.05))


def test_bf16_on_the_plain_backend_keeps_fp32_weights():
    backend = make("plain", batch_size=GLOBAL_BATCH, precision="bf16")
    take_steps(backend, 0, 1, last=2)
    exact = make("plain", batch_size=GLOBAL_BATCH)
    take_steps(exact, 0, 1, last=2)
    for (name, got), (_, wanted) in zip(backend.full_parameters(), exact.full_parameters(), strict=True):
        assert got.dtype == torch.float32
        assert (got - wanted).abs().max() < 2e-3, name


def test_precision_is_chosen_by_the_device():
    assert choose_precision("auto", torch.device("cpu")) == "fp32"
    assert choose_precision("bf16", torch.device("cpu")) == "bf16"
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        choose_precision("fp16", torch.device("cpu"))


def test_the_deepspeed_configuration_leaves_nothing_to_changing_defaults():
    settings = BackendSettings(precision="bf16", update_freq=3, batch_size=4, zero_stage=1)
    config = engine_config(settings, 2, num_parameters=90_000_000)
    assert config["train_batch_size"] == 24
    assert config["gradient_clipping"] == 0.0
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["zero_optimization"]["reduce_bucket_size"] == 50_000_000
    assert engine_config(settings, 2, num_parameters=1000)["zero_optimization"]["reduce_bucket_size"] == 1000


def test_the_average_follows_its_definition_in_fp32():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    ema = ModelEma([("w", weight)], decay=0.9999)
    for _ in range(10):
        ema.update([("w", torch.tensor([2.0, 0.0]))])
    expected = 0.9999**10 * torch.tensor([1.0, 2.0]) + (1 - 0.9999**10) * torch.tensor([2.0, 0.0])
    torch.testing.assert_close(ema.averages["w"], expected)


def test_a_model_computes_with_the_averages_inside_the_block_only():
    model = torch.nn.Linear(2, 1)
    before = model.weight.detach().clone()
    ema = ModelEma(model.named_parameters(), decay=0.5)
    ema.update([(name, value + 1) for name, value in model.named_parameters()])
    with applied_to(model, ema.averages):
        torch.testing.assert_close(model.weight, before + 0.5)
    torch.testing.assert_close(model.weight, before, rtol=0, atol=0)
