"""Reading the index of VQAv2: items, batches, hostile index files, and the order in which rows come."""

import hashlib
import json
import os
import pickle
import re
import shutil
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from beit3.data.index_table import IntField, StringField, TokenField, read_index
from beit3.system.errors import BadImageError, InputError
from datasets import EpochSampler, EvaluationSampler, VQAv2Dataset, pad_text, read_answers

MINI = Path(__file__).parent / "data" / "mini_coco"
PICTURE = "train2014/COCO_train2014_000000000001.jpg"
LINE: dict[str, Any] = {
    "image_path": PICTURE,
    "text_segment": [4, 11, 12],
    "labels": [3, 0],
    "scores": [0.3, 1.0],
    "qid": 1000,
}


def describe_key(path, key):
    """A transform whose picture tells the key it was asked with."""
    seed, epoch, row = key
    return torch.tensor([seed, epoch, row], dtype=torch.uint8).reshape(3, 1, 1)


@pytest.fixture
def coco(tmp_path):
    """A data folder with the pictures of mini_coco and the index that the original makes of it."""
    root = tmp_path / "coco"
    for folder in ("train2014", "val2014", "test2015"):
        shutil.copytree(MINI / folder, root / folder)
    shutil.copytree(MINI / "expected", root, dirs_exist_ok=True)
    return root


def write_index(coco, name, entries):
    """Write an index file of dicts, raw text or raw bytes, one per line."""
    raw = [entry if isinstance(entry, (str, bytes)) else json.dumps(entry) for entry in entries]
    content = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in raw)
    (coco / f"vqa.{name}.jsonl").write_bytes(content)


def read(coco, split="val", **options):
    return VQAv2Dataset(coco, split, describe_key, **{"vocab_size": 88, "num_answers": 14, **options})


def problems_of_reading(coco, entries, **options):
    write_index(coco, "rest_val", entries)
    with pytest.raises(InputError) as error:
        read(coco, **options)
    return [problem.replace(f"{coco}{os.sep}", "") for problem in error.value.problems]


def as_line(dataset, row):
    """The line of the index that a row was read from."""
    table = dataset.table
    return {
        "image_path": table["image_path"][row],
        "text_segment": table["text_segment"][row].tolist(),
        "labels": table["labels"][row].tolist(),
        "scores": [round(score, 6) for score in table["scores"][row].tolist()],
        "qid": int(table["qid"][row]),
    }


@pytest.mark.parametrize(
    ("split", "files", "rows"),
    [
        ("train", ["train", "trainable_val"], 212),
        ("val", ["rest_val"], 114),
        ("test", ["test"], 84),
        ("test-dev", ["test-dev"], 28),
    ],
)
def test_each_split_holds_the_lines_of_its_files(coco, split, files, rows):
    dataset = read(coco, split)
    lines = [json.loads(line) for name in files for line in (coco / f"vqa.{name}.jsonl").read_text().splitlines()]
    assert len(dataset) == rows
    assert [as_line(dataset, row) for row in range(rows)] == lines


def test_training_reads_both_files_in_order(coco):
    write_index(coco, "train", [LINE, {**LINE, "qid": 1001}])
    write_index(coco, "trainable_val", [{**LINE, "qid": 2000}])
    dataset = read(coco, "train")
    assert [dataset[row]["question_id"] for row in range(3)] == [1000, 1001, 2000]
    places = [dataset.table.place(row) for row in range(3)]
    assert places == [f"{coco}/vqa.train.jsonl:1", f"{coco}/vqa.train.jsonl:2", f"{coco}/vqa.trainable_val.jsonl:1"]


def test_an_item_written_out(coco):
    write_index(coco, "rest_val", [{**LINE, "qid": 1}, LINE])
    dataset = read(coco, seed=7)
    dataset.set_epoch(5)
    item = dataset[1]
    assert item.keys() == {"image", "token_ids", "labels", "scores", "question_id", "row"}
    assert item["image"].tolist() == [[[7]], [[5]], [[1]]]
    assert item["token_ids"].tolist() == [0, 4, 11, 12, 2]
    assert (item["labels"].tolist(), item["labels"].dtype) == ([3, 0], torch.int64)
    assert torch.equal(item["scores"], torch.tensor([0.3, 1.0]))
    assert (item["question_id"], item["row"]) == (1000, 1)


