"""What the demo's pictures show: one to three coloured shapes, each in a cell of its own of a 2 x 2 grid."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

PICTURE_SIZE = 64  # pixels
SHAPES = ("circle", "square", "triangle")
COLORS = {"red": (214, 40, 40), "green": (38, 158, 72), "blue": (44, 92, 224), "yellow": (240, 190, 20)}
CELLS = ("top left", "top right", "bottom left", "bottom right")  # a cell is its place here: 2 x row + column
MAX_THINGS = 3
# All dark, and all colours brighter: a linear layer can tell a shape from its ground, whatever the colour. On light
# and dark grounds mixed, the tiny model takes several times as many steps to see shapes.
BACKGROUNDS = {
    "black": ((14, 14, 16), (24, 20, 22), (18, 24, 22)),
    "dark blue": ((18, 22, 50), (14, 28, 56), (26, 22, 54)),
}
BLIND_GREY = (128, 128, 128)

_SUPERSAMPLING = 4  # drawn larger and shrunk, for soft edges


@dataclass(frozen=True)
class Thing:
    """A coloured shape in a cell (index into `CELLS`)."""

    cell: int
    shape: str
    color: str


Scene = tuple[Thing, ...]  # 1 to MAX_THINGS things in different cells, in the order of cells


def all_scenes(n_things: int) -> list[Scene]:
    """Every scene of so many things: 48, 864 and 6912 for one, two and three."""
    looks = list(itertools.product(SHAPES, COLORS))
    return [
        tuple(Thing(cell, shape, color) for cell, (shape, color) in zip(cells, chosen, strict=True))
        for cells in itertools.combinations(range(len(CELLS)), n_things)
        for chosen in itertools.product(looks, repeat=n_things)
    ]


def share_out(shares: dict[str, float], rng: random.Random) -> dict[str, list[list[Scene]]]:
    """Deals every scene to exactly one name, in proportion to the shares (which sum to 1).

    Returns, for each name, a shuffled list of scenes for each number of things.
    """
    dealt: dict[str, list[list[Scene]]] = {name: [] for name in shares}
    for n_things in range(1, MAX_THINGS + 1):
        scenes = all_scenes(n_things)
        rng.shuffle(scenes)
        bounds = [round(len(scenes) * total) for total in itertools.accumulate(shares.values(), initial=0.0)]
        for name, (start, end) in zip(shares, itertools.pairwise(bounds), strict=True):
            dealt[name].append(scenes[start:end])
    return dealt


def pick_scenes(dealt: list[list[Scene]], count: int, rng: random.Random) -> list[Scene]:
    """So many scenes of one name's deal, of one, two and three things equally often; repeats only when all are used."""
    cycles = [itertools.cycle(scenes) for scenes in dealt]
    picked = [next(cycles[i % len(cycles)]) for i in range(count)]
    rng.shuffle(picked)
    return picked


def draw(scene: Scene, background: tuple[int, int, int], rng: random.Random) -> Image.Image:
    """The scene, 64 x 64 pixels; place within the cell, size and shade of each thing vary."""
    large = PICTURE_SIZE * _SUPERSAMPLING
    cell_size = large // 2
    image = Image.new("RGB", (large, large), background)
    pencil = ImageDraw.Draw(image)
    for thing in scene:
        radius = cell_size * rng.uniform(0.34, 0.42)
        room = (cell_size / 2 - radius) / 2
        row, column = divmod(thing.cell, 2)
        x = (column + 0.5) * cell_size + rng.uniform(-room, room)
        y = (row + 0.5) * cell_size + rng.uniform(-room, room)
        _draw_shape(pencil, thing.shape, x, y, radius, _vary(COLORS[thing.color], rng))
    return image.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX)


def _draw_shape(
    pencil: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, color: tuple[int, ...]
) -> None:
    """A shape within `radius` of its centre (x, y), in pixels."""
    if shape == "circle":
        pencil.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    elif shape == "square":
        half = 0.88 * radius
        pencil.rectangle((x - half, y - half, x + half, y + half), fill=color)
    else:
        assert shape == "triangle", shape
        pencil.polygon([(x, y - radius), (x - radius, y + 0.8 * radius), (x + radius, y + 0.8 * radius)], fill=color)


def _vary(color: tuple[int, int, int], rng: random.Random) -> tuple[int, ...]:
    return tuple(min(255, max(0, channel + rng.randint(-12, 12))) for channel in color)
