"""From sources to the rows of an index: read, each with its picture found, and shared out among the splits."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beit3.data.findings import shown
from beit3.data.index_description import describe_index
from beit3.data.picture_files import HEAD, describe_stranger
from beit3.system.errors import InputError, printable
from sources.columns import parse_columns
from sources.opening import find_sources, open_source
from sources.pictures import PictureFinder, choose_pictures, same_content, unpacked_name
from sources.rows import SPLITS, TRAIN, VAL, Reading, Row, Source
from sources.settings import SourceSettings, chosen

ASIDE = ".unpacking-pictures."  # what the names of folders begin with in which they are unpacked
UNPACKED = "pictures"  # folder beside the index for pictures that a source holds itself
GIGABYTE = 1e9
USUAL = 64  # `--num_max_bpe_tokens` where nobody says otherwise
_SIDES = re.compile(r"\b(left|right|links|rechts|gauche|droite|izquierda|derecha)\b", re.IGNORECASE)


class NoSource(InputError):
    """Nothing is named, and the folder holds no table."""


Pictured = tuple[Row, str]  # a row and its picture, as a path from the folder of pictures


def sources_of(settings: SourceSettings, data: Path | None, asks: bool | None) -> dict[str, Source]:
    """Split → its source: those that are named, else what lies in `data`.

    asks: whether questions are wanted, else captions; None: the columns say.

    Raises:
        InputError: listing all that is wrong with them; none for training.
    """
    columns = parse_columns(settings.columns) if settings.columns else {}
    named = settings.named()
    if not named:
        found = {} if data is None or not data.is_dir() else find_sources(data, columns, asks)
        if TRAIN not in found:
            raise NoSource(
                f"{data}: holds no table of own data: metadata.csv, .jsonl or .parquet, or train.csv and the like; "
                "name one: TRAIN=table.csv, or --train table.csv"
            )
        return found
    opened: dict[str, Source] = {}
    problems: list[str] = []
    for split, name in named.items():  # training first: a test may have nothing that tells questions from captions
        try:
            opened |= _opened(split, name, columns, opened[TRAIN].asks if TRAIN in opened else asks)
        except InputError as error:
            problems += error.problems
    if TRAIN not in named:
        problems.append(f"--{next(iter(named))} needs --train beside it")
    if problems:
        raise InputError(problems)
    if len({source.asks for source in opened.values()}) > 1:
        kinds = ", ".join(f"{split} has {'questions' if s.asks else 'captions'}" for split, s in opened.items())
        raise InputError(f"the sources do not go together: {kinds}")
    return opened


def _opened(split: str, name: str, columns: Mapping[str, str], asks: bool | None) -> dict[str, Source]:
    if split == TRAIN and Path(name).is_dir() and TRAIN in (found := find_sources(Path(name), columns, asks)):
        return found
    return {split: open_source(name, columns, asks)}


def home_of(sources: Mapping[str, Source]) -> Path:
    """The folder beside the training table, where its index goes when nobody says otherwise."""
    return sources[TRAIN].pictures_from


@dataclass
class Gathered:
    """What an index is made from.

    Attributes:
        rows: split → its rows, in the order of the sources.
        root: the folder that the paths of the pictures start from.
        drawn: whether validation was drawn from the training rows.
        aside: where pictures that the sources hold themselves were unpacked; None: they hold none.
    """

    sources: Mapping[str, Source]
    root: Path
    reading: Reading
    rows: dict[str, list[Pictured]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    drawn: bool = False
    aside: Path | None = None

    def keep_pictures(self) -> None:
        """Give unpacked pictures their names; to be called before an index that names them appears."""
        if self.aside is not None:
            (self.root / UNPACKED).mkdir(exist_ok=True)
            for file in self.aside.iterdir():
                os.replace(file, self.root / UNPACKED / file.name)

    @property
    def files(self) -> list[Path]:
        return list(dict.fromkeys(file for source in self.sources.values() for file in source.files))

    @property
    def splits(self) -> list[str]:
        return [split for split in SPLITS if self.rows[split]]

    def sides(self) -> int:
        """Training rows that say left or right: mirrored pictures would teach them wrong."""
        return sum(
            any(_SIDES.search(text) for text in (row.question or "", *(row.answers or ()), *row.captions))
            for row, _ in self.rows[TRAIN]
        )

    def table(self) -> Path:
        """The file to name where a mistake is one of all rows together."""
        return self.sources[TRAIN].files[0]

    def describe(self, data: Path, version: int, files: Mapping[str, Any], settings: Any, **more: Any) -> str:
        """The text of the index's description, see `describe_index`."""
        said = {"chosen": chosen(settings), "sides": self.sides(), **more}
        return describe_index(data, version, files, self.files, {}, **said)


@contextmanager
def gathered(
    sources: Mapping[str, Source], settings: SourceSettings, data: Path, images: Path | None, bar: Any
) -> Iterator[Gathered]:
    """All rows with their pictures, for as long as the block lasts; mistakes are in its `reading.findings`.

    Pictures that a source holds itself are unpacked, and stay where the block calls `Gathered.keep_pictures`.
    images: holds the pictures; None: the folder of the training table.
    """
    unpacks = sum(source.unpacked_bytes for source in sources.values())
    root = data if unpacks else images or home_of(sources)
    made = Gathered(sources, root, Reading(on_bytes=bar.update))
    if not unpacks:
        _read(made, settings)
        yield made
        return
    if (data / UNPACKED).exists() and not (data / UNPACKED).is_dir():
        raise InputError(f"{data / UNPACKED}: is a file where the folder for pictures goes; name another DATA_PATH")
    for left in data.glob(f"{ASIDE}*"):  # of a making that was killed
        shutil.rmtree(left, ignore_errors=True)
    _tell_room(unpacks, data)
    made.aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=data))
    try:
        _read(made, settings)
        yield made
    finally:
        shutil.rmtree(made.aside, ignore_errors=True)


