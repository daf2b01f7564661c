"""A run goes on only with the flags that it was begun with, where these decide its steps; made from the settings.

A new flag is tried without a new test, unless its values are text.
"""

import shutil

import pytest
import torch

import run_beit3_finetuning as run
from tests.test_run import start, tiny_flags
from tests.test_settings import EVERY_FLAG, OWNER, SHARED_FLAGS, TASK_FLAGS, coco  # noqa: F401  a fixture


@pytest.fixture(scope="module")
def trained(coco, tmp_path_factory):
    """Task → the full checkpoint of a run of one epoch."""
    checkpoints = {}
    for task in ("vqav2", "coco_captioning", "vqa"):
        out = tmp_path_factory.mktemp(task)
        assert run.main(resume_flags(coco, out, task)) == 0
        checkpoints[task] = out / "checkpoint-0.pth"
    return checkpoints


def resume_flags(coco, out, task, *more):
    return [*tiny_flags(coco, out, task=task, num_max_bpe_tokens=16, epochs=1), *more]


class WouldGoOnError(Exception):
    """The run found its checkpoint to be of this run, and went on to build the model."""


@pytest.fixture
def resumed(coco, trained, tmp_path, caplog, monkeypatch):
    """What is said when a run goes on with other flags, from a copy of the checkpoint; None where it would go on."""
    monkeypatch.setattr("utils.set_up_logging", lambda is_main: None)

    def build_model(*arguments):
        raise WouldGoOnError

    monkeypatch.setattr("runs.assembly.build_model", build_model)

    def said(task, *more, rewrite=None):
        path = tmp_path / "checkpoint-0.pth"
        shutil.copy(trained[task], path)
        if rewrite is not None:
            content = torch.load(path, weights_only=True)
            rewrite(content["fingerprint"])
            torch.save(content, path)
        caplog.clear()
        try:
            assert run.main(resume_flags(coco, tmp_path, task, "--resume", str(path), *more)) == 2
        except WouldGoOnError:
            return None
        return caplog.records[-1].getMessage()

    return said


# Of flags that take a text, and of those that go together: another value as it is typed.
ANOTHER = {
    "model": ["--model", "beit3_base_patch16_480", "--input_size", "480"],
    "input_size": ["--model", "beit3_base_patch16_480", "--input_size", "480"],
    "finetune": ["--finetune", "{weights}"],
    "opt": ["--opt", "sgd"],
    "freeze": ["--freeze", "text,2"],
}


def another(each, weights, now=None):
    """A flag as it is typed with a value that is allowed and is not that of `resume_flags`."""
    if each.name in ANOTHER:
        return [part.format(weights=weights) for part in ANOTHER[each.name]]
    now = each.default if now is None else now
    if each.count == 0:
        return [f"--no_{each.name}" if now else f"--{each.name}"]
    if each.facts.choices is not None:
        return [f"--{each.name}", str(next(value for value in each.facts.choices if value != now))]
    assert each.kind in (int, float), f"{each.name}: a text; ANOTHER has to say another value"
    given = [str(another_number(each, value)) for value in (now if isinstance(now, tuple) else [now])]
    return [f"--{each.name}", *(sorted(given) if each.name == "crop_scale" else given)]


def another_number(each, now):
    facts = each.facts
    low = facts.above if facts.at_least is None else facts.at_least
    high = facts.below if facts.at_most is None else facts.at_most
    if each.kind is int:
        now = low if now is None else now
        return now + 1 if now < high else now - 1
    now = low if now is None else now
    return (now + (low if now == high else high)) / 2


NOW = {"epochs": 1, "warmup_epochs": 1.0, "vocab_size": 100, "lr": 1e-3, "num_max_bpe_tokens": 16}  # of resume_flags
# Those of DeepSpeed: see the test of its own.
DECIDING = [each for each in EVERY_FLAG.values() if each.facts.decides_steps and each.name != "zero_stage"]


@pytest.mark.parametrize("each", DECIDING, ids=lambda each: each.name)
def test_a_run_does_not_go_on_with_another_value_of_a_flag_that_decides_its_steps(resumed, trained, each):
    task = OWNER[each.name]
    argv = another(each, trained["vqav2"].with_name("checkpoint-best.pth"), NOW.get(each.name))
    if each.name == "input_size":
        argv += ["--vocab_size", "100"]
    message = resumed(task, *argv)
    if each.name == "epochs":  # the run stands at the end of its warm-up, which is the same
        assert message is None
    elif each.name == "enable_deepspeed":
        assert "made without --enable_deepspeed, this run is with" in message
    else:
        assert f"--{each.name} was " in message
        assert "belongs to another run" in message and "--force_resume" in message
        if each.name == "lr":  # force goes for all alike, and a run takes seconds
            assert resumed(task, *argv, "--force_resume") is None


