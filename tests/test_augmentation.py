"""Transforms: Pillow's pixels, RandAugment's operations against slow versions written out, chance by key alone."""

from __future__ import annotations

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from beit3.data import augmentation
from beit3.data.augmentation import OPERATIONS, EvalTransform, TrainTransform, crop_box, rand_augment, resize
from beit3.data.images import ImageError
from beit3.system.errors import InputError

GREY = 128


def _scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft blobs with some noise, like a photograph in its statistics."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return Image.fromarray((smooth + rng.normal(0, 5, smooth.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "scene.png"  # lossless: any difference is the transform's
    _scene(320, 240).save(path)
    return str(path)


def _planes(size: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, size, size), dtype=np.uint8)


def _image(planes: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))


def _difference(one, other) -> np.ndarray:
    return np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int))


# Resizing and cropping


@pytest.mark.parametrize(
    "width, height, size, differing",
    [
        (320, 240, 224, 0.01),
        (320, 240, 480, 0.01),
        (64, 64, 64, 0),
        (100, 333, 64, 0.25),  # shrinking five times shows that PyTorch's weights have 16 bits, Pillow's 32
    ],
)
def test_evaluation_resizes_as_pillow_does_within_one_grey_level(tmp_path, width, height, size, differing):
    _scene(width, height).save(tmp_path / "a.png")
    result = EvalTransform(size)(str(tmp_path / "a.png"), (0, 0, 0))
    assert result.dtype == torch.uint8 and result.shape == (3, size, size) and result.is_contiguous()
    expected = np.asarray(_scene(width, height).resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    difference = _difference(result, expected)
    assert difference.max() <= 1 and (difference > 0).mean() <= differing


def test_evaluation_does_not_depend_on_the_key(picture):
    assert torch.equal(EvalTransform(48)(picture, (0, 0, 0)), EvalTransform(48)(picture, (5, 6, 7)))


@pytest.mark.parametrize(
    "interpolation, filter",
    [
        ("bicubic", Image.Resampling.BICUBIC),
        ("bilinear", Image.Resampling.BILINEAR),
    ],
)
def test_training_resizes_the_drawn_box_as_pillow_does_and_flips_half_of_them(
    picture, monkeypatch, interpolation, filter
):
    monkeypatch.setattr(augmentation, "crop_box", lambda rng, height, width, scale: (30, 20, 180, 210))
    part = Image.open(picture).crop((20, 30, 230, 210)).resize((96, 96), filter)
    expected = np.asarray(part).transpose(2, 0, 1)
    flipped = 0
    for row in range(400):
        result = TrainTransform(96, interpolation)(picture, (0, 0, row))
        assert result.dtype == torch.uint8 and result.shape == (3, 96, 96) and result.is_contiguous()
        if _difference(result, expected).max() > 1:
            assert _difference(result, expected[:, :, ::-1]).max() <= 1
            flipped += 1
    assert 160 < flipped < 240  # 200, standard deviation 10


def test_random_interpolation_uses_both_kinds(picture, monkeypatch):
    used = Counter()

    def spy(image, size, interpolation):
        used[interpolation] += 1
        return resize(image, size, interpolation)

    monkeypatch.setattr(augmentation, "resize", spy)
    for row in range(100):
        TrainTransform(32, "random")(picture, (0, 0, row))
    assert set(used) == {"bicubic", "bilinear"} and min(used.values()) > 30


def test_an_unknown_interpolation_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="'lanczos4' is unknown; choose one of bicubic, bilinear, random"):
        TrainTransform(224, "lanczos4")


def test_another_crop_scale_keeps_another_share_of_the_area():
    rng = np.random.default_rng(0)
    shares = [h * w / 10_000 for _, _, h, w in (crop_box(rng, 100, 100, (0.2, 0.3)) for _ in range(200))]
    assert 0.19 < min(shares) < max(shares) < 0.31


def test_crop_boxes_lie_inside_and_keep_scale_and_ratio():
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(rng, 480, 640) for _ in range(5000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 480).all() and (left + width <= 640).all()
    share, ratio = height * width / (480 * 640), width / height
    assert share.min() > 0.498 and share.max() <= 1  # sides are rounded to pixels
    assert ratio.min() > 0.747 and ratio.max() < 1.337
    assert share.min() < 0.51 and share.max() > 0.97 and ratio.min() < 0.77 and ratio.max() > 1.31
    free = height < 460
    assert abs((top / (480 - height).clip(1))[free].mean() - 0.5) < 0.02  # any place is as likely as any other


