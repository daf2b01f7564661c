"""beit3/answers.py: expected values are written out, or those of normalize.json."""

import json
from collections import Counter
from pathlib import Path

import pytest

from beit3.system.errors import InputError
from datasets import normalize_word as normalize_word_of_datasets
from tasks.vqav2.answers import (
    answer_accuracy,
    answer_lines,
    build_answer_vocabulary,
    normalize_word,
    read_answers,
    vote_score,
    vqa_accuracy,
)

DATA = Path(__file__).parent / "data"
PAIRS = json.loads((DATA / "normalize.json").read_text())


@pytest.mark.parametrize(("answer", "expected"), PAIRS.items())
def test_normalising_gives_the_reference(answer, expected):
    assert normalize_word(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("x-y z- w", "xy z w"),  # one hyphen next to a space: all hyphens go
        ("x-y z -w", "xy z w"),
        ("x-y 1,0", "xy 10"),  # a comma between digits: all punctuation goes
        ("x-y 1, 0", "x y 1 0"),
        ('x;/[]"{}()=+\\_-><@`,?!y', "x y"),  # the 21 signs, each a space
        ("x#$%^&*~|:'y", "x#$%^&*~|:'y"),  # no others
        ("v.1.x.", "v.1x"),  # a period before a digit stays
        ("." * 40, ""),
        ("SomeBody'd", "somebodyd"),  # an official quirk
        ("eleven", "eleven"),
        ("nine eight seven six five four three", "9 8 7 6 5 4 3"),
    ],
)
def test_normalising_follows_the_rules(answer, expected):
    assert normalize_word(answer) == expected


def test_normalize_word_can_be_had_from_datasets():
    assert normalize_word_of_datasets is normalize_word


def test_the_vocabulary_keeps_answers_given_nine_times_in_order_of_first_appearance():
    given = ["once", *["No"] * 5, *["the dog"] * 9, *["cat"] * 8, "no.", *["NO!"] * 3, *["red"] * 10]
    assert build_answer_vocabulary(given) == ["no", "dog", "red"]
    assert build_answer_vocabulary(Counter(given)) == ["no", "dog", "red"]
    assert build_answer_vocabulary(given, min_count=8) == ["no", "dog", "cat", "red"]


def test_scores_by_votes():
    assert [vote_score(votes) for votes in range(11)] == [0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1]


def test_the_answer_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "answer2label.txt"
    path.write_text("".join(answer_lines(["yes", "don't know", "é", ""])))
    assert path.read_text().splitlines()[1] == '{"answer": "don\'t know", "label": 1}'
    assert read_answers(path) == ["yes", "don't know", "é", ""]


def test_the_answer_file_of_the_original_is_read():
    answers = read_answers(DATA / "mini_coco" / "expected" / "answer2label.txt")
    assert answers[:3] == ["square", "don't know", "purple"]
    assert (len(answers), answers[-1]) == (14, "orange")


def test_bad_lines_of_the_answer_file_are_all_named(tmp_path):
    path = tmp_path / "answer2label.txt"
    lines = [
        b'{"answer": "yes", "label": 0}',
        b"{oops",
        b'{"answer": "no", "label": 3}',
        b'{"answer": "yes", "label": 3}',
        b'{"answer": 7, "label": 4}',
        b'{"answer": "red", "label": true}',
        b'{"answer": "\xff", "label": 6}',
        b'["blue"]',
        b'{"answer": "ok", "label": 8}',
    ]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError) as error:
        read_answers(path)
    places = [problem.split(": ")[0].rsplit("/", 1)[1] for problem in error.value.problems]
    assert places == [f"answer2label.txt:{line}" for line in (2, 3, 4, 5, 6, 7, 8)]
    assert "label 3 in a line whose number, counted from 0, is 2" in error.value.problems[1]
    assert "answer 'yes' is in line 1 already" in error.value.problems[2]


YES, NO = b'{"answer": "yes", "label": 0}', b'{"answer": "no", "label": 1}'


