"""Rows of the benchmark: two sides taking turns, what is made of their numbers, and the Markdown of it.

A `Row` is measured by itself: when it fails, the others go on. It gives `Line`s, one per line of the table.
"""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from beit3.system.atomic_files import atomic_write

logger = logging.getLogger(__name__)

HEADER = (
    "| path | this toolkit | the other way | ratio | wanted | met |",
    "|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Settings:
    """What a run measures.

    Attributes:
        quick: smaller sizes, fewer repeats.
        device: where the models are.
        folder: for files made on the spot; gone after the run.
    """

    quick: bool
    device: torch.device
    folder: Path

    repeats = 3  # timed calls of each side

    @property
    def many_repeats(self) -> int:
        """The same, where a call takes a second or less."""
        return 3 if self.quick else 9


@dataclass(frozen=True)
class Reach:
    """What performance asks of a line: of its ratio, or (`absolute`) of this toolkit's own number."""

    sign: str  # "≥" or "≤"
    value: float
    absolute: bool = False

    def met(self, line: Line) -> bool:
        number = statistics.median(line.ours) if self.absolute else line.ratio
        if number is None:
            raise ValueError(f"{line.what}: a ratio is wanted of a line that has one side only")
        return number >= self.value if self.sign == "≥" else number <= self.value


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        what: the path that was measured.
        unit: of the numbers.
        ours, peer: the number of each call; `peer` is empty where there is nothing to compare with.
        reach: what is wanted, None where nothing is.
    """

    what: str
    unit: str
    ours: Sequence[float]
    peer: Sequence[float] = ()
    reach: Reach | None = None

    @property
    def ratio(self) -> float | None:
        """This toolkit's median divided by the other's."""
        return statistics.median(self.ours) / statistics.median(self.peer) if self.peer else None

    def markdown(self) -> str:
        ratio = "–" if self.ratio is None else f"{_short(self.ratio)}×"
        wanted = met = "–"
        if self.reach is not None:
            wanted = f"{self.reach.sign} {_short(self.reach.value)}" + (f" {self.unit}" if self.reach.absolute else "×")
            met = "yes" if self.reach.met(self) else "**no**"
        sides = (_side(numbers, self.unit) for numbers in (self.ours, self.peer))
        return f"| {' | '.join([self.what, *sides, ratio, wanted, met])} |"


@dataclass(frozen=True)
class Row:
    """Something to measure; `measure` raises when it cannot, or when the two sides disagree."""

    name: str
    measure: Callable[[], list[Line]]


def run_row(row: Row) -> tuple[list[str], bool]:
    """Measure a row: its lines as Markdown, and whether it went well."""
    started = time.perf_counter()
    try:
        lines = [line.markdown() for line in row.measure()]
    except Exception as error:  # whatever it is, the other rows are measured all the same
        logger.exception("%s failed", row.name)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].replace("|", "/")
        return [f"| {row.name} | failed: {reason} | – | – | – | **no** |"], False
    finally:
        gc.collect()
    logger.info("%s: %.0f s", row.name, time.perf_counter() - started)
    return lines, True


def interleave(
    sides: Sequence[Callable[[], object]], repeats: int, device: torch.device | None = None
) -> list[list[float]]:
    """Seconds of each call of each side; they take turns (A B A B …) after one call of each to warm up."""
    for call in sides:
        seconds(call, device)
    rounds = [[seconds(call, device) for call in sides] for _ in range(repeats)]
    return [list(times) for times in zip(*rounds, strict=True)]


def seconds(call: Callable[[], object], device: torch.device | None = None) -> float:
    """How long a call takes, a GPU's work included."""
    wait = torch.cuda.synchronize if device is not None and device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


def rates(amount: float, times: Sequence[float]) -> list[float]:
    """Amount per second, for each time."""
    return [amount / each for each in times]


def write_sections(path: Path, title: str, sections: dict[str, list[str]], order: Sequence[str]) -> None:
    """Write the sections (heading → lines) into a Markdown file; those it has already and that are not new, stay."""
    kept = read_sections(path) | sections
    with atomic_write(path) as file:
        file.write(title.rstrip() + "\n")
        for name in order:
            if name in kept:
                file.write("\n".join(["", f"## {name}", "", *kept[name]]) + "\n")


def read_sections(path: Path) -> dict[str, list[str]]:
    """Heading → lines of a file of `write_sections`; empty when there is no file."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return {part.splitlines()[0]: part.strip().splitlines()[2:] for part in text.split("\n## ")[1:]}


def _side(numbers: Sequence[float], unit: str) -> str:
    """Median and range."""
    if not numbers:
        return "–"
    middle = f"{_short(statistics.median(numbers))} {unit}"
    return middle if len(numbers) == 1 else f"{middle} ({_short(min(numbers))}–{_short(max(numbers))})"


def _short(number: float) -> str:
    """Three significant digits, no exponent."""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"
