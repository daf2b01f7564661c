"""Every promise of docs/FAULTS.md that needs a run: the fault is provoked in the entry point itself.

Two processes (one where the fault concerns one), the tiny model, two epochs of six steps, a checkpoint every other one.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import datasets
import engine_for_finetuning
from beit3.training.checkpoints import write_manifest
from tasks.vqav2.task import VQAv2
from tests import chaos
from tests.test_run import ROOT, log_of
from tests.test_weights import Canary
from tests.workers import Run, _free_port

pytestmark = pytest.mark.slow
BACKENDS = {"plain": False, "deepspeed": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return chaos.make_data(tmp_path_factory.mktemp("faults") / "data")


@pytest.fixture(scope="module", params=BACKENDS)
def undisturbed(request, data, tmp_path_factory):
    """(DeepSpeed or not, what a run of two processes without faults leaves)."""
    deepspeed = BACKENDS[request.param]
    return deepspeed, chaos.undisturbed(data, tmp_path_factory.mktemp(request.param), deepspeed)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The output folder of an undisturbed plain run of one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    ended = Run(chaos.command(data, out, deepspeed=False)).wait()
    assert ended.statuses == [0], ended.output
    return out


def same_end(out, whole):
    state = whole if isinstance(whole, dict) else chaos.last_state(whole)
    return chaos.first_difference(state, chaos.last_state(out))


# kill -9


def test_a_run_killed_at_random_moments_ends_as_the_undisturbed_one(undisturbed, data, tmp_path):
    """The short form of `python -m tests.chaos`: one kill at a step, one in a save, of each backend."""
    deepspeed, whole = undisturbed
    rng = random.Random(7)
    saves = [n for n, kind in enumerate([k for k in whole.events if k == "file"], start=1)]
    kills = [(("step", rng.randint(3, 9)), [1]), (("file", rng.choice(saves[: len(saves) // 2])), [0])]
    state, happened, in_saves = chaos.disturbed(data, tmp_path / "out", deepspeed, kills)
    assert (happened, in_saves) == (2, 1)
    assert chaos.first_difference(whole.state, state) is None


# signals


def signal_at(rank, victim, moment, number, signum, out):
    """In process `victim`: the signal comes at the number-th step, batch of validation, or file written."""
    if rank != victim:
        return
    counts = {"step": 0, "validation": 0, "file": 0}

    def happened(kind):
        counts[kind] += 1
        if kind == moment and counts[kind] == number:
            os.kill(os.getpid(), signum)

    def wrapped(function, kind):
        def inner(*arguments, **options):
            happened(kind)
            return function(*arguments, **options)

        return inner

    engine_for_finetuning._optimizer_step = wrapped(engine_for_finetuning._optimizer_step, "step")
    VQAv2.predict_step = wrapped(VQAv2.predict_step, "validation")

    def audit(event, arguments):
        if event == "open" and arguments[2] & os.O_CREAT and f"{out}/.checkpoint" in str(arguments[0]):
            happened("file")

    sys.addaudithook(audit)


def test_signals_end_a_run_after_a_checkpoint_and_it_goes_on_there(undisturbed, data, tmp_path):
    deepspeed, whole = undisturbed
    out = tmp_path / "out"
    argv = chaos.command(data, out, deepspeed, save_ckpt_steps=0)
    stops = [
        (1, "step", 2, signal.SIGTERM, 143, {"checkpoint-0-2", "checkpoint-0-3"}),
        (1, "validation", 2, signal.SIGINT, 130, {"checkpoint-0-6"}),
        (0, "file", 2, signal.SIGTERM, 143, {"checkpoint-0", "checkpoint-1-1", "checkpoint-1-2"}),
    ]
    for victim, moment, number, signum, status, names in stops:
        ended = Run(argv, 2, signal_at, (victim, moment, number, signum, str(out))).wait()
        assert ended.statuses == [status, status], ended.output
        assert "the same command goes on from here" in ended.output
        kept = {path.name.removesuffix(".pth") for path in out.glob("checkpoint-[0-9]*")}
        assert kept & names, (moment, kept)
    ended = Run(argv, 2).wait()
    assert ended.statuses == [0, 0], ended.output
    assert same_end(out, whole.state) is None


def test_a_signal_to_all_processes_spares_a_worker_that_is_starting(data, alone, tmp_path):
    """As torchrun sends it, here when the worker has just got PyTorch's handlers."""
    argv = chaos.command(data, tmp_path, False)
    ended = Run(argv, 1, signal_while_workers_start).wait()
    assert ended.statuses == [143], ended.output
    assert list(tmp_path.glob("checkpoint-0-1.pth")), ended.output
    ended = Run(argv).wait()
    assert ended.statuses == [0], ended.output
    assert same_end(tmp_path, alone) is None


