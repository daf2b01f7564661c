"""People's own tables: what each cell means, that all formats say the same, and a sentence for each mistake."""

import csv
import gzip
import io
import json
import sys
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3.system.errors import InputError
from inference.rows import Table, find_rows
from sources.columns import parse_columns
from sources.raw_tables import TABLE_ENDINGS, open_table
from sources.rows import Reading, Row
from sources.tables import TableSource

QUESTIONS = [
    {"image": "a.jpg", "question": "What is it?", "answer": "cat", "question_id": 1},
    {"image": "größe/ü b.png", "question": 'Is it "red",\nor not?', "answer": "yes|no|yes", "question_id": "q-2"},
]


def write(path, content):
    """A table of these rows in the format of the path's name; bytes and texts are written as they are."""
    if isinstance(content, str):
        content = content.encode()
    if not isinstance(content, bytes):
        names = list(dict.fromkeys(name for row in content for name in row))
        name = path.name.removesuffix(".gz")
        if name.endswith(".parquet"):
            arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
            import pyarrow.parquet

            columns = {each: [row.get(each) for row in content] for each in names}
            if "question_id" in columns:
                columns["question_id"] = list(map(str, columns["question_id"]))
            pyarrow.parquet.write_table(arrow.table(columns), path)
            return path
        if name.endswith(".jsonl"):
            content = "".join(json.dumps(row) + "\n" for row in content)
        elif name.endswith(".json"):
            content = json.dumps(content, indent=1)
        else:
            text = io.StringIO()
            writer = csv.DictWriter(text, names, delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(content)
            content = text.getvalue()
        content = content.encode()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


def read(path, *args, **options):
    reading = Reading()
    rows = list(TableSource(path, *args, **options).rows(reading))
    reading.findings.raise_any()
    return rows


def problems(path, *args, **options):
    with pytest.raises(InputError) as caught:
        read(path, *args, **options)
    return [problem.removeprefix(f"{path}: ") for problem in caught.value.problems]


# what is right


@pytest.mark.parametrize("ending", TABLE_ENDINGS)
def test_every_format_gives_the_same_rows(tmp_path, ending):
    path = write(tmp_path / f"t{ending}", QUESTIONS)
    source = TableSource(path)
    read_bytes = []
    reading = Reading(on_bytes=read_bytes.append)
    rows = list(source.rows(reading))
    reading.findings.raise_any()
    typed_as_text = ending == ".parquet"  # one column has one type
    second = QUESTIONS[1]
    assert [row._replace(place="") for row in rows] == [
        Row("", "a.jpg", "What is it?", {"cat": 1}, question_id="1" if typed_as_text else 1),
        Row("", "größe/ü b.png", second["question"], {"yes": 2, "no": 1}, question_id="q-2"),
    ]
    unit, step = {".json": ("row", 0), ".jsonl": ("line", 0)}.get(
        ending.removesuffix(".gz"), ("row", 0) if typed_as_text else ("line", 1)
    )
    assert [row.place for row in rows] == [f"{unit} {1 + step}", f"{unit} {2 + step}"]
    assert list(rows[1].answers) == ["yes", "no"]
    assert source.asks and source.files == [path] and source.pictures_from == tmp_path and not source.unpacked_bytes
    assert sum(read_bytes) == path.stat().st_size
    assert list(source.rows(Reading())) == rows  # anew each time


def test_a_row_is_named_by_the_line_where_it_begins(tmp_path):
    path = write(tmp_path / "t.csv", 'image,caption\r\n\r\na.jpg,"two\r\nlines"\r\n,,\r\n\r\nb.jpg,x\r\n')
    assert [(row.place, row.captions) for row in read(path)] == [
        ("line 3", ("two\r\nlines",)),
        ("line 7", ("x",)),
    ]


@pytest.mark.parametrize(
    ("cell", "wanted"),
    [
        (" red ", {"red": 1}),
        ("red| blue |red", {"red": 2, "blue": 1}),
        ('["a|b", "c", "c"]', {"a|b": 1, "c": 2}),
        ('[{"answer": "yes", "answer_id": 1}, {"answer": "no"}, {"answer": "yes"}]', {"yes": 2, "no": 1}),
        ("[no list]", {"[no list]": 1}),
        ("3", {"3": 1}),
        ("日本\u2003語 é", {"日本\u2003語 é": 1}),
    ],
)
def test_answers_of_a_cell_of_csv(tmp_path, cell, wanted):
    [row] = read(write(tmp_path / "t.csv", [{"file": "a.jpg", "query": "q?", "label": cell}]))
    assert row.answers == wanted and list(row.answers) == list(wanted)


@pytest.mark.parametrize(
    ("cell", "wanted"),
    [(["a", "b", "a"], {"a": 2, "b": 1}), ([{"answer": "x"}] * 10, {"x": 10}), ("a|b", {"a": 1, "b": 1})],
)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_answers_of_typed_tables(tmp_path, ending, cell, wanted):
    [row] = read(write(tmp_path / f"t{ending}", [{"img": "a.jpg", "prompt": "q?", "response": cell}]))
    assert row.answers == wanted


@pytest.mark.parametrize(
    ("cell", "wanted"), [(" a | b ", ("a | b",)), ('["a", " b "]', ("a", "b")), ("[dog]", ("[dog]",))]
)
def test_captions_of_a_cell(tmp_path, cell, wanted):
    [row] = read(write(tmp_path / "t.csv", [{"file_name": "a.jpg", "Text ": cell}]))
    assert row == Row("line 2", "a.jpg", captions=wanted)


def test_all_columns_and_their_values(tmp_path):
    head = "Weight,IMAGE, Question ,answers,split,question_id,image_id,comment\n"
    path = write(
        tmp_path / "t.csv",
        head + "0.5,./a//..jpg,q?,x,Validation,007,7,!\n".replace("//..", "/x/") + ",b.jpg,p?,,TEST,,,\n",
    )
    assert read(path, prefix="train/") == [
        Row("line 2", "train/a/x/jpg", "q?", {"x": 1}, (), "val", "007", 7, 0.5),
        Row("line 3", "train/b.jpg", "p?", None, (), "test", None, None, 1.0),
    ]


def test_columns_are_chosen_and_nothing_else_is_then_taken_for_them(tmp_path):
    rows = [{"datei": "a.jpg", "image": "no", "text": "q?", "a, b=c": "x"}]
    path = write(tmp_path / "t.csv", rows)
    chosen = parse_columns(r"image=datei, question=text,answer=a\, b=c")
    assert chosen == {"image": "datei", "question": "text", "answers": "a, b=c"}
    assert read(path, chosen) == [Row("line 2", "a.jpg", "q?", {"x": 1})]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "nothing stands before or behind a comma"),
        ("image=a,", "nothing stands before or behind a comma"),
        ("image", '"image" has no "="'),
        ("bild=image", '"bild" is no column that is known; they are image, question,'),
        ("image=", "image= lacks the name"),
        ("answer=a,answers=b", 'answers is given twice, as "a" and "b"'),
    ],
)
def test_what_is_wrong_with_chosen_columns_is_said(text, wanted):
    with pytest.raises(InputError) as caught:
        parse_columns(text)
    assert wanted in str(caught.value)


