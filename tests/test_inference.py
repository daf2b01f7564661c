"""Asking a trained model, from Python and from the shell: the same answers as the benchmark's; every wrong input."""

import io
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

import run_beit3_finetuning as run
from beit3.data.images import ImageError, decode_image
from beit3.model.description import about
from beit3.model.weights import write_weights
from beit3.system.errors import InputError
from inference import Answer, Caption, load
from inference.command_line import line_of, main, split_question
from inference.opening import newest_checkpoint, open_checkpoint
from inference.pictures import load_pixels
from tests.test_run import tiny_flags
from tests.test_settings import coco  # noqa: F401  a fixture

ROOT = Path(__file__).parent.parent
LENGTHS = {"vqav2": 12, "coco_captioning": 16}


@pytest.fixture(scope="module")
def trained(coco, tmp_path_factory):
    """Task → the best checkpoint of a short run."""
    folders = {}
    for task, length in LENGTHS.items():
        out = tmp_path_factory.mktemp(task) / "out"
        assert run.main(tiny_flags(coco, out, task=task, num_max_bpe_tokens=length, epochs=1, warmup_epochs=0)) == 0
        folders[task] = out / "checkpoint-best"
    return folders


@pytest.fixture(scope="module")
def predicted(coco, trained, tmp_path_factory):
    """Task → (the submission, predictions.jsonl) of its test pictures."""
    results = {}
    for task, checkpoint in trained.items():
        out = tmp_path_factory.mktemp("predicted")
        flags = ["--eval", "--finetune", checkpoint, "--data_path", coco, "--output_dir", out, "--num_workers", "0"]
        with pytest.MonkeyPatch.context() as patch:  # METEOR and SPICE need Java and half a minute
            from tasks.captioning import task as captioning
            from tasks.captioning.scores.scores import caption_metrics

            patch.setattr(captioning, "caption_metrics", lambda *a, **_: caption_metrics(*a, meteor=False, spice=False))
            assert run.main([str(flag) for flag in [*flags, "--device", "cpu"]]) == 0
        submission = json.loads((out / f"submit_{task}_test.json").read_text())
        rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
        results[task] = submission, rows
    return results


@pytest.fixture(scope="module")
def answering(trained):
    return load(trained["vqav2"])


@pytest.fixture(scope="module")
def captioning(trained):
    return load(trained["coco_captioning"])


@pytest.fixture(scope="module")
def picture(coco):
    return sorted((coco / "test2015").iterdir())[0]


def questions_of(coco):
    file = coco / "vqa" / "v2_OpenEnded_mscoco_test2015_questions.json"
    return {q["question_id"]: q["question"] for q in json.loads(file.read_text())["questions"]}


# as in the benchmark


def test_answers_are_those_of_the_submission(coco, answering, predicted):
    submission, rows = predicted["vqav2"]
    questions = questions_of(coco)
    pictures = [coco / row["image"] for row in rows]
    asked = [questions[row["question_id"]] for row in rows]
    told = answering.answer(pictures, asked, top=5)
    assert [each[0].text for each in told] == [entry["answer"] for entry in submission]
    assert len(told) == 84
    for answers, row in zip(told, rows, strict=True):
        assert [each.text for each in answers] == [each["answer"] for each in row["top"]]
        confidences = [each.confidence for each in answers]
        assert confidences == pytest.approx([each["confidence"] for each in row["top"]], abs=2e-5)
        assert confidences == sorted(confidences, reverse=True) and 0 < confidences[-1] <= confidences[0] < 1


def test_captions_are_those_of_the_submission(coco, captioning, predicted):
    submission, rows = predicted["coco_captioning"]
    told = captioning.caption([coco / row["image"] for row in rows])
    assert [each.text for each in told] == [entry["caption"] for entry in submission]
    assert [each.score for each in told] == pytest.approx([row["score"] for row in rows], abs=1e-4)


def test_rows_of_predictions_say_what_was_asked_said_and_right(coco, predicted):
    submission, rows = predicted["vqav2"]
    lines = [json.loads(line) for line in (coco / "vqa.test.jsonl").read_text().splitlines()]
    questions = questions_of(coco)
    for row, line, entry in zip(rows, lines, submission, strict=True):
        assert row["question_id"] == line["qid"] and row["image"] == line["image_path"]
        assert row["question"].split() == questions[line["qid"]].split()  # the tokenizer folds spaces
        assert row["answer"] == entry["answer"] == row["top"][0]["answer"]
        assert row["confidence"] == row["top"][0]["confidence"] and len(row["top"]) == 5
        assert "right_answers" not in row and "score" not in row  # nobody knows them in the test split
    assert predicted["coco_captioning"][1][0].keys() == {"image_id", "image", "caption", "score"}