@pytest.mark.parametrize("task", ["vqav2", "coco_captioning"])
def test_a_run_goes_on_with_the_same_flags_and_with_others_that_decide_nothing(coco, resumed, tmp_path, task):
    assert resumed(task) is None
    moved = tmp_path / "moved"
    shutil.copytree(coco, moved)
    # Another way to the same steps; of the others any value will do.
    same = {
        "batch_size": ["--batch_size", "8"], "update_freq": ["--update_freq", "2"],
        "precision": ["--precision", "fp32"],
        "data_path": ["--data_path", str(moved)], "image_path": ["--image_path", str(coco)],
        "sentencepiece_model": ["--sentencepiece_model", str(moved / "mini.spm")],
        "output_dir": ["--output_dir", str(tmp_path / "elsewhere")], "log_dir": ["--log_dir", str(tmp_path / "log")],
        "device": ["--device", "auto"], "split": ["--split", "val"], "model_key": ["--model_key", "model"],
        "model_prefix": ["--model_prefix", "x."], "dist_url": ["--dist_url", "tcp://x"],
    }  # fmt: skip
    left_out = {
        "resume",  # is given already
        "eval", "force_resume",  # not what this is about
        "dist_on_itp",  # needs a launcher
        "deterministic",  # stays on in this process
        "zero_stage",  # counts with DeepSpeed
    }  # fmt: skip
    argv = []
    for each in [*SHARED_FLAGS, *TASK_FLAGS[task]]:
        if not each.facts.decides_steps and each.name not in left_out:
            argv += same.get(each.name) or another(each, None)
    assert resumed(task, *argv) is None


def test_other_pairs_per_step_precision_and_task_are_refused(resumed):
    assert "pairs per step was 16, is 17" in resumed("vqav2", "--batch_size", "17")
    assert "precision was fp32, is bf16" in resumed("vqav2", "--precision", "bf16")
    assert "--task was vqav2, is coco_captioning" in resumed("vqav2", "--task", "coco_captioning")


@pytest.mark.slow
def test_another_zero_stage_is_refused(coco, tmp_path, caplog, monkeypatch):
    ended = start(resume_flags(coco, tmp_path, "vqav2", "--enable_deepspeed"))
    assert ended.returncode == 0, ended.stderr
    monkeypatch.setattr("utils.set_up_logging", lambda is_main: None)
    for stage in ("0", "2", "3"):
        assert run.main(resume_flags(coco, tmp_path, "vqav2", "--enable_deepspeed", "--zero_stage", stage)) == 2
        assert f"--zero_stage was 1, is {stage}" in caplog.records[-1].getMessage()


# Runs that were begun before tasks had flags of their own: their recipe named those of every task.
FIRST_RECIPE = """model vocab_size num_max_bpe_tokens drop_path input_size finetune opt opt_betas opt_eps momentum
    weight_decay clip_grad lr min_lr layer_decay task_head_lr_weight model_ema model_ema_decay warmup_epochs
    warmup_steps epochs randaug train_interpolation crop_scale skip_bad_images seed captioning_mask_prob
    drop_worst_ratio drop_worst_after label_smoothing captions_per_image enable_deepspeed task""".split()


def as_first_format(fingerprint):
    recipe = fingerprint["recipe"]
    recipe.pop("version of the task's steps")
    for name in set(FIRST_RECIPE) - {"task"}:
        recipe.setdefault(f"--{name}", EVERY_FLAG[name].default)
    fingerprint["format"] = 1


def test_a_run_of_the_first_format_goes_on_where_the_steps_are_the_same(resumed):
    assert resumed("vqav2", rewrite=as_first_format) is None
    assert "--lr was 0.001, is 0.002" in resumed("vqav2", "--lr", "0.002", rewrite=as_first_format)
    message = resumed("coco_captioning", rewrite=as_first_format)
    assert "version of the task's steps was 1, is 2" in message
    assert "another --output_dir" in message


def test_a_run_of_a_later_format_is_refused(resumed):
    message = resumed("vqav2", rewrite=lambda fingerprint: fingerprint.update(format=3))
    assert "made by a later version of this toolkit (format 3)" in message


@pytest.mark.parametrize("content", ["2", None, [2], True, 0])
def test_a_format_that_is_no_number_is_refused(resumed, content):
    message = resumed("vqav2", rewrite=lambda fingerprint: fingerprint.update(format=content))
    assert "checkpoint-0.pth: not a checkpoint of this toolkit" in message
    assert "format" in message
