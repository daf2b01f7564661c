"""Captioning from flags to files, on the made-up COCO of data/mini_coco with the tiny model."""

import json
import shutil

import pytest
import torch

from beit3.model.weights import read_checkpoint
from datasets import CaptioningDataset
from runs.command_line import read_settings
from tests import reference
from tests.test_run import log_of, start, tiny_flags
from tests.workers import Run

PUBLISHED = (
    "--model beit3_base_patch16_480 --input_size 480 --task coco_captioning --batch_size 32 --layer_decay 1.0 "
    "--lr 4e-5 --randaug --epochs 10 --warmup_epochs 1 --drop_path 0.1 --sentencepiece_model beit3.spm "
    "--finetune beit3_base_patch16_224.pth --data_path /COCO --output_dir ./output_freeze --log_dir ./log_freeze "
    "--weight_decay 0.05 --seed 42 --save_ckpt_freq 1 --num_max_bpe_tokens 32 --captioning_mask_prob 0.7 "
    "--drop_worst_after 12000 --dist_eval --enable_deepspeed"
)


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco") / "data"
    shutil.copytree(reference.MINI_COCO, folder)
    CaptioningDataset.make_coco_captioning_dataset_index(data_path=str(folder), tokenizer=str(folder / "mini.spm"))
    return folder


def flags(coco, out, **changes):
    options = {"task": "coco_captioning", "num_max_bpe_tokens": 16, "captioning_mask_prob": 0.7, **changes}
    return tiny_flags(coco, out, **options)


@pytest.fixture(scope="module")
def trained(coco, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    result = start(flags(coco, out))
    assert result.returncode == 0, result.stderr
    return out


def published(data, weights, out):
    """The published line with a reader's own files."""
    line = PUBLISHED.replace("beit3.spm", str(data / "mini.spm")).replace("/COCO", str(data))
    line = line.replace("beit3_base_patch16_224.pth", str(weights))
    return line.replace("./output_freeze", str(out)).replace("./log_freeze", f"{out}/log").split()


def test_the_published_line_parses_with_the_published_meaning(coco, tmp_path):
    (tmp_path / "weights.pth").touch()
    task = read_settings(published(coco, tmp_path / "weights.pth", tmp_path / "out")).task
    assert (task.name, task.captioning_mask_prob, task.drop_worst_after) == ("coco_captioning", 0.7, 12000)
    assert (task.num_beams, task.length_penalty, task.label_smoothing) == (3, 0.6, 0.1)


def test_training_validates_by_cider_and_keeps_its_captions(trained, coco):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "checkpoint-0.pth", "checkpoint-1.pth", "checkpoint-best.pth", "checkpoint-best", "checkpoint-last", "log.txt",
        "submit_coco_captioning_val_e0.json", "submit_coco_captioning_val_e1.json",
        "coco_captioning_result_val_e0.json", "coco_captioning_result_val_e1.json",
    }  # fmt: skip
    log = log_of(trained)
    assert all({"train_loss", "train_acc", "val_CIDEr", "val_Bleu_4", "val_ROUGE_L"} <= entry.keys() for entry in log)
    best = read_checkpoint(trained / "checkpoint-best.pth").description
    assert best["CIDEr"] == max(entry["val_CIDEr"] for entry in log)
    assert best["task"] == "coco_captioning"
    asked = [json.loads(line)["image_id"] for line in (coco / "coco_captioning.val.jsonl").read_text().splitlines()]
    captions = json.loads((trained / "submit_coco_captioning_val_e1.json").read_text())
    assert sorted(entry["image_id"] for entry in captions) == sorted(asked)
    result = json.loads((trained / "coco_captioning_result_val_e1.json").read_text())
    assert result["CIDEr"] == log[1]["val_CIDEr"]
    assert len(result["per_image"]) == len(asked)


@pytest.mark.slow
def test_prediction_writes_captions_and_metrics_alike_for_any_number_of_processes(trained, coco, tmp_path):
    options = {"finetune": trained / "checkpoint-best.pth", "eval": True, "dist_eval": True, "batch_size": 2}
    assert start(flags(coco, tmp_path / "one", **options)).returncode == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = start(flags(coco, tmp_path / "two", **{**options, "batch_size": 4}), launcher)
    assert result.returncode == 0, result.stderr
    one, two = ((tmp_path / name / "submit_coco_captioning_test.json").read_text() for name in ("one", "two"))
    assert one == two
    scores = json.loads((tmp_path / "two" / "coco_captioning_result.json").read_text())
    assert {"Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr"} <= scores.keys()
    assert "SPICE" in scores["left_out"] or "SPICE" in scores