def signal_while_workers_start(rank):
    trainer, set_threads = os.getpid(), torch.set_num_threads

    def set_num_threads(number):
        if os.getpid() != trainer:
            for process in (trainer, os.getpid()):
                os.kill(process, signal.SIGTERM)
        set_threads(number)

    torch.set_num_threads = set_num_threads


def test_prediction_is_left_by_a_signal_without_half_a_submission(data, alone, tmp_path):
    out = tmp_path / "out"
    argv = chaos.command(data, out, False, finetune=alone / "checkpoint-best.pth", eval_batch_size=4)
    ended = Run([*argv, "--eval"], 1, signal_at, (0, "validation", 2, signal.SIGINT, str(out))).wait()
    assert ended.statuses == [130]
    assert list(out.iterdir()) == []


def test_a_second_signal_ends_a_run_at_once(data, tmp_path):
    run = Run(chaos.command(data, tmp_path, False, epochs=200, save_ckpt_steps=1000), 1, slow_steps)
    run.wait_for("going slowly")
    run.send(signal.SIGTERM)
    time.sleep(3.5)
    run.send(signal.SIGTERM)
    assert run.wait().statuses == [143]
    assert not list(tmp_path.glob("checkpoint-*"))


def slow_steps(rank):
    step = engine_for_finetuning._optimizer_step

    def slow(*arguments):
        print("going slowly", file=sys.stderr, flush=True)
        for _ in range(400):
            time.sleep(0.05)
        return step(*arguments)

    engine_for_finetuning._optimizer_step = slow


# the disk


def small_files_only(rank):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_full_disk_ends_the_run_loudly_and_harms_nothing(data, tmp_path, kind):
    out = tmp_path / "out"
    argv = chaos.command(data, out, BACKENDS[kind], epochs=1)
    ended = Run([*argv, "--save_ckpt_steps", "5"], 1, signal_at, (0, "step", 2, signal.SIGTERM, str(out))).wait()
    assert ended.statuses == [143], ended.output
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert before
    ended = Run(argv, 1, small_files_only).wait()
    assert ended.statuses == [1], ended.output
    assert "could not be written" in ended.output
    assert "older checkpoints are as they were" in ended.output
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    ended = Run(argv).wait()
    assert ended.statuses == [0], ended.output


# pictures, workers, other processes


def spoil(picture):
    """Make a JPEG undecodable behind its header, which is all that screening reads; returns what it was."""
    content = picture.read_bytes()
    tables = content.index(b"\xff\xc4") + 5  # 16 counts of codes
    picture.write_bytes(content[:tables] + b"\xff" * 16 + content[tables + 16 :])
    return content


def spoil_picture(data, folder):
    shutil.copytree(data, folder)
    spoil(folder / "train2014" / "COCO_train2014_000000000003.jpg")
    (folder / "train2014" / "COCO_train2014_000000000005.jpg").unlink()
    return folder


