"""What the labels of a data set tell before anything is learned: balance, and what can be scored without looking."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from beit3.data.image_text import ImageTextDataset
from beit3.system.errors import printable

BEGINNING = 2  # words of a question
RARE = 5  # rows, below which an answer is hardly learned


def best_labels(dataset: ImageTextDataset) -> np.ndarray:
    """(N,) the label with the highest score of each row, the first of equal ones; -1 where a row has none."""
    labels, scores = dataset.table["labels"], dataset.table["scores"]
    best = np.full(len(labels), -1)
    row = np.repeat(np.arange(len(labels)), labels.lengths)
    order = np.lexsort((-np.arange(len(row)), scores.values))  # the last that is written wins: highest, then first
    best[row[order]] = labels.values[order]
    return best


def score_of(dataset: ImageTextDataset, predicted: np.ndarray) -> float:
    """Mean soft score, 0-100, of a label for each row; -1 scores 0."""
    labels, scores = dataset.table["labels"], dataset.table["scores"]
    row = np.repeat(np.arange(len(labels)), labels.lengths)
    return 100 * float(scores.values[labels.values == predicted[row]].sum()) / max(len(labels), 1)


def look(
    train: ImageTextDataset, val: ImageTextDataset, answers: Sequence[str], decode: Callable[[list[int]], str]
) -> list[str]:
    """Sentences on both. decode: token ids → text."""
    best = best_labels(train)
    counts = Counter(best[best >= 0].tolist())
    if not counts:
        return ["no training row has an answer that is in the list"]
    [(common, most)] = counts.most_common(1)
    rare = sum(count < RARE for count in counts.values()) + len(answers) - len(counts)
    by_start: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for start, label in zip(_beginnings(train, decode), best.tolist(), strict=True):
        by_start[start][label] += 1
    guess = {start: given.most_common(1)[0][0] for start, given in by_start.items()}
    guesses = np.array([guess.get(start, common) for start in _beginnings(val, decode)])
    reachable = score_of(val, best_labels(val))
    return [
        f"{len(answers)} answers: {printable(answers[common])[:60]!r} is the commonest, of "
        f"{100 * most / len(best):.1f} % of the training rows; {rare} are those of fewer than {RARE} rows",
        f"highest score that validation allows with these answers: {reachable:.2f}",
        f"the commonest answer to every question scores {score_of(val, np.full(len(val), common)):.2f}, the commonest "
        f"by the question's first {BEGINNING} words {score_of(val, guesses):.2f}",
    ]


def _beginnings(dataset: ImageTextDataset, decode: Callable[[list[int]], str]) -> list[str]:
    """The first words of each question, in lower case; the same tokens are decoded once."""
    texts, known = dataset.table["text_segment"], dict[bytes, str]()
    found = []
    for row in range(len(dataset)):
        start = texts[row][: 4 * BEGINNING]  # a word seldom has more tokens
        key = start.tobytes()
        if key not in known:
            known[key] = " ".join(decode(start.tolist()).lower().split()[:BEGINNING])
        found.append(known[key])
    return found
