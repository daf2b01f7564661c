"""What the indexes of own data share: when one is made, kept, made again or refused, and what stands around that."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit3.data import index_writing as writing
from beit3.data.index_description import Fit, hash_of_file, look, make_unless_it_fits, said_of
from beit3.data.tokenizer import BatchEncoder, as_batch_encoder
from beit3.system.errors import InputError, printable
from beit3.system.flags import checked, flags_of
from sources.gathering import Gathered, NoSource, gathered, home_of, sources_of
from sources.rows import Source
from sources.settings import AnswerSettings, SourceSettings, chosen

Writer = Callable[[Path, Mapping[str, Source], Any, Any, "Path | None", "bool | None"], None]


@dataclass(frozen=True)
class IndexKind:
    """An index that is made from own data.

    Attributes:
        asks: whether its rows are questions.
        needed: its files, without any of which it is none; further: those that may be there besides.
        description: the file that says what it was made from.
        version: of its maker; raised with every change of what is written.
        write: its maker, called with the folder, the sources, the settings, the tokenizer, the folder of the pictures
            (None: that of the table) and whether to show a bar.
    """

    asks: bool
    needed: Sequence[str]
    further: Sequence[str]
    description: str
    version: int
    write: Writer


def make_if_needed(kind: IndexKind, settings: SourceSettings, data: Path, tokenizer: str, images: Path | None) -> None:
    """Make the index of a command line in `data`, unless it is there and fits; an index without its sources is kept."""
    try:
        sources = sources_of(settings, data, kind.asks)
    except NoSource:
        if not all((data / name).is_file() for name in kind.needed):
            raise
        return  # made by hand, perhaps
    files = [file for source in sources.values() for file in source.files]
    asked = hash_of_file(tokenizer)
    with _folder_for(data):
        make_unless_it_fits(
            data,
            kind.needed,
            lambda: _fit(kind, settings, data, files, asked),
            lambda: kind.write(data, sources, settings, tokenizer, images or home_of(sources), None),
            files,
        )


def make_from_python(
    kind: IndexKind,
    settings: type[SourceSettings],
    tokenizer: Any,
    data_path: str | os.PathLike[str] | None,
    image_path: str | os.PathLike[str] | None,
    progress: bool | None,
    **choices: Any,
) -> None:
    """Make the index of a call in Python. choices: values of flags, and paths under the names of the splits."""
    kinds = (each for each in (SourceSettings, AnswerSettings) if issubclass(settings, each))
    known = [each.name for one in kinds for each in flags_of(one)]
    given = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in choices.items()}
    asked = checked(settings, known, **given)
    if not asked.train:
        raise InputError("train: a table, a JSON file, a pair of them joined by a comma, or a folder is wanted")
    sources = sources_of(asked, None, kind.asks)
    data = home_of(sources) if data_path is None else Path(data_path)
    with _folder_for(data):
        kind.write(data, sources, asked, tokenizer, None if image_path is None else Path(image_path), progress)


@contextmanager
def making(
    kind: IndexKind,
    data: Path,
    sources: Mapping[str, Source],
    settings: SourceSettings,
    tokenizer: Any,
    images: Path | None,
    progress: bool | None,
) -> Iterator[tuple[Gathered, BatchEncoder]]:
    """The rows of an index that is being made, and what tokenizes their texts.

    Raises:
        InputError: listing all that is wrong with the sources, before the block begins.
    """
    encode = as_batch_encoder(tokenizer)
    writing.check_inputs([] if images is None else [images], {}, data)
    _refuse_foreign(kind, data)
    files = [file for source in sources.values() for file in source.files]
    with (
        writing.progress_bar("index", files, progress) as bar,
        gathered(sources, settings, data, images, bar) as made,
    ):
        made.reading.findings.raise_any()
        yield made, encode


@contextmanager
def _folder_for(data: Path) -> Iterator[None]:
    """Make the folder of an index; folders that were not there before are taken away again where the block fails."""
    new = [folder for folder in (data, *data.parents) if not folder.exists()]
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{data}: cannot be made ({error.strerror}); name another folder: DATA_PATH=…") from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # one that is not empty stays
            for folder in new:
                folder.rmdir()
        raise


def _fit(
    kind: IndexKind, settings: SourceSettings, data: Path, files: Sequence[Path], tokenizer: tuple[str, str]
) -> Fit:
    """Whether the index in `data` still is what these sources and choices give."""
    fit = look(data, kind.description, kind.version, tokenizer=tokenizer, thorough=True)
    before = said_of(data, kind.description, "chosen", {})
    changed = [f"--{name} was {before.get(name)}" for name, now in chosen(settings).items() if before.get(name) != now]
    if before and changed:
        fit.stale.append(", ".join(changed))
    made_from = said_of(data, kind.description, "official_files", {})
    if before and {(data / name).resolve() for name in made_from} != {file.resolve() for file in files}:
        fit.stale.append(f"it was made from {printable(', '.join(made_from))[:200]}")
    return fit


def _refuse_foreign(kind: IndexKind, data: Path) -> None:
    """Raise an InputError where index files would be overwritten that were not made from own data."""
    there = [name for name in (*kind.needed, *kind.further) if (data / name).exists()]
    if there and not said_of(data, kind.description, "chosen", {}):
        raise InputError(
            f"{data}: {', '.join(there)} is there and was not made from a table; move it, or choose another folder "
            "for the index: DATA_PATH=…"
        )