def test_a_long_text_is_cut_and_still_ends(coco):
    write_index(coco, "rest_val", [{**LINE, "text_segment": list(range(10, 30))}])
    assert read(coco, num_max_bpe_tokens=6)[0]["token_ids"].tolist() == [0, 10, 11, 12, 13, 2]


@pytest.mark.parametrize("row", [-1, 114])
def test_rows_outside_are_refused(coco, row):
    with pytest.raises(IndexError, match=f"row {row} of a data set with 114 rows"):
        read(coco)[row]


def test_an_unknown_split_is_refused(coco):
    with pytest.raises(InputError, match="no split 'dev'; there are train, val, test, test-dev"):
        read(coco, "dev")


def test_the_transform_gets_the_path_in_the_data_folder(coco):
    write_index(coco, "rest_val", [LINE])
    seen = []

    def note(path, key):
        seen.append(path)
        return torch.zeros(3, 1, 1, dtype=torch.uint8)

    VQAv2Dataset(coco, "val", note, vocab_size=88, num_answers=14)[0]
    assert seen == [f"{coco}/{PICTURE}"]


def test_a_bad_picture_is_named_with_row_and_line(coco):
    def fail(path, key):
        raise OSError("broken data stream")

    dataset = VQAv2Dataset(coco, "test", fail, vocab_size=88, num_answers=14)
    path = dataset.table["image_path"][3]
    wanted = f"{coco}/{path}: broken data stream (row 3, {coco}/vqa.test.jsonl:4)"
    with pytest.raises(BadImageError, match=re.escape(wanted)):
        dataset[3]
    with pytest.raises(BadImageError, match=re.escape(wanted)):  # also out of a worker
        list(DataLoader(dataset, batch_sampler=[[3]], num_workers=1))


def test_the_distinct_pictures_can_be_listed(coco):
    assert sorted(read(coco, "test").image_paths()) == [f"test2015/COCO_test2015_{n:012d}.jpg" for n in range(201, 221)]


def test_a_row_takes_at_most_80_bytes(coco):
    rng = np.random.default_rng(0)
    entries = [
        {
            "image_path": f"train2014/COCO_train2014_{row // 5:012d}.jpg",
            "text_segment": rng.integers(4, 64000, 10).tolist(),
            "labels": [(row + 700 * number) % 3129 for number in range(4)],
            "scores": [0.3, 0.6, 0.9, 1.0],
            "qid": 458752000 + row,
        }
        for row in range(5000)
    ]
    write_index(coco, "rest_val", entries)
    dataset = read(coco, vocab_size=64010, num_answers=3129)
    arrays = [dataset.table["qid"], dataset.table["image_path"].numbers, dataset.table["image_path"].texts.values]
    arrays += [dataset.table["image_path"].texts.offsets]
    for name in ("text_segment", "labels", "scores"):
        arrays += [dataset.table[name].values, dataset.table[name].offsets]
    assert dataset.nbytes == sum(array.nbytes for array in arrays) <= 80 * 5000
    assert len(pickle.dumps(dataset.table)) < 80 * 5000 + 5000  # nothing per row beside the arrays


def test_large_numbers_are_held_exactly(coco):
    entries = [{**LINE, "qid": qid} for qid in (2**40, 0, 2**31 - 1, 2**31)]
    write_index(coco, "rest_val", entries)
    dataset = read(coco)
    assert [dataset[row]["question_id"] for row in range(4)] == [2**40, 0, 2**31 - 1, 2**31]
    write_index(coco, "rest_val", [{**LINE, "text_segment": [65535, 65536, 249999]}])
    assert read(coco, vocab_size=250002)[0]["token_ids"].tolist() == [0, 65535, 65536, 249999, 2]


@pytest.mark.parametrize("count", [65536, 65540])  # the last number that 16 bits hold, and more
def test_many_pictures_keep_their_names(tmp_path, count):
    (tmp_path / "x").write_text("".join(json.dumps({"name": f"n{row}"}) + "\n" for row in range(count)))
    column = read_index([tmp_path / "x"], [StringField("name")], how_to_make="")["name"]
    rows = [0, 255, 256, 65534, 65535, count - 1]
    assert [column[row] for row in rows] == [f"n{row}" for row in rows]