def test_what_rows_are_follows_from_the_columns_or_is_told(tmp_path):
    both = write(tmp_path / "both.csv", "image,question,caption\na.jpg,q?,c\n")
    assert "say which, by --task vqa or captioning" in problems(both)[0]
    assert read(both, asks=True) == [Row("line 2", "a.jpg", "q?")]
    assert read(both, asks=False) == [Row("line 2", "a.jpg", captions=("c",))]
    empty = write(tmp_path / "empty.csv", "image,question,caption,title\na.jpg,q?,, \nb.jpg,p?,,\n")
    assert [row.question for row in read(empty)] == ["q?", "p?"]  # an empty column counts as not there
    alone = write(tmp_path / "alone.csv", "image\na.jpg\n")
    assert read(alone, asks=False) == [Row("line 2", "a.jpg")]
    assert "has no column question or captions" in problems(alone)[0]
    unanswered = write(tmp_path / "test.csv", "image,question,answer\na.jpg,q?,\n")
    assert read(unanswered) == [Row("line 2", "a.jpg", "q?")]


def test_a_byte_order_mark_is_passed_over(tmp_path):
    assert read(write(tmp_path / "t.csv", b"\xef\xbb\xbfimage,caption\na.jpg,x\n"))[0].image == "a.jpg"
    assert (
        read(write(tmp_path / "t.json", b'\xef\xbb\xbf [ {"image": "a.jpg", "caption": "x"} ] \n'))[0].image == "a.jpg"
    )


