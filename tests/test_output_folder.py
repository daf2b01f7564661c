"""The folder that a run writes to: who holds it, whether it can be written, what fits on its disk, what is damaged."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from beit3.system.errors import InputError
from runs import log, output_folder
from runs.command_line import read_settings
from runs.output_folder import LOCK_FILE, Lock, check_room, check_room_for_predictions, set_aside, why_not_writable
from tests import reference

ROOT = Path(__file__).parent.parent
HOLD = """
import sys, time
from pathlib import Path
from runs.output_folder import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
lock.release()
"""


def held_by_another(folder, **environment):
    """A process that holds the lock of the folder until it reads a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_training_is_refused_naming_the_first(tmp_path):
    first = held_by_another(tmp_path)
    facts = json.loads((tmp_path / LOCK_FILE).read_text())
    with pytest.raises(InputError) as refused:
        Lock(tmp_path)
    for part in (f"process {first.pid} on {os.uname().nodename}", f"started {facts['started']}", str(tmp_path)):
        assert part in str(refused.value)
    first.communicate("end\n", timeout=60)
    assert not (tmp_path / LOCK_FILE).exists()
    Lock(tmp_path).release()


def test_a_process_that_was_killed_holds_nothing(tmp_path):
    first = held_by_another(tmp_path)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / LOCK_FILE).exists()
    lock = Lock(tmp_path)
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_outlives_a_killed_training_does_not_hold_its_folder(tmp_path):
    forks = HOLD.replace("sys.stdin.readline()", "import os\nos.fork() or time.sleep(60)\nsys.stdin.readline()")
    first = subprocess.Popen(
        [sys.executable, "-c", forks, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "held\n"
    children = []
    while not children:
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    try:
        first.send_signal(signal.SIGKILL)
        first.wait()
        os.kill(int(children[0]), 0)  # it is there
        Lock(tmp_path).release()
    finally:
        os.kill(int(children[0]), signal.SIGKILL)


def test_a_training_whose_launcher_is_gone_is_waited_for(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    first = held_by_another(tmp_path, TORCHELASTIC_RUN_ID="none")
    facts = json.loads((tmp_path / LOCK_FILE).read_text())
    assert facts["launcher"] == os.getpid()
    (tmp_path / LOCK_FILE).write_text(json.dumps({**facts, "launcher": 2**22 + 1}))  # as after a kill of the launcher
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 2 * Lock.TRIES:  # longer than it would wait for one that goes on
            first.communicate("end\n", timeout=60)

    monkeypatch.setattr(time, "sleep", sleep)
    Lock(tmp_path).release()
    assert f"process {first.pid}, whose launcher is gone, is writing its checkpoint" in caplog.text


@pytest.mark.parametrize("content", ["", "garbage", "[1]", '{"pid": [], "host": 7}', "\x1b[2J"])
def test_whatever_a_lock_file_holds_the_lock_is_what_counts(tmp_path, content):
    (tmp_path / LOCK_FILE).write_text(content)
    Lock(tmp_path).release()
    first = held_by_another(tmp_path)
    (tmp_path / LOCK_FILE).write_text(content)
    with pytest.raises(InputError, match="a training writes there already"):
        Lock(tmp_path)
    first.kill()


def test_a_file_system_without_locks_is_told_and_goes_on(tmp_path, monkeypatch, caplog):
    def lockf(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(output_folder.fcntl, "lockf", lockf)
    Lock(tmp_path).release()
    (told,) = [record.getMessage() for record in caplog.records]
    assert "its file system has no locks (Function not implemented)" in told
    assert list(tmp_path.iterdir()) == []


# can it be written


def test_a_folder_that_can_be_written_is_made_and_left_empty(tmp_path):
    assert why_not_writable(tmp_path / "a" / "b") is None
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_file_where_a_folder_is_needed_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file is a file where a folder is needed" in why_not_writable(tmp_path / "file")
    assert f"{tmp_path}/file is a file where a folder is needed" in why_not_writable(tmp_path / "file" / "deeper")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "cannot be written" in why_not_writable(tmp_path / "link")


@pytest.mark.parametrize("code", [28, 30, 13])
def test_what_the_disk_says_is_told_with_the_free_bytes(tmp_path, monkeypatch, code):
    usage = namedtuple("usage", "total used free")

    def refuse(**options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(output_folder.tempfile, "NamedTemporaryFile", refuse)
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: usage(10, 3, 7))
    assert f"cannot be written ({os.strerror(code)}; 7 bytes are free)" in why_not_writable(tmp_path)


# what fits


@pytest.fixture
def room(tmp_path, monkeypatch):
    """`check_room` of a run of 20 epochs and a million parameters, on a disk with so many free bytes."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("vqa.train.jsonl", "vqa.trainable_val.jsonl", "vqa.rest_val.jsonl", "answer2label.txt"):
        (data / name).write_text("")
    usage = namedtuple("usage", "total used free")

    def ask(free, *flags, resume_from=None):
        monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: usage(2 * free, free, free))
        argv = ["--task", "vqav2", "--model", "beit3_tiny_patch16_64", "--vocab_size", "100", "--data_path", data]
        argv += ["--sentencepiece_model", reference.MINI_COCO / "mini.spm", "--output_dir", tmp_path / "out", *flags]
        return check_room(read_settings([str(part) for part in argv]), 1_000_000, 10, resume_from)

    return ask


def test_a_disk_that_takes_not_one_checkpoint_is_refused_with_both_numbers(room, tmp_path):
    (problem,) = room(11_999_999)  # weights and two values of Adam, four bytes each
    assert "11999999 bytes are free" in problem
    assert "one checkpoint takes about 12000000" in problem
    assert room(15_999_999, "--model_ema") != []
    assert room(7_999_999, "--opt", "sgd") != []
    assert room(8_000_000, "--opt", "sgd") == []
    assert room(11_999_999, resume_from=tmp_path / "checkpoint-18.pth") != []
    assert room(11_999_999, resume_from=tmp_path / "checkpoint-19.pth") == []  # the run is finished
    assert room(0, "--no_save_ckpt") == []


def test_a_disk_that_may_not_take_all_checkpoints_is_warned_of(room, tmp_path, caplog):
    # Three that are kept and the one being written, the best as folder and file, twice while written, the last.
    assert room(64_000_000) == []
    assert caplog.messages == []
    assert room(63_999_999) == []
    (told,) = caplog.messages
    assert "all that this run keeps about 64000000" in told and "lower --keep_checkpoints" in told
    caplog.clear()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint-3.pth").write_bytes(b"x" * 1_000_000)  # what is there already needs no room again
    assert room(63_000_000) == []
    assert caplog.messages == []


def test_predictions_need_room_too(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: usage(10**6, 0, 50_000))
    assert check_room_for_predictions(tmp_path, 100) == []
    assert "50000 bytes are free, 101 predictions may take 50500" in check_room_for_predictions(tmp_path, 101)[0]


# damaged files


def test_what_is_set_aside_gets_a_name_that_is_free(tmp_path):
    for wanted in ("log.txt.damaged", "log.txt.damaged-2", "log.txt.damaged-3"):
        (tmp_path / "log.txt").write_text(wanted)
        assert set_aside(tmp_path / "log.txt").name == wanted
        assert (tmp_path / wanted).read_text() == wanted


GOOD = '{"epoch": 0, "train_loss": 1.5}'


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b"{not json", "line 2 is no JSON"),
        (b'{"loss": 1}', "line 2 does not say its epoch"),
        (b'{"epoch": "0"}', "line 2 does not say its epoch"),
        (b"7", "line 2 does not say its epoch"),
        (b"\xff\xfe", "line 2 is no JSON in UTF-8"),
        (b"[" * 100_000, "line 2 is no JSON"),
        (b"\0\0\0\0", "line 2 is no JSON"),
    ],
)
def test_a_log_with_a_bad_line_is_set_aside_and_its_good_lines_go_on(tmp_path, caplog, bad, why):
    path = tmp_path / "log.txt"
    content = GOOD.encode() + b"\n" + bad + b"\n" + b'{"epoch": 1}\n{"epoch": 5}\n'
    path.write_bytes(content)
    log.write_log(path, {"epoch": 2})
    assert path.read_text().splitlines() == [GOOD, '{"epoch": 1}', '{"epoch": 2}']
    assert (tmp_path / "log.txt.damaged").read_bytes() == content
    assert f"{path}: {why}" in caplog.text and "renamed to log.txt.damaged" in caplog.text


def test_a_sound_log_is_not_set_aside(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes(GOOD.encode() + b"\r\n\n")
    log.write_log(path, {"epoch": 1})
    assert path.read_text() == f'{GOOD}\n{{"epoch": 1}}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_result_that_cannot_be_written_is_kept_elsewhere(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "file").write_text("")
    written = log.keep_json(tmp_path / "file", "submit.json", [1, 2])
    assert json.loads(written.read_text()) == [1, 2]
    assert written.name == "submit.json" and f"written to {written}" in caplog.text


class Broken:
    def __init__(self):
        self.calls = 0

    def add_scalar(self, *arguments):
        self.calls += 1
        raise OSError(28, "No space left on device")


def test_a_tensorboard_writer_that_fails_is_told_once_and_asked_no_more(caplog):
    writer = Broken()
    teller = log.Teller(writer, "logs")
    for step in range(3):
        teller.add_scalar("loss", 1.0, step)
    assert writer.calls == 1
    assert len(caplog.messages) == 1 and "No space left on device" in caplog.messages[0]