def test_bad_pictures_are_passed_over_alike_for_any_number_of_workers(data, tmp_path):
    bad = spoil_picture(data, tmp_path / "data")
    for workers in (0, 2):
        out = tmp_path / str(workers)
        ended = Run([*chaos.command(bad, out, False, num_workers=workers), "--skip_bad_images"]).wait()
        assert ended.statuses == [0], ended.output
        assert "COCO_train2014_000000000003.jpg" in ended.output
        assert "another row takes its place" in ended.output
        assert all(entry["train_bad_images"] > 0 for entry in log_of(out))
    assert same_end(tmp_path / "0", tmp_path / "2") is None


def test_a_picture_that_breaks_in_a_prediction_costs_its_own_rows_only(data, alone, tmp_path):
    bad, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data, bad)
    picture = sorted((bad / "test2015").iterdir())[0]
    spoil(picture)
    argv = chaos.command(bad, out, False, finetune=alone / "checkpoint-best.pth")
    ended = Run([*argv, "--eval", "--skip_bad_images"]).wait()
    assert ended.statuses == [1], ended.output
    assert picture.name in ended.output and "vqa.test.jsonl:" in ended.output
    assert {path.name for path in out.iterdir()} == {
        "submit_vqav2_test.incomplete.json",
        "predictions.incomplete.jsonl",
    }
    file = out / "submit_vqav2_test.incomplete.json"
    rows = [json.loads(line) for line in (bad / "vqa.test.jsonl").read_text().splitlines()]
    readable = {row["qid"] for row in rows if not row["image_path"].endswith(picture.name)}
    assert {entry["question_id"] for entry in json.loads(file.read_text())} == readable
    assert 0 < len(readable) < len(rows)


def test_a_picture_that_breaks_in_validation_costs_no_epoch(data, alone, tmp_path):
    """The run ends with its name; when it is mended, the same command validates and goes on to the same end."""
    bad, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data, bad)
    picture = bad / json.loads((bad / "vqa.rest_val.jsonl").read_text().splitlines()[0])["image_path"]
    whole = spoil(picture)
    argv = chaos.command(bad, out, False)
    ended = Run(argv).wait()
    assert ended.statuses == [1], ended.output
    assert picture.name in ended.output and "the same command goes on from here" in ended.output
    assert not (out / "log.txt").exists()
    picture.write_bytes(whole)
    ended = Run(argv).wait()
    assert ended.statuses == [0], ended.output
    assert "going on with epoch 0, step 13" in ended.output  # all of them: validation is what was left
    assert same_end(out, alone) is None


def strike_worker(rank, how):
    """In a loader's worker, at its fifth picture of training."""
    trainer, load = os.getpid(), datasets.ImageTextDataset.load_image
    count = 0

    def load_image(self, *arguments):
        nonlocal count
        count += os.getpid() != trainer and len(self) > 200
        if count == 5:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        return load(self, *arguments)

    datasets.ImageTextDataset.load_image = load_image


@pytest.mark.parametrize("how", ["killed", "hung"])
def test_a_lost_worker_is_an_error_in_time_and_the_run_goes_on(data, alone, tmp_path, how):
    out = tmp_path / "out"
    ended = Run(chaos.command(data, out, False, timeout=8), 1, strike_worker, (how,)).wait()
    assert ended.statuses == [1], ended.output
    assert "a loader's worker died or hung" in ended.output
    assert "Traceback" not in ended.output
    ended = Run(chaos.command(data, out, False)).wait()
    assert ended.statuses == [0], ended.output
    assert same_end(out, alone) is None


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_process_that_hangs_stops_all_in_time(data, tmp_path, kind):
    argv = chaos.command(data, tmp_path, BACKENDS[kind], timeout=8)
    ended = Run(argv, 2, signal_at, (1, "step", 3, signal.SIGSTOP, str(tmp_path))).wait(grace=1)
    assert ended.statuses == [1, -signal.SIGKILL], ended.output
    assert "another process died or did not answer within --timeout" in ended.output


# numbers that are none


