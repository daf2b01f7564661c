"""Checkpoints are complete or absent, and only complete ones of the same run are gone on from."""

import functools
import json
import os
import signal
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError

from beit3.model.weights import read_checkpoint, write_weights
from beit3.system.errors import CheckpointError, InputError
from beit3.training.checkpoints import (
    checkpoint_name,
    checkpoints_in,
    damage,
    errors_named,
    prune,
    read_fingerprint,
    replace_folder,
    write_manifest,
)
from runs.assembly import make_schedule
from runs.log import write_log
from runs.settings import OptimizerSettings
from runs.state import HEAD, Keeping, find_resumable
from tests.test_backends import make, take_steps
from utils import Process

ALONE = Process(0, 1, 0, torch.device("cpu"))
FINGERPRINT = {
    "format": 2, "versions": {"torch": "2"}, "world_size": 2, "recipe": {"--lr": 0.1, "--epochs": 3},
    "data": {"tokenizer": "abc"},
}  # fmt: skip


def plain(folder, name, value=0.0, fingerprint=FINGERPRINT):
    path = folder / f"{name}.pth"
    torch.save({"model": {"w": torch.full((1000,), value)}, "fingerprint": fingerprint}, path)
    return path


def deepspeed(folder, name, value=0.0, fingerprint=FINGERPRINT):
    path = folder / name
    (path / "state").mkdir(parents=True)
    torch.save({"w": torch.full((1000,), value)}, path / "state" / "zero.pt")
    (path / "model.safetensors").write_bytes(b"x" * 3000)
    write_manifest(path, fingerprint)
    return path


WRITERS = {".pth": plain, "": deepspeed}


@pytest.fixture(params=[".pth", ""], ids=["plain", "deepspeed"])
def kind(request):
    return request.param


def keeping(folder, suffix, **changes):
    learning_rates = functools.partial(make_schedule, OptimizerSettings(warmup_epochs=1), 6)
    settings = Keeping(folder, 0, None, True, False, FINGERPRINT, "b.spm", learning_rates, suffix, any_world_size=False)
    return replace(settings, **changes)


def test_names_say_how_far_a_run_was_and_sort_by_it(tmp_path, kind):
    names = ["checkpoint-0", "checkpoint-1-5", "checkpoint-1-30", "checkpoint-1", "checkpoint-10"]
    for name in names:
        WRITERS[kind](tmp_path, name)
    for other in ("checkpoint-best", "checkpoint-last", ".checkpoint-11.tmp", "checkpoint-12.stale"):
        (tmp_path / other).mkdir()
    assert [path.name for path in checkpoints_in(tmp_path, kind)] == [name + kind for name in reversed(names)]
    assert checkpoint_name((2, 0)) == "checkpoint-1"
    assert checkpoint_name((1, 30)) == "checkpoint-1-30"


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def harms(path):
    """Ways to spoil a checkpoint, each as a function."""
    files = (
        [path] if path.is_file() else [path / "state" / "zero.pt", path / "model.safetensors", path / "manifest.json"]
    )
    for file in files:
        half = file.stat().st_size // 2
        if file.name != "manifest.json":
            yield f"{file.name} flipped", lambda file=file, half=half: flip(file, half)
        yield f"{file.name} truncated", lambda file=file, half=half: os.truncate(file, half)
        yield f"{file.name} empty", lambda file=file: os.truncate(file, 0)
        if path.is_dir():
            yield f"{file.name} missing", file.unlink


def test_a_spoilt_checkpoint_is_named_and_the_one_before_taken(tmp_path, kind, caplog):
    ways = list(harms(WRITERS[kind](tmp_path, "checkpoint-0")))
    assert len(ways) == (3 if kind else 11)
    for number, (what, _) in enumerate(ways):
        folder = tmp_path / str(number)
        folder.mkdir()
        older, newest = (WRITERS[kind](folder, f"checkpoint-{epoch}") for epoch in (3, 4))
        assert find_resumable(keeping(folder, kind), ALONE) == newest
        list(harms(newest))[number][1]()
        assert damage(newest) is not None, what
        assert find_resumable(keeping(folder, kind), ALONE) == older, what
        assert str(newest) in caplog.messages[-1]


