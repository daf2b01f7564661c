"""The recipes: their values are the published ones, and the scripts start what they say, in a copy of the project whose
Python only tells what it was asked to do."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from runs.command_line import read_settings
from tests import reference
from tests.test_scripts import project  # noqa: F401  a fixture

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "runs" / "recipes"

# What BEiT-3 was published with: task, size → pairs per step, learning rate, drop path, weight decay.
PUBLISHED = {
    ("vqav2", "base"): (128, 3e-5, 0.1, 0.01),
    ("vqav2", "large"): (128, 2e-5, 0.15, 0.01),
    ("coco_captioning", "base"): (256, 4e-5, 0.1, 0.05),
    ("coco_captioning", "large"): (256, 8e-6, 0.1, 0.05),
    ("nocaps", "base"): (256, 1e-5, 0.1, 0.05),
    ("nocaps", "large"): (256, 8e-6, 0.1, 0.05),
}


# Own data: task, size → the task whose published values it takes; None: from fresh weights.
OWN = {
    ("vqa", "base"): "vqav2",
    ("vqa", "large"): "vqav2",
    ("vqa", "tiny"): None,
    ("captioning", "base"): "coco_captioning",
    ("captioning", "large"): "coco_captioning",
    ("captioning", "tiny"): None,
}


def lines(name):
    return (RECIPES / f"{name}.flags").read_text().splitlines()


def flags(name):
    return [word for line in lines(name) if not line.startswith("#") for word in line.split()]


@pytest.fixture
def no_files(monkeypatch):
    """Nothing that a recipe names needs to be there."""
    monkeypatch.setattr("runs.command_line._problems", lambda settings: [])


@pytest.mark.parametrize(("task", "size"), PUBLISHED)
def test_a_recipe_has_the_published_values(task, size, no_files):
    pairs, lr, drop_path, weight_decay = PUBLISHED[task, size]
    assert f"# pairs per step: {pairs}" in lines(f"{task}.{size}")
    spm = ["--sentencepiece_model", str(reference.MINI_COCO / "mini.spm")]
    model = ["--model", f"beit3_{size}_patch16_480"]
    settings = read_settings(["--task", task, *flags(f"{task}.{size}"), *model, *spm])
    optimizer = settings.optimizer
    assert (optimizer.lr, settings.model.drop_path, optimizer.weight_decay) == (lr, drop_path, weight_decay)
    assert (optimizer.epochs, optimizer.warmup_epochs, optimizer.layer_decay) == (10, 1, 1.0)
    assert settings.data.randaug and settings.data.seed == 42
    if task == "vqav2":
        assert (optimizer.task_head_lr_weight, optimizer.opt_betas) == (20, (0.9, 0.98))
    else:
        assert (settings.data.num_max_bpe_tokens, settings.task.captioning_mask_prob) == (32, 0.7)
        assert settings.task.drop_worst_after == 12000 and settings.model.checkpoint_activations


@pytest.mark.parametrize(("task", "size"), [key for key, published in OWN.items() if published])
def test_own_data_is_learned_with_the_published_values_but_for_how_long(task, size):
    own, published = flags(f"{task}.{size}"), flags(f"{OWN[task, size]}.{size}")
    for name in ("--lr", "--drop_path", "--weight_decay", "--layer_decay", "--seed"):
        assert own[own.index(name) + 1] == published[published.index(name) + 1]
    assert not {"--epochs", "--batch_size", "--warmup_epochs"} & set(own)  # planned by the number of rows


def test_every_recipe_is_tested():
    names = {file.name.removesuffix(".flags") for file in RECIPES.glob("*.flags")}
    demo = {"demo.vqav2", "demo.coco_captioning"}
    assert names == {f"{task}.{size}" for task, size in PUBLISHED} | demo | {f"{task}.{size}" for task, size in OWN}


@pytest.fixture
def told(project, tmp_path):
    """What the scripts start, word by word: a Python that has every module and writes down its arguments."""
    python = tmp_path / "python"
    log = tmp_path / "started.txt"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'case "$1" in -|-c) exec {shlex.quote(sys.executable)} "$@" ;; esac\n'
        f'printf "%s\\n" "$PWD" "$@" ==== >> {shlex.quote(str(log))}\n'
    )
    python.chmod(0o755)

    def run(*command, folder=project, **variables):
        log.write_text("")
        names = ("DATA_PATH", "SPM", "FINETUNE", "TASK", "MODEL", "OUTPUT_DIR", "GPUS", "IMAGE_PATH")
        environment = {name: value for name, value in os.environ.items() if name not in names}
        environment.update(PYTHON=str(python), **variables)
        result = subprocess.run(
            ["bash", *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        started = [part.strip().split("\n") for part in log.read_text().split("====\n") if part.strip()]
        return result, started

    return run


def value(command, flag):
    """The last value given to a flag: it is the one that counts."""
    return command[len(command) - 1 - command[::-1].index(flag) + 1]


@pytest.mark.parametrize(
    ("gpus", "extra", "freq"), [("1", [], "8"), ("8", [], "1"), ("2", ["--batch_size", "32"], "2")]
)
def test_a_step_takes_the_published_pairs_on_any_number_of_gpus(told, gpus, extra, freq):
    result, [index, training] = told("bash.sh", *extra, DATA_PATH="/d", SPM="s", GPUS=gpus)
    assert "128 pairs per step, as published" in result.stdout
    assert value(training, "--update_freq") == freq
    assert ("runs.launch" in training) == (gpus != "1")
    assert index[1:] == ["-m", "tasks.make_index", "vqav2", "/d", "s", *extra]
    assert result.stdout.endswith("next:       DATA_PATH=/d FINETUNE=output/checkpoint-best bash prediction.sh\n")


def test_who_names_update_freq_or_a_batch_that_does_not_fit_is_told_or_left_alone(told):
    result, [_, training] = told("bash.sh", "--update_freq", "3", DATA_PATH="/d", GPUS="1")
    assert "pairs per step" not in result.stdout and value(training, "--update_freq") == "3"
    result, [_, training] = told("bash.sh", DATA_PATH="/d", GPUS="3")
    assert "144 pairs per step, not the published 128" in result.stdout
    assert value(training, "--update_freq") == "3"


def test_task_and_model_choose_recipe_weights_and_the_next_command(told):
    result, [index, training] = told(
        "bash.sh", DATA_PATH="/d", IMAGE_PATH="/p", GPUS="8", TASK="nocaps", MODEL="beit3_large_patch16_480"
    )
    assert (value(training, "--lr"), value(training, "--model")) == ("8e-6", "beit3_large_patch16_480")
    assert value(training, "--finetune") == "beit3_large_patch16_224.pth"
    assert value(training, "--image_path") == "/p" and index[-1] == "/p"
    assert "TASK=nocaps DATA_PATH=/d FINETUNE=output/checkpoint-best bash prediction.sh" in result.stdout
    result, [_, training] = told("bash.sh", DATA_PATH="/d", GPUS="8", MODEL="beit3_tiny_patch16_64", FINETUNE="")
    assert "no recipe for the tiny model: taking that of base" in result.stdout
    assert value(training, "--finetune") == ""


def test_paths_are_those_of_the_caller_wherever_that_is(told, project, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    _, [_, training] = told(
        str(project / "bash.sh"), folder=tmp_path / "elsewhere", DATA_PATH="mine", SPM="my.spm", GPUS="1"
    )
    assert training[0] == str(tmp_path / "elsewhere")
    assert training[1] == str(project / "run_beit3_finetuning.py")
    assert value(training, "--data_path") == "mine" and value(training, "--output_dir") == "output"


def test_prediction_names_no_task_model_or_tokenizer_for_a_checkpoint_that_says_them(told):
    _, [prediction] = told("prediction.sh", DATA_PATH="/d", FINETUNE="output/checkpoint-best", GPUS="1")
    assert not {"--task", "--model", "--input_size", "--sentencepiece_model"} & set(prediction)
    assert value(prediction, "--finetune") == "output/checkpoint-best" and "--eval" in prediction
    _, [prediction] = told("prediction.sh", DATA_PATH="/d", FINETUNE="/w/beit3_base_patch16_480_vqa.pth", GPUS="1")
    assert value(prediction, "--sentencepiece_model") == "beit3.spm"


def test_prediction_takes_what_lies_in_the_folder_before_the_demo(told, project):
    (project / "dataset").mkdir()
    (project / "beit3_base_patch16_480_vqa.pth").touch()
    try:
        _, [prediction] = told("prediction.sh", GPUS="1")
    finally:
        (project / "dataset").rmdir()
        (project / "beit3_base_patch16_480_vqa.pth").unlink()
    assert value(prediction, "--data_path") == "dataset"
    assert value(prediction, "--finetune") == "beit3_base_patch16_480_vqa.pth"


def test_a_table_of_another_name_is_named_and_not_taken_for_vqav2(told, tmp_path):
    (tmp_path / "My Questions.CSV").touch()
    result, started = told("bash.sh", DATA_PATH=str(tmp_path), SPM="s", GPUS="1")
    assert result.returncode == 2 and started == []
    assert (
        f"holds My Questions.CSV and no metadata.csv or train.csv; if that is your table: TRAIN={tmp_path}"
        in result.stderr
    )


def test_the_next_command_can_be_copied_where_a_path_has_a_space(told):
    result, _ = told("bash.sh", DATA_PATH="/d", OUTPUT_DIR="my runs", SPM="s", GPUS="1")
    assert result.stdout.endswith("FINETUNE=my\\ runs/checkpoint-best bash prediction.sh\n")
