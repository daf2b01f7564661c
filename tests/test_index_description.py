"""Index files say what they were made from: what no longer fits is made again, refused or told."""

import hashlib
import json
import os
import shutil

import pytest

from beit3.data.index_description import look, quick_digest
from beit3.system.errors import InputError
from datasets import CaptioningDataset, VQAv2Dataset
from runs.command_line import read_settings
from tasks.make_index import main as make_index
from tests import reference

SPM = reference.MINI_COCO / "mini.spm"
QUESTIONS = "v2_OpenEnded_mscoco_test2015_questions.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "data"
    shutil.copytree(reference.MINI_COCO, folder)
    VQAv2Dataset.make_dataset_index(folder, folder / "mini.spm", folder / "vqa")
    CaptioningDataset.make_coco_captioning_dataset_index(folder, folder / "mini.spm")
    return folder


@pytest.fixture
def coco(made, tmp_path):
    shutil.copytree(made, tmp_path / "coco")
    return tmp_path / "coco"


@pytest.fixture
def other_spm(tmp_path):
    """The same tokenizer but for a field at its end that nobody knows: another file."""
    (tmp_path / "other.spm").write_bytes(SPM.read_bytes() + b"\xa2\x06\x00")
    return tmp_path / "other.spm"


def flags(coco, *more, task="vqav2", spm=SPM):
    return [
        "--task", task, "--model", "beit3_tiny_patch16_64", "--sentencepiece_model", str(spm), "--data_path", str(coco),
        "--output_dir", str(coco / "out"), "--vocab_size", "100", *more,
    ]  # fmt: skip


def told(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]


def indexes(coco, kind="vqa"):
    return {path.name: path.read_bytes() for path in coco.glob(f"{kind}.*.jsonl")}


def test_a_description_says_what_the_index_was_made_from(coco):
    said = json.loads((coco / "vqa.index.json").read_text())
    assert (said["format"], said["version"], said["seed"]) == (1, 1, 0)
    assert said["tokenizer_sha256"] == hashlib.sha256(SPM.read_bytes()).hexdigest()
    assert said["index_files"].keys() == {
        *(f"vqa.{name}.jsonl" for name in ("train", "val", "trainable_val", "rest_val", "test", "test-dev")),
        "answer2label.txt",
    }
    for name, facts in said["index_files"].items():
        content = (coco / name).read_bytes()
        assert facts["sha256"] == hashlib.sha256(content).hexdigest()
        assert (facts["bytes"], facts["lines"]) == (len(content), content.count(b"\n"))
    assert len(said["official_files"]) == 6
    assert said["official_files"][f"vqa/{QUESTIONS}"]["bytes"] == (coco / "vqa" / QUESTIONS).stat().st_size
    for folder, facts in said["pictures"].items():
        assert facts["files"] == len(list((coco / folder).iterdir()))
    assert said["pictures"].keys() == {"train2014", "val2014", "test2015"}
    captions = json.loads((coco / "coco_captioning.index.json").read_text())
    assert captions["official_files"].keys() == {"dataset_coco.json"}
    assert "coco_captioning.val.references.json" in captions["index_files"]


def test_an_index_that_fits_is_left_alone_also_in_another_place(coco, capsys):
    """A copy has other times of change; what was said in relative paths is still found."""
    for path in coco.rglob("*"):
        os.utime(path, (1, 1))
    before = (coco / "vqa.index.json").read_bytes()
    assert make_index("vqav2", str(coco), str(SPM)) == 0
    assert make_index("coco_captioning", str(coco), str(SPM)) == 0
    assert told(capsys) == [] and (coco / "vqa.index.json").read_bytes() == before
    assert read_settings(flags(coco)).remarks == ()


def test_another_tokenizer_is_refused_and_its_index_made_again(coco, other_spm, capsys):
    with pytest.raises(InputError) as caught:
        read_settings(flags(coco, spm=other_spm))
    assert "made with another tokenizer" in str(caught.value) and str(other_spm) in str(caught.value)
    assert make_index("vqav2", str(coco), str(other_spm)) == 0
    assert "the index is made again" in told(capsys)[0]
    assert read_settings(flags(coco, spm=other_spm)).remarks == ()
    with pytest.raises(InputError, match="made with another tokenizer"):
        read_settings(flags(coco))


def test_captions_are_learned_with_their_tokenizer_only(coco, other_spm):
    with pytest.raises(InputError, match="made with another tokenizer"):
        read_settings(flags(coco, task="coco_captioning", spm=other_spm))