def _tell_room(unpacks: int, data: Path) -> None:
    free = shutil.disk_usage(data).free
    print(f"unpacking the pictures to {data / UNPACKED}: about {unpacks / GIGABYTE:.1f} GB, {free / GIGABYTE:.1f} free")
    if unpacks > free:
        raise InputError(f"{data}: has no room for {unpacks / GIGABYTE:.1f} GB of pictures; name another DATA_PATH")


def _read(made: Gathered, settings: SourceSettings) -> None:
    """Read every source, and draw validation where no row is for it."""
    finder, findings = PictureFinder(made.root), made.reading.findings
    for split, source in made.sources.items():
        before = sum(map(len, made.rows.values()))
        for row in source.rows(made.reading):
            if row.content is None and source.unpacked_bytes:
                what = f"{source.files[0]}: column image: names a picture without holding it, as it holds others"
                findings.note(what, f"{row.place} has {shown(row.image)}")
                continue
            path = finder.find(row) if row.content is None else _unpacked(row, made.aside, source, made.reading)
            if path is None:
                _note_missing(row, source, made, settings.skip_missing)
            else:
                belongs = (row.split or split) if split == TRAIN else split
                made.rows[belongs].append((row if row.content is None else row._replace(content=None), path))
        if sum(map(len, made.rows.values())) == before and not findings.counts and not findings.broken_files:
            findings.broken_files.append(f"{source.files[0]}: no row is left of it for {split}")
    if findings.counts or findings.broken_files:
        return
    if made.rows[TRAIN] and not any(row.weight for row, _ in made.rows[TRAIN]):
        findings.broken_files.append(f"{made.table()}: column weight: is 0 in all training rows, so none would count")
    if not made.rows[TRAIN]:
        findings.broken_files.append(f"{made.table()}: no row is for training; the column split names other splits")
    elif not made.rows[VAL]:
        _draw_validation(made, settings)


def _draw_validation(made: Gathered, settings: SourceSettings) -> None:
    same = same_content(made.root, (path for _, path in made.rows[TRAIN]))
    kept = choose_pictures(same, settings.val_fraction, settings.val_seed)
    if not kept:
        made.reading.findings.broken_files.append(
            f"{made.table()}: all its rows show one picture, so none is left to validate with; add others, or name "
            "a table for validation: --val"
        )
        return
    made.drawn, rows = True, made.rows[TRAIN]
    made.rows[VAL] = [each for each in rows if each[1] in kept]
    made.rows[TRAIN] = [each for each in rows if each[1] not in kept]


def _note_missing(row: Row, source: Source, made: Gathered, skip: bool) -> None:
    if row.content is not None:
        return  # noted already
    named = shown(row.image or row.image_id)
    if skip:
        made.reading.leave_out("its picture is missing", source.files[0], f"{row.place}, {named}")
    else:
        what = f"{source.files[0]}: column image: no such picture below {made.root}"
        made.reading.findings.note(what, f"{row.place} has {named}")


def _unpacked(row: Row, aside: Path | None, source: Source, reading: Reading) -> str | None:
    """Write a row's own picture; its path. None where it is none, which is noted."""
    assert row.content is not None and aside is not None
    name = unpacked_name(row.content, row.image)
    if name is None:
        stranger = describe_stranger(row.content[:HEAD])
        reading.findings.note(f"{source.files[0]}: column image: no picture", f"{row.place} is {stranger}")
        return None
    if not (aside / name).exists():
        (aside / name).write_bytes(row.content)
    return f"{UNPACKED}/{name}"


# What people see


def summary_of_left_out(reading: Reading) -> list[str]:
    """A line for each reason, with the first places."""
    return [
        f"{count} rows left out, {why}: {printable('; '.join(reading.examples[why]))}"
        + (f" and {count - len(reading.examples[why])} more" if count > len(reading.examples[why]) else "")
        for why, count in reading.left_out.items()
    ]


def told_in_rows(made: Gathered, split: str, what: str) -> str:
    """`810 questions of 270 pictures`, of a split."""
    rows = made.rows[split]
    drawn = " (drawn by picture from the training rows)" if split == VAL and made.drawn else ""
    return f"{len(rows)} {what} of {len({path for _, path in rows})} pictures{drawn}"


@dataclass
class Lengths:
    """Tokens of texts."""

    longest: int = 0
    texts: int = 0
    tokens: int = 0
    long: int = 0

    def add(self, length: int) -> None:
        length += 2  # at the ends, which the model wants
        self.longest, self.texts, self.tokens = max(self.longest, length), self.texts + 1, self.tokens + length
        self.long += length > USUAL

    def line(self) -> str:
        """A line for people."""
        cut = f"; {self.long} have more than {USUAL}, beyond which --num_max_bpe_tokens cuts" if self.long else ""
        return f"texts have {self.tokens / max(self.texts, 1):.1f} tokens, the longest {self.longest}{cut}"
