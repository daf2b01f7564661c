"""Beam search against captions of the released code, and against a slow search written straight down."""

import dataclasses
import itertools
import random

import pytest
import torch

from beit3.data.tokenizer import Tokenizer
from beit3.model.encoder import EncoderConfig
from modeling_finetune import BEiT3ForCaptioning
from tasks.captioning import generation
from tasks.captioning.generation import generate
from tests import reference

BOS, EOS = 0, 2
VOCABULARY = 24
MASK = VOCABULARY - 1


def small_model(seed, eos_bias=0.0, layers=2):
    """A model of a few thousand weights; `eos_bias` decides how long its captions are."""
    config = EncoderConfig(width=32, layers=layers, heads=2, image_size=32, vocab_size=VOCABULARY)
    model = BEiT3ForCaptioning(config).eval()
    reference.fill(model, seed)
    with torch.no_grad():
        model.mlm_head.weight.mul_(4)  # otherwise all tokens are about as likely
        model.mlm_head.bias[EOS] = eos_bias
    return model


@torch.no_grad()
def log_probabilities(model, image, tokens, mask_id):
    """Of the token behind `tokens`, one caption of one picture, everything computed anew: a list of V numbers."""
    text = torch.tensor([[BOS, *tokens, mask_id]])
    masked = torch.zeros_like(text)
    masked[0, -1] = 1
    logits = model(image=image[None], text_ids=text, padding_mask=torch.zeros_like(text), language_masked_pos=masked)
    return logits[0].double().log_softmax(0).tolist()


def slow_search(model, image, *, mask_id, num_beams, length_penalty, max_tokens, num_return=1):
    """The search as the specification words it, for one picture and one beam after the other.

    Returns the closed captions kept, [(score, tokens)], the best first.
    """
    beams = [(0.0, [])]
    closed: list[tuple[float, list[int]]] = []
    for cur in itertools.count(2):  # length of the input, <s> and <mask> included
        candidates = []
        for total, tokens in beams:
            scores = log_probabilities(model, image, tokens, mask_id)
            candidates += [(total + score, tokens, token) for token, score in enumerate(scores)]
        candidates = sorted(candidates, key=lambda candidate: -candidate[0])[: 3 * num_beams]
        if len(closed) == num_return and closed[-1][0] >= candidates[0][0] / (max_tokens - 1) ** length_penalty:
            return closed
        beams = []
        for total, tokens, token in candidates:
            if token == EOS or cur + 1 == max_tokens:
                if tokens not in [others for _, others in closed]:
                    closed.append((total / (len(tokens) + 2) ** length_penalty, tokens))
            else:
                beams.append((total, [*tokens, token]))
            if len(beams) == num_beams:
                break
        closed = sorted(closed, key=lambda hypothesis: -hypothesis[0])[:num_return]
        if cur + 1 == max_tokens:
            return closed


def score_of(model, image, tokens, max_tokens, length_penalty):
    """The score of a caption by the formula."""
    total = 0.0
    for known, token in enumerate(tokens):
        total += log_probabilities(model, image, tokens[:known], MASK)[token]
    last = log_probabilities(model, image, tokens, MASK)
    total += max(last) if len(tokens) == max_tokens - 3 else last[EOS]
    return total / (len(tokens) + 2) ** length_penalty


@pytest.fixture(scope="module")
def base_model():
    return reference.build("beit3_base_patch16_224_captioning", vocab_size=88)


@pytest.mark.slow
@pytest.mark.parametrize("case", reference.load("beam_search.json"), ids=str)
def test_captions_are_those_of_the_released_code(base_model, case):
    tokenizer = Tokenizer(reference.MINI_COCO / "mini.spm")
    assert case["seed"] == 0
    with torch.no_grad():
        base_model.mlm_head.bias[EOS] = case["eos_bias"]
    captions = generate(
        base_model,
        reference.images(500 + case["seed"], 4, 224),
        mask_id=tokenizer.mask_id,
        num_beams=case["num_beams"],
        length_penalty=case["length_penalty"],
        max_tokens=case["num_max_bpe_tokens"],
    )
    assert [tokenizer.decode(ids) for ids in captions.best()] == case["captions"]


