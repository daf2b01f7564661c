"""The index of people's own data: its lines by hand, the splits, the answers, and that nothing is written in error."""

import json
import os
import signal
import unicodedata

import pytest

from beit3.data.tokenizer import Tokenizer
from beit3.system.errors import InputError
from datasets import CaptionDataset, VQADataset
from sources.pictures import PictureFinder, choose_pictures, same_content
from sources.rows import Row
from tasks.make_index import main as make_index
from tasks.own_data import told
from tasks.recipe_by_size import main as recipe_by_size
from tasks.recipe_by_size import plan
from tasks.vqav2.own_index import soft_score
from tests.own_data import SPM, album, lines, make_picture, write_csv

QUESTION = "What color is it?"


def ids(text):
    return Tokenizer(SPM).encode(text)


def make(folder, **choices):
    VQADataset.make_dataset_index(train=folder / "vqa.csv", tokenizer=SPM, progress=False, **choices)


@pytest.fixture
def table(tmp_path):
    """Writes `vqa.csv` of these rows, whose pictures a.png … e.png are there and different."""
    for shade, name in enumerate("abcde"):
        make_picture(tmp_path / f"{name}.png", "red", shade)

    def write(rows, header=("image", "question", "answer")):
        write_csv(tmp_path / "vqa.csv", list(header), rows)
        return tmp_path

    return write


def test_lines_are_those_worked_out_by_hand(table, capsys):
    header = ["image", "question", "answers", "split", "question_id", "weight"]
    rows = [
        ["a.png", QUESTION, "red|red|rot", "train", "11", "2.5"],
        ["b.png", QUESTION, "blue", "train", "12", "1"],
        ["c.png", QUESTION, "blue|grün", "validation", "13", "1"],
    ]
    folder = table(rows, header)
    make(folder)
    said = capsys.readouterr().out
    tokens = ids(QUESTION)
    # "rot" has fewer votes than "red", so it is not counted as an answer of any row.
    assert lines(folder / "answer2label.txt") == [{"answer": "red", "label": 0}, {"answer": "blue", "label": 1}]
    assert lines(folder / "vqa.train.jsonl") == [
        {"image_path": "a.png", "text_segment": tokens, "labels": [0], "scores": [1.0], "qid": 11, "weight": 2.5},
        {"image_path": "b.png", "text_segment": tokens, "labels": [1], "scores": [1.0], "qid": 12},
    ]
    assert lines(folder / "vqa.val.jsonl") == [
        {
            "image_path": "c.png", "text_segment": tokens, "labels": [1], "scores": [1.0], "qid": 13,
            "question": QUESTION, "question_id": 13, "answers": {"blue": 1, "grün": 1},
        }
    ]  # fmt: skip
    assert "vqa.val.jsonl: 1 questions of 1 pictures; the list has an answer of 100.0 % of them, which allows a" in said
    assert not (folder / "vqa.test.jsonl").exists()


@pytest.mark.parametrize(
    ("votes", "people", "score"),
    [(1, 1, 1.0), (1, 10, 0.3), (2, 10, 0.6), (3, 10, 0.9), (4, 10, 1.0), (1, 5, 0.6), (1, 2, 1.0), (1, 7, 0.428571)],
)
def test_a_score_is_three_times_the_share_of_the_people(votes, people, score):
    assert soft_score(votes, people) == score


def test_validation_is_drawn_by_picture_and_by_content(tmp_path):
    rows = []
    for number in range(20):
        make_picture(tmp_path / f"p/{number}.png", "green", number)
        (tmp_path / f"q/{number}.png").parent.mkdir(exist_ok=True)
        (tmp_path / f"q/{number}.png").write_bytes((tmp_path / f"p/{number}.png").read_bytes())
        rows += [[f"{folder}/{number}.png", QUESTION, ("a", "b")[number % 2]] for folder in "pq"]
    write_csv(tmp_path / "vqa.csv", ["image", "question", "answer"], rows)
    make(tmp_path, val_fraction=0.25)

    def numbers(split):
        return {os.path.basename(line["image_path"]) for line in lines(tmp_path / f"vqa.{split}.jsonl")}

    val, train = numbers("val"), numbers("train")
    assert len(val) == 5 and len(train) == 15 and not val & train  # of 40 files in 20 pairs
    assert len(lines(tmp_path / "vqa.val.jsonl")) == 10
    make(tmp_path, val_fraction=0.25, val_seed=0)
    assert numbers("val") == val
    make(tmp_path, val_fraction=0.25, val_seed=1)
    assert numbers("val") != val


