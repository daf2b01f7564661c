"""Weights in and out: every key accounted for, nothing executed."""

import argparse
import bz2
import collections
import datetime
import gzip
import io
import json
import lzma
import os
import pathlib
import pickle
import struct
import tarfile
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from beit3.model.untrusted import load_untrusted
from beit3.model.weights import (
    POSITION_TABLE,
    Checkpoint,
    find_weights,
    load_weights,
    read_checkpoint,
    resize_positions,
    write_weights,
)
from beit3.system.errors import InputError, printable
from modeling_finetune import create_model
from tests import reference


def tiny(**options):
    return reference.build("beit3_tiny_patch16_64_vqav2", vocab_size=50, num_classes=12, **options)


@pytest.mark.slow
def test_positions_are_interpolated_as_in_the_released_code(tmp_path):
    expected = reference.load("position_interpolation.json")
    source = reference.build("beit3_base_patch16_224_captioning", vocab_size=200, seed=3)
    torch.save({"model": source.state_dict()}, tmp_path / "base.pth")
    target = reference.build("beit3_base_patch16_480_captioning", vocab_size=200)
    report = load_weights(target, read_checkpoint(tmp_path / "base.pth"), new_head=True)
    table = target.state_dict()[POSITION_TABLE]
    assert list(table.shape) == expected["shape"]
    for row, values in expected["rows"].items():
        torch.testing.assert_close(table[int(row), :8], torch.tensor(values), rtol=1e-4, atol=1e-6)
    assert table.abs().sum().item() == pytest.approx(expected["abs_sum"], rel=1e-4)
    assert report.resized == [f"{POSITION_TABLE} 199 → 903 rows"]
    assert report.unused == []
    assert report.new == []


def test_a_position_table_of_the_same_size_stays_as_it_is():
    table = torch.randn(3 + 16, 8)
    torch.testing.assert_close(resize_positions(table, 19), table)


def test_a_table_that_is_no_square_is_refused():
    with pytest.raises(ValueError, match="not square"):
        resize_positions(torch.randn(3 + 15, 8), 19)


def test_fresh_weights_of_released_sizes_are_cut_at_one_standard_deviation():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("beit3_base_patch16_224_imageclassification", vocab_size=10)
    weight = model.beit3.encoder.layers[0].ffn.A.fc1.weight
    assert weight.abs().max() <= 0.02
    # Standard deviation of a normal distribution cut at one standard deviation: 0.5396 of the uncut.
    assert weight.std().item() == pytest.approx(0.02 * 0.53956, rel=1e-3)
    assert model.head.weight.abs().max() <= 0.00002


def test_every_key_is_accounted_for():
    state = dict(tiny().state_dict())
    del state["head.3.weight"], state["head.3.bias"]
    state["mim_head.weight"] = torch.zeros(2)
    model = tiny()
    report = load_weights(model, Checkpoint(state, {}, "x.pth"), new_head=True)
    assert sorted(report.new) == ["head.3.bias", "head.3.weight"]
    assert report.unused == ["mim_head.weight"]
    assert sorted(report.loaded) == sorted(state.keys() - {"mim_head.weight"})
    assert "2 tensors" not in str(report)
    assert "new: head.3.weight, head.3.bias" in str(report)


def test_missing_encoder_keys_and_wrong_shapes_are_all_listed():
    state = dict(tiny().state_dict())
    del state["beit3.text_embed.weight"]
    state["head.3.bias"] = torch.zeros(5)
    with pytest.raises(InputError) as caught:
        load_weights(tiny(), Checkpoint(state, {}, "x.pth"), new_head=True)
    assert caught.value.problems == [
        "x.pth: beit3.text_embed.weight is missing",
        "x.pth: head.3.bias is (5,), the model has (12,)",
    ]


def test_for_prediction_a_missing_head_is_an_error():
    state = {name: value for name, value in tiny().state_dict().items() if not name.startswith("head.3")}
    with pytest.raises(InputError, match="head.3.weight is missing"):
        load_weights(tiny(), Checkpoint(state, {}, "x.pth"), new_head=False)


@pytest.mark.parametrize("wrap", [lambda s: {"model": s}, lambda s: {"module": s, "epoch": 3}, lambda s: s])
def test_weights_are_found_under_model_under_module_or_bare(tmp_path, wrap):
    state = tiny().state_dict()
    torch.save(wrap(state), tmp_path / "w.pth")
    read = read_checkpoint(tmp_path / "w.pth")
    assert read.state_dict.keys() == state.keys()
    assert read.description == {}


def test_a_prefix_is_put_before_each_key(tmp_path):
    torch.save({"model": {"encoder.x": torch.zeros(1)}}, tmp_path / "w.pth")
    assert list(read_checkpoint(tmp_path / "w.pth", prefix="beit3.").state_dict) == ["beit3.encoder.x"]


def test_arguments_of_the_original_beside_the_weights_do_no_harm(tmp_path):
    torch.save({"model": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=1.0)}, tmp_path / "w.pth")
    assert read_checkpoint(tmp_path / "w.pth").state_dict["a"].item() == 1