def test_where_the_right_answers_are_known_they_and_the_score_are_told(coco, trained, tmp_path):
    flags = ["--eval", "--split", "val", "--finetune", trained["vqav2"], "--data_path", coco, "--output_dir", tmp_path]
    assert run.main([str(flag) for flag in [*flags, "--num_workers", "0", "--device", "cpu"]]) == 0
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    answers = [json.loads(line)["answer"] for line in (coco / "answer2label.txt").read_text().splitlines()]
    lines = [json.loads(line) for line in (coco / "vqa.rest_val.jsonl").read_text().splitlines()]
    assert len(rows) == len(lines) > 0
    for row, line in zip(rows, lines, strict=True):
        right = dict(zip((answers[label] for label in line["labels"]), line["scores"], strict=True))
        assert row["right_answers"] == pytest.approx(right)
        assert row["score"] == pytest.approx(right.get(row["answer"], 0.0))


def test_validation_puts_the_calibration_into_the_checkpoint(trained, answering):
    """The same two numbers from the rows of predictions.jsonl would need the logits; here it is enough that they stand
    there, are used, and say what they brought."""
    said = about(trained["vqav2"]).description["calibration"]
    assert said["rows"] > 30 and 0 <= said["error_after"] <= 1 and said["slope"] > 0
    assert answering.calibrated and answering.task.calibration.slope == said["slope"]
    assert "calibration" not in about(trained["coco_captioning"]).description


# what is given and what comes


def test_one_picture_gives_answers_and_a_list_gives_lists(answering, picture):
    one = answering.answer(picture, "what is it?", top=2)
    assert [type(each) for each in one] == [Answer, Answer]
    for [best] in answering.answer([picture, picture], "what is it?", top=1):
        assert best.text == one[0].text and best.confidence == pytest.approx(one[0].confidence, abs=1e-5)
    assert answering.answer([], "what is it?") == []


def test_one_picture_gives_a_caption_and_more_are_listed(captioning, picture):
    one = captioning.caption(picture)
    assert type(one) is Caption and one.score < 0
    assert captioning.caption([str(picture)]) == [one]
    several = captioning.caption(picture, num_beams=4, top=3)
    assert len(several) == 3 and several == sorted(several, key=lambda each: -each.score)
    assert captioning.caption(picture) == one  # as before, three beams and one caption


def test_every_kind_of_picture_is_the_same_picture(answering, picture):
    with Image.open(picture) as opened:
        image = opened.convert("RGB")
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    wanted = load_pixels(image)
    for same in (array, tensor, np.dstack([array, np.full(array.shape[:2], 7, np.uint8)])):
        assert torch.equal(load_pixels(same), wanted)
    grey = np.array(image.convert("L"))
    for same in (grey, grey[:, :, None], torch.from_numpy(grey)[None], image.convert("L")):
        assert torch.equal(load_pixels(same), torch.from_numpy(grey).expand(3, -1, -1))
    answers = [answering.answer(each, "what is it?")[0].text for each in (image, array, tensor)]
    assert len(set(answers)) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "PIL"])
def test_a_photo_of_a_phone_stands_upright(tmp_path, orientation, kind):
    pixels = np.zeros((48, 96, 3), np.uint8)
    pixels[:24, :48] = (250, 10, 10)
    pixels[24:, 48:] = (10, 10, 250)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"phone.{kind if kind != 'PIL' else 'png'}"
    image.save(file, exif=exif, **({"quality": 95} if kind == "jpg" else {"lossless": True} if kind == "webp" else {}))
    with Image.open(file) as opened:
        upright = np.array(ImageOps.exif_transpose(opened).convert("RGB")).astype(int)
        found = load_pixels(opened if kind == "PIL" else file).permute(1, 2, 0).numpy().astype(int)
    assert found.shape == upright.shape
    assert np.abs(found - upright).max() <= (2 if kind == "jpg" else 0)


@pytest.mark.parametrize(
    "wrong",
    [3, None, b"bytes", np.zeros((4, 4), np.float32), np.zeros((4, 4, 5), np.uint8), np.zeros((0, 4, 3), np.uint8),
     torch.zeros(4, 4, 3, dtype=torch.uint8), torch.zeros(3, 4, 4)],
    ids=lambda wrong: f"{type(wrong).__name__} {getattr(wrong, 'shape', '')}",
)  # fmt: skip
def test_what_is_no_picture_is_refused_saying_what_is_wanted(wrong):
    with pytest.raises(InputError, match="is no picture; wanted a path, a PIL image"):
        load_pixels(wrong)


