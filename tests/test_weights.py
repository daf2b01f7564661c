"""Weights in and out: every key accounted for, nothing executed."""

import argparse
import json
import pickle

import pytest
import torch
from safetensors import safe_open

from beit3.model.weights import (
    POSITION_TABLE,
    Checkpoint,
    find_weights,
    load_weights,
    read_checkpoint,
    resize_positions,
    write_weights,
)
from beit3.system.errors import InputError
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
        model = reference.timm.create_model("beit3_base_patch16_224_imageclassification", vocab_size=10)
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