def test_with_no_complete_checkpoint_left_nothing_starts_in_silence(tmp_path, kind):
    for epoch in (3, 4):
        path = WRITERS[kind](tmp_path, f"checkpoint-{epoch}")
        next(harms(path))[1]()
    with pytest.raises(InputError, match="no complete checkpoint is left") as error:
        find_resumable(keeping(tmp_path, kind), ALONE)
    assert "checkpoint-3" in str(error.value)
    assert "checkpoint-4" in str(error.value)
    assert find_resumable(keeping(tmp_path, kind, auto_resume=False), ALONE) is None


def test_a_run_without_checkpoints_starts_anew(tmp_path, kind):
    assert find_resumable(keeping(tmp_path, kind), ALONE) is None


def test_the_checkpoint_asked_for_is_taken_rather_than_the_newest(tmp_path, kind):
    asked, _ = (WRITERS[kind](tmp_path, f"checkpoint-{epoch}") for epoch in (3, 4))
    assert find_resumable(keeping(tmp_path, kind, resume=asked), ALONE) == asked
    next(harms(asked))[1]()
    with pytest.raises(InputError, match="checkpoint-3"):
        find_resumable(keeping(tmp_path, kind, resume=asked), ALONE)


def test_another_number_of_epochs_goes_on_where_it_changes_no_step_that_was_taken(tmp_path, kind):
    """In the warm-up and after it; half a cosine over three epochs is another one than over two."""
    longer = keeping(tmp_path, kind, fingerprint={**FINGERPRINT, "recipe": {"--lr": 0.1, "--epochs": 5}})
    for name in ("checkpoint-0-4", "checkpoint-0"):
        path = WRITERS[kind](tmp_path, name)
        assert find_resumable(longer, ALONE) == path
    WRITERS[kind](tmp_path, "checkpoint-1-1")  # the step after the warm-up has its learning rate
    assert find_resumable(longer, ALONE) is not None
    WRITERS[kind](tmp_path, "checkpoint-1-2")
    with pytest.raises(InputError, match=r"--epochs was 3, is 5.*another run.*checkpoint-best to --finetune"):
        find_resumable(longer, ALONE)
    constant = functools.partial(make_schedule, OptimizerSettings(warmup_epochs=1, lr=1e-3, min_lr=1e-3), 6)
    assert find_resumable(replace(longer, learning_rates=constant), ALONE) is not None
    shorter = {**FINGERPRINT, "recipe": {"--lr": 0.1, "--epochs": 1}}  # which has no steps 6 and 7
    with pytest.raises(InputError, match="--epochs was 3, is 1"):
        find_resumable(replace(longer, learning_rates=constant, fingerprint=shorter), ALONE)


def test_a_tokenizer_or_head_that_changed_is_named(tmp_path, kind):
    path = WRITERS[kind](tmp_path, "checkpoint-0", fingerprint={**FINGERPRINT, "data": {"tokenizer": "abc", HEAD: "x"}})
    now = {**FINGERPRINT, "data": {"tokenizer": "xyz", HEAD: "y"}}
    with pytest.raises(InputError, match=r"meaning of the head was x, is y.*in its checkpoint; this one is b\.spm"):
        find_resumable(keeping(tmp_path, kind, fingerprint=now), ALONE)
    # A checkpoint of before this was written down says nothing of it.
    now = {**FINGERPRINT, "data": {"tokenizer": "abc", HEAD: "y"}}
    WRITERS[kind](tmp_path, "checkpoint-1")
    assert find_resumable(keeping(tmp_path, kind, fingerprint=now), ALONE) == path.with_name(f"checkpoint-1{kind}")


def test_a_changed_recipe_or_data_is_refused_naming_what_changed_unless_forced(tmp_path, kind):
    path = WRITERS[kind](tmp_path, "checkpoint-0")
    now = {**FINGERPRINT, "recipe": {"--lr": 0.2, "--epochs": 3}, "data": {"tokenizer": "xyz"}}
    with pytest.raises(InputError, match=r"belongs to another run.*--lr was 0\.1, is 0\.2.*tokenizer was abc, is xyz"):
        find_resumable(keeping(tmp_path, kind, fingerprint=now), ALONE)
    assert find_resumable(keeping(tmp_path, kind, fingerprint=now, force=True), ALONE) == path


def test_another_number_of_processes_is_refused_where_each_keeps_a_part(tmp_path, kind):
    path = WRITERS[kind](tmp_path, "checkpoint-0")
    now = {**FINGERPRINT, "world_size": 4}
    with pytest.raises(InputError, match="made by 2 processes, now there are 4"):
        find_resumable(keeping(tmp_path, kind, fingerprint=now, force=True), ALONE)
    assert find_resumable(keeping(tmp_path, kind, fingerprint=now, any_world_size=True), ALONE) == path