def test_an_official_file_that_changed_is_told_and_makes_the_index_again(coco, capsys):
    path = coco / "vqa" / QUESTIONS
    content = json.loads(path.read_text())
    content["questions"] = content["questions"][:-1]
    path.write_text(json.dumps(content))
    before = indexes(coco)
    (remark,) = read_settings(flags(coco)).remarks
    assert f"{path} has changed" in remark and "python3 -m tasks.make_index vqav2" in remark
    assert make_index("vqav2", str(coco), str(SPM)) == 0
    assert f"the index is made again: {path} has changed" in told(capsys)[0]
    after = indexes(coco)
    assert after["vqa.test.jsonl"].count(b"\n") == before["vqa.test.jsonl"].count(b"\n") - 1
    assert after["vqa.train.jsonl"] == before["vqa.train.jsonl"]
    assert read_settings(flags(coco)).remarks == ()


@pytest.mark.parametrize(("task", "kind"), [("vqav2", "vqa"), ("coco_captioning", "coco_captioning")])
def test_pictures_that_came_later_make_the_index_again(coco, tmp_path, capsys, task, kind):
    whole = indexes(coco, kind)
    away = tmp_path / "away"
    away.mkdir()
    pictures = sorted((coco / "val2014").iterdir())[:3]
    for picture in pictures:
        shutil.move(picture, away)
    for path in coco.glob(f"{kind}.*"):
        path.unlink()
    assert make_index(task, str(coco), str(SPM)) == 0
    few = indexes(coco, kind)
    assert few != whole
    said = json.loads((coco / f"{kind}.index.json").read_text())
    assert said["pictures"]["val2014"]["missing"] == 3
    capsys.readouterr()
    assert read_settings(flags(coco, task=task)).remarks == ()
    for picture in pictures[:2]:
        shutil.move(away / picture.name, coco / "val2014")
    (remark,) = read_settings(flags(coco, task=task)).remarks
    assert f"{coco}/val2014 has 2 more files than when 3 pictures were missing there" in remark
    assert make_index(task, str(coco), str(SPM)) == 0
    assert "the index is made again" in told(capsys)[0]
    shutil.move(away / pictures[2].name, coco / "val2014")
    assert make_index(task, str(coco), str(SPM)) == 0
    assert indexes(coco, kind) == whole


def test_more_pictures_where_none_was_missing_change_nothing(coco):
    (coco / "train2014" / "COCO_train2014_000000999999.jpg").write_bytes(b"")
    assert read_settings(flags(coco)).remarks == ()


def test_an_index_edited_by_hand_is_told_and_never_overwritten(coco, other_spm, capsys):
    edited = coco / "vqa.train.jsonl"
    edited.write_text("".join(edited.read_text().splitlines(keepends=True)[1:]))
    (remark,) = read_settings(flags(coco)).remarks
    assert remark == f"{coco}: vqa.train.jsonl changed since vqa.index.json was written"
    (coco / "vqa" / QUESTIONS).write_text("{}")
    before = indexes(coco)
    assert make_index("vqav2", str(coco), str(SPM)) == 0
    assert any("kept although it is out of date" in line for line in told(capsys))
    assert make_index("vqav2", str(coco), str(other_spm)) == 2
    assert "Move vqa.train.jsonl elsewhere" in capsys.readouterr().err
    assert indexes(coco) == before


def test_an_edit_that_keeps_the_size_is_seen(coco):
    path = coco / "vqa.rest_val.jsonl"
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"qid": 1', b'"qid": 2', 1))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert path.stat().st_size == status.st_size
    assert look(coco, "vqa.index.json", 1).edited == ["vqa.rest_val.jsonl"]
    assert look(coco, "vqa.index.json", 1, thorough=True).edited == ["vqa.rest_val.jsonl"]


