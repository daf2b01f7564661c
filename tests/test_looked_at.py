"""What an answer looked at: the map against values computed by hand and in another way, and what it leaves behind."""

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from demo.pointing import brightest_quarter, main, missed_quarter, of_three, question_about
from demo.scenes import BACKGROUNDS, Thing, draw
from inference import Answer, load
from inference.looked_at import LONGER_SIDE, _Weights, followed_back, looked_at, overlay
from tests.test_inference import answering, picture, trained  # noqa: F401  fixtures
from tests.test_settings import coco  # noqa: F401  a fixture

PATCHES = 16


def test_two_layers_followed_back_by_hand():
    first = torch.tensor([[[0.5, 0.4, 0.1], [0.2, 0.2, 0.6], [0.3, 0.4, 0.3]]])
    of_first = torch.tensor([[[-1.0, 0.0, 1.0], [0.0, -5.0, 1.0], [9.0, 9.0, 9.0]]])
    last, of_last = torch.tensor([[[0.2, 0.5, 0.3]]]), torch.tensor([[[1.0, 2.0, -1.0]]])
    # The last layer brings (0.2, 1.0, 0) to the class token, which has 1 of itself: (1.2, 1.0, 0). In the first layer
    # position 2 gives 0.1 to position 0 and 0.6 to position 1: 1.2 * 0.1 + 1.0 * 0.6 = 0.72.
    reached = followed_back([first, last], [of_first, of_last])
    assert reached.tolist() == pytest.approx([1.2, 1.0, 0.72])


def test_following_back_is_the_product_of_whole_matrices():
    random = torch.Generator().manual_seed(0)
    weights = [torch.rand(4, 9, 9, generator=random) for _ in range(3)]
    gradients = [torch.randn(4, 9, 9, generator=random) for _ in range(3)]
    relevance = torch.eye(9)
    for weight, gradient in zip(weights, gradients, strict=True):  # as in the paper, from the first layer on
        relevance = relevance + (weight * gradient).clamp(min=0).mean(dim=0) @ relevance
    torch.testing.assert_close(followed_back(weights, gradients), relevance[0])
    # A last layer of which the class token alone was computed says the same.
    weights[-1], gradients[-1] = weights[-1][:, :1], gradients[-1][:, :1]
    torch.testing.assert_close(followed_back(weights, gradients), relevance[0])


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_steps_is_the_fused_one(masked):
    random = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, 7, 8, generator=random) for _ in range(3))
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])[:, None, None] if masked else None
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with _Weights() as weights:
        steps = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(steps, fused)
    [kept] = weights.of_layers
    torch.testing.assert_close(kept.sum(dim=-1), torch.ones(2, 3, 7))
    assert not masked or kept[1, :, :, 4:].eq(0).all()
    F.scaled_dot_product_attention(q, k, v)
    assert len(weights.of_layers) == 1  # afterwards nothing is kept


class ReadsOnePatch:
    """A hand-made model: attention is the same everywhere, and only one patch has something to say."""

    def __init__(self, patch, sign=1.0):
        self.values = torch.zeros(1, 1, 1 + PATCHES + 2, 1)  # class token, patches, two words
        self.values[:, :, 1 + patch] = sign
        self.task = SimpleNamespace(prepare=lambda batch, *_: batch, predict_step=self.predict_step)
        self.device = torch.device("cpu")
        self.model = SimpleNamespace(
            beit3=SimpleNamespace(config=SimpleNamespace(patches=PATCHES, image_size=64, patch_size=16))
        )

    def item(self, picture, question):
        return {}

    def collate(self, items):
        return {}

    def predict_step(self, model, batch):
        keys = torch.zeros_like(self.values)
        attended = F.scaled_dot_product_attention(keys[:, :, :1], keys, self.values)
        return {"logits": attended.reshape(1, 1), "finite": torch.tensor([True])}


@pytest.mark.parametrize("patch", [0, 6, 15])
def test_a_model_that_reads_one_patch_looked_there(patch):
    heat = looked_at(ReadsOnePatch(patch), None, "?")
    wanted = torch.zeros(PATCHES)
    wanted[patch] = 1
    torch.testing.assert_close(heat, wanted.reshape(4, 4))


def test_what_speaks_against_the_answer_is_left_out():
    assert looked_at(ReadsOnePatch(6, sign=-1.0), None, "?").eq(0).all()


def test_the_map_has_a_value_for_each_patch_and_depends_on_question_and_answer(answering, picture):
    heat = looked_at(answering, picture, "what color is the cat?")
    assert heat.shape == (4, 4) and heat.dtype == torch.float32 and not heat.requires_grad
    assert heat.min() >= 0 and heat.sum().item() == pytest.approx(1)
    assert not torch.equal(heat, looked_at(answering, picture, "how many dogs are there?"))
    second = answering.answer(picture, "what color is the cat?", top=2)[1]
    assert not torch.equal(heat, looked_at(answering, picture, "what color is the cat?", second.text))


