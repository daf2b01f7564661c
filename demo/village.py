"""The pictures of the demo of own data: a house in a landscape, with a tree, a car, an animal and something that flies.

What is asked about covers much of the picture or has colours of its own, and things that vary less in place are easier
to learn to see: a tiny model that starts from nothing sees them after a few hundred pictures.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from PIL import Image, ImageDraw

Color = tuple[int, int, int]

PICTURE_SIZE = (192, 144)  # width and height in pixels
_WIDTH, _HEIGHT = 64, 48  # of the drawing in units of its own, as all lengths below
_SUPERSAMPLING = 2  # drawn larger and shrunk, for soft edges
_PIXELS = PICTURE_SIZE[0] // _WIDTH * _SUPERSAMPLING  # per unit
_HORIZON = 33
_FLOOR = 8  # height of a storey
_HALF_HOUSE = 10  # half of its width

_MIDDLE, _BESIDE, _ABOVE = 32, (10, 54), (8, 56)  # x of house and animal, of car and tree, of what flies
FLOORS = (1, 2, 3)
COLORS: dict[str, Color] = {
    "red": (205, 30, 35),
    "yellow": (245, 205, 40),
    "green": (20, 130, 60),
    "blue": (35, 75, 215),
    "white": (250, 250, 250),
    "purple": (130, 45, 165),
}
SKIES: dict[str, tuple[Color, Color]] = {  # at the top and at the horizon
    "day": ((80, 165, 245), (180, 220, 250)),
    "evening": ((170, 110, 190), (255, 190, 175)),
    "night": ((8, 10, 40), (30, 35, 85)),
}
SEASONS: dict[str, tuple[Color, Color]] = {  # the ground, the leaves
    "spring": ((150, 215, 110), (250, 170, 205)),
    "summer": ((75, 150, 60), (30, 105, 45)),
    "autumn": ((190, 140, 70), (215, 95, 20)),
    "winter": ((205, 220, 240), (240, 246, 252)),
}
_WOOD, _ROOF, _DARK, _LIGHT = (110, 70, 40), (225, 100, 50), (25, 25, 30), (255, 235, 150)


@dataclass(frozen=True)
class Scene:
    """What a picture shows; every field is a key of a table here."""

    time: str  # of SKIES
    season: str  # of SEASONS
    behind: str  # of VIEWS
    floors: int  # of FLOORS
    color: str  # of COLORS: the walls
    car: str  # of COLORS
    animal: str  # of ANIMALS
    flyer: str  # of FLYERS
    fence: bool


class _Pencil:
    """Draws in units, so many times as large, around a point that is the origin."""

    def __init__(self, image: Image.Image, x: float = 0, y: float = 0, scale: float = 1):
        self.image, self.x, self.y, self.scale = image, x, y, scale
        self.draw = ImageDraw.Draw(image)

    def at(self, x: float, y: float, scale: float = 1) -> _Pencil:
        return _Pencil(self.image, x, y, scale)

    def _pixels(self, *corners: float) -> list[float]:
        return [(value * self.scale + (self.y if i % 2 else self.x)) * _PIXELS for i, value in enumerate(corners)]

    def box(self, color: Color, *corners: float) -> None:
        self.draw.rectangle(self._pixels(*corners), fill=color)

    def oval(self, color: Color, x: float, y: float, across: float, down: float | None = None) -> None:
        """Around (x, y), so far to each side."""
        down = across if down is None else down
        self.draw.ellipse(self._pixels(x - across, y - down, x + across, y + down), fill=color)

    def polygon(self, color: Color, *corners: float) -> None:
        self.draw.polygon(self._pixels(*corners), fill=color)

    def line(self, color: Color, width: float, *corners: float) -> None:
        self.draw.line(self._pixels(*corners), fill=color, width=round(width * self.scale * _PIXELS))


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene, an RGB picture of PICTURE_SIZE; exact places, shades and the side of each thing vary."""
    image = Image.new("RGB", (_WIDTH * _PIXELS, _HEIGHT * _PIXELS))
    pencil = _Pencil(image)
    shade = partial(_shade, rng)
    _draw_sky(pencil, scene.time, rng)
    ground, leaves = SEASONS[scene.season]
    VIEWS[scene.behind](pencil.at(0, _HORIZON), rng)
    pencil.oval(shade(ground), rng.uniform(10, 54), _HORIZON + 12, 60, 15)
    pencil.box(shade(ground), 0, _HORIZON + 3, _WIDTH, _HEIGHT)
    FLYERS[scene.flyer](pencil.at(rng.choice(_ABOVE) + rng.uniform(-1, 1), 6.5 + rng.uniform(-0.7, 0.7)))
    _draw_tree(pencil.at(rng.choice(_BESIDE) + rng.uniform(-2, 2), _HORIZON + 1), shade(leaves))
    _draw_house(pencil.at(_MIDDLE + rng.uniform(-3, 3), _HORIZON + 1), shade(COLORS[scene.color]), scene)
    if scene.fence:
        _draw_fence(pencil.at(0, _HORIZON - 2))
    _draw_car(pencil.at(rng.choice(_BESIDE) + rng.uniform(-1, 2), 44 + rng.uniform(-1, 1)), shade(COLORS[scene.car]))
    ANIMALS[scene.animal](pencil.at(_MIDDLE + rng.uniform(-3, 3), 44 + rng.uniform(-1, 1), 1.25))
    return image.resize(PICTURE_SIZE, Image.Resampling.BOX)