@pytest.mark.parametrize(
    "content",
    [
        YES + b"\n" + NO,
        b"\xef\xbb\xbf" + YES + b"\n" + NO + b"\n",
        YES + b"\r\n" + NO + b"\r\n",
        YES + b"\n" + NO + b"\n\n \n",
        b"\xef\xbb\xbf" + YES + b"\r\n" + NO + b"\r\n\r\n",
    ],
)
def test_what_editors_add_to_the_answer_file_is_passed_over(tmp_path, content):
    path = tmp_path / "answer2label.txt"
    path.write_bytes(content)
    assert read_answers(path) == ["yes", "no"]
    path.write_bytes(content.replace(b'"no"', b"7"))
    with pytest.raises(InputError, match=r"answer2label\.txt:2: "):
        read_answers(path)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (YES + b"\n\n" + NO + b"\n", 2),
        (b"\n" + YES + b"\n" + NO, 1),
        (YES + b'\n{"answer": "\\ud800", "label": 1}', 2),
    ],
)
def test_blank_lines_between_answers_and_broken_ones_are_named(tmp_path, content, line):
    path = tmp_path / "answer2label.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"answer2label\.txt:{line}: "):
        read_answers(path)


@pytest.mark.parametrize("content", [None, "", "\ufeff", "\r\n\n"])
def test_a_missing_or_empty_answer_file_says_how_to_make_it(tmp_path, content):
    path = tmp_path / "answer2label.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"answer2label\.txt: (missing|is empty); VQAv2Dataset\.make_dataset_index"):
        read_answers(path)


@pytest.mark.parametrize(("matching", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_accuracy_by_the_number_of_annotators_who_agree(matching, accuracy):
    others = ["blue", "green", "red", "white", "grey", "pink", "black", "orange", "yellow", "brown"]
    assert answer_accuracy("cat", ["cat"] * matching + others[matching:]) == pytest.approx(accuracy, abs=1e-12)


def test_answers_are_processed_where_annotators_differ():
    humans = ["two dogs"] * 2 + ["2 dogs."] + ["cats"] * 7
    assert answer_accuracy("The two\tdogs!\n", humans) == pytest.approx(0.9)  # 7 * 1 and 3 * 2/3, over 10


def test_answers_are_taken_literally_where_annotators_agree():
    assert answer_accuracy("yes", ["yes"] * 10) == 1.0
    assert answer_accuracy(" yes\n", ["yes", " yes "] * 5) == 1.0  # white space at the ends does not count
    assert answer_accuracy("Yes", ["yes"] * 10) == 0.0
    assert answer_accuracy("Yes", ["yes", "yes\n"] * 5) == 0.0
    assert answer_accuracy("2", ["two"] * 10) == 0.0


def annotation(question_id, answers, answer_type, question_type):
    given = [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers, 1)]
    return {
        "question_id": question_id, "answers": given, "answer_type": answer_type, "question_type": question_type,
    }  # fmt: skip


def test_the_accuracy_of_a_prediction_in_percent():
    annotations = [
        annotation(1, ["yes"] * 10, "yes/no", "is the"),
        annotation(2, ["red"] * 2 + ["blue"] * 8, "other", "what color"),
        annotation(3, ["1"] * 7 + ["2"] * 3, "number", "how many"),
        annotation(4, ["no"] * 9 + ["yes"], "yes/no", "what color"),
        annotation(5, ["x"] * 10, "other", "is the"),
    ]
    answers = {1: "yes", 2: "red", 3: "two", 4: "Yes", 99: "x"}
    result = vqa_accuracy(answers, iter(annotations))
    assert result["overall"] == pytest.approx(100 * (1.0 + 0.6 + 0.9 + 0.3) / 4)
    assert result["by_answer_type"] == pytest.approx({"yes/no": 65.0, "other": 60.0, "number": 90.0})
    assert result["by_question_type"] == pytest.approx({"is the": 100.0, "what color": 45.0, "how many": 90.0})
    assert (result["questions"], result["not_answered"], result["not_annotated"]) == (4, 1, 1)


def test_no_answer_gives_zero():
    assert vqa_accuracy({}, [annotation(1, ["yes"] * 10, "yes/no", "is the")])["overall"] == 0.0