def test_a_file_that_is_no_picture_is_named(answering, tmp_path):
    (tmp_path / "a.jpg").write_text("no picture")
    with pytest.raises(ImageError, match=r"a\.jpg"):
        answering.answer(tmp_path / "a.jpg", "what is it?")


def damaged_png(file):
    """Its checksums are right and its pixels are not."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    start = content.index(b"IDAT")
    length = int.from_bytes(content[start - 4 : start], "big")
    content[start + 4 + length // 2 : start + 4 + length // 2 + 40] = b"\xff" * 40
    checksum = zlib.crc32(content[start : start + 4 + length])
    content[start + 4 + length : start + 8 + length] = checksum.to_bytes(4, "big")
    file.write_bytes(content)
    return file


def test_a_damaged_picture_is_refused_upright_too(tmp_path):
    file = damaged_png(tmp_path / "a.png")
    for upright in (False, True):
        with pytest.raises(ImageError, match=r"a\.png"):
            decode_image(file, upright=upright)


def test_a_pillow_image_that_cannot_be_read_any_more_is_an_image_error(picture, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(picture.read_bytes()[:700])
    with Image.open(tmp_path / "cut.jpg") as image, pytest.raises(ImageError, match="cannot be decoded"):
        load_pixels(image)
    with pytest.raises(InputError, match="70,?000|70000"):
        load_pixels(np.zeros((1, 70000), np.uint8))


@pytest.mark.parametrize("question", ["", "  \n", None, 7])
def test_an_empty_question_is_refused(answering, picture, question):
    with pytest.raises((InputError, TypeError)):
        answering.answer(picture, question)


def test_a_question_that_the_tokenizer_does_not_know_is_refused_with_the_share(answering, picture):
    with pytest.raises(InputError, match=r"50 % of its 2 tokens are unknown to the tokenizer"):
        answering.answer(picture, "漢字漢字")


def test_a_model_is_asked_for_what_it_can_do(answering, captioning, picture):
    with pytest.raises(InputError, match="answers questions and writes no captions"):
        answering.caption(picture)
    with pytest.raises(InputError, match="writes captions and answers no questions"):
        captioning.answer(picture, "what is it?")
    with pytest.raises(InputError, match="2 questions for 1 pictures"):
        answering.answer(picture, ["a?", "b?"])
    with pytest.raises(InputError, match="from 1 to the number of beams, 3"):
        captioning.caption(picture, top=4)
    for top in (0, 6):
        with pytest.raises(InputError, match="from 1 to 5 answers are told"):
            answering.answer(picture, "what is it?", top=top)


def test_weights_that_give_no_numbers_end_in_an_error(trained, tmp_path, picture):
    shutil.copytree(trained["vqav2"], tmp_path / "c")
    state = load_file(tmp_path / "c" / "model.safetensors")
    state["head.0.weight"] = torch.full_like(state["head.0.weight"], 3e38)
    said = about(trained["vqav2"]).description
    write_weights(tmp_path / "c", state, said, (tmp_path / "c" / "tokenizer.spm").read_bytes())
    with pytest.raises(FloatingPointError, match="not finite for picture 1 of 1"):
        load(tmp_path / "c").answer(picture, "what is it?")


# checkpoints


def released(trained, folder, task="vqav2"):
    """The same weights as a file that says nothing of itself."""
    file = folder / "beit3_tiny.pth"
    torch.save({"model": load_file(trained[task] / "model.safetensors")}, file)
    return file


def test_a_released_file_needs_tokenizer_and_answers(trained, answering, coco, picture, tmp_path):
    file = released(trained, tmp_path)
    with pytest.raises(InputError) as caught:
        open_checkpoint(file)
    assert [problem.removeprefix(f"{file}: ")[:40] for problem in caught.value.problems] == [
        "holds no tokenizer; name it: SPM=beit3.s", "does not say what its answers are; name ",
    ]  # fmt: skip
    model = load(file, tokenizer=coco / "mini.spm", answers=coco / "answer2label.txt")
    assert not model.calibrated
    wanted = answering.answer(picture, "what is it?", top=3)
    assert [each.text for each in model.answer(picture, "what is it?", top=3)] == [each.text for each in wanted]


def test_answers_that_do_not_fit_the_head_are_refused(trained, coco, tmp_path):
    file, short = released(trained, tmp_path), tmp_path / "answers.txt"
    short.write_text("".join((coco / "answer2label.txt").read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match=r"its head has \d+ answers, --answers .* has \d+"):
        open_checkpoint(file, tokenizer=coco / "mini.spm", answers=short)
    with pytest.raises(InputError, match="holds its own list of answers"):
        open_checkpoint(trained["vqav2"], answers=short)
    with pytest.raises(InputError, match="has no list of answers"):
        open_checkpoint(trained["coco_captioning"], answers=short)


def test_what_is_no_checkpoint_to_ask_is_refused_in_a_sentence(trained, coco, tmp_path):
    with pytest.raises(InputError, match="no such checkpoint"):
        open_checkpoint(tmp_path / "nothing")
    encoder = {n: t for n, t in load_file(trained["vqav2"] / "model.safetensors").items() if n.startswith("beit3.")}
    torch.save(encoder, tmp_path / "pretrained.pth")
    with pytest.raises(InputError, match="has no head that answers or captions, so it was not fine-tuned"):
        open_checkpoint(tmp_path / "pretrained.pth")
    with pytest.raises(InputError, match="made for the task vqav2, asked for coco_captioning"):
        open_checkpoint(trained["vqav2"], task="coco_captioning")
    with pytest.raises(InputError, match="for the task 'chess'"):
        open_checkpoint(trained["vqav2"], task="chess")
    with pytest.raises(InputError, match="no such file"):
        open_checkpoint(trained["vqav2"], tokenizer=tmp_path / "no.spm")


def test_the_newest_best_checkpoint_is_found(trained, tmp_path):
    with pytest.raises(InputError, match="no checkpoint named"):
        newest_checkpoint(tmp_path)
    for number, name in enumerate(["a", "b", "."]):
        shutil.copytree(trained["vqav2"], tmp_path / name / "checkpoint-best")
        os.utime(tmp_path / name / "checkpoint-best" / "model.safetensors", (10**9, 10**9 + 100 * (number != 1)))
    os.utime(tmp_path / "b" / "checkpoint-best" / "model.safetensors", (10**9, 10**9 + 500))
    assert newest_checkpoint(tmp_path) == tmp_path / "b" / "checkpoint-best"


# the shell


def ask(*argv, **environment):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "inference", *map(str, argv)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}, check=False
    )


def run_code(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )


def test_one_line_answers_one_picture(trained, answering, picture):
    said = ask(picture, "what is it?", FINETUNE=str(trained["vqav2"]))
    assert said.returncode == 0 and said.stderr == ""
    answers = answering.answer(picture, "what is it?", top=3)
    assert said.stdout == " · ".join(f"{each.text} {each.confidence:.2f}" for each in answers) + "\n"


def test_rows_of_json_and_several_pictures(trained, captioning, picture, capsys):
    assert main([str(picture), str(picture), "--checkpoint", str(trained["coco_captioning"]), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    best = captioning.caption(picture)
    assert [row["caption"] for row in rows] == [best.text] * 2
    assert rows[0].keys() == {"image", "caption", "score"}
    assert main([str(picture), str(picture), "--checkpoint", str(trained["coco_captioning"])]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{picture}: {best.text}"] * 2


def test_an_answer_below_the_confidence_asked_for_is_left_empty_and_says_so(trained, picture, capsys):
    argv = [str(picture), "what is it?", "--checkpoint", str(trained["vqav2"]), "--min_confidence", "1"]
    assert main([*argv, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["answer"] == "" and row["note"] == "below --min_confidence 1" and "top" not in row
    assert main(argv) == 0
    assert capsys.readouterr().out.startswith("not sure enough: 0.")


def refusals(trained, picture, tmp_path):
    empty, broken = tmp_path / "empty", tmp_path / "broken.jpg"
    empty.mkdir()
    broken.write_bytes(b"\xff\xd8\xff\xe0no")
    (tmp_path / "t.csv").write_text("picture,question\na.jpg,what?\n")
    answers, captions = trained["vqav2"], trained["coco_captioning"]
    return [
        ([picture, "--checkpoint", answers], "the model answers questions, and none is asked"),
        ([picture, "what?", "--checkpoint", captions], "the model writes captions and answers no questions"),
        ([picture, "  ", "--checkpoint", answers], "the question is empty"),
        ([picture, "漢字漢字", "--checkpoint", answers], "unknown to the tokenizer"),
        ([tmp_path / "none.jpg", "what?", "--checkpoint", answers], "none.jpg: no such file or folder"),
        ([tmp_path / "*.gif", "what?", "--checkpoint", answers], "no file fits the pattern"),
        ([empty, "what?", "--checkpoint", answers], "no picture in this folder"),
        ([broken, "what?", "--checkpoint", answers], "broken.jpg"),
        ([tmp_path / "t.csv", "--checkpoint", answers], "has no column image; its columns are picture, question"),
        ([tmp_path / "t.csv", "what?", "--checkpoint", answers], "has its questions in the column question"),
        ([tmp_path / "u.csv", "--checkpoint", answers], "u.csv: no such file"),
        ([picture, "what?", "--checkpoint", tmp_path / "no"], "no such checkpoint"),
        ([picture, "what?", "--checkpoint", answers, "--beams", "2"], "--beams: for captions"),
        ([picture, "--checkpoint", captions, "--min_confidence", "0.5"], "--min_confidence: for answers"),
        ([picture, "--checkpoint", captions, "--top", "4"], "--top 4: no more captions than --beams, 3"),
        ([picture, "what?", "--checkpoint", answers, "--output", "a.txt"], "are the kinds of files"),
        ([picture, "what?", "--checkpoint", answers, "--top", "6"], "--top 6: 5 answers are the most"),
        ([picture, "more/", "--checkpoint", answers], "none is asked"),
        ([picture, "more/*", "--checkpoint", answers], "none is asked"),
        ([picture, "what?", "--checkpoint", answers, "--output", tmp_path / "no" / "a.csv"], "is not there"),
        ([picture, "what?", "--checkpoint", answers, "--device", "cuda:9"], "--device cuda"),
        ([picture, "what?", "--checkpoint", answers, "--device", "abacus"], "abacus"),
    ]


def test_every_wrong_input_is_one_sentence_and_status_2(trained, picture, tmp_path, capsys):
    for argv, wanted in refusals(trained, picture, tmp_path):
        assert main([str(each) for each in argv]) == 2, argv
        said = capsys.readouterr()
        assert wanted in said.err and said.err.startswith("error: ") and said.out == "", (argv, said)
        assert len(said.err.splitlines()) == 1, said.err


def test_wrong_input_is_told_without_loading_pytorch(trained, picture):
    code = (
        "import sys\nfrom inference.command_line import main\n"
        f"assert main([{str(picture)!r}, '--checkpoint', {str(trained['vqav2'])!r}]) == 2\n"
        "print(sorted({'torch', 'torchvision', 'timm'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


def test_an_answer_needs_neither_deepspeed_nor_transformers_nor_torchvision(trained, picture):
    code = (
        "import sys\nfrom inference.command_line import main\n"
        f"assert main([{str(picture)!r}, 'what is it?', '--checkpoint', {str(trained['vqav2'])!r}]) == 0\n"
        "slow = {'deepspeed', 'transformers', 'tensorboard', 'torchvision', 'timm', 'sympy', 'pandas'}\n"
        "print(sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_last_argument_is_the_question_unless_it_is_a_file(picture, tmp_path):
    assert split_question(["a.jpg", "what?"], None) == (["a.jpg"], "what?")
    assert split_question(["a.jpg", "b.jpg"], None) == (["a.jpg", "b.jpg"], None)
    assert split_question(["a.jpg", str(tmp_path)], None) == (["a.jpg", str(tmp_path)], None)
    assert split_question(["a.jpg", "b.csv"], None) == (["a.jpg", "b.csv"], None)
    assert split_question(["a.jpg"], "what?") == (["a.jpg"], "what?")
    assert split_question(["a.jpg", "holiday/"], None) == (["a.jpg", "holiday/"], None)
    assert split_question(["a.jpg", "red or/and blue?"], None) == (["a.jpg"], "red or/and blue?")


def test_names_of_files_and_answers_cannot_move_the_cursor(trained, picture, tmp_path, capsys):
    nasty = tmp_path / "a\x1b[2J.png"
    with Image.open(picture) as opened:
        opened.save(nasty)
    assert main([str(nasty), str(nasty), "what is it?", "--checkpoint", str(trained["vqav2"])]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert line_of({"answer": "a", "confidence": 0.5}) == "a 0.50"


def test_whoever_reads_the_first_line_alone_sees_no_traceback(trained, picture):
    command = f"{sys.executable} -m inference {' '.join([str(picture)] * 40)} 'what is it?' --batch_size 1 | head -1"
    said = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "FINETUNE": str(trained["vqav2"])},
    )  # fmt: skip
    assert said.stdout.count("\n") == 1 and said.stderr == ""


def test_help_has_examples_and_loads_no_pytorch():
    code = (
        "import sys\nfrom inference.command_line import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\nprint('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.count("bash prediction.sh") >= 5 and done.stdout.endswith("False\n")
    buffer = io.StringIO(done.stdout)
    assert max(len(line.rstrip("\n")) for line in buffer) <= 120
