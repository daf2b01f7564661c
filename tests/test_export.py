"""Exported models: the files compute what PyTorch computes, the examples say what the toolkit says, mistakes are told.

The models have made weights, whose answers and captions depend on picture and text.
"""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beit3.data.tokenizer import EOS_ID
from beit3.model.names import REGISTERED
from beit3.model.weights import write_weights
from inference import export, load
from inference.command_line import main
from modeling_finetune import create_model, register
from tasks import TASKS
from tasks.captioning.generation import generate
from tests import reference
from tests.test_inference import run_code
from tests.test_settings import coco  # noqa: F401  a fixture

ROOT = Path(__file__).parent.parent
LONGEST = {"vqav2": 12, "coco_captioning": 16}
SLOPE, OFFSET = 0.7, -1.5
QUESTIONS = ["what is it?", "how many circles are there?", "is there a red square, and where?", "what  colour"]

missing = [name for name in export.PACKAGES if importlib.util.find_spec(name) is None]


def needs_packages(test):
    """Exports, or works on what was exported: ten seconds a model."""
    reason = f"requirements-export.txt is not installed: {', '.join(missing)} missing"
    return pytest.mark.slow(pytest.mark.skipif(bool(missing), reason=reason)(test))


def write_checkpoint(folder, task, coco):
    """A checkpoint of the tiny model for a task."""
    suffix = {"vqav2": "vqav2", "coco_captioning": "captioning"}[task]
    name = f"beit3_tiny_patch16_64_{suffix}"
    said = {
        "format": 2, "task": task, "model": name, "image_size": 64, "vocab_size": 120,
        "num_max_bpe_tokens": LONGEST[task],
    }  # fmt: skip
    options = {}
    if task == "vqav2":
        lines = (coco / "answer2label.txt").read_text().splitlines()
        said["answers"] = [json.loads(line)["answer"] for line in lines]
        said["calibration"] = {
            "slope": SLOPE, "offset": OFFSET, "error_before": 0.2, "error_after": 0.1, "rows": 40,
        }  # fmt: skip
        options = {"num_classes": len(lines) + 2}  # a head may have more outputs than answers
    model = create_model(name, vocab_size=120, **options)
    reference.fill(model, seed=3)
    with torch.no_grad():  # the larger the weights, the more what is said depends on what is seen
        for parameter in model.parameters():
            parameter.mul_(2.0 if parameter.ndim > 1 else 1.0)
        if task == "coco_captioning":
            model.mlm_head.weight.mul_(1.5)
            model.mlm_head.bias[EOS_ID] += 4  # captions of several lengths
    write_weights(folder, model.state_dict(), said, (coco / "mini.spm").read_bytes())
    return folder


@pytest.fixture(scope="module")
def checkpoints(coco, tmp_path_factory):
    return {task: write_checkpoint(tmp_path_factory.mktemp(task) / "checkpoint-best", task, coco) for task in LONGEST}


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory):
    """(task, precision) → the .json file of its export."""
    found = {}
    for task, checkpoint in checkpoints.items():
        for precision, flags in (("fp32", []), ("int8", ["--int8"])):
            folder = tmp_path_factory.mktemp("exported")
            assert main(["export", str(checkpoint), str(folder / "m.onnx"), *flags]) == 0
            found[task, precision] = folder / "m.json"
    return found