def test_parquet_holds_pictures_and_other_kinds_of_columns(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as parquet

    images = [
        {"bytes": b"\x89PNG1", "path": "x.png"}, {"bytes": b"\x89PNG2", "path": None},
        {"bytes": b"\xff\xd8\xff3", "path": "/home/me/x.jpg"}, {"bytes": None, "path": "d/y.jpg"},
    ]  # fmt: skip
    columns = {
        "image": images,
        "question": arrow.array(["q?"] * 4, arrow.large_string()),
        "answers": arrow.array([["a", "a"], ["b"], ["a", "b"], ["c"]]),
        "split": arrow.array(["train"] * 4).dictionary_encode(),
    }
    parquet.write_table(arrow.table(columns), tmp_path / "t.parquet", row_group_size=3)
    source = TableSource(tmp_path / "t.parquet")
    rows = list(source.rows(Reading()))
    assert [row.image for row in rows] == ["x.png", "00000002.png", "00000003.jpg", "d/y.jpg"]
    assert [row.content for row in rows] == [b"\x89PNG1", b"\x89PNG2", b"\xff\xd8\xff3", None]
    assert [row.answers for row in rows] == [{"a": 2}, {"b": 1}, {"a": 1, "b": 1}, {"c": 1}]
    assert {row.split for row in rows} == {"train"} and rows[3].place == "row 4"
    assert source.unpacked_bytes > 0


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        open_table(tmp_path / "t.parquet")


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20).map(lambda x: f"x{x}x")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(TEXTS, TEXTS, st.one_of(st.integers(0, 2**63 - 1), TEXTS)),
        min_size=1,
        max_size=8,
        unique_by=lambda r: r[2],
    )
)
def test_csv_and_json_lines_give_equal_rows(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("same")
    table = [{"image": "a.jpg", "question": q, "answer": a, "question_id": i} for q, a, i in rows]
    found = [read(write(folder / f"t{ending}", table)) for ending in (".csv", ".tsv", ".jsonl", ".json")]
    assert [[row._replace(place="") for row in each] for each in found] == [
        [row._replace(place="") for row in found[0]]
    ] * 4
    assert [row.question for row in found[0]] == [q.strip() for q, _, _ in rows]


# what is wrong

HEAD = "image,question,answer\n"
BIG = "x" * 20_000_000


def spreadsheet():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("xl/workbook.xml", "x")
    return file.getvalue()


def nested(depth):
    return "[" * depth + "]" * depth


# name, content, what is said behind the file's name
BELOW = "is not a path below the folder of pictures"
NO_TEXT = 'is not a text (write it in quotes: "3")'
LARGE = "has a cell of more than 1 MiB"
QUOTE = (
    "a quote opens in the row that begins here, and does not close at the end of its cell; a quote within a quoted "
    'cell is written ""'
)
MALFORMED = [
    ("t.csv", "", "is empty"),
    ("t.csv", "\n\n", "is empty"),
    ("t.jsonl", "\n", "is empty"),
    ("t.json", "[]", "is empty"),
    ("t.csv", HEAD, "has no row"),
    ("t.csv", "image;question;answer\na.jpg;q?;x\n",
     'line 1: cells are separated by ";", and "," is what a CSV file has; save it with that'),
    ("t.csv", "image\tquestion\na.jpg\tq?\n",
     'line 1: cells are separated by "\\t", and "," is what a CSV file has; save it with that'),
    ("t.tsv", HEAD + "a.jpg,q?,x\n",
     'line 1: cells are separated by ",", and "\\t" is what a TSV file has; save it with that'),
    ("t.csv", "imge,question\na.jpg,q?\n",
     'has no column image; its columns are "imge", "question"; if "imge" is it: --columns image=imge'),
    ("t.csv", "image,answer\na.jpg,x\n",
     'has no column question or captions; its columns are "image", "answer"; '
     'if one of them is it: --columns question=NAME'),
    ("t.csv", "image,path,question\na.jpg,b.jpg,q?\n",
     'the columns "image" and "path" both mean image; choose one, as in --columns image=image'),
    ("t.csv", "image,image,question\na.jpg,b.jpg,q?\n", 'has more than one column "image"; rename all but one of them'),
    ("t.csv", HEAD + "a.jpg,q?,x\nb.jpg,q?,\n", "column answer is empty: line 3"),
    ("t.csv", HEAD + "a.jpg,q?,x\n" + "b.jpg,q?,\n" * 7,
     "column answer is empty: line 3, line 4, line 5, line 6, line 7 and 2 more"),
    ("t.csv", HEAD + "a.jpg,q?,x||y\n", 'column answer is partly empty: line 2 has ["x", "", "y"]'),
    ("t.csv", HEAD + ",q?,x\n", "column image is empty: line 2"),
    ("t.csv", HEAD + "a.jpg, ,x\n", "column question is empty: line 2"),
    ("t.csv", "image,caption\na.jpg,c\nb.jpg,\n", "column caption is empty: line 3"),
    ("t.csv", HEAD + "a.jpg,q?\nb.jpg,q?,x,y\n",
     "not as many cells as the header, which has 3: line 2 has 2, line 3 has 4"),
    ("t.csv", HEAD + 'a.jpg,q?,x\nb.jpg,"q?,x\nc.jpg,q?,x\n',
     f"line 3: {QUOTE}"),
    ("t.csv", HEAD + 'a.jpg,"say "hi", ok?",x\n',
     f"line 2: {QUOTE}"),
    ("t.csv", (HEAD + "a.jpg,q?,x\n").encode("utf-16"), "is written in UTF-16; save it as UTF-8"),
    ("t.csv", (HEAD + "a.jpg,q?,x\n").encode("utf-16-be"), "line 1: holds a zero byte; save the table as UTF-8 text"),
    ("t.csv", (HEAD + "a.jpg,q?,größe\n").encode("latin-1"),
     "line 2, byte 34 of the file: 0xf6 is not UTF-8; save the table as UTF-8"),
    ("t.csv", HEAD + "a.jpg,q?,x\nb\0.jpg,q?,x\n", "line 3: holds a zero byte; save the table as UTF-8 text"),
    ("t.csv", spreadsheet(),
     "is a spreadsheet (Excel, OpenDocument) or a ZIP file, not text; export the table as CSV in UTF-8"),
    ("t.csv", b"\xd0\xcf\x11\xe0\xa1\xb1", "is an Excel file, not text; export the table as CSV in UTF-8"),
    ("t.csv", gzip.compress(HEAD.encode()), "is packed by gzip; let its name end in .gz"),
    ("t.csv", b"PAR1", "is a Parquet file; let its name end in .parquet"),
    ("t.csv", HEAD + f"a.jpg,{'x' * 100_000_000},x\n", f'line 2: column "question" {LARGE}; is a quote open?'),
    ("t.csv", HEAD + f'a.jpg,"{BIG}",x\n', f'line 2: column "question" {LARGE}; is a quote open?'),
    ("t.csv", HEAD + "a.jpg,q?,x\nb.jpg,q?," + "x" * ((1 << 20) + 1),
     f'line 3: column "answer" {LARGE}; is a quote open?'),
    ("t.csv", HEAD + 'a.jpg,q?,"' + "x\n" * 4_500_000,
     f'line 2: column "answer" {LARGE}; is a quote open?'),
    ("t.jsonl", f'{{"image": "a.jpg", "question": "{BIG}"}}', f'line 1: column "question" {LARGE}'),
    ("t.json", f'[{{"image": "a.jpg", "question": "{BIG}"}}]', f'row 1: column "question" {LARGE}'),
    ("t.json", f'[{{"image": "a.jpg", "question": "{BIG[:2_000_000]}"}}]',
     f'row 1: column "question" {LARGE}'),
    ("t.jsonl", '{"image": "a.jpg", "caption": "c"}\n' + nested(100_000), "JSON that is nested too deeply: line 2"),
    ("t.json", f'[{{"image": "a.jpg", "caption": {nested(100_000)}}}]', "row 1: JSON that is nested too deeply"),
    ("t.csv", f"image,caption\na.jpg,{nested(100_000)}\n", "column caption is nested too deeply: line 2"),
    ("t.jsonl", '{"image": "a.jpg", "caption": "c"}\n[1]\n"x"\n', 'not a JSON object: line 2 is [1], line 3 is "x"'),
    ("t.jsonl", '{"image": "a.jpg", "caption": "c"}\n{"image": "b', "not valid JSON: line 2"),
    ("t.json", '[{"image": "a.jpg", "caption": "c"}, 5]', "not a JSON object: row 2 is 5"),
    ("t.json", '[{"image": "a.jpg", "caption": "c"}, {"image": "b', "row 2: the file is cut off"),
    ("t.json", '[{"image": "a.jpg", "caption": "c"}', "row 1: the file is cut off"),
    ("t.json", '[{"image": "a.jpg" "caption": "c"}]', "row 1: not valid JSON (Expecting ',' delimiter)"),
    ("t.json", '[{"image": "a.jpg"}] []', '"[" stands behind the end of the list'),
    ("t.json", '{"image": "a.jpg"}\n{"image": "b.jpg"}',
     'a list of objects, [{…}, …], is wanted, and it begins with "{"; a file '
     'with an object on each line ends in .jsonl'),
    ("t.jsonl", '{"image": "a.jpg", "question": "q?", "answer": 3}\n{"image": "a", "question": "q?", "answer": true}',
     f'column answer {NO_TEXT}: line 1 has 3, line 2 has true'),
    ("t.jsonl", '{"image": "a.jpg", "question": "q?", "answer": ["x", 2]}',
     f'column answer {NO_TEXT}: line 1 has 2'),
    ("t.jsonl", '{"image": "a.jpg", "question": {"x": 1}}', 'column question is not a text: line 1 has {"x": 1}'),
    ("t.jsonl", '{"image": "a.jpg", "caption": "\\ud800"}',
     'column caption holds half a surrogate pair, which is no valid Unicode: line 1 has "\\ud800"'),
    ("t.csv", HEAD + "a.jpg,q?,\"['x', 'y']\"\n",
     'column answer is a list as Python writes it, not as JSON does: ["red", "blue"]: line 2 has "[\'x\', \'y\']"'),
    ("t.csv", HEAD + "/etc/a.jpg,q?,x\n", f'column image {BELOW}: line 2 has "/etc/a.jpg"'),
    ("t.csv", HEAD + "b/../../a.jpg,q?,x\n",
     f'column image {BELOW}: line 2 has "b/../../a.jpg"'),
    ("t.csv", HEAD + "./,q?,x\n", f'column image {BELOW}: line 2 has "./"'),
    ("t.jsonl", '{"image": "a\\u0000.jpg", "caption": "c"}',
     'column image holds a zero byte: line 1 has "a\\u0000.jpg"'),
    ("t.csv", HEAD + "a\\b.jpg,q?,x\n",
     'column image has "\\" between folders, where "/" is wanted: line 2 has "a\\\\b.jpg"'),
    ("t.csv", HEAD + "C:\\a.jpg,q?,x\n", f'column image {BELOW}: line 2 has "C:\\\\a.jpg"'),
    ("t.csv", HEAD + "https://x.org/a.jpg,q?,x\n",
     'column image is an address, not a file; download the pictures first: line 2 has "https://x.org/a.jpg"'),
    ("t.csv", "image,caption,weight\na,c,-1\na,c,nan\na,c,1e999\na,c,much\n",
     'column weight is not a number of 0 or more: line 2 has -1.0, line 3 has NaN, '
     'line 4 has Infinity, line 5 has "much"'),
    ("t.csv", "image,caption,split\na.jpg,c,trial\n",
     "column split is none of train, training, restval, val, valid, validation, dev, test, testing: "
     'line 2 has "trial"'),
    ("t.csv", "image,question,question_id\na.jpg,q?,5\nb.jpg,q?,6\nc.jpg,q?,5\n",
     "`question_id` of another row: line 4 has that of line 2"),
    ("t.csv", f"image,caption,image_id\na.jpg,c,{2**63}\n",
     f'column image_id does not fit into 64 bits: line 2 has "{2**63}"'),
    ("t.jsonl", '{"image": "a.jpg", "caption": "c", "image_id": 5.0}',
     "column image_id is neither a text nor a whole number: line 1 has 5.0"),
    ("t.csv.gz", b"no gzip", "is not packed by gzip, as its name says (Not a gzipped file (b'no'))"),
    ("t.parquet", b"PAR1 no", "no Parquet file that can be read"),
    ("t.xlsx", b"", "no table by its name; tables end in .csv, .tsv, .jsonl, .json, .csv.gz"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "wanted"), MALFORMED, ids=[f"{n}-{case[0]}" for n, case in enumerate(MALFORMED)]
)
def test_a_malformed_table_is_one_sentence(tmp_path, name, content, wanted):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    [problem] = problems(path)
    assert problem.startswith(wanted) if name in ("t.parquet", "t.xlsx") else problem == wanted


def test_more_than_one_mistake_is_told_at_once(tmp_path):
    path = write(tmp_path / "t.csv", HEAD + "/a.jpg,,x\nb.jpg,q?\nc.jpg,q?,\n")
    assert sorted(problems(path)) == [
        f'column image {BELOW}: line 2 has "/a.jpg"',
        "column question is empty: line 2",
        "not as many cells as the header, which has 3: line 3 has 2",
    ]
    path = write(tmp_path / "u.csv", "a,b\n1,2\n")
    assert len(problems(path)) == 2  # neither a picture nor a question


def test_a_folder_or_nothing_in_place_of_a_table(tmp_path):
    (tmp_path / "t.csv").mkdir()
    assert problems(tmp_path / "t.csv") == ["is a folder; name the table in it"]
    assert problems(tmp_path / "no.csv") == ["no such file"]


def test_a_chosen_column_that_is_not_there_is_told_with_what_is_alike(tmp_path):
    path = write(tmp_path / "t.csv", "datei,frage\na.jpg,q?\n")
    assert problems(path, {"image": "dateien"}) == [
        'has no column "dateien" for image; its columns are "datei", "frage"; "datei" is there'
    ]


def test_gzip_that_is_cut_off_or_a_bomb(tmp_path):
    packed = gzip.compress((HEAD + "".join(f"{n}.jpg,q{n}?,x\n" for n in range(9999))).encode())
    assert problems(write_raw(tmp_path / "t.csv.gz", packed[:-50])) == [
        "is cut off: what gzip packed has no end; get the file again"
    ]
    assert "damaged" in problems(write_raw(tmp_path / "t.csv.gz", packed[:999] + b"\0" * 99 + packed[1099:]))[0]
    bomb = gzip.compress(b"image,caption\n" + b"x,y\n" * 3_000_000)
    assert "unpacks to more than 200 times its size" in problems(write_raw(tmp_path / "t.csv.gz", bomb))[0]


@pytest.mark.parametrize(
    ("name", "start"), [("t.csv", HEAD + 'a.jpg,"'), ("t.jsonl", '{"image": "'), ("t.json", '[{"a": "')]
)
def test_of_a_cell_without_end_only_the_beginning_is_read(tmp_path, name, start):
    told = []
    path = write(
        tmp_path / name, '[{"image": 1}]' if name == "t.json" else '{"image": 1}' if name == "t.jsonl" else HEAD
    )
    table = open_table(path)
    write(path, start + BIG)
    with pytest.raises(InputError, match="more than 1 MiB"):
        for _ in table.rows(["image"], told.append):
            pass
    assert sum(told) < 9 << 20


def write_raw(path, content):
    path.write_bytes(content)
    return path


def test_messages_cannot_move_the_cursor(tmp_path):
    [problem] = problems(write(tmp_path / "t.csv", "image,caption,split\na.jpg,c,\x1b[2J\n"))
    assert "\x1b" not in problem and "\\u001b" in problem


# tables of questions to be asked


@pytest.mark.parametrize("ending", TABLE_ENDINGS)
def test_questions_are_asked_from_every_format_and_by_other_names(tmp_path, ending):
    rows = [{"Datei": "a.jpg", "prompt": "q?"}, {"Datei": "b.jpg", "prompt": " "}, {"Datei": "c.jpg", "prompt": "p?"}]
    path = write(tmp_path / f"t{ending}", rows)
    found = list(find_rows([str(path)], None, asks=True, columns={"image": "Datei"}))
    assert [(row.image, row.file, row.question, row.problem) for row in found] == [
        ("a.jpg", str(tmp_path / "a.jpg"), "q?", None),
        ("b.jpg", str(tmp_path / "b.jpg"), None, "no text in the column prompt"),
        ("c.jpg", str(tmp_path / "c.jpg"), "p?", None),
    ]
    with pytest.raises(InputError, match="has no column image"):
        Table(path, asks=True)


def test_a_ragged_row_costs_itself_only_and_our_names_win(tmp_path):
    path = write(tmp_path / "t.csv", "path,image,question\n/x/a.jpg,a.jpg,q?\nb.jpg\n/x/c.jpg,c.jpg,p?\n")
    found = list(Table(path, asks=True))
    assert [(row.image, row.problem) for row in found] == [
        ("a.jpg", None),
        ("", "not a row with columns: not as many cells as the header, which has 3 has 1"),
        ("c.jpg", None),
    ]


def test_columns_are_for_tables():
    with pytest.raises(InputError, match="--columns: for tables; a.jpg is none"):
        find_rows(["a.jpg"], "q?", True, {"image": "x"})
