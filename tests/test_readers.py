"""Readers of published formats, against made files of each and hand-written rows, and what a path or a folder holds."""

import gzip
import json
import random
import re
import shutil
import sys
import types
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from beit3.data import json_stream
from beit3.data.findings import Findings
from beit3.data.json_stream import stream_array, stream_lines, stream_members
from beit3.system.errors import InputError
from sources import look as looks
from sources.look import look_at
from sources.opening import ShardedSource, find_sources, open_source, sources_here
from sources.readers import READERS
from sources.readers.vqa_pairs import VqaPairs
from sources.rows import Reading, Row
from tasks.vqav2 import index as vqa_index

DATA = Path(__file__).parent / "data"
MADE, MINI = DATA / "sources", DATA / "mini_coco"


@dataclass
class Table:
    """Stands for `TableSource`: opening decides what it is given, and looks no further."""

    path: Path
    columns: dict = field(default_factory=dict)
    prefix: str = ""
    asks: bool | None = None
    kind, unpacked_bytes = "table", 3

    def __post_init__(self):
        self.files, self.pictures_from = [self.path], self.path.parent

    def rows(self, reading):
        yield Row("row 1", "1.jpg", content=self.path.stem.encode())
        yield Row("row 2", "2.jpg")


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    module = types.ModuleType("sources.tables")
    module.TableSource = Table
    module.TABLE_ENDINGS = (
        ".csv",
        ".tsv",
        ".jsonl",
        ".json",
        ".csv.gz",
        ".tsv.gz",
        ".jsonl.gz",
        ".json.gz",
        ".parquet",
    )
    monkeypatch.setitem(sys.modules, "sources.tables", module)


def read(named):
    """The source that is named, its rows, and what reading found."""
    reading = Reading()
    source = open_source(str(named))
    return source, list(source.rows(reading)), reading


def rows_of(name):
    source, rows, reading = read(MADE / name)
    reading.findings.raise_any()
    assert all(path.is_file() for path in source.files) and source.pictures_from == MADE and source.unpacked_bytes == 0
    assert source.asks == any(row.question is not None for row in rows)
    return source, rows, reading


# ---- formats --------------------------------------------------------------------------------------------------------

PAIR_ROWS = [
    Row("questions[0]", "", "Was ist das für ein Tier?", {"Kuh": 2, "Stier": 1}, question_id="7-a", image_id=7),
    Row("questions[1]", "", "How many doors?", {"2": 2, "": 1}, question_id=12, image_id="haus"),
    Row("questions[2]", "", "Is it raining?", {"no": 1}, question_id="7-b", image_id=7),
]


def test_vqa_pairs():
    source, rows, _ = rows_of("OpenEnded_own_train_questions.json")
    assert rows == PAIR_ROWS and list(rows[0].answers) == ["Kuh", "Stier"]
    assert source.files == [MADE / "OpenEnded_own_train_questions.json", MADE / "own_train_annotations.json"]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_pair_may_have_any_names(tmp_path, swapped):
    pair = [tmp_path / "fragen.json", tmp_path / "x.json"]
    shutil.copy(MADE / "OpenEnded_own_train_questions.json", pair[0])
    shutil.copy(MADE / "own_train_annotations.json", pair[1])
    source, rows, _ = read(",".join(map(str, pair[::-1] if swapped else pair)))
    assert rows == PAIR_ROWS and source.files == pair
    _, alone, _ = read(pair[0])
    assert alone == [row._replace(answers=None) for row in PAIR_ROWS]


def test_the_official_pair_is_what_the_index_maker_sees(tmp_path):
    folder = MINI / "vqa"
    for split in vqa_index.OFFICIAL_FILES:
        source, rows, reading = read(folder / split.questions)
        reading.findings.raise_any()
        assert len(source.files) == 1 + split.annotated
        questions = json.loads((folder / split.questions).read_text())["questions"]
        assert [(row.question_id, row.image_id, row.question) for row in rows] == [
            (each["question_id"], each["image_id"], each["question"]) for each in questions
        ]
        if not split.annotated:
            assert {row.answers for row in rows} == {None}
            continue
        numbers, found = vqa_index.Numbering(), Findings()
        labels = vqa_index._read_annotations(folder / split.annotations, numbers, Counter(), found, lambda _: None)
        texts = list(numbers)
        for row in rows:
            at = labels.row_of[row.question_id]
            start, end = labels.ends[at], labels.ends[at + 1]
            seen = [(texts[n], v) for n, v in zip(labels.answers[start:end], labels.votes[start:end], strict=True)]
            assert list(row.answers.items()) == seen


