"""Reading the index of captioning: items, masking, groups of captions, batches."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from beit3.model.encoder import EncoderConfig
from beit3.system.errors import InputError
from datasets import CaptioningDataset, EpochSampler, build_loader, mask_caption
from modeling_finetune import BEiT3ForCaptioning
from tasks.captioning.losses import masked_token_losses
from tests import reference

PICTURE = "train2014/COCO_train2014_{:012d}.jpg"
MASK, VOCABULARY = 87, 88


def describe_key(path, key):
    """A transform whose picture tells the key it was asked with."""
    seed, epoch, row = key
    return torch.tensor([seed, epoch, row % 256], dtype=torch.uint8).reshape(3, 1, 1)


@pytest.fixture
def coco(tmp_path):
    root = tmp_path / "coco"
    for folder in ("train2014", "val2014"):
        shutil.copytree(reference.MINI_COCO / folder, root / folder)
    shutil.copytree(reference.MINI_COCO / "expected", root, dirs_exist_ok=True)
    return root


def write_index(coco, entries, name="coco_captioning.train.jsonl"):
    (coco / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def line(picture, *ids):
    return {"image_path": PICTURE.format(picture), "text_segment": list(ids), "image_id": picture}


def read(coco, split="train", **options):
    return CaptioningDataset(coco, split, describe_key, **{"vocab_size": VOCABULARY, "seed": 7, **options})


@pytest.mark.parametrize(("split", "rows"), [("train", 300), ("val", 15), ("test", 15)])
def test_each_split_holds_the_lines_of_its_file(coco, split, rows):
    dataset = read(coco, split)
    lines = [json.loads(text) for text in (coco / f"coco_captioning.{split}.jsonl").read_text().splitlines()]
    assert len(dataset) == len(lines) == rows
    for row, entry in enumerate(lines):
        assert dataset.table["image_path"][row] == entry["image_path"]
        assert dataset.table["text_segment"][row].tolist() == (entry["text_segment"] or [])
        assert dataset[row]["image_id"] == entry["image_id"]


def test_an_item_of_training_written_out(coco):
    write_index(coco, [line(1, 4, 5), line(1, 11, 12)])
    dataset = read(coco, mask_prob=0.5)
    dataset.set_epoch(5)
    item = dataset[1]
    assert item.keys() == {"image", "token_ids", "masked_ids", "language_masked_pos", "image_id", "row"}
    assert item["image"].tolist() == [[[7]], [[5]], [[1]]]
    assert (item["image_id"], item["row"]) == (1, 1)
    [ids], [hidden], [positions] = item["token_ids"], item["masked_ids"], item["language_masked_pos"]
    assert ids.tolist() == [0, 11, 12, 2]
    assert positions.sum() == 2 and not positions[0]
    assert torch.equal(hidden[~positions], ids[~positions])


def test_an_item_of_validation_is_a_picture_alone(coco):
    write_index(coco, [{**line(3), "text_segment": None}], "coco_captioning.val.jsonl")
    item = read(coco, "val")[0]
    assert item.keys() == {"image", "image_id", "row"}
    batch = read(coco, "val").collate([item, item])
    assert {key: value.shape for key, value in batch.items()} == {"image": (2, 3, 1, 1), "image_id": (2,), "row": (2,)}


def test_nocaps_has_files_of_its_own(coco):
    write_index(coco, [{**line(3), "text_segment": None, "image_id": 12}], "nocaps.test.jsonl")
    assert read(coco, "test", source="nocaps")[0]["image_id"] == 12
    with pytest.raises(InputError, match="nocaps has no split 'train'; there are val, test"):
        read(coco, "train", source="nocaps")


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({**line(1), "text_segment": None}, "text_segment: the text is empty"),
        (line(1), "text_segment: the text is empty"),
        (line(1, 88), "text_segment: 88 is not one of the token ids 0 … 87"),
        ({**line(1, 5), "image_id": "1"}, "image_id: an integer expected"),
        ({**line(1, 5), "image_path": "../x.jpg"}, "image_path: '../x.jpg' must be relative"),
    ],
)
def test_bad_lines_are_named(coco, entry, expected):
    write_index(coco, [line(1, 5), entry])
    with pytest.raises(InputError) as error:
        read(coco)
    assert error.value.problems[0].startswith(f"{coco}/coco_captioning.train.jsonl:2: {expected}")


def test_a_missing_index_says_how_to_make_it(coco):
    (coco / "coco_captioning.val.jsonl").unlink()
    with pytest.raises(InputError, match="CaptioningDataset.make_coco_captioning_dataset_index"):
        read(coco, "val")


@pytest.mark.parametrize(
    ("tokens", "mask_prob", "count"),
    # round(n * p) with halves up, at least 1, at most n - 1; n counts <s> and </s>
    [(3, 0.6, 2), (3, 0.1, 1), (3, 1.0, 2), (10, 0.7, 7), (10, 0.25, 3), (10, 0.24, 2), (12, 0.6, 7), (5, 1.0, 4)],
)
def test_as_many_tokens_are_hidden_as_the_specification_says(tokens, mask_prob, count):
    ids = torch.tensor([0, *range(10, 8 + tokens), 2])
    for seed in range(20):
        hidden, positions = mask_caption(ids, mask_prob, MASK, VOCABULARY, np.random.default_rng(seed))
        assert positions.sum() == count
        assert not positions[0]
        assert torch.equal(hidden[~positions], ids[~positions])


def test_tokens_become_the_mask_themselves_or_another_in_the_given_shares():
    ids = torch.tensor([0, *[1000] * 998, 2])
    became, places = Counter(), Counter()
    for seed in range(40):
        hidden, positions = mask_caption(ids, 0.5, 64001, 64002, np.random.default_rng(seed))
        places.update(positions.nonzero().flatten().tolist())
        for before, after in zip(ids[positions].tolist(), hidden[positions].tolist(), strict=True):
            became["mask" if after == 64001 else "itself" if after == before else "another"] += 1
            assert 3 <= after < 64002 or after == before
    assert became.total() == 40 * 500
    assert became["mask"] / became.total() == pytest.approx(0.8, abs=0.01)
    assert became["itself"] / became.total() == pytest.approx(0.1, abs=0.01)
    assert places[999] > 0, "</s> may be hidden"
    assert max(places.values()) < 36, "positions are drawn evenly"


def test_random_ids_reach_from_unk_to_the_end_of_the_vocabulary():
    ids, seen = torch.tensor([0, *[4] * 500, 2]), set()
    for seed in range(40):
        hidden, _ = mask_caption(ids, 1.0, 9, 10, np.random.default_rng(seed))
        seen |= set(hidden.tolist()[1:])
    assert seen == {2, *range(3, 10)}  # 2: </s> that stays itself


def test_what_is_hidden_depends_on_seed_epoch_and_line_alone(coco):
    def hidden(dataset, row=5):
        return dataset[row]["masked_ids"][0].tolist() + dataset[row]["language_masked_pos"][0].tolist()

    first, again = read(coco), read(coco)
    again[3], again[5]
    assert hidden(first) == hidden(again)
    assert hidden(read(coco, seed=8)) != hidden(first)
    again.set_epoch(1)
    assert hidden(again) != hidden(first)
    write_index(coco, [line(1, *range(10, 40))] * 2)
    assert hidden(read(coco), 0) != hidden(read(coco), 1)


def test_what_is_hidden_is_drawn_by_a_key_of_its_own(coco):
    """A run that was begun with this key goes on with it."""
    write_index(coco, [line(2, *range(10, 40)), line(1, *range(10, 40)), line(2, *range(10, 40))])
    for captions, row in ((1, [0, 1, 2]), (2, [0, 1, 0])):  # pictures of two captions: the lines are 0 and 2, and 1
        dataset = read(coco, captions_per_image=captions)
        dataset.set_epoch(4)
        for line_number, place in zip([0, 1, 2], row, strict=True):
            item, number = dataset[place], int(captions == 2 and line_number == 2)
            rng = np.random.default_rng([7, 4, line_number, 1])
            hidden, positions = mask_caption(item["token_ids"][number], 0.6, MASK, VOCABULARY, rng)
            assert torch.equal(item["masked_ids"][number], hidden)
            assert torch.equal(item["language_masked_pos"][number], positions)


def test_the_mask_is_the_last_id_unless_said_otherwise(coco):
    write_index(coco, [line(1, *[10] * 40)])
    assert (read(coco)[0]["masked_ids"][0] == 87).any()
    assert (read(coco, mask_id=50)[0]["masked_ids"][0] == 50).any()


def test_a_long_caption_is_cut_before_it_is_masked(coco):
    write_index(coco, [line(1, *range(10, 40))])
    item = read(coco, num_max_bpe_tokens=6, mask_prob=1.0)[0]
    assert item["token_ids"][0].tolist() == [0, 10, 11, 12, 13, 2]
    assert item["language_masked_pos"][0].tolist() == [False] + [True] * 5


def test_rows_of_several_captions_hold_each_caption_once(coco):
    write_index(coco, [line(2, 5), line(1, 6), line(2, 7), line(1, 8), line(2, 9), line(3, 10)])
    dataset = read(coco, captions_per_image=2)
    items = [dataset[row] for row in range(len(dataset))]
    captions = [[ids.tolist()[1:-1] for ids in item["token_ids"]] for item in items]
    assert captions == [[[5], [7]], [[9]], [[6], [8]], [[10]]]
    assert [item["image_id"] for item in items] == [2, 2, 1, 3]
    assert [item["row"] for item in items] == [0, 1, 2, 3]
    with pytest.raises(IndexError, match="row 4 of a data set with 4 rows"):
        dataset[4]


def test_captions_of_mini_coco_in_fives(coco):
    dataset = read(coco, captions_per_image=5)
    assert len(dataset) == 60
    assert {len(dataset[row]["token_ids"]) for row in range(60)} == {5}
    assert read(coco, "val", captions_per_image=5)[14]["row"] == 14


def test_a_caption_is_masked_alike_alone_and_among_others(coco):
    def masked(dataset):
        items = [dataset[row] for row in range(len(dataset))]
        return sorted((item["image_id"], hidden.tolist()) for item in items for hidden in item["masked_ids"])

    assert masked(read(coco)) == masked(read(coco, captions_per_image=3))


def test_a_batch_of_pairs_written_out(coco):
    write_index(coco, [line(1, *range(10, 18)), line(2, 30)])
    dataset = read(coco, mask_prob=0.5)
    items = [dataset[0], dataset[1]]
    batch = dataset.collate(items)
    assert batch["token_ids"].tolist() == [[0, *range(10, 18), 2, *[1] * 6], [0, 30, 2, *[1] * 13]]
    assert batch["padding_mask"].sum(1).tolist() == [6, 13]
    assert batch.keys() == {
        "image", "image_id", "row", "token_ids", "padding_mask", "masked_ids", "masked_index", "targets",
    }  # fmt: skip
    places = [item["language_masked_pos"][0].nonzero().flatten() for item in items]
    assert [len(each) for each in places] == [5, 2]
    assert batch["masked_index"].tolist() == [*places[0].tolist(), *(16 + places[1]).tolist()]
    hidden = [item["token_ids"][0][each].tolist() for item, each in zip(items, places, strict=True)]
    assert batch["targets"].tolist() == hidden[0] + hidden[1]
    for row, item in enumerate(items):
        length = len(item["masked_ids"][0])
        assert torch.equal(batch["masked_ids"][row, :length], item["masked_ids"][0])
    assert (batch["masked_ids"][batch["padding_mask"]] == 1).all()
    assert batch["image_id"].tolist() == [1, 2]


def test_captions_that_are_not_there_are_rows_of_padding(coco):
    write_index(coco, [line(2, 5), line(1, 6), line(2, 7), line(2, 8)])
    dataset = read(coco, captions_per_image=3)
    batch = dataset.collate([dataset[0], dataset[1]])
    assert batch["image"].shape[0] == 2
    assert batch["token_ids"][:, 1].tolist() == [5, 7, 8, 6, 1, 1]
    assert batch["padding_mask"].all(1).tolist() == [False] * 4 + [True] * 2
    # Two of the three tokens of each caption are hidden, none of the rows of padding, which begin at 4 x 8.
    assert len(batch["masked_index"]) == 8 and batch["masked_index"].max() < 32
    assert (batch["targets"] != 1).all()


def test_workers_and_epochs_change_nothing_but_what_they_should(coco, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(8))  # no more workers than cores are started
    batches = {}
    for workers in (0, 2, 4):
        dataset = read(coco, captions_per_image=2)
        sampler = EpochSampler(len(dataset), 8, 1, 0, 1, seed=3)
        loader = build_loader(dataset, sampler, workers, pin_memory=False)
        for epoch in (0, 1):
            dataset.set_epoch(epoch)
            sampler.set_epoch(epoch)
            batches[workers, epoch] = [batch["masked_ids"].tolist() for batch in loader]
    assert batches[0, 0] == batches[2, 0] == batches[4, 0]
    assert batches[0, 1] == batches[2, 1] == batches[4, 1] != batches[0, 0]


def small_model(**options):
    config = EncoderConfig(width=64, layers=3, heads=4, image_size=32, vocab_size=VOCABULARY, **options)
    model = BEiT3ForCaptioning(config)
    reference.fill(model)
    return model


def test_several_captions_of_a_picture_give_the_loss_and_gradients_of_separate_pairs(coco):
    write_index(coco, [line(1, *range(10, 16)), line(1, 20), line(2, 30, 31), line(1, 40, 41, 42)])
    pictures = reference.images(1, 2, 32)
    results = []
    for captions in (1, 3):
        dataset = read(coco, captions_per_image=captions, mask_prob=0.5)
        batch = dataset.collate([dataset[row] for row in range(len(dataset))])
        model = small_model()
        logits = model(
            image=pictures[batch["image_id"] - 1],
            text_ids=batch["masked_ids"],
            padding_mask=batch["padding_mask"],
            masked_index=batch["masked_index"],
        )
        loss = masked_token_losses(logits, batch["targets"], 0.1).mean()
        loss.backward()
        results.append((len(batch["image"]), loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (pairs, loss_of_pairs, gradients_of_pairs), (groups, loss, gradients) = results
    assert (pairs, groups) == (4, 2)
    torch.testing.assert_close(loss, loss_of_pairs, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients_of_pairs.items():
        if gradient is None:
            assert gradients[name] is None, name
        else:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_positions_may_be_given_as_a_mask_or_as_numbers():
    model = small_model().eval()
    ids, padding = reference.tokens(2, [7, 4, 5, 6], vocab_size=VOCABULARY, width=7)
    masked = (torch.rand(4, 7, generator=torch.Generator().manual_seed(0)) < 0.5) & (padding == 0)
    common = {"image": reference.images(1, 2, 32), "text_ids": ids, "padding_mask": padding}
    with torch.no_grad():
        by_mask = model(**common, language_masked_pos=masked.long())
        by_number = model(**common, masked_index=masked.flatten().nonzero().flatten())
    torch.testing.assert_close(by_mask, by_number)
    with pytest.raises(ValueError, match="language_masked_pos or masked_index"):
        model(**common)


def test_captions_that_do_not_share_out_evenly_are_refused():
    model = small_model().eval()
    ids, padding = reference.tokens(2, [7, 4, 5], vocab_size=VOCABULARY, width=7)
    with pytest.raises(ValueError, match="3 texts cannot be shared evenly among 2 pictures"):
        model(image=reference.images(1, 2, 32), text_ids=ids, padding_mask=padding, language_masked_pos=padding == 0)


def test_recomputing_layers_gives_the_same_gradients_for_several_captions():
    gradients = []
    ids, padding = reference.tokens(2, [7, 4, 5, 6], vocab_size=VOCABULARY, width=7)
    for recompute in (False, True):
        model = small_model(recompute_activations=recompute, drop_path_rate=0.5).train()
        torch.manual_seed(3)
        images = reference.images(1, 2, 32)
        model(image=images, text_ids=ids, padding_mask=padding, language_masked_pos=1 - padding).sin().sum().backward()
        gradients.append(model.beit3.encoder.layers[0].ffn.A.fc1.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_row_costs_some_tens_of_bytes(coco):
    write_index(coco, [line(number // 5, *range(10, 22)) for number in range(5000)])
    dataset = read(coco, captions_per_image=5)
    assert dataset.nbytes <= 60 * 5000
    loader = DataLoader(dataset, batch_sampler=[[0, 1]], collate_fn=dataset.collate)
    assert next(iter(loader))["masked_ids"].shape == (10, 16)