def test_what_is_explained_is_what_was_answered(answering, picture):
    """The model in separate steps gives the logits of the fused one."""
    batch = answering.task.prepare(
        answering.collate([answering.item(picture, "what is it?")]), answering.device, torch.float32
    )
    with torch.no_grad():
        fused = answering.task.predict_step(answering.model, batch)
        with _Weights() as weights:
            steps = answering.task.predict_step(answering.model, batch)
    torch.testing.assert_close(steps["logits"], fused["logits"], rtol=1e-5, atol=1e-5)
    assert len(weights.of_layers) == answering.model.beit3.config.layers


def test_nothing_is_left_behind(answering, picture):
    before = answering.answer(picture, "what is it?")
    wanted = [parameter.requires_grad for parameter in answering.model.parameters()]
    heat = looked_at(answering, picture, "what is it?")
    assert all(parameter.grad is None for parameter in answering.model.parameters())
    assert [parameter.requires_grad for parameter in answering.model.parameters()] == wanted
    assert not answering.model.training and torch.is_grad_enabled()
    assert answering.answer(picture, "what is it?") == before
    with torch.no_grad():  # as servers and notebooks have it
        assert torch.equal(looked_at(answering, picture, "what is it?"), heat)
        assert not torch.is_grad_enabled()


def test_frozen_weights_and_any_precision_give_the_same_map(trained, picture):
    heats = []
    for precision, frozen in [("fp32", False), ("fp32", True), ("bf16", False)]:
        model = load(trained["vqav2"], precision=precision)
        model.model.requires_grad_(not frozen)
        heats.append(looked_at(model, picture, "what is it?"))
    with torch.autocast("cpu", torch.bfloat16):
        heats.append(looked_at(model, picture, "what is it?"))
    for other in heats[1:]:
        torch.testing.assert_close(other, heats[0])


def test_weights_that_give_no_numbers_end_in_an_error(answering, picture):
    broken = copy.copy(answering)
    broken.model = copy.deepcopy(answering.model)
    with torch.no_grad():
        broken.model.head[0].weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        looked_at(broken, picture, "what is it?")


def test_the_map_lies_over_the_picture_in_grey():
    pixels = torch.zeros(3, 32, 64, dtype=torch.uint8)
    pixels[0] = 200  # red
    heat = torch.zeros(2, 4)
    assert overlay(pixels, heat).shape == (LONGER_SIDE // 2, LONGER_SIDE, 3)
    assert overlay(pixels, heat).unique().tolist() == [60]  # 0.299 * 200
    heat[1, 3] = 7.0
    laid = overlay(pixels, heat).int()
    assert laid[0, 0].tolist() == [60, 60, 60]
    # 0.2 of the grey and 0.8 of the yellow (255, 224, 64)
    assert (laid[-1, -1] - torch.tensor([216, 191, 63])).abs().max() <= 1
    assert torch.equal(overlay(pixels, heat * 0.001).int(), laid)
    tall = torch.zeros(3, 3000, 2, dtype=torch.uint8)
    assert overlay(tall, heat).shape == (LONGER_SIDE, 1, 3)


# how often it points at the shape asked about


@pytest.mark.parametrize(("row", "column", "quarter"), [(0, 1, 0), (1, 2, 1), (2, 0, 2), (3, 3, 3)])
def test_the_quarter_of_the_largest_value(row, column, quarter):
    heat = np.zeros((4, 4))
    heat[row, column] = 1
    assert brightest_quarter(heat) == quarter


class SeesColour:
    """Answers "yes" as surely as there is colour in one quarter of the picture."""

    def __init__(self, quarter):
        self.row, self.column = (32 * place for place in divmod(quarter, 2))

    def answer(self, pictures, question, top=5):
        if not isinstance(pictures, list):
            return self.answer([pictures], question)[0]
        return [[Answer("yes", float(self.colour(np.array(each))))] for each in pictures]

    def colour(self, pixels):
        return np.ptp(pixels[self.row : self.row + 32, self.column : self.column + 32].astype(int), axis=2).mean() / 255


def test_the_quarter_that_is_missed_is_the_one_that_was_seen():
    rng = random.Random(0)
    [scene] = of_three(rng, 1)
    assert len({thing.shape for thing in scene}) == len({thing.color for thing in scene}) == 3
    drawn = draw(scene, BACKGROUNDS["black"][0], rng)
    for thing in scene:
        assert missed_quarter(SeesColour(thing.cell), drawn, "?") == thing.cell


def test_questions_are_of_the_demos_kind():
    thing = Thing(0, "circle", "red")
    assert question_about(thing, True) == "What color is the circle?"
    assert question_about(thing, False) == "What shape is red?"


def test_the_shares_are_told(trained, tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    assert "no such checkpoint" in capsys.readouterr().err
