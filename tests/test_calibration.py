"""Confidence: the two numbers against an independent search, the error against hand-computed values."""

import json
import math

import numpy as np
import pytest
import torch

from beit3.system.errors import InputError
from tasks.calibration import UNCALIBRATED, Calibration, expected_error, fit


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def cross_entropy(slope, offset, logits, scores):
    """With the one example that says (1, 0), as the fit has it."""
    p = sigmoid(slope * logits + offset)
    loss = -(scores * np.log(p) + (1 - scores) * np.log(1 - p)).sum()
    return loss + 0.5 * ((slope - 1) ** 2 + offset**2)


def test_the_two_numbers_are_those_that_make_the_scores_likeliest():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (400, 5))
    scores = (rng.random((400, 5)) < sigmoid(0.4 * logits - 0.7)).astype(float)
    found = fit(logits, scores)
    parameters = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([parameters], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")
    x, y = torch.from_numpy(logits), torch.from_numpy(scores)

    def closure():
        search.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            parameters[0] * x + parameters[1], y, reduction="sum"
        ) + 0.5 * ((parameters[0] - 1) ** 2 + parameters[1] ** 2)
        loss.backward()
        return loss

    search.step(closure)
    assert [found.slope, found.offset] == pytest.approx(parameters.tolist(), rel=1e-6)
    best = cross_entropy(found.slope, found.offset, logits, scores)
    for step in (1e-3, -1e-3):
        assert cross_entropy(found.slope + step, found.offset, logits, scores) > best
        assert cross_entropy(found.slope, found.offset + step, logits, scores) > best
    assert found.slope == pytest.approx(0.4, abs=0.05) and found.offset == pytest.approx(-0.7, abs=0.15)
    assert found.error_after < 0.5 * found.error_before and found.rows == 400


def test_soft_scores_are_met_on_average():
    """All answers equally sure and worth 0.3: so is the confidence, but for the example that says (1, 0)."""
    found = fit(np.zeros((500, 1)), np.full((500, 1), 0.3))
    assert found.confidence(np.zeros(1)) == pytest.approx([0.3], abs=0.01)
    assert found.error_before == pytest.approx(0.2) and found.error_after < 0.01


def test_answers_that_are_all_right_give_finite_numbers():
    logits = np.linspace(-2, 6, 200)[:, None]
    found = fit(logits, np.ones((200, 1)))
    assert math.isfinite(found.slope) and math.isfinite(found.offset)
    assert found.confidence(logits).min() > 0.5


def test_there_is_none_of_few_rows_or_where_a_larger_logit_is_no_better():
    logits = np.linspace(-3, 3, 400)[:, None]
    assert fit(logits[:29], np.ones((29, 1))) is None
    assert fit(logits, (logits < 0).astype(float)) is None


def test_the_error_is_the_distance_of_confidence_and_score_in_bins():
    # Bins of 1/15: the first two share one (0.90 and 0.92 in [0.867, 0.933)), 0.5 and 1.0 are alone.
    confidence, scores = np.array([0.90, 0.92, 0.5, 1.0]), np.array([1.0, 0.0, 1.0, 1.0])
    assert expected_error(confidence, scores) == pytest.approx((abs(1.82 - 1.0) + 0.5 + 0.0) / 4)


def test_confidence_of_any_logit_is_between_0_and_1():
    assert Calibration(3.0, -1.0).confidence(np.array([[-1e9, 0.0, 1e9]])).tolist() == [
        [0.0, pytest.approx(sigmoid(-1.0)), 1.0]
    ]
    assert UNCALIBRATED.confidence(np.float32(0)) == 0.5


def test_it_goes_through_a_description_and_a_strangers_is_refused():
    made = Calibration(0.5, 0.25, 0.1, 0.02, 300)
    assert Calibration.from_plain(json.loads(json.dumps(made.to_plain()))) == made
    assert Calibration.from_plain(None) is None
    plain = made.to_plain()
    for wrong in (
        [], "x", {}, {**plain, "slope": "1"}, {**plain, "slope": math.nan}, {**plain, "slope": -1.0},
        {**plain, "more": 1}, {**plain, "slope": 10**400}, {**plain, "rows": True},
    ):  # fmt: skip
        with pytest.raises(InputError, match="a calibration that is none"):
            Calibration.from_plain(wrong)