@pytest.mark.parametrize("seed", range(40))
def test_captions_are_those_of_the_slow_search(seed):
    choose = random.Random(seed)
    settings = {
        "num_beams": 1 + seed % 5,
        "length_penalty": choose.choice([0.0, 0.6, 1.0, 2.0, -0.5]),
        "max_tokens": choose.randint(4, 12),
        "mask_id": MASK,
    }
    model = small_model(seed, eos_bias=choose.choice([-2.0, 0.0, 1.0, 2.0, 4.0]), layers=choose.randint(1, 3))
    images = reference.images(seed, choose.randint(1, 6), 32)
    captions = generate(model, images, **settings)
    for row, image in enumerate(images):
        [(score, tokens)] = slow_search(model, image, **settings)
        assert captions.best()[row] == tokens, settings
        assert captions.scores[row, 0].item() == pytest.approx(score, rel=1e-4, abs=1e-4)


def test_captions_of_these_models_end_at_once_on_the_way_and_at_the_limit():
    lengths = set()
    for seed, eos_bias in itertools.product(range(4), (-2.0, 0.0, 1.0, 2.0, 4.0)):
        captions = generate(
            small_model(seed, eos_bias), reference.images(seed, 4, 32), mask_id=MASK, num_beams=3, max_tokens=10
        )
        lengths |= set(captions.lengths.flatten().tolist())
    assert {0, 1, 3, 4, 7} <= lengths


@pytest.mark.parametrize("seed", range(6))
def test_the_best_captions_on_request_are_those_of_the_slow_search(seed):
    model = small_model(seed, eos_bias=1.0)
    settings = {"num_beams": 4, "length_penalty": 0.6, "max_tokens": 8, "mask_id": MASK, "num_return": 3}
    images = reference.images(seed, 3, 32)
    captions = generate(model, images, **settings)
    for row, image in enumerate(images):
        expected = slow_search(model, image, **settings)
        found = [
            ids[:length]
            for ids, length in zip(captions.token_ids[row].tolist(), captions.lengths[row].tolist(), strict=True)
        ]
        assert found[: len(expected)] == [tokens for _, tokens in expected]
        wanted = [score for score, _ in expected] + [-float("inf")] * (3 - len(expected))
        assert captions.scores[row].tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_caption_does_not_depend_on_its_batch(num_beams):
    model = small_model(5, eos_bias=2.0)
    images = reference.images(5, 12, 32)
    settings = {"mask_id": MASK, "num_beams": num_beams, "max_tokens": 12}
    together = generate(model, images, **settings)
    assert len(set(together.lengths.flatten().tolist())) > 2  # pictures leave the batch at different steps
    for size in (1, 5):
        parts = [generate(model, part, **settings) for part in images.split(size)]
        assert [ids for part in parts for ids in part.best()] == together.best()
    backwards = generate(model, images.flip(0), **settings)
    assert backwards.best() == together.best()[::-1]


@pytest.mark.parametrize(("keep", "ask_every"), [(1.0, 1), (0.5, 1), (0.0, 1), (1.0, 3), (0.0, 4)])
def test_when_pictures_leave_the_batch_changes_no_caption(monkeypatch, keep, ask_every):
    model, images = small_model(6, eos_bias=2.0), reference.images(6, 8, 32)
    expected = generate(model, images, mask_id=MASK, max_tokens=12)
    monkeypatch.setattr(generation, "KEEP", keep)
    monkeypatch.setattr(generation, "_ask_every", lambda device: ask_every)
    changed = generate(model, images, mask_id=MASK, max_tokens=12)
    assert changed.best() == expected.best()
    torch.testing.assert_close(changed.scores, expected.scores)


