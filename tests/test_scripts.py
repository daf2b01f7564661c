"""The commands of the README, as a new user types them, in a copy of the project without data or models."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The tracked and new files alone, as in a clone."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def bash(project, *command, timeout=500, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in ("DATA_PATH", "SPM", "FINETUNE")}
    environment.update(PYTHON=sys.executable, **variables)
    return subprocess.run(
        ["bash", *command], cwd=project, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def test_prediction_without_a_model_says_what_to_run_first(project):
    result = bash(project, "prediction.sh")
    assert result.returncode == 2
    assert "run 'TASK=vqav2 bash bash.sh' first" in result.stderr


def test_a_task_that_is_not_there_is_named(project):
    result = bash(project, "bash.sh", TASK="nlvr2")
    assert result.returncode == 2
    assert "TASK=nlvr2 is not there yet" in result.stderr


def test_missing_files_of_the_published_recipe_are_all_named(project, tmp_path):
    result = bash(project, "bash.sh", DATA_PATH=str(tmp_path), SPM=str(tmp_path / "beit3.spm"))
    assert result.returncode == 2
    assert "beit3.spm: no such tokenizer file" in result.stderr


def questions_of_the_test_split(data):
    """The ids that the official question file asks about."""
    asked = json.loads((data / "vqa" / "v2_OpenEnded_mscoco_test2015_questions.json").read_text())
    return [question["question_id"] for question in asked["questions"]]


def pictures_of_the_test_split(data):
    """The ids of the Karpathy test split."""
    images = json.loads((data / "dataset_coco.json").read_text())["images"]
    return [image["cocoid"] for image in images if image["split"] == "test"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "id_key", "ids"),
    [
        ("vqav2", "question_id", questions_of_the_test_split),
        ("coco_captioning", "image_id", pictures_of_the_test_split),
    ],
)
def test_the_two_commands_of_the_demo_end_with_a_submission(project, task, id_key, ids):
    quick = ["--epochs", "1", "--batch_size", "512", "--warmup_epochs", "0.1"]
    result = bash(project, "bash.sh", *quick, TASK=task)
    assert result.returncode == 0, result.stderr
    assert f"checkpoint: output/demo_{task}/checkpoint-best" in result.stdout
    assert f"next:       TASK={task} bash prediction.sh" in result.stdout
    again = bash(project, "bash.sh", *quick, TASK=task)
    assert again.returncode == 0, again.stderr
    assert "installing" not in again.stdout
    assert "epoch 0:" not in again.stderr  # nothing is learned twice
    result = bash(project, "prediction.sh", TASK=task)
    assert result.returncode == 0, result.stderr
    written = json.loads((project / "your_prediction" / f"submit_{task}_test.json").read_text())
    assert sorted(entry[id_key] for entry in written) == sorted(ids(project / "demo_data"))
    row = json.loads((project / "your_prediction" / "predictions.jsonl").read_text().splitlines()[0])
    asked = [f"demo_data/{row['image']}", *([row["question"]] if "question" in row else []), "--json"]
    result = bash(project, "prediction.sh", *asked, FINETUNE=f"output/demo_{task}/checkpoint-best")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    what = "answer" if "answer" in row else "caption"
    assert said[what] == row[what]
    without = bash(project, "prediction.sh", *asked)  # nothing named: the newest one
    assert without.stdout == result.stdout and f"checkpoint: output/demo_{task}/checkpoint-best" in without.stderr


@pytest.mark.slow
def test_own_data_is_looked_at_learned_and_asked_from_its_table(project, tmp_path):
    album = tmp_path / "an album"
    bash_python = [sys.executable, "-m", "demo.make", "--table", str(album)]
    subprocess.run(bash_python, cwd=project, check=True, timeout=100)
    own = {
        "SPM": str(album / "demo.spm"),
        "FINETUNE": "",
        "MODEL": "beit3_tiny_patch16_64",
        "OUTPUT_DIR": str(tmp_path / "o"),
    }
    result = bash(project, "bash.sh", "--check", TRAIN=str(album / "vqa.csv"), **own)
    assert result.returncode == 0, result.stderr
    assert "300 files; all of them can be read" in result.stderr and "s per step of 32 pairs" in result.stderr
    assert not (tmp_path / "o").exists()
    result = bash(project, "bash.sh", "--epochs", "2", TRAIN=str(album / "vqa.csv"), **own)
    assert result.returncode == 0, result.stderr
    assert "810 training and 90 validation examples" in result.stderr
    assert "to all of them scores 11.11" in result.stderr
    picture = next(album.rglob("*.jpg"))
    result = bash(
        project, "prediction.sh", str(picture), "Is it day?", FINETUNE=str(tmp_path / "o" / "checkpoint-best")
    )
    assert result.returncode == 0 and result.stdout.count(" · ") == 2, result.stderr
    (album / "metadata.csv").write_text("image,caption\n" + f'"{picture.relative_to(album)}",A house.\n' * 3)
    broken = bash(project, "bash.sh", TRAIN=str(album / "metadata.csv"), DATA_PATH=str(tmp_path / "new"), **own)
    assert broken.returncode == 2 and "all its rows show one picture" in broken.stderr
    assert not (tmp_path / "new").exists()


def test_prediction_asks_where_a_picture_is_named_and_says_what_is_missing(project, tmp_path):
    result = bash(project, "prediction.sh", "photo.jpg", "what is it?", FINETUNE=str(tmp_path / "none"))
    assert result.returncode == 2
    assert (
        result.stderr
        == f"error: {tmp_path / 'none'}: no such checkpoint; set FINETUNE to a checkpoint folder or file\n"
    )


def test_a_training_has_minutes_to_write_its_checkpoint_after_a_signal(project):
    ask = "from torch.distributed.launcher.api import LaunchConfig as C; print(C(1, 1, 1).shutdown_timeout)"
    script = project / "ask.sh"
    script.write_text(f"source scripts/environment.sh\n$PYTHON -c '{ask}'\n")
    assert int(bash(project, "ask.sh").stdout) == 300


def start_and_stop(project, out, sign, signum):
    """`bash bash.sh` until it says `sign`, then SIGTERM, or Ctrl-C as a terminal sends it; status and what it said."""
    command = ["bash", "bash.sh", "--epochs", "1", "--warmup_epochs", "0.1", "--batch_size", "256"]
    environment = {**os.environ, "PYTHON": sys.executable, "OUTPUT_DIR": str(out)}
    with (project / "said.txt").open("w+") as said:
        training = subprocess.Popen(
            command, cwd=project, env=environment, stdout=said, stderr=said, start_new_session=True
        )
        deadline = time.monotonic() + 200
        while sign not in (text := (project / "said.txt").read_text()):
            assert training.poll() is None and time.monotonic() < deadline, text
            time.sleep(0.1)
        if signum == signal.SIGINT:
            os.killpg(training.pid, signum)  # all processes of the terminal
        else:
            training.send_signal(signum)
        status = training.wait(timeout=100)
    return status, (project / "said.txt").read_text()


@pytest.mark.slow
def test_a_training_that_is_told_to_stop_goes_on_with_the_same_command(project):
    out = project / "stopped"
    status, said = start_and_stop(project, out, "steps of 256 pairs", signal.SIGTERM)
    assert status == 143, said
    assert list(out.glob("checkpoint-0-*")), said
    status, said = start_and_stop(project, out, "going on with epoch 0, step", signal.SIGINT)
    assert status == 130 and "goes on from here" in said, said
