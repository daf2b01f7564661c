"""The demo: official formats, answers and captions that are true of the pixels, scenes apart, same bytes each time."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from beit3.system.errors import InputError
from demo import make
from demo.contact_sheet import contact_sheet, describe_demo, describe_submission
from demo.make import Settings, main, make_demo, plan_pictures

TRAIN, VAL, TEST = 60, 40, 20
SIZES = {"train": TRAIN, "val": VAL, "test": TEST}
CELLS = ["top left", "top right", "bottom left", "bottom right"]
RGB = {"red": (214, 40, 40), "green": (38, 158, 72), "blue": (44, 92, 224), "yellow": (240, 190, 20)}
NUMBERS = {"a": 1, "one": 1, "two": 2, "three": 3}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return make_demo(tmp_path_factory.mktemp("made") / "demo", **SIZES)


@pytest.fixture(scope="module")
def full_plan() -> list[make.Picture]:
    return plan_pictures(Settings())


def _load(path: Path):
    return json.loads(path.read_text())


def _questions(demo: Path, subset: str) -> dict:
    return _load(demo / f"vqa/v2_OpenEnded_mscoco_{subset}_questions.json")


def _annotations(demo: Path, subset: str) -> dict:
    return _load(demo / f"vqa/v2_mscoco_{subset}_annotations.json")


def _images(demo: Path) -> list[dict]:
    return _load(demo / "dataset_coco.json")["images"]


# What is to be seen, found out from the pixels


def _see(path: Path) -> dict[str, tuple[str, str]]:
    """Cell → (colour, shape), from the pixels alone."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    scene = {}
    for number, cell in enumerate(CELLS):
        row, column = divmod(number, 2)
        part = pixels[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
        differing = np.abs(part - background).sum(axis=-1) > 90
        if differing.sum() < 60:
            assert differing.sum() < 8, f"{path}: something small in the {cell}"
            continue
        color = np.median(part[differing], axis=0)
        step = color - background
        covered = ((part - background) @ step / (step @ step)).clip(0, 1)  # part of each pixel
        filled = covered.sum() / (covered.sum(axis=0).max() * covered.sum(axis=1).max())
        # Of the bounding box: square 1, circle pi / 4 = 0.79, triangle 1 / 2
        shape = "square" if filled > 0.9 else "circle" if filled > 0.65 else "triangle"
        scene[cell] = (min(RGB, key=lambda name: np.abs(np.array(RGB[name]) - color).sum()), shape)
    return scene


def _answer(question: str, scene: dict[str, tuple[str, str]]) -> str:
    """The answer to a question about a scene; fails if it has none or several."""
    things = list(scene.values())
    colors, shapes = [color for color, _ in things], [shape for _, shape in things]

    def only(values: list[str]) -> str:
        assert len(values) == 1, f"{question} has answers {values}"
        return values[0]

    if match := re.search(r"[Cc]olor .*the (\w+)(?: have)?\?$", question):
        return only([color for color, shape in things if shape == match[1]])
    if match := re.search(r"[Ss]hape (?:is|of the) (\w+)(?: thing)?\?$", question):
        return only([shape for color, shape in things if color == match[1]])
    if match := re.match(r"(?:Is there|Do you see) a (\w+) (\w+)", question):
        return "yes" if (match[1], match[2]) in things else "no"
    match = re.match(r"How many (\w+?)s? (?:shapes )?(?:are|do)", question)
    assert match, question
    return str(len(things) if match[1] == "shape" else (colors + shapes).count(match[1]))


def test_every_answer_is_true_of_the_pixels(demo):
    asked = 0
    for subset in ("train2014", "val2014", "test2015"):
        annotations, questions = _annotations(demo, subset)["annotations"], _questions(demo, subset)["questions"]
        truths = {row["question_id"]: row["multiple_choice_answer"] for row in annotations}
        for image_id, rows in itertools.groupby(questions, key=lambda row: row["image_id"]):
            scene = _see(demo / subset / f"COCO_{subset}_{image_id:012d}.jpg")
            assert 1 <= len(scene) <= 3
            for row in rows:
                assert truths[row["question_id"]] == _answer(row["question"], scene), (image_id, row, scene)
                asked += 1
    assert asked >= 4 * (TRAIN + VAL + TEST)


def _check_relation(caption: str, scene: dict[str, tuple[str, str]]) -> None:
    match = re.match(r"(the|a|one) (\w+ \w+) is (.+?) (the other|another|(?:the|a) \w+ \w+)\.$", caption)
    assert match, caption
    article, first, where, second = match.groups()
    if second in ("the other", "another"):
        second = f"the {first}" if second == "the other" else f"a {first}"
    places = {cell: " ".join(thing) for cell, thing in scene.items()}
    looks = Counter(places.values())
    if article == "the":
        assert looks[first] == 1
    steps = {"above": (-1, 0), "below": (1, 0), "to the left of": (0, -1), "to the right of": (0, 1)}
    wanted = tuple(sum(step) for step in zip(*(steps[part] for part in where.split(" and ")), strict=True))
    place = {cell: divmod(number, 2) for number, cell in enumerate(CELLS)}
    ways = [
        (place[one][0] - place[other][0], place[one][1] - place[other][1])
        for one in scene
        for other in scene
        if one != other and places[one] == first and places[other] == second.split(" ", 1)[1]
    ]
    assert wanted in ways, caption


def test_every_caption_is_true_of_the_pixels(demo):
    for image in _images(demo):
        scene = _see(demo / image["filepath"] / image["filename"])
        looks = Counter(" ".join(thing) for thing in scene.values())
        captions = [sentence["raw"][0].lower() + sentence["raw"][1:] for sentence in image["sentences"]]
        for caption in (captions[0], captions[2]):  # all with their places
            said = re.findall(r"a (\w+) (\w+) (?:at|in) the (\w+ \w+)", caption)
            assert {cell: (color, shape) for color, shape, cell in said} == scene and len(said) == len(scene), caption
        for caption in (captions[1], captions[3]):  # all, grouped
            said = re.findall(r"(a|two|three) (\w+) (circle|square|triangle)s?", caption)
            assert Counter({f"{color} {shape}": NUMBERS[number] for number, color, shape in said}) == looks, caption
        blue = np.asarray(Image.open(demo / image["filepath"] / image["filename"]).convert("RGB"))[:, :, 2]
        assert captions[3].endswith("dark blue background." if np.median(blue) > 37 else "black background.")
        if len(scene) > 1:
            _check_relation(captions[4], scene)
        else:
            ((cell, (color, shape)),) = scene.items()
            assert re.fullmatch(rf"the {shape} (at|in) the {cell}( corner)? is {color}\.", captions[4])


# Formats


@pytest.mark.parametrize(
    "subset, count, first",
    [
        ("train2014", TRAIN, 1),
        ("val2014", VAL, 100001),
        ("test2015", TEST, 200001),
    ],
)
def test_pictures_have_cocos_names_and_are_jpegs_of_quality_95(demo, tmp_path, subset, count, first):
    names = sorted(os.listdir(demo / subset))
    assert names == [f"COCO_{subset}_{first + number:012d}.jpg" for number in range(count)]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", quality=95)
    with Image.open(demo / subset / names[0]) as image, Image.open(tmp_path / "a.jpg") as reference:
        assert image.format == "JPEG" and image.size == (64, 64) and image.mode == "RGB"
        assert image.quantization == reference.quantization
        assert {layer[1:3] for layer in image.layer} == {(1, 1)}  # colours are not stored at half the resolution


@pytest.mark.parametrize("subset", ["train2014", "val2014", "test2015", "test-dev2015"])
def test_questions_have_the_official_fields(demo, subset):
    file = _questions(demo, subset)
    assert set(file) == {"info", "task_type", "data_type", "license", "data_subtype", "questions"}
    assert set(file["info"]) == {"description", "url", "version", "year", "contributor", "date_created"}
    assert set(file["license"]) == {"url", "name"}
    assert (file["task_type"], file["data_type"], file["data_subtype"]) == ("Open-Ended", "mscoco", subset)
    assert all(set(row) == {"image_id", "question", "question_id"} for row in file["questions"])
    assert len({row["question_id"] for row in file["questions"]}) == len(file["questions"])
    assert all(row["question_id"] // 1000 == row["image_id"] for row in file["questions"])


@pytest.mark.parametrize("subset", ["train2014", "val2014", "test2015"])
def test_annotations_have_the_official_fields_and_ten_answers_that_nearly_agree(demo, subset):
    file = _annotations(demo, subset)
    assert set(file) == {"info", "license", "data_subtype", "annotations", "data_type"}
    assert (file["data_type"], file["data_subtype"]) == ("mscoco", subset)
    questions = {row["question_id"]: row for row in _questions(demo, subset)["questions"]}
    assert [row["question_id"] for row in file["annotations"]] == list(questions)
    unanimous = 0
    for row in file["annotations"]:
        assert set(row) == {
            "question_type",
            "multiple_choice_answer",
            "answers",
            "image_id",
            "answer_type",
            "question_id",
        }
        question = questions[row["question_id"]]
        assert row["image_id"] == question["image_id"]
        assert question["question"].lower().startswith(row["question_type"])
        answer = row["multiple_choice_answer"]
        expected_type = "yes/no" if answer in ("yes", "no") else "number" if answer in ("1", "2", "3") else "other"
        assert row["answer_type"] == expected_type
        assert [given["answer_id"] for given in row["answers"]] == list(range(1, 11))
        given = [given["answer"] for given in row["answers"]]
        assert given.count(answer) >= 9
        assert all((given["answer_confidence"] == "yes") == (given["answer"] == answer) for given in row["answers"])
        unanimous += given.count(answer) == 10
    assert 0.8 < unanimous / len(questions) < 1


def test_the_official_files_are_there_and_the_tests_answers_besides(demo):
    assert sorted(os.listdir(demo)) == [
        "dataset_coco.json",
        "demo.json",
        "demo.spm",
        "test2015",
        "train2014",
        "val2014",
        "vqa",
    ]
    assert sorted(os.listdir(demo / "vqa")) == [
        "v2_OpenEnded_mscoco_test-dev2015_questions.json",
        "v2_OpenEnded_mscoco_test2015_questions.json",
        "v2_OpenEnded_mscoco_train2014_questions.json",
        "v2_OpenEnded_mscoco_val2014_questions.json",
        "v2_mscoco_test2015_annotations.json",
        "v2_mscoco_train2014_annotations.json",
        "v2_mscoco_val2014_annotations.json",
    ]


def test_test_dev_is_a_part_of_the_test(demo):
    part, whole = _questions(demo, "test-dev2015")["questions"], _questions(demo, "test2015")["questions"]
    assert 0 < len(part) < len(whole) and all(row in whole for row in part)


def test_captions_are_in_karpathys_format(demo):
    file = _load(demo / "dataset_coco.json")
    assert set(file) == {"images", "dataset"} and file["dataset"] == "coco"
    images = file["images"]
    assert Counter(image["split"] for image in images) == {"train": 60, "val": 16, "test": 16, "restval": 8}
    assert [image["imgid"] for image in images] == list(range(100))
    assert [sentid for image in images for sentid in image["sentids"]] == list(range(500))
    for image in images:
        assert set(image) == {"filepath", "sentids", "filename", "imgid", "split", "sentences", "cocoid"}
        assert image["filepath"] == ("train2014" if image["split"] == "train" else "val2014")
        assert (demo / image["filepath"] / image["filename"]).is_file()
        assert int(image["filename"][-16:-4]) == image["cocoid"]
        assert len({sentence["raw"] for sentence in image["sentences"]}) == 5
        for sentence, sentid in zip(image["sentences"], image["sentids"], strict=True):
            assert set(sentence) == {"tokens", "raw", "imgid", "sentid"}
            assert (sentence["imgid"], sentence["sentid"]) == (image["imgid"], sentid)
            assert sentence["tokens"] == re.findall(r"[a-z]+", sentence["raw"].lower())


# The tokenizer


def test_the_tokenizer_has_the_piece_order_of_xlm_roberta_and_knows_every_text(demo):
    model = sentencepiece.SentencePieceProcessor(model_file=str(demo / "demo.spm"))
    assert [model.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    assert 100 <= model.get_piece_size() <= 300
    captions = [sentence["raw"] for image in _images(demo) for sentence in image["sentences"]]
    rows = _questions(demo, "train2014")["questions"] + _questions(demo, "test2015")["questions"]
    questions = [row["question"] for row in rows]
    for text in [*captions, *questions, "Why isn't ZEBRA 42 jumping?!"]:
        ids = model.encode(text)
        assert 0 not in ids and model.decode(ids) == text
    assert max(len(model.encode(text)) for text in captions) <= 30  # fits 32 positions with <s> and </s>
    words = {word for text in questions for word in text.rstrip("?").split()}
    assert sum(len(model.encode(word)) == 1 for word in words) > 0.9 * len(words)


# What makes it a fair test of seeing


def test_no_scene_of_the_training_pictures_occurs_elsewhere(full_plan):
    scenes = defaultdict(set)
    for picture in full_plan:
        scenes[picture.split].add(picture.scene)
    assert set(scenes) == {"train", "restval", "val", "test", "test2015"}
    for one, other in itertools.combinations(scenes.values(), 2):
        assert not one & other
    assert len(scenes["train"]) > 1500


def test_the_default_sizes_are_those_promised(full_plan):
    assert Counter(picture.folder for picture in full_plan) == {"train2014": 6000, "val2014": 400, "test2015": 200}
    things = Counter(len(picture.scene) for picture in full_plan if picture.split == "train")
    assert things == {1: 2000, 2: 2000, 3: 2000}


def test_each_picture_has_four_or_five_different_questions(full_plan):
    for picture in full_plan:
        texts = [question.text for question in picture.questions]
        assert len(set(texts)) == len(texts)
    numbers = Counter(len(picture.questions) for picture in full_plan)
    assert set(numbers) == {4, 5} and min(numbers.values()) > 0.4 * len(full_plan)


def test_every_split_shows_every_shape_and_color_in_every_cell(full_plan):
    for split in ("train", "val", "test", "test2015"):
        things = [thing for picture in full_plan if picture.split == split for thing in picture.scene]
        assert len(set(things)) > 0.9 * 4 * 3 * 4
    alone = {picture.scene[0] for picture in full_plan if picture.split == "train" and len(picture.scene) == 1}
    for values in zip(*[(thing.cell, thing.shape, thing.color) for thing in alone], strict=True):
        assert min(Counter(values).values()) >= 3 and len(set(values)) == (3 if "circle" in values else 4)


def test_twelve_answers_are_common_enough_for_the_vocabulary(full_plan):
    counts = Counter(question.answer for picture in full_plan for question in picture.questions)
    assert set(counts) == {*RGB, "circle", "square", "triangle", "1", "2", "3", "yes", "no"}
    assert min(counts.values()) > 300


def test_yes_and_no_are_balanced_for_every_thing_asked_for(full_plan):
    answers = defaultdict(Counter)
    for picture in full_plan:
        for question in picture.questions:
            if question.kind == "exists" and picture.split == "train":
                answers[re.search(r"a (\w+ \w+)", question.text)[1]][question.answer] += 1
    assert len(answers) == 12
    for counts in answers.values():
        assert abs(counts["yes"] - counts["no"]) < 0.15 * counts.total()


@pytest.mark.parametrize("kind, most", [("color", 0.35), ("shape", 0.45), ("count", 0.4), ("count kind", 0.6)])
def test_no_answer_is_far_likelier_than_the_others_once_the_question_is_known(full_plan, kind, most):
    answers = defaultdict(Counter)
    for picture in full_plan:
        for question in picture.questions:
            if question.kind == kind and picture.split == "train":
                answers[question.text][question.answer] += 1
    assert answers and all(max(counts.values()) < most * counts.total() for counts in answers.values())


def test_who_never_looks_scores_below_45_percent(full_plan):
    """The best a model can do without the picture: the most frequent training answer to each question text."""
    learned = defaultdict(Counter)
    for picture in full_plan:
        if picture.split == "train":
            for question in picture.questions:
                learned[question.text][question.answer] += 1
    right = [
        learned[question.text].most_common(1)[0][0] == question.answer
        for picture in full_plan
        if picture.split != "train"
        for question in picture.questions
    ]
    assert 0.3 < sum(right) / len(right) < 0.45


def test_a_blind_demo_has_the_same_texts_and_nothing_to_see(demo, tmp_path):
    blind = make_demo(tmp_path / "blind", **SIZES, blind=True)
    for path in sorted(demo.rglob("*")):
        twin = blind / path.relative_to(demo)
        if path.suffix == ".jpg":
            assert (np.asarray(Image.open(twin)) == 128).all()
        elif path.is_file() and path.name != "demo.json":
            assert path.read_bytes() == twin.read_bytes()


# Making it


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_command_line_makes_the_same_bytes_in_another_process(demo, tmp_path):
    sizes = [f"--{name}={size}" for name, size in SIZES.items()]
    command = [sys.executable, "-m", "demo.make", str(tmp_path / "new" / "again"), *sizes]
    root = Path(make.__file__).parent.parent
    done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == f"The demo is in {tmp_path / 'new' / 'again'}\n"
    assert _digests(tmp_path / "new" / "again") == _digests(demo)


def test_another_seed_makes_other_pictures_and_texts(demo, tmp_path):
    mine, other = _digests(demo), _digests(make_demo(tmp_path / "other", seed=1, **SIZES))
    assert mine.keys() == other.keys()
    assert sum(mine[name] == other[name] for name in mine) <= 1


def test_making_it_again_changes_nothing(demo):
    before = {path: path.stat().st_mtime_ns for path in [demo, *demo.rglob("*")]}
    (demo / "vqa.train.jsonl").write_text("made later by the user\n")
    before[demo] = demo.stat().st_mtime_ns
    assert make_demo(demo, **SIZES) == demo
    assert (demo / "vqa.train.jsonl").read_text() == "made later by the user\n"
    (demo / "vqa.train.jsonl").unlink()
    before[demo] = demo.stat().st_mtime_ns
    assert {path: path.stat().st_mtime_ns for path in [demo, *demo.rglob("*")]} == before


def test_a_demo_with_other_settings_is_kept_and_named(demo):
    before = _digests(demo)
    with pytest.raises(InputError, match=r"holds a demo with other settings, .*'seed': 0"):
        make_demo(demo, seed=5, **SIZES)
    assert _digests(demo) == before


@pytest.mark.parametrize(
    "content, problem",
    [
        ({"notes.txt": "mine"}, "holds something that is no demo"),
        ({"demo.json": "not JSON"}, "holds something that is no demo"),
        ({"demo.json": '{"made_by": "another"}'}, "other settings"),
    ],
)
def test_a_folder_it_did_not_make_is_left_alone(tmp_path, content, problem):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=problem):
        make_demo(tmp_path, **SIZES)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == content


def test_a_file_in_its_place_is_left_alone(tmp_path):
    (tmp_path / "demo").write_text("mine")
    with pytest.raises(InputError, match="no folder"):
        make_demo(tmp_path / "demo", **SIZES)
    assert (tmp_path / "demo").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path, demo):
    (tmp_path / "demo").mkdir()
    assert _digests(make_demo(tmp_path / "demo", **SIZES)) == _digests(demo)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, stop):
    def interrupt(texts):
        assert any((tmp_path / name).is_dir() for name in os.listdir(tmp_path))  # it is being written
        raise stop

    monkeypatch.setattr(make, "train_tokenizer", interrupt)
    with pytest.raises(type(stop) if isinstance(stop, OSError) else stop):
        make_demo(tmp_path / "demo", train=10, val=10, test=10)
    assert os.listdir(tmp_path) == []


