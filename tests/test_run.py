"""The command line, from flags to files: the published line, training, resuming, prediction, and what is said when
something is wrong. On the made-up COCO of data/mini_coco with the tiny model, unless a test is about the real one."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import run_beit3_finetuning as run
import utils
from beit3.model.weights import read_checkpoint, write_weights
from beit3.system import machine
from datasets import VQAv2Dataset
from modeling_finetune import create_model
from optim_factory import cosine_schedule
from runs.command_line import read_settings
from tests import reference
from tests.workers import Run

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """mini_coco with its index files, made as people make them."""
    folder = tmp_path_factory.mktemp("coco") / "data"
    shutil.copytree(reference.MINI_COCO, folder)
    VQAv2Dataset.make_dataset_index(
        data_path=str(folder), tokenizer=str(folder / "mini.spm"), annotation_data_path=str(folder / "vqa")
    )
    return folder


def tiny_flags(coco, out, **changes):
    flags = {
        "task": "vqav2", "model": "beit3_tiny_patch16_64", "input_size": 64, "sentencepiece_model": coco / "mini.spm",
        "data_path": coco, "output_dir": out, "batch_size": 16, "epochs": 2, "warmup_epochs": 1, "vocab_size": 100,
        "num_workers": 0, "lr": 1e-3, "device": "cpu", "save_ckpt_freq": 1,
    }  # fmt: skip
    flags.update(changes)
    argv = []
    for name, value in flags.items():
        if value is True:
            argv.append(f"--{name}")
        elif value is not None and value is not False:
            argv += [f"--{name}", str(value)]
    return argv


def start(argv, launcher=(), timeout=300):
    """The entry point in a process of its own."""
    command = [sys.executable, *launcher, "run_beit3_finetuning.py", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture
def caplog(caplog, monkeypatch):
    """The entry point sets logging up itself; here pytest listens."""
    monkeypatch.setattr(utils, "set_up_logging", lambda is_main: None)
    return caplog


@pytest.fixture
def refusal(caplog, capsys):
    """What the entry point says when it refuses; exit status 2.

    Mistakes in the flags are printed before PyTorch and its logging are there; what is wrong with files is logged.
    """

    def message(argv):
        caplog.clear()
        capsys.readouterr()
        assert run.main(argv) == 2
        printed = capsys.readouterr().err
        if printed:
            assert printed.startswith("error: ") and not caplog.records
            return printed.removeprefix("error: ").rstrip("\n")
        return caplog.records[-1].getMessage()

    return message


@pytest.fixture(scope="module")
def trained(coco, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    result = start(tiny_flags(coco, out, log_dir=out / "log"))
    assert result.returncode == 0, result.stderr
    return out


def log_of(out):
    return [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]


def test_training_leaves_checkpoints_a_log_and_tensorboard_files(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "checkpoint-0.pth", "checkpoint-1.pth", "checkpoint-best.pth", "checkpoint-best", "checkpoint-last", "log.txt",
        "log",
    }  # fmt: skip
    assert list((trained / "log").glob("events*"))
    first, second = log_of(trained)
    assert (first["epoch"], second["epoch"]) == (0, 1)
    assert second["train_loss"] < first["train_loss"]
    assert second["train_lr"] == pytest.approx(
        cosine_schedule(1e-3, 1e-6, epochs=2, steps_per_epoch=13, warmup_epochs=1)[-1]
    )
    assert 0 <= second["val_score"] <= 100
    model = create_model("beit3_tiny_patch16_64_vqav2", vocab_size=100, num_classes=14)
    assert second["n_parameters"] == sum(p.numel() for p in model.parameters())


def test_the_best_checkpoint_says_what_it_is(trained, coco):
    description = read_checkpoint(trained / "checkpoint-best.pth").description
    answers = [json.loads(line)["answer"] for line in (coco / "answer2label.txt").read_text().splitlines()]
    best = max(log_of(trained), key=lambda entry: entry["val_score"])
    assert description["answers"] == answers
    assert description["score"] == best["val_score"]
    assert description["epoch"] == best["epoch"]
    assert description["model"] == "beit3_tiny_patch16_64_vqav2"
    assert description["image_size"] == 64
    assert len(description["tokenizer_sha256"]) == 64


def test_an_interrupted_run_goes_on_where_it_stopped_and_ends_the_same(trained, coco, tmp_path):
    shutil.copy(trained / "checkpoint-0.pth", tmp_path)
    result = start(tiny_flags(coco, tmp_path))
    assert "going on with epoch 1" in result.stderr
    resumed, whole = (torch.load(f / "checkpoint-1.pth", weights_only=True)["model"] for f in (tmp_path, trained))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert log_of(tmp_path)[-1]["val_score"] == log_of(trained)[-1]["val_score"]


def test_best_and_last_weights_load_with_safetensors_alone(trained):
    best = torch.load(trained / "checkpoint-best.pth", weights_only=True)["model"]
    last = torch.load(trained / "checkpoint-1.pth", weights_only=True)["model"]
    for name, wanted in (("checkpoint-best", best), ("checkpoint-last", last)):
        got = load_file(trained / name / "model.safetensors")
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_a_finished_run_trains_no_further(trained, coco):
    before = (trained / "log.txt").read_text()
    result = start(tiny_flags(coco, trained))
    assert result.returncode == 0
    assert "best validation score" in result.stderr
    assert (trained / "log.txt").read_text() == before


def many_cores(rank):
    os.sched_getaffinity = lambda process: range(8)  # no more workers than cores are started


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_one_seed_gives_one_result_whatever_the_workers(trained, coco, tmp_path, workers):
    ended = Run(tiny_flags(coco, tmp_path, num_workers=workers), 1, many_cores).wait()
    assert ended.statuses == [0], ended.output
    first, second = (torch.load(f / "checkpoint-1.pth", weights_only=True) for f in (tmp_path, trained))
    assert first["model"].keys() == second["model"].keys()
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    first, second = (
        [{k: v for k, v in e.items() if "per_second" not in k} for e in log_of(f)] for f in (tmp_path, trained)
    )
    assert first == second


@pytest.mark.slow
def test_prediction_needs_only_checkpoint_tokenizer_index_and_pictures(trained, coco, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    shutil.copytree(coco / "test2015", data / "test2015")
    shutil.copy(coco / "vqa.test.jsonl", data)
    shutil.copy(coco / "mini.spm", data)
    checkpoint = trained / "checkpoint-best.pth"
    result = start(tiny_flags(data, tmp_path / "out", finetune=checkpoint, eval=True, dist_eval=True))
    assert result.returncode == 0, result.stderr
    submission = json.loads((tmp_path / "out" / "submit_vqav2_test.json").read_text())
    asked = [json.loads(line)["qid"] for line in (data / "vqa.test.jsonl").read_text().splitlines()]
    assert sorted(entry["question_id"] for entry in submission) == sorted(asked)
    answers = read_checkpoint(checkpoint).description["answers"]
    assert {entry["answer"] for entry in submission} <= set(answers)
    assert {frozenset(entry) for entry in submission} == {frozenset({"question_id", "answer"})}


@pytest.mark.slow
def test_validation_split_gets_the_official_scores(trained, coco, tmp_path):
    checkpoint = trained / "checkpoint-best.pth"
    result = start(tiny_flags(coco, tmp_path, finetune=checkpoint, eval=True, split="val"))
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "vqav2_result_val.json").read_text())
    assert f"official VQA accuracy: {report['overall']:.2f} on 114 questions" in result.stderr
    assert report["questions"] == 114
    assert report["not_answered"] == 6 or report["not_answered"] == 7
    assert set(report["by_answer_type"]) == {"other"}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_many_processes_answer_each_question_once_and_alike(trained, coco, tmp_path, processes):
    flags = {"finetune": trained / "checkpoint-best.pth", "eval": True}
    assert start(tiny_flags(coco, tmp_path / "one", **flags)).returncode == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    result = start(tiny_flags(coco, tmp_path / "many", **flags), launcher)
    assert result.returncode == 0, result.stderr
    one, many = ((tmp_path / name / "submit_vqav2_test.json").read_text() for name in ("one", "many"))
    assert one == many


@pytest.mark.slow
def test_deepspeed_trains_as_plain_pytorch_does_and_its_folder_can_be_fine_tuned(trained, coco, tmp_path):
    result = start(tiny_flags(coco, tmp_path, enable_deepspeed=True, epochs=2))
    assert result.returncode == 0, result.stderr
    plain, deepspeed = log_of(trained), log_of(tmp_path)
    assert [e["train_loss"] for e in deepspeed] == pytest.approx([e["train_loss"] for e in plain], rel=1e-4)
    for folder in ("checkpoint-1", "checkpoint-best"):
        again = tmp_path / f"from-{folder}"
        flags = tiny_flags(coco, again, finetune=tmp_path / folder, epochs=1, enable_deepspeed=True)
        result = start(flags)
        assert result.returncode == 0, result.stderr
        assert "177 tensors loaded" in result.stderr


def test_averaged_weights_are_validated_and_saved(coco, tmp_path):
    result = start(tiny_flags(coco, tmp_path, model_ema=True, model_ema_decay=0.9))
    assert result.returncode == 0, result.stderr
    assert all("val_ema_score" in entry for entry in log_of(tmp_path))
    saved = torch.load(tmp_path / "checkpoint-1.pth", weights_only=True)
    name = "head.0.weight"
    assert saved["ema"][name].dtype == torch.float32
    assert not torch.equal(saved["ema"][name], saved["model"][name])


@pytest.mark.slow
def test_compiled_training_goes_the_same_way(coco, tmp_path, trained):
    result = start(tiny_flags(coco, tmp_path, compile=True), timeout=500)
    assert result.returncode == 0, result.stderr
    if "goes on without" in result.stderr:
        pytest.skip("no working C++ compiler")
    for compiled, plain in zip(log_of(tmp_path), log_of(trained), strict=True):
        assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)


def test_what_training_takes_is_said_and_what_helps_where_it_does_not_fit(coco, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda device: 40e6)
    caplog.set_level("INFO")
    assert run.main(tiny_flags(coco, tmp_path, epochs=1)) == 0
    said = [record.getMessage() for record in caplog.records]
    (size,) = (line for line in said if line.startswith("memory per process on cpu, about "))
    assert "activations 16 × 0.00" in size and "0.0 GB are free" in size
    (advice,) = (line for line in said if "may not fit" in line)
    smaller, updates = map(int, re.search(r"--batch_size (\d+) --update_freq (\d+)", advice).groups())
    assert 0 < smaller < 16 and smaller * updates == 16
    assert "--checkpoint_activations" in advice and "--zero_stage 2" in advice


# The published lines, with the paths of the reader's own files.
PUBLISHED = (
    "--model beit3_base_patch16_480 --input_size 480 --task vqav2 --batch_size 16 --layer_decay 1.0 --lr 3e-5 "
    "--update_freq 1 --randaug --epochs 10 --warmup_epochs 1 --drop_path 0.1 --sentencepiece_model {spm} "
    "--finetune {weights} --data_path {data} --output_dir {out} --log_dir {out}/log --weight_decay 0.01 --seed 42 "
    "--save_ckpt_freq 5 --task_head_lr_weight 20 --opt_betas 0.9 0.98 --enable_deepspeed"
)
PUBLISHED_PREDICTION = (
    "--model beit3_base_patch16_480 --input_size 480 --task vqav2 --batch_size 64 --sentencepiece_model {spm} "
    "--finetune {weights} --data_path {data} --output_dir {out} --eval --dist_eval"
)


def test_the_published_lines_parse_with_the_published_meaning(coco, tmp_path):
    (tmp_path / "weights.pth").touch()
    files = {"spm": coco / "mini.spm", "data": coco, "out": tmp_path / "out"}
    settings = read_settings(PUBLISHED.format(weights=tmp_path / "weights.pth", **files).split())
    optimizer = settings.optimizer
    assert (optimizer.opt_betas, optimizer.task_head_lr_weight, optimizer.layer_decay) == ((0.9, 0.98), 20, 1.0)
    assert settings.data.randaug
    assert settings.deepspeed.enable_deepspeed
    assert settings.run.auto_resume
    assert settings.run.save_ckpt
    assert settings.ignored == ()
    shapes = {"beit3.text_embed.weight": [64010, 768], "beit3.encoder.embed_positions.A.weight": [903, 768]}
    shapes |= {f"beit3.encoder.layers.{n}.ffn.A.fc1.weight": [3072, 768] for n in range(12)}
    header = json.dumps({name: {"dtype": "F32", "shape": shape} for name, shape in shapes.items()}).encode()
    (tmp_path / "weights.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    settings = read_settings(PUBLISHED_PREDICTION.format(weights=tmp_path / "weights.safetensors", **files).split())
    assert settings.run.eval
    assert settings.data.split == "test"
    assert [line.split(":")[0] for line in settings.ignored] == ["--dist_eval"]


@pytest.mark.slow
def test_the_published_lines_run_on_released_weights(coco, tmp_path):
    """One epoch of one small batch instead of ten of sixteen: the flags given last count."""
    state = reference.build("beit3_base_patch16_384_vqav2", vocab_size=64010).state_dict()
    pretrained = {k: v for k, v in state.items() if k.startswith("beit3.")}
    torch.save({"model": pretrained}, tmp_path / "beit3_base_patch16_224.pth")
    data = tmp_path / "few"
    shutil.copytree(coco, data)
    lines = (coco / "vqa.train.jsonl").read_text().splitlines()[:4]
    (data / "vqa.train.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("rest_val", "test"):
        lines = (coco / f"vqa.{name}.jsonl").read_text().splitlines()[:2]
        (data / f"vqa.{name}.jsonl").write_text("\n".join(lines) + "\n")
    (data / "vqa" / "v2_OpenEnded_mscoco_test2015_questions.json").unlink()
    where = {"spm": data / "mini.spm", "data": data, "out": tmp_path / "out"}
    line = PUBLISHED.format(weights=tmp_path / "beit3_base_patch16_224.pth", **where).split()
    small = ["--epochs", "1", "--batch_size", "2", "--warmup_epochs", "0", "--num_workers", "0"]
    result = start([*line, *small], timeout=560)
    assert result.returncode == 0, result.stderr
    assert "embed_positions.A.weight 579 → 903 rows" in result.stderr
    assert "new: pooler.norm.weight" in result.stderr
    line = PUBLISHED_PREDICTION.format(weights=tmp_path / "out" / "checkpoint-best", **where).split()
    result = start([*line, "--batch_size", "2", "--num_workers", "0"], timeout=560)
    assert result.returncode == 0, result.stderr
    assert len(json.loads((tmp_path / "out" / "submit_vqav2_test.json").read_text())) == 2


def test_a_released_head_answers_with_the_answers_of_the_data(coco, tmp_path, caplog):
    model = reference.build("beit3_tiny_patch16_64_vqav2", vocab_size=100, num_classes=3129)
    torch.save({"model": model.state_dict()}, tmp_path / "released.pth")
    flags = tiny_flags(coco, tmp_path / "out", finetune=tmp_path / "released.pth", eval=True)
    assert run.main(flags) == 0
    known = {json.loads(line)["answer"] for line in (coco / "answer2label.txt").read_text().splitlines()}
    submission = json.loads((tmp_path / "out" / "submit_vqav2_test.json").read_text())
    assert {entry["answer"] for entry in submission} <= known


def test_every_mistake_is_told_at_once_and_before_anything_is_loaded(coco, tmp_path, refusal):
    flags = tiny_flags(
        tmp_path / "nowhere", tmp_path / "out", model="beit3_tiny_patch16_64", input_size=224,
        sentencepiece_model=tmp_path / "no.spm", finetune=tmp_path / "no.pth", batch_size=0,
    )  # fmt: skip
    message = refusal(flags)
    assert "--input_size 224: beit3_tiny_patch16_64 takes pictures of 64 pixels" in message
    assert f"--sentencepiece_model {tmp_path}/no.spm: no such file" in message
    assert f"--finetune {tmp_path}/no.pth: no such file or folder" in message
    assert f"--data_path {tmp_path}/nowhere: no such folder" in message
    assert "--batch_size 0: at least 1 and at most 1,000,000 is needed" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compile": True, "enable_deepspeed": True, "zero_stage": 3}, "--compile: not with --zero_stage 3"),
        (
            {"model": "beit3_huge_patch16_64"},
            "--model beit3_huge_patch16_64: unknown for --task vqav2; one of beit3_base",
        ),
        ({"task": "nlvr2"}, "--task nlvr2 is not there yet"),
        ({"eval": True}, "--eval needs a checkpoint"),
        ({"vocab_size": 80}, "makes ids up to 87, the model has --vocab_size 80"),
        ({"batch_size": 1000}, "the training data has 212 rows, one optimizer step takes 1000"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"opt": "adamv"}, "--opt adamv is not known"),
    ],
)
def test_a_mistake_is_named_with_the_way_out(coco, tmp_path, refusal, changes, message):
    assert message in refusal(tiny_flags(coco, tmp_path, **changes))


def test_missing_index_files_come_with_the_lines_that_make_them(tmp_path, refusal):
    shutil.copy(reference.MINI_COCO / "mini.spm", tmp_path)
    message = refusal(tiny_flags(tmp_path, tmp_path / "out"))
    for part in (
        "vqa.train.jsonl",
        "vqa.rest_val.jsonl",
        "answer2label.txt",
        "VQAv2Dataset.make_dataset_index(data_path=",
    ):
        assert part in message


def damaged(coco, folder):
    shutil.copytree(coco, folder)
    return folder


def test_bad_lines_and_labels_beyond_the_answers_are_listed_with_file_and_line(coco, tmp_path, refusal):
    data = damaged(coco, tmp_path / "data")
    lines = (data / "vqa.train.jsonl").read_text().splitlines()
    lines[2] = "{not json"
    lines[5] = json.dumps({**json.loads(lines[5]), "labels": [99], "scores": [1.0]})
    lines[7] = json.dumps({**json.loads(lines[7]), "image_path": "../outside.jpg"})
    (data / "vqa.train.jsonl").write_text("\n".join(lines) + "\n")
    message = refusal(tiny_flags(data, tmp_path / "out"))
    for number in (3, 6, 8):
        assert f"vqa.train.jsonl:{number}" in message


def test_corrupt_pictures_are_found_before_training(coco, tmp_path, refusal):
    data = damaged(coco, tmp_path / "data")
    (data / "train2014" / "COCO_train2014_000000000003.jpg").write_bytes(b"no picture")
    cut = (data / "val2014" / "COCO_val2014_000000000101.jpg").read_bytes()[:900]
    (data / "val2014" / "COCO_val2014_000000000101.jpg").write_bytes(cut)
    message = refusal(tiny_flags(data, tmp_path / "out"))
    assert "COCO_train2014_000000000003.jpg" in message
    assert "COCO_val2014_000000000101.jpg" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_damaged_inside_stops_training_naming_file_and_row(coco, tmp_path, caplog, workers):
    data = damaged(coco, tmp_path / "data")
    picture = data / "train2014" / "COCO_train2014_000000000003.jpg"
    content = picture.read_bytes()
    tables = content.index(b"\xff\xc4") + 5  # 16 counts of codes; the header that screening reads stays as it should be
    picture.write_bytes(content[:tables] + b"\xff" * 16 + content[tables + 16 :])
    assert run.main(tiny_flags(data, tmp_path / "out", num_workers=workers)) == 1
    message = caplog.records[-1].getMessage()
    assert "COCO_train2014_000000000003.jpg" in message
    assert "row " in message
    assert "vqa.train.jsonl:" in message
    assert "Traceback" not in message


def test_a_checkpoint_that_says_otherwise_is_refused(coco, trained, tmp_path, refusal):
    checkpoint = read_checkpoint(trained / "checkpoint-best.pth")
    description = {**checkpoint.description, "tokenizer_sha256": "0" * 64, "image_size": 480}
    write_weights(tmp_path / "other.pth", checkpoint.state_dict, description)
    message = refusal(tiny_flags(coco, tmp_path, finetune=tmp_path / "other.pth", eval=True))
    assert "made with image_size 480, the command line says --input_size 64" in message
    assert "made with the tokenizer of SHA-256 000000000000…, the command line says --sentencepiece_model" in message


def test_a_submission_that_misses_questions_is_refused(coco, trained, tmp_path, refusal):
    data = damaged(coco, tmp_path / "data")
    lines = (data / "vqa.test.jsonl").read_text().splitlines()
    missing = json.loads(lines[0])["qid"]
    (data / "vqa.test.jsonl").write_text("\n".join([*lines[1:], lines[1]]) + "\n")
    flags = tiny_flags(data, tmp_path / "out", finetune=trained / "checkpoint-best.pth", eval=True)
    message = refusal(flags)
    assert f"question {missing} of {data}/vqa/v2_OpenEnded_mscoco_test2015_questions.json has no answer" in message
    assert f"question {json.loads(lines[1])['qid']} has 2 answers" in message
    assert not (tmp_path / "out" / "submit_vqav2_test.json").exists()