def test_the_digest_tells_whether_the_index_changed(coco):
    first = read(coco).digest
    assert read(coco).digest == first
    lines = (coco / "vqa.rest_val.jsonl").read_text().splitlines()
    write_index(coco, "rest_val", lines[::-1])
    assert read(coco).digest != first


def test_a_missing_index_says_how_to_make_it(coco):
    (coco / "vqa.train.jsonl").unlink()
    (coco / "vqa.trainable_val.jsonl").unlink()
    with pytest.raises(InputError) as error:
        read(coco, "train")
    assert [problem.split(": ")[0] for problem in error.value.problems] == [
        f"{coco}/vqa.train.jsonl", f"{coco}/vqa.trainable_val.jsonl",
    ]  # fmt: skip
    assert 'VQAv2Dataset.make_dataset_index(data_path="…", tokenizer=XLMRobertaTokenizer("' in error.value.problems[0]


def test_an_index_without_a_line_is_refused(coco):
    write_index(coco, "rest_val", [])
    with pytest.raises(InputError, match=r"vqa\.rest_val\.jsonl: no line in it; VQAv2Dataset\.make"):
        read(coco)


def test_answers_are_read_from_the_data_folder(coco):
    assert read_answers(coco)[:2] == ["square", "don't know"]


HOSTILE: dict[str, tuple[dict, str]] = {
    "an absolute path": ({"image_path": "/etc/passwd"}, "image_path: '/etc/passwd' must be relative"),
    "a path that climbs out": ({"image_path": "train2014/../../x.jpg"}, "must be relative to the data folder, without"),
    "a path that climbs and stays": ({"image_path": "val2014/../train2014/x.jpg"}, "without '..'"),
    "an empty path": ({"image_path": ""}, "image_path: a string expected, found ''"),
    "a path that is a number": ({"image_path": 5}, "image_path: a string expected, found 5"),
    "a path that is a list": ({"image_path": ["x"]}, "image_path: a string expected, found ['x']"),
    "a path with a zero byte": ({"image_path": "x\0"}, "image_path: a string expected"),
    "a path that is no Unicode": ({"image_path": "\ud800"}, "surrogates not allowed"),
    "a folder that is not there": ({"image_path": "train2015/x.jpg"}, "has no folder 'train2015'"),
    "an id beyond the vocabulary": ({"text_segment": [4, 88]}, "text_segment: 88 is not one of the token ids 0 … 87"),
    "a negative id": ({"text_segment": [4, -1]}, "text_segment: -1 is not one of the token ids"),
    "a huge id": ({"text_segment": [2**70]}, "text_segment: "),
    "an id that is a fraction": ({"text_segment": [4.0]}, "text_segment: a list of token ids"),
    "an id that is a truth value": ({"text_segment": [True]}, "text_segment: a list of token ids"),
    "an empty text": ({"text_segment": []}, "text_segment: the text is empty"),
    "no text": ({"text_segment": None}, "text_segment: the text is empty"),
    "a text that is a string": ({"text_segment": "4"}, "text_segment: a list of token ids"),
    "a label beyond the answers": ({"labels": [3, 14]}, "labels: 14 is not one of the integers 0 … 13"),
    "a negative label": ({"labels": [3, -5]}, "labels: -5 is not one of the integers"),
    "two labels beyond the answers": ({"labels": [14, 15]}, "labels: 14 is not one of"),
    "a label given twice": ({"labels": [3, 3]}, "labels: [3, 3] holds a value twice"),
    "more labels than scores": ({"labels": [3, 0, 1]}, "labels has 3 entries, scores 2"),
    "fewer labels than scores": ({"labels": []}, "labels has 0 entries, scores 2"),
    "a score that is NaN": ({"scores": [float("nan"), 1]}, "scores: nan is not one of the numbers from 0 to 1"),
    "a score that is infinite": ({"scores": [float("inf"), 1]}, "scores: inf is not one of"),
    "a score above 1": ({"scores": [0.5, 1.5]}, "scores: 1.5 is not one of"),
    "a negative score": ({"scores": [-0.5, 1.0]}, "scores: -0.5 is not one of"),
    "a score that is text": ({"scores": ["1", 1]}, "scores: a list of numbers from 0 to 1 expected, found ['1', 1]"),
    "a score too large for a float": ({"scores": [10**400, 1]}, "scores: "),
    "a question id that is text": ({"qid": "1000"}, "qid: an integer expected, found '1000'"),
    "a huge question id": ({"qid": 2**70}, "qid: "),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_line_is_refused_with_file_and_line(coco, what):
    values, expected = HOSTILE[what]
    problems = problems_of_reading(coco, [LINE, {**LINE, **values}, LINE])
    assert len(problems) == 1
    assert problems[0].startswith("vqa.rest_val.jsonl:2: ")
    assert expected in problems[0]


@pytest.mark.parametrize("field", LINE)
def test_a_missing_field_is_named(coco, field):
    problems = problems_of_reading(coco, [{key: value for key, value in LINE.items() if key != field}])
    assert problems == [f"vqa.rest_val.jsonl:1: {field} is missing"]


@pytest.mark.parametrize("line", ["", "{", "[1]", "7", b'{"image_path": "\xff"}', "[" * 100000, "9" * 10000])
def test_a_line_that_is_no_json_object_is_refused(coco, line):
    problems = problems_of_reading(coco, [LINE, line, LINE])
    assert len(problems) == 1
    assert re.match(r"vqa\.rest_val\.jsonl:2: (not JSON|a JSON object expected)", problems[0])


def test_problems_are_listed_in_the_order_of_lines(coco):
    bad = [{**LINE, "qid": None}, {**LINE, "labels": [99, 0]}, "{", {**LINE, "image_path": "none/x.jpg", "scores": 1}]
    problems = problems_of_reading(coco, [LINE, *bad])
    assert [problem.split(": ")[0].split(":")[1] for problem in problems] == ["2", "3", "4", "5", "5"]


def test_a_long_list_of_problems_is_cut(coco):
    write_index(coco, "rest_val", ["{"] * 1000)
    with pytest.raises(InputError) as error:
        read(coco)
    assert len(error.value.problems) == 20
    write_index(coco, "rest_val", [{**LINE, "labels": [14, 0]}] * 1000)
    with pytest.raises(InputError) as error:
        read(coco)
    assert len(error.value.problems) == 20


def test_a_problem_in_the_second_file_names_that_file(coco):
    write_index(coco, "trainable_val", [LINE, {**LINE, "scores": [2, 1]}])
    with pytest.raises(InputError, match=r"vqa\.trainable_val\.jsonl:2: scores: 2\.0 is not one of"):
        read(coco, "train")


def test_a_line_of_a_hundred_megabytes_is_refused_without_reading_it(coco):
    with open(coco / "vqa.rest_val.jsonl", "wb") as file:
        file.write(json.dumps(LINE).encode() + b"\n")
        file.truncate(100 << 20)  # zeros without a line end, taking no disk
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"vqa\.rest_val\.jsonl:2: longer than 1048576 bytes"):
            read(coco)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_pictures_and_folders_that_are_links_out_of_the_data_folder_are_read(coco, tmp_path):
    shutil.move(coco / "val2014", tmp_path / "disk")
    (coco / "val2014").symlink_to(tmp_path / "disk")
    shutil.move(coco / PICTURE, tmp_path / "elsewhere.jpg")
    (coco / PICTURE).symlink_to(tmp_path / "elsewhere.jpg")
    (tmp_path / "data").symlink_to(coco)
    write_index(coco, "rest_val", [{**LINE, "image_path": "val2014/COCO_val2014_000000000101.jpg"}, LINE])

    def load(path, key):
        return torch.tensor(list(Path(path).read_bytes()[:2])).reshape(2, 1, 1)

    for folder in (coco, tmp_path / "data"):
        dataset = VQAv2Dataset(folder, "val", load, vocab_size=88, num_answers=14)
        assert [dataset[row]["image"].flatten().tolist() for row in (0, 1)] == [[0xFF, 0xD8]] * 2