def test_two_at_once_both_end_with_the_demo(tmp_path, monkeypatch, demo):
    train = make.train_tokenizer

    def be_overtaken(texts):
        monkeypatch.setattr(make, "train_tokenizer", train)
        make_demo(tmp_path / "demo", **SIZES)
        return train(texts)

    monkeypatch.setattr(make, "train_tokenizer", be_overtaken)
    assert make_demo(tmp_path / "demo", **SIZES) == tmp_path / "demo"
    assert os.listdir(tmp_path) == ["demo"] and _digests(tmp_path / "demo") == _digests(demo)


def test_all_sizes_out_of_range_are_named_at_once(tmp_path):
    with pytest.raises(InputError) as caught:
        make_demo(tmp_path / "demo", train=9, val=100_000, test=10)
    assert caught.value.problems == [
        "train = 9 pictures is out of range: 10 to 99999",
        "val = 100000 pictures is out of range: 10 to 99999",
    ]
    assert os.listdir(tmp_path) == []


def test_the_command_line_reports_mistakes_without_a_traceback(tmp_path, capfd):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path)])
    assert caught.value.code == 2
    assert "error" in capfd.readouterr().err


def test_making_it_is_quiet(tmp_path, capfd):
    make_demo(tmp_path / "demo", train=10, val=10, test=10)
    assert capfd.readouterr() == ("", "")