def test_a_checkpoint_of_the_other_backend_is_refused(tmp_path):
    file, folder = plain(tmp_path, "checkpoint-0"), deepspeed(tmp_path, "checkpoint-0")
    with pytest.raises(InputError, match="made without --enable_deepspeed, this run is with"):
        find_resumable(keeping(tmp_path, "", resume=file, force=True), ALONE)
    with pytest.raises(InputError, match="made with --enable_deepspeed, this run is without"):
        find_resumable(keeping(tmp_path, ".pth", resume=folder, force=True), ALONE)


def test_what_killed_saves_left_is_removed(tmp_path, kind):
    kept = WRITERS[kind](tmp_path, "checkpoint-0")
    (tmp_path / ".checkpoint-1.tmp" / "state").mkdir(parents=True)
    (tmp_path / ".checkpoint-1.pth.123-01ab23cd.tmp").write_bytes(b"half")
    (tmp_path / ".log.txt.77-0123abcd.tmp").touch()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-best" / ".model.safetensors.77-0123abcd.tmp").touch()
    (tmp_path / ".hidden").touch()
    (tmp_path / ".hidden.tmp").touch()
    find_resumable(keeping(tmp_path, kind), ALONE)
    assert {path.name for path in tmp_path.iterdir()} == {kept.name, ".hidden", ".hidden.tmp", "checkpoint-best"}
    assert not list((tmp_path / "checkpoint-best").iterdir())


def test_the_newest_are_kept_and_the_one_resumed_from_and_the_best(tmp_path, kind):
    paths = [WRITERS[kind](tmp_path, f"checkpoint-{epoch}") for epoch in range(5)]
    (tmp_path / "checkpoint-best").mkdir()
    prune(paths[4], kind, keep=2, spare=paths[1])
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-best", paths[1].name, paths[3].name, paths[4].name,
    }  # fmt: skip
    prune(paths[4], kind, keep=0, spare=None)
    assert paths[3].exists()


def test_checkpoints_of_a_future_that_was_given_up_are_set_aside(tmp_path, kind):
    paths = [WRITERS[kind](tmp_path, f"checkpoint-{epoch}") for epoch in range(3)]
    prune(paths[1], kind, keep=1, spare=None)
    assert {path.name for path in tmp_path.iterdir()} == {paths[1].name, f"{paths[2].name}.stale"}
    assert checkpoints_in(tmp_path, kind) == [paths[1]]


def test_weights_alone_are_no_state_to_resume_from(tmp_path):
    write_weights(tmp_path / "w.pth", {"a": torch.ones(2)}, {})
    with pytest.raises(InputError, match="holds weights only; give it to --finetune"):
        find_resumable(keeping(tmp_path, ".pth", resume=tmp_path / "w.pth"), ALONE)
    write_weights(tmp_path / "best", {"a": torch.ones(2)}, {})
    with pytest.raises(InputError, match=r"manifest\.json"):
        find_resumable(keeping(tmp_path, "", resume=tmp_path / "best"), ALONE)