def broken_loss(rank, victim, first, last):
    learn = VQAv2.training_step

    def training_step(self, model, batch, step):
        outputs = learn(self, model, batch, step)
        if rank == victim and first <= step <= last:
            outputs["loss"] = outputs["loss"] * float("nan")
        return outputs

    VQAv2.training_step = training_step


def test_a_broken_step_is_skipped_counted_and_logged(data, tmp_path):
    ended = Run(chaos.command(data, tmp_path, False), 2, broken_loss, (1, 3, 4)).wait()
    assert ended.statuses == [0, 0], ended.output
    assert "step 3: the gradient is not finite; the step was skipped on all processes" in ended.outputs[0]
    first, second = log_of(tmp_path)
    assert first["train_skipped_steps"] == 2
    assert "train_skipped_steps" not in second
    assert 0 < first["train_loss"] < 10
    weights = torch.load(tmp_path / "checkpoint-1.pth", weights_only=True)["model"]
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_many_broken_steps_in_a_row_end_the_run_naming_the_rows(data, tmp_path):
    argv = [*chaos.command(data, tmp_path, False), "--max_skipped_steps", "3"]
    ended = Run(argv, 2, broken_loss, (1, 3, 100)).wait()
    assert ended.statuses == [1, 1], ended.output
    assert "3 steps in a row had a loss or gradient that is not finite, the last of them step 5" in ended.outputs[0]
    assert "process 1: " in ended.outputs[0]
    assert "vqa.train.jsonl:" in ended.outputs[0]
    weights = torch.load(tmp_path / "checkpoint-0-4.pth", weights_only=True)["model"]
    assert all(torch.isfinite(value).all() for value in weights.values())


# who goes on, and with what


def test_another_number_of_processes_goes_on_or_is_refused_with_both_numbers(data, tmp_path):
    for deepspeed in (False, True):
        out = tmp_path / str(deepspeed)
        ended = Run(chaos.command(data, out, deepspeed), 2, signal_at, (0, "step", 3, signal.SIGTERM, str(out))).wait()
        assert ended.statuses == [143, 143], ended.output
        # Twice the batch on one process: the same examples in each step.
        ended = Run(chaos.command(data, out, deepspeed, batch_size=32)).wait()
        if deepspeed:
            assert ended.statuses == [2]
            assert "made by 2 processes, now there are 1" in ended.output
        else:
            assert ended.statuses == [0], ended.output
            assert [entry["epoch"] for entry in log_of(out)] == [0, 1]


@pytest.mark.parametrize("flags", [("--lr", "2e-3"), ("--epochs", "3")])
def test_another_recipe_is_refused_unless_forced(data, alone, tmp_path, flags):
    out = tmp_path / "out"
    shutil.copytree(alone, out)
    argv = [*chaos.command(data, out, False), *flags]
    ended = Run(argv).wait()
    assert ended.statuses == [2]
    assert f"belongs to another run: {flags[0]} was" in ended.output
    assert log_of(out) == log_of(alone)
    assert Run([*argv, "--force_resume"]).wait().statuses == [0]


def test_other_data_is_refused(data, alone, tmp_path):
    out, other = tmp_path / "out", tmp_path / "data"
    shutil.copytree(alone, out)
    shutil.copytree(data, other)
    lines = (other / "vqa.train.jsonl").read_text().splitlines(keepends=True)
    (other / "vqa.train.jsonl").write_text("".join(lines[::-1]))
    ended = Run(chaos.command(other, out, False)).wait()
    assert ended.statuses == [2]
    assert "training data was" in ended.output


