"""Many pictures: tables in and out, bad rows, work that is stopped and goes on, several processes."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from beit3.system.errors import InputError
from inference import load, many
from inference.command_line import main
from inference.opening import open_checkpoint
from inference.outputs import columns_of, flat
from inference.ray_example import Asker, answer_table
from inference.rows import Pictures, Table, find_rows
from tests.test_inference import ROOT, trained  # noqa: F401  a fixture
from tests.test_settings import coco  # noqa: F401  a fixture


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr("utils.set_up_logging", lambda is_main: None)


@pytest.fixture(scope="module")
def pictures(coco, tmp_path_factory):
    """The test pictures, and one that cannot be read, in a folder of their own."""
    folder = tmp_path_factory.mktemp("many") / "photos"
    shutil.copytree(coco / "test2015", folder)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (folder / "notes.txt").write_text("no picture, and not looked at")
    (folder / "._a.jpg").write_text("left behind by an archiver")
    return folder


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(many, "CHUNK", 8)


def ask(trained, *argv):
    return main([*map(str, argv), "--checkpoint", str(trained["vqav2"]), "--batch_size", "3"])


def rows_of(file):
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    with open(file, encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ","))


def test_a_folder_gives_a_row_for_each_picture_and_a_bad_one_its_error(
    trained, pictures, tmp_path, small_chunks, capsys
):
    out = tmp_path / "answers.csv"
    assert ask(trained, pictures, "what is it?", "--output", out) == 3
    names = sorted(str(each) for each in pictures.iterdir() if each.suffix == ".jpg" and each.name[0] != ".")
    rows = rows_of(out)
    assert [row["image"] for row in rows] == names and len(names) > 20  # three chunks at least
    model = load(trained["vqav2"])
    for row in rows:
        assert row["question"] == "what is it?"
        if row["image"].endswith("broken.jpg"):
            assert row["error"] and row["answer"] == row["confidence"] == row["answer_2"] == ""
            continue
        wanted = model.answer(row["image"], "what is it?", top=5)
        assert row["error"] == "" and row["answer"] == wanted[0].text and row["answer_5"] == wanted[4].text
        assert float(row["confidence"]) == pytest.approx(wanted[0].confidence, abs=1e-5)
        assert float(row["confidence_5"]) == pytest.approx(wanted[4].confidence, abs=1e-5)
    assert list(rows[0]) == columns_of(asks=True, top=5)
    assert f"{out}: {len(names)} rows, 1 of them with an error" in capsys.readouterr().err
    assert not (tmp_path / "answers.csv.parts").exists()


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_table_is_answered_row_by_row_with_its_own_questions(trained, pictures, tmp_path, kind, small_chunks):
    names = sorted(each.name for each in pictures.glob("COCO*"))[:5]
    asked = [(names[0], "what is it?"), (names[1], 'is it "red", or\nnot?'), (names[2], " "), ("", "what?"),
             ("none.jpg", "what?"), (names[3], "größe?"), (names[4], "what\tis it?")]  # fmt: skip
    table, out = pictures / f"q.{kind}", tmp_path / "a.jsonl"
    with open(table, "w", encoding="utf-8-sig", newline="") as file:
        if kind == "jsonl":
            file.writelines(
                json.dumps({"image": image, "question": question, "id": 1}) + "\n" for image, question in asked
            )
            file.write("no json\n[1]\n")
        else:
            writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
            writer.writerows([("id", "image", "question"), *((1, *pair) for pair in asked)])
    assert ask(trained, table, "--output", out) == 3
    rows = rows_of(out)
    model = load(trained["vqav2"])
    wrong = {2: "no text in the column question", 3: "no text in the column image", 4: "No such file"}
    wrong |= {7: "not a row with columns", 8: "not a row with columns"} if kind == "jsonl" else {}
    assert len(rows) == len(asked) + (2 if kind == "jsonl" else 0)
    for number, row in enumerate(rows):
        if number in wrong:
            assert wrong[number] in row["error"] and "answer" not in row
        else:
            image, question = asked[number]
            assert (row["image"], row["question"]) == (image, question)
            assert row["answer"] == model.answer(pictures / image, question)[0].text
    table.unlink()


def test_captions_need_no_question_and_tell_their_scores(trained, pictures, tmp_path):
    out = tmp_path / "c.tsv"
    argv = [str(pictures / "COCO*.jpg"), "--checkpoint", str(trained["coco_captioning"]), "--output", str(out)]
    assert main([*argv, "--top", "2", "--beams", "2"]) == 0
    rows = rows_of(out)
    assert list(rows[0]) == ["image", "caption", "score", "caption_2", "score_2", "error"]
    assert all(float(row["score"]) >= float(row["score_2"]) for row in rows) and len(rows) >= 20


def test_stopped_it_goes_on_where_it_was_and_nothing_is_done_twice(
    trained, pictures, tmp_path, small_chunks, monkeypatch
):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    ask(trained, pictures, "what is it?", "--output", whole)
    tell, asked = many.Predictor.tell, []

    def until_stopped(self, batch):
        asked.append(len(batch["image"]))
        if len(asked) == 5:  # in the second chunk
            raise KeyboardInterrupt
        return tell(self, batch)

    monkeypatch.setattr(many.Predictor, "tell", until_stopped)
    assert ask(trained, pictures, "what is it?", "--output", out) == 130
    assert not out.exists() and [part.name for part in sorted((tmp_path / "a.jsonl.parts").glob("0*"))] == [
        "00000000.jsonl"
    ]
    asked.clear()
    monkeypatch.setattr(
        many.Predictor, "tell", lambda self, batch: asked.append(len(batch["image"])) or tell(self, batch)
    )
    assert ask(trained, pictures, "what is it?", "--output", out) == 3
    assert out.read_bytes() == whole.read_bytes()
    assert sum(asked) == len(rows_of(out)) - 8 - 1  # all but the first chunk and the bad picture


def test_parts_of_another_job_are_not_mixed_in(trained, pictures, tmp_path, small_chunks, capsys):
    out = tmp_path / "a.jsonl"
    parts = tmp_path / "a.jsonl.parts"
    parts.mkdir()
    (parts / "job.json").write_text(json.dumps({"top": 2}))
    assert ask(trained, pictures, "what is it?", "--output", out) == 2
    assert "holds a part of the results of another job (" in capsys.readouterr().err
    (parts / "job.json").write_text("no json")
    assert ask(trained, pictures, "what is it?", "--output", out) == 2
    assert not out.exists()


def test_a_result_is_not_overwritten_unless_told_to(trained, pictures, tmp_path, capsys):
    out = tmp_path / "a.csv"
    out.write_text("mine")
    picture = sorted(pictures.glob("COCO*"))[0]
    assert ask(trained, picture, "what is it?", "--output", out) == 2
    assert "is there already; --overwrite" in capsys.readouterr().err and out.read_text() == "mine"
    assert ask(trained, picture, "what is it?", "--output", out, "--overwrite") == 0
    assert len(rows_of(out)) == 1


def test_what_no_file_can_hold_costs_its_own_row_at_most(trained, pictures, tmp_path, small_chunks):
    """A name that is no UTF-8, half a surrogate pair, and a carriage return that would end a row of a table."""
    folder, out = tmp_path / "photos", tmp_path / "a.csv"
    folder.mkdir()
    picture = sorted(pictures.glob("COCO*"))[0]
    shutil.copy(picture, os.fsencode(folder) + b"/caf\xe9.jpg")
    assert ask(trained, folder, "what is it?", "--output", out) == 0
    assert [row["image"] for row in rows_of(out)] == [f"{folder}/caf\\udce9.jpg"]
    table = pictures / "odd.jsonl"
    asked = ["what is it? \ud83d", "what\ris it?"]
    entries = [{"image": picture.name, "question": question} for question in asked]
    table.write_text("null\n" + "".join(json.dumps(entry) + "\n" for entry in entries))
    assert ask(trained, table, "--output", out, "--overwrite") == 3
    first, second, third = rows_of(out)
    assert first["error"] and third["question"] == "what\nis it?" and third["answer"]
    assert second["error"] or second["question"] == "what is it? \\ud83d"
    table.unlink()


def test_a_second_command_leaves_the_first_alone(trained, pictures, tmp_path, capsys):
    out = tmp_path / "a.csv"
    parts = tmp_path / "a.csv.parts"
    parts.mkdir()
    code = (
        "import fcntl, sys, time\nfile = open(sys.argv[1], 'a')\nfcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\ntime.sleep(60)"
    )
    first = subprocess.Popen([sys.executable, "-c", code, parts / ".in_use"], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        assert ask(trained, pictures, "what is it?", "--output", out) == 2
        assert "another command is at work there" in capsys.readouterr().err and parts.exists()
    finally:
        first.kill()
        first.wait()
    assert ask(trained, pictures, "what is it?", "--output", out) == 3  # the broken picture


def test_a_job_is_another_with_another_tokenizer_or_other_answers(trained, coco):
    opened = open_checkpoint(trained["vqav2"])
    same = open_checkpoint(trained["vqav2"], tokenizer=coco / "mini.spm")
    assert same.identity() == opened.identity()
    other = replace(opened, description={**opened.description, "answers": opened.description["answers"][::-1]})
    assert other.identity() != opened.identity()
    assert opened.identity()["tokenizer"] == opened.tokenizer.sha256


def test_a_full_disk_at_the_end_keeps_what_was_done(trained, pictures, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.jsonl"

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(many, "write_results", full)
        assert ask(trained, pictures, "what is it?", "--output", out) == 2
    assert "No space left on device" in capsys.readouterr().err and (tmp_path / "a.jsonl.parts").exists()
    monkeypatch.setattr(many.Predictor, "tell", None)  # nothing is asked again
    assert ask(trained, pictures, "what is it?", "--output", out) == 3
    assert len(rows_of(out)) == 21


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_it_would_have(trained, pictures, tmp_path):
    """kill -9, several times; the chunks are the real ones, so the rows are many."""
    table, out, whole = pictures / "many.csv", tmp_path / "a.csv", tmp_path / "whole.csv"
    names = sorted(each.name for each in pictures.glob("COCO*"))
    with open(table, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "question"))
        writer.writerows((names[n % len(names)], f"what is in it, {n}?") for n in range(2000))
    assert ask(trained, table, "--output", whole) == 0
    command = [
        sys.executable,
        "-m",
        "inference",
        str(table),
        "--checkpoint",
        str(trained["vqav2"]),
        "--batch_size",
        "3",
    ]
    parts = tmp_path / "a.csv.parts"
    killed = 0
    for wanted in (1, 3, 5):
        process = subprocess.Popen([*command, "--output", str(out)], cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and len(list(parts.glob("0*.jsonl"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        killed += process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert killed == 3 and not out.exists()
    assert subprocess.run([*command, "--output", str(out)], cwd=ROOT, check=False).returncode == 0
    assert out.read_bytes() == whole.read_bytes() and not parts.exists()
    table.unlink()


@pytest.mark.slow
def test_several_processes_write_what_one_writes(trained, pictures, tmp_path):
    table = pictures / "several.csv"
    names = sorted(each.name for each in pictures.glob("*.jpg"))
    with open(table, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "question"))
        writer.writerows((names[n % len(names)], "what is it?") for n in range(600))
    assert ask(trained, table, "--output", tmp_path / "one.csv") == 3
    launcher = ["-m", "runs.launch", "--standalone", "--nproc_per_node", "2", "-m", "inference"]
    argv = [table, "--checkpoint", trained["vqav2"], "--output", tmp_path / "two.csv", "--batch_size", "3"]
    said = subprocess.run(
        [sys.executable, *launcher, *map(str, [*argv, "--device", "cpu"])], cwd=ROOT, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes(), said.stderr
    assert said.returncode == 3 and "600 rows, 55 of them with an error" in said.stderr
    assert said.stderr.splitlines()[-1] == "done, but for some rows, which have an error"
    table.unlink()


# tables


def test_a_table_that_is_none_is_refused_with_what_was_found(tmp_path):
    def refused(name, content, asks=True):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            Table(tmp_path / name, asks)
        return str(caught.value)

    assert "has no column question; its columns are image" in refused("a.csv", b"image\na.jpg\n")
    assert "has no column image and no column question; its columns are none" in refused("b.csv", b"")
    assert "has no row" in refused("c.csv", b"image,question\n")
    assert "no table in UTF-8" in refused("d.csv", b"image,question\n\xff\xfe,what?\n")
    assert "its columns are a" in refused("e.jsonl", b'{"a": 1}\n')
    assert "no table in UTF-8" in refused("f.csv", b"image,question\na.jpg," + b"x" * (many.CHUNK << 13) + b"\n")
    assert len(Table(tmp_path / "a.csv", asks=False)) == 1


def test_rows_are_read_anew_each_time_and_tell_when_they_change(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("image,question\nb.jpg,what?\n")
    table = Table(file, asks=True)
    [row] = list(table)
    assert list(table) == [row] and row.file == str(tmp_path / "b.jpg") and row.question == "what?"
    before = table.digest()
    file.write_text("image,question\nb.jpg,who?\n")
    assert table.digest() != before
    assert Pictures("x", ["a", "b"], None).digest() != Pictures("x", ["a", "b"], "q").digest()


def test_what_is_named_is_found_in_order(tmp_path):
    for name in ("b.JPG", "a.png", "c.txt", ".hidden.jpg"):
        (tmp_path / name).touch()
    files = [str(tmp_path / name) for name in ("a.png", "b.JPG")]
    assert [row.file for row in find_rows([str(tmp_path)], "q?", asks=True)] == files
    assert [row.file for row in find_rows([str(tmp_path / "*.png"), files[1]], None, asks=False)] == files
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "d.jpg").touch()
    found = find_rows([str(tmp_path / "**" / "*.jpg")], None, asks=False)
    assert [row.file for row in found] == [str(tmp_path / "x" / "y" / "d.jpg")]
    assert [row.file for row in find_rows([str(tmp_path / "c.txt")], None, asks=False)] == [str(tmp_path / "c.txt")]


def test_a_row_of_a_table_names_the_further_answers_by_their_place():
    entry = {"image": "a", "answer": "x", "confidence": 0.5, "top": [
        {"answer": "x", "confidence": 0.5}, {"answer": "y", "confidence": 0.2}]}  # fmt: skip
    assert flat(entry) == {"image": "a", "answer": "x", "confidence": 0.5, "answer_2": "y", "confidence_2": 0.2}


def test_parquet_goes_in_and_out(trained, pictures, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    names = sorted(each.name for each in pictures.glob("COCO*"))[:3]
    table, out = pictures / "q.parquet", tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"image": names, "question": ["what is it?"] * 3}), table)
    assert ask(trained, table, "--output", out) == 0
    found = parquet.read_table(out).to_pylist()
    model = load(trained["vqav2"])
    wanted = [model.answer(pictures / name, "what is it?")[0].text for name in names]
    assert [row["answer"] for row in found] == wanted and all(type(row["confidence"]) is float for row in found)
    table.unlink()


def test_without_pyarrow_a_parquet_file_says_what_to_install(trained, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    picture = sorted(pictures.glob("COCO*"))[0]
    assert ask(trained, picture, "what?", "--output", tmp_path / "a.parquet") == 2
    assert "pip install pyarrow" in capsys.readouterr().err
    with pytest.raises(InputError, match="pip install pyarrow"):
        Table(Path("x.parquet"), asks=True)


def test_rays_actor_answers_as_the_model_does(trained, pictures):
    names = sorted(each.name for each in pictures.glob("COCO*"))[:3]
    batch = {"image": np.array([*names, "broken.jpg", names[0]]), "question": np.array(["what is it?"] * 4 + [" "])}
    told = Asker(str(trained["vqav2"]), str(pictures))(batch)
    model = load(trained["vqav2"])
    assert told["answer"] == [model.answer(pictures / name, "what is it?")[0].text for name in names] + ["", ""]
    assert told["error"][:3] == ["", "", ""] and "broken.jpg" in told["error"][3] and "empty" in told["error"][4]


@pytest.mark.slow
def test_a_table_is_answered_on_a_local_ray(trained, pictures, tmp_path):
    ray = pytest.importorskip("ray", reason="ray is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    table = pictures / "ray.csv"
    names = sorted(each.name for each in pictures.glob("COCO*"))
    table.write_text("image,question\n" + "".join(f"{name},what is it?\n" for name in names))
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    try:
        answer_table(trained["vqav2"], table, tmp_path / "out", actors=1)
    finally:
        ray.shutdown()
        table.unlink()
    found = {row["image"]: row["answer"] for row in parquet.read_table(tmp_path / "out").to_pylist()}
    model = load(trained["vqav2"])
    assert found == {name: model.answer(pictures / name, "what is it?")[0].text for name in names}