def _shade(rng: random.Random, color: Color) -> Color:
    red, green, blue = (min(255, max(0, channel + rng.randint(-10, 10))) for channel in color)
    return red, green, blue


def _draw_sky(pencil: _Pencil, time: str, rng: random.Random) -> None:
    top, bottom = SKIES[time]
    steps = 24
    for step in range(steps):
        part = step / (steps - 1)
        red, green, blue = (round(a + (b - a) * part) for a, b in zip(top, bottom, strict=True))
        pencil.box((red, green, blue), 0, step * 36 / steps, _WIDTH, (step + 1) * 36 / steps)
    if time == "night":
        for _ in range(25):
            pencil.oval(_LIGHT, rng.uniform(0, _WIDTH), rng.uniform(0, _HORIZON), 0.25)


def _draw_mountains(pencil: _Pencil, rng: random.Random) -> None:
    shift = rng.uniform(-3, 3)
    for place, high in ((-2, 15), (13, 20), (50, 20), (66, 15)):
        x = place + shift
        pencil.polygon((95, 100, 115), x - 15, 3, x, -high, x + 15, 3)
        pencil.polygon((245, 248, 252), x - 4, 4 * high / 15 - high, x, -high, x + 4, 4 * high / 15 - high)


def _draw_sea(pencil: _Pencil, rng: random.Random) -> None:
    pencil.box((25, 120, 175), 0, -10, _WIDTH, 3)
    for x in (rng.uniform(4, 18), rng.uniform(46, 60)):
        pencil.polygon((255, 255, 255), x, -17, x + 5, -9.5, x, -9.5)
        pencil.polygon(_WOOD, x - 3, -9, x + 5, -9, x + 3.5, -7, x - 2, -7)


def _draw_forest(pencil: _Pencil, rng: random.Random) -> None:
    for x in range(-2, _WIDTH + 3, 5):
        high = rng.uniform(15, 18)
        pencil.polygon((10, 70, 50), x - 4, 3, x, -high, x + 4, 3)


def _draw_tree(pencil: _Pencil, leaves: Color) -> None:
    pencil.box(_WOOD, -1, -9, 1, 1)
    for x, y, radius in ((-2.5, -10, 4), (2.5, -10, 4), (0, -14, 5)):
        pencil.oval(leaves, x, y, radius)