def test_vizwiz():
    _, rows, _ = rows_of("vizwiz.json")
    hope = "Ok. There is another picture I hope it is a better one."
    assert rows == [
        Row("[0]", "VizWiz_val_00000000.jpg", hope, {"unanswerable": 2, "bread": 1}),
        Row("[1]", "VizWiz_val_00000001.jpg", "Which color?", {"grey": 1}),
        Row("[2]", "VizWiz_test_00000002.jpg", "Can you read it?"),
    ]


def test_gqa():
    _, rows, _ = rows_of("gqa.json")
    first = Row('question "201307251"', "2354786.jpg", "Is it overcast?", {"no": 1})
    second = Row('question "n02"', "n161313.jpg", "Who holds the umbrella?")
    assert rows == [
        first._replace(question_id="201307251", image_id="2354786"),
        second._replace(question_id="n02", image_id="n161313"),
    ]


def test_aokvqa():
    _, rows, _ = rows_of("aokvqa.json")
    votes = {"ride": 2, "bus": 1, "taxi": 1}
    assert rows == [
        Row("[0]", "", "What does the man await?", votes, (), "train", "22Mex", 299207),
        Row("[1]", "", "Which sport?", None, (), "test", "3xY", 1),
    ]


def test_textvqa():
    _, rows, _ = rows_of("textvqa.json")
    votes, picture = {"dakota": 2, "dakota digital": 1}, "003a8ae2ef43b901"
    assert rows == [
        Row("data[0]", f"{picture}.jpg", "what is the brand?", votes, (), "val", 34602, picture),
        Row("data[1]", "00a1.jpg", "what time?", None, (), "test", 34603, "00a1"),
    ]


def test_coco_captions():
    _, rows, reading = rows_of("captions_own.json")
    assert rows == [
        Row("images[0]", "b.jpg", captions=["Zwei Häuser."], image_id=2),
        Row("images[1]", "straße/a.png", captions=["A cow.", "A brown cow."], image_id="a"),
    ]
    assert reading.examples == {"a picture without captions": [f"{MADE / 'captions_own.json'}, images[2]"]}


def test_a_file_of_pictures_alone_is_a_test(tmp_path):
    path = tmp_path / "image_info_test2014.json"
    path.write_text('{"images": [{"id": 1, "file_name": "a.jpg"}], "categories": []}')
    assert read(path)[1] == [Row("images[0]", "a.jpg", image_id=1)]


def test_karpathy_of_flickr_has_no_cocoid_and_no_filepath():
    _, rows, _ = rows_of("dataset_flickr.json")
    assert rows == [
        Row("images[0]", "1000092795.jpg", captions=["Two men.", "Men outside."], split="train", image_id=0),
        Row("images[1]", "10002456.jpg", captions=["A dog."], split="val", image_id=1),
    ]


def test_karpathy_of_coco():
    _, rows, reading = rows_of("dataset_coco.json")
    path = "val2014/COCO_val2014_000000391895.jpg"
    assert rows == [
        Row("images[0]", path, captions=["A man."], split="train", image_id=391895),
        Row("images[1]", "x.jpg", captions=["An X."], split="test", image_id=1),
    ]
    assert reading.left_out == {"a picture without captions": 1}


def test_textcaps():
    _, rows, _ = rows_of("textcaps.json")
    signs = ["A sign says stop.", "A red sign.", "Stop sign."]
    assert rows == [
        Row("data[0]", "0054c9.jpg", captions=signs, split="train", image_id="0054"),
        Row("data[1]", "00a2.jpg", captions=["A book."], split="train", image_id="00a2"),
        Row("data[3]", "00ff.png", captions=[], split="test", image_id="00ff"),
    ]


