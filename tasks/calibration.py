"""Confidence that means something: how likely an answer is right, fitted to what validation saw.

A model trained on soft scores orders its answers well but says too much or too little of each. Platt's scaling puts
that right with two numbers: confidence = sigmoid(slope · logit + offset), fitted to the scores that the answers really
got (J. Platt, Probabilistic Outputs for Support Vector Machines, 1999). How far confidence and score still lie apart is
told as the expected calibration error (C. Guo et al., On Calibration of Modern Neural Networks, 2017).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from beit3.system.errors import InputError, printable

BINS = 15  # of equal width, as in the paper
MIN_ROWS = 30  # of validation; fewer say too little
_STEPS = 100  # of Newton's method; ten are usual
_PRIOR = 1.0  # of examples that say (1, 0): keeps the fit finite where all answers are right


@dataclass(frozen=True)
class Calibration:
    """Two numbers and what they brought.

    Attributes:
        slope, offset: confidence = sigmoid(slope · logit + offset).
        error_before, error_after: expected calibration error of the first answers, in [0, 1], with (1, 0) and with
            these.
        rows: of the validation that they were fitted to.
    """

    slope: float = 1.0
    offset: float = 0.0
    error_before: float = math.nan
    error_after: float = math.nan
    rows: int = 0

    def confidence(self, logits: np.ndarray) -> np.ndarray:
        """Logits of any shape → float64 in (0, 1)."""
        return _sigmoid(self.slope * np.asarray(logits, np.float64) + self.offset)

    def to_plain(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any] | None) -> Calibration | None:
        """What `to_plain` gave; None for None.

        Raises:
            InputError: it has not the form of that.
        """
        if plain is not None and not _is_calibration(plain):
            raise InputError(
                f"the checkpoint's description says a calibration that is none: {printable(repr(plain))[:80]}"
            )
        return None if plain is None else cls(**plain)


UNCALIBRATED = Calibration()


def _is_calibration(plain: Any) -> bool:
    """Whether a stranger's value has the form that `Calibration.from_plain` takes."""
    names = Calibration.__dataclass_fields__.keys()
    return (
        isinstance(plain, dict)
        and plain.keys() == names
        and all(type(value) in (int, float) and -1e9 < value < 1e9 for value in plain.values())
        and plain["slope"] > 0
    )


def fit(logits: np.ndarray, scores: np.ndarray) -> Calibration | None:
    """The calibration that makes `scores` likeliest.

    logits: (N, K), those of the K best answers of N rows, the best first. scores: (N, K) in [0, 1], what each of these
    answers is worth. None where the rows are too few, or a larger logit is no better.
    """
    logits, scores = np.asarray(logits, np.float64), np.asarray(scores, np.float64)
    if len(logits) < MIN_ROWS:
        return None
    x, y = logits.ravel(), scores.ravel()
    parameters = np.array([1.0, 0.0])
    start = parameters.copy()
    for _ in range(_STEPS):  # Newton's method on the mean cross-entropy, which is convex
        p = _sigmoid(parameters[0] * x + parameters[1])
        gradient = np.array([(p - y) @ x, (p - y).sum()]) + _PRIOR * (parameters - start)
        weight = p * (1 - p)
        hessian = np.array([[weight @ (x * x), weight @ x], [weight @ x, weight.sum()]]) + _PRIOR * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        # Far from the optimum a whole step may overshoot.
        parameters = parameters - step / max(1.0, np.abs(step).max())
        if np.abs(step).max() < 1e-10:
            break
    slope, offset = (float(value) for value in parameters)
    if not (math.isfinite(slope) and math.isfinite(offset)) or slope <= 0:
        return None
    after = Calibration(slope, offset)
    before, now = (expected_error(each.confidence(logits[:, 0]), scores[:, 0]) for each in (UNCALIBRATED, after))
    return Calibration(slope, offset, before, now, len(logits))


def expected_error(confidence: np.ndarray, scores: np.ndarray) -> float:
    """Mean distance between confidence and score over `BINS` bins of confidence, weighted by their rows, in [0, 1]."""
    bins = np.minimum((np.asarray(confidence) * BINS).astype(int), BINS - 1)
    gaps = np.zeros(BINS)
    np.add.at(gaps, bins, np.asarray(confidence, np.float64) - np.asarray(scores, np.float64))
    return float(np.abs(gaps).sum() / max(len(bins), 1))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))  # overflows nowhere