def test_a_folder_that_is_a_broken_link_is_not_there(coco, tmp_path):
    (coco / "gone").symlink_to(tmp_path / "nothing")
    problems = problems_of_reading(coco, [LINE, {**LINE, "image_path": "gone/1.jpg"}])
    assert problems == [f"vqa.rest_val.jsonl:2: image_path: {coco} has no folder 'gone'; pictures are looked for there"]


def test_pictures_may_lie_in_another_folder_than_the_index(coco, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    shutil.move(coco / "train2014", pictures)
    write_index(coco, "rest_val", [LINE])
    problems = problems_of_reading(coco, [LINE])
    assert problems == [
        f"vqa.rest_val.jsonl:1: image_path: {coco} has no folder 'train2014'; pictures are looked for there"
    ]
    seen = []

    def note(path, key):
        seen.append(path)
        return torch.zeros(3, 1, 1, dtype=torch.uint8)

    dataset = VQAv2Dataset(coco, "val", note, vocab_size=88, num_answers=14, image_path=pictures)
    dataset[0]
    assert seen == [f"{pictures}/{PICTURE}"]
    assert dataset.data_path == str(coco)


MARK = b"\xef\xbb\xbf"
SOUND = json.dumps(LINE).encode()


@pytest.mark.parametrize(
    "content",
    [
        MARK + SOUND + b"\n" + SOUND + b"\n",
        SOUND + b"\r\n" + SOUND + b"\r\n",
        SOUND + b"\n" + SOUND,
        SOUND + b"\n" + SOUND + b"\n\n",
        SOUND + b"\n" + SOUND + b"\n \t\r\n\r\n\n",
        MARK + SOUND + b"\r\n" + SOUND + b"\r\n\r\n  ",
    ],
)
def test_what_editors_add_to_an_index_is_passed_over(coco, content):
    path = coco / "vqa.rest_val.jsonl"
    path.write_bytes(content)
    dataset = read(coco)
    assert [as_line(dataset, row) for row in range(len(dataset))] == [LINE, LINE]
    assert dataset.digest == hashlib.sha256(content).hexdigest()
    assert [dataset.place(row) for row in (0, 1)] == [f"{path}:1", f"{path}:2"]
    path.write_bytes(content.replace(SOUND, SOUND.replace(b"1000", b'"x"')))
    with pytest.raises(InputError) as error:
        read(coco)
    assert [problem.split(": qid")[0] for problem in error.value.problems] == [f"{path}:1", f"{path}:2"]


def test_blank_lines_at_the_end_of_a_file_shift_no_line_of_the_next(coco):
    write_index(coco, "train", [LINE, "", " "])
    write_index(coco, "trainable_val", [MARK + json.dumps({**LINE, "qid": 7}).encode(), LINE, ""])
    dataset = read(coco, "train")
    assert [int(qid) for qid in dataset.table["qid"]] == [1000, 7, 1000]
    assert dataset.place(1) == f"{coco}/vqa.trainable_val.jsonl:1"


@pytest.mark.parametrize("blanks", [1, 2, 5])
def test_blank_lines_between_others_are_named_and_the_lines_behind_them_keep_their_numbers(coco, blanks):
    problems = problems_of_reading(coco, [LINE, *[""] * blanks, {**LINE, "qid": "x"}, ""])
    blank = [f"vqa.rest_val.jsonl:{line}: not JSON: a blank line between others" for line in range(2, 2 + blanks)]
    assert [problem.split(";")[0] for problem in problems[:-1]] == blank
    assert problems[-1].startswith(f"vqa.rest_val.jsonl:{2 + blanks}: qid: an integer expected")


def test_an_index_of_blank_lines_has_no_line(coco):
    write_index(coco, "rest_val", [MARK, "", " "] * 50)
    with pytest.raises(InputError, match=r"not JSON"):  # a mark is one at the start only
        read(coco)
    write_index(coco, "rest_val", [MARK, "", " "])
    with pytest.raises(InputError, match=r"vqa\.rest_val\.jsonl: no line in it"):
        read(coco)


def test_links_inside_the_data_folder_and_to_it_are_allowed(coco, tmp_path):
    (coco / "by_link").symlink_to(coco / "train2014")
    (coco / "train2014" / "again.jpg").symlink_to(coco / PICTURE)
    linked = ["by_link/COCO_train2014_000000000001.jpg", "train2014/again.jpg"]
    write_index(coco, "rest_val", [{**LINE, "image_path": path} for path in linked])
    (tmp_path / "data").symlink_to(coco)
    assert len(read(tmp_path / "data")) == 2


def test_other_fields_of_a_line_are_passed_over(coco):
    write_index(coco, "rest_val", [{**LINE, "extra": {"x": [True]}}])
    assert as_line(read(coco), 0) == LINE


def test_a_table_can_hold_rows_without_text(tmp_path):
    (tmp_path / "x").write_text('{"text_segment": null, "image_id": 5}\n{"text_segment": [4, 5], "image_id": 6}\n')
    text, image_id = TokenField("text_segment", 88, optional=True), IntField("image_id", count=7)
    table = read_index([tmp_path / "x"], [text, image_id], how_to_make="")
    assert [table["text_segment"][row].tolist() for row in (0, 1)] == [[], [4, 5]]
    assert table["image_id"].tolist() == [5, 6]
    with pytest.raises(InputError, match="x:2: image_id: 6 is not in 0 … 5"):
        read_index([tmp_path / "x"], [IntField("image_id", count=6)], how_to_make="")


# ---- batches --------------------------------------------------------------------------------------------------------


def test_texts_are_padded_to_a_multiple_of_eight():
    ids, padding_mask = pad_text([torch.tensor([0, 9, 2]), torch.tensor([0, 5, 6, 7, 2])], 64)
    assert ids.tolist() == [[0, 9, 2, 1, 1, 1, 1, 1], [0, 5, 6, 7, 2, 1, 1, 1]]
    assert padding_mask.tolist() == [[False] * 3 + [True] * 5, [False] * 5 + [True] * 3]
    assert (ids.dtype, padding_mask.dtype) == (torch.int64, torch.bool)


@pytest.mark.parametrize(("longest", "limit", "width"), [(8, 64, 8), (9, 64, 16), (9, 12, 12), (12, 12, 12), (3, 3, 3)])
def test_padding_never_exceeds_the_limit(longest, limit, width):
    ids, padding_mask = pad_text([torch.zeros(longest, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)], limit)
    assert ids.shape == padding_mask.shape == (2, width)


def test_a_batch_written_out(coco):
    second = {**LINE, "text_segment": [5], "labels": [], "scores": [], "qid": 2**40}
    write_index(coco, "rest_val", [LINE, second])
    dataset = read(coco, num_max_bpe_tokens=6)
    batch = dataset.collate([dataset[1], dataset[0]])
    assert batch.keys() == {"image", "token_ids", "padding_mask", "targets", "question_id", "row"}
    assert (batch["image"].shape, batch["image"].dtype) == ((2, 3, 1, 1), torch.uint8)
    assert batch["token_ids"].tolist() == [[0, 5, 2, 1, 1, 1], [0, 4, 11, 12, 2, 1]]
    assert batch["padding_mask"].sum(1).tolist() == [3, 1]
    targets = torch.zeros(2, 14)
    targets[1, 3], targets[1, 0] = 0.3, 1.0
    assert torch.equal(batch["targets"], targets)
    assert (batch["question_id"].tolist(), batch["question_id"].dtype) == ([2**40, 1000], torch.int64)
    assert (batch["row"].tolist(), batch["row"].dtype) == ([1, 0], torch.int64)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_epoch_reaches_workers_that_live_on(coco, workers):
    dataset = read(coco)
    sampler = EpochSampler(len(dataset), 4, 1, rank=0, world_size=1, seed=0)
    loader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=dataset.collate, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip
    for epoch in (3, 4):
        dataset.set_epoch(epoch)
        sampler.set_epoch(epoch)
        rows = []
        for batch in loader:
            assert set(batch["image"][:, 1].flatten().tolist()) == {epoch}
            assert batch["image"][:, 2].flatten().tolist() == batch["row"].tolist()
            rows += batch["row"].tolist()
        assert rows == sampler.order()[:112].tolist()


# ---- order ----------------------------------------------------------------------------------------------------------


def epoch_of(sampler, epoch, start_step=0):
    sampler.set_epoch(epoch, start_step)
    return list(sampler)


def test_an_epoch_takes_each_row_at_most_once_and_drops_the_incomplete_step():
    sampler = EpochSampler(107, batch_size=5, update_freq=2, rank=0, world_size=1, seed=0)
    batches = epoch_of(sampler, 0)
    assert sampler.steps_per_epoch == 10
    assert len(sampler) == len(batches) == 20
    rows = [row for batch in batches for row in batch]
    assert len(set(rows)) == len(rows) == 100 and set(rows) <= set(range(107))
    assert all(type(row) is int for row in rows)


def test_the_order_depends_on_seed_and_epoch():
    orders = [epoch_of(EpochSampler(50, 5, 1, 0, 1, seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))
    assert epoch_of(EpochSampler(50, 5, 1, 0, 1, seed=1), 1) == orders[3]


def test_the_micro_batches_of_processes_are_the_stretches_of_the_order():
    samplers = [EpochSampler(40, batch_size=2, update_freq=3, rank=rank, world_size=2, seed=3) for rank in (0, 1)]
    first, second = (epoch_of(sampler, 9) for sampler in samplers)
    order = samplers[0].order().tolist()
    # 12 rows per step: micro batch 0 of process 0, of process 1, micro batch 1 of process 0, …
    assert first == [order[0:2], order[4:6], order[8:10], *(order[k : k + 2] for k in (12, 16, 20, 24, 28, 32))]
    assert second == [order[2:4], order[6:8], order[10:12], *(order[k : k + 2] for k in (14, 18, 22, 26, 30, 34))]


@pytest.mark.parametrize(("batch_size", "update_freq", "world_size"), [(8, 1, 1), (2, 2, 2), (1, 2, 4), (4, 2, 1)])
def test_a_step_takes_the_same_rows_on_any_number_of_processes(batch_size, update_freq, world_size):
    order = EpochSampler(50, 8, 1, 0, 1, seed=0).order().tolist()
    for step in range(6):
        taken = []
        for rank in range(world_size):
            batches = epoch_of(EpochSampler(50, batch_size, update_freq, rank, world_size, seed=0), 0)
            taken += [row for batch in batches[step * update_freq : (step + 1) * update_freq] for row in batch]
        assert sorted(taken) == sorted(order[step * 8 : step * 8 + 8])


def test_a_resumed_epoch_is_the_rest_of_the_epoch():
    sampler = EpochSampler(100, batch_size=3, update_freq=4, rank=1, world_size=2, seed=0)
    whole = epoch_of(sampler, 2)
    rest = epoch_of(sampler, 2, start_step=3)
    assert len(whole) == 16
    assert rest == whole[12:] and len(sampler) == 4
    assert epoch_of(sampler, 2) == whole  # the next epoch starts at its beginning
    assert epoch_of(sampler, 2, start_step=4) == []


def test_too_few_rows_for_one_step_are_refused():
    with pytest.raises(InputError, match="has 23 rows, one optimizer step takes 24"):
        EpochSampler(23, batch_size=4, update_freq=3, rank=0, world_size=2, seed=0)
    assert len(EpochSampler(24, batch_size=4, update_freq=3, rank=0, world_size=2, seed=0)) == 3


@pytest.mark.parametrize(("rows", "world_size"), [(10, 1), (10, 3), (12, 3), (2, 4), (1, 2)])
def test_evaluation_takes_each_row_exactly_once(rows, world_size):
    samplers = [EvaluationSampler(rows, 2, rank, world_size) for rank in range(world_size)]
    batches = [list(sampler) for sampler in samplers]
    assert Counter(row for mine in batches for batch in mine for row in batch) == Counter(range(rows))
    assert [len(sampler) for sampler in samplers] == [len(mine) for mine in batches]


def test_evaluation_batches_written_out():
    assert list(EvaluationSampler(10, 2, rank=1, world_size=3)) == [[1, 4], [7]]
    assert list(EvaluationSampler(2, 2, rank=3, world_size=4)) == []