def test_pictures_of_one_content_are_found_and_one_group_is_left_to_learn_from(tmp_path):
    (tmp_path / "large1").write_bytes(b"a" * 50_000 + b"x" + b"b" * 50_000)
    (tmp_path / "large2").write_bytes(b"a" * 50_000 + b"y" + b"b" * 50_000)  # differs in the middle alone
    (tmp_path / "small1").write_bytes(b"abc")
    (tmp_path / "small2").write_bytes(b"abc")
    (tmp_path / "small3").write_bytes(b"abd")
    names = sorted(path.name for path in tmp_path.iterdir())
    same = same_content(tmp_path, names)
    assert same == {**dict.fromkeys(names), **{name: name for name in names}, "small2": "small1"}
    assert len(choose_pictures(same, 0.99, 0)) < 5
    assert choose_pictures({"a": "a", "b": "a"}, 0.5, 0) == set()


def test_answers_are_chosen_by_count_number_and_file(table, tmp_path, capsys):
    given = ["red", "red", "red", "blue", "blue", "The Red!", "x"]
    rows = [["abcde"[n % 5] + ".png", f"{QUESTION} {n}", answer, "train"] for n, answer in enumerate(given)]
    folder = table([*rows, ["e.png", QUESTION, "blue", "val"]], ["image", "question", "answer", "split"])

    def answers():
        return [line["answer"] for line in lines(folder / "answer2label.txt")]

    make(folder)
    assert answers() == ["red", "blue", "The Red!", "x"]
    assert '1 answers differ from others in case or punctuation only ("red", "The Red!")' in capsys.readouterr().out
    make(folder, normalize_answers=True)
    assert answers() == ["red", "blue", "x"]
    make(folder, min_answer_count=2)
    assert answers() == ["red", "blue"]
    assert "2 rows left out, no answer of theirs is in the list:" in capsys.readouterr().out
    make(folder, max_answers=1)
    assert answers() == ["red"]
    # The answers of validation are kept, so a score below 100 shows what the list cannot say.
    assert lines(folder / "vqa.val.jsonl")[0]["labels"] == []
    assert "an answer of 0.0 % of them, which allows a score of 0.0" in capsys.readouterr().out
    (tmp_path / "list.txt").write_text("blue\ngreen\n")
    make(folder, answers=tmp_path / "list.txt")
    assert answers() == ["blue", "green"]


