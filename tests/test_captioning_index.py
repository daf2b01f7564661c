"""Making the index files of captioning: those of the original, and what is said about bad input."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from beit3.system.errors import InputError
from datasets import CaptioningDataset
from tasks.captioning import index as captioning_index
from tasks.captioning.references import load_references

MINI = Path(__file__).parent / "data" / "mini_coco"
SPM = MINI / "mini.spm"
SPLITS = ("train", "val", "test")


@pytest.fixture
def coco(tmp_path):
    """A data folder with the pictures and the captions of mini_coco."""
    root = tmp_path / "coco"
    for folder in ("train2014", "val2014"):
        shutil.copytree(MINI / folder, root / folder)
    shutil.copy(MINI / "dataset_coco.json", root)
    return root


def make(coco, tokenizer=SPM):
    CaptioningDataset.make_coco_captioning_dataset_index(coco, tokenizer)


def lines(folder, name):
    return (folder / name).read_text(encoding="utf-8").splitlines()


def change(coco, edit):
    """Rewrite dataset_coco.json: `edit` gets its list of images."""
    content = json.loads((coco / "dataset_coco.json").read_text())
    edit(content["images"])
    (coco / "dataset_coco.json").write_text(json.dumps(content))


def problems_of_making(coco, make=make):
    before = sorted(path.name for path in coco.iterdir())
    with pytest.raises(InputError) as error:
        make(coco)
    assert sorted(path.name for path in coco.iterdir()) == before, "something was written"
    return [problem.replace(f"{coco}{os.sep}", "").replace(str(coco), "coco") for problem in error.value.problems]


@pytest.mark.parametrize("split", SPLITS)
def test_the_index_is_that_of_the_original(coco, split):
    make(coco)
    name = f"coco_captioning.{split}.jsonl"
    assert sorted(lines(coco, name)) == sorted(lines(MINI / "expected", name))


def test_the_call_that_people_type_works_with_transformers_tokenizer(coco):
    tokenizer = pytest.importorskip("transformers").XLMRobertaTokenizer(str(SPM))
    CaptioningDataset.make_coco_captioning_dataset_index(data_path=str(coco), tokenizer=tokenizer)
    assert sorted(lines(coco, "coco_captioning.train.jsonl")) == sorted(
        lines(MINI / "expected", "coco_captioning.train.jsonl")
    )


def test_batches_leave_no_seams(coco, monkeypatch, capsys):
    monkeypatch.setattr(captioning_index, "BATCH", 7)
    make(coco)
    for split in SPLITS:
        name = f"coco_captioning.{split}.jsonl"
        assert sorted(lines(coco, name)) == sorted(lines(MINI / "expected", name))
    assert "300 captions of 60 images" in capsys.readouterr().out


@pytest.mark.parametrize(("split", "first"), [("val", 101), ("test", 116)])
def test_the_captions_people_wrote_are_written_beside_the_index(coco, split, first):
    make(coco)
    references = load_references(coco / f"coco_captioning.{split}.references.json")
    assert sorted(references) == list(range(first, first + 15))
    karpathy = json.loads((MINI / "dataset_coco.json").read_text())["images"]
    wanted = next(image for image in karpathy if image["cocoid"] == first)
    assert references[first] == [sentence["raw"] for sentence in wanted["sentences"]]
    content = json.loads((coco / f"coco_captioning.{split}.references.json").read_text())
    assert content["annotations"][0].keys() == {"id", "image_id", "caption"}


def test_pictures_that_are_not_on_the_disk_are_left_out_and_counted(coco, capsys):
    for number in (1, 2):
        (coco / f"train2014/COCO_train2014_{number:012d}.jpg").unlink()
    (coco / "val2014/COCO_val2014_000000000101.jpg").unlink()
    make(coco)
    images = {json.loads(line)["image_id"] for line in lines(coco, "coco_captioning.train.jsonl")}
    assert images == set(range(3, 61))
    assert capsys.readouterr().out.splitlines() == [
        f"coco_captioning index written to {coco}",
        "  coco_captioning.train.jsonl: 290 captions of 58 images; 2 images left out, their pictures are missing",
        "  coco_captioning.val.jsonl: 14 images (their captions: coco_captioning.val.references.json); "
        "1 images left out, their pictures are missing",
        "  coco_captioning.test.jsonl: 15 images (their captions: coco_captioning.test.references.json)",
    ]


def test_what_is_missing_is_named(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert problems_of_making(empty) == [
        "dataset_coco.json: missing; get Karpathy's split (caption_datasets.zip) and unpack it there"
    ]
    with pytest.raises(InputError, match="no such folder"):
        make(tmp_path / "nowhere")
    with pytest.raises(InputError) as error:
        make(empty, tokenizer=empty / "no.spm")
    assert [problem.split(": ")[1].split(" ")[0] for problem in error.value.problems] == ["missing;", "cannot"]


def image(**changes) -> dict[str, Any]:
    good = {
        "filepath": "train2014",
        "filename": "COCO_train2014_000000000001.jpg",
        "cocoid": 77,
        "split": "train",
        "sentences": [{"raw": "A cat"}],
    }
    return {**good, **changes}


SPLIT = "not an image of Karpathy's split; number in the file, from 0: 90"
MISTAKES = {
    "no sentences": ([image(sentences=[])], "image without sentences; cocoid: 77"),
    "null for sentences": ([image(sentences=None)], "image without sentences; cocoid: 77"),
    "an empty caption": ([image(sentences=[{"raw": "A"}, {"raw": " \n"}])], "image with an empty caption; cocoid: 77"),
    "nothing to tokenize": ([image(sentences=[{"raw": "\u200b"}])], "image with an empty caption; cocoid: 77"),
    "a caption that is a number": ([image(sentences=[{"raw": 5}])], SPLIT),
    "a caption without text": ([image(sentences=[{}])], SPLIT),
    "a cocoid of another image": ([image(cocoid=1)], "more than one image has this cocoid: 1"),
    "the same image three times": ([image(), image(), image()], "more than one image has this cocoid: 77, 77"),
    "a cocoid that is no number": ([image(cocoid="1")], SPLIT),
    "a list for the cocoid": ([image(cocoid=[1])], SPLIT),
    "no image": ([7], SPLIT),
    "an unknown split": (
        [image(split="dev")],
        "the split of an image is none of train, restval, val, test; cocoid: 77",
    ),
    "a path upwards": ([image(filepath="..")], "filepath or filename leads out of the data folder; cocoid: 77"),
    "a path from the root": ([image(filepath="/etc")], "filepath or filename leads out of the data folder; cocoid: 77"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_file_are_named(coco, mistake):
    added, expected = MISTAKES[mistake]
    change(coco, lambda images: images.extend(added))
    assert problems_of_making(coco) == [f"dataset_coco.json: {expected}"]


def test_all_mistakes_are_named_at_once_and_equal_ones_counted(coco):
    def edit(images):
        images += [image(cocoid=number, sentences=[]) for number in range(1000, 1100)]
        images += [image(cocoid=1)]

    change(coco, edit)
    assert problems_of_making(coco) == [
        "dataset_coco.json: image without sentences; cocoid: 1000, 1001, 1002, 1003, 1004 and 95 more",
        "dataset_coco.json: more than one image has this cocoid: 1",
    ]


def test_a_broken_file_is_named(coco):
    (coco / "dataset_coco.json").write_text('{"images": [{"cocoid": 1')
    assert problems_of_making(coco)[0].startswith("dataset_coco.json: not valid JSON")


def test_a_folder_without_pictures_is_named(coco):
    for path in (coco / "train2014").iterdir():
        path.unlink()
    assert problems_of_making(coco) == ["train2014: none of the pictures wanted is in it"]
    (coco / "train2014").rmdir()
    assert problems_of_making(coco) == ["train2014: folder of pictures missing; put the pictures of train2014 there"]


def test_a_split_without_pictures_is_named(coco):
    for number in range(116, 131):
        (coco / f"val2014/COCO_val2014_{number:012d}.jpg").unlink()
    assert problems_of_making(coco) == ["dataset_coco.json: no image left of the split 'test'; pictures missing: 15"]


def test_links_out_of_the_data_folder_are_refused_as_reading_would(coco, tmp_path):
    picture = coco / "train2014/COCO_train2014_000000000001.jpg"
    shutil.move(picture, tmp_path / "outside.jpg")
    picture.symlink_to(tmp_path / "outside.jpg")
    assert problems_of_making(coco) == [
        "train2014: links out of coco, which reading refuses; copy the files: COCO_train2014_000000000001.jpg"
    ]
    picture.unlink()
    shutil.move(coco / "train2014", tmp_path / "outside")
    (coco / "train2014").symlink_to(tmp_path / "outside")
    assert problems_of_making(coco) == ["train2014: leads out of coco through a link, which reading refuses"]


def test_a_failed_making_leaves_an_earlier_index_as_it_was(coco):
    make(coco)
    before = {path.name: path.read_bytes() for path in coco.iterdir() if path.is_file()}
    change(coco, lambda images: images.append(image(sentences=[])))
    problems_of_making(coco)
    del before["dataset_coco.json"]
    assert all((coco / name).read_bytes() == content for name, content in before.items())


@pytest.fixture
def nocaps(tmp_path):
    """A data folder with two validation pictures of nocaps and three test pictures."""
    root = tmp_path / "nocaps"
    files = {
        "val": ("nocaps_val_4500_captions.json", ["a.jpg", "b.jpg"]),
        "test": ("nocaps_test_image_info.json", ["c.jpg", "d.jpg", "é.jpg"]),
    }
    for split, (source, names) in files.items():
        (root / split).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (8, 8)).save(root / split / name)
        images = [{"id": number, "file_name": name, "width": 8} for number, name in enumerate(names, start=10)]
        (root / source).write_text(json.dumps({"info": {}, "images": images, "annotations": []}))
    return root


def test_the_index_of_nocaps_written_out(nocaps, capsys):
    CaptioningDataset.make_nocaps_captioning_dataset_index(data_path=str(nocaps))
    assert lines(nocaps, "nocaps.val.jsonl") == [
        '{"image_path": "val/a.jpg", "text_segment": null, "image_id": 10}',
        '{"image_path": "val/b.jpg", "text_segment": null, "image_id": 11}',
    ]
    assert [json.loads(line)["image_path"] for line in lines(nocaps, "nocaps.test.jsonl")] == [
        "test/c.jpg", "test/d.jpg", "test/é.jpg",
    ]  # fmt: skip
    assert capsys.readouterr().out.splitlines() == [
        f"nocaps index written to {nocaps}",
        "  nocaps.val.jsonl: 2 images",
        "  nocaps.test.jsonl: 3 images",
    ]


def make_nocaps(folder):
    CaptioningDataset.make_nocaps_captioning_dataset_index(folder)


def test_missing_pictures_of_nocaps_are_left_out(nocaps, capsys):
    (nocaps / "test/c.jpg").unlink()
    make_nocaps(nocaps)
    assert len(lines(nocaps, "nocaps.test.jsonl")) == 2
    assert "nocaps.test.jsonl: 2 images; 1 images left out, their pictures are missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([{"id": 1}], "not an image of nocaps; number in the file, from 0: 0"),
        ([{"id": "1", "file_name": "a.jpg"}], "not an image of nocaps; number in the file, from 0: 0"),
        ([{"id": 1, "file_name": "a.jpg"}] * 2, "more than one image has this id: 1"),
        ([{"id": 1, "file_name": "../a.jpg"}], "file_name leads out of the data folder; id: 1"),
        ([], "no image left; pictures missing: 0"),
    ],
)
def test_mistakes_in_the_files_of_nocaps_are_named(nocaps, images, expected):
    (nocaps / "nocaps_val_4500_captions.json").write_text(json.dumps({"images": images}))
    problems = problems_of_making(nocaps, make_nocaps)
    assert f"nocaps_val_4500_captions.json: {expected}" in problems


def test_missing_files_of_nocaps_are_named_together(tmp_path):
    problems = problems_of_making(tmp_path, make_nocaps)
    assert [re.split(r"[:;]", problem)[0] for problem in problems] == [
        "nocaps_val_4500_captions.json", "nocaps_test_image_info.json",
    ]  # fmt: skip