def test_conversations():
    _, rows, reading = rows_of("llava.json")
    assert rows == [
        Row("[0]", "teil 1/ä.jpg", "What is shown?", {"A dog.": 1}),
        Row("[3]", "c.jpg", "Colour?", {"red": 1}),
    ]
    places = {"several turns": 1, "no picture": 2, "several pictures": 4, "no answer": 5, "no question": 6}
    path = MADE / "llava.json"
    assert reading.examples == {why: [f"{path}, [{n}]"] for why, n in (places | {"a blank question": 7}).items()}


def test_messages_in_lines():
    _, rows, reading = rows_of("messages.jsonl")
    assert rows == [
        Row("line 1", "a.jpg", "What?", {"Tea.": 1}),
        Row("line 6", "e.jpg", "Where?", {"Here.": 1}),
    ]
    path = MADE / "messages.jsonl"
    assert reading.examples == {
        "a turn that is no plain text": [f"{path}, line 3"],
        "somebody speaks who neither asks nor answers": [f"{path}, line 4"],
        "the answer stands before the question": [f"{path}, line 5"],
    }


FORMATS = {
    "OpenEnded_own_train_questions.json": "VQA questions and annotations",
    "vizwiz.json": "VizWiz",
    "gqa.json": "GQA",
    "aokvqa.json": "A-OKVQA",
    "textvqa.json": "TextVQA",
    "captions_own.json": "COCO captions",
    "dataset_flickr.json": "Karpathy's captions",
    "dataset_coco.json": "Karpathy's captions",
    "textcaps.json": "TextCaps",
    "llava.json": "conversations",
    "messages.jsonl": "conversations",
}


@pytest.mark.parametrize(("name", "kind"), FORMATS.items())
def test_a_file_fits_one_format_however_it_is_written(tmp_path, name, kind):
    path = MADE / name
    texts = {"written": path.read_text(encoding="utf-8")}
    if path.suffix == ".json":
        content = json.loads(texts["written"])
        texts |= {"wide": json.dumps(content, indent=4), "dense": json.dumps(content, separators=(",", ":"))}
    for written, text in texts.items():
        (tmp_path / written).mkdir()
        packed = tmp_path / written / f"{name}.gz"
        packed.write_bytes(gzip.compress(("\ufeff" + text).encode()))
        assert [reader.kind for reader in READERS if reader.fits(look_at(packed))] == [kind]
        if kind != FORMATS["OpenEnded_own_train_questions.json"]:
            assert read(packed)[1] == read(path)[1]


def test_every_format_is_made_and_documented():
    assert {reader.kind for reader in READERS} == set(FORMATS.values())
    assert all("https://" in sys.modules[reader.__module__].__doc__ for reader in READERS)


def test_a_set_may_be_read_twice():
    for name in FORMATS:
        source, rows, _ = read(MADE / name)
        assert list(source.rows(Reading())) == rows


@pytest.mark.parametrize("name", FORMATS)
def test_progress_comes_in_bytes_of_the_file(tmp_path, name):
    told = []
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress((MADE / name).read_bytes()))
    list(open_source(str(packed)).rows(Reading(on_bytes=told.append)))
    assert sum(told) == packed.stat().st_size


# ---- mistakes -------------------------------------------------------------------------------------------------------


def change(name, place, value, tmp_path):
    """A copy of a made file, in which the place holds another value; `KeyError`: nothing."""
    content = json.loads((MADE / name).read_text(encoding="utf-8"))
    at, last = content, place[-1]
    for key in place[:-1]:
        at = at[key]
    if value is KeyError:
        del at[last]
    else:
        at[last] = value
    path = tmp_path / name
    path.write_text(json.dumps(content))
    return path


