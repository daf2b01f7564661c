"""Caption scores against pycocoevalcap's own (data/captions/scores.json), METEOR and SPICE, ground truth, baseline."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from beit3.system.errors import InputError
from tasks.captioning.references import coco_ground_truth, load_references
from tasks.captioning.scores import java_scorers
from tasks.captioning.scores.constant_caption import best_constant_caption
from tasks.captioning.scores.scores import caption_metrics
from tests.data.captions import strings

PYTHON_NAMES = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
TABLE = json.loads(strings.SCORES.read_text(encoding="utf-8"))
REFERENCES = {int(image): captions for image, captions in TABLE["references"].items()}
PREDICTIONS = {int(image): caption for image, caption in TABLE["predictions"].items()}
ROOT = Path(__file__).parent.parent
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")

DOGS = {1: ["a dog runs", "the dog is running"], 2: ["a cat sleeps on a mat"]}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something wanted the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def score(predictions, references, **options):
    return caption_metrics(predictions, references, **{"meteor": False, "spice": False, **options})


def test_the_scores_are_those_of_pycocoevalcap_and_its_java_tokenizer():
    result = score(PREDICTIONS, REFERENCES)
    assert list(result.scores) == PYTHON_NAMES
    assert list(result.per_image) == list(REFERENCES)
    for name in PYTHON_NAMES:
        assert result.scores[name] == pytest.approx(TABLE["scores"][name], abs=1e-6)
        of_images = [scores[name] for scores in result.per_image.values()]
        assert of_images == pytest.approx(TABLE["per_image"][name], abs=1e-6)
    assert result.scores["CIDEr"] > 1  # its unit is 0 to 10, that of the others 0 to 1


@needs_java
def test_meteor_is_that_of_pycocoevalcap():
    result = caption_metrics(PREDICTIONS, REFERENCES, spice=False)
    assert result.scores["METEOR"] == pytest.approx(TABLE["scores"]["METEOR"], abs=1e-6)
    of_images = [scores["METEOR"] for scores in result.per_image.values()]
    assert of_images == pytest.approx(TABLE["per_image"]["METEOR"], abs=1e-6)
    assert list(result.left_out) == ["SPICE"]


def test_the_scores_do_not_depend_on_the_order_of_the_predictions():
    backwards = dict(reversed(PREDICTIONS.items()))
    assert score(backwards, REFERENCES) == score(PREDICTIONS, REFERENCES)


def test_an_exact_caption_scores_1_and_an_empty_or_wordless_one_0():
    result = score({1: "A dog runs.", 2: ""}, DOGS)
    assert [result.per_image[1][name] for name in PYTHON_NAMES[:3]] == pytest.approx([1, 1, 1], abs=1e-6)
    assert result.per_image[1]["ROUGE_L"] == 1
    assert [result.per_image[2][name] for name in PYTHON_NAMES] == pytest.approx([0] * 6, abs=1e-6)
    nothing = score({1: "", 2: " ... "}, DOGS)
    assert [nothing.scores[name] for name in PYTHON_NAMES] == pytest.approx([0] * 6, abs=1e-6)


def test_nothing_is_printed(capfd):
    score({1: "a dog", 2: "a cat"}, DOGS)
    assert capfd.readouterr() == ("", "")


def test_the_result_file_holds_the_scores_and_those_of_each_image():
    result = score({1: "a dog runs", 2: "a cat sleeps"}, DOGS).as_json()
    text = json.loads(json.dumps(result, allow_nan=False))
    assert text["CIDEr"] == result["CIDEr"] and text["left_out"] == {
        "METEOR": "not asked for",
        "SPICE": "not asked for",
    }
    assert [row["image_id"] for row in text["per_image"]] == [1, 2]
    assert set(text["per_image"][0]) == {"image_id", *PYTHON_NAMES}


def test_every_mistake_in_the_input_is_listed():
    references = {1: ["a dog"], 2: [], 3: ["a cat", "  "], 4: "a bare string", 5: ["a", 7]}
    with pytest.raises(InputError) as caught:
        score({1: 5, 2: "x", 3: "x", 4: "x", 9: "x"}, references)
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 7
    assert "image 9 has a prediction but no reference captions" in problems
    assert "image 5 has reference captions but no prediction" in problems
    assert "prediction for image 1 is 5, wanted text" in problems
    assert "image 2 has no reference captions" in problems
    assert "image 3: a reference caption is '  '" in problems
    assert "image 4: its reference captions are 'a bare string'" in problems
    assert "image 5: a reference caption is 7" in problems


def test_no_references_and_references_without_a_word_are_errors():
    with pytest.raises(InputError, match="nothing to score against"):
        score({}, {})
    with pytest.raises(InputError, match="no reference caption holds a word"):
        score({1: "a dog"}, {1: ["...", "!"]})


# --- METEOR and SPICE where they cannot run ---


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """Put a `java` in front of the PATH that runs the given shell lines and notes its process id in `pid`."""

    def install(script):
        java = tmp_path / "java"
        java.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\n{script}\n")
        java.chmod(java.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return tmp_path / "pid"

    return install


def assert_ended(pid_file):
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_without_java_meteor_and_spice_are_left_out_saying_why(monkeypatch):
    monkeypatch.setenv("PATH", "")
    result = caption_metrics({1: "a dog", 2: "a cat"}, DOGS)
    assert list(result.scores) == PYTHON_NAMES
    assert result.left_out == {"METEOR": "there is no java on the PATH", "SPICE": "there is no java on the PATH"}


@pytest.mark.parametrize(
    "hang", ["exec sleep 600", "read line; exec sleep 600", "trap '' TERM; while :; do sleep 1; done"]
)
def test_a_meteor_that_hangs_is_ended_and_left_out(fake_java, hang):
    pid_file = fake_java(hang)
    result = score({1: "a dog", 2: "a cat"}, DOGS, meteor=True, java_timeout=1.5)
    assert result.left_out["METEOR"] == "it took more than 1.5 seconds"
    assert_ended(pid_file)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 0", "its program failed"),
        ("echo 'Could not create the Java Virtual Machine.' >&2; exit 1", "Could not create the Java Virtual Machine."),
        ("while read line; do echo nonsense; done", "could not convert string to float"),
        ("while read line; do echo nonsense; done; exec sleep 600", "could not convert string to float"),
        ("read line; echo 1.0; exit 3", "its program failed"),
    ],
)
def test_a_meteor_that_fails_is_left_out(fake_java, script, reason):
    pid_file = fake_java(script)
    result = score({1: "a dog", 2: "a cat"}, DOGS, meteor=True)
    assert reason in result.left_out["METEOR"] and "\n" not in result.left_out["METEOR"]
    assert "METEOR" not in result.scores and list(result.scores) == PYTHON_NAMES
    assert_ended(pid_file)


@needs_java
def test_meteor_takes_every_caption_in_any_locale(monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    odd = {
        1: "",
        2: "a ||| b",
        3: "<!a |||> x",
        4: "café 犬 “x”",
        5: "SCORE ||| EVAL",
        6: "a\nb\x85c\u2028d",
        7: "犬",
        8: "dog",
    }
    references = {image: [caption or "x", "a café"] for image, caption in odd.items()}
    references[7] = ["猫"]  # the same as the prediction only where both turn into question marks
    references[8] = ["<!x|||dog>"]  # holds "dog" only where ||| still parts fields
    result = caption_metrics(odd, references, spice=False)
    assert all(result.per_image[image]["METEOR"] == 0 for image in (1, 7, 8))
    assert all(result.per_image[image]["METEOR"] > 0.5 for image in (2, 3, 4, 5, 6))


def test_spice_without_its_models_is_left_out_not_downloaded(monkeypatch, fake_java, tmp_path):
    pid_file = fake_java("exit 0")
    (tmp_path / "spice" / "lib").mkdir(parents=True)
    (tmp_path / "spice" / "lib" / java_scorers.SPICE_MODELS[0]).touch()
    monkeypatch.setattr(java_scorers, "_pycocoevalcap", lambda: tmp_path)
    result = score({1: "a dog", 2: "a cat"}, DOGS, spice=True)
    assert result.left_out["SPICE"].startswith("its models are not on the disk (stanford-corenlp-3.6.0-models.jar in")
    assert not pid_file.exists()


@pytest.fixture
def spice_models(monkeypatch, tmp_path):
    lib = tmp_path / "spice" / "lib"
    lib.mkdir(parents=True)
    for name in java_scorers.SPICE_MODELS:
        (lib / name).touch()
    monkeypatch.setattr(java_scorers, "_pycocoevalcap", lambda: tmp_path)


def test_spice_scores_are_read_from_its_result_file(spice_models, fake_java, tmp_path):
    found = [
        {"image_id": 1, "scores": {"All": {"f": None}}},
        {"image_id": 0, "scores": {"All": {"f": 0.25}, "Color": {"f": 1.0}}},
    ]
    (tmp_path / "found.json").write_text(json.dumps(found))
    # java -Dfile.encoding=UTF-8 -Xmx8G -jar spice-1.0.jar IN -out OUT -subset -silent
    fake_java(f'cp "$5" {tmp_path}/asked.json; cp {tmp_path}/found.json "$7"')
    result = score({2: "a cat", 1: "A dog!"}, DOGS, spice=True)  # not in the order of the references
    assert json.loads((tmp_path / "asked.json").read_text()) == [
        {"image_id": 0, "test": "a dog", "refs": DOGS[1]},
        {"image_id": 1, "test": "a cat", "refs": DOGS[2]},
    ]
    assert result.per_image[1]["SPICE"] == 0.25
    assert result.as_json()["per_image"][1]["SPICE"] is None and result.as_json()["SPICE"] is None
    assert "SPICE" not in result.left_out


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'java.lang.UnsupportedClassVersionError' >&2; exit 1", "java.lang.UnsupportedClassVersionError"),
        ("exit 0", "its program failed"),
        ("echo '[{}, {}]' > \"$7\"", "its program failed"),
        ("exec sleep 600", "it took more than 1.5 seconds"),
    ],
)
def test_a_spice_that_fails_is_left_out(spice_models, fake_java, script, reason):
    pid_file = fake_java(script)
    result = score({1: "a dog", 2: "a cat"}, DOGS, spice=True, java_timeout=1.5)
    assert reason in result.left_out["SPICE"] and "SPICE" not in result.scores
    assert_ended(pid_file)


# --- Ground truth ---


def karpathy(tmp_path, images):
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def image(cocoid, split, *captions):
    return {
        "cocoid": cocoid,
        "split": split,
        "filepath": "val2014",
        "filename": f"{cocoid}.jpg",
        "sentences": [{"raw": caption, "tokens": [], "sentid": 0} for caption in captions],
    }


IMAGES = [
    image(9, "test", "A dog. ", "Two dogs"),
    image(4, "val", "A cat\n"),
    image(7, "restval", "A bird"),
    image(2, "test", "A fish"),
    image(5, "train", "A cow"),
]


def test_the_ground_truth_of_a_split_has_its_images_and_raw_captions_in_the_order_of_the_file(tmp_path):
    truth = coco_ground_truth(karpathy(tmp_path, IMAGES), "test")
    assert truth["images"] == [{"id": 9, "file_name": "9.jpg"}, {"id": 2, "file_name": "2.jpg"}]
    assert truth["annotations"] == [
        {"id": 1, "image_id": 9, "caption": "A dog. "},
        {"id": 2, "image_id": 9, "caption": "Two dogs"},
        {"id": 3, "image_id": 2, "caption": "A fish"},
    ]


def test_restval_belongs_to_train(tmp_path):
    truth = coco_ground_truth(karpathy(tmp_path, IMAGES), "train")
    assert [image["id"] for image in truth["images"]] == [7, 5]


def test_written_ground_truth_is_read_back_by_us_and_by_pycocotools(tmp_path, capsys):
    from pycocotools.coco import COCO

    paths = {"val": tmp_path / "val.json", "test": tmp_path / "test.json"}
    for split, path in paths.items():
        path.write_text(json.dumps(coco_ground_truth(karpathy(tmp_path, IMAGES), split)))
    assert load_references(paths["val"]) == {4: ["A cat\n"]}
    assert load_references(paths["test"]) == {9: ["A dog. ", "Two dogs"], 2: ["A fish"]}
    coco = COCO(str(paths["test"]))
    assert coco.getImgIds() == [9, 2]
    found = coco.loadRes([{"image_id": 9, "caption": "a dog"}, {"image_id": 2, "caption": "a fish"}])
    assert [ann["caption"] for ann in found.imgToAnns[2]] == ["a fish"]


def test_an_image_without_sentences_an_empty_caption_and_a_cocoid_twice_are_listed(tmp_path):
    images = [*IMAGES, image(11, "test"), image(12, "test", "fine", "  "), image(9, "train", "x"), {"split": "test"}]
    images += [{**image(13, "test"), "sentences": None}, image(14, "val"), "not an image"]
    path = karpathy(tmp_path, images)
    with pytest.raises(InputError) as caught:
        coco_ground_truth(path, "test")
    problems = [problem.removeprefix(f"{path}: ") for problem in caught.value.problems]
    assert problems == [
        "`sentences` has no caption: images[5] has [], images[10] has []",
        '`raw` is blank: images[6].sentences[1] has "  "',
        "`cocoid` of another image: images[7] has 9, as images[0]",
        "`cocoid` is missing: images[8]",
        "`filepath` is missing: images[8]",
        "`filename` is missing: images[8]",
        "`sentences` is missing: images[8]",
        "`sentences` is not a list: images[9] has null",
        'not a JSON object: images[11] is "not an image"',
    ]


def test_a_split_without_images_and_a_file_that_is_not_there_are_errors(tmp_path):
    with pytest.raises(InputError, match="no image of the split 'val'"):
        coco_ground_truth(karpathy(tmp_path, IMAGES[:1]), "val")
    with pytest.raises(InputError, match="cannot be read"):
        coco_ground_truth(tmp_path / "none.json", "val")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "wanted a caption file in COCO's format"),
        ('{"images": []}', "wanted a caption file in COCO's format"),
        ('{"images": [{"id": 1}], "annotations": []}', r"image without captions: images\[0\] \(id 1\)"),
        (
            '{"images": [{"id": 1}, {"id": 1}], "annotations": [{"image_id": 1, "caption": "x"}]}',
            r"`id` of another image: images\[1\] has 1, as images\[0\]",
        ),
        ('{"images": [{}], "annotations": []}', r"`id` is missing: images\[0\]"),
        (
            '{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}',
            r"`image_id` is not among `images`: annotations\[0\] has 1",
        ),
        (
            '{"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": " "}]}',
            r'`caption` is blank: annotations\[0\] has " "',
        ),
        ('{"images": [{"id": 1}], "annotations": [{"image_id": 1}]}', r"`caption` is missing: annotations\[0\]"),
        ('{"images": [{"id": true}], "annotations": []}', "neither a whole number nor a text: images.0. has true"),
        ('{"images": [{"id": 1}], "annotations": [7, {"image_id": [1], "caption": 5}]}', "annotations.0. is 7\n"),
        (
            '{"images": [{"id": 1}], "annotations": '
            '[{"image_id": 1, "caption": "\\ud800"}, {"image_id": 1, "caption": 5}]}',
            "surrogate pair, which is no valid Unicode: annotations.0. (?s:.*)not a text: annotations.1. has 5",
        ),
    ],
)
def test_a_reference_file_that_is_wrong_is_refused(tmp_path, content, problem):
    path = tmp_path / "references.json"
    path.write_text(content)
    with pytest.raises(InputError, match=problem):
        load_references(path)


def test_a_reference_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: cannot be read"):
        load_references(tmp_path / "none.json")


# --- The best constant caption ---


def test_the_best_constant_caption_is_the_one_that_pycocoevalcap_scores_best():
    candidates = sorted({caption for captions in REFERENCES.values() for caption in captions})[::10]
    by_caption = {c: score(dict.fromkeys(REFERENCES, c), REFERENCES).scores["CIDEr"] for c in candidates}
    best = max(by_caption, key=by_caption.__getitem__)
    assert by_caption[best] > 1.5 * sorted(by_caption.values())[len(by_caption) // 2]
    for limit in (None, len(candidates)):
        caption, cider = best_constant_caption(candidates, REFERENCES, limit)
        assert caption == best and cider == pytest.approx(by_caption[best], abs=1e-9)
    for caption in [*candidates[:5], "zebra zebra zebra", "a a a a a a dog"]:
        expected = score(dict.fromkeys(REFERENCES, caption), REFERENCES).scores["CIDEr"]
        assert best_constant_caption([caption], REFERENCES)[1] == pytest.approx(expected, abs=1e-9)


def test_of_captions_with_equal_tokens_the_first_is_given_and_only_the_most_frequent_are_tried():
    references = {1: ["a dog runs"], 2: ["a cat sleeps"], 3: ["a dog runs"]}
    frequent_first = ["A cat sleeps.", "A dog runs.", "a dog runs", "a cat sleeps", "a cat sleeps"]
    assert best_constant_caption(frequent_first, references)[0] == "A dog runs."
    assert best_constant_caption(frequent_first, references, limit=1)[0] == "A cat sleeps."


def test_no_candidates_and_no_references_are_errors():
    with pytest.raises(InputError) as caught:
        best_constant_caption([], {})
    assert caught.value.problems == ["there are no candidate captions", "there are no reference captions"]


def test_reading_the_modules_starts_no_java_and_needs_no_pycocoevalcap():
    code = (
        "import sys; import tasks.captioning.scores.scores, tasks.captioning.references;"
        "import tasks.captioning.scores.constant_caption;"
        "assert not any(name.startswith('pycocoevalcap') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