def test_a_flipped_bit_in_weights_for_fine_tuning_is_seen(tmp_path):
    for name in ("w.pth", "folder"):
        path = tmp_path / name
        write_weights(path, {"a": torch.arange(1000.0)}, {"model": "m"})
        assert read_checkpoint(path).state_dict["a"][7] == 7
        file = path if path.is_file() else path / "model.safetensors"
        flip(file, file.stat().st_size - 2000 if path.is_dir() else file.stat().st_size // 2)
        with pytest.raises(InputError, match="damaged"):
            read_checkpoint(path)


def test_a_folder_takes_the_place_of_another_whole(tmp_path):
    path = deepspeed(tmp_path, "checkpoint-0", fingerprint={**FINGERPRINT, "world_size": 1})
    aside = deepspeed(tmp_path, ".checkpoint-0.tmp")
    replace_folder(aside, path)
    assert read_fingerprint(path)["world_size"] == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-0"]


def events_of_a_save(backend, path, kill_at):
    """Saves in a forked process that dies at the given event; returns how many events there were, or None."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def audit(event, arguments):
            nonlocal count
            if event in ("open", "os.rename", "os.remove") and str(arguments[0]).startswith(str(path.parent)):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        backend.save(path, {"fingerprint": FINGERPRINT, "description": {}})
        os.write(writer, str(count).encode())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    os.close(writer)
    said = os.read(reader, 20)
    os.close(reader)
    assert bool(said) == (status == 0)
    return int(said) if said else None


def test_a_save_killed_at_any_file_leaves_the_checkpoint_before(tmp_path):
    backend = make("plain", batch_size=8)
    backend.save(tmp_path / "checkpoint-0.pth", {"fingerprint": FINGERPRINT, "description": {}})
    take_steps(backend, 0, 1, last=1)
    for kill_at in range(1, 100):
        count = events_of_a_save(backend, tmp_path / "checkpoint-1.pth", kill_at)
        found = find_resumable(keeping(tmp_path, ".pth"), ALONE)
        assert damage(found) is None
        # Once the last file is renamed the new one is complete, whatever comes after.
        assert found.name == "checkpoint-0.pth" or count is not None or kill_at > 2
        assert not list(tmp_path.glob(".checkpoint-*"))
        if count is not None:
            assert found.name == "checkpoint-1.pth"
            assert kill_at == count + 1 > 2
            break
        (tmp_path / "checkpoint-1.pth").unlink(missing_ok=True)


def test_a_full_disk_is_told_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    backend = make("plain", batch_size=8)
    first = tmp_path / "checkpoint-0.pth"
    backend.save(first, {"fingerprint": FINGERPRINT, "description": {}})
    before = first.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match=r"checkpoint-1\.pth: could not be written.*No space left on device"):
        backend.save(tmp_path / "checkpoint-1.pth", {"fingerprint": FINGERPRINT, "description": {}})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-0.pth"]
    assert first.read_bytes() == before


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
    ],
)
def test_a_full_disk_is_called_that_whoever_writes(tmp_path, error):
    wanted = r"best: could not be written \(disk full: .*(No space left|quota exceeded).*make room on the disk"
    with pytest.raises(CheckpointError, match=wanted), errors_named(tmp_path / "best"):
        raise error
    with pytest.raises(CheckpointError, match=wanted), errors_named(tmp_path / "best"):
        try:
            raise error
        except Exception:
            raise RuntimeError("file write failed")  # noqa: B904  torch's writer says no more


def test_another_failure_of_a_save_is_not_called_a_full_disk(tmp_path):
    for error in (SafetensorError("tensors share memory"), OSError(30, "Read-only file system"), RuntimeError("no")):
        with pytest.raises(CheckpointError) as caught, errors_named(tmp_path / "best"):
            raise error
        assert "disk full" not in str(caught.value)


MANIFESTS = {
    "no object": [],
    "no files": {"fingerprint": {}},
    "files a list": {"fingerprint": {}, "files": ["a"]},
    "facts a number": {"fingerprint": {}, "files": {"a": 1}},
    "facts missing": {"fingerprint": {}, "files": {"a": {"bytes": 1}}},
    "outside": {"fingerprint": {}, "files": {"../a": {"bytes": 1, "sha256": ""}}},
    "absolute": {"fingerprint": {}, "files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}},
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_of_another_form_is_damage_and_no_traceback(tmp_path, kind):
    path = deepspeed(tmp_path, "checkpoint-0")
    (path / "manifest.json").write_text(json.dumps(MANIFESTS[kind]))
    assert "manifest.json is not one of this toolkit" in damage(path)


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": [1]}, {"data": "x"}, {"recipe": {"--lr": torch.ones(1)}}, {"recipe": {1: 2}}, {"versions": None},
        {"format": "2"}, {"format": None}, {"format": True}, {"format": 0}, {"world_size": [2]}, {"world_size": None},
    ],
)  # fmt: skip
def test_a_fingerprint_of_another_form_is_refused_by_name(tmp_path, change):
    path = plain(tmp_path, "checkpoint-0", fingerprint={**FINGERPRINT, **change})
    with pytest.raises(InputError, match=r"checkpoint-0\.pth: .*fingerprint"):
        read_fingerprint(path)


@pytest.mark.parametrize("content", [b"<html>", b"", b"version https://git-lfs.github.com/spec/v1", b"x" * 600])
def test_what_is_no_checkpoint_is_damage_and_no_traceback(tmp_path, content):
    path = tmp_path / "checkpoint-0.pth"
    path.write_bytes(content)
    assert str(path) in damage(path)
    assert "\n" not in damage(path)


def test_the_log_has_each_epoch_once(tmp_path):
    path = tmp_path / "log.txt"
    for epoch in (0, 1, 2, 1):  # the last one after a crash
        write_log(path, {"epoch": epoch, "loss": float(epoch)})
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [0, 1]