def test_crop_areas_are_uniform_and_ratios_uniform_in_their_logarithm():
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(rng, 1000, 1000) for _ in range(20000)])
    share, ratio = boxes[:, 2] * boxes[:, 3] / 1e6, boxes[:, 3] / boxes[:, 2]
    # Up to 3/4 of a square every ratio fits, so nothing is drawn anew.
    assert abs(share[share < 0.75].mean() - 0.625) < 0.003
    low = np.log(ratio[share < 0.75]) / math.log(4 / 3)  # uniform in (-1, 1): variance 1/3
    assert abs(low.mean()) < 0.02 and abs(low.var() - 1 / 3) < 0.02
    assert abs((ratio > 1).mean() - 0.5) < 0.015  # were ratios uniform themselves, 0.57


@pytest.mark.parametrize(
    "height, width, box",
    [
        (1000, 10, (493, 0, 13, 10)),
        (10, 1000, (0, 493, 10, 13)),
        (1, 1, (0, 0, 1, 1)),
        (2, 1, (0, 0, 1, 1)),
    ],
)
def test_a_very_long_picture_is_cropped_in_its_middle(height, width, box):
    rng = np.random.default_rng(0)
    assert crop_box(rng, height, width) == box


# Chance by key


def test_the_same_key_gives_the_same_picture_in_any_order_and_any_thread(picture):
    transform = TrainTransform(48, randaug=True)
    keys = [(seed, epoch, row) for seed in (0, 1) for epoch in (0, 1) for row in range(10)]
    forwards = [transform(picture, key) for key in keys]
    with ThreadPoolExecutor(4) as pool:
        backwards = list(pool.map(lambda key: transform(picture, key), keys[::-1]))[::-1]
    assert all(torch.equal(one, other) for one, other in zip(forwards, backwards, strict=True))


def test_seed_epoch_and_row_each_change_the_picture(picture):
    transform = TrainTransform(48)
    results = {transform(picture, key).numpy().tobytes() for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(results) == 4


def test_without_mirror_a_picture_is_the_same_but_for_its_flip(picture):
    usual, never = TrainTransform(48), TrainTransform(48, mirror=False)
    pairs = [(usual(picture, (0, 0, row)), never(picture, (0, 0, row))) for row in range(12)]
    different = [pair for pair in pairs if not torch.equal(*pair)]
    assert 0 < len(different) < 12
    assert all(torch.equal(one.flip(-1), other) for one, other in different)


def test_global_random_states_are_neither_used_nor_changed(picture):
    transform = TrainTransform(48, randaug=True)
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].tobytes(), torch.get_rng_state()
    first = transform(picture, (0, 0, 3))
    assert np.random.get_state()[1].tobytes() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    np.random.seed(99)
    torch.manual_seed(99)
    assert torch.equal(transform(picture, (0, 0, 3)), first)


def test_errors_of_the_file_come_through():
    with pytest.raises(ImageError, match=r"missing\.jpg: No such file"):
        TrainTransform(48)("missing.jpg", (0, 0, 0))


# RandAugment


def test_there_are_the_ten_operations():
    assert list(OPERATIONS) == [
        "Identity",
        "AutoContrast",
        "Equalize",
        "Brightness",
        "Sharpness",
        "ShearX",
        "ShearY",
        "TranslateX",
        "TranslateY",
        "Rotate",
    ]


def test_operations_are_drawn_alike_applied_half_the_time_and_with_either_sign(monkeypatch):
    applied: Counter[tuple[str, int]] = Counter()
    per_picture: Counter[int] = Counter()
    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda planes, sign, name=name: applied.update([(name, sign)]) or planes)
    for row in range(8000):
        before = applied.total()
        rand_augment(_planes(4), np.random.default_rng((0, 0, row)))
        per_picture[applied.total() - before] += 1
    assert len(applied) == 20
    for count in applied.values():  # 8000 pictures x 2 x 1/2 / (10 operations x 2 signs) = 400, standard deviation 20
        assert 320 < count < 480
    assert abs(per_picture[0] - 2000) < 150 and abs(per_picture[1] - 4000) < 180 and abs(per_picture[2] - 2000) < 150


