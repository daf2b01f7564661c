"""Accidents around a run, provoked in the entry point itself: a damaged log, a second run, a lost launcher or terminal,
a prediction whose end could be foreseen. The tiny model on the made-up COCO."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs.output_folder import LOCK_FILE
from tests import chaos
from tests.test_output_folder import ROOT
from tests.workers import Run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return chaos.make_data(tmp_path_factory.mktemp("accidents") / "data")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """What a run of one epoch leaves."""
    out = tmp_path_factory.mktemp("finished") / "out"
    ended = Run(training(data, out)).wait()
    assert ended.statuses == [0], ended.output
    return out


def training(data, out, **changes):
    return chaos.command(data, out, False, **{"epochs": 1, "save_ckpt_steps": 0, "num_workers": 0, **changes})


def predicting(data, out, checkpoint, split="test"):
    flags = {"finetune": checkpoint, "data_path": data, "output_dir": out, "split": split, "device": "cpu"}
    return ["--eval", "--num_workers", "0", *(str(p) for name, value in flags.items() for p in (f"--{name}", value))]


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_damaged_log_and_a_broken_log_dir_cost_nothing(data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "log.txt").mkdir()
    (tmp_path / "file").write_text("")
    ended = Run(training(data, out, log_dir=tmp_path / "file")).wait()
    assert ended.statuses == [0], ended.output
    assert "log.txt: is a folder, a file is wanted; renamed to log.txt.damaged" in ended.output
    assert f"--log_dir {tmp_path}/file: no TensorBoard files" in ended.output
    assert [json.loads(line)["epoch"] for line in (out / "log.txt").read_text().splitlines()] == [0]
    assert "checkpoint-0.pth" in names(out)


def test_a_finished_run_says_so(data, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    ended = Run(training(data, tmp_path / "out")).wait()
    assert ended.statuses == [0]
    assert "checkpoint-0.pth: already finished after epoch 0" in ended.output
    assert "going on with" not in ended.output


def test_without_an_output_folder_the_first_and_the_last_line_say_what_that_means(data, tmp_path):
    ended = Run(training(data, ""), 1, os_chdir, (str(tmp_path),)).wait()
    assert ended.statuses == [0], ended.output
    lines = ended.output.strip().splitlines()
    assert "no checkpoint and no log of this training will be kept" in lines[0]
    assert "nothing of this training was kept" in lines[-1]
    assert list(tmp_path.iterdir()) == []


def os_chdir(rank, folder):
    os.chdir(folder)


def wait_with_many_steps(rank):
    import engine_for_finetuning

    step = engine_for_finetuning._optimizer_step

    def slow(*arguments):
        time.sleep(0.2)
        print("a step", file=sys.stderr, flush=True)
        return step(*arguments)

    engine_for_finetuning._optimizer_step = slow


def test_two_runs_in_one_folder_a_prediction_beside_them_and_a_closed_terminal(data, finished, tmp_path):
    out = tmp_path / "out"
    first = Run(training(data, out, epochs=500), 1, wait_with_many_steps)
    first.wait_for("a step")
    holder = json.loads((out / LOCK_FILE).read_text())
    assert holder["pid"] == first.processes[0].pid

    second = Run(training(data, out, epochs=500), 2).wait()
    assert second.statuses == [2, 2], second.output
    assert f"process {holder['pid']} on {holder['host']}, started {holder['started']}" in second.outputs[0]
    assert "writes there already" not in second.outputs[1]  # told once

    beside = Run(predicting(data, out, finished / "checkpoint-best")).wait()
    assert beside.statuses == [0], beside.output
    assert "submit_vqav2_test.json" in names(out)

    first.send(signal.SIGHUP)
    ended = first.wait()
    assert ended.statuses == [128 + signal.SIGHUP], ended.output
    assert "the same command goes on from here" in ended.output
    assert list(out.glob("checkpoint-*.pth")) and LOCK_FILE not in names(out)


def test_rows_that_make_no_submission_are_told_before_the_first_batch(data, finished, tmp_path):
    other = tmp_path / "data"
    shutil.copytree(data, other)
    lines = (other / "vqa.test.jsonl").read_text().splitlines()
    missing, twice = (json.loads(line)["qid"] for line in lines[:2])
    (other / "vqa.test.jsonl").write_text("\n".join([*lines[1:], lines[1]]) + "\n")
    ended = Run(predicting(other, tmp_path / "out", finished / "checkpoint-best")).wait()
    assert ended.statuses == [2]
    assert (
        f"question {missing} of {other}/vqa/v2_OpenEnded_mscoco_test2015_questions.json has no answer" in ended.output
    )
    assert f"question {twice} has 2 answers" in ended.output
    assert "tensors loaded" not in ended.output  # the model was not even read
    assert list((tmp_path / "out").iterdir()) == []


def test_annotations_that_cannot_score_are_told_before_the_first_batch(data, finished, tmp_path):
    other = tmp_path / "data"
    shutil.copytree(data, other)
    file = other / "vqa" / "v2_mscoco_val2014_annotations.json"
    content = json.loads(file.read_text())
    del content["annotations"][3]["answers"]
    file.write_text(json.dumps(content))
    ended = Run(predicting(other, tmp_path / "out", finished / "checkpoint-best", "val")).wait()
    assert ended.statuses == [2]
    assert f"{file}: annotations[3] has no list of answers" in ended.output
    assert "tensors loaded" not in ended.output


def lose_a_question(rank, file):
    """After the first batch the official file asks one question more."""
    import runs.log

    write = runs.log.write_results

    def changed(folder, task, columns, dataset, split, problems):
        from runs.assembly import problems_of_rows

        content = json.loads(Path(file).read_text())
        content["questions"].append({**content["questions"][0], "question_id": 999_999_001})
        Path(file).write_text(json.dumps(content))
        return write(folder, task, columns, dataset, split, problems_of_rows(task, dataset, split))

    runs.log.write_results = changed


def test_what_was_computed_is_written_beside_a_check_that_fails_at_the_end(data, finished, tmp_path):
    other, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data, other)
    file = other / "vqa" / "v2_OpenEnded_mscoco_test2015_questions.json"
    argv = predicting(other, out, finished / "checkpoint-best")
    ended = Run(argv, 1, lose_a_question, (str(file),)).wait()
    assert ended.statuses == [1], ended.output
    assert names(out) == {"submit_vqav2_test.incomplete.json", "predictions.incomplete.jsonl"}
    assert len(json.loads((out / "submit_vqav2_test.incomplete.json").read_text())) == 84
    assert f"question 999999001 of {file} has no answer" in ended.output
    assert "the submission was written under another name and not scored" in ended.output


def score_badly(rank):
    from tasks.vqav2.task import VQAv2

    def score(*arguments, **options):
        raise KeyError("a fault of ours")

    VQAv2.score = score


def test_a_fault_in_scoring_leaves_the_predictions(data, finished, tmp_path):
    ended = Run(predicting(data, tmp_path / "out", finished / "checkpoint-best"), 1, score_badly).wait()
    assert ended.statuses == [1]
    assert "the predictions are written, scoring them failed: KeyError" in ended.output
    assert len(json.loads((tmp_path / "out" / "submit_vqav2_test.json").read_text())) == 84


def test_test_dev_alone_is_said_to_be_refused_by_the_server(data, finished, tmp_path):
    ended = Run(predicting(data, tmp_path / "out", finished / "checkpoint-best", "test-dev")).wait()
    assert ended.statuses == [0]
    assert ended.output.strip().splitlines()[-1].endswith("For the server use --split test")


def no_device_here(rank):
    import utils

    if rank == 1:

        def resolve_device(*arguments):
            raise ValueError("process 1 of this machine has no GPU")

        utils.resolve_device = resolve_device


def test_a_refusal_on_another_process_than_the_first_is_told(data, tmp_path):
    ended = Run(training(data, tmp_path / "out"), 2, no_device_here).wait(grace=1)
    assert ended.statuses[1] == 2
    assert "process 1 of this machine has no GPU" in ended.outputs[1]


def launched(argv, **options):
    command = [sys.executable, "-m", "runs.launch", "--standalone", "--nproc_per_node", "2", "run_beit3_finetuning.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *argv], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_the_cause_is_the_last_line_under_the_launcher(data, tmp_path):
    (tmp_path / "file").write_text("")
    run = launched(training(data, tmp_path / "file"))
    said = run.communicate(timeout=180)[1]
    assert run.returncode == 1
    assert f"{tmp_path}/file is a file where a folder is needed" in said.strip().splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_killed_launcher_stops_its_processes_after_a_checkpoint_and_the_same_command_goes_on(data, tmp_path):
    out = tmp_path / "out"
    run = launched(training(data, out, epochs=500))
    for line in run.stderr:
        if "epoch 0:" in line:
            break
    run.kill()
    again = launched(training(data, out, epochs=500))
    for line in again.stderr:
        if "going on with epoch" in line:
            break
    else:
        pytest.fail("the second run ended")
    assert not list(out.glob("*.stale"))
    again.terminate()
    said = run.stderr.read()
    assert "is gone: finishing this step, then stopping" in said
    assert "the same command goes on from here" in said
    again.communicate(timeout=180)
    assert again.returncode == 128 + signal.SIGTERM