MISTAKES = [
    ("vizwiz.json", (1, "question"), KeyError, "`question` is missing: [1]"),
    ("vizwiz.json", (1, "image"), "../a.jpg", '`image` is not a path below the folder of pictures: [1] has "../a.jpg"'),
    ("vizwiz.json", (1,), 5, "not a JSON object: [1] is 5"),
    ("vizwiz.json", (1, "answers", 0, "answer"), 3, "`answer` is not a text: [1].answers[0] has 3"),
    ("gqa.json", ("n02", "imageId"), "/etc/x", '`imageId` is not a path below the folder of pictures: question "n02"'),
    ("gqa.json", ("n02", "answer"), "", '`answer` is blank: question "n02" has ""'),
    ("aokvqa.json", (1, "question_id"), "22Mex", '`question_id` of another entry: [1] has "22Mex"'),
    ("aokvqa.json", (0, "split"), "trian", '`split` is no split: train, val or test: [0] has "trian"'),
    ("aokvqa.json", (0, "direct_answers"), KeyError, "`direct_answers` is missing: [0]"),
    ("aokvqa.json", (0, "direct_answers", 1), None, "`direct_answers` holds what is not a text: [0] has"),
    ("aokvqa.json", (1, "image_id"), "1", '`image_id` is not a whole number: [1] has "1"'),
    ("textvqa.json", ("data", 1, "question_id"), 34602, "`question_id` of another entry: data[1] has 34602"),
    ("textvqa.json", ("data", 1, "question_id"), 1.5, "`question_id` is neither a whole number nor a text: data[1]"),
    ("textvqa.json", ("data", 1, "question_id"), 1 << 64, "`question_id` does not fit into 64 bits: data[1]"),
    ("textvqa.json", ("data", 0, "answers"), "dakota", "`answers` is not a list: data[0] has"),
    ("textvqa.json", ("data", 0, "question"), "\ud800", "`question` holds half a surrogate pair, which is no valid"),
    ("captions_own.json", ("images", 2, "id"), 2, "`id` of another image: images[2] has 2, as images[0]"),
    ("captions_own.json", ("images", 1, "file_name"), KeyError, "`file_name` is missing: images[1]"),
    ("captions_own.json", ("annotations", 0, "image_id"), 9, "`image_id` is not among `images`: annotations[0] has 9"),
    ("captions_own.json", ("annotations", 0, "caption"), " ", '`caption` is blank: annotations[0] has " "'),
    ("dataset_coco.json", ("images", 0, "filepath"), "..", "`filepath` is not a path below the folder of pictures"),
    ("dataset_coco.json", ("images", 0, "sentences", 0), {}, "`raw` is missing: images[0].sentences[0]"),
    ("dataset_flickr.json", ("images", 1, "imgid"), 0, "`imgid` of another entry: images[1] has 0"),
    ("textcaps.json", ("data", 2, "set_name"), "val", '`set_name` of one picture differs: data[2] has "val", unlike'),
    ("textcaps.json", ("data", 1, "caption_str"), 1, "`caption_str` is not a text: data[1] has 1"),
    ("llava.json", (0, "image"), "/a.jpg", '`image` is not a path below the folder of pictures: [0] has "/a.jpg"'),
    ("llava.json", (0, "conversations"), {}, "`conversations` is not a list: [0] has {}"),
    ("llava.json", (0, "conversations"), KeyError, "`conversations` is missing: [0]"),
    ("llava.json", (0, "conversations", 1, "value"), 4, "`value` is not a text: [0].conversations[1] has 4"),
]

# Of a picture without captions, of one caption among others, and of a split: the row stays.
HARMLESS = {told for name, place, _, told in MISTAKES if place[-1] in ("id", "set_name") or "annotations" in place}


@pytest.mark.parametrize(("name", "place", "value", "told"), MISTAKES)
def test_a_mistake_is_told_with_field_place_and_value(tmp_path, name, place, value, told):
    path = change(name, place, value, tmp_path)
    reader = next(reader for reader in READERS if reader.kind == FORMATS[name])
    reading = Reading()
    rows = list(reader(path).rows(reading))
    with pytest.raises(InputError) as error:
        reading.findings.raise_any()
    [problem] = error.value.problems
    assert problem.startswith(f"{path}: {told}")
    assert len(rows_of(name)[1]) - len(rows) == (told not in HARMLESS)


