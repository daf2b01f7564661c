"""How often the page's map points at the shape that a question is about; the demo's pictures are drawn, so it is known.

`python -m demo.pointing CHECKPOINT` draws pictures of three different shapes in three colours, asks for the colour or
shape of one of them, and looks in which quarter of the picture the map of the best answer is strongest. As another
judge each quarter is painted over in turn: the one whose loss lowers the answer's confidence most mattered most.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from beit3.system.errors import InputError
from demo.scenes import BACKGROUNDS, PICTURE_SIZE, Scene, Thing, all_scenes, draw
from inference.looked_at import looked_at
from inference.predictor import Predictor, load

HALF = PICTURE_SIZE // 2  # pixels; each quarter is a cell of the scene


def of_three(rng: random.Random, count: int) -> list[Scene]:
    """Scenes of three things, each of its own shape and colour."""
    scenes = [s for s in all_scenes(3) if len({t.shape for t in s}) == len({t.color for t in s}) == 3]
    return rng.sample(scenes, count)


def question_about(thing: Thing, by_shape: bool) -> str:
    return f"What color is the {thing.shape}?" if by_shape else f"What shape is {thing.color}?"


def brightest_quarter(heat: np.ndarray) -> int:
    """Of a map (h, w) with even sides: the quarter, 2 x row + column, that holds its largest value."""
    row, column = divmod(int(heat.argmax()), heat.shape[1])
    return 2 * (2 * row // heat.shape[0]) + 2 * column // heat.shape[1]


def missed_quarter(predictor: Predictor, picture: Image.Image, question: str) -> int:
    """The quarter without which the best answer loses most of its confidence."""
    best = predictor.answer(picture, question, top=1)[0].text
    pixels = np.array(picture)
    covered = []
    for quarter in range(4):
        row, column = (HALF * place for place in divmod(quarter, 2))
        without = pixels.copy()
        without[row : row + HALF, column : column + HALF] = pixels[0, 0]  # the ground, as shapes leave the corner free
        covered.append(without)
    told = [{each.text: each.confidence for each in answers} for answers in predictor.answer(covered, question)]
    return int(np.argmin([confidences.get(best, 0.0) for confidences in told]))


def pointing(predictor: Predictor, count: int, seed: int) -> dict[str, float]:
    """Shares of `count` questions, each in [0, 1].

    Returns: "map", where the map's largest value lies in the cell of the thing asked about; "painted over", where the
    quarter that is missed most is that cell; "both", where these two agree.
    """
    rng = random.Random(seed)
    by_map, by_loss, both = 0, 0, 0
    for scene in of_three(rng, count):
        picture = draw(scene, rng.choice(BACKGROUNDS["black"]), rng)
        thing = rng.choice(scene)
        question = question_about(thing, rng.random() < 0.5)
        seen = brightest_quarter(looked_at(predictor, picture, question).numpy())
        missed = missed_quarter(predictor, picture, question)
        by_map, by_loss, both = by_map + (seen == thing.cell), by_loss + (missed == thing.cell), both + (seen == missed)
    return {"map": by_map / count, "painted over": by_loss / count, "both": both / count}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.pointing", description="Where the page's map points.")
    parser.add_argument("checkpoint", help="of the demo, for answers")
    parser.add_argument("--count", type=int, default=200, help="questions (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other pictures (%(default)s)")
    given = parser.parse_args(arguments)
    try:
        shares = pointing(load(given.checkpoint), given.count, given.seed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"the map is brightest in the cell of the shape asked about: {shares['map']:.1%} (by chance 25 %)")
    print(f"the quarter that the answer misses most is that cell:      {shares['painted over']:.1%}")
    print(f"the two agree:                                             {shares['both']:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
