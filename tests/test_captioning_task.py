"""The captioning tasks against the contract: what is checked, trained, predicted, scored and written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beit3.data.tokenizer import Tokenizer
from beit3.system.errors import InputError
from beit3.system.flags import flags_of, values
from datasets import EvaluationSampler, build_loader
from engine_for_finetuning import evaluate
from modeling_finetune import create_model
from tasks.base import make_task
from tasks.captioning.scores.scores import caption_metrics
from tasks.captioning.settings import CaptioningSettings, NoCapsSettings
from tasks.captioning.task import Captioning, NoCaps
from tasks.settings import DataSettings
from tests import reference
from utils import Process

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """mini_coco with its index files made; not to be written to."""
    root = tmp_path_factory.mktemp("data") / "coco"
    shutil.copytree(reference.MINI_COCO, root)
    CaptioningSettings().make_index(root, str(root / "mini.spm"))
    return root


@pytest.fixture
def coco(data, tmp_path):
    """A copy of it that may be changed."""
    return Path(shutil.copytree(data, tmp_path / "coco"))


def settings(data_path, kind=CaptioningSettings, **changes):
    """Settings of the task and of the data, with flags of either changed."""
    of_data = {each.name for each in flags_of(DataSettings)}
    data = {"sentencepiece_model": reference.MINI_COCO / "mini.spm", "input_size": 64, "num_max_bpe_tokens": 16}
    data |= {name: value for name, value in changes.items() if name in of_data}
    own = {name: value for name, value in changes.items() if name not in of_data}
    return kind(**own), DataSettings(data_path=data_path, **data)


def captioning(data_path, kind=CaptioningSettings, **changes):
    """The task itself."""
    own, data = settings(data_path, kind, **changes)
    return make_task(own, data, Tokenizer(data.sentencepiece_model))


def problems(data_path, training, kind=CaptioningSettings, **changes):
    own, data = settings(data_path, kind, **changes)
    return data.problems() + own.problems(data, training)


def tiny_model():
    model = create_model("beit3_tiny_patch16_64_captioning", vocab_size=88)
    reference.fill(model)
    return model


def predict(task, split, rows=None, batch_size=4):
    dataset = task.dataset(split, training=False)
    sampler = EvaluationSampler(rows or len(dataset), batch_size, rank=0, world_size=1)
    loader = build_loader(dataset, sampler, num_workers=0, pin_memory=False)
    columns, unreadable = evaluate(task, tiny_model(), loader, Process(0, 1, 0, CPU), autocast=torch.no_grad)
    assert unreadable == []
    return columns


def columns(captions):
    """A caption for each of the first rows of a split."""
    return {"row": torch.arange(len(captions)), "caption": captions}


def images_of(dataset):
    return dataset.table["image_id"].tolist()


def score(task, captions, split="val", final=False):
    return task.score(columns(captions), task.dataset(split, training=False), split, final)


def add_image(coco, image, split="val"):
    """One more line of the index, with a picture that is there."""
    path = coco / f"coco_captioning.{split}.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, json.dumps({**json.loads(lines[0]), "image_id": image})]) + "\n")


def test_names_are_those_of_the_command_line_and_of_the_outputs(coco):
    assert (CaptioningSettings.name, CaptioningSettings.model_suffix, Captioning.best_metric) == (
        "coco_captioning", "captioning", "CIDEr",
    )  # fmt: skip
    assert (NoCapsSettings.name, NoCapsSettings.model_suffix) == ("nocaps", "captioning")
    task, nocaps = captioning(coco), captioning(coco, NoCapsSettings)
    assert (type(task), type(nocaps)) == (Captioning, NoCaps)
    assert (task.name, nocaps.name) == ("coco_captioning", "nocaps")
    assert (task.submission_file("test"), task.report_file("test")) == (
        "submit_coco_captioning_test", "coco_captioning_result",
    )  # fmt: skip
    assert task.report_file("val") == "coco_captioning_result_val"
    assert nocaps.submission_file("test") == "submit_nocaps_test"


def test_good_settings_have_no_problem(coco):
    assert problems(coco, training=True) == []
    assert problems(coco, training=False) == []


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("num_beams", "0", "at least 1 and at most 1,000 is needed"),
        ("captions_per_image", "0", "at least 1 and at most 1,000 is needed"),
        ("captioning_mask_prob", "0.0", "above 0 and at most 1 is needed"),
        ("captioning_mask_prob", "1.01", "above 0 and at most 1 is needed"),
        ("captioning_mask_prob", "nan", "a finite number is wanted"),
        ("drop_worst_ratio", "1.0", "at least 0 and below 1 is needed"),
        ("drop_worst_ratio", "-0.1", "at least 0 and below 1 is needed"),
        ("drop_worst_after", "-1", "at least 0 and at most 1,000,000,000 is needed"),
        ("label_smoothing", "1", "at least 0 and below 1 is needed"),
        ("length_penalty", "inf", "a finite number is wanted"),
    ],
)
def test_numbers_out_of_range_are_named(name, given, expected):
    found = []
    assert values(CaptioningSettings, {name: [given]}, found) == {}
    assert found == [f"--{name} {given}: {expected}"]


def test_numbers_at_the_edge_of_their_range_are_taken():
    given = {"num_beams": "1", "captioning_mask_prob": "1", "drop_worst_ratio": "0", "drop_worst_after": "0"}
    found = []
    assert values(CaptioningSettings, given, found) == {
        "num_beams": 1, "captioning_mask_prob": 1.0, "drop_worst_ratio": 0.0, "drop_worst_after": 0,
    }  # fmt: skip
    assert found == []


@pytest.mark.parametrize("training", [True, False])
def test_captions_need_room_for_a_token_and_its_mask(coco, training):
    [problem] = problems(coco, training, num_max_bpe_tokens=3)
    assert problem.startswith("--num_max_bpe_tokens 3: captions need at least 4")
    assert problems(coco, training, num_max_bpe_tokens=4) == []


def test_files_that_are_missing_are_named_with_the_way_to_make_them(coco):
    for path in coco.glob("coco_captioning.*"):
        path.unlink()
    [problem] = problems(coco, training=True)
    assert "coco_captioning.train.jsonl, coco_captioning.val.jsonl not found" in problem
    assert f'CaptioningDataset.make_coco_captioning_dataset_index(data_path="{coco}"' in problem
    assert "coco_captioning.test.jsonl not found" in problems(coco, training=False)[0]
    assert "nocaps.val.jsonl not found" in problems(coco, True, NoCapsSettings)[0]
    (coco / "dataset_coco.json").unlink()
    assert "validation cannot be scored without" in problems(coco, training=True)[1]
    assert problems(coco / "nowhere", training=True) == [f"--data_path {coco}/nowhere: no such folder"]


def test_index_files_that_are_there_are_kept(coco):
    (coco / "dataset_coco.json").unlink()
    CaptioningSettings().make_index(coco, str(coco / "mini.spm"))


def test_a_training_step_gives_the_loss_of_the_specification(coco):
    task = captioning(coco, captions_per_image=5, drop_worst_after=3, drop_worst_ratio=0.25)
    dataset = task.dataset("train", training=True)
    batch = task.prepare(dataset.collate([dataset[row] for row in range(3)]), CPU, torch.float32)
    model = tiny_model().eval()
    with torch.no_grad():
        logits = model(batch["image"], batch["masked_ids"], batch["padding_mask"], masked_index=batch["masked_index"])
        before, after = (task.training_step(model, batch, step) for step in (3, 4))
    targets = batch["token_ids"].flatten()[batch["masked_index"]]
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
    task = captioning(coco, captions_per_image=5, label_smoothing=0.0)
    dataset = task.dataset("train", training=False)
    batch = task.prepare(dataset.collate([dataset[row] for row in range(4)]), CPU, torch.float32)
    torch.manual_seed(0)
    model = create_model("beit3_tiny_patch16_64_captioning", vocab_size=88)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for step in range(25):
        loss = task.training_step(model, batch, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


def test_the_memory_of_a_step_is_foreseen_from_texts_and_hidden_tokens(coco):
    task = captioning(coco, captions_per_image=5, captioning_mask_prob=0.5)
    assert task.text_tokens() == 5 * 16
    assert task.output_values(tiny_model()) == 40 * 88


def test_every_picture_is_captioned_once_whatever_the_batches(coco):
    task = captioning(coco)
    found, dataset = predict(task, "test"), task.dataset("test", training=False)
    assert found.keys() == {"row", "caption", "captions"}
    assert found["row"].tolist() == list(range(15))
    assert [entry["image_id"] for entry in task.submission(found, dataset, "test")] == list(range(116, 131))
    assert all(isinstance(caption, str) for caption in found["caption"])
    assert predict(task, "test", batch_size=15)["caption"] == found["caption"]


def test_prediction_sees_no_label_and_no_row(coco):
    task = captioning(coco)
    dataset = task.dataset("val", training=False)
    batch = task.prepare(dataset.collate([dataset[0], dataset[1]]), CPU, torch.float32)
    model = tiny_model().eval()
    alone, whole = task.predict_step(model, {"image": batch["image"]}), task.predict_step(model, batch)
    assert alone["caption"] == whole["caption"] and torch.equal(alone["finite"], whole["finite"])


def test_prediction_sees_through_what_backends_wrap_around_a_model(coco):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    task = captioning(coco)
    dataset = task.dataset("val", training=False)
    batch = task.prepare(dataset.collate([dataset[0]]), CPU, torch.float32)
    model = tiny_model().eval()
    assert task.predict_step(Wrapper(model), batch)["caption"] == task.predict_step(model, batch)["caption"]


def test_metrics_are_those_of_the_official_evaluation(coco):
    task = captioning(coco)
    references = task.references("val")
    perfect = score(task, [references[image][0] for image in range(101, 116)]).metrics
    assert {"Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr"} <= perfect.keys()
    assert perfect["Bleu_4"] == pytest.approx(1, abs=1e-6)
    assert perfect["ROUGE_L"] == pytest.approx(1)
    constant = score(task, ["There is a picture."] * 15).metrics
    assert 0 <= constant["CIDEr"] < perfect["CIDEr"] / 2


def test_a_caption_belongs_to_the_picture_of_its_row(coco):
    task = captioning(coco)
    references, dataset = task.references("val"), task.dataset("val", training=False)
    rows = torch.tensor([3, 0, 14])
    captions = [references[images_of(dataset)[row]][0] for row in rows.tolist()]
    found = {"row": rows, "caption": captions}
    assert [entry["image_id"] for entry in task.submission(found, dataset, "val")] == [104, 101, 115]
    right = task.score(found, dataset, "val", final=False).metrics
    wrong = task.score({**found, "row": rows.flip(0)}, dataset, "val", final=False).metrics
    assert right["Bleu_4"] == pytest.approx(1, abs=1e-6) and wrong["Bleu_4"] < 0.99


def test_scores_are_computed_once_for_metrics_and_files(coco, monkeypatch):
    calls = []

    def counted(*parts, **options):
        calls.append(options)
        return caption_metrics(*parts, **options)

    monkeypatch.setattr("tasks.captioning.task.caption_metrics", counted)
    scores = score(captioning(coco), ["There is a square."] * 15)
    assert calls == [{"meteor": False, "spice": False}]
    assert scores.files.keys() == {"submit_coco_captioning_val", "coco_captioning_result_val"}
    result = scores.files["coco_captioning_result_val"]
    assert scores.metrics and {name: result[name] for name in scores.metrics} == scores.metrics
    assert [entry["image_id"] for entry in result["per_image"]] == list(range(101, 116))
    assert (result["split"], result["images"], result["images_without_picture"]) == ("val", 15, 0)
    assert scores.files["submit_coco_captioning_val"][0] == {"image_id": 101, "caption": "There is a square."}
    json.dumps(scores.files)


def test_the_report_is_of_the_predicted_split(coco):
    task = captioning(coco)
    captions = [task.references("test")[image][0] for image in range(116, 131)]
    scores = score(task, captions, "test", final=True)
    assert scores.report["Bleu_4"] == pytest.approx(1, abs=1e-6)
    assert (scores.report["split"], scores.report["images"]) == ("test", 15)
    assert scores.lines[0].startswith("15 pictures: ") and "CIDEr" in scores.lines[0]
    assert "SPICE" in scores.report or any("SPICE left out" in line for line in scores.lines)
    assert scores.files == {}  # submission and report are files of their own


def test_pictures_that_are_not_on_the_disk_do_not_count_and_are_counted(coco, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no Java, which takes ten seconds
    task = captioning(coco)
    captions = [task.references("test")[image][0] for image in range(116, 126)]
    scores = score(task, captions, "test", final=True)
    assert (scores.report["images"], scores.report["images_without_picture"]) == (10, 5)
    assert scores.lines[1] == "  5 pictures of the split are not on disk and do not count"


def test_a_picture_without_references_is_an_error(coco):
    add_image(coco, 7)
    with pytest.raises(InputError, match="image 7 has a prediction but no reference captions"):
        score(captioning(coco), ["A cat"] * 16)


@pytest.mark.parametrize("final", [True, False])
def test_a_picture_with_two_captions_is_an_error(coco, final):
    add_image(coco, 101)
    task, found = captioning(coco), columns([*["A cat"] * 15, "A dog"])
    dataset = task.dataset("val", training=False)
    with pytest.raises(InputError, match="image 101 has 2 captions"):
        task.score(found, dataset, "val", final)
    assert "image 101 has 2 captions" in task.check_rows(dataset, "val")[0]


def test_an_index_made_elsewhere_is_scored_from_karpathys_file(coco):
    expected = captioning(coco).references("val")
    for path in coco.glob("*.references.json"):
        path.unlink()
    assert captioning(coco).references("val") == expected
    (coco / "dataset_coco.json").unlink()
    task, found = captioning(coco), columns(["A cat"] * 15)
    dataset = task.dataset("val", training=False)
    after_prediction = task.score(found, dataset, "val", final=True)
    assert (after_prediction.metrics, after_prediction.report, after_prediction.files) == ({}, None, {})
    assert task.submission(found, dataset, "val")[0] == {"image_id": 101, "caption": "A cat"}
    after_epoch = task.score(found, dataset, "val", final=False)
    assert (after_epoch.metrics, after_epoch.report) == ({}, None)
    assert after_epoch.files == {"submit_coco_captioning_val": task.submission(found, dataset, "val")}


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
    NoCapsSettings().make_index(coco, str(coco / "mini.spm"))
    return coco


def test_nocaps_trains_on_coco_and_predicts_its_own_pictures(nocaps):
    assert problems(nocaps, True, NoCapsSettings) == [] and problems(nocaps, False, NoCapsSettings) == []
    task = captioning(nocaps, NoCapsSettings)
    assert len(task.dataset("train", training=True)) == 300
    found, dataset = predict(task, "test"), task.dataset("test", training=False)
    assert [entry["image_id"] for entry in task.submission(found, dataset, "test")] == [3, 4, 5]
    scores = task.score(found, dataset, "test", final=True)
    assert (scores.metrics, scores.report, scores.files) == ({}, None, {})


def test_nocaps_is_validated_on_its_own_captions_where_they_are_there(nocaps):
    found = ["A picture with number 1", "A picture with number 2"]
    scores = score(captioning(nocaps, NoCapsSettings), found)
    assert scores.metrics["Bleu_4"] == pytest.approx(1, abs=1e-6)
    assert scores.files.keys() == {"submit_nocaps_val", "nocaps_result_val"}
    content = json.loads((nocaps / "nocaps_val_4500_captions.json").read_text())
    (nocaps / "nocaps_val_4500_captions.json").write_text(json.dumps({**content, "annotations": []}))
    assert score(captioning(nocaps, NoCapsSettings), found).metrics == {}


def test_nocaps_is_scored_by_domain_where_the_file_tells_it(nocaps, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no Java, which takes ten seconds
    file = nocaps / "nocaps_val_4500_captions.json"
    content = json.loads(file.read_text())
    for image, domain in zip(content["images"], ("in-domain", "out-domain\x1b[2J"), strict=True):
        image["domain"] = domain
    file.write_text(json.dumps(content))
    found = ["A picture with number 1", "A red circle"]
    scores = score(captioning(nocaps, NoCapsSettings), found, final=True)
    by_domain = scores.report["by_domain"]
    assert [by_domain[name]["images"] for name in ("in-domain", "out-domain\x1b[2J")] == [1, 1]
    assert by_domain["in-domain"]["ROUGE_L"] == pytest.approx(1)
    assert by_domain["out-domain\x1b[2J"]["ROUGE_L"] < 0.5
    assert any(line.startswith("  out-domain\\x1b[2J: 1 pictures, CIDEr") for line in scores.lines)


def test_a_checkpoint_of_coco_captioning_serves_nocaps():
    assert CaptioningSettings.trains_as == NoCapsSettings.trains_as == "coco_captioning"


def test_a_released_checkpoint_is_known_to_have_learned_captions_of_32_tokens():
    assert CaptioningSettings.published == NoCapsSettings.published == {"num_max_bpe_tokens": 32}