PAIR = ("OpenEnded_own_train_questions.json", "own_train_annotations.json")
QUESTIONS, ANNOTATIONS = PAIR
PAIR_MISTAKES = [
    (ANNOTATIONS, (1,), KeyError, 'no annotation of a question: questions[2] ("7-b")'),
    (ANNOTATIONS, (1, "question_id"), 12, "`question_id` of another entry: annotations[1] has 12"),
    (ANNOTATIONS, (0, "image_id"), 7, 'another `image_id` than the question has: questions[1] has "haus", its'),
    (ANNOTATIONS, (0, "answers"), None, "`answers` is not a list: annotations[0] has null"),
    (ANNOTATIONS, (0, "answers", 1), {"a": 1}, "`answer` is missing: annotations[0].answers[1]"),
    (ANNOTATIONS, (0, "answers", 1), "2", 'not a JSON object: annotations[0].answers[1] is "2"'),
    (QUESTIONS, (1,), KeyError, f"annotations of questions that {QUESTIONS} does not have; question_id: 12"),
    (QUESTIONS, (1, "question_id"), "7-a", '`question_id` of another entry: questions[1] has "7-a"'),
]


@pytest.mark.parametrize(("name", "place", "value", "told"), PAIR_MISTAKES)
def test_mistakes_in_a_pair(tmp_path, name, place, value, told):
    for each in PAIR:
        shutil.copy(MADE / each, tmp_path)
    changed = change(name, ("questions" if name == QUESTIONS else "annotations", *place), value, tmp_path)
    _, rows, reading = read(tmp_path / QUESTIONS)
    with pytest.raises(InputError) as error:
        reading.findings.raise_any()
    told_of = tmp_path / ANNOTATIONS if told.startswith("annotations of") else changed
    assert f"{told_of}: {told}" in error.value.problems[0] and len(rows) == 2
    # A doubled id leaves its question or annotation without the other; what is wrong otherwise is told once.
    assert len(error.value.problems) == (2 if "of another entry" in told else 1)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_cut_off_is_told_after_its_sound_rows(tmp_path, name):
    text = (MADE / name).read_text(encoding="utf-8").rstrip()
    path = tmp_path / name
    path.write_text(text[:-1], encoding="utf-8")
    reading = Reading()
    reader = next(reader for reader in READERS if reader.kind == FORMATS[name])
    rows = list(reader(path).rows(reading))
    [problem] = reading.findings.broken_files
    assert problem.startswith(str(path)) and "not valid JSON" in problem
    assert not reading.findings.examples and (rows or name == "captions_own.json")


@pytest.mark.parametrize("name", FORMATS)
def test_deep_nesting_is_told(tmp_path, name):
    text = (MADE / name).read_text(encoding="utf-8").rstrip()
    nested = "[" * 200_000
    path = tmp_path / name
    last = "\n" + nested if name.endswith("l") else f', "x": {nested}' if text.endswith("}") else f", {nested}"
    path.write_text((text if name.endswith("l") else text[:-1]) + last, encoding="utf-8")
    _, rows, reading = read(path)
    assert rows and "nested too deeply" in reading.findings.broken_files[0]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", ["", "{}", "[]", "null", "[1, null]", '{"data": 1}', '{"1": null}', "\x00"])
def test_no_reader_raises_whatever_comes(tmp_path, reader, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    reading = Reading()
    assert list(reader(path).rows(reading)) == []


@pytest.mark.parametrize("name", FORMATS)
def test_no_reader_raises_whatever_a_value_is(tmp_path, name):
    """Each value in turn is replaced by others: rows are sound or something is noted, and nothing else comes."""
    path = tmp_path / name
    lines = name.endswith("l")
    text = (MADE / name).read_text(encoding="utf-8")
    content = [json.loads(line) for line in text.split("\n") if line] if lines else json.loads(text)
    reader = next(reader for reader in READERS if reader.kind == FORMATS[name])

    def places(value):
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, each in inner:
            yield value, key
            yield from places(each)

    draw = random.Random(0)
    for holder, key in list(places(content)):
        kept, holder[key] = holder[key], draw.choice([None, True, 1.5, "", "x\n\x1b", [], {}, [[]], [None], {"a": 1}])
        path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content))
        reading = Reading()
        for row in reader(path).rows(reading):
            assert type(row.image) is str and ".." not in row.image and type(row.question) in (str, type(None))
            assert all(type(caption) is str for caption in row.captions)
            assert all(type(answer) is str for answer in row.answers or ())
        problems = [*reading.findings.broken_files, *reading.findings.examples]
        assert all(problem.isprintable() for problem in problems)
        holder[key] = kept