@pytest.mark.slow
def test_captions_of_one_picture_can_share_a_pass_under_deepspeed(coco, tmp_path):
    result = start(flags(coco, tmp_path, captions_per_image=5, enable_deepspeed=True, batch_size=4, epochs=1))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "checkpoint-best" / "model.safetensors").is_file()


@pytest.mark.slow
def test_nocaps_trains_on_coco_captions_and_predicts_its_own_pictures(trained, coco, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(coco, data)
    (data / "val").mkdir()
    (data / "test").mkdir()
    images = []
    for number, picture in enumerate(sorted((coco / "val2014").iterdir())[:3]):
        shutil.copy(picture, data / "val" / f"{number}.jpg")
        shutil.copy(picture, data / "test" / f"{number}.jpg")
        images.append({"id": number, "file_name": f"{number}.jpg"})
    (data / "nocaps_val_4500_captions.json").write_text(json.dumps({"images": images, "annotations": []}))
    (data / "nocaps_test_image_info.json").write_text(json.dumps({"images": images}))
    CaptioningDataset.make_nocaps_captioning_dataset_index(data_path=str(data))
    result = start(flags(data, tmp_path / "out", task="nocaps", epochs=1))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "checkpoint-best.pth").is_file()
    checkpoint = trained / "checkpoint-best.pth"  # learned as coco_captioning
    result = start(flags(data, tmp_path / "predicted", task="nocaps", finetune=checkpoint, eval=True))
    assert result.returncode == 0, result.stderr
    captions = json.loads((tmp_path / "predicted" / "submit_nocaps_test.json").read_text())
    assert [entry["image_id"] for entry in captions] == [0, 1, 2]


@pytest.mark.slow
def test_captions_are_generated_and_averaged_weights_scored_under_zero_stage_3(coco, tmp_path):
    options = {"model_ema": True, "model_ema_decay": 0.5, "batch_size": 8, "epochs": 1, "warmup_epochs": 0.5}
    for name, more in (("plain", {}), ("zero", {"enable_deepspeed": True, "zero_stage": 3})):
        ended = Run(flags(coco, tmp_path / name, **options, **more), 2).wait()
        assert ended.statuses == [0, 0], ended.output
    (wanted,), (got,) = log_of(tmp_path / "plain"), log_of(tmp_path / "zero")
    for name in ("train_loss", "val_CIDEr", "val_ema_CIDEr"):
        assert got[name] == pytest.approx(wanted[name], rel=1e-3), name


@pytest.mark.gpu
def test_a_gpu_trains_in_bf16(coco, tmp_path):
    result = start(flags(coco, tmp_path, device="cuda", precision="bf16", enable_deepspeed=True))
    assert result.returncode == 0, result.stderr
    assert torch.isfinite(torch.tensor([entry["train_loss"] for entry in log_of(tmp_path)])).all()


@pytest.mark.slow
def test_the_published_line_runs_on_released_weights(coco, tmp_path):
    """One epoch of two pairs instead of ten of thirty-two: the flags given last count."""
    state = reference.build("beit3_base_patch16_224_captioning", vocab_size=64010).state_dict()
    torch.save({"model": state}, tmp_path / "beit3_base_patch16_224.pth")
    data = tmp_path / "few"
    shutil.copytree(coco, data)
    for split, count in (("train", 2), ("val", 2)):
        file = data / f"coco_captioning.{split}.jsonl"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:count]))
    line = published(data, tmp_path / "beit3_base_patch16_224.pth", tmp_path / "out")
    small = ["--epochs", "1", "--batch_size", "2", "--warmup_epochs", "0", "--num_workers", "0"]
    small.append("--no_save_ckpt")  # gigabytes, and nothing here looks at them
    result = start([*line, *small], timeout=560)
    assert result.returncode == 0, result.stderr
    assert "embed_positions.A.weight 199 → 903 rows" in result.stderr
    assert "new:" not in result.stderr
    captions = json.loads((tmp_path / "out" / "submit_coco_captioning_val_e0.json").read_text())
    assert len(captions) == 2