def test_two_operations_work_one_after_the_other(monkeypatch):
    for name in OPERATIONS:  # the number in the pixels counts the operations applied
        monkeypatch.setitem(OPERATIONS, name, lambda planes, sign: planes + np.uint8(1))
    black = np.zeros((3, 4, 4), dtype=np.uint8)
    counts = {int(rand_augment(black, np.random.default_rng(row)).max()) for row in range(100)}
    assert counts == {0, 1, 2}


def test_the_same_operation_can_come_twice_in_a_row(monkeypatch):
    trails = set()
    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda planes, sign, name=name: trail.append(name) or planes)
    for row in range(4000):
        trail: list[str] = []
        rand_augment(_planes(4), np.random.default_rng(row))
        trails.add(tuple(trail))
    assert ("Rotate", "Rotate") in trails and ("Rotate", "ShearX") in trails


def test_randaug_comes_after_crop_and_flip_which_stay_the_same(picture, monkeypatch):
    seen = []
    monkeypatch.setattr(augmentation, "rand_augment", lambda planes, rng: seen.append(planes.copy()) or planes)
    for row in range(6):
        plain = TrainTransform(48)(picture, (0, 0, row))
        assert len(seen) == row
        TrainTransform(48, randaug=True)(picture, (0, 0, row))
        assert np.array_equal(seen[row], plain.numpy())


def test_operations_leave_their_input_alone_and_return_contiguous_bytes():
    planes = _planes()
    kept = planes.copy()
    for operation in OPERATIONS.values():
        for sign in (-1, 1):
            result = operation(planes, sign)
            assert result.dtype == np.uint8 and result.shape == planes.shape and result.flags.c_contiguous
            assert np.array_equal(planes, kept)


def _apply(name: str, rows: list[list[int]], sign: int = 1) -> list[list[int]]:
    """An operation on a picture whose three channels are alike."""
    result = OPERATIONS[name](np.array([rows] * 3, dtype=np.uint8), sign)
    assert (result == result[0]).all()
    return result[0].tolist()


def test_identity_changes_nothing():
    assert _apply("Identity", [[1, 2], [3, 4]]) == [[1, 2], [3, 4]]


def test_autocontrast_stretches_to_the_full_range():
    # (v - 10) x 255 / 100, cut off
    assert _apply("AutoContrast", [[10, 60], [110, 20]]) == [[0, 127], [255, 25]]
    assert _apply("AutoContrast", [[7, 7], [7, 7]]) == [[7, 7], [7, 7]]