@pytest.mark.parametrize(
    ("rows", "choices", "sentence"),
    [
        ([["a.png", QUESTION, "red"], ["gone.png", QUESTION, "blue"]], {}, "no such picture below {f}: line 3 has"),
        ([["a.png", QUESTION, "red"], ["b.png", QUESTION, "red"]], {}, "all rows have the same answer"),
        ([[f"{n}.png", QUESTION, n] for n in "abcde"], {}, "all answers are different"),
        ([["a.png", QUESTION, "red"], ["a.png", "Is it?", "no"]], {}, "all its rows show one picture"),
        ([["a.png", QUESTION, "red"], ["b.png", QUESTION, "blue"]], {"min_answer_count": 5}, "none is there 5 times"),
        ([["a.png", QUESTION, "red"], ["b.png", "\u200b", "blue"]], {}, "vqa.csv"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_from_is_one_sentence_and_nothing_is_written(table, rows, choices, sentence):
    folder = table(rows)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(InputError, match="vqa.csv") as error:
        make(folder, **choices)
    assert sentence.format(f=folder) in str(error.value)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_choices_are_held_to_their_bounds(table):
    folder = table([["a.png", QUESTION, "red"], ["b.png", QUESTION, "blue"]])
    with pytest.raises(InputError) as error:
        make(folder, val_fraction=1.5, max_answer=3)
    first, second = error.value.problems
    assert first == "val_fraction=1.5: above 0 and below 1 is needed"
    assert second.startswith("max_answer: no such choice; there are train, val, test, columns,")


def test_missing_pictures_can_be_left_out(table, capsys):
    rows = [["a.png", QUESTION, "red"], ["gone.png", QUESTION, "blue"], ["b.png", QUESTION, "blue"]]
    folder = table([*rows, ["c.png", QUESTION, "red"]])
    make(folder, skip_missing=True)
    said = capsys.readouterr().out
    assert "1 rows left out, its picture is missing: " in said and 'line 3, "gone.png"' in said


def test_an_index_that_was_not_made_from_a_table_is_not_overwritten(table):
    folder = table([["a.png", QUESTION, "red"], ["b.png", QUESTION, "blue"]])
    (folder / "vqa.train.jsonl").write_text("mine\n")
    with pytest.raises(InputError, match=r"vqa.train.jsonl is there and was not made from a table"):
        make(folder)
    assert (folder / "vqa.train.jsonl").read_text() == "mine\n"


def test_an_index_is_made_again_where_the_table_or_a_choice_changed(tmp_path, capsys):
    album(tmp_path)
    arguments = [
        "vqa",
        str(tmp_path / "index"),
        str(SPM),
        str(tmp_path / "Fotos"),
        "--train",
        str(tmp_path / "vqa.csv"),
    ]
    assert make_index(*arguments) == 0
    first = (tmp_path / "index" / "vqa.train.jsonl").read_text()
    assert "index of CSV table written" in capsys.readouterr().out
    assert make_index(*arguments, "--epochs", "3") == 0  # a flag of the training
    assert capsys.readouterr().out == ""
    assert make_index(*arguments, "--val_fraction", "0.5") == 0
    assert "made again: --val_fraction was 0.1" in capsys.readouterr().out
    assert make_index(*arguments) == 0
    assert (tmp_path / "index" / "vqa.train.jsonl").read_text() == first
    with open(tmp_path / "vqa.csv", "a") as file:
        file.write("Küche/Bild 0.png,How is it?,red\r\n")
    capsys.readouterr()
    assert make_index(*arguments) == 0
    assert "vqa.csv has changed" in capsys.readouterr().out
    assert make_index(*arguments, "--val_fraction", "2") == 2
    assert "--val_fraction 2: above 0 and below 1 is needed" in capsys.readouterr().err


def test_an_index_made_by_hand_is_taken(tmp_path, capsys):
    album(tmp_path)
    make(tmp_path, image_path=tmp_path / "Fotos")
    for name in ("vqa.csv", "captions.csv", "vqa.index.json"):
        (tmp_path / name).unlink()
    assert make_index("vqa", str(tmp_path), str(SPM)) == 0
    assert told(str(tmp_path), "", "") == ("vqa", str(tmp_path), str(tmp_path))
    (tmp_path / "vqa.val.jsonl").unlink()
    assert make_index("vqa", str(tmp_path), str(SPM)) == 2
    assert "holds no table of own data" in capsys.readouterr().err


def test_captions_are_indexed_and_what_they_are_scored_against_lies_beside(table):
    folder = table(
        [
            ["a.png", "A wall.", "train"],
            ["b.png", "A door.", "train"],
            ["a.png", "A red wall.", "train"],
            ["c.png", "Ein Haus.", "val"],
            ["c.png", "A house.", "val"],
            ["d.png", "A hat.", "test"],
        ],
        ["image", "caption", "split"],
    )
    CaptionDataset.make_dataset_index(train=folder / "vqa.csv", tokenizer=SPM, progress=False)
    assert lines(folder / "captioning.train.jsonl") == [
        {"image_path": "a.png", "text_segment": ids("A wall."), "image_id": 1},
        {"image_path": "a.png", "text_segment": ids("A red wall."), "image_id": 1},
        {"image_path": "b.png", "text_segment": ids("A door."), "image_id": 2},
    ]
    assert lines(folder / "captioning.val.jsonl") == [{"image_path": "c.png", "text_segment": None, "image_id": 1}]
    told_of_val = json.loads((folder / "captioning.val.references.json").read_text(encoding="utf-8"))
    assert [each["caption"] for each in told_of_val["annotations"]] == ["Ein Haus.", "A house."]
    assert json.loads((folder / "captioning.test.references.json").read_text())["images"] == [
        {"id": 1, "file_name": "d.png"}
    ]


def test_the_task_follows_from_the_columns_and_the_index_lies_beside_the_table(tmp_path):
    photos = album(tmp_path)
    home = str(tmp_path)
    assert told("", "", str(photos), "--train", f"{home}/vqa.csv") == ("vqa", home, str(photos))
    assert told("", "", "", "--train", f"{home}/captions.csv") == ("captioning", home, home)
    assert told("/index", "", "", "--train", f"{home}/captions.csv") == ("captioning", "/index", home)
    (tmp_path / "vqa.csv").rename(photos / "metadata.csv")
    assert told(str(photos), "", "") == ("vqa", str(photos), str(photos))


def test_pictures_in_parquet_are_unpacked_once(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    album(tmp_path, pictures=9)
    names = sorted(path for path in (tmp_path / "Fotos").rglob("*.png"))
    answers = [("red", "green", "blue")[int(path.stem.split()[1]) % 3] for path in names]
    held = [{"bytes": path.read_bytes(), "path": path.name} for path in names]
    rows = {"image": held, "question": [QUESTION] * 9, "answer": answers}
    (tmp_path / "hub").mkdir()
    parquet.write_table(pyarrow.table(rows), tmp_path / "hub" / "train-00000-of-00001.parquet")
    task, data, images = told(str(tmp_path / "hub"), "", "")
    assert (task, data, images) == ("vqa", str(tmp_path / "hub"), str(tmp_path / "hub"))
    assert make_index("vqa", data, str(SPM), images) == 0
    assert "unpacking the pictures" in capsys.readouterr().out
    indexed = lines(tmp_path / "hub" / "vqa.train.jsonl") + lines(tmp_path / "hub" / "vqa.val.jsonl")
    assert sorted((tmp_path / "hub" / line["image_path"]).read_bytes() for line in indexed) == sorted(
        path.read_bytes() for path in names
    )
    assert sorted(path.name for path in (tmp_path / "hub").iterdir() if path.is_dir()) == ["pictures"]
    (tmp_path / "hub" / "pictures" / os.path.basename(indexed[0]["image_path"])).unlink()
    (tmp_path / "hub" / "vqa.val.jsonl").unlink()
    with pytest.MonkeyPatch.context() as patch:  # killed before the pictures have their names: no index names them
        patch.setattr("sources.gathering.Gathered.keep_pictures", lambda _: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            make_index("vqa", data, str(SPM), images)
    assert not (tmp_path / "hub" / "vqa.val.jsonl").exists()
    capsys.readouterr()
    assert make_index("vqa", data, str(SPM), images) == 0 and "unpacking" in capsys.readouterr().out
    assert make_index("vqa", data, str(SPM), images) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("rows", "scratch", "pairs", "epochs"),
    [(810, False, 16, 30), (3000, False, 32, 17), (400_000, False, 128, 10), (810, True, 32, 30), (10, True, 10, 100)],
)
def test_few_rows_want_small_steps_and_many_passes(rows, scratch, pairs, epochs):
    planned = plan(rows, scratch)
    assert (planned.pairs, planned.epochs) == (pairs, epochs)
    assert planned.warmup_steps == max(1, round(0.1 * epochs * (rows // pairs)))
    assert plan(rows, scratch, epochs=2).epochs == 2


def test_pictures_are_not_mirrored_where_rows_say_left_or_right(table, capsys):
    rows = [
        ["a.png", QUESTION, "the LEFT one"],
        ["b.png", "Is it on the right?", "no"],
        ["c.png", QUESTION, "leftover"],
        ["e.png", QUESTION, "no"],
    ]
    folder = table(
        [[*row, "train"] for row in rows] + [["d.png", "Left?", "no", "val"]], ["image", "question", "answer", "split"]
    )
    make(folder)
    capsys.readouterr()
    assert recipe_by_size("vqa", str(folder), "", str(SPM)) == 0
    flags, told_why = capsys.readouterr()
    assert "2 rows say left or right" in told_why and flags.endswith(" --no_mirror\n")
    table([["a.png", QUESTION, "red", "train"], ["b.png", QUESTION, "no", "train"], ["d.png", QUESTION, "no", "val"]],
          ["image", "question", "answer", "split"])  # fmt: skip
    make(folder)
    assert recipe_by_size("vqa", str(folder), "", str(SPM), "--epochs", "7") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("--epochs 7 --warmup_steps 1 --vocab_size ")


def test_a_mistake_in_the_sources_is_told_and_no_older_index_taken_in_its_place(tmp_path, capsys):
    photos = album(tmp_path)
    (tmp_path / "vqa.csv").rename(photos / "metadata.csv")
    arguments = ["vqa", str(photos), str(SPM)]
    assert make_index(*arguments) == 0
    capsys.readouterr()
    assert make_index(*arguments, "--columns", "image=datei") == 2
    assert 'has no column "datei"' in capsys.readouterr().err
    (photos / "metadata.csv").write_text("image;question;answer\na;b;c\n")
    assert make_index(*arguments) == 2 and "metadata.csv" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"metadata\.csv"):
        told(str(photos), "", "")


def test_an_answer_list_that_changed_makes_the_index_again_and_one_of_strangers_is_refused(tmp_path, capsys):
    photos, chosen = album(tmp_path), tmp_path / "chosen.txt"
    arguments = ["vqa", str(tmp_path / "i"), str(SPM), str(photos), "--train", str(tmp_path / "vqa.csv")]
    chosen.write_text("red\n")
    assert make_index(*arguments, "--answers", str(chosen)) == 0
    chosen.write_text("red\nblue\n")
    assert make_index(*arguments, "--answers", str(chosen)) == 0
    assert [line["answer"] for line in lines(tmp_path / "i" / "answer2label.txt")] == ["red", "blue"]
    chosen.write_text("The Red!\nred\nA blue.\n")
    assert make_index(*arguments, "--answers", str(chosen), "--normalize_answers") == 0
    assert [line["answer"] for line in lines(tmp_path / "i" / "answer2label.txt")] == ["red", "blue"]
    chosen.write_text("purple\n")
    capsys.readouterr()
    assert make_index(*arguments, "--answers", str(chosen)) == 2
    assert "none of them is an answer of" in capsys.readouterr().err


@pytest.mark.parametrize(("form", "other"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_found_in_either_way_of_unicode_and_ids_with_zeros_and_links_in_circles_too(form, other, tmp_path):
    name = unicodedata.normalize(form, "Küche/é.png")
    make_picture(tmp_path / name)
    make_picture(tmp_path / "000000000042.png")
    (tmp_path / "a").symlink_to(".")
    (tmp_path / "b").symlink_to(".")
    finder = PictureFinder(tmp_path)
    assert finder.find(Row("", unicodedata.normalize(other, "Küche/é.png"))) == name
    assert finder.find(Row("", "Küche/è.png")) is None
    for number in (42, "000000000042", "42"):
        assert finder.find(Row("", "", image_id=number)) == "000000000042.png"


def test_folders_made_for_an_index_that_fails_go_again(table):
    folder = table([["gone.png", QUESTION, "red"], ["a.png", QUESTION, "blue"]])
    with pytest.raises(InputError):
        make(folder, data_path=folder / "e" / "f" / "g")
    assert not (folder / "e").exists()


def test_flags_name_the_task_and_the_pictures_as_variables_do(tmp_path):
    photos, home = album(tmp_path), str(tmp_path)
    write_csv(tmp_path / "both.csv", ["image", "question", "answer", "title"], [["a.png", "b", "c", "d"]])
    both = ["--train", f"{home}/both.csv"]
    with pytest.raises(InputError, match="--task vqa or captioning"):
        told("", "", "", *both)
    assert told("", "", "", *both, "--task", "captioning")[0] == "captioning"
    assert told("", "", home, *both, "--task=vqa", "--image_path", str(photos)) == ("vqa", home, str(photos))


def test_a_test_table_may_leave_it_to_training_what_it_is(tmp_path):
    album(tmp_path)
    write_csv(tmp_path / "test.csv", ["image"], [["Küche/Bild 0.png"]])
    named = ["--train", f"{tmp_path}/captions.csv", "--test", f"{tmp_path}/test.csv"]
    assert told("", "", "", *named)[0] == "captioning"


def test_weights_that_are_all_0_are_refused(table):
    header = ["image", "question", "answer", "weight"]
    folder = table([["a.png", QUESTION, "red", "0"], ["b.png", QUESTION, "blue", "0"]], header)
    with pytest.raises(InputError, match="column weight: is 0 in all training rows"):
        make(folder)


def test_questions_of_one_id_in_two_shards_and_pictures_that_are_only_named_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    make_picture(tmp_path / "a.png")
    held = [{"bytes": (tmp_path / "a.png").read_bytes(), "path": "a.png"}]
    for shard in range(2):
        rows = {"image": held, "question": [QUESTION], "answer": ["red"], "question_id": [7]}
        parquet.write_table(pyarrow.table(rows), tmp_path / f"train-0000{shard}-of-00002.parquet")
    with pytest.raises(InputError, match=r"train-00001-of-00002.parquet: column question_id: stands in train-00000"):
        make_from(tmp_path)
    for file in tmp_path.glob("*.parquet"):
        file.unlink()
    images = [*held, {"bytes": None, "path": "a.png"}]
    rows = {"image": images, "question": [QUESTION] * 2, "answer": ["red", "blue"]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "train.parquet")
    with pytest.raises(InputError, match="names a picture without holding it"):
        make_from(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def make_from(folder):
    VQADataset.make_dataset_index(train=folder, tokenizer=SPM, progress=False)