def test_a_contact_sheet_shows_the_pictures_with_their_texts_below(demo, tmp_path):
    described = describe_demo(demo, "val2014", 5)
    assert len(described) == 5 and all(5 <= len(lines) <= 6 for _, lines in described)
    sheet = np.asarray(contact_sheet(described, columns=2, width=128)).astype(int)
    assert sheet.shape[1] == 2 * (128 + 12) + 12
    first = np.asarray(Image.open(described[0][0]))
    assert (sheet[12:140:2, 12:140:2] == first).all()  # twice as large, not smoothed
    below = sheet[146:170, 12:140]
    assert below.max() == 255 and below.min() < 50


def test_a_sheet_of_a_submission_marks_wrong_answers(demo, tmp_path):
    questions = _questions(demo, "test2015")["questions"]
    truths = {
        row["question_id"]: row["multiple_choice_answer"] for row in _annotations(demo, "test2015")["annotations"]
    }
    said = [{"question_id": key, "answer": answer} for key, answer in truths.items()]
    said[0]["answer"] = "elephant"
    (tmp_path / "submit.json").write_text(json.dumps(said))
    path, lines = describe_submission(demo, tmp_path / "submit.json", 2)[0]
    first = questions[0]
    assert path.name == f"COCO_test2015_{first['image_id']:012d}.jpg"
    assert lines[0] == f"{first['question']} elephant (wrong: {truths[first['question_id']]})"
    assert lines[1] == f"{questions[1]['question']} {truths[questions[1]['question_id']]}"
    (tmp_path / "captions.json").write_text(json.dumps([{"image_id": 100001, "caption": "a red circle"}]))
    ((path, lines),) = describe_submission(demo, tmp_path / "captions.json", 2)
    assert path.is_file()
    assert lines == ["a red circle"]