@pytest.mark.parametrize("name", ["checkpoint-best.pth", "checkpoint-best"])
def test_written_weights_carry_their_description(tmp_path, name):
    description = {"answers": ["yes", "ja", "½"], "image_size": 64}
    state = tiny().state_dict()
    write_weights(tmp_path / name, state, description)
    read = read_checkpoint(tmp_path / name)
    assert read.description == description
    assert all(torch.equal(read.state_dict[key], value) for key, value in state.items())
    assert read.state_dict.keys() == state.keys()


def test_the_folder_holds_a_file_that_safetensors_alone_can_read(tmp_path):
    write_weights(tmp_path / "best", {"a": torch.arange(3.0)}, {"model": "m"})
    with safe_open(tmp_path / "best" / "model.safetensors", "pt") as content:
        assert content.get_tensor("a").tolist() == [0, 1, 2]
        assert json.loads(content.metadata()["description"]) == {"model": "m"}


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_hidden_in_a_checkpoint_is_refused_and_never_runs(tmp_path):
    torch.save({"model": {"a": torch.ones(1)}, "x": Canary(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w\.pth: refused, it holds more than tensors and plain values"):
        read_checkpoint(tmp_path / "w.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
    with pytest.raises(InputError, match=r"old\.pth"):
        read_checkpoint(tmp_path / "old.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pth", b"", "not a readable checkpoint"),
        ("w.pth", b"PK\x03\x04 cut off", "its end is missing"),
        ("w.safetensors", b"\x10", "damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_checkpoint(tmp_path / name)


def test_a_file_without_weights_and_a_folder_without_checkpoint_are_named(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="no weights under model or module"):
        read_checkpoint(tmp_path / "w.pth")
    with pytest.raises(InputError, match="a folder without"):
        find_weights(tmp_path)
    with pytest.raises(InputError, match="no such checkpoint"):
        find_weights(tmp_path / "nothing")


# files as people have them


STATE = {f"beit3.layer{i}.weight": torch.arange(100.0 * i, 100.0 * i + 3700).reshape(100, 37) for i in range(4)}


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def zipped(parts, method=zipfile.ZIP_STORED, **options):
    """Bytes of a zip made by another tool: parts as {name: content}, or as pairs."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as container:
        for name, content in parts.items() if isinstance(parts, dict) else parts:
            with container.open(name, "w", **options) as part:
                part.write(content)
    return file.getvalue()


def parts_of(content):
    with zipfile.ZipFile(io.BytesIO(content)) as container:
        return {name: container.read(name) for name in container.namelist()}


PLAIN = saved({"model": STATE})


def moved_by_one(content):
    """The same parts, uncompressed, but the tensors begin at odd addresses."""
    parts = parts_of(content)
    for length in range(1, 70):
        moved = zipped([("archive/" + "x" * length, b""), *parts.items()])
        with zipfile.ZipFile(io.BytesIO(moved)) as container:
            place = container.getinfo("archive/data/0").header_offset + 30 + len("archive/data/0")
        if place % 2:
            return moved
    raise AssertionError("no length moves it")


REWRITTEN = {
    "compressed": lambda: zipped(parts_of(PLAIN), zipfile.ZIP_DEFLATED),
    "uncompressed": lambda: zipped(parts_of(PLAIN)),
    "at odd addresses": lambda: moved_by_one(PLAIN),
    "Zip64": lambda: zipped(parts_of(PLAIN), force_zip64=True),
    "Zip64, compressed": lambda: zipped(parts_of(PLAIN), zipfile.ZIP_DEFLATED, force_zip64=True),
    "other order": lambda: zipped(dict(reversed(parts_of(PLAIN).items()))),
    "with folders": lambda: zipped({"archive/": b"", "archive/data/": b"", **parts_of(PLAIN)}),
    "with a comment": lambda: PLAIN[:-2] + b"\x05\x00hello",
    "old format": lambda: saved({"model": STATE}, _use_new_zipfile_serialization=False),
    "old format, bare": lambda: saved(STATE, _use_new_zipfile_serialization=False),
    "safetensors": lambda: safetensors_of(STATE),
}


def safetensors_of(tensors, metadata=None):
    return save(tensors, metadata=metadata)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w"])
@pytest.mark.parametrize("how", REWRITTEN)
def test_weights_are_the_same_however_the_file_was_packed_and_whatever_its_name(tmp_path, how, name):
    (tmp_path / name).write_bytes(REWRITTEN[how]())
    read = read_checkpoint(tmp_path / name)
    assert read.state_dict.keys() == STATE.keys()
    assert all(torch.equal(read.state_dict[key], value) for key, value in STATE.items())


def test_torch_alone_would_read_a_compressed_part_as_garbage(tmp_path):
    """The reason for reading it another way: torch's mapped reading shows the compressed bytes and what follows."""
    state = {"beit3.a": torch.arange(50_000.0), "beit3.b": torch.randn(200_000)}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as container:
        for name, part in parts_of(saved({"model": state})).items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED if name == "archive/data/0" else zipfile.ZIP_STORED
            # An extra field that moves the part to where torch would have put it, so that only the compression tells.
            padding = -(file.tell() + 30 + len(name) + 4) % 64
            entry.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
            container.writestr(entry, part)
    (tmp_path / "w.pth").write_bytes(file.getvalue())
    garbage = torch.load(tmp_path / "w.pth", mmap=True, weights_only=True)["model"]
    assert not torch.equal(garbage["beit3.a"], state["beit3.a"])
    read = read_checkpoint(tmp_path / "w.pth").state_dict
    assert all(torch.equal(read[name], value) for name, value in state.items())


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "backbone.", "module._orig_mod.", "a.b.c."])
def test_a_prefix_before_all_names_is_taken_off_and_told(tmp_path, prefix):
    state = tiny(seed=5).state_dict()
    torch.save({"model": {prefix + name: value for name, value in state.items()}}, tmp_path / "w.pth")
    model = tiny(seed=6)
    report = load_weights(model, read_checkpoint(tmp_path / "w.pth"), new_head=False)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert f"{prefix} taken off their names" in str(report)
    assert report.unused == report.new == []


def test_names_that_fit_as_they_are_stay_and_a_counter_beside_prefixed_ones_too(tmp_path):
    names = ["beit3.x", "module.beit3.x", "module.head"]
    torch.save({"model": {name: torch.ones(1) for name in names}}, tmp_path / "w.pth")
    read = read_checkpoint(tmp_path / "w.pth")
    assert (list(read.state_dict), read.prefix) == (names, "")
    torch.save({"model": {"n_averaged": torch.tensor(3), "module.beit3.x": torch.ones(1)}}, tmp_path / "w.pth")
    assert read_checkpoint(tmp_path / "w.pth").state_dict.keys() == {"n_averaged", "beit3.x"}


def test_two_models_in_one_file_and_names_with_and_without_the_prefix_are_refused(tmp_path):
    torch.save({"student.beit3.x": torch.ones(1), "teacher.beit3.x": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"2 models, under student\., teacher\."):
        read_checkpoint(tmp_path / "w.pth")
    torch.save({"m.beit3.x": torch.ones(1), "m.head": torch.ones(1), "head": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"with m\. before them and without"):
        read_checkpoint(tmp_path / "w.pth")


class Mode(pathlib.PurePosixPath):
    """A class that only this file knows."""


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
@pytest.mark.parametrize("zip_container", [True, False])
def test_numbers_of_numpy_beside_the_weights_are_plain_numbers(tmp_path, module, zip_container):
    beside = {
        "lr": np.float64(3e-5), "half": np.float16(0.5), "single": np.float32(0.1), "step": np.int64(-7),
        "flag": np.bool_(True), "byte": np.uint8(200),
        "name": np.str_("bäse"),
    }  # fmt: skip
    content = saved({"model": STATE, "optimizer": beside}, _use_new_zipfile_serialization=zip_container)
    today = np.float64(0).__reduce__()[0].__module__.encode()
    if zip_container:
        parts = parts_of(content)
        parts["archive/data.pkl"] = parts["archive/data.pkl"].replace(today, module)
        content = zipped(parts)
    else:
        content = content.replace(today, module)
    assert module + b"\nscalar" in (parts["archive/data.pkl"] if zip_container else content)
    (tmp_path / "w.pth").write_bytes(content)
    read = load_untrusted(tmp_path / "w.pth")["optimizer"]
    assert read == {**beside, "single": float(np.float32(0.1))}
    assert {type(value) for value in read.values()} == {float, int, bool, str}
    assert torch.equal(
        read_checkpoint(tmp_path / "w.pth").state_dict["beit3.layer1.weight"], STATE["beit3.layer1.weight"]
    )


def test_a_number_of_numpy_with_its_bytes_the_other_way_round_is_read_right(tmp_path):
    torch.save({"model": STATE, "lr": np.array([2.5], dtype=">f8")[0]}, tmp_path / "w.pth")
    assert load_untrusted(tmp_path / "w.pth")["lr"] == 2.5


def test_harmless_classes_beside_the_weights_are_passed_over(tmp_path):
    counts = collections.defaultdict(list, {"a": [1]})
    beside = [
        pathlib.PurePosixPath("a/b"), pathlib.PosixPath("/x"), argparse.Namespace(lr=np.float64(1.0)),
        types.SimpleNamespace(a=1), datetime.datetime(2024, 1, 1), datetime.timedelta(1), frozenset([1]),
        collections.deque([1, 2], maxlen=3), int, collections.Counter("aab"), {1, 2}, 1j,
    ]  # fmt: skip
    ordered = collections.OrderedDict(b=1, a=2)
    torch.save({"model": STATE, "beside": beside, "counts": counts, "ordered": ordered}, tmp_path / "w.pth")
    content = load_untrusted(tmp_path / "w.pth")
    assert content["counts"] == {"a": [1]}
    assert list(content["ordered"].items()) == [("b", 1), ("a", 2)]
    assert list(content["beside"][7]) == [1, 2]
    assert read_checkpoint(tmp_path / "w.pth").state_dict.keys() == STATE.keys()


def test_a_deepspeed_folder_that_the_original_saved_after_a_step_is_read(tmp_path):
    content = {"module": STATE, "optimizer": {"param_groups": [{"lr": np.float64(1e-4)}]}, "ds_version": "0.4.0"}
    (tmp_path / "checkpoint-3").mkdir()
    torch.save(content, tmp_path / "checkpoint-3" / "mp_rank_00_model_states.pt")
    assert read_checkpoint(tmp_path / "checkpoint-3").state_dict.keys() == STATE.keys()


def test_what_a_checkpoint_may_name_is_allowed_while_it_is_read_and_no_longer(tmp_path):
    torch.save({"model": STATE, "lr": np.float64(1.0), "args": argparse.Namespace()}, tmp_path / "w.pth")
    with torch.serialization.safe_globals([Canary]):
        before = set(torch.serialization.get_safe_globals())  # a list of a set: in any order
        read_checkpoint(tmp_path / "w.pth")
        assert set(torch.serialization.get_safe_globals()) == before
        # Nor does what others allow hold in ours.
        torch.save({"model": STATE, "x": CanaryByName()}, tmp_path / "c.pth")
        with pytest.raises(InputError):
            read_checkpoint(tmp_path / "c.pth")
        assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError, match="Unsupported global"):
        torch.load(tmp_path / "w.pth", weights_only=True)


class CanaryByName:
    def __reduce__(self):
        return (Canary, ("x",))


# files that are no checkpoint


def pickled(operations):
    """A checkpoint whose pickle is these bytes."""
    return zipped({**parts_of(PLAIN), "archive/data.pkl": operations})


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def header(entries, data=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor_entry(**changes):
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


def tar_of(name, content):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def with_flag(content, flag):
    """A zip whose first part says in the list of parts that it is, for example, encrypted."""
    place = content.index(b"PK\x01\x02")
    return content[: place + 8] + bytes([flag]) + content[place + 9 :]


def altered(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value, value]
    return value


def cyclic():
    value = {}
    value["again"] = value
    return value


def bomb():
    """200 MB of zeros under a megabyte, as tensors that want them."""
    return zipped(parts_of(saved({"model": {"beit3.a": torch.zeros(50 << 20)}})), zipfile.ZIP_DEFLATED)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1093281\n"
OLD = saved({"model": STATE}, _use_new_zipfile_serialization=False)
SAFE = safetensors_of({"a": torch.ones(2)})
COMPRESSED = zipped(parts_of(PLAIN), zipfile.ZIP_DEFLATED)


def described(description):
    return lambda: saved({"model": STATE, "description": description})


def twice():
    entry = json.dumps(tensor_entry()).encode()
    return header(entry[:-1] + b", " + entry[1:], bytes(8))


MALFORMED = {
    "empty": (lambda: b"", "an empty file"),
    "git lfs pointer": (lambda: LFS, "git lfs pull"),
    "web page": (lambda: b"<!DOCTYPE html>\n<html><title>404</title>" * 40, "a web page.*<!DOCTYPE html>"),
    "web page in capitals": (lambda: b"\n <HTML><BODY>", "a web page"),
    "XML error": (lambda: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML.*begins with"),
    "JSON error": (lambda: b'{"error": "Repository not found"}', "JSON text; a server's error.*Repository"),
    "index of shards": (lambda: b'{"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}', "split"),
    "JSON list": (lambda: b"[1, 2]", "JSON text"),
    "text": (lambda: b"epoch 1 loss 0.3\n", "a text file .*epoch 1"),
    "text with escapes": (lambda: b"hello \x1b[31mred\x1b[0m and much more text after it", r"\\x1b"),
    "text in UTF-16": (lambda: "wrong file".encode("utf-16"), "a text file"),
    "tar": (lambda: tar_of("w.pth", PLAIN), "a tar archive"),
    "gzip": (lambda: gzip.compress(PLAIN), "gzip"),
    "bzip2": (lambda: bz2.compress(PLAIN), "bzip2"),
    "xz": (lambda: lzma.compress(PLAIN), "xz"),
    "zeros": (lambda: bytes(5000), "zeros"),
    "random bytes": (lambda: bytes(range(255, 0, -1)) * 9, "unknown or damaged"),
    "numpy array": (lambda: b"\x93NUMPY\x01\x00v\x00", "NumPy"),
    "hdf5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(100), "a picture"),
    "plain pickle": (lambda: pickle.dumps({"model": {"a": [1.0]}}), "a Python pickle that torch.save did not write"),
    "pickled list": (lambda: pickle.dumps([1, 2], protocol=2), "a Python pickle"),
    "empty zip": (lambda: zipped({}), "an empty zip"),
    "zip with a checkpoint": (lambda: zipped({"w.pth": PLAIN}), r"a zip archive with w\.pth in it; unpack it"),
    "zip with a folder": (lambda: zipped({"best/": b"", "best/w.pth": PLAIN}), r"a zip archive with best/w\.pth"),
    "zip of other things": (lambda: zipped({"readme\x1b.txt": b""}), r"other things \(readme\\x1b\.txt"),
    "npz": (lambda: zipped({"a.npy": b"", "b.npy": b""}), "NumPy"),
    "parts at the top": (
        lambda: zipped({name.split("/", 1)[1]: part for name, part in parts_of(PLAIN).items()}), "one folder in the zip"
    ),
    "parts too deep": (lambda: zipped({f"x/{name}": part for name, part in parts_of(PLAIN).items()}), "one folder"),
    "torchscript": (lambda: zipped({**parts_of(PLAIN), "archive/constants.pkl": b""}), "TorchScript"),
    "cut in the middle": (lambda: PLAIN[: len(PLAIN) // 2], "its end is missing"),
    "cut at the end": (lambda: PLAIN[:-30], "damaged, its end is missing"),
    "cut after the first bytes": (lambda: PLAIN[:5], "its end is missing"),
    "one bit in a tensor": (lambda: altered(PLAIN, PLAIN.index(b"archive/data/1") + 3000), "archive/data/1 .* altered"),
    "wrong checksum, compressed": (
        lambda: altered(COMPRESSED, COMPRESSED.index(b"PK\x01\x02") + 16), "damaged"
    ),
    "compressed bytes broken": (
        lambda: altered(COMPRESSED, COMPRESSED.index(b"archive/data/2") + 200), "damaged"
    ),
    "one name twice": (
        lambda: zipped([*parts_of(PLAIN).items(), ("archive/data/0", bytes(14800))]), "two parts of one name"
    ),
    "one name twice in other letters": (
        lambda: zipped([*parts_of(PLAIN).items(), ("ARCHIVE/data/0", bytes(14800))]), "two parts of one name"
    ),
    "encrypted": (lambda: with_flag(zipped(parts_of(PLAIN)), 1), "encrypted"),
    "strongly encrypted": (lambda: with_flag(zipped(parts_of(PLAIN)), 0x41), "encrypted"),
    "bzip2 inside": (lambda: zipped(parts_of(PLAIN), zipfile.ZIP_BZIP2), "PyTorch cannot read"),
    "lzma inside": (lambda: zipped(parts_of(PLAIN), zipfile.ZIP_LZMA), "PyTorch cannot read"),
    "bomb": (bomb, "unpacks to"),
    "a part missing": (
        lambda: zipped({n: p for n, p in parts_of(PLAIN).items() if n != "archive/data/1"}), "not a readable checkpoint"
    ),
    "a part too short": (lambda: zipped({**parts_of(PLAIN), "archive/data/3": b"abc"}), "not a readable checkpoint"),
    "wrong byte order": (lambda: zipped({**parts_of(PLAIN), "archive/byteorder": b"middle"}), "not a readable"),
    "no pickle in it": (lambda: pickled(b""), "not a readable checkpoint"),
    "pickle cut off": (lambda: pickled(parts_of(PLAIN)["archive/data.pkl"][:100]), "not a readable checkpoint"),
    "pickle pops nothing": (lambda: pickled(b"\x80\x02a."), "not a readable checkpoint"),
    "pickle without a mark": (lambda: pickled(b"\x80\x02u."), "not a readable checkpoint"),
    "pickle asks for what it never kept": (lambda: pickled(b"\x80\x02h\x09."), "not a readable checkpoint"),
    "pickle with broken text": (lambda: pickled(b"\x80\x02X\x02\x00\x00\x00\xff\xfe."), "not a readable checkpoint"),
    "pickle of protocol 4": (lambda: saved({"model": STATE}, pickle_protocol=4), "protocol other than 2"),
    "hash of a list": (lambda: pickled(b"\x80\x02}]K\x01s."), "not a readable checkpoint"),
    "name with an escape": (lambda: pickled(b"\x80\x02cevil\x1b[2J\nname\n."), r"evil\\x1b\[2J.*weights alone"),
    "a whole model": (lambda: saved({"model": torch.nn.Linear(2, 2)}), r"torch\.nn\.modules\.linear\.Linear"),
    "a class of its own": (lambda: saved({"model": STATE, "x": Mode("a")}), "tests.test_weights.Mode.*alone"),
    "numpy array beside": (lambda: saved({"model": STATE, "x": np.ones(3)}), "_reconstruct"),
    "blocked module": (lambda: saved({"model": STATE, "x": Calls(os.system, "true")}), "posix.system"),
    "getattr": (lambda: saved({"x": Calls(getattr, "a", "upper")}), "getattr"),
    "list": (lambda: saved([1, 2]), "holds a list"),
    "tensor": (lambda: saved(torch.ones(3)), "holds a Tensor"),
    "nothing": (lambda: saved(None), "holds a NoneType"),
    "number under model": (lambda: saved({"model": 3}), "holds a int under model"),
    "list under model": (lambda: saved({"model": [torch.ones(1)]}), "holds a list under model"),
    "no tensor under model": (lambda: saved({"model": {"state": {"a": torch.ones(1)}}}), "its keys are state"),
    "weights under another key": (
        lambda: saved({"state_dict": STATE, "epoch": 3}), "its keys are state_dict, epoch; try --model_key state_dict"
    ),
    "names that are no text": (lambda: saved({"model": {0: torch.ones(1)}}), "under model; its keys are a int"),
    "one value a billion times": (
        lambda: saved({"model": {"beit3.a": torch.ones(1).expand(10**9)}}), "claim 4,000,000,000 bytes"
    ),
    "old format cut": (lambda: OLD[:-4000], "not a readable checkpoint"),
    "old format cut early": (lambda: OLD[:40], "not a readable checkpoint"),
    "old format with code": (
        lambda: saved({"x": Calls(os.system, "true")}, _use_new_zipfile_serialization=False), "refused.*posix.system"
    ),
    "description a list": (described([1]), "description is a value of type list"),
    "description a number": (described(0), "value of type int, wanted a mapping"),
    "description with a tensor": (described({"a": torch.ones(1)}), "type Tensor"),
    "description with a path": (
        described({"a": pathlib.PurePosixPath("x")}), r"type pathlib.*PurePosixPath"
    ),
    "description by number": (described({1: 2}), "keys that are not text"),
    "description doubled 40 times": (described({"a": nested(40)}), "larger or deeper"),
    "description doubled 25 times": (described({"a": nested(25)}), "larger or deeper"),
    "description in itself": (described(cyclic()), "larger or deeper"),
    "safetensors: description no JSON": (lambda: safetensors_of(STATE, {"description": "{"}), "no JSON"),
    "safetensors: description nested": (lambda: safetensors_of(STATE, {"description": "[" * 100_000}), "no JSON"),
    "safetensors: description a list": (lambda: safetensors_of(STATE, {"description": "[]"}), "type list"),
    "safetensors: 9 bytes": (lambda: SAFE[:9], "damaged"),
    "safetensors: cut": (lambda: SAFE[:-3], "damaged"),
    "safetensors: longer": (lambda: SAFE + b"x", "damaged"),
    "safetensors: header longer than the file": (lambda: header(tensor_entry(), length=10**9), "claims 1,000,000,000"),
    "safetensors: header no JSON": (lambda: header(b"{not json}"), "damaged"),
    "safetensors: header nested": (lambda: header(b'{"a":' + b"[" * 200_000), "damaged"),
    "safetensors: header not UTF-8": (lambda: header(b'{"\xff": 1}'), "damaged"),
    "safetensors: names twice": (
        twice, "twice"
    ),
    "safetensors: unknown dtype": (lambda: header(tensor_entry(dtype="F31"), bytes(8)), "damaged"),
    "safetensors: shape of other size": (lambda: header(tensor_entry(shape=[3]), bytes(8)), "damaged"),
    "safetensors: huge shape": (lambda: header(tensor_entry(shape=[2**40, 2**40]), bytes(8)), "damaged"),
    "safetensors: beyond the end": (lambda: header(tensor_entry(data_offsets=[0, 80]), bytes(8)), "damaged"),
    "safetensors: metadata a list": (lambda: header({"__metadata__": [1], **tensor_entry()}, bytes(8)), "damaged"),
    "safetensors: hash a number": (
        lambda: header({"__metadata__": {"sha256": 5}, **tensor_entry()}, bytes(8)), "damaged"
    ),
    "safetensors: no tensor": (lambda: header({}), "holds no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", MALFORMED)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line_that_says_what_it_is(tmp_path, kind, ending):
    make_content, message = MALFORMED[kind]
    file = tmp_path / f"weights{ending}"
    file.write_bytes(make_content())
    with pytest.raises(InputError, match=message) as caught:
        read_checkpoint(file)
    assert len(caught.value.problems) == 1
    said = str(caught.value)
    assert said.startswith(str(file))
    assert said == printable(said)  # neither a second line nor anything that a terminal would act on
    assert len(said) < 400


def attacks(canary):
    """Pickles that try to have `canary` called through what is allowed."""
    scalar, dtype = (getattr(np._core.multiarray, name) for name in ("scalar", "dtype"))
    number, objects = np.dtype("f8"), np.dtype("O")
    yield "an object array's element", Calls(scalar, objects, canary)
    yield "an element of the wrong size", Calls(scalar, number, b"123")
    yield "a type of an unknown code", Calls(scalar, Calls(dtype, "f8,O"), b"12345678")
    yield "a type that is no type", Calls(scalar, canary, b"12345678")
    yield "an array", np.array([canary], dtype=object)
    yield "a dictionary's factory", Calls(collections.defaultdict, canary)
    yield "the rebuilding of objects", Calls(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b")
    yield "arguments", argparse.Namespace(x=canary)
    yield "an apply", Calls(map, print, [canary])
    yield "an import", Calls(__import__, "os")


@pytest.mark.parametrize("zip_container", [True, False])
def test_what_is_allowed_is_no_way_to_run_anything(tmp_path, zip_container):
    for number, (what, value) in enumerate(attacks(Canary(tmp_path / "ran"))):
        file = tmp_path / f"{number}.pth"
        torch.save({"model": STATE, "x": value}, file, _use_new_zipfile_serialization=zip_container)
        with pytest.raises(InputError, match="refused|not a readable checkpoint"):
            load_untrusted(file)
        assert not (tmp_path / "ran").exists(), what
    assert number == 9


def test_state_given_to_what_is_allowed_has_no_effect_on_later_files(tmp_path):
    """The instruction BUILD sets attributes of what was built, or of a class itself."""
    build = b"\x80\x02cargparse\nNamespace\n}X\x04\x00\x00\x00nameX\x01\x00\x00\x00xsb."
    (tmp_path / "w.pth").write_bytes(pickled(build))
    with pytest.raises(InputError):
        load_untrusted(tmp_path / "w.pth")
    torch.save({"a": argparse.Namespace(name="x", lr=1)}, tmp_path / "v.pth")
    assert load_untrusted(tmp_path / "v.pth")["a"].name == "argparse.Namespace"


# weights that are not numbers


def quantised(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


UNUSABLE = {
    "NaN": (lambda t: t.index_fill(0, torch.tensor([3]), float("nan")), "NaN or infinity"),
    "infinity": (lambda t: t.index_fill(0, torch.tensor([0]), float("inf")), "NaN or infinity"),
    "both infinities": (lambda t: t.index_copy(0, torch.tensor([0, 1]), torch.tensor([1.0, -1]) * float("inf")), "NaN"),
    "fp16 infinity": (lambda t: t.half().index_fill(0, torch.tensor([0]), float("-inf")), "NaN or infinity"),
    "bf16 NaN": (lambda t: t.bfloat16().index_fill(0, torch.tensor([0]), float("nan")), "NaN or infinity"),
    "integer": (lambda t: t.long(), "int64"),
    "byte": (lambda t: t.byte(), "uint8"),
    "boolean": (lambda t: t > 0, "bool"),
    "complex": (lambda t: t.to(torch.complex64), "complex64"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "sparse": (lambda t: t.to_sparse(), "sparse"),
    "quantised": (quantised, "quantised"),
    "without values": (lambda t: t.to("meta"), "without values"),
}


@pytest.mark.parametrize("container", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("kind", UNUSABLE)
def test_weights_that_are_not_numbers_are_refused_naming_the_tensor(tmp_path, kind, container):
    if kind == "float8" and not container:
        pytest.skip("the old format has no such type")
    change, what = UNUSABLE[kind]
    state = dict(tiny().state_dict())
    state["head.3.bias"] = change(state["head.3.bias"])
    model = tiny(seed=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=rf"w\.pth: 1 tensors cannot be weights: head\.3\.bias \({what}") as caught:
        torch.save({"model": state}, tmp_path / "w.pth", _use_new_zipfile_serialization=container)
        load_weights(model, read_checkpoint(tmp_path / "w.pth"), new_head=True)
    assert len(caught.value.problems) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_of_many_broken_tensors_the_first_are_named_and_all_counted():
    state = {name: value * float("nan") for name, value in tiny().state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_weights(tiny(), Checkpoint(state, {}, "x.pth"), new_head=True)
    first = sorted(state)[0]
    assert str(caught.value).startswith(
        f"x.pth: {len(state)} tensors cannot be weights: {first} (NaN or infinity inside)"
    )
    assert str(caught.value).endswith(f"({len(state)} in all)")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_numbers_whose_sum_is_infinite_are_numbers(dtype):
    """The check looks at the sum first."""
    state = {name: value.to(dtype) for name, value in tiny().state_dict().items()}
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    state["head.3.bias"] = torch.full((12,), largest, dtype=dtype)
    model = tiny()
    load_weights(model, Checkpoint(state, {}, "x.pth"), new_head=True)
    assert torch.equal(model.state_dict()["head.3.bias"], state["head.3.bias"].float())


def test_what_the_model_does_not_use_may_be_anything():
    state = dict(tiny().state_dict())
    state["norm.num_batches_tracked"], state["mask"] = torch.tensor(3), torch.tensor([float("nan")])
    report = load_weights(tiny(), Checkpoint(state, {}, "x.pth"), new_head=True)
    assert report.unused == ["mask", "norm.num_batches_tracked"]


@pytest.mark.parametrize("shape", [(), (12, 1), (3, 4), (0,)])
def test_a_shape_of_other_dimensions_is_named(shape):
    state = dict(tiny().state_dict())
    state["head.3.bias"] = torch.zeros(shape)
    with pytest.raises(InputError) as caught:
        load_weights(tiny(), Checkpoint(state, {}, "x.pth"), new_head=True)
    assert caught.value.problems == [f"x.pth: head.3.bias is {tuple(shape)}, the model has (12,)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-1], "has 18 rows, wanted 3 and a square"),
        (lambda t: t[:3], "has 3 rows, wanted 3 and a square"),
        (lambda t: t[:1], "has 1 rows, wanted 3 and a square"),
        (lambda t: t[0], "the model has"),
        (lambda t: t[:, :5], "the model has"),
        (lambda t: t[None], "the model has"),
        (lambda t: t * float("nan"), "cannot be weights"),
        (lambda t: t.int(), "cannot be weights"),
    ],
)
def test_a_position_table_that_cannot_be_resized_is_named(change, message):
    state = dict(tiny().state_dict())
    state[POSITION_TABLE] = change(state[POSITION_TABLE])
    with pytest.raises(InputError, match=message) as caught:
        load_weights(tiny(), Checkpoint(state, {}, "x.pth"), new_head=True)
    assert all(POSITION_TABLE in problem for problem in caught.value.problems)


def test_the_weights_of_another_model_are_told_in_one_sentence():
    state = {"conv1.weight": torch.ones(2), "fc.bias": torch.ones(1)}
    with pytest.raises(InputError, match=r"^x\.pth: the weights of another model.*conv1\.weight, fc\.bias$"):
        load_weights(tiny(), Checkpoint(state, {}, "x.pth"), new_head=True)
    bare = {name.removeprefix("beit3."): value for name, value in tiny().state_dict().items() if "beit3" in name}
    with pytest.raises(InputError, match=r"add --model_prefix beit3\.$"):
        load_weights(tiny(), Checkpoint(bare, {}, "x.pth"), new_head=True)


def test_a_model_key_that_is_not_there_is_refused_listing_what_is(tmp_path):
    torch.save({"model": STATE, "model_ema": STATE, "epoch": 1}, tmp_path / "w.pth")
    assert read_checkpoint(tmp_path / "w.pth", "model_ema").state_dict.keys() == STATE.keys()
    with pytest.raises(InputError, match="under ema nor at the top; its keys are model, model_ema, epoch; try"):
        read_checkpoint(tmp_path / "w.pth", "ema")
    torch.save(STATE, tmp_path / "bare.pth")
    with pytest.raises(InputError, match="has no ema, which --model_key asks for; its keys are beit3.layer0.weight, "):
        read_checkpoint(tmp_path / "bare.pth", "ema")


# folders


def put(folder, *names, mark=1.0):
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        state = {"beit3.x": torch.tensor([mark])}
        file.write_bytes(safetensors_of(state) if file.suffix == ".safetensors" else saved({"module": state}))


FOLDERS = {  # what lies in a folder, and which of it is read
    "checkpoint": (["model.safetensors", "manifest.json"], "model.safetensors", False),
    "hugging face": (["pytorch_model.bin", "config.json"], "pytorch_model.bin", False),
    "hugging face, both": (["pytorch_model.bin", "model.safetensors"], "model.safetensors", False),
    "deepspeed": (["mp_rank_00_model_states.pt"], "mp_rank_00_model_states.pt", False),
    "output": (
        ["checkpoint-0.pth", "checkpoint-1.pth", "checkpoint-best.pth", "checkpoint-best/model.safetensors", "log.txt"],
        "checkpoint-best/model.safetensors",
        True,
    ),
    "output of the original": (["checkpoint-0.pth", "checkpoint-best.pth"], "checkpoint-best.pth", True),
    "output of the original with deepspeed": (
        ["checkpoint-0/mp_rank_00_model_states.pt", "checkpoint-best/mp_rank_00_model_states.pt"],
        "checkpoint-best/mp_rank_00_model_states.pt",
        True,
    ),
    "one of deepspeed": (["global_step5/mp_rank_00_model_states.pt"], "global_step5/mp_rank_00_model_states.pt", True),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_of_a_folder_the_weights_are_taken_and_a_choice_is_told(tmp_path, caplog, kind):
    names, wanted, told = FOLDERS[kind]
    put(tmp_path, *names, mark=0.0)
    put(tmp_path, wanted, mark=7.0)
    with caplog.at_level("INFO"):
        read = read_checkpoint(tmp_path)
    assert read.state_dict["beit3.x"].item() == 7
    assert read.path == tmp_path / wanted
    assert (wanted in caplog.text) == told


def test_the_newest_of_deepspeed_is_the_one_that_latest_names(tmp_path, caplog):
    put(tmp_path, *(f"global_step{step}/mp_rank_00_model_states.pt" for step in (5, 10)))
    (tmp_path / "latest").write_text("global_step10\n")
    assert find_weights(tmp_path) == tmp_path / "global_step10" / "mp_rank_00_model_states.pt"
    for other in ("global_step7", "../elsewhere", "global_step5/../global_step10", "x\0y", "x" * 5000, ""):
        (tmp_path / "latest").write_text(other)
        with pytest.raises(InputError, match="it holds global_step10, global_step5, latest"):
            find_weights(tmp_path)
    (tmp_path / "latest").unlink()
    with pytest.raises(InputError, match="it holds global_step10, global_step5"):
        find_weights(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "a folder without.*it is empty"),
        (["a.txt", "b\x1b[2J.pth"], r"a folder without model\.safetensors.*it holds a\.txt, b\\x1b\[2J\.pth"),
        (["checkpoint-0.pth", "checkpoint-1.pth"], r"name one of what is there: it holds checkpoint-0\.pth, check"),
        (["checkpoint-0/model.safetensors", "checkpoint-1/model.safetensors"], "it holds checkpoint-0, checkpoint-1"),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors"], "split into several files"),
        (["zero_pp_rank_0_mp_rank_00_model_states.pt"], "split among processes"),
        (["data.pkl", "data/0", "version"], "a .pth that was unpacked"),
        ([f"{number}.txt" for number in range(2000)], r"\(2000 in all\)"),
    ],
)
def test_a_folder_that_gives_no_weights_is_refused_saying_what_is_there(tmp_path, names, message):
    put(tmp_path, *names)
    with pytest.raises(InputError, match=message) as caught:
        find_weights(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert str(caught.value) == printable(str(caught.value))
    assert len(str(caught.value)) < 400


@pytest.mark.timeout(120)  # opening a pipe that nobody writes to would wait for ever
@pytest.mark.parametrize("name", ["nothing.pth", "x" * 300, "a\0b", "pipe", "loop", "file.pth/inside"])
def test_a_path_that_is_no_file_is_refused_by_name(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file.pth").write_bytes(PLAIN)
    with pytest.raises(InputError) as caught:
        read_checkpoint(tmp_path / name)
    assert str(caught.value).startswith(printable(str(tmp_path / name)))
    assert str(caught.value) == printable(str(caught.value))