def _draw_house(pencil: _Pencil, walls: Color, scene: Scene) -> None:
    half, top = _HALF_HOUSE, -_FLOOR * scene.floors
    pencil.box(_WOOD, 4, top - 7, 6.5, top)
    pencil.box(walls, -half, top, half, 1)
    pencil.polygon(_ROOF, -half - 2, top, -half + 4, top - 6, half - 4, top - 6, half + 2, top)
    pane = _DARK if scene.time == "day" else _LIGHT
    for floor in range(scene.floors):
        for x in (-6, 0, 6):
            if floor == 0 and x == 0:
                pencil.box(_WOOD, -1.7, -5.5, 1.7, 1)
            else:
                pencil.box(pane, x - 1.5, -_FLOOR * floor - 6, x + 1.5, -_FLOOR * floor - 2.5)


def _draw_fence(pencil: _Pencil) -> None:
    for y in (1.2, 3.6):
        pencil.box(_WOOD, 0, y, _WIDTH, y + 0.8)
    for post in range(1, _WIDTH, 3):
        pencil.box(_WOOD, post, 0, post + 1.2, 6)


def _draw_car(pencil: _Pencil, color: Color) -> None:
    pencil.polygon(color, -5, -3.5, -3.5, -7.5, 2.5, -7.5, 5, -3.5)
    pencil.box(color, -8, -4.5, 8, 0)
    pencil.box((190, 225, 240), -3, -6.6, -0.6, -4.3)
    pencil.polygon((190, 225, 240), 0.2, -6.6, 2, -6.6, 3.5, -4.3, 0.2, -4.3)
    for x in (-4.5, 4.5):
        pencil.oval(_DARK, x, 0, 2)
        pencil.oval((200, 200, 200), x, 0, 0.9)


def _eye(pencil: _Pencil, x: float, y: float) -> None:
    pencil.oval((255, 255, 255), x, y, 0.7)
    pencil.oval(_DARK, x + 0.2, y, 0.4)


def _draw_pig(pencil: _Pencil) -> None:
    pink, dark = (250, 150, 170), (225, 105, 135)
    for x in (-4, -2, 1.5, 3.5):
        pencil.box(dark, x - 0.7, -1, x + 0.7, 2)
    pencil.oval(pink, -0.5, -3, 6, 4)
    pencil.oval(pink, 5, -4.5, 3)
    pencil.polygon(dark, 3, -6.5, 3.5, -9, 5.2, -7)
    pencil.oval(dark, 7.2, -4, 1.2, 1.4)
    pencil.line(dark, 0.6, -6.3, -3.5, -7.6, -4.6, -6.8, -5.6)
    _eye(pencil, 5.2, -5.2)


def _draw_duck(pencil: _Pencil) -> None:
    yellow = (255, 225, 30)
    pencil.polygon(yellow, -4, -3, -8, -6, -5, 0)
    pencil.oval(yellow, -0.5, -1.8, 6, 3.7)
    pencil.oval(yellow, 4, -6.5, 3.2)
    pencil.polygon((240, 120, 20), 6.4, -7.4, 9.4, -6, 6.4, -5)
    pencil.oval((225, 185, 10), -1.5, -2, 3, 1.8)
    _eye(pencil, 4.7, -7.4)


def _draw_cat(pencil: _Pencil) -> None:
    black = (15, 15, 20)
    pencil.line(black, 1.4, -5, -2, -7.5, -5, -6.5, -9)
    for x in (-4, -2.2, 1.5, 3.3):
        pencil.box(black, x - 0.7, -1, x + 0.7, 2)
    pencil.oval(black, -0.5, -2.5, 5.5, 3)
    pencil.oval(black, 4.5, -5.5, 3.2)
    pencil.polygon(black, 1.8, -6.5, 2.2, -10.3, 4.4, -8)
    pencil.polygon(black, 7.2, -6.5, 6.8, -10.3, 4.6, -8)
    for x in (3.4, 5.8):
        pencil.oval((190, 240, 60), x, -6, 0.7)