@pytest.fixture(scope="module")
def pictures(coco, tmp_path_factory):
    """Pictures of the data, one of them as a phone stores it, a grey one and one with transparency."""
    folder = tmp_path_factory.mktemp("pictures")
    found = sorted((coco / "test2015").iterdir())[:6]
    with Image.open(found[0]) as image:
        exif = Image.Exif()
        exif[0x0112] = 6
        image.crop((0, 0, image.width, image.height // 2)).save(folder / "phone.png", exif=exif)
        image.convert("L").save(folder / "grey.png")
        image.convert("RGBA").save(folder / "transparent.png")
    return [*found, folder / "phone.png", folder / "grey.png", folder / "transparent.png"]


def example(name):
    """An example as a module; it is no part of a package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# what is written


@needs_packages
def test_beside_a_model_lies_all_that_an_application_has_to_know(exported, checkpoints, coco):
    file = exported["vqav2", "fp32"]
    assert sorted(each.name for each in file.parent.iterdir()) == ["m.json", "m.onnx", "m.onnx.data", "m.spm"]
    said, model = json.loads(file.read_text()), load(checkpoints["vqav2"])
    assert said["answers"] == model.task.answers and len(said["answers"]) > 10
    assert said["calibration"] == {"slope": SLOPE, "offset": OFFSET} and said["calibrated"] is True
    assert (said["image_size"], said["longest_text"], said["precision"]) == (64, 12, "fp32")
    mask = model.task.tokenizer.mask_id
    assert said["special_tokens"] == {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": mask}
    assert said["files"] == {"model": "m.onnx", "tokenizer": "m.spm"}
    assert (file.parent / "m.spm").read_bytes() == (coco / "mini.spm").read_bytes()
    writes = exported["coco_captioning", "fp32"]
    assert sorted(each.name for each in writes.parent.iterdir()) == [
        "m.encoder.onnx", "m.encoder.onnx.data", "m.json", "m.spm", "m.step.onnx", "m.step.onnx.data",
    ]  # fmt: skip
    said = json.loads(writes.read_text())
    assert said["files"] == {"encoder": "m.encoder.onnx", "step": "m.step.onnx", "tokenizer": "m.spm"}
    assert said["length_penalty"] == 0.6 and said["longest_text"] == 16 and "answers" not in said


@needs_packages
def test_int8_takes_less_room(exported):
    for task in LONGEST:
        sizes = [
            sum(file.stat().st_size for file in exported[task, precision].parent.iterdir())
            for precision in ("fp32", "int8")
        ]
        assert sizes[1] < 0.45 * sizes[0], task  # tables of words and positions stay as they are
        names = [sorted(each.name for each in exported[task, of].parent.iterdir()) for of in ("fp32", "int8")]
        assert names[0] == names[1]
        rights = {file.stat().st_mode for file in exported[task, "int8"].parent.iterdir()}
        assert rights == {exported[task, "fp32"].stat().st_mode}
    assert json.loads(exported["vqav2", "int8"].read_text())["precision"] == "int8"


@needs_packages
@pytest.mark.parametrize(("count", "length"), [(1, 1), (1, 12), (4, 3), (2, 30)])
def test_logits_are_those_of_pytorch_for_any_number_and_length(exported, checkpoints, count, length):
    import onnxruntime

    file = exported["vqav2", "fp32"].with_suffix(".onnx")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(count)
    image = random.integers(0, 256, (count, 3, 64, 64), np.uint8)
    ids = random.integers(0, 120, (count, length))
    mask = np.arange(length) >= random.integers(1, length + 1, (count, 1))
    [logits] = session.run(None, {"image": image, "token_ids": ids, "padding_mask": mask})
    model = load(checkpoints["vqav2"], device="cpu")
    with torch.no_grad():
        normalised = torch.from_numpy(image).float() / 127.5 - 1
        wanted = model.model(image=normalised, question=torch.from_numpy(ids), padding_mask=torch.from_numpy(mask))
    assert logits.shape == (count, len(model.task.answers)) == (count, wanted.shape[1] - 2)
    assert np.abs(logits - wanted[:, :-2].numpy()).max() < 1e-4
    assert wanted.std() > 0.5  # else nearly anything would be as near


# the examples


@needs_packages
def test_the_example_answers_as_the_toolkit_does(exported, checkpoints, pictures):
    answer, model = example("answer_with_onnx").answer, load(checkpoints["vqav2"], device="cpu")
    seen = set()
    for picture in pictures:
        for question in QUESTIONS:
            wanted = model.answer(picture, question, top=3)
            found = answer(exported["vqav2", "fp32"], picture, question)
            assert [text for text, _ in found] == [each.text for each in wanted]
            # Pillow and PyTorch resize within one grey level of each other.
            assert [sure for _, sure in found] == pytest.approx([each.confidence for each in wanted], abs=0.02)
            seen.add(found[0][0])
    assert len(seen) >= 3  # the answer depends on what is asked


@needs_packages
def test_the_example_makes_the_ids_of_the_tokenizer(checkpoints, coco):
    import sentencepiece

    tokenizer = load(checkpoints["vqav2"]).task.tokenizer
    spm = sentencepiece.SentencePieceProcessor(model_file=str(coco / "mini.spm"))
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": tokenizer.mask_id}
    texts = [*QUESTIONS, "", "  two  spaces ", "漢字 and text", "a <mask> b", "a</s>b <unk><pad>", "<mask>", "x <s> y"]
    ids = [example("answer_with_onnx").text_ids(text, spm, special) for text in texts]
    assert ids == [tokenizer.encode(text) for text in texts]
    assert 3 in ids[6] and tokenizer.mask_id in ids[7]


@needs_packages
def test_a_question_that_is_too_long_is_cut_as_the_toolkit_cuts_it(exported, checkpoints, pictures):
    question = "what colour is the " + "large " * 30 + "circle?"
    wanted = load(checkpoints["vqav2"], device="cpu").answer(pictures[0], question, top=1)[0]
    [(text, sure)] = example("answer_with_onnx").answer(exported["vqav2", "fp32"], pictures[0], question, top=1)
    assert text == wanted.text and sure == pytest.approx(wanted.confidence, abs=0.02)


@needs_packages
@pytest.mark.parametrize("penalty", [0.6, 0.0, 1.2, 2.0])
def test_the_greedy_example_gives_the_tokens_of_the_search(exported, checkpoints, penalty):
    """With a high exponent the search goes on behind the first `</s>`, as a longer caption may be better."""
    import onnxruntime

    file = exported["coco_captioning", "fp32"]
    about = {**json.loads(file.read_text()), "length_penalty": penalty}
    encoder, step = (
        onnxruntime.InferenceSession(file.parent / about["files"][part], providers=["CPUExecutionProvider"])
        for part in ("encoder", "step")
    )
    model = load(checkpoints["coco_captioning"], device="cpu")
    images = np.random.default_rng(1).integers(0, 256, (12, 3, 4, 4), np.uint8).repeat(16, 2).repeat(16, 3)
    captions = generate(
        model.model,
        torch.from_numpy(images).float() / 127.5 - 1,
        mask_id=model.task.tokenizer.mask_id,
        num_beams=1,
        max_tokens=16,
        length_penalty=penalty,
    )
    wanted = captions.best()
    found = [example("caption_with_onnx").greedy(encoder, step, image[None], about) for image in images]
    assert found == wanted
    lengths = {len(each) for each in wanted}
    assert len(lengths) > 3 if penalty < 1 else 13 in lengths
    assert len({tuple(each) for each in wanted}) > 6


@needs_packages
def test_the_example_captions_as_the_toolkit_does(exported, checkpoints, pictures):
    model = load(checkpoints["coco_captioning"], device="cpu")
    for picture in pictures:
        found = example("caption_with_onnx").caption(exported["coco_captioning", "fp32"], picture)
        assert found == model.caption(picture, num_beams=1).text


@needs_packages
def test_the_examples_run_without_this_toolkit(exported, pictures, checkpoints, tmp_path):
    """Copied elsewhere, and with nothing of PyTorch."""
    shutil.copy(ROOT / "examples" / "answer_with_onnx.py", tmp_path)
    code = (
        "import sys, runpy\nsys.argv = ['answer_with_onnx.py', *sys.argv[1:]]\n"
        "runpy.run_path('answer_with_onnx.py', run_name='__main__')\n"
        "print(sorted({'torch', 'beit3', 'transformers'} & set(sys.modules)))"
    )
    argv = [sys.executable, "-c", code, exported["vqav2", "fp32"], pictures[0], QUESTIONS[0]]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        argv, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True, env=environment
    )  # fmt: skip
    *lines, loaded = done.stdout.splitlines()
    best = load(checkpoints["vqav2"], device="cpu").answer(pictures[0], QUESTIONS[0], top=3)
    assert loaded == "[]" and [line.rsplit("  ", 1)[0] for line in lines] == [each.text for each in best]


@needs_packages
def test_int8_says_nearly_the_same(exported, checkpoints, pictures):
    model = load(checkpoints["vqav2"], device="cpu")
    asked = [(picture, question) for picture in pictures for question in QUESTIONS]
    wanted = [model.answer(*each, top=1)[0].text for each in asked]
    found = [example("answer_with_onnx").answer(exported["vqav2", "int8"], *each)[0][0] for each in asked]
    assert np.mean([a == b for a, b in zip(wanted, found, strict=True)]) > 0.7


# what is told


@needs_packages
def test_the_score_is_told_beside_pytorchs(checkpoints, coco, tmp_path, capsys):
    argv = ["export", str(checkpoints["vqav2"]), str(tmp_path / "m.onnx"), "--data_path", str(coco), "--int8"]
    assert main(argv) == 0
    *_, line = [line for line in capsys.readouterr().out.splitlines() if line.startswith("score on val")]
    model, right = load(checkpoints["vqav2"], device="cpu"), []
    lines = [json.loads(line) for line in (coco / "vqa.rest_val.jsonl").read_text().splitlines()]
    for row in lines:
        question = model.task.tokenizer.decode(row["text_segment"]) if "text_segment" in row else row["question"]
        text = model.answer(coco / row["image_path"], question, top=1)[0].text
        right.append(dict(zip(row["labels"], row["scores"], strict=True)).get(model.task.answers.index(text), 0.0))
    told = line.replace(";", "").replace(",", "").split()
    assert told[5:7] == ["int8", told[6]] and told[-1] == "PyTorch"
    assert float(told[-2]) == pytest.approx(100 * np.mean(right), abs=0.01)
    assert math.isfinite(float(told[3]))


@needs_packages
def test_files_that_compute_something_else_are_not_left(checkpoints, tmp_path, capsys, monkeypatch):
    from inference import onnx_parts

    monkeypatch.setattr(onnx_parts, "HIDDEN", 0.0)  # padding is seen
    assert main(["export", str(checkpoints["vqav2"]), str(tmp_path / "m.onnx")]) == 1
    assert "nothing was written" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@needs_packages
def test_files_that_are_there_stay_unless_they_are_to_be_written_anew(checkpoints, tmp_path, capsys):
    (tmp_path / "m.json").write_text("mine")
    argv = ["export", str(checkpoints["vqav2"]), str(tmp_path / "m.onnx")]
    assert main(argv) == 2 and "m.json: is there already" in capsys.readouterr().err
    assert (tmp_path / "m.json").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    assert main([*argv, "--overwrite"]) == 0
    assert "answers" in json.loads((tmp_path / "m.json").read_text())


def test_without_the_packages_it_says_how_to_get_them(checkpoints, tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    monkeypatch.setattr(export, "PACKAGES", ("onnxscript", "json"))
    assert main(["export", str(checkpoints["vqav2"]), str(tmp_path / "m.onnx")]) == 2
    wanted = "error: exporting needs onnxscript: pip install -r requirements-export.txt\n"
    assert capsys.readouterr().err == wanted


def test_a_task_that_neither_answers_nor_writes_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "colour", "tests.toy_task:ColourSettings")
    monkeypatch.setitem(REGISTERED, "imageclassification", [("tiny", 64), *REGISTERED["imageclassification"]])
    register("imageclassification", "tiny", 64)
    monkeypatch.setattr(export, "PACKAGES", ())
    name = "beit3_tiny_patch16_64_imageclassification"
    said = {"format": 2, "task": "colour", "model": name, "image_size": 64, "vocab_size": 8}
    state = create_model(name, vocab_size=8, num_classes=3).state_dict()
    write_weights(tmp_path / "c", state, said, None)
    assert main(["export", str(tmp_path / "c"), str(tmp_path / "m.onnx")]) == 2
    assert "a model for colour has neither answers nor captions" in capsys.readouterr().err


def test_every_wrong_input_is_one_sentence_and_status_2(checkpoints, coco, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "PACKAGES", ())
    answers, captions, output = checkpoints["vqav2"], checkpoints["coco_captioning"], tmp_path / "m.onnx"
    refusals = [
        ([tmp_path / "no", output], "no such checkpoint"),
        ([answers, tmp_path / "m.bin"], "a name that ends in .onnx is wanted"),
        ([answers, tmp_path / "no" / "m.onnx"], "is not there"),
        ([answers, output, "--batch_size", "0"], "--batch_size 0: at least 1 is wanted"),
        ([answers, output, "--image_path", coco], "--image_path: goes with --data_path"),
        ([answers, output, "--data_path", tmp_path / "no"], "no such folder"),
        ([answers, output, "--data_path", tmp_path], "vqa.rest_val.jsonl not found"),
        ([answers, output, "--data_path", coco, "--split", "train"], "--split train: one of test, test-dev, val"),
        ([captions, output, "--data_path", coco], "--data_path: for models that answer"),
        ([answers, output, "--tokenizer", tmp_path / "no.spm"], "no such file"),
    ]
    for argv, wanted in refusals:
        assert main(["export", *map(str, argv)]) == 2, argv
        said = capsys.readouterr()
        assert wanted in said.err and said.err.startswith("error: ") and said.out == "", (argv, said)
        assert len(said.err.splitlines()) == 1, said.err


@needs_packages
def test_a_split_without_right_answers_is_refused(checkpoints, coco, tmp_path, capsys):
    argv = ["export", checkpoints["vqav2"], tmp_path / "m.onnx", "--data_path", coco, "--split", "test"]
    assert main([str(each) for each in argv]) == 2
    assert "the right answers are not known" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_help_and_mistakes_load_no_pytorch(checkpoints, tmp_path):
    code = (
        "import sys\nfrom inference import export\nexport.PACKAGES = ()\n"
        f"assert export.main([{str(checkpoints['vqav2'])!r}, {str(tmp_path / 'm.bin')!r}]) == 2\n"
        "try:\n    export.main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print('torch' in sys.modules)"
    )
    done = run_code(code)
    assert done.stdout.endswith("False\n") and "--int8" in done.stdout