def test_files_of_the_original_are_taken_with_one_line(coco, capsys):
    (coco / "vqa.index.json").unlink()
    before = indexes(coco)
    (remark,) = read_settings(flags(coco)).remarks
    assert remark.startswith(f"{coco}: vqa.index.json is not there") and remark.endswith("taken as it is")
    assert make_index("vqav2", str(coco), str(SPM)) == 0
    assert told(capsys) == [remark]
    assert indexes(coco) == before and not (coco / "vqa.index.json").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"format": 2}',
        b'{"format": 1}',
        b"\xff\xfe",
        b"[" * 100_000,
        b" " * 2_000_000,
        b'{"format": 1, "version": 1, "official_files": 3, "index_files": {}, "pictures": {}}',
        b'{"format": 1, "version": 1, "official_files": {}, "index_files": {"vqa.test.jsonl": 1}, "pictures": {}}',
        b'{"format": 1, "version": 1, "official_files": {}, "index_files": {}, "pictures": {"val2014": {}}}',
    ],
)
def test_a_description_that_cannot_be_read_is_told_in_one_line(coco, content):
    (coco / "vqa.index.json").write_bytes(content)
    (remark,) = read_settings(flags(coco)).remarks
    assert f"{coco}/vqa.index.json: cannot be read" in remark and remark.isprintable()
    assert make_index("vqav2", str(coco), str(SPM)) == 0


def test_an_index_made_by_another_version_is_made_again(coco, capsys):
    file = coco / "vqa.index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 0}))
    assert "its maker had version 0, today's has 1" in read_settings(flags(coco)).remarks[0]
    assert make_index("vqav2", str(coco), str(SPM)) == 0
    assert "the index is made again: its maker had version 0" in told(capsys)[0]
    assert json.loads(file.read_text())["version"] == 1


def test_an_index_whose_official_files_are_gone_is_kept(coco, capsys):
    file = coco / "vqa.index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 0}))
    shutil.rmtree(coco / "vqa")
    before = indexes(coco)
    assert make_index("vqav2", str(coco), str(SPM)) == 0
    assert "kept although it is out of date, because the official files are gone" in told(capsys)[0]
    assert indexes(coco) == before


def test_the_same_pictures_are_kept_for_validation_when_an_index_is_made_again(coco):
    VQAv2Dataset.make_dataset_index(coco, coco / "mini.spm", coco / "vqa", seed=5)
    before, file = indexes(coco), coco / "vqa.index.json"
    assert json.loads(file.read_text())["seed"] == 5
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 0}))
    assert make_index("vqav2", str(coco), str(SPM)) == 0
    assert json.loads(file.read_text())["seed"] == 5 and indexes(coco) == before


def test_a_tokenizer_of_the_users_own_cannot_be_compared(coco):
    class Mine:
        def tokenize(self, text):
            return text.split()

        def convert_tokens_to_ids(self, tokens):
            return [7 for _ in tokens]

    VQAv2Dataset.make_dataset_index(coco, Mine(), coco / "vqa")
    assert json.loads((coco / "vqa.index.json").read_text())["tokenizer_sha256"] is None
    (remark,) = read_settings(flags(coco)).remarks
    assert "a tokenizer that has no file" in remark


def test_nocaps_has_its_own_description_and_no_tokenizer(tmp_path, other_spm):
    for split, name in (("val", "nocaps_val_4500_captions.json"), ("test", "nocaps_test_image_info.json")):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.jpg").write_bytes(b"")
        images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}]
        (tmp_path / name).write_text(json.dumps({"images": images}))
    CaptioningDataset.make_nocaps_captioning_dataset_index(tmp_path)
    said = json.loads((tmp_path / "nocaps.index.json").read_text())
    assert "tokenizer_sha256" not in said
    assert {name: (facts["files"], facts["missing"]) for name, facts in said["pictures"].items()} == {
        "val": (1, 1), "test": (1, 1),
    }  # fmt: skip
    assert look(tmp_path, "nocaps.index.json", 1).stale == []
    (tmp_path / "test" / "b.jpg").write_bytes(b"")
    assert look(tmp_path, "nocaps.index.json", 1).stale == [
        f"{tmp_path}/test has 1 more files than when 1 pictures were missing there"
    ]


def test_a_failed_making_leaves_no_description(coco):
    for path in coco.glob("vqa.*"):
        path.unlink()
    (coco / "vqa" / QUESTIONS).write_text("{")
    with pytest.raises(InputError):
        VQAv2Dataset.make_dataset_index(coco, SPM, coco / "vqa")
    assert not list(coco.glob("vqa.*")) and not list(coco.glob(".vqa*"))


def test_a_quick_digest_sees_both_ends_and_reads_little(tmp_path):
    file = tmp_path / "large"
    with open(file, "wb") as content:
        content.truncate(1 << 32)  # a sparse file of four gigabytes: read whole, this would take seconds
    digests = {quick_digest(file)}
    for place in (0, (1 << 32) - 1):
        with open(file, "r+b") as content:
            content.seek(place)
            content.write(b"x")
        digests.add(quick_digest(file))
    assert len(digests) == 3