def _draw_fox(pencil: _Pencil) -> None:
    orange = (240, 115, 25)
    pencil.polygon(orange, -4, -3, -9, -7, -9, -2, -5, 0)
    pencil.polygon((255, 255, 255), -9, -7, -9, -2, -7.4, -3.5)
    for x in (-3.6, -2, 1.5, 3.1):
        pencil.box(_WOOD, x - 0.6, -1, x + 0.6, 2)
    pencil.oval(orange, -0.5, -2.7, 5.2, 2.8)
    pencil.polygon(orange, 2, -10, 4, -8, 6, -10, 7.5, -6, 4.2, -2, 1, -6)
    pencil.polygon((255, 255, 255), 2.2, -4.7, 4.2, -5.5, 6.2, -4.7, 4.2, -2)
    pencil.oval(_DARK, 4.2, -2.2, 0.7)
    for x in (3, 5.4):
        pencil.oval(_DARK, x, -6.4, 0.5)


def _draw_elephant(pencil: _Pencil) -> None:
    grey, dark = (125, 140, 165), (95, 110, 135)
    for x in (-5, -2.5, 1, 3):
        pencil.box(dark, x - 1, -2, x + 1, 2)
    pencil.oval(grey, -1.5, -4, 6.2, 4.5)
    pencil.oval(grey, 4.5, -6, 3.8)
    pencil.oval(dark, 2.3, -6, 2.2, 3)
    pencil.line(grey, 1.6, 7.2, -5, 8.4, -2, 7.8, 1.5)
    _eye(pencil, 5.8, -7)


def _draw_balloon(pencil: _Pencil) -> None:
    pencil.oval((225, 25, 40), 0, -0.5, 7, 6)
    pencil.oval((255, 200, 60), 0, -0.5, 1.5, 6)
    pencil.line(_DARK, 0.3, -3.5, 4, -1.3, 7.5)
    pencil.line(_DARK, 0.3, 3.5, 4, 1.3, 7.5)
    pencil.box(_WOOD, -1.5, 7.5, 1.5, 9.5)


def _draw_plane(pencil: _Pencil) -> None:
    white, grey = (250, 250, 252), (215, 220, 230)
    pencil.polygon(grey, -6, -1, -8, -6, -5.5, -6, -3, -1.5)
    pencil.oval(white, 0, 0, 8, 3)
    pencil.polygon(grey, -1, 0.5, 3, 0.5, -2, 6.5, -5, 6.5)
    for x in (-3.5, -1.5, 0.5, 2.5):
        pencil.oval((60, 90, 140), x, -0.9, 0.55)
    pencil.polygon((60, 90, 140), 5, -1.4, 6.6, -1.4, 7.2, -0.2, 5, -0.2)


def _draw_kite(pencil: _Pencil) -> None:
    yellow, orange = (255, 220, 30), (250, 165, 20)
    pencil.polygon(yellow, 0, -6.5, 7, -1, 0, 6, -7, -1)
    pencil.polygon(orange, 0, -6.5, 7, -1, 0, -1)
    pencil.polygon(orange, 0, 6, -7, -1, 0, -1)
    pencil.line(yellow, 0.5, 0, 6, 1.5, 8, -0.5, 9.5, 1, 12)


def _draw_ufo(pencil: _Pencil) -> None:
    pencil.oval((200, 245, 250), 0, -2, 4, 4)
    pencil.oval((60, 200, 60), 0, -1.7, 2, 2.6)
    for x in (-0.8, 0.8):
        pencil.oval(_DARK, x, -2.6, 0.5, 0.8)
    pencil.oval((45, 220, 70), 0, 2, 8, 3.5)
    for x in (-5, -1.7, 1.7, 5):
        pencil.oval((255, 245, 90), x, 2.4, 0.9)


VIEWS: dict[str, Callable[[_Pencil, random.Random], None]] = {
    "mountains": _draw_mountains,
    "sea": _draw_sea,
    "forest": _draw_forest,
}
ANIMALS: dict[str, Callable[[_Pencil], None]] = {
    "pig": _draw_pig,
    "duck": _draw_duck,
    "cat": _draw_cat,
    "fox": _draw_fox,
    "elephant": _draw_elephant,
}
FLYERS: dict[str, Callable[[_Pencil], None]] = {
    "balloon": _draw_balloon,
    "plane": _draw_plane,
    "kite": _draw_kite,
    "ufo": _draw_ufo,
}