def test_one_beam_takes_the_likeliest_token_each_time():
    model, image = small_model(3, eos_bias=-50.0), reference.images(3, 1, 32)
    tokens = []
    for _ in range(7):
        scores = log_probabilities(model, image[0], tokens, MASK)
        tokens.append(max(range(VOCABULARY), key=scores.__getitem__))
    assert generate(model, image, mask_id=MASK, num_beams=1, max_tokens=10).best() == [tokens]


def test_a_caption_may_be_empty_and_has_at_most_three_tokens_less_than_the_limit():
    images = reference.images(1, 2, 32)
    short = generate(small_model(1, eos_bias=50.0), images, mask_id=MASK, max_tokens=9)
    long = generate(small_model(1, eos_bias=-50.0), images, mask_id=MASK, max_tokens=9)
    assert short.best() == [[], []]
    assert short.token_ids.tolist() == [[[1] * 6], [[1] * 6]]
    assert long.lengths.tolist() == [[6], [6]]
    assert long.token_ids.shape == (2, 1, 6)


def test_drop_path_does_not_reach_generation():
    model = small_model(2)
    model.beit3.config = dataclasses.replace(model.beit3.config, drop_path_rate=0.9)
    images = reference.images(2, 2, 32)
    expected = generate(model, images, mask_id=MASK, max_tokens=8)
    model.train()
    assert generate(model, images, mask_id=MASK, max_tokens=8).best() == expected.best()


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16_gives_the_captions_of_fp32_up_to_ties(how):
    settings = {"mask_id": MASK, "num_beams": 3, "max_tokens": 8, "length_penalty": 0.6}
    equal = 0
    for seed in range(10):
        images = reference.images(seed, 4, 32)
        expected = generate(small_model(seed, eos_bias=1.0), images, **settings)
        if how == "weights":
            found = generate(small_model(seed, eos_bias=1.0).bfloat16(), images, **settings)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                found = generate(small_model(seed, eos_bias=1.0), images, **settings)
        assert found.scores.dtype == torch.float32
        for row, image in enumerate(images):
            equal += found.best()[row] == expected.best()[row]
            exact = score_of(small_model(seed, eos_bias=1.0), image, found.best()[row], 8, 0.6)
            assert found.scores[row, 0].item() == pytest.approx(exact, abs=0.2)
    assert equal >= 36  # of 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 3}, "max_tokens is 3, at least 4"),
        ({"num_beams": 0}, "num_beams is 0, wanted 1"),
        ({"num_beams": 9}, "num_beams is 9, wanted 1 … a third of the vocabulary of 24"),
        ({"num_beams": 2, "num_return": 3}, "num_return is 3, wanted 1 … num_beams, which is 2"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        generate(small_model(0), reference.images(0, 1, 32), mask_id=MASK, **settings)


def test_the_image_is_computed_once_and_its_keys_are_held_once(monkeypatch):
    model, seen = small_model(4, eos_bias=-50.0), []
    patches = model.beit3.vision_embed.proj.register_forward_hook(lambda m, inputs, out: seen.append(len(inputs[0])))
    decoders = []
    start = generation._Decoder.__init__
    monkeypatch.setattr(
        generation._Decoder, "__init__", lambda self, *args: (decoders.append(self), start(self, *args))[1]
    )
    generate(model, reference.images(4, 3, 32), mask_id=MASK, num_beams=5, max_tokens=8)
    patches.remove()
    assert seen == [3]
    # (pictures, heads, 4 patches + class token + 7 positions x 5 beams, width of a head)
    assert {tuple(keys.shape) for keys in decoders[0].keys} == {(3, 2, 5 + 7 * 5, 16)}


@pytest.mark.slow
def test_captions_of_a_base_model_are_those_of_the_slow_search(base_model):
    """`bash benchmarks/run.sh --only generation` times the search against one like the released code's."""
    with torch.no_grad():
        base_model.mlm_head.bias[EOS] = -50.0
    images = reference.images(9, 2, 224)
    settings = {"mask_id": 87, "num_beams": 3, "length_penalty": 0.6, "max_tokens": 8}
    expected = [slow_search(base_model, image, **settings)[0][1] for image in images]
    assert generate(base_model, images, **settings).best() == expected
