"""The captioning tasks against the contract: what is checked, trained, predicted, scored and written."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import modeling_finetune  # noqa: F401  registers the models
from beit3.system.errors import InputError
from datasets import EvaluationSampler, build_loader
from engine_for_finetuning import evaluate, prepare
from tasks.captioning.task import Captioning, NoCaps
from tests import reference
from utils import Process

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """mini_coco with its index files made; not to be written to."""
    root = tmp_path_factory.mktemp("data") / "coco"
    shutil.copytree(reference.MINI_COCO, root)
    Captioning.make_index(root, str(root / "mini.spm"))
    return root


@pytest.fixture
def coco(data, tmp_path):
    """A copy of it that may be changed."""
    return Path(shutil.copytree(data, tmp_path / "coco"))


def settings(data_path, **changes):
    values = {
        "data_path": data_path,
        "sentencepiece_model": reference.MINI_COCO / "mini.spm",
        "image_size": 64,
        "vocab_size": 88,
        "num_max_bpe_tokens": 16,
        "split": "test",
        "randaug": False,
        "train_interpolation": "bicubic",
        "crop_scale": (0.5, 1.0),
        "seed": 0,
        "captioning_mask_prob": 0.6,
        "drop_worst_ratio": 0.2,
        "drop_worst_after": 12000,
        "num_beams": 3,
        "length_penalty": 0.6,
        "label_smoothing": 0.1,
        "captions_per_image": 1,
    }
    return SimpleNamespace(**{**values, **changes})


def tiny_model():
    model = timm.create_model("beit3_tiny_patch16_64_captioning", vocab_size=88)
    reference.fill(model)
    return model


def predict(task, split, rows=None, batch_size=4):
    dataset = task.dataset(split, training=False)
    sampler = EvaluationSampler(rows or len(dataset), batch_size, rank=0, world_size=1)
    loader = build_loader(dataset, sampler, num_workers=0, pin_memory=False)
    return evaluate(task, tiny_model(), loader, Process(0, 1, 0, CPU), autocast=torch.no_grad)


def records(captions, first=101):
    return [
        {"row": row, "image_id": image, "caption": caption}
        for row, (image, caption) in enumerate(zip(range(first, first + len(captions)), captions, strict=True))
    ]


def test_names_are_those_of_the_command_line_and_of_the_outputs(coco):
    assert (Captioning.name, Captioning.model_suffix, Captioning.best_metric, Captioning.id_key) == (
        "coco_captioning", "captioning", "CIDEr", "image_id",
    )  # fmt: skip
    assert (NoCaps.name, NoCaps.model_suffix) == ("nocaps", "captioning")
    task = Captioning(settings(coco))
    assert (task.submission_file(), task.report_file()) == (
        "submit_coco_captioning_test.json", "coco_captioning_result.json",
    )  # fmt: skip
    task = Captioning(settings(coco, split="val"))
    assert task.report_file() == "coco_captioning_result_val.json"
    assert NoCaps(settings(coco)).submission_file() == "submit_nocaps_test.json"


def test_good_settings_have_no_problem(coco):
    assert Captioning(settings(coco)).check(training=True) == []
    assert Captioning(settings(coco)).check(training=False) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_max_bpe_tokens": 3}, "--num_max_bpe_tokens 3: captions need at least 4"),
        ({"num_beams": 0}, "--num_beams 0: at least 1"),
        ({"captions_per_image": 0}, "--captions_per_image 0: at least 1"),
        ({"captioning_mask_prob": 0.0}, "--captioning_mask_prob 0.0: wanted 0 < value"),
        ({"captioning_mask_prob": math.nan}, "--captioning_mask_prob nan: wanted 0 < value"),
        ({"drop_worst_ratio": 1.0}, "--drop_worst_ratio 1.0: wanted 0 ≤ value < 1"),
        ({"drop_worst_after": -1}, "--drop_worst_after -1: at least 0"),
    ],
)
def test_numbers_out_of_range_are_named(coco, changes, expected):
    [problem] = Captioning(settings(coco, **changes)).check(training=True)
    assert problem.startswith(expected)


def test_files_that_are_missing_are_named_with_the_way_to_make_them(coco):
    for path in coco.glob("coco_captioning.*"):
        path.unlink()
    task = Captioning(settings(coco))
    [problem] = task.check(training=True)
    assert "coco_captioning.train.jsonl, coco_captioning.val.jsonl not found" in problem
    assert f'CaptioningDataset.make_coco_captioning_dataset_index(data_path="{coco}"' in problem
    assert "coco_captioning.test.jsonl not found" in task.check(training=False)[0]
    assert "nocaps.val.jsonl not found" in NoCaps(settings(coco)).check(training=True)[0]
    (coco / "dataset_coco.json").unlink()
    assert "validation cannot be scored without" in task.check(training=True)[1]
    task = Captioning(settings(coco / "nowhere"))
    assert task.check(training=True) == [f"--data_path {coco}/nowhere: no such folder"]


def test_index_files_that_are_there_are_kept(coco):
    (coco / "dataset_coco.json").unlink()
    Captioning.make_index(coco, "no.spm")


def test_a_training_step_gives_the_loss_of_the_specification(coco):
    task = Captioning(settings(coco, captions_per_image=5, drop_worst_after=3, drop_worst_ratio=0.25))
    dataset = task.dataset("train", training=True)
    batch = prepare(dataset.collate([dataset[row] for row in range(3)]), task, CPU, torch.float32)
    model = tiny_model().eval()
    with torch.no_grad():
        logits = model(batch["image"], batch["masked_ids"], batch["padding_mask"], batch["language_masked_pos"])
        before, after = (task.training_step(model, batch, step) for step in (3, 4))
    targets = batch["token_ids"][batch["language_masked_pos"]]
    wanted = torch.full_like(logits, 0.1 / 87).scatter(1, targets[:, None], 0.9)
    losses = (wanted * (wanted.log() - F.log_softmax(logits, 1))).sum(1).sort().values
    torch.testing.assert_close(before["loss"], losses.mean())
    torch.testing.assert_close(after["loss"], losses[: int(len(losses) * 0.75)].mean())
    assert before["acc"].item() == pytest.approx((logits.argmax(1) == targets).float().mean().item())
    # The same where a gradient is wanted.
    logits = 5.0 * F.one_hot(targets, 88)
    logits[0, targets[0]] = -5.0
    outputs = task.training_step(lambda **inputs: logits.clone().requires_grad_(), batch, 0)
    assert outputs["acc"].item() == pytest.approx(1 - 1 / len(targets))
    assert batch["token_ids"].shape[0] == 15


def test_training_lowers_the_loss(coco):
    task = Captioning(settings(coco, captions_per_image=5, label_smoothing=0.0))
    dataset = task.dataset("train", training=False)
    batch = prepare(dataset.collate([dataset[row] for row in range(4)]), task, CPU, torch.float32)
    torch.manual_seed(0)
    model = timm.create_model("beit3_tiny_patch16_64_captioning", vocab_size=88)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for step in range(25):
        loss = task.training_step(model, batch, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


def test_every_picture_is_captioned_once_whatever_the_batches(coco):
    task = Captioning(settings(coco))
    found = predict(task, "test")
    assert [record["image_id"] for record in found] == list(range(116, 131))
    assert found[0].keys() == {"row", "image_id", "caption"}
    assert all(isinstance(record["caption"], str) for record in found)
    assert predict(task, "test", batch_size=15) == found


def test_prediction_sees_through_what_backends_wrap_around_a_model(coco):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    task = Captioning(settings(coco))
    dataset = task.dataset("val", training=False)
    batch = prepare(dataset.collate([dataset[0]]), task, CPU, torch.float32)
    model = tiny_model().eval()
    assert task.evaluation_step(Wrapper(model), batch) == task.evaluation_step(model, batch)


def test_metrics_are_those_of_the_official_evaluation(coco):
    task = Captioning(settings(coco))
    references = task.references("val")
    perfect = task.metrics(records([references[image][0] for image in range(101, 116)]))
    assert {"Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr"} <= perfect.keys()
    assert perfect["Bleu_4"] == pytest.approx(1, abs=1e-6)
    assert perfect["ROUGE_L"] == pytest.approx(1)
    constant = task.metrics(records(["There is a picture."] * 15))
    assert 0 <= constant["CIDEr"] < perfect["CIDEr"] / 2


def test_scores_are_computed_once_for_metrics_and_file(coco, monkeypatch):
    task = Captioning(settings(coco))
    found = records(["There is a square."] * 15)
    scores = task.metrics(found)
    monkeypatch.setattr("tasks.captioning.task.caption_metrics", None)
    files = task.validation_files(found, epoch=3)
    assert files.keys() == {"submit_coco_captioning_val_e3.json", "coco_captioning_result_val_e3.json"}
    result = files["coco_captioning_result_val_e3.json"]
    assert {name: result[name] for name in scores} == scores
    assert [entry["image_id"] for entry in result["per_image"]] == list(range(101, 116))
    assert (result["split"], result["images"], result["images_without_picture"]) == ("val", 15, 0)
    assert files["submit_coco_captioning_val_e3.json"][0] == {"image_id": 101, "caption": "There is a square."}
    json.dumps(files)


def test_the_report_is_of_the_predicted_split(coco):
    task = Captioning(settings(coco, split="test"))
    found = records([task.references("test")[image][0] for image in range(116, 131)], first=116)
    report = task.report(found)
    assert report["Bleu_4"] == pytest.approx(1, abs=1e-6)
    assert (report["split"], report["images"]) == ("test", 15)
    lines = task.report_lines(report)
    assert lines[0].startswith("15 pictures: ") and "CIDEr" in lines[0]
    assert "SPICE" in report or any("SPICE left out" in line for line in lines)


def test_pictures_that_are_not_on_the_disk_do_not_count_and_are_counted(coco, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no Java, which takes ten seconds
    task = Captioning(settings(coco, split="test"))
    found = records([task.references("test")[image][0] for image in range(116, 126)], first=116)
    report = task.report(found)
    assert (report["images"], report["images_without_picture"]) == (10, 5)
    assert task.report_lines(report)[1] == "  5 pictures of the split are not on disk and do not count"


def test_an_unknown_picture_and_one_with_two_captions_are_errors(coco):
    task = Captioning(settings(coco, split="val"))
    with pytest.raises(InputError, match="image 7 has a prediction but no reference captions"):
        task.metrics([*records(["A cat"] * 15), {"row": 15, "image_id": 7, "caption": "A dog"}])
    twice = [*records(["A cat"] * 15), {"row": 15, "image_id": 101, "caption": "A dog"}]
    for ask in (task.metrics, task.submission, task.report):
        with pytest.raises(InputError, match="image 101 has 2 captions"):
            ask(twice)


def test_an_index_made_elsewhere_is_scored_from_karpathys_file(coco):
    expected = Captioning(settings(coco)).references("val")
    for path in coco.glob("*.references.json"):
        path.unlink()
    assert Captioning(settings(coco)).references("val") == expected
    (coco / "dataset_coco.json").unlink()
    task = Captioning(settings(coco))
    found = records(["A cat"] * 15)
    assert (task.metrics(found), task.report(found)) == ({}, None)
    assert task.submission(found)[0] == {"image_id": 101, "caption": "A cat"}
    assert task.validation_files(found, 0).keys() == {"submit_coco_captioning_val_e0.json"}


@pytest.fixture
def nocaps(coco):
    """A data folder with COCO captions, and pictures of COCO under the names of nocaps."""
    for split, numbers, source in (
        ("val", (1, 2), "nocaps_val_4500_captions.json"),
        ("test", (3, 4, 5), "nocaps_test_image_info.json"),
    ):
        (coco / split).mkdir()
        images = [{"id": number, "file_name": f"{number}.jpg"} for number in numbers]
        for number in numbers:
            shutil.copy(coco / f"train2014/COCO_train2014_{number:012d}.jpg", coco / split / f"{number}.jpg")
        annotations = [{"id": n, "image_id": n, "caption": f"A picture with number {n}"} for n in numbers]
        (coco / source).write_text(json.dumps({"images": images, "annotations": annotations}))
    NoCaps.make_index(coco, str(coco / "mini.spm"))
    return coco


def test_nocaps_trains_on_coco_and_predicts_its_own_pictures(nocaps):
    task = NoCaps(settings(nocaps))
    assert task.check(training=True) == [] and task.check(training=False) == []
    assert len(task.dataset("train", training=True)) == 300
    found = predict(task, "test")
    assert [entry["image_id"] for entry in task.submission(found)] == [3, 4, 5]
    assert task.report(found) is None


def test_nocaps_is_validated_on_its_own_captions_where_they_are_there(nocaps):
    task = NoCaps(settings(nocaps))
    found = records(["A picture with number 1", "A picture with number 2"], first=1)
    assert task.metrics(found)["Bleu_4"] == pytest.approx(1, abs=1e-6)
    content = json.loads((nocaps / "nocaps_val_4500_captions.json").read_text())
    (nocaps / "nocaps_val_4500_captions.json").write_text(json.dumps({**content, "annotations": []}))
    assert NoCaps(settings(nocaps)).metrics(found) == {}


def test_a_checkpoint_of_coco_captioning_serves_nocaps():
    assert Captioning.trains_as == NoCaps.trains_as == "coco_captioning"
