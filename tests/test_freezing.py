"""`--freeze`: what is not trained stays as it is and costs nothing; what is trained learns as it would without."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import run_beit3_finetuning as run
import utils
from beit3.model.compilation import compile_layers
from beit3.model.encoder import EncoderConfig
from beit3.system.errors import InputError
from beit3.training.backends import BackendSettings, PlainBackend
from beit3.training.deepspeed_backend import DeepSpeedBackend
from beit3.training.ema import ModelEma, applied_to
from beit3.training.freezing import freeze, is_frozen, problem_of
from beit3.training.memory_estimate import training_demand
from benchmarks import memory
from modeling_finetune import BEiT3ForVisualQuestionAnswering, create_model
from optim_factory import create_optimizer, parameter_groups
from runs.assembly import layers_below
from runs.command_line import read_settings
from tests import reference
from tests.test_compilation import needs_compiler
from tests.test_new_task import full_checkpoints, one_line_more, pictures, training_flags  # noqa: F401  fixtures
from tests.workers import run_processes

# Which parameters

LAYER = 14_191_104  # values of one layer of a base model, half of them each expert
TEXT_TABLES, IMAGE_TABLES = 64010 * 768 + 1024 * 768, 768 * 3 * 16**2 + 768 + 2 * 768 + 903 * 768
EMBEDDINGS = 51_231_744
NORMS = 2 * 2 * 768  # the final norm of captioning, of both experts
HEADS = {
    "beit3_base_patch16_480_vqav2": 6_585_657,
    "beit3_base_patch16_480_captioning": 49_223_690,
    "beit3_base_patch16_224_nlvr2": 4_732_418,
    "beit3_base_patch16_384_retrieval": 1_179_649,
    "beit3_base_patch16_224_imageclassification": 770_536,
}


def on_meta(name, given=""):
    with torch.device("meta"):
        model = create_model(name)
    freeze(model, given)
    return model


@pytest.mark.parametrize(
    ("given", "frozen"),
    [
        ("", 0),
        ("embeddings", EMBEDDINGS),
        ("0", EMBEDDINGS),
        ("5", EMBEDDINGS + 5 * LAYER),
        ("12", EMBEDDINGS + 12 * LAYER),
        ("text", TEXT_TABLES + 6 * LAYER),
        ("image", IMAGE_TABLES + 6 * LAYER),
        ("text,4", TEXT_TABLES + 6 * LAYER + IMAGE_TABLES + 2 * LAYER),
        (" 4 , text", TEXT_TABLES + 6 * LAYER + IMAGE_TABLES + 2 * LAYER),
        ("text,image", EMBEDDINGS + 12 * LAYER),
        ("encoder", EMBEDDINGS + 12 * LAYER),
        ("head-only", EMBEDDINGS + 12 * LAYER),
    ],
)
def test_so_many_values_freeze_of_a_base_model(given, frozen):
    model = on_meta("beit3_base_patch16_480_vqav2", given)
    assert model.num_parameters - model.num_trained == frozen
    assert model.num_parameters == EMBEDDINGS + 12 * LAYER + HEADS["beit3_base_patch16_480_vqav2"]


def test_the_final_norm_is_above_all_layers_and_belongs_to_its_experts():
    name = "beit3_base_patch16_480_captioning"
    assert on_meta(name, "12").num_trained == HEADS[name] + NORMS
    assert on_meta(name, "12,text").num_trained == HEADS[name] + NORMS // 2
    assert on_meta(name, "12,text,image").num_trained == HEADS[name]


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_all_that_is_left(name):
    assert on_meta(name, "encoder").num_trained == on_meta(name, "head-only").num_trained == HEADS[name]


def test_a_large_model():
    whole = on_meta("beit3_large_patch16_480_vqav2").num_parameters
    assert whole - on_meta("beit3_large_patch16_480_vqav2", "embeddings").num_trained == 68_308_992
    assert whole - on_meta("beit3_large_patch16_480_vqav2", "10").num_trained == 68_308_992 + 10 * 25_212_928


@pytest.mark.parametrize(
    ("given", "name", "frozen"),
    [
        ("1", "beit3.encoder.layers.0.ffn.A.fc1.weight", True),
        ("1", "beit3.encoder.layers.1.ffn.A.fc1.weight", False),
        ("1", "beit3.encoder.layers.10.ffn.A.fc1.weight", False),
        ("1", "beit3.encoder.embed_positions.A.weight", True),
        ("text", "beit3.encoder.embed_positions.B.weight", True),
        ("text", "beit3.encoder.layers.3.self_attn.q_proj.B.bias", True),
        ("text", "beit3.encoder.layers.3.self_attn.q_proj.A.bias", False),
        ("image", "beit3.vision_embed.mask_token", True),
        ("image", "beit3.encoder.layer_norm.A.bias", True),
        ("image", "beit3.text_embed.weight", False),
        ("embeddings", "beit3.encoder.layer_norm.A.bias", False),
        ("head-only", "pooler.dense.weight", False),
    ],
)
def test_names(given, name, frozen):
    assert is_frozen(given, name) is frozen


@pytest.mark.parametrize("given", ["", "0", "4", "text", "text, 4", "embeddings,image,2", "head-only"])
def test_what_can_be_said(given):
    assert problem_of(given, 4) is None


@pytest.mark.parametrize(
    ("given", "part"),
    [("5", "5"), ("-1", "-1"), ("1.5", "1.5"), ("all", "all"), ("text;4", "text;4"), ("text,", "''"), (",", "''"),
     ("text,head", "head"), ("9" * 5000, "9" * 40), ("٣", "٣"), ("Text", "Text")],
)  # fmt: skip
def test_anything_else_is_refused_in_a_sentence_that_names_what_there_is(given, part):
    assert problem_of(given, 4) == (
        f"--freeze {given}: {part} is none of embeddings, text, image, encoder, head-only and no number of layers up "
        "to 4, which this model has; several are joined by commas, as in text,2"
    )


@pytest.mark.parametrize(("model", "wrong"), [("beit3_base_patch16_480", "13"), ("beit3_tiny_patch16_64", "5")])
def test_the_command_line_knows_how_many_layers_the_model_has(model, wrong):
    def told(given):
        with pytest.raises(InputError) as caught:
            read_settings(["--task", "vqav2", "--model", model, "--freeze", given])
        return [problem for problem in caught.value.problems if problem.startswith("--freeze")]

    assert len(told(wrong)) == 1 and f"up to {int(wrong) - 1}, which this model has" in told(wrong)[0]
    assert told(str(int(wrong) - 1)) == []


# A step


def small(task, given, **options):
    torch.manual_seed(0)
    model = create_model(f"beit3_tiny_patch16_64_{task}", vocab_size=60, **options)
    reference.fill(model)
    freeze(model, given)
    return model.train()


def loss_of(task, model, dtype=torch.float32, rows=slice(None), step=0):
    images = reference.images(100 + step, 4, 64)[rows].to(dtype)
    ids, padding = reference.tokens(200 + step, [8, 5, 7, 6], vocab_size=60, width=8)
    ids, padding = ids[rows], padding[rows]
    out = model(images, ids, padding) if task == "vqav2" else model(images, ids, padding, 1 - padding)
    return out.float().sin().square().mean()


def backend_of(model, kind=PlainBackend, **settings):
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.9)
    return kind(model, create_optimizer(groups, lr=1e-3), BackendSettings(**settings))


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


GIVEN = ["embeddings", "2", "text", "image", "text,2", "4", "head-only"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("task", ["vqav2", "captioning"])
def test_a_step_changes_what_is_trained_and_nothing_else(task, given, precision):
    model = small(task, given)
    backend, before = backend_of(model, precision=precision, clip_grad=1.0), values(model)
    with backend.autocast():
        loss = loss_of(task, model)
    backend.backward(loss)
    backend.step()
    for name, parameter in model.named_parameters():
        assert (parameter in backend.optimizer.state) is not is_frozen(given, name), name
        assert parameter.grad is None
        if is_frozen(given, name):
            assert torch.equal(parameter, before[name]), name
    moved = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    assert any(name.startswith(("head.", "mlm_head.")) for name in moved)
    assert given in ("4", "head-only") or any(name.startswith("beit3.encoder.layers.3") for name in moved)


@pytest.mark.parametrize("recompute_norms", [False, True])
@pytest.mark.parametrize("recompute_layers", [False, True])
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("task", ["vqav2", "captioning"])
def test_gradients_of_what_is_trained_are_those_of_a_full_run(
    task, given, recompute_layers, recompute_norms, monkeypatch
):
    monkeypatch.setattr("beit3.model.recompute.recomputes", lambda *_: recompute_norms)
    options = {"checkpoint_activations": recompute_layers, "drop_path_rate": 0.5}
    gradients, norms = [], []
    for each in ("", given):
        model = small(task, each, **options)
        torch.manual_seed(7)  # drop path: frozen layers keep theirs
        loss_of(task, model).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        norms.append(float(backend_of(model).step().grad_norm))
    whole, part = gradients
    for name, gradient in part.items():
        if is_frozen(given, name):
            assert gradient is None, name
        else:  # None where it has no part in the task
            assert (gradient is None) == (whole[name] is None), name
            assert gradient is None or torch.equal(gradient, whole[name]), name
    trained = [whole[name] for name in whole if not is_frozen(given, name) and whole[name] is not None]
    assert norms[1] == pytest.approx(float(torch.nn.utils.get_total_norm(trained)), rel=1e-5)


@pytest.mark.parametrize("recompute_norms", [False, True])
@pytest.mark.parametrize("recompute_layers", [False, True])
@pytest.mark.parametrize(
    ("given", "below"), [("", 0), ("text", 0), ("embeddings", 0), ("1", 1), ("3", 3), ("4", 4), ("encoder", 4)]
)
def test_nothing_below_the_lowest_trained_parameter_has_a_backward_pass(
    given, below, recompute_layers, recompute_norms, monkeypatch
):
    monkeypatch.setattr("beit3.model.recompute.recomputes", lambda *_: recompute_norms)
    model = small("vqav2", given, checkpoint_activations=recompute_layers)
    came_out = []
    for layer in model.beit3.encoder.layers:
        layer.register_forward_hook(lambda _, __, out: came_out.append(out[0]))
    loss = loss_of("vqav2", model)
    assert [out.grad_fn is None for out in came_out] == [number < below for number in range(4)]
    loss.backward()
    assert layers_below(model) == below


@needs_compiler
@pytest.mark.slow
def test_compiled_layers_freeze_as_well():
    gradients = []
    for compiled in (False, True):
        model = small("vqav2", "text,2", drop_path_rate=0.5)
        if compiled:
            assert compile_layers(model.beit3, torch.device("cpu"))
            torch._dynamo.utils.counters.clear()
        torch.manual_seed(7)
        loss_of("vqav2", model).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, compiled = gradients
    assert not torch._dynamo.utils.counters["graph_break"]
    for name, gradient in plain.items():
        assert (gradient is None) == (compiled[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-6)


# Averages


def test_frozen_weights_have_no_average_and_are_themselves_in_its_place():
    model = small("vqav2", "2")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    ema = ModelEma(trained.items(), decay=0.5)
    assert ema.averages.keys() == {name for name, _ in model.named_parameters() if not is_frozen("2", name)}
    before = values(model)
    ema.update([(name, value + 1) for name, value in before.items()])
    with applied_to(model, ema.averages):
        for name, value in values(model).items():
            torch.testing.assert_close(value, before[name] if is_frozen("2", name) else before[name] + 0.5)
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


# Memory

TINY = EncoderConfig(width=128, layers=4, heads=4, image_size=64, vocab_size=1000)
JOINT = 2 * 3 * 128**2  # values of q, k and v of a layer in one matrix


def demand(zero=False, average=True, world_size=1, **settings):
    return training_demand(
        TINY, 10_000_000, BackendSettings(**settings), device="cpu", text_tokens=16, output_values=100, zero=zero,
        world_size=world_size, average=average, trained=1_000_000, layers_below=3,
    )  # fmt: skip


def test_gradients_optimizer_and_average_are_of_what_is_trained():
    found = demand()
    assert found.weights == 4 * 10_000_000 + 4 * JOINT
    assert (found.gradients, found.optimizer, found.average) == (4e6, 8e6, 4e6)
    assert demand(world_size=2).gradients == 8e6


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [
        (0, 2 * 10e6, 2e6 + 4e6, 12e6),
        (1, 2 * 10e6, 2e6 + 4 * 0.25e6 + 2e6 + 4e6, 12 * 0.25e6),
        (2, 2 * 10e6, 2 * 0.25e6 + 4 * 0.25e6 + 2e6, 12 * 0.25e6),
        (3, 2 * 2.5e6, 2 * 0.25e6 + 4 * 0.25e6 + 2e6, 12 * 0.25e6),
    ],
)
def test_what_zero_shares_is_of_what_is_trained(stage, weights, gradients, optimizer):
    found = demand(zero=True, zero_stage=stage, precision="bf16", world_size=4)
    assert (found.weights, found.gradients, found.optimizer) == (weights + 2 * JOINT, gradients, optimizer)


# Where the last layer alone is trained, less is kept of it: nothing has to go back to its input. A head is not counted.
@pytest.mark.parametrize(("given", "most"), [("", 0), ("1", 0), ("3", 600_000), ("4", 50_000)])
def test_activations_are_kept_by_the_layers_with_a_backward_pass(given, most):
    config = EncoderConfig(width=768, layers=4, heads=12, image_size=224, vocab_size=60, final_norm=False)
    model = BEiT3ForVisualQuestionAnswering(config, num_classes=10).train()
    freeze(model, given)

    def forward(pictures):
        ids, padding = reference.tokens(2, [16] * pictures, vocab_size=60, width=16)
        return model(reference.images(1, pictures, 224), ids, padding)

    three, one = (memory.kept_for_backward(lambda n=n: forward(n)) for n in (3, 1))
    estimate = training_demand(
        config, model.num_parameters, BackendSettings(), device="cpu", text_tokens=16, output_values=10,
        trained=model.num_trained, layers_below=layers_below(model),
    )  # fmt: skip
    kept = (three - one) / 2 * 1e6
    assert estimate.per_picture == pytest.approx(kept, rel=0.1, abs=most)


# Whole runs


@pytest.fixture
def heard(caplog, monkeypatch):
    monkeypatch.setattr(utils, "set_up_logging", lambda is_main: None)
    caplog.set_level("INFO")
    return caplog


def test_a_run_from_weights_to_weights(pictures, tmp_path, heard):
    """Begun from weights, with an average, interrupted after an epoch; ends as the run that went through."""
    start, through, again = (tmp_path / name for name in ("start", "through", "again"))
    assert run.main([*training_flags(pictures, start), "--epochs", "1"]) == 0
    assert "parameters, 96 training" in heard.text and "are trained" not in heard.text
    n_parameters = json.loads((start / "log.txt").read_text())["n_parameters"]
    frozen = ["--finetune", str(start / "checkpoint-last"), "--freeze", "image,3", "--model_ema"]
    frozen += ["--model_ema_decay", "0.5"]
    heard.clear()
    assert run.main([*training_flags(pictures, through), *frozen]) == 0

    before, after = (load_file(out / "checkpoint-last" / "model.safetensors") for out in (start, through))
    best = load_file(through / "checkpoint-best" / "model.safetensors")
    assert before.keys() == after.keys() == best.keys()
    left = {name for name in before if not is_frozen("image,3", name)}
    assert {name for name in before if not torch.equal(before[name], after[name])} <= left
    assert {name for name in before if not torch.equal(before[name], best[name])} <= left
    assert not torch.equal(before["head.weight"], after["head.weight"])
    trained = sum(before[name].numel() for name in left)
    assert [json.loads(line)["n_parameters"] for line in (through / "log.txt").read_text().splitlines()] == 2 * [
        trained
    ]
    assert trained < n_parameters == sum(value.numel() for value in before.values())
    assert f": of {n_parameters / 1e6:.1f} M parameters {trained / 1e6:.1f} M are trained, 96 training" in heard.text
    held = torch.load(full_checkpoints(through)[0], weights_only=True)
    assert held["ema"].keys() == left
    assert held["fingerprint"]["recipe"]["--freeze"] == held["description"]["flags"]["freeze"] == "image,3"

    again.mkdir()
    shutil.copy(full_checkpoints(through)[0], again)
    heard.clear()
    assert run.main([*training_flags(pictures, again), *frozen[:2], "--freeze", "image", *frozen[4:]]) == 2
    assert "--freeze was image,3, is image" in heard.text and "not even --force_resume takes others" in heard.text
    assert run.main([*training_flags(pictures, again), *frozen[:2], "--force_resume", *frozen[4:]]) == 2
    assert run.main([*training_flags(pictures, again), *frozen]) == 0
    ended = load_file(again / "checkpoint-last" / "model.safetensors")
    assert all(torch.equal(ended[name], after[name]) for name in after)


def test_a_run_that_was_begun_before_there_was_this_flag_goes_on(pictures, tmp_path):
    assert run.main([*training_flags(pictures, tmp_path), "--epochs", "1"]) == 0
    (path,) = full_checkpoints(tmp_path)
    content = torch.load(path, weights_only=True)
    assert content["fingerprint"]["recipe"].pop("--freeze") == ""
    torch.save(content, path)
    assert run.main([*training_flags(pictures, tmp_path), "--epochs", "1"]) == 0
    assert run.main([*training_flags(pictures, tmp_path), "--epochs", "1", "--freeze", "1"]) == 2


def train_frozen(process, kind, folder, settings, given):
    """Four steps, and the last two of them again from a checkpoint in between, on a model that has forgotten all."""
    backends = {"plain": PlainBackend, "deepspeed": DeepSpeedBackend}
    settings = {"batch_size": 4 // process.world_size, "clip_grad": 1.0, **settings}
    rows = slice(process.rank, None, process.world_size)

    def take_steps(backend, *steps):
        backend.model.train()
        for step in steps:
            with backend.micro_step(last=True):
                with backend.autocast():
                    loss = loss_of("vqav2", backend.model, backend.input_dtype, rows, step)
                backend.backward(loss)
            assert float(backend.step().skipped) == 0

    def whole(backend):
        return {name: value.detach().float().numpy().copy() for name, value in backend.full_parameters()}

    path = folder / f"checkpoint-0{backends[kind].suffix}"
    backend = backend_of(small("vqav2", given), backends[kind], **settings)
    start = whole(backend)
    take_steps(backend, 0, 1)
    backend.save(path, {"fingerprint": {}, "description": {}})
    take_steps(backend, 2, 3)
    with backend.evaluation_model() as model:
        evaluated = {name: parameter.detach().float().numpy().copy() for name, parameter in model.named_parameters()}
    forgetful = small("vqav2", given)
    with torch.no_grad():
        for parameter in forgetful.parameters():
            parameter.add_(0.5)
    resumed = backend_of(forgetful, backends[kind], **settings)
    resumed.load(path)
    take_steps(resumed, 2, 3)
    return start, whole(backend), evaluated, whole(resumed)


@pytest.mark.slow
@pytest.mark.parametrize("given", ["text,2", "head-only"])
@pytest.mark.parametrize(
    ("kind", "stage", "precision", "processes"),
    [("plain", 0, "fp32", 2), *[("deepspeed", stage, "fp32", 2) for stage in range(4)],
     *[("deepspeed", stage, "bf16", 1) for stage in range(4)], ("deepspeed", 3, "bf16", 2)],
)  # fmt: skip
def test_every_backend_leaves_frozen_weights_alone_and_resumes_exactly(
    tmp_path, kind, stage, precision, processes, given
):
    exact = {name: value.numpy() for name, value in values(small("vqav2", given)).items()}
    options = {"zero_stage": stage, "precision": precision}
    for start, ended, evaluated, resumed in run_processes(train_frozen, processes, kind, tmp_path, options, given):
        assert start.keys() == ended.keys() == evaluated.keys() == exact.keys()
        for name, value in exact.items():
            assert np.array_equal(resumed[name], ended[name]), name
            np.testing.assert_allclose(evaluated[name], ended[name], rtol=1e-2, atol=1e-6, err_msg=name)
            if is_frozen(given, name):
                assert np.array_equal(ended[name], value), name
        assert not np.array_equal(ended["head.0.weight"], exact["head.0.weight"])


def train_with_average(process):
    """Under ZeRO-3 and in bf16 the model to evaluate is made of averages and frozen weights."""
    backend = backend_of(small("vqav2", "2"), DeepSpeedBackend, batch_size=4, zero_stage=3, precision="bf16")
    trained = {name for name, parameter in backend.module.named_parameters() if parameter.requires_grad}
    ema = ModelEma([item for item in backend.full_parameters() if item[0] in trained], decay=0.5)
    backend.model.train()
    backend.backward(loss_of("vqav2", backend.model, backend.input_dtype))
    backend.step()
    ema.update(backend.full_parameters())
    with backend.evaluation_model(ema.averages) as model:
        evaluated = {name: parameter.detach().float().numpy().copy() for name, parameter in model.named_parameters()}
    return {name: average.numpy() for name, average in ema.averages.items()}, evaluated


@pytest.mark.slow
def test_an_average_is_evaluated_together_with_the_frozen_weights():
    exact = {name: value.numpy() for name, value in values(small("vqav2", "2")).items()}
    ((averages, evaluated),) = run_processes(train_with_average, 1)
    assert averages.keys() == {name for name in exact if not is_frozen("2", name)}
    for name, value in evaluated.items():
        np.testing.assert_allclose(value, averages.get(name, exact[name]), rtol=1e-2, atol=1e-6, err_msg=name)
