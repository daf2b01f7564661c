"""Scores of image captions as people publish them: BLEU, METEOR, ROUGE-L, CIDEr, SPICE.

Tokens are ours (`ptb_tokenizer`), the scores are pycocoevalcap's, so no Java is needed but for METEOR and SPICE.
References and predictions are read in one order, that of the references, as COCOEvalCap does.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from beit3.system.errors import InputError
from tasks.captioning.scores.java_scorers import LeftOut, meteor_scores, spice_scores
from tasks.captioning.scores.ptb_tokenizer import tokenize_lines

ImageId = Any  # int or str; the keys of a Mapping are invariant, so a union would refuse a dict of ints
Tokenized = dict[Any, list[str]]  # by image: captions of tokens between spaces, as pycocoevalcap wants them

JAVA_TIMEOUT = 1800.0  # seconds; METEOR needs about a minute for the 5000 images of the Karpathy test split


@dataclass(frozen=True)
class CaptionScores:
    """The scores of a set of captions, in pycocoevalcap's units: 0 to 1, CIDEr 0 to 10 (papers print × 100).

    scores: `Bleu_1` … `Bleu_4`, `ROUGE_L`, `CIDEr`, and where they could be computed `METEOR`, `SPICE`. BLEU and
    METEOR are of all captions together, the others are means over the images.
    per_image: the same names for each image, in the order of the references. CIDEr of a single image is 0, because
    document frequencies come from the references given.
    left_out: name → why, for each metric that is missing from `scores`.
    """

    scores: dict[str, float]
    per_image: dict[ImageId, dict[str, float]]
    left_out: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For a result file: the scores at the top level, then `left_out` and `per_image`, a list with `image_id`.

        A score that is not a number (SPICE has such) is null, which every reader of JSON understands.
        """
        per_image = [{"image_id": image, **_nan_as_null(scores)} for image, scores in self.per_image.items()]
        return {**_nan_as_null(self.scores), "left_out": self.left_out, "per_image": per_image}


def caption_metrics(
    predictions: Mapping[ImageId, str],
    references: Mapping[ImageId, Sequence[str]],
    *,
    meteor: bool = True,
    spice: bool = True,
    java_timeout: float = JAVA_TIMEOUT,
) -> CaptionScores:
    """Score one caption per image against the captions people wrote for it.

    predictions: image id → caption, raw text. "" is a caption: it scores 0, as in pycocoevalcap.
    references: image id → at least one caption, raw text; e.g. from `load_references`.
    meteor, spice: whether to try the two that need Java, each for at most `java_timeout` seconds. What keeps one from
    running is told in `left_out` and in one line of the log; it is no error and leads to no download.

    Raises InputError, listing every mistake: a prediction for an unknown image, an image without a prediction or
    without references, an empty reference, captions that are not text.
    """
    _check(predictions, references)
    # As pycocoevalcap: all references are the lines of one file, all predictions those of another.
    predicted = _tokenize({image: [predictions[image]] for image in references})
    wanted = _tokenize(references)
    if not any(caption for captions in wanted.values() for caption in captions):
        raise InputError("no reference caption holds a word; every one is punctuation or signs")
    scores, by_image = _python_scores(wanted, predicted)
    left_out = {}
    for name, asked, scorer in (("METEOR", meteor, meteor_scores), ("SPICE", spice, spice_scores)):
        try:
            if not asked:
                raise LeftOut("not asked for")
            flat = [captions[0] for captions in predicted.values()]
            scores[name], by_image[name] = scorer(flat, list(wanted.values()), java_timeout)
        except LeftOut as reason:
            left_out[name] = str(reason)
    per_image = {
        image: {name: float(values[row]) for name, values in by_image.items()} for row, image in enumerate(references)
    }
    return CaptionScores(scores, per_image, left_out)


def _python_scores(wanted: Tokenized, predicted: Tokenized) -> tuple[dict[str, float], dict[str, Sequence[float]]]:
    """BLEU, ROUGE-L and CIDEr by pycocoevalcap: name → score, and name → the score of each image in order."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    with contextlib.redirect_stdout(io.StringIO()):  # BLEU prints its counts
        bleu, bleu_by_image = Bleu(4).compute_score(wanted, predicted)
        rouge, rouge_by_image = Rouge().compute_score(wanted, predicted)
        cider, cider_by_image = Cider().compute_score(wanted, predicted)
    names = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
    scores = dict(zip(names, map(float, [*bleu, rouge, cider]), strict=True))
    return scores, dict(zip(names, [*bleu_by_image, rouge_by_image, cider_by_image], strict=True))


def _nan_as_null(scores: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(score) else score for name, score in scores.items()}


def _tokenize(captions: Mapping[ImageId, Sequence[str]]) -> Tokenized:
    lines = iter(tokenize_lines([caption for its_captions in captions.values() for caption in its_captions]))
    return {image: [next(lines) for _ in its_captions] for image, its_captions in captions.items()}


def _check(predictions: Mapping[ImageId, str], references: Mapping[ImageId, Sequence[str]]) -> None:
    """Raise one InputError with everything that is wrong."""
    problems = []
    if not references:
        problems.append("there are no reference captions, so there is nothing to score against")
    problems += [
        f"image {image!r} has a prediction but no reference captions; is this the ground truth of another split?"
        for image in predictions
        if image not in references
    ]
    for image, captions in references.items():
        if image not in predictions:
            problems.append(f"image {image!r} has reference captions but no prediction; every image needs one")
        elif not isinstance(predictions[image], str):
            problems.append(f"the prediction for image {image!r} is {predictions[image]!r}, wanted text")
        problems += check_captions(f"image {image!r}", captions)
    if problems:
        raise InputError(problems)


def check_captions(whose: str, captions: Any) -> Iterable[str]:
    """What is wrong with the reference captions of an image, each with `whose` in front."""
    if isinstance(captions, str) or not isinstance(captions, Sequence):
        return [f"{whose}: its reference captions are {captions!r}, wanted a list of texts"]
    if not captions:
        return [f"{whose} has no reference captions, wanted at least one"]
    return [
        f"{whose}: a reference caption is {caption!r}, wanted text with at least one character"
        for caption in captions
        if not isinstance(caption, str) or not caption.strip()
    ]