# ---- opening --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("own.csv", "image,question,answer\n"),
        ("own.tsv", ""),
        ("own.json", '[{"image": "a.jpg", "question": "What?", "answers": [{"answer": "x"}]}]'),
        ("own.jsonl", '{"image": "a.jpg", "caption": "x"}\n'),
        ("one.jsonl", '{"image": "a.jpg", "data": [{"question": 1, "question_id": 2, "image_id": 3}]}'),
        ("lines.json", '{"image": "a.jpg", "caption": "x"}\n{"image": "b.jpg"}\n'),
        ("cut.json", '[{"image": "a.jpg", "ques'),
        ("blank.json", ""),
        ("binary.json", "\udcff"),
    ],
)
def test_what_is_no_published_format_is_a_table(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, errors="surrogateescape")
    assert open_source(str(path), {"image": "datei"}, True) == Table(path, {"image": "datei"}, "", True)
    assert open_source(str(path)) == Table(path, {}, "", None)


def test_a_list_whose_columns_are_named_is_a_table():
    columns = {"image": "picture"}
    assert open_source(str(MADE / "vizwiz.json"), columns) == Table(MADE / "vizwiz.json", columns)
    assert open_source(str(MADE / "gqa.json"), columns).kind == "GQA"


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("none.csv", "{}/none.csv: no such file or folder"),
        ("x" * 300, "x: no such file or folder"),
        ("x.xlsx", "{}/x.xlsx: no table and no published format by its ending; wanted .csv, .tsv, .jsonl, .json, "),
        ("x.json", '{}/x.json: a JSON object of no known format (its first keys: "a", "b\\u001b"); known are VQA '),
        (
            "empty",
            "{}/empty: a folder without a table metadata{{.csv,.jsonl,.parquet}}; name a table, or put one there",
        ),
        ("two", "{}/two: metadata.csv, metadata.jsonl are all there, and one is read; name the one, or remove others"),
        ("a_annotations.json", "{}/a_annotations.json: holds annotations alone; name its questions, or both as"),
        ("x.json,y.json", "{}/y.json: no such file"),
        ("x.json,a_annotations.json", "of files joined by a comma, one must hold `questions` and one `annotations`"),
    ],
)
def test_what_cannot_be_opened_is_said_in_a_sentence(tmp_path, named, told):
    for folder in ("empty", "two"):
        (tmp_path / folder).mkdir()
    for name in ("x.xlsx", "two/metadata.csv", "two/metadata.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "x.json").write_text('{"a": 1, "b\\u001b": [1, 2]}')
    shutil.copy(MADE / "own_train_annotations.json", tmp_path / "a_annotations.json")
    with pytest.raises(InputError, match=re.escape(told.format(tmp_path))):
        open_source(",".join(str(tmp_path / each) for each in named.split(",")))


def test_a_look_reads_no_more_than_the_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(looks, "BEGINNING", 200)
    path = tmp_path / "x.json"
    path.write_text('{"info": {"a": [1]}, "questions": [{"question_id": 1, "q": "' + "a" * 500 + '"}], "later": 1}')
    look = look_at(path)
    assert (look.kind, dict(look.inside)) == ("object", {"info": {"a"}, "questions": {"question_id", "q"}})


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found_in(folder, *names):
    touch(folder, *names)
    assert sources_here(folder)
    return {split: (source.path, source.prefix) for split, source in find_sources(folder).items()}


def test_a_folder_of_pictures_with_one_table(tmp_path):
    assert found_in(tmp_path, "metadata.csv", "a.jpg") == {"train": (tmp_path / "metadata.csv", "")}
    columns = {"image": "datei"}
    assert find_sources(tmp_path, columns, False) == {"train": Table(tmp_path / "metadata.csv", columns, "", False)}
    assert open_source(str(tmp_path), columns, False) == Table(tmp_path / "metadata.csv", columns, "", False)


def test_a_folder_for_each_split(tmp_path):
    names = (
        "train/metadata.jsonl",
        "validation/metadata.parquet",
        "Test/metadata.csv",
        "more/metadata.csv",
        "train/1.jpg",
    )
    assert found_in(tmp_path, *names) == {
        "test": (tmp_path / "Test/metadata.csv", "Test/"),
        "train": (tmp_path / "train/metadata.jsonl", "train/"),
        "val": (tmp_path / "validation/metadata.parquet", "validation/"),
    }
    assert {source.pictures_from for source in find_sources(tmp_path).values()} == {tmp_path}


def test_a_table_for_each_split(tmp_path):
    names = "train.csv", "dev.jsonl.gz", "TEST.parquet", "vqa.train.jsonl", "train.txt", "notes.csv"
    assert found_in(tmp_path, *names) == {
        "test": (tmp_path / "TEST.parquet", ""),
        "train": (tmp_path / "train.csv", ""),
        "val": (tmp_path / "dev.jsonl.gz", ""),
    }


def test_a_split_may_be_of_a_published_format(tmp_path):
    shutil.copy(MADE / "textvqa.json", tmp_path / "val.json")
    assert find_sources(tmp_path)["val"].kind == "TextVQA"


@pytest.mark.parametrize("below", ["", "data/"])
def test_shards_are_read_one_behind_the_other(tmp_path, below):
    touch(
        tmp_path, *(f"{below}train-0000{n}-of-00003.parquet" for n in (2, 0, 1)), f"{below}test-00000-of-00001.parquet"
    )
    assert sources_here(tmp_path)
    found = find_sources(tmp_path)
    train = found["train"]
    assert isinstance(train, ShardedSource) and found["test"].path.name == "test-00000-of-00001.parquet"
    assert [path.name for path in train.files] == [f"train-0000{n}-of-00003.parquet" for n in (0, 1, 2)]
    assert (train.kind, train.unpacked_bytes) == ("table in 3 parts", 9)
    assert list(train.rows(Reading()))[2:4] == [
        Row("train-00001-of-00003.parquet, row 1", "train-00001-of-00003/1.jpg", content=b"train-00001-of-00003"),
        Row("train-00001-of-00003.parquet, row 2", "2.jpg"),
    ]
    assert len(list(train.rows(Reading()))) == 6


def test_what_is_doubled_or_not_complete_is_told_at_once(tmp_path):
    touch(tmp_path, "val.csv", "validation.jsonl", "metadata.csv", "train/metadata.csv", "test-00001-of-00002.parquet")
    assert sources_here(tmp_path)
    with pytest.raises(InputError) as error:
        find_sources(tmp_path)
    assert error.value.problems == [
        f"{tmp_path}: metadata.csv, {tmp_path}/train/metadata.csv are all for train, and one is read; remove others",
        f"{tmp_path}: val.csv, validation.jsonl are all for val, and one is read; remove others",
        f"{tmp_path}: 1 of 2 files like test-00001-of-00002.parquet; get the missing ones",
    ]


def test_splits_that_cannot_be_opened_are_told_at_once(tmp_path):
    for name in ("train", "val"):
        (tmp_path / f"{name}.json").write_text('{"x": 1}')
    with pytest.raises(InputError) as error:
        find_sources(tmp_path)
    assert [problem.split(": a JSON object of")[0] for problem in error.value.problems] == [
        f"{tmp_path}/train.json",
        f"{tmp_path}/val.json",
    ]


@pytest.mark.parametrize("names", [[], ["train2014/a.jpg", "vqa.train.jsonl", "answers.txt", "dataset_coco.json"]])
def test_a_folder_without_own_data_has_no_source(tmp_path, names):
    touch(tmp_path, *names)
    assert find_sources(tmp_path) == {} and not sources_here(tmp_path)
    assert find_sources(tmp_path / "none") == {} and not sources_here(tmp_path / "none")


# ---- JSON that is streamed ------------------------------------------------------------------------------------------

VALUES = [1, -2.5, 12345678, True, None, "", 'quote " \\ [ ] { } é 🙂 \n', [], [[], [1]], {}, {"a": {"b": [1, 2]}}]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
@pytest.mark.parametrize("packed", [False, True])
def test_lists_members_and_lines_come_out_whatever_the_chunks(tmp_path, monkeypatch, chunk, packed):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    path = tmp_path / ("x.json.gz" if packed else "x.json")

    def write(text):
        path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())

    members = [(f"k{number}", value) for number, value in enumerate(VALUES)]
    write(json.dumps(VALUES, ensure_ascii=False, indent=1))
    assert list(stream_array(path, None)) == VALUES
    write(json.dumps(dict(members), ensure_ascii=False))
    assert list(stream_members(path)) == members
    write("\r\n\n".join(json.dumps(value, ensure_ascii=False) for value in VALUES))
    assert list(stream_lines(path)) == [(1 + 2 * number, value) for number, value in enumerate(VALUES)]


