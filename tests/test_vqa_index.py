"""Making the index of VQAv2: against what the original makes of mini_coco, and under every mistake a user can make.

Also the two helpers it rests on: reading a JSON array piece by piece, and files that appear whole or not at all.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from beit3.data import findings, index_table, index_writing, json_stream
from beit3.data.json_stream import stream_array
from beit3.system.atomic_files import atomic_write, atomic_writes
from beit3.system.errors import InputError
from datasets import VQAv2Dataset, read_answers
from tasks.vqav2 import index as vqa_index

MINI = Path(__file__).parent / "data" / "mini_coco"
EXPECTED = MINI / "expected"
INDEX_FILES = [f"vqa.{name}.jsonl" for name in ("train", "val", "trainable_val", "rest_val", "test", "test-dev")]
TRAIN_QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"
VAL_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
TEST_QUESTIONS = "v2_OpenEnded_mscoco_test2015_questions.json"
TRAIN_ANNOTATIONS = "v2_mscoco_train2014_annotations.json"
VAL_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


@pytest.fixture
def coco(tmp_path):
    """A copy of mini_coco to index and to spoil."""
    return Path(shutil.copytree(MINI, tmp_path / "coco", ignore=shutil.ignore_patterns("expected", "*coco.json")))


def make(coco, **options):
    VQAv2Dataset.make_dataset_index(
        data_path=str(coco), tokenizer=str(coco / "mini.spm"), annotation_data_path=str(coco / "vqa"), **options
    )


def problems_of_making(coco, **options):
    """The problems that making the index raises; checks that nothing was written."""
    before = sorted(path for path in coco.rglob("*"))
    with pytest.raises(InputError) as error:
        make(coco, **options)
    assert sorted(path for path in coco.rglob("*")) == before
    return error.value.problems


def lines(path):
    return path.read_text().splitlines()


def edit(coco, name, change):
    """Rewrite an official file with `change` applied to its list of questions or annotations."""
    path = coco / "vqa" / name
    content = json.loads(path.read_text())
    entries = content["annotations" if "annotations" in name else "questions"]
    changed = change(entries)
    if changed is not None:
        entries[:] = changed
    path.write_text(json.dumps(content))


def assert_as_expected(coco):
    for name in INDEX_FILES:
        assert sorted(lines(coco / name)) == sorted(lines(EXPECTED / name)), name
    assert (coco / "answer2label.txt").read_text() == (EXPECTED / "answer2label.txt").read_text()


def test_the_index_is_that_of_the_original(coco):
    make(coco)
    assert_as_expected(coco)


def test_the_call_that_people_type_works_with_transformers_tokenizer(coco):
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) >= 5:
        pytest.skip("transformers 5 cannot open an .spm file")
    tokenizer = transformers.XLMRobertaTokenizer(str(coco / "mini.spm"))
    VQAv2Dataset.make_dataset_index(str(coco), tokenizer, str(coco / "vqa"))  # by position
    assert_as_expected(coco)


def test_batches_and_chunks_leave_no_seams(coco, monkeypatch):
    monkeypatch.setattr(index_writing, "BATCH", 7)
    monkeypatch.setattr(json_stream, "CHUNK", 100)
    make(coco)
    assert_as_expected(coco)


def test_official_files_may_be_written_in_any_way(coco):
    for path in (coco / "vqa").glob("*.json"):
        content = json.loads(path.read_text())
        reordered = {"license": {"questions": []}, **content, "info": {"list": [1, [2]], "x": None}}
        key = "annotations" if "annotations" in content else "questions"
        reordered[key] = [dict(sorted(entry.items(), reverse=True)) for entry in reordered[key]]
        path.write_text("\ufeff" + json.dumps(reordered, indent=1), encoding="utf-8")
    make(coco)
    assert_as_expected(coco)


def test_only_pictures_on_the_disk_are_indexed_and_the_rest_is_counted(coco, capsys):
    (coco / "train2014" / "COCO_train2014_000000000001.jpg").unlink()
    (coco / "train2014" / "COCO_train2014_000000000002.jpg").unlink()
    gone = [line for line in lines(EXPECTED / "vqa.train.jsonl") if re.search(r"_0+[12]\.jpg", line)]
    asked = json.loads((coco / "vqa" / TRAIN_QUESTIONS).read_text())["questions"]
    of_gone = sum(entry["image_id"] in (1, 2) for entry in asked)
    make(coco)
    assert sorted(lines(coco / "vqa.train.jsonl")) == sorted(set(lines(EXPECTED / "vqa.train.jsonl")) - set(gone))
    printed = capsys.readouterr().out
    assert f"vqa.train.jsonl: {212 - len(gone)} questions of 58 images; {of_gone} left out, 2 pictures are" in printed


def test_the_summary_counts_each_split(coco, capsys):
    make(coco)
    printed = capsys.readouterr().out
    for wanted in (
        "14 answers in answer2label.txt",
        "vqa.train.jsonl: 212 questions of 60 images; 24 left out, no answer",
        "vqa.val.jsonl: 114 questions of 30 images; 7 left out, no answer",
        "vqa.rest_val.jsonl: 114 questions of 30 images",
        "vqa.trainable_val.jsonl: 0 questions of 0 images",
        "vqa.test.jsonl: 84 questions of 20 images\n",
        "vqa.test-dev.jsonl: 28 questions of 20 images\n",
    ):
        assert wanted in printed


def images_of(path):
    return {json.loads(line)["image_path"] for line in lines(path)}


def test_validation_pictures_are_kept_with_all_their_questions(coco, monkeypatch):
    monkeypatch.setattr(vqa_index.choose_rest_val, "__defaults__", (10,))
    make(coco)
    kept, trained = images_of(coco / "vqa.rest_val.jsonl"), images_of(coco / "vqa.trainable_val.jsonl")
    assert (len(kept), len(trained), kept & trained) == (10, 20, set())
    both = lines(coco / "vqa.rest_val.jsonl") + lines(coco / "vqa.trainable_val.jsonl")
    assert sorted(both) == sorted(lines(EXPECTED / "vqa.val.jsonl"))


def test_which_validation_pictures_are_kept_depends_on_the_seed_and_on_no_order(coco, monkeypatch):
    monkeypatch.setattr(vqa_index.choose_rest_val, "__defaults__", (10,))
    make(coco)
    first = images_of(coco / "vqa.rest_val.jsonl")
    edit(coco, VAL_QUESTIONS, lambda entries: entries[::-1])
    make(coco)
    assert images_of(coco / "vqa.rest_val.jsonl") == first
    make(coco, seed=1)
    assert images_of(coco / "vqa.rest_val.jsonl") != first


def test_a_thousand_validation_pictures_are_kept():
    assert len(vqa_index.choose_rest_val(range(3000), seed=0)) == 1000
    assert vqa_index.choose_rest_val(range(999), seed=0) == set(range(999))


def test_labels_follow_the_first_appearance_in_train_then_val(coco):
    edit(coco, VAL_ANNOTATIONS, update_all("multiple_choice_answer", lambda entry: "The Zebra!"))
    make(coco)
    answers = read_answers(coco)
    assert answers[0] == "square" and answers[-1] == "zebra"


def test_votes_are_counted_by_raw_answer(coco):
    given = ["square"] * 2 + ["Square"] * 3 + ["no"] * 1 + ["red"] * 4
    answers = [{"answer": answer} for answer in given]
    edit(coco, TRAIN_ANNOTATIONS, lambda entries: entries[0].update(answers=answers))
    make(coco)
    line = next(line for line in map(json.loads, lines(coco / "vqa.train.jsonl")) if line["qid"] == 1000)
    assert (line["labels"], line["scores"]) == ([0, 12, 11], [0.6, 0.3, 1.0])  # "Square" is no answer of the vocabulary


def test_all_that_is_missing_is_named_at_once(coco):
    (coco / "vqa" / TRAIN_QUESTIONS).unlink()
    (coco / "vqa" / VAL_ANNOTATIONS).unlink()
    (coco / "mini.spm").unlink()
    shutil.rmtree(coco / "test2015")
    for picture in (coco / "val2014").iterdir():
        picture.rename(picture.with_suffix(".txt"))
    problems = problems_of_making(coco)
    for wanted in (
        f"{TRAIN_QUESTIONS}: missing",
        f"{VAL_ANNOTATIONS}: missing",
        "test2015: folder of pictures missing",
        "val2014: no picture in it",
        "mini.spm: cannot read",
    ):
        assert sum(wanted in problem for problem in problems) == 1, wanted
    assert len(problems) == 5


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(InputError) as error:
        VQAv2Dataset.make_dataset_index(tmp_path / "a", MINI / "mini.spm", tmp_path / "b")
    assert f"{tmp_path / 'a'}: no such folder" in error.value.problems
    assert f"{tmp_path / 'b'}: no such folder" in error.value.problems


def test_broken_files_are_named_together_and_nothing_is_written(coco):
    for name in (TRAIN_QUESTIONS, TEST_QUESTIONS):
        path = coco / "vqa" / name
        path.write_bytes(path.read_bytes()[:-500])
    problems = problems_of_making(coco)
    assert len(problems) == 2
    assert re.search(f"{TRAIN_QUESTIONS}: not valid JSON at character .*get it again", problems[0])
    assert re.search(f"{TEST_QUESTIONS}: not valid JSON at character .*get it again", problems[1])


def test_a_failed_making_leaves_an_earlier_index_as_it_was(coco):
    make(coco)
    before = {name: (coco / name).read_bytes() for name in [*INDEX_FILES, "answer2label.txt"]}
    edit(coco, TEST_QUESTIONS, lambda entries: entries[-1].update(question=""))
    problems_of_making(coco)
    assert {name: (coco / name).read_bytes() for name in before} == before


def test_interrupting_leaves_nothing_behind(coco):
    class Interrupting:
        calls = 0

        def tokenize(self, text):
            self.calls += 1
            if self.calls == 300:  # train is written, val begun
                raise KeyboardInterrupt
            return [text]

        def convert_tokens_to_ids(self, tokens):
            return [4] * len(tokens)

    before = sorted(coco.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        VQAv2Dataset.make_dataset_index(coco, Interrupting(), coco / "vqa")
    assert sorted(coco.rglob("*")) == before


def update_first(**values):
    return lambda entries: entries[0].update(values)


def update_all(key, value):
    def update(entries):
        for entry in entries:
            entry[key] = value(entry)

    return update


MISTAKES = {
    "an annotation of an unknown question": (
        TRAIN_ANNOTATIONS,
        lambda entries: entries.append({**entries[0], "question_id": 777}),
        f"{TRAIN_ANNOTATIONS}: annotations of questions that {TRAIN_QUESTIONS} does not have; question_id: 777",
    ),
    "a question without annotation": (
        VAL_ANNOTATIONS,
        lambda entries: entries[:2] + entries[4:],
        f"{VAL_ANNOTATIONS}: no annotation of questions in {VAL_QUESTIONS}; question_id: 1238, 1239",
    ),
    "a question asked twice": (
        TEST_QUESTIONS,
        lambda entries: [*entries, entries[0]],
        f"{TEST_QUESTIONS}: asked more than once; question_id: 1357",
    ),
    "a question annotated twice": (
        VAL_ANNOTATIONS,
        lambda entries: [*entries, entries[0]],
        f"{VAL_ANNOTATIONS}: annotated more than once; question_id: 1236",
    ),
    "another picture in the annotation": (
        TRAIN_ANNOTATIONS,
        update_first(image_id=2),
        f"{TRAIN_ANNOTATIONS}: another image_id than in {TRAIN_QUESTIONS}; question_id: 1000",
    ),
    "an empty question": (
        TEST_QUESTIONS,
        update_first(question=" \n "),
        f'{TEST_QUESTIONS}: `question` is blank: questions[0] has " \\n "',
    ),
    "a question that is no object": (
        TRAIN_QUESTIONS,
        lambda entries: [*entries, 7],
        f"{TRAIN_QUESTIONS}: not a JSON object: questions[236] is 7",
    ),
    "a question whose id is text": (
        TEST_QUESTIONS,
        update_first(question_id="1357"),
        f'{TEST_QUESTIONS}: `question_id` is not a whole number: questions[0] has "1357"',
    ),
    "an annotation without answers": (
        VAL_ANNOTATIONS,
        lambda entries: entries.append({"question_id": 1, "image_id": 1, "multiple_choice_answer": "x"}),
        f"{VAL_ANNOTATIONS}: `answers` is missing: annotations[121]",
    ),
    "an answer that is no text": (
        TRAIN_ANNOTATIONS,
        lambda entries: entries.append({**entries[0], "answers": [{"answer": 7}]}),
        f"{TRAIN_ANNOTATIONS}: `answer` is not a text: annotations[236].answers[0] has 7",
    ),
    "answers all too rare": (
        "both annotations",
        update_all("multiple_choice_answer", lambda entry: str(entry["question_id"])),
        "vqa: the vocabulary is empty, as no answer is the most common one 9 times; distinct answers",
    ),
    "pictures of other questions": (
        TEST_QUESTIONS,
        update_all("image_id", lambda entry: 9999),
        f"{TEST_QUESTIONS}: no question left (0 without an answer in the vocabulary); "
        "questions without picture in test2015/: 84",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_official_files_are_named(coco, mistake):
    name, change, expected = MISTAKES[mistake]
    for edited in [TRAIN_ANNOTATIONS, VAL_ANNOTATIONS] if name == "both annotations" else [name]:
        edit(coco, edited, change)
    problems = problems_of_making(coco)
    assert len(problems) == 1
    assert expected in problems[0]


def test_hundreds_of_equal_mistakes_are_one_problem(coco):
    edit(coco, TRAIN_ANNOTATIONS, lambda entries: entries[:36])
    problems = problems_of_making(coco)
    assert len(problems) == 1
    assert problems[0].endswith("question_id: 1036, 1037, 1038, 1039, 1040 and 195 more")


@pytest.mark.parametrize("key", ["annotations", "data"])
def test_a_file_without_its_list_is_named(coco, key):
    (coco / "vqa" / TEST_QUESTIONS).write_text(json.dumps({key: []}))
    problems = problems_of_making(coco)
    assert len(problems) == 1 and f'{TEST_QUESTIONS}: has no "questions"' in problems[0]


QUESTION_MISTAKES = {
    "an id of truth": ({"question_id": True}, "`question_id` is not a whole number: questions[1] has true"),
    "an id that is a fraction": ({"image_id": 201.0}, "`image_id` is not a whole number: questions[1] has 201.0"),
    "an id that is NaN": ({"question_id": float("nan")}, "`question_id` is not a whole number: questions[1] has NaN"),
    "an id of nothing": ({"image_id": None}, "`image_id` is not a whole number: questions[1] has null"),
    "a large id": ({"question_id": 2**63}, f"`question_id` does not fit into 64 bits: questions[1] has {2**63}"),
    "a large negative id": ({"image_id": -(2**63) - 1}, "`image_id` does not fit into 64 bits: questions[1] has -922"),
    "a huge id": ({"question_id": 10**400}, "`question_id` does not fit into 64 bits: questions[1] has 1000000"),
    "a text that is a list": ({"question": ["a"]}, '`question` is not a text: questions[1] has ["a"]'),
    "no text at all": ({"question": ""}, '`question` is blank: questions[1] has ""'),
    "another kind of blank": ({"question": "\u3000"}, '`question` is blank: questions[1] has "\\u3000"'),
    "a text that vanishes": (
        {"question": "\u200b"}, 'the tokenizer leaves nothing of `question`: questions[1] has "\\u200b"'
    ),
    "half a pair": (
        {"question": "a\ud800"},
        '`question` holds half a surrogate pair, which is no valid Unicode: questions[1] has "a\\ud800"',
    ),
    "a novel": (
        {"question": "red square " * 200_000},
        "too long, as a line of the index may have 1048576 bytes: questions[1] (",
    ),
    "control characters": ({"question_id": "\x1b[2J\x7f\x9b"}, 'questions[1] has "\\u001b[2J\\u007f\\u009b"'),
}  # fmt: skip


ANNOTATION_MISTAKES = {
    "an id of truth": ({"question_id": True}, "`question_id` is not a whole number: annotations[1] has true"),
    "a picture of nothing": ({"image_id": None}, "`image_id` is not a whole number: annotations[1] has null"),
    "a large question": (
        {"question_id": 2**63}, f"`question_id` does not fit into 64 bits: annotations[1] has {2**63}",
    ),
    "a large id": ({"image_id": 2**64}, f"`image_id` does not fit into 64 bits: annotations[1] has {2**64}"),
    "an answer that is a number": (
        {"multiple_choice_answer": 5}, "`multiple_choice_answer` is not a text: annotations[1] has 5",
    ),
    "half a pair": ({"multiple_choice_answer": "\udc00"}, 'annotations[1] has "\\udc00"'),
    "half a pair in one answer": (
        {"answers": [{"answer": "a"}, {"answer": "\ud800"}]},
        '`answer` holds half a surrogate pair, which is no valid Unicode: annotations[1].answers[1] has "\\ud800"',
    ),
    "answers as one text": ({"answers": "red"}, '`answers` is not a list: annotations[1] has "red"'),
    "an answer without its text": ({"answers": [{}, 3]}, "`answer` is missing: annotations[1].answers[0]"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "values", "expected"),
    [(TEST_QUESTIONS, *case) for case in QUESTION_MISTAKES.values()]
    + [(VAL_ANNOTATIONS, *case) for case in ANNOTATION_MISTAKES.values()],
    ids=[*QUESTION_MISTAKES, *(f"annotation: {name}" for name in ANNOTATION_MISTAKES)],
)
def test_a_wrong_question_or_annotation_is_named_with_field_position_and_value(coco, file, values, expected):
    edit(coco, file, lambda entries: entries[1].update(values))
    problems = problems_of_making(coco)
    assert any(expected in problem for problem in problems), problems
    # A wrong annotation may leave its question without one, which is told too.
    assert len(problems) == 1 or file == VAL_ANNOTATIONS
    for problem in problems:
        assert problem.startswith(f"{coco / 'vqa' / file}: ")
        assert problem.isprintable() and len(problem) < 400 + len(str(coco))


def test_one_wrong_field_hides_no_other(coco):
    def spoil(entries):
        entries[0].update(question_id="x", image_id=None, question=7)
        entries[5].update(question_id="y")
        entries[6].update(question="")

    edit(coco, TEST_QUESTIONS, spoil)
    edit(coco, TRAIN_QUESTIONS, update_first(question=" "))
    before = f"{coco / 'vqa' / TEST_QUESTIONS}: "
    assert problems_of_making(coco) == [
        f'{coco / "vqa" / TRAIN_QUESTIONS}: `question` is blank: questions[0] has " "',
        f"{coco / 'vqa' / TRAIN_ANNOTATIONS}: annotations of questions that {TRAIN_QUESTIONS} does not have; "
        "question_id: 1000",
        before + '`question_id` is not a whole number: questions[0] has "x", questions[5] has "y"',
        before + "`image_id` is not a whole number: questions[0] has null",
        before + "`question` is not a text: questions[0] has 7",
        before + '`question` is blank: questions[6] has ""',
    ]


def test_what_is_written_just_short_of_the_limit_is_read(coco, monkeypatch):
    """The maker's limit of a line is the reader's: the longest line that is written is read."""
    make(coco)
    longest = max(len(line) for line in lines(coco / "vqa.test.jsonl")) + 1
    for module in (findings, index_table):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", longest)
    edit(coco, TRAIN_QUESTIONS, update_all("question", lambda entry: "red"))
    edit(coco, VAL_QUESTIONS, update_all("question", lambda entry: "red"))
    make(coco)
    assert len(VQAv2Dataset(coco, "test", None, vocab_size=88, num_answers=14)) == 84
    for module in (findings, index_table):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", longest - 1)
    assert "too long, as a line of the index" in problems_of_making(coco)[0]
    with pytest.raises(InputError, match=r"vqa\.test\.jsonl:\d+: longer than"):
        VQAv2Dataset(coco, "test", None, vocab_size=88, num_answers=14)


def test_folders_and_pictures_that_are_links_are_followed(coco, tmp_path):
    shutil.move(coco / "test2015", tmp_path / "disk")
    (coco / "test2015").symlink_to(tmp_path / "disk")
    picture = coco / "train2014" / "COCO_train2014_000000000001.jpg"
    shutil.move(picture, tmp_path / "elsewhere.jpg")
    picture.symlink_to(tmp_path / "elsewhere.jpg")
    make(coco)
    assert_as_expected(coco)


def test_a_link_that_leads_nowhere_is_a_missing_picture(coco, tmp_path, capsys):
    for name, target in (("1", "nothing.jpg"), ("2", "COCO_train2014_000000000002.jpg")):
        picture = coco / "train2014" / f"COCO_train2014_{int(name):012d}.jpg"
        picture.unlink()
        picture.symlink_to(target)  # the second leads to itself
    (coco / "train2014" / "COCO_train2014_000000000003.jpg").unlink()
    (coco / "train2014" / "COCO_train2014_000000000003.jpg").mkdir()
    make(coco)
    assert "3 pictures are missing" in capsys.readouterr().out
    with pytest.raises(InputError, match="folder of pictures missing"):
        shutil.rmtree(coco / "test2015")
        (coco / "test2015").symlink_to(tmp_path / "nothing")
        make(coco)


def test_pictures_may_lie_elsewhere(coco, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for folder in ("train2014", "val2014", "test2015"):
        shutil.move(coco / folder, pictures)
    assert "train2014: folder of pictures missing" in problems_of_making(coco)[0]
    make(coco, image_path=pictures)
    assert_as_expected(coco)
    assert sorted(path.name for path in pictures.iterdir()) == ["test2015", "train2014", "val2014"]


def test_a_data_folder_that_cannot_be_written_to_is_told_before_anything_is_read(coco, monkeypatch):
    # Tests may run as root, who may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == coco and mode & os.W_OK))
    monkeypatch.setattr(findings, "stream_array", None)
    assert [problem.split(",")[0] for problem in problems_of_making(coco)] == [f"{coco}: cannot be written to"]


@pytest.mark.parametrize("ending", ["jpeg", "JPG", "png", "Webp", "bmp", "gif", "tif", "TIFF", "avif"])
def test_pictures_of_any_ending_are_found(coco, ending):
    for picture in (coco / "val2014").iterdir():
        picture.rename(picture.with_suffix(f".{ending}"))
    make(coco)
    assert images_of(coco / "vqa.val.jsonl") == {
        path.replace(".jpg", f".{ending}") for path in images_of(EXPECTED / "vqa.val.jsonl")
    }


@pytest.mark.parametrize("other", ["000000000201.jpg", "COCO_test2015_000000000201.png", "x_201.TIFF"])
def test_two_pictures_of_one_id_are_named(coco, other):
    shutil.copy(coco / "test2015" / "COCO_test2015_000000000201.jpg", coco / "test2015" / other)
    problems = problems_of_making(coco)
    assert len(problems) == 1 and "are both image 201; remove one" in problems[0]


def test_a_picture_whose_name_is_not_utf8_is_named(coco):
    (coco / "test2015" / os.fsdecode(b"\xff_777.jpg")).write_bytes(b"")
    assert problems_of_making(coco) == [
        f"{coco / 'test2015'}: the name of '\\udcff_777.jpg' is not UTF-8; rename the file"
    ]


def test_the_share_of_unknown_tokens_is_told(coco, capsys):
    make(coco)
    read = [json.loads(line)["text_segment"] for name in ("train", "val", "test", "test-dev")
            for line in lines(EXPECTED / f"vqa.{name}.jsonl")]  # fmt: skip
    tokens = sum(map(len, read))
    share = 100 * sum(ids.count(3) for ids in read) / tokens
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"{share:.2f} % of {tokens} tokens are <unk>" in last and "WARNING" not in last
    edit(coco, TRAIN_QUESTIONS, update_all("question", lambda entry: "ж" * 40 + "?"))
    make(coco)
    assert re.match(
        r"  WARNING: \d+\.\d\d % of \d+ tokens are <unk>, above 5 %", capsys.readouterr().out.splitlines()[-1]
    )


def as_official(monkeypatch, **changes):
    """Let the counts of mini_coco be the official ones, and the answers; `changes` by split."""
    found = {"TRAIN": (236, 60, 60), "VAL": (121, 30, 30), "TEST": (84, 20, 20), "TEST_DEV": (28, 20, 20)}
    for name, counts in {**found, **changes}.items():
        split = getattr(vqa_index, name)
        for field, count in zip(("num_questions", "num_pictures", "num_kept_pictures"), counts, strict=True):
            monkeypatch.setitem(vars(split), field, count)
    monkeypatch.setattr(vqa_index, "OFFICIAL_ANSWERS", (14, "square", 0))


def test_the_counts_are_compared_with_the_official_ones(coco, monkeypatch, capsys):
    as_official(monkeypatch)
    make(coco)
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == "  answer2label.txt: as many answers as in the official data, in their order"
    assert printed.count("    as many as in the official data") == 4


def test_what_is_short_of_the_official_counts_is_told(coco, monkeypatch, capsys):
    as_official(monkeypatch, VAL=(130, 31, 30), TEST=(10**6, 20, 20), TEST_DEV=(27, 20, 20))
    monkeypatch.setattr(vqa_index, "OFFICIAL_ANSWERS", (15, "net", 1))
    (coco / "train2014" / "COCO_train2014_000000000001.jpg").unlink()
    make(coco)
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == (
        '  answer2label.txt: unlike the official data: 14 answers, the first "square", 0 empty instead of 15 answers, '
        'the first "net", 1 empty; released heads do not fit'
    )
    told = [line for line in printed[2:] if "official" in line]
    assert told == [
        "    unlike the official data: 59 pictures instead of 60, 59 pictures with a kept question instead of 60",
        "    unlike the official data: 121 questions instead of 130, 30 pictures instead of 31",
    ]  # and nothing of the test questions, whose numbers are those of other data


def test_other_peoples_data_are_not_compared(coco, capsys):
    make(coco)
    assert "official" not in capsys.readouterr().out


def test_what_is_no_picture_is_passed_over(coco):
    (coco / "test2015" / "._COCO_test2015_000000000201.jpg").write_text("made by an archiver")
    (coco / "test2015" / "readme.txt").write_text("")
    make(coco)
    assert_as_expected(coco)


# ---- json_stream ----------------------------------------------------------------------------------------------------

VALUES = [1, -2.5, 12345678, True, None, "", 'quote " \\ [ ] { } é 🙂 \n', [], [[], [1]], {}, {"a": {"b": [1, 2]}}]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("indent", [None, 2])
def test_the_elements_come_out_whatever_the_chunks(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"first": VALUES, "wanted": VALUES, "n": 123}, indent=indent, ensure_ascii=False))
    seen: list[int] = []
    assert list(stream_array(path, "wanted", seen.append)) == VALUES
    assert sum(seen) == len(path.read_text())


@pytest.mark.parametrize("margin", [0, 50, 10_000])
@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":"), (" ,\n", ": ")])
def test_objects_come_out_wherever_the_window_ends(tmp_path, monkeypatch, margin, separators):
    monkeypatch.setattr(json_stream, "CHUNK", 200)
    monkeypatch.setattr(json_stream, "MARGIN", margin)
    objects = [{"n": number, "text": "é" * (number % 97)} for number in range(300)]
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"x": objects}, separators=separators, ensure_ascii=False))
    assert list(stream_array(path, "x")) == objects


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "the file is cut off"),
        ("[1]", "an object holding \"x\" expected, found '['"),
        ("{", "the file is cut off"),
        ("{}", 'has no "x"'),
        ('{"y": 1}', 'has no "x"'),
        ('{"x": 1}', "an array under \"x\" expected, found '1'"),
        ('{"x": [1, 2', "the file is cut off"),
        ('{"x": [1, 2]', "the file is cut off"),
        ('{"x": [1, ]}', "at character 10: Expecting value"),
        ('{"x": [1 2]}', "at character 9: a comma or the end of the array expected, found '2'"),
        ('{"x": [{"a": tru}]}', "at character 7: Expecting value"),
        ('{"x": ["abc', "at character 7: Unterminated string"),
        ('{"x" [1]}', "a key and its value expected"),
        ('{"x": [' + "[" * 100000, "nested too deeply"),
    ],
)
def test_broken_json_is_named_with_its_place(tmp_path, content, expected):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(expected)) as error:
        list(stream_array(path, "x"))
    assert "x.json: " in str(error.value)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'{"x": ["\xff"]}')
    with pytest.raises(InputError, match=r"x\.json: not UTF-8 text"):
        list(stream_array(path, "x"))


def test_a_value_without_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK", 10)
    monkeypatch.setattr(json_stream, "MAX_VALUE", 1000)
    path = tmp_path / "x.json"
    path.write_text('{"x": ["' + "a" * 100000)
    seen: list[int] = []
    with pytest.raises(InputError, match="no end of the value within 1000 characters"):
        list(stream_array(path, "x", seen.append))
    assert sum(seen) < 4000


def test_another_list_may_be_of_any_length(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK", 10)
    monkeypatch.setattr(json_stream, "MAX_VALUE", 100)
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"other": list(range(1000)), "x": [1, 2]}))
    assert list(stream_array(path, "x")) == [1, 2]


# ---- files ----------------------------------------------------------------------------------------------------------


def test_files_appear_together_at_the_end(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    with atomic_writes(paths) as (a, b):
        a.write("é\n")
        b.write("b")
        assert not any(path.exists() for path in paths)
    assert [path.read_bytes() for path in paths] == ["é\n".encode(), b"b"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_an_error_leaves_the_old_files_and_nothing_else(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    paths[0].write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_writes(paths) as (a, _):
        a.write("new")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a"]
    assert paths[0].read_text() == "old"


def test_a_file_of_bytes_is_replaced_and_keeps_usual_permissions(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with atomic_write(path, "wb") as file:
        file.write(b"\xff\r\n")
    assert path.read_bytes() == b"\xff\r\n"
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_that_is_missing_is_an_error_that_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_writes([tmp_path / "a", tmp_path / "none" / "b"]):
        pass
    assert os.listdir(tmp_path) == []
