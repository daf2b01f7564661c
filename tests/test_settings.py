"""The flags of the command line, from the settings classes themselves: a new flag is covered without a new test."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import run_beit3_finetuning as run
from beit3.system.errors import InputError
from beit3.system.flags import flags_of
from datasets import CaptioningDataset, VQAv2Dataset
from runs.command_line import help_text, read_settings
from runs.settings import CONCERNS
from tasks import PLANNED, TASKS, settings_of
from tests import reference
from tests.test_run import ROOT, tiny_flags

TASK_FLAGS = {name: flags_of(settings_of(name)) for name in TASKS}
SHARED_FLAGS = [each for settings in CONCERNS.values() for each in flags_of(settings)]
EVERY_FLAG = {each.name: each for each in [*SHARED_FLAGS, *(each for own in TASK_FLAGS.values() for each in own)]}
# Flag → a task that has it.
OWNER = {each.name: task for task in reversed(TASKS) for each in [*SHARED_FLAGS, *TASK_FLAGS[task]]}
NUMBERS = [each for each in EVERY_FLAG.values() if each.kind in (int, float) and each.count]


def numbers_of(task):
    """The flags of a task that take numbers."""
    return [each for each in NUMBERS if each in [*SHARED_FLAGS, *TASK_FLAGS[task]]]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """mini_coco with the index files of every task."""
    folder = tmp_path_factory.mktemp("coco") / "data"
    shutil.copytree(reference.MINI_COCO, folder)
    spm = str(folder / "mini.spm")
    VQAv2Dataset.make_dataset_index(data_path=str(folder), tokenizer=spm, annotation_data_path=str(folder / "vqa"))
    CaptioningDataset.make_coco_captioning_dataset_index(data_path=str(folder), tokenizer=spm)
    for split in ("val", "test"):
        shutil.copy(folder / f"coco_captioning.{split}.jsonl", folder / f"nocaps.{split}.jsonl")
    for file in list(folder.glob("coco_captioning.*.json*")):
        if file.name != "coco_captioning.index.json":
            shutil.copy(file, folder / file.name.removeprefix("coco_"))
    return folder


def refused(argv):
    """The problems that a command line is refused with."""
    with pytest.raises(InputError) as caught:
        read_settings(argv)
    return caught.value.problems


def complete(coco, task, *more):
    """A command line without a mistake, and more flags."""
    return [*tiny_flags(coco, coco.parent / "out", task=task), *more]


# Bounds and types


def outside(each):
    """Values just outside of each bound of a number, as text."""
    facts, step = each.facts, 1 if each.kind is int else 1e-3
    if facts.choices is not None:
        return [str(each.kind(max(facts.choices) + 1))]
    low = facts.above if facts.at_least is None else facts.at_least - step
    high = facts.below if facts.at_most is None else facts.at_most + step * max(1, abs(facts.at_most))
    return [f"{each.kind(low):.9f}".rstrip("0").rstrip(".") if each.kind is float else str(low), str(each.kind(high))]


def inside(each):
    """The bounds themselves, where they belong to the values, as text."""
    facts = each.facts
    values = facts.choices if facts.choices is not None else (facts.at_least, facts.at_most)
    return [str(each.kind(value)) for value in values if value is not None]


def test_every_number_has_a_lower_and_an_upper_bound():
    for each in NUMBERS:
        facts = each.facts
        if facts.choices is None:
            assert (facts.at_least is None) != (facts.above is None), each.name
            assert (facts.at_most is None) != (facts.below is None), each.name
        defaults = each.default if isinstance(each.default, tuple) else [each.default]
        for value in defaults:
            assert value is None or each.read([str(value)] * each.count) is not None, each.name


@pytest.mark.parametrize("task", TASKS)
def test_a_number_outside_of_a_bound_is_refused_by_name_and_all_of_them_at_once(coco, task):
    numbers = numbers_of(task)
    for side in (0, -1):
        given = {each.name: outside(each)[side] for each in numbers}
        argv = [part for each in numbers for part in (f"--{each.name}", *[given[each.name]] * each.count)]
        told = refused(complete(coco, task, *argv))
        assert len(told) == len(numbers)
        for each in numbers:
            shown = " ".join([given[each.name]] * each.count)
            wanted = "one of " if each.facts.choices else f"{each.bounds} is needed"
            assert [problem for problem in told if problem.startswith(f"--{each.name} {shown}: {wanted}")], each.name


@pytest.mark.parametrize("each", NUMBERS, ids=lambda each: each.name)
def test_the_bounds_themselves_are_taken_where_they_belong_to_the_values(each):
    for text in inside(each):
        assert each.read([text] * each.count) is not None


@pytest.mark.parametrize("task", ["coco_captioning", "vqa"])
@pytest.mark.parametrize("bad", ["nan", "inf", "1e999", "some", "", "0x10", "9" * 400, "1,5"])
def test_what_is_no_number_is_refused_for_every_number(coco, bad, task):
    numbers = numbers_of(task)
    argv = [part for each in numbers for part in (f"--{each.name}", *[bad] * each.count)]
    told = refused(complete(coco, task, *argv))
    for each in numbers:
        assert any(problem.startswith(f"--{each.name} {bad or repr(bad)}") for problem in told), each.name
    assert len(told) == len(numbers)


def test_a_wrong_number_of_values_is_one_mistake_among_others(coco):
    with_values = [each for each in [*SHARED_FLAGS, *TASK_FLAGS["coco_captioning"]] if each.count]
    for wrong in (0, 1):  # none at all, and one too many
        argv = []
        for each in with_values:
            argv += [f"--{each.name}", *["1"] * (each.count + 1) * wrong]
        told = refused(complete(coco, "coco_captioning", *argv))
        for each in with_values:
            wanted = "one value is wanted" if each.count == 1 else f"{each.count} values are wanted"
            values = " 1" * (each.count + 1) * wrong
            assert f"--{each.name}{values}: {wanted}" in told
    assert refused(complete(coco, "vqav2", "--randaug=yes", "--lr", "-1")) == [
        "--randaug takes no value, found 'yes'; leave --randaug away where it is not wanted",
        "--lr -1: at least 0 and at most 1,000 is needed",
    ]


def test_a_value_that_is_none_of_the_choices_is_refused_naming_them(coco):
    for each in EVERY_FLAG.values():
        if each.facts.choices is not None and each.kind is str:
            (told,) = refused(complete(coco, OWNER[each.name], f"--{each.name}", "neither"))
            assert told == f"--{each.name} neither: one of {', '.join(each.facts.choices)} is wanted"


def test_an_empty_path_is_refused_and_is_not_the_current_folder(coco):
    for each in EVERY_FLAG.values():
        if each.kind is Path:
            told = refused(complete(coco, OWNER[each.name], f"--{each.name}", ""))
            assert told == [f"--{each.name} '': a path is wanted; is a variable of the shell empty?"]


# Spellings


# The flags of the BEiT-3 repository with their defaults; None: a switch that is off.
RELEASED = {
    "model": "beit_base_patch16_224", "input_size": 224, "drop_path": 0.1, "checkpoint_activations": None,
    "vocab_size": 64010, "num_max_bpe_tokens": 64, "model_ema": None, "model_ema_decay": 0.9999,
    "model_ema_force_cpu": None, "opt": "adamw", "opt_eps": 1e-8, "opt_betas": (0.9, 0.999), "momentum": 0.9,
    "weight_decay": 0.05, "lr": 5e-4, "layer_decay": 0.9, "task_head_lr_weight": 0, "min_lr": 1e-6,
    "warmup_epochs": 5, "warmup_steps": -1, "batch_size": 64, "epochs": 20, "update_freq": 1, "save_ckpt_freq": 5,
    "randaug": None, "train_interpolation": "bicubic", "finetune": "", "model_key": "model|module",
    "model_prefix": "", "output_dir": "output", "seed": 0, "resume": "", "start_epoch": 0, "eval": None,
    "num_workers": 10,
    "dist_on_itp": None, "dist_url": "env://", "enable_deepspeed": None, "initial_scale_power": 16,
}  # fmt: skip
RELEASED_CAPTIONING = {
    "captioning_mask_prob": 0.6, "drop_worst_ratio": 0.2, "drop_worst_after": 12000, "num_beams": 3,
    "length_penalty": 0.6, "label_smoothing": 0.1,
}  # fmt: skip
# Without one value for all, or with a reason of their own to differ: where the data lies, what clipping is off by.
RELEASED_WITHOUT_DEFAULT = {
    "sentencepiece_model": "s", "clip_grad": "1", "eval_batch_size": "1", "data_path": "d", "log_dir": "l",
    "device": "cpu", "zero_stage": "0",
}  # fmt: skip
RELEASED_SWITCHES = ["auto_resume", "no_auto_resume", "save_ckpt", "no_save_ckpt", "pin_mem", "no_pin_mem", "deepspeed"]
RELEASED_WITHOUT_EFFECT = {
    "warmup_lr": "1e-6", "task_cache_path": "t", "dist_eval": None, "world_size": "1", "local_rank": "-1",
    "local-rank": "0", "deepspeed_config": "c", "deepscale": None, "deepscale_config": "c",
}  # fmt: skip
RELEASED_IMAGENET = """nb_classes mixup cutmix cutmix_minmax mixup_prob mixup_switch_prob mixup_mode color_jitter aa
    smoothing crop_pct reprob remode recount resplit""".split()


@pytest.mark.parametrize("task", TASKS)
def test_every_flag_of_the_released_code_is_taken_and_has_the_released_default(task):
    released = RELEASED if task in ("vqav2", "vqa") else {**RELEASED, **RELEASED_CAPTIONING}
    flags = {each.name: each for each in [*SHARED_FLAGS, *TASK_FLAGS[task]]}
    for name, default in released.items():
        assert flags[name].default == (False if default is None else default), name
        if default is None:
            assert flags[name].count == 0
        else:
            texts = [str(value) for value in (default if isinstance(default, tuple) else [default])]
            assert flags[name].read(texts) == default
    for name, text in RELEASED_WITHOUT_DEFAULT.items():
        flags[name].read(text)
    assert flags["opt_betas"].read(["0.9", "0.98"]) == (0.9, 0.98)


@pytest.mark.parametrize("task", TASKS)
def test_a_command_line_with_every_released_flag_says_one_line_on_those_without_effect(coco, task, caplog, capsys):
    argv = complete(coco, task)
    argv += [f"--{name}" for name in RELEASED_SWITCHES if name not in ("no_auto_resume", "deepspeed")]
    for name, value in RELEASED_WITHOUT_EFFECT.items():
        argv += [f"--{name}"] if value is None else [f"--{name}", value]
    settings = read_settings(argv)
    named = [line.split(":")[0] for line in settings.ignored]
    assert sorted(named) == sorted(f"--{name}" for name in RELEASED_WITHOUT_EFFECT)
    assert all(len(line.split(": ", 1)[1]) > 10 for line in settings.ignored)
    assert read_settings(complete(coco, task, "--deepspeed")).deepspeed.enable_deepspeed
    assert not read_settings(complete(coco, task, "--no_auto_resume")).run.auto_resume
    assert not settings.data.pin_mem and not settings.run.save_ckpt  # given last


def test_flags_without_effect_are_told_in_one_line_of_a_run(coco, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("utils.set_up_logging", lambda is_main: None)
    argv = tiny_flags(coco, tmp_path, epochs=1, warmup_lr=1e-6, dist_eval=True, save_ckpt_freq=5)
    assert run.main([*argv, "--batch_size", "1000"]) == 2  # ends before the training
    (told,) = [text for text in caplog.messages if text.startswith("flags without effect")]
    assert "--warmup_lr" in told and "--dist_eval" in told and "\n" not in told


def test_flags_of_imagenet_are_refused_by_name(coco):
    assert set(RELEASED_IMAGENET) == set(PLANNED["imagenet"])
    argv = [part for name in RELEASED_IMAGENET for part in ([f"--{name}"] if name == "resplit" else [f"--{name}", "1"])]
    told = refused(complete(coco, "vqav2", *argv))
    assert told == [f"--{name}: a flag of --task imagenet, which is not there yet" for name in RELEASED_IMAGENET]


@pytest.mark.parametrize("task", TASKS)
def test_flags_of_a_task_that_is_not_chosen_are_refused_by_name(coco, task):
    own = {each.name for each in TASK_FLAGS[task]}
    others = [each for name in TASKS for each in TASK_FLAGS[name] if each.name not in own]
    if not others:
        pytest.skip("has the flags of every task")
    argv = [part for each in others for part in [f"--{each.name}", *[str(each.default)] * each.count]]
    told = refused(complete(coco, task, *argv))
    for each in others:
        (problem,) = {problem for problem in told if problem.startswith(f"--{each.name}: a flag of --task ")}
        assert f"--task {task} does not have it" in problem


def test_four_mistakes_are_one_message_with_four_problems(coco, capsys):
    mistakes = ["--layer_decay", "7", "--weight_decay", "-3", "--num_workers", "-1", "--mixup", "0.8"]
    assert run.main(complete(coco, "vqav2", *mistakes)) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: 4 problems:\n")
    for part in ("--layer_decay 7: ", "--weight_decay -3: ", "--num_workers -1: ", "--mixup: "):
        assert f"\n  - {part}" in told
    assert "usage" not in told


def test_a_clip_that_means_off_in_other_programs_is_refused(coco):
    assert refused(complete(coco, "vqav2", "--clip_grad", "-1"))[0].startswith("--clip_grad -1: above 0")
    assert refused(complete(coco, "vqav2", "--clip_grad", "0"))[0].startswith("--clip_grad 0: above 0")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--bach_size", "--batch_size"), ("--warmup_epoch", "--warmup_epochs"), ("--data-path", "--data_path"),
        ("--tsk", "--task"), ("--Epochs", "--epochs"), ("--help_al", "--help_all"), ("--finetun=w.pth", "--finetune"),
    ],
)  # fmt: skip
def test_a_mistyped_flag_gets_a_suggestion(coco, typed, meant):
    name = typed.split("=")[0]
    assert refused(complete(coco, "vqav2", typed)) == [f"{name}: no such flag; did you mean {meant}?"]


def test_an_unlike_flag_gets_the_way_to_the_list(coco):
    assert refused(complete(coco, "vqav2", "--xyzzy", "3")) == ["--xyzzy: no such flag; see --help_all"]


def test_every_mistyped_flag_is_understood(coco):
    for name in EVERY_FLAG:
        if len(name) > 4:
            (told,) = refused(complete(coco, "vqav2", f"--{name[:2]}{name[3:]}"))
            assert "did you mean --" in told


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--task is needed"),
        (["vqav2"], "'vqav2': what is this?"),
        (["--task"], "--task '': one of vqav2, "),
        (["--task", "vqa2"], "--task vqa2: one of vqav2, "),
        (["--task", "vqav2", "nocaps"], "--task vqav2 nocaps: one of vqav2, "),
        (["--task", "imagenet"], "--task imagenet is not there yet"),
        (["--eval"], "--eval needs a checkpoint"),
        (["--task", "vqav2", "--data_path", "a\x1b[2Jb\nc"], r"--data_path a\x1b[2Jb\nc: no such folder"),
        (["--task", "vqav2", "--data_path", "x" * 5000], "File name too long"),
    ],
)
def test_what_is_typed_first_is_answered_in_plain_words(argv, said, capsys):
    assert run.main(argv) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "\x1b" not in told and "Traceback" not in told and "usage" not in told


def test_a_flag_given_twice_counts_as_given_last(coco):
    settings = read_settings(complete(coco, "vqav2", "--lr", "0.5", "--task", "coco_captioning", "--lr=0.25"))
    assert (settings.task.name, settings.optimizer.lr) == ("coco_captioning", 0.25)


# Help


def named_in(text):
    return set(re.findall(r"--([a-z_]+)\b", text))


def test_the_short_help_is_short_and_has_three_examples(coco):
    text = help_text(whole=False)
    flags, examples = text.split("examples:")
    assert len(text.splitlines()) <= 60
    assert len(re.findall(r"^ {4}\S", examples, re.MULTILINE)) == 3
    assert "no such" not in text
    essential = {each.name for each in EVERY_FLAG.values() if each.facts.essential}
    listed = set(re.findall(r"^ {2}--([a-z_]+)", flags, re.MULTILINE))
    assert essential | {"task", "help", "help_all"} == listed


def test_the_whole_help_has_every_flag_of_every_task_with_default_and_nothing_without_effect():
    text = help_text(whole=True)
    listed = set(re.findall(r"^ {2}--([a-z_]+)", text, re.MULTILINE))
    off = {f"no_{each.name}" for each in EVERY_FLAG.values() if each.default is True}
    assert listed == EVERY_FLAG.keys() | off | {"task", "help", "help_all"}
    assert not listed & {name.replace("-", "_") for name in RELEASED_WITHOUT_EFFECT}
    flat = "".join(text.split())  # lines may be broken at hyphens too
    for each in EVERY_FLAG.values():
        assert "".join(each.help.split()) in flat, each.name
        if each.default is True:
            assert "".join(each.facts.no.split()) in flat


@pytest.mark.parametrize(
    ("argv", "status"),
    [(["--help"], 0), (["-h"], 0), (["--help_all"], 0), (["--task", "vqav2", "--clip_grad", "-1"], 2), ([], 2)],
)
def test_help_and_mistakes_are_answered_without_pytorch(argv, status):
    program = (
        "import sys, run_beit3_finetuning as run\n"
        "try:\n    status = run.main(sys.argv[1:])\n"
        "except SystemExit as end:\n    status = end.code\n"
        "heavy = {'torch', 'timm', 'transformers', 'deepspeed', 'torchvision', 'PIL'} & set(sys.modules)\n"
        "print('loaded:', sorted(heavy))\n"
        "sys.exit(status)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == status, ended.stderr
    assert ended.stdout.rstrip().endswith("loaded: []")
    assert ("examples:" in ended.stdout) == (status == 0)
    assert ended.stderr.startswith("error: " if status else "")
