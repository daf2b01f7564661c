"""The baseline every captioner should beat: the one caption that, said of every picture, scores best."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from beit3.system.errors import InputError
from tasks.captioning.scores.ptb_tokenizer import tokenize
from tasks.captioning.scores.scores import ImageId

LONGEST = 4  # CIDEr compares n-grams of 1 to 4 words
SIGMA = 6.0  # standard deviation of its penalty for another length, in words


def best_constant_caption(
    candidates: Iterable[str], references: Mapping[ImageId, Sequence[str]], limit: int | None = None
) -> tuple[str, float]:
    """The candidate with the best CIDEr as the prediction for every image, and that CIDEr (0 to 10).

    candidates: captions, usually those of the training split; of captions with the same tokens the first is tried, and
    only the `limit` most frequent (None: all; a thousand take about a second on the references of a thousand images).
    references: image id → captions, of the split to be scored. The first wins among equals.
    Raises InputError when there are no candidates or no references.
    """
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for caption in candidates:
        tokens = tokenize(caption)
        first.setdefault(tokens, caption)
        counts[tokens] += 1
    problems = ["there are no candidate captions"] * (not counts) + ["there are no reference captions"] * (
        not references
    )
    if problems:
        raise InputError(problems)
    scorer = _ConstantCider(references)
    scores = {tokens: scorer.score(tokens) for tokens, _ in counts.most_common(limit)}
    best = max(scores, key=scores.__getitem__)
    return first[best], scores[best]


class _ConstantCider:
    """CIDEr of a caption that is said of every image (Vedantam et al. 2015, as pycocoevalcap's `Cider` computes it).

    Equal references are counted once and weighted, and for each n-gram the references holding it are kept, so a
    candidate costs a few operations per n-gram of it instead of a comparison with every reference.
    """

    def __init__(self, references: Mapping[ImageId, Sequence[str]]):
        weights: defaultdict[str, float] = defaultdict(float)  # distinct reference → its share in the mean over images
        holding: Counter[tuple[str, ...]] = Counter()  # n-gram → number of images with it in a reference
        for captions in references.values():
            tokenized = [tokenize(caption) for caption in captions]
            for tokens in tokenized:
                weights[tokens] += 1 / (len(captions) * len(references))
            holding.update({gram for tokens in tokenized for gram in _grams(tokens)})
        self._log_images = math.log(len(references))
        self._log_holding = {gram: math.log(count) for gram, count in holding.items()}
        self._weights = np.array(list(weights.values()))  # (R,)
        self._lengths = np.array([_length(tokens) for tokens in weights])  # (R,)
        self._norms = np.zeros((LONGEST, len(weights)))  # (4, R)
        rows: defaultdict[tuple[str, ...], list[tuple[int, float]]] = defaultdict(list)
        for row, tokens in enumerate(weights):
            for gram, value in self._vector(tokens).items():
                rows[gram].append((row, value))
                self._norms[len(gram) - 1, row] += value**2
        self._norms = np.sqrt(self._norms)
        # n-gram → which references hold it, and their tf-idf values of it
        self._rows: dict[tuple[str, ...], tuple[NDArray[np.int64], NDArray[np.float64]]] = {
            gram: (np.array([row for row, _ in pairs]), np.array([value for _, value in pairs]))
            for gram, pairs in rows.items()
        }

    def score(self, tokens: str) -> float:
        """CIDEr of the caption `tokens` as the prediction for every image."""
        overlaps = np.zeros_like(self._norms)  # (4, R)
        norms = np.zeros(LONGEST)
        for gram, value in self._vector(tokens).items():
            norms[len(gram) - 1] += value**2
            if gram in self._rows:
                rows, values = self._rows[gram]
                overlaps[len(gram) - 1, rows] += np.minimum(value, values) * values
        scale = np.sqrt(norms)[:, None] * self._norms
        # Where a norm is 0 so is the overlap, and pycocoevalcap does not divide.
        cosines = np.divide(overlaps, scale, out=overlaps, where=scale != 0)
        penalty = np.exp(-((_length(tokens) - self._lengths) ** 2) / (2 * SIGMA**2))  # (R,)
        return float(10 * (cosines.mean(axis=0) * penalty) @ self._weights)

    def _vector(self, tokens: str) -> dict[tuple[str, ...], float]:
        """n-gram → count × log(images / images with it in a reference)."""
        return {
            gram: count * (self._log_images - self._log_holding.get(gram, 0.0))
            for gram, count in _grams(tokens).items()
        }


def _grams(tokens: str) -> Counter[tuple[str, ...]]:
    words = tokens.split()
    return Counter(
        tuple(words[start : start + n]) for n in range(1, LONGEST + 1) for start in range(len(words) - n + 1)
    )


def _length(tokens: str) -> int:
    """What pycocoevalcap calls the length: the number of word pairs."""
    return max(0, len(tokens.split()) - 1)