@pytest.mark.parametrize("explicit", [True, False])
def test_code_in_a_checkpoint_never_runs(data, tmp_path, explicit):
    """Its maker knows the format: sums and manifest are right."""
    ran = tmp_path / "ran"
    for deepspeed in (False, True):
        out = tmp_path / str(deepspeed)
        argv = chaos.command(data, out, deepspeed, epochs=1)
        ended = Run(argv, 1, signal_at, (0, "step", 1, signal.SIGTERM, str(out))).wait()
        assert ended.statuses == [143], ended.output
        path = next(out.glob("checkpoint-0-*"))
        if deepspeed:
            fingerprint = json.loads((path / "manifest.json").read_text())["fingerprint"]
            for file in (path / "state").iterdir():
                torch.save(Canary(ran), file)
            (path / "manifest.json").unlink()
            write_manifest(path, fingerprint)
        else:
            content = torch.load(path, weights_only=True)
            torch.save({**content, "optimizer": Canary(ran)}, path)
        ended = Run([*argv, "--resume", str(path)] if explicit else argv).wait()
        assert ended.statuses == [2], ended.output
        assert "refused, it holds more than tensors and plain values" in ended.output
    assert not ran.exists()


# several processes and machines


@pytest.mark.parametrize("rows", [1, 5])
def test_each_example_is_evaluated_once_also_by_more_processes_than_examples(data, alone, tmp_path, rows):
    few = tmp_path / "data"
    shutil.copytree(data, few)
    lines = (few / "vqa.rest_val.jsonl").read_text().splitlines(keepends=True)[:rows]
    (few / "vqa.rest_val.jsonl").write_text("".join(lines))
    results = []
    for processes in (1, 3):
        out = tmp_path / str(processes)
        argv = chaos.command(few, out, False, finetune=alone / "checkpoint-best.pth", split="val", eval_batch_size=2)
        ended = Run([*argv, "--eval"], processes).wait()
        assert ended.statuses == [0] * processes, ended.output
        results.append([(out / name).read_text() for name in ("submit_vqav2_val.json", "vqav2_result_val.json")])
    assert results[0] == results[1]
    asked = [json.loads(line)["qid"] for line in lines]
    assert sorted(entry["question_id"] for entry in json.loads(results[1][0])) == sorted(asked)


def as_slurm_task(rank):
    """The variables of srun instead of torchrun's."""
    count, port = os.environ.pop("WORLD_SIZE"), os.environ["MASTER_PORT"]
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR"):
        os.environ.pop(name)
    os.environ.update(SLURM_STEP_ID="0", SLURM_PROCID=str(rank), SLURM_NTASKS=count, SLURM_LOCALID=str(rank))
    os.environ.update(SLURM_STEP_NODELIST="localhost", MASTER_PORT=port)


def as_itp_task(rank):
    """The variables of Open MPI, beside others of torchrun that do not count."""
    count = os.environ["WORLD_SIZE"]
    os.environ.update(
        OMPI_COMM_WORLD_RANK=str(rank), OMPI_COMM_WORLD_SIZE=count, OMPI_COMM_WORLD_LOCAL_RANK=str(rank), RANK="7"
    )


@pytest.mark.parametrize(("launcher", "flags"), [(as_slurm_task, []), (as_itp_task, ["--dist_on_itp"])])
def test_other_launchers_than_torchrun(undisturbed, data, tmp_path, launcher, flags):
    deepspeed, whole = undisturbed
    ended = Run([*chaos.command(data, tmp_path, deepspeed), *flags], 2, launcher).wait()
    assert ended.statuses == [0, 0], ended.output
    assert same_end(tmp_path, whole.state) is None


def test_two_machines_do_what_two_processes_do(undisturbed, data, tmp_path):
    """Two torchrun agents with a node rank each, on this machine."""
    deepspeed, whole = undisturbed
    if not deepspeed:
        pytest.skip("the rendezvous is torchrun's; one backend shows it")
    port = _free_port()
    agents = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node),
                "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port),
                "run_beit3_finetuning.py", *chaos.command(data, tmp_path, deepspeed),
            ],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    said = [agent.communicate(timeout=180)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert same_end(tmp_path, whole.state) is None


def test_deterministic_changes_nothing_on_a_cpu(data, alone, tmp_path):
    assert Run([*chaos.command(data, tmp_path, False), "--deterministic"]).wait().statuses == [0]
    assert same_end(tmp_path, alone) is None
