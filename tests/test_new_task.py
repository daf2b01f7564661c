"""A new task is its folder, its head and one line: `toy_task` goes the whole way through the real entry point, without
any text."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import modeling_finetune
import run_beit3_finetuning as run
from beit3.model.description import about
from beit3.model.names import REGISTERED
from beit3.training.checkpoints import read_fingerprint
from runs.command_line import help_text
from tasks import TASKS
from tests.toy_task import COLOURS

ROWS = {"train": 96, "val": 12, "test": 15}


@pytest.fixture(scope="module", autouse=True)
def one_line_more():
    """The line in `TASKS`; and the tiny size of a head that is registered for larger ones only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "colour", "tests.toy_task:ColourSettings")
        patch.setitem(REGISTERED, "imageclassification", [("tiny", 64), *REGISTERED["imageclassification"]])
        modeling_finetune.register("imageclassification", "tiny", 64)
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """One picture per row, of one colour; `label` says which."""
    folder = tmp_path_factory.mktemp("colours")
    (folder / "pictures").mkdir()
    for split, rows in ROWS.items():
        lines = []
        for row in range(rows):
            colour = [20 + row % 7] * 3
            colour[row % 3] = 200 + row % 11
            path = f"pictures/{split}{row}.png"
            Image.new("RGB", (70, 66), tuple(colour)).save(folder / path)
            lines.append(json.dumps({"image_path": path, "label": row % 3}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def training_flags(pictures, out):
    return [
        "--task", "colour", "--model", "beit3_tiny_patch16_64", "--vocab_size", "8", "--data_path", str(pictures),
        "--output_dir", str(out), "--batch_size", "8", "--epochs", "2", "--warmup_epochs", "0", "--lr", "1e-3",
        "--layer_decay", "1.0", "--num_workers", "0", "--save_ckpt_freq", "1", "--device", "cpu",
        "--logit_scale", "2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    assert run.main(training_flags(pictures, out)) == 0
    return out


def test_it_learns_and_its_best_epoch_is_kept(trained):
    epochs = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    assert [epoch["epoch"] for epoch in epochs] == [0, 1]
    best = max(epochs, key=lambda epoch: epoch["val_accuracy"])
    # A guess is right in a third of the pictures.
    assert best["val_accuracy"] > 60 and epochs[1]["train_loss"] < epochs[0]["train_loss"]
    said = about(trained / "checkpoint-best").description
    assert said["accuracy"] == best["val_accuracy"] and said["metric"] == "accuracy" and said["epoch"] == best["epoch"]
    assert said["task"] == "colour" and said["flags"]["logit_scale"] == 2.0


def test_there_is_no_tokenizer_anywhere(trained):
    checkpoint = about(trained / "checkpoint-best")
    assert checkpoint.tokenizer is None
    assert [key for key in checkpoint.description if "token" in key] == []
    assert sorted(file.name for file in (trained / "checkpoint-best").iterdir()) == ["model.safetensors"]
    full = full_checkpoints(trained)[-1]
    made = read_fingerprint(full)
    assert set(made["data"]) == {"training data", "validation data"}
    assert not [name for name in made["recipe"] if "token" in name or "sentencepiece" in name]
    assert torch.load(full, weights_only=True)["tokenizer"] is None


def full_checkpoints(out: Path) -> list[Path]:
    return sorted(out.glob("checkpoint-[0-9].pth"))


def test_an_interrupted_run_goes_on_to_the_same_weights(pictures, trained, tmp_path):
    """What was there after the first of two epochs; the same command then ends as the run that went through."""
    shutil.copy(full_checkpoints(trained)[0], tmp_path)
    assert run.main(training_flags(pictures, tmp_path)) == 0
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1]
    ended, wanted = (load_file(out / "checkpoint-last" / "model.safetensors") for out in (tmp_path, trained))
    assert ended.keys() == wanted.keys() and all(torch.equal(ended[name], wanted[name]) for name in wanted)


def test_its_flag_decides_the_steps_of_a_run(pictures, trained, tmp_path, capfd):
    shutil.copy(full_checkpoints(trained)[0], tmp_path)
    flags = [*training_flags(pictures, tmp_path), "--logit_scale", "3"]
    assert run.main(flags) == 2
    assert "logit_scale" in capfd.readouterr().err


def test_its_flag_is_told_by_help_and_bounded_and_nobody_elses(pictures, tmp_path, capfd):
    assert "--logit_scale" in help_text(whole=True) and "--task colour" in help_text(whole=True)
    assert "--logit_scale" not in help_text(whole=False) and "colour" in help_text(whole=False)
    assert run.main([*training_flags(pictures, tmp_path), "--logit_scale", "0"]) == 2
    assert "above 0" in capfd.readouterr().err
    assert run.main([*training_flags(pictures, tmp_path), "--task", "vqav2"]) == 2
    assert "--logit_scale: a flag of --task colour" in capfd.readouterr().err


def test_prediction_needs_the_checkpoint_and_the_data_only(pictures, trained, tmp_path):
    checkpoint = trained / "checkpoint-best"
    flags = ["--eval", "--finetune", str(checkpoint), "--data_path", str(pictures), "--output_dir", str(tmp_path)]
    assert run.main([*flags, "--num_workers", "0", "--device", "cpu"]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["colour_result_test.json"]  # it has no server to submit to
    right = json.loads((tmp_path / "colour_result_test.json").read_text())["right"]
    assert right == independent_count(pictures, checkpoint)


def independent_count(pictures, checkpoint):
    """How many test pictures the model answers right, by nothing of the house but the model itself."""
    model = modeling_finetune._entry_point("imageclassification", "tiny", 64)(vocab_size=8, num_classes=len(COLOURS))
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    right = 0
    for line in (pictures / "test.jsonl").read_text().splitlines():
        entry = json.loads(line)
        pixel = torch.tensor(Image.open(pictures / entry["image_path"]).getpixel((0, 0)))
        picture = ((pixel / 255 - 0.5) / 0.5)[None, :, None, None].expand(1, 3, 64, 64)
        with torch.no_grad():
            right += int(model.eval()(picture).argmax()) == entry["label"]
    return right