def test_members_may_have_equal_keys(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": {"imageId": "1", "question": "a?"}, "a": {"imageId": "1", "question": "b?"}}')
    _, rows, reading = read(path)
    assert len(rows) == 1 and reading.findings.examples == {
        f"{path}: `question id` of another entry": ['question "a" has "a"']
    }


@pytest.mark.parametrize(
    ("streamed", "content", "told"),
    [
        (stream_array, "{}", "a list expected, found '{'"),
        (stream_array, "[1] 2", "the end of the file expected, found '2'"),
        (stream_array, "[1", "the file is cut off"),
        (stream_members, "[]", "an object expected, found '['"),
        (stream_members, "{1: 2}", "a key in quotes expected, found '1'"),
        (stream_members, '{"a": 1', "the file is cut off"),
        (stream_members, '{"a": 1} x', "the end of the file expected, found 'x'"),
        (stream_lines, '1\n\n{"a"', "line 3: not valid JSON: Expecting"),
        (stream_lines, "1 2", "line 1: not valid JSON: Extra data"),
        (stream_lines, "1\n" + "[" * 100000, "line 2: not valid JSON: nested too deeply"),
    ],
)
def test_broken_json_is_told_with_its_place(tmp_path, streamed, content, told):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(told)) as error:
        list(streamed(path, None))
    assert str(error.value).startswith(str(path))


