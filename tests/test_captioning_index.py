"""Making the index files of captioning: those of the original, and what is said about bad input."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from beit3.data import findings, index_writing
from beit3.data.json_stream import stream_array
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


def make(coco, tokenizer=SPM, **options):
    CaptioningDataset.make_coco_captioning_dataset_index(coco, tokenizer, **options)


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
    monkeypatch.setattr(index_writing, "BATCH", 7)
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


UNKNOWN = "  0.00 % of 2830 tokens are <unk>"


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
        UNKNOWN,
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


def wrong(field, what, value):
    return f"`{field}` {what}: images[90] has {value}"


MISTAKES = {
    "no sentences": ([image(sentences=[])], wrong("sentences", "has no caption", "[]")),
    "null for sentences": ([image(sentences=None)], wrong("sentences", "is not a list", "null")),
    "a text for sentences": ([image(sentences="A")], wrong("sentences", "is not a list", '"A"')),
    "an empty caption": (
        [image(sentences=[{"raw": "A"}, {"raw": " \n"}])], '`raw` is blank: images[90].sentences[1] has " \\n"',
    ),
    "nothing to tokenize": (
        [image(sentences=[{"raw": "\u200b"}])], 'the tokenizer leaves nothing of a caption: images[90] has "\\u200b"',
    ),
    "a caption that is a number": (
        [image(sentences=[{"raw": 5}])], "`raw` is not a text: images[90].sentences[0] has 5",
    ),
    "a caption without text": ([image(sentences=[{}])], "`raw` is missing: images[90].sentences[0]"),
    "half a surrogate pair": (
        [image(split="val", sentences=[{"raw": "a\ud800"}])],
        '`raw` holds half a surrogate pair, which is no valid Unicode: images[90].sentences[0] has "a\\ud800"',
    ),
    "a novel": (
        [image(sentences=[{"raw": "red square " * 200_000}])],
        "too long, as a line of the index may have 1048576 bytes: images[90] (LENGTH)",
    ),
    "a cocoid of another image": ([image(cocoid=1)], "`cocoid` of another image: images[90] has 1, as images[0]"),
    "the same image three times": (
        [image(), image(), image()],
        "`cocoid` of another image: images[91] has 77, as images[90], images[92] has 77, as images[90]",
    ),
    "a cocoid that is no number": ([image(cocoid="1")], wrong("cocoid", "is not a whole number", '"1"')),
    "a list for the cocoid": ([image(cocoid=[1])], wrong("cocoid", "is not a whole number", "[1]")),
    "a truth value for the cocoid": ([image(cocoid=True)], wrong("cocoid", "is not a whole number", "true")),
    "NaN for the cocoid": ([image(cocoid=float("nan"))], wrong("cocoid", "is not a whole number", "NaN")),
    "a large cocoid": ([image(cocoid=2**63)], wrong("cocoid", "does not fit into 64 bits", 2**63)),
    "no image": ([7], "not a JSON object: images[90] is 7"),
    "an unknown split": ([image(split="dev")], wrong("split", "is none of train, restval, val, test", '"dev"')),
    "a split of control characters": (
        [image(split="\x1b[2J")], wrong("split", "is none of train, restval, val, test", '"\\u001b[2J"'),
    ),
    "a path upwards": ([image(filepath="..")], wrong("filepath", "is not a path below the folder of pictures", '".."')),
    "a path from the root": (
        [image(filepath="/etc")], wrong("filepath", "is not a path below the folder of pictures", '"/etc"'),
    ),
    "a name upwards": (
        [image(filename="a/../b.jpg")], wrong("filename", "is not a path below the folder of pictures", '"a/../b.jpg"'),
    ),
    "a zero byte": ([image(filename="a\0.jpg")], wrong("filename", "holds a zero byte", '"a\\u0000.jpg"')),
    "no name": ([image(filename="")], wrong("filename", "is blank", '""')),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_file_are_named(coco, mistake):
    added, expected = MISTAKES[mistake]
    change(coco, lambda images: images.extend(added))
    problems = [re.sub(r"\(\d+\)$", "(LENGTH)", problem) for problem in problems_of_making(coco)]
    assert problems == [f"dataset_coco.json: {expected}"]


def test_one_bad_caption_hides_no_other(coco):
    def edit(images):
        images[0]["sentences"][0]["raw"] = ""
        images[0]["sentences"][2]["raw"] = " "
        images[0]["filename"] = None
        images[65]["sentences"][1] = {"raw": 5}
        images[70]["sentences"][1] = {"raw": "\t"}

    change(coco, edit)
    assert problems_of_making(coco) == [
        "dataset_coco.json: `filename` is not a text: images[0] has null",
        'dataset_coco.json: `raw` is blank: images[0].sentences[0] has "", images[0].sentences[2] has " ", '
        'images[70].sentences[1] has "\\t"',
        "dataset_coco.json: `raw` is not a text: images[65].sentences[1] has 5",
    ]


def test_all_mistakes_are_named_at_once_and_equal_ones_counted(coco):
    def edit(images):
        images += [image(cocoid=number, sentences=[]) for number in range(1000, 1100)]
        images += [image(cocoid=1)]

    change(coco, edit)
    assert problems_of_making(coco) == [
        "dataset_coco.json: `sentences` has no caption: images[90] has [], images[91] has [], images[92] has [], "
        "images[93] has [], images[94] has [] and 95 more",
        "dataset_coco.json: `cocoid` of another image: images[190] has 1, as images[0]",
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


def assert_as_expected(coco, renamed=lambda line: line):
    for split in SPLITS:
        name = f"coco_captioning.{split}.jsonl"
        assert sorted(lines(coco, name)) == sorted(map(renamed, lines(MINI / "expected", name)))


def test_folders_and_pictures_that_are_links_are_followed(coco, tmp_path):
    picture = coco / "train2014/COCO_train2014_000000000001.jpg"
    shutil.move(picture, tmp_path / "outside.jpg")
    picture.symlink_to(tmp_path / "outside.jpg")
    shutil.move(coco / "val2014", tmp_path / "outside")
    (coco / "val2014").symlink_to(tmp_path / "outside")
    make(coco)
    assert_as_expected(coco)


def test_a_link_that_leads_nowhere_is_a_missing_picture(coco, capsys):
    picture = coco / "train2014/COCO_train2014_000000000001.jpg"
    picture.unlink()
    picture.symlink_to("nothing.jpg")
    make(coco)
    assert "295 captions of 59 images; 1 images left out, their pictures are missing" in capsys.readouterr().out


def test_pictures_may_lie_elsewhere(coco, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for folder in ("train2014", "val2014"):
        shutil.move(coco / folder, pictures)
    make(coco, image_path=pictures)
    assert_as_expected(coco)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        make(coco, image_path=tmp_path / "nowhere")


@pytest.mark.parametrize("ending", ["JPG", "jpeg", "png", "Webp", "tif"])
def test_pictures_of_another_ending_than_the_file_says_are_found(coco, ending):
    for picture in (coco / "val2014").iterdir():
        picture.rename(picture.with_suffix(f".{ending}"))
    make(coco)
    assert_as_expected(coco, lambda line: re.sub(r"(val2014/.*)\.jpg", rf"\1.{ending}", line))


def test_the_name_that_the_file_says_comes_first_and_of_two_others_one_is_wanted(coco):
    picture = coco / "val2014/COCO_val2014_000000000101.jpg"
    shutil.copy(picture, picture.with_suffix(".png"))
    make(coco)
    assert_as_expected(coco)
    picture.rename(picture.with_suffix(".gif"))
    problems = problems_of_making(coco)
    assert problems == [
        "val2014: 'COCO_val2014_000000000101.gif' and 'COCO_val2014_000000000101.png' are both there in place of "
        "'COCO_val2014_000000000101.jpg'; remove one"
    ]


def test_karpathys_file_is_read_once(coco, monkeypatch):
    opened = []
    monkeypatch.setattr(findings, "stream_array", lambda path, *rest: opened.append(path) or stream_array(path, *rest))
    make(coco)
    assert opened == [coco / "dataset_coco.json"]


def test_the_counts_are_compared_with_karpathys(coco, monkeypatch, capsys):
    make(coco)
    assert "official" not in capsys.readouterr().out
    monkeypatch.setattr(captioning_index, "KARPATHY_COUNTS", {"train": 60, "val": 15, "test": 15})
    make(coco)
    assert capsys.readouterr().out.count("    as many as in the official data\n") == 3
    monkeypatch.setattr(captioning_index, "KARPATHY_COUNTS", {"train": 61, "val": 15, "test": 17})
    (coco / "val2014/COCO_val2014_000000000101.jpg").unlink()
    make(coco)
    told = [line for line in capsys.readouterr().out.splitlines() if "official" in line]
    assert told == [
        "    unlike the official data: 60 images instead of 61, 60 pictures instead of 61",
        "    unlike the official data: 14 pictures instead of 15",
        "    unlike the official data: 15 images instead of 17, 15 pictures instead of 17",
    ]


def test_many_unknown_tokens_are_told_loudly(coco, capsys):
    def edit(images):
        for entry in images:
            for sentence in entry["sentences"]:
                sentence["raw"] = "жжж red"

    change(coco, edit)
    make(coco)
    assert re.match(
        r"  WARNING: \d\d\.\d\d % of \d+ tokens are <unk>, above 5 %", capsys.readouterr().out.splitlines()[-1]
    )


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
        ([{"id": 1}], "`file_name` is missing: images[0]"),
        ([{"id": "1", "file_name": "a.jpg"}], '`id` is not a whole number: images[0] has "1"'),
        ([{"id": 2**63, "file_name": "a.jpg"}], f"`id` does not fit into 64 bits: images[0] has {2**63}"),
        ([{"id": 1, "file_name": "a.jpg"}] * 2, "`id` of another image: images[1] has 1, as images[0]"),
        (
            [{"id": 1, "file_name": "../a.jpg"}],
            '`file_name` is not a path below the folder of pictures: images[0] has "../a.jpg"',
        ),
        ([{"id": 1, "file_name": ""}], '`file_name` is blank: images[0] has ""'),
        ([], "no image left of the split 'val'; pictures missing: 0"),
    ],
)
def test_mistakes_in_the_files_of_nocaps_are_named(nocaps, images, expected):
    (nocaps / "nocaps_val_4500_captions.json").write_text(json.dumps({"images": images}))
    problems = problems_of_making(nocaps, make_nocaps)
    assert f"nocaps_val_4500_captions.json: {expected}" in problems


CAPTIONS = [{"image_id": 10, "caption": "A"}, {"image_id": 11, "caption": "B"}]


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        ([*CAPTIONS, {"image_id": 10, "caption": " "}], ['`caption` is blank: annotations[2] has " "']),
        ([*CAPTIONS, {"image_id": 10, "caption": None}], ["`caption` is not a text: annotations[2] has null"]),
        ([*CAPTIONS, {"image_id": 9, "caption": "C"}], ["`image_id` is not among `images`: annotations[2] has 9"]),
        (
            [{"image_id": 10, "caption": ""}, 7],
            [
                '`caption` is blank: annotations[0] has ""',
                "not a JSON object: annotations[1] is 7",
                "image without captions: images[1] (id 11)",
            ],
        ),
    ],
)
def test_captions_of_nocaps_that_validation_would_refuse_are_named_when_the_index_is_made(nocaps, captions, expected):
    source = nocaps / "nocaps_val_4500_captions.json"
    content = json.loads(source.read_text())
    source.write_text(json.dumps({**content, "annotations": captions}))
    assert problems_of_making(nocaps, make_nocaps) == [f"{source.name}: {problem}" for problem in expected]
    with pytest.raises(InputError) as error:
        load_references(source)
    assert error.value.problems == [f"{source}: {problem}" for problem in expected]


@pytest.mark.parametrize("annotations", [{}, {"annotations": []}, {"annotations": CAPTIONS}])
def test_nocaps_is_indexed_with_captions_and_without(nocaps, annotations):
    source = nocaps / "nocaps_val_4500_captions.json"
    images = json.loads(source.read_text())["images"]
    source.write_text("\ufeff" + json.dumps({**annotations, "images": images}), encoding="utf-8")
    make_nocaps(nocaps)
    assert len(lines(nocaps, "nocaps.val.jsonl")) == 2


def test_pictures_of_nocaps_may_lie_elsewhere_and_have_other_endings(nocaps, tmp_path):
    (tmp_path / "pictures").mkdir()
    for folder in ("val", "test"):
        shutil.move(nocaps / folder, tmp_path / "pictures")
    (tmp_path / "pictures/val/a.jpg").rename(tmp_path / "pictures/val/a.PNG")
    CaptioningDataset.make_nocaps_captioning_dataset_index(nocaps, image_path=tmp_path / "pictures")
    assert [json.loads(line)["image_path"] for line in lines(nocaps, "nocaps.val.jsonl")] == ["val/a.PNG", "val/b.jpg"]


def test_missing_files_of_nocaps_are_named_together(tmp_path):
    problems = problems_of_making(tmp_path, make_nocaps)
    assert [re.split(r"[:;]", problem)[0] for problem in problems] == [
        "nocaps_val_4500_captions.json", "nocaps_test_image_info.json",
    ]  # fmt: skip
