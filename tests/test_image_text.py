"""What data sets of pictures and texts share: the numbers that are drawn for the pictures of a row."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from beit3.data.augmentation import TrainTransform
from beit3.data.image_text import CAPTION_MASK, FURTHER_PICTURE, SUBSTITUTE, ImageTextDataset
from beit3.data.index_table import PathField, read_index
from beit3.system.errors import BadImageError
from tests.reference import MINI_COCO

PICTURE = "train2014/COCO_train2014_000000000001.jpg"
OTHER = "train2014/COCO_train2014_000000000002.jpg"


class Pairs(ImageTextDataset):
    """Two pictures in a row, as tasks that compare pictures have them."""

    picture_columns = ("left", "right")

    def example(self, row):
        return {"left": self.load_image(row, 0), "right": self.load_image(row, 1), "row": row}


@pytest.fixture
def coco(tmp_path):
    """A folder with two pictures."""
    for path in (PICTURE, OTHER):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(MINI_COCO / path, tmp_path / path)
    return tmp_path


def read_pairs(coco, pairs, transform):
    (coco / "pairs.jsonl").write_text("".join(json.dumps({"left": a, "right": b}) + "\n" for a, b in pairs))
    fields = [PathField("left", coco), PathField("right", coco)]
    dataset = Pairs(coco, read_index([coco / "pairs.jsonl"], fields, how_to_make=""), transform, seed=7)
    dataset.set_epoch(5)
    return dataset


def test_each_picture_of_a_row_is_asked_for_with_a_key_of_its_own(coco):
    asked = []

    def note(path, key):
        asked.append((path, key))
        return torch.zeros(3, 1, 1, dtype=torch.uint8)

    dataset = read_pairs(coco, [(PICTURE, PICTURE), (PICTURE, OTHER)], note)
    dataset[1], dataset[0]
    first, second = f"{coco}/{PICTURE}", f"{coco}/{OTHER}"
    # The first picture's key is the one of data sets with a single picture.
    assert asked == [
        (first, (7, 5, 1)), (second, (7, 5, 1, 3, 1)), (first, (7, 5, 0)), (first, (7, 5, 0, 3, 1)),
    ]  # fmt: skip
    assert dataset.image_paths() == [PICTURE, OTHER]


def test_the_pictures_of_a_row_are_augmented_independently(coco):
    transform = TrainTransform(32, "random", randaug=True)
    dataset = read_pairs(coco, [(PICTURE, PICTURE)] * 20, transform)
    items = [dataset[row] for row in range(20)]
    for row, item in enumerate(items):
        assert torch.equal(item["left"], transform(coco / PICTURE, (7, 5, row)))
    # One and the same file, forty times: no two of the draws agree, in a row or between rows.
    assert len({item[name].numpy().tobytes() for item in items for name in ("left", "right")}) == 40


def test_keys_of_every_use_draw_different_numbers():
    # A generator takes zeros at the end of its seed for nothing; so no use of a key may be 0.
    keys = [(7, 5, 1), (7, 5, 1, CAPTION_MASK), (7, 5, 1, SUBSTITUTE)]
    keys += [(7, 5, 1, FURTHER_PICTURE, number) for number in (1, 2)]
    assert len({float(np.random.default_rng(key).random()) for key in keys}) == 5


def test_a_bad_second_picture_is_named_with_row_and_line(coco):
    def fail_on_other(path, key):
        if path.endswith(OTHER):
            raise OSError("broken data stream")
        return torch.zeros(3, 1, 1, dtype=torch.uint8)

    dataset = read_pairs(coco, [(PICTURE, PICTURE), (PICTURE, OTHER)], fail_on_other)
    wanted = f"{coco}/{OTHER}: broken data stream (row 1, {coco}/pairs.jsonl:2)"
    with pytest.raises(BadImageError, match=re.escape(wanted)):
        dataset[1]
    dataset.skip_bad_images = True
    item = dataset[1]
    # The rows that stand in are drawn with a key of their own; the first of them that is sound is taken.
    drawn = np.random.default_rng([7, 5, 1, 2]).integers(2, size=10).tolist()
    assert (item["row"], item["bad_images"]) == (0, 1 + drawn.index(0))