def test_a_line_without_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK", 10)
    monkeypatch.setattr(json_stream, "MAX_VALUE", 1000)
    path = tmp_path / "x.jsonl"
    path.write_text("1\n" + "a" * 100000)
    seen: list[int] = []
    with pytest.raises(InputError, match="no end of the line within 1000 characters"):
        list(stream_lines(path, seen.append))
    assert sum(seen) < 4000


def test_gzip_that_swells_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "MAX_UNPACKED", 1 << 21)
    monkeypatch.setattr(json_stream, "CHUNK", 1 << 18)
    path = tmp_path / "x.json.gz"
    path.write_bytes(gzip.compress(b"[" + b" " * (1 << 22)))
    with pytest.raises(InputError, match="unpacks to more than 200 times its size"):
        list(stream_array(path, None))
    monkeypatch.setattr(json_stream, "MAX_UNPACKED", 1 << 23)
    with pytest.raises(InputError, match="the file is cut off"):
        list(stream_array(path, None))


@pytest.mark.parametrize(
    "spoil",
    [lambda packed: packed[:-9], lambda packed: b"[1]" + packed, lambda packed: packed[:20] + b"xxxx" + packed[24:]],
    ids=["cut off", "not gzip", "broken"],
)
def test_broken_gzip_is_told(tmp_path, spoil):
    path = tmp_path / "x.json.gz"
    path.write_bytes(spoil(gzip.compress(json.dumps([{"a": n * n} for n in range(100)]).encode())))
    with pytest.raises(InputError, match=r"x\.json\.gz: not a sound gzip file \(.*\); get it again"):
        list(stream_array(path, None))
    assert look_at(path).kind in ("", "list")


def test_the_memory_of_annotations_is_flat():
    """A question's votes are numbers in arrays and its answers are kept once, so no dict is kept for it."""
    reading = Reading()
    rows = VqaPairs(MINI / "vqa" / vqa_index.TRAIN.questions).rows(reading)
    first = next(rows)
    kept = rows.gi_frame.f_locals["annotated"]
    assert len(kept.texts) == len(set(kept.texts)) < len(kept.answers) == sum(1 for _ in kept.counts)
    assert first.answers and sum(kept.counts) == 10 * len(kept.row_of)