def test_autocontrast_and_equalize_treat_each_channel_by_itself():
    planes = np.stack([_planes()[0] // 2, _planes()[1] // 4 + 100, _planes()[2] // 8])
    for name, by_pillow in [("AutoContrast", ImageOps.autocontrast), ("Equalize", ImageOps.equalize)]:
        assert np.array_equal(OPERATIONS[name](planes, 1), np.asarray(by_pillow(_image(planes))).transpose(2, 0, 1))


def test_equalize_flattens_the_histogram():
    # Pillow: step = (pixels - pixels of the brightest level) // 255; a level becomes
    # (step // 2 + pixels darker than it) // step.
    levels = np.repeat([3, 90, 200, 250], [1020, 510, 1020, 50]).reshape(52, 50)
    step = (1020 + 510 + 1020) // 255
    assert step == 10
    expected = {3: 5 // 10, 90: (5 + 1020) // 10, 200: (5 + 1530) // 10, 250: (5 + 2550) // 10}
    assert expected == {3: 0, 90: 102, 200: 153, 250: 255}
    square = np.zeros((52, 52), dtype=int)
    square[:, :50], square[:, 50:] = levels, 250  # more of the brightest: no change
    assert _apply("Equalize", square.tolist()) == [[expected[level] for level in row] for row in square.tolist()]


def test_brightness_multiplies_by_1_36():
    assert _apply("Brightness", [[0, 100, 150], [187, 188, 255], [1, 2, 3]]) == [
        [0, 136, 204],
        [254, 255, 255],
        [1, 2, 4],
    ]


def test_sharpness_moves_away_from_the_smoothed_picture_except_at_the_border():
    rows = [[100] * 5 for _ in range(5)]
    rows[2][2] = 165
    # Smoothed centre (8 x 100 + 5 x 165) / 13 = 125: 125 + 1.36 x 40 = 179.4; beside it 105 + 1.36 x -5 = 98.2
    assert _apply("Sharpness", rows) == [
        [100, 100, 100, 100, 100],
        [100, 98, 98, 98, 100],
        [100, 98, 179, 98, 100],
        [100, 98, 98, 98, 100],
        [100, 100, 100, 100, 100],
    ]
    assert _apply("Sharpness", [[0, 0, 0], [0, 255, 0], [0, 0, 0]])[1] == [0, 255, 0]


def test_sharpness_is_pillows():
    planes = _planes(120)
    by_pillow = np.asarray(ImageEnhance.Sharpness(_image(planes)).enhance(1.36)).transpose(2, 0, 1)
    assert np.array_equal(OPERATIONS["Sharpness"](planes, 1), by_pillow)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name, axis", [("TranslateX", 2), ("TranslateY", 1)])
def test_translation_moves_by_seven_pixels_and_fills_with_grey(name, axis, sign):
    planes = _planes(20)
    moved = np.moveaxis(OPERATIONS[name](planes, sign), axis, 0)
    given = np.moveaxis(planes, axis, 0)
    if sign > 0:
        assert np.array_equal(moved[:13], given[7:]) and (moved[13:] == GREY).all()
    else:
        assert np.array_equal(moved[7:], given[:13]) and (moved[:7] == GREY).all()


def _sample(plane: np.ndarray, x: float, y: float) -> float:
    """The value at (x, y), in pixels with the first pixel's centre at (0.5, 0.5); grey all around the picture."""
    total = 0.0
    left, top = math.floor(x - 0.5), math.floor(y - 0.5)
    for column in (left, left + 1):
        for row in (top, top + 1):
            weight = (1 - abs(x - 0.5 - column)) * (1 - abs(y - 0.5 - row))
            inside = 0 <= column < plane.shape[1] and 0 <= row < plane.shape[0]
            total += weight * (int(plane[row, column]) if inside else GREY)
    return total


def _source(name: str, sign: int, x: float, y: float, size: int) -> tuple[float, float]:
    if name == "ShearX":
        return x + sign * 0.21 * y, y
    if name == "ShearY":
        return x, y + sign * 0.21 * x
    turn, middle = sign * 21 * math.pi / 180, size / 2
    return (
        middle + math.cos(turn) * (x - middle) - math.sin(turn) * (y - middle),
        middle + math.sin(turn) * (x - middle) + math.cos(turn) * (y - middle),
    )


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "Rotate"])
def test_shears_and_rotations_take_each_pixel_from_its_place(name, sign):
    size = 70  # more than one strip
    planes = _planes(size)
    result = OPERATIONS[name](planes, sign)
    for row in range(0, size, 3):
        for column in range(size):
            place = _source(name, sign, column + 0.5, row + 0.5, size)
            for channel in range(3):
                assert abs(result[channel, row, column] - _sample(planes[channel], *place)) < 0.51
    assert (result == GREY).all(axis=0).mean() > 0.05


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "Rotate"])
def test_inside_the_picture_shears_and_rotations_are_pillows_within_one_grey_level(name, sign):
    planes = np.asarray(_scene(96, 96)).transpose(2, 0, 1).copy()
    image, bilinear = _image(planes), Image.Resampling.BILINEAR
    if name == "Rotate":
        expected = image.rotate(sign * 21, bilinear, fillcolor=(GREY,) * 3)
    else:
        matrix = (1, sign * 0.21, 0, 0, 1, 0) if name == "ShearX" else (1, 0, 0, sign * 0.21, 1, 0)
        expected = image.transform(image.size, Image.Transform.AFFINE, matrix, bilinear, fillcolor=(GREY,) * 3)
    difference = _difference(OPERATIONS[name](planes, sign), np.asarray(expected).transpose(2, 0, 1))
    assert (difference > 1).mean() < 0.03  # the edges, where Pillow does not blend
    assert np.median(difference) == 0


def test_a_transform_can_be_sent_to_a_worker(picture):
    import pickle

    transform = pickle.loads(pickle.dumps(TrainTransform(48, randaug=True)))
    assert torch.equal(transform(picture, (0, 0, 1)), TrainTransform(48, randaug=True)(Path(picture), (0, 0, 1)))
