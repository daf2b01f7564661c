"""From what somebody names, or the folder of their data, to sources of rows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from beit3.data.findings import shown
from beit3.system.errors import InputError
from sources.look import look_at
from sources.readers import READERS
from sources.readers.vqa_pairs import VqaPairs
from sources.rows import SPLIT_OF, TRAIN, Id, Reading, Row, Source

METADATA = "metadata"  # the table of Hugging Face's "imagefolder"
# https://huggingface.co/docs/datasets/image_dataset
METADATA_ENDINGS = (".csv", ".jsonl", ".parquet")

# One of the Parquet files of a split, https://huggingface.co/docs/hub/datasets-file-names-and-splits
_SHARD = re.compile(r"(?P<split>[A-Za-z]+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.parquet")


def open_source(named: str, columns: Mapping[str, str] = {}, asks: bool | None = None) -> Source:
    """The source that is named: a file, "questions.json,annotations.json", or a folder with a table `metadata.*`.

    columns: what is wanted → how a table calls it, for tables; published formats have fixed names. asks: whether a
    table holds questions, where that must not follow from its columns. Raises InputError for what is not there or not
    readable.
    """
    path = Path(named)
    if os.path.isdir(path):  # unlike `Path.is_dir`, raises nothing where a name is too long
        found = [path / name for name in _names(path) if _is_metadata(name)]
        if len(found) == 1:
            return _table(found[0], columns, "", asks)
        wanted = f"{METADATA}{{{','.join(METADATA_ENDINGS)}}}"
        if found:
            raise InputError(f"{path}: {_listed(found)} are all there, and one is read; name the one, or remove others")
        raise InputError(f"{path}: a folder without a table {wanted}; name a table, or put one there")
    if os.path.isfile(path):
        return _open_file(path, columns, asks)
    if "," in named:
        return _open_pair(*named.split(","))
    raise InputError(f"{path}: no such file or folder")


def find_sources(folder: Path, columns: Mapping[str, str] = {}, asks: bool | None = None) -> dict[str, Source]:
    """Split → the source in a folder of own data; empty where there is none.

    It may hold `metadata.csv`, whose rows may say their split; or `train/`, `validation/`, `test/` with such a table in
    each; or tables `train.csv`, `val.jsonl`, `test.parquet.gz`, and so on; or shards `train-00000-of-00003.parquet`,
    in `data/` too. Raises InputError where a split has several of these, is not complete, or cannot be opened.
    """
    candidates = _candidates(folder)
    problems = [
        f"{folder}: {_listed([each.files[0] for each in several])} are all for {split}, and one is read; remove others"
        for split, several in candidates.items()
        if len(several) > 1
    ]
    for several in candidates.values():
        problems += [what for each in several for what in each.incomplete()]
    if problems:
        raise InputError(problems)
    found: dict[str, Source] = {}
    # Training first: a test may have nothing that tells questions from captions.
    for split, several in sorted(candidates.items(), key=lambda item: (item[0] != TRAIN, item[0])):
        try:
            known = found[TRAIN].asks if TRAIN in found else asks
            found[split] = _open_candidate(several[0], columns, known)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return found


def sources_here(folder: Path) -> bool:
    """Whether a folder holds own data, by names alone: whether `find_sources` finds any, or has something to mend."""
    return bool(_candidates(folder))


class ShardedSource:
    """Several sources one behind the other; a `sources.rows.Source`."""

    def __init__(self, parts: Sequence[Source]):
        self.parts = parts
        self.kind = f"{parts[0].kind} in {len(parts)} parts"
        self.files: Sequence[Path] = [path for part in parts for path in part.files]
        self.asks = parts[0].asks
        self.pictures_from = parts[0].pictures_from
        self.unpacked_bytes = sum(part.unpacked_bytes for part in parts)

    def rows(self, reading: Reading) -> Iterator[Row]:
        """All rows; their places name the file, and so do the pictures that it holds, as each may number its own."""
        places: dict[Id, str] = {}  # of questions; each part looks for doubled ones in its own file
        for part in self.parts:
            path = part.files[0]
            for row in part.rows(reading):
                if row.question_id is not None:
                    first = places.setdefault(row.question_id, path.name)
                    if first != path.name:
                        what = f"{path}: column question_id: stands in {first} too"
                        reading.findings.note(what, f"{row.place} has {shown(row.question_id)}")
                image = row.image if row.content is None else f"{path.stem}/{row.image}"
                yield row._replace(place=f"{path.name}, {row.place}", image=image)


class _Candidate(NamedTuple):
    """What may be the source of a split. prefix: the split's folder. shards: how many files there should be."""

    files: list[Path]
    prefix: str = ""
    shards: int = 0

    def incomplete(self) -> list[str]:
        if len(self.files) == self.shards or not self.shards:
            return []
        first = self.files[0]
        return [f"{first.parent}: {len(self.files)} of {self.shards} files like {first.name}; get the missing ones"]


def _candidates(folder: Path) -> dict[str, list[_Candidate]]:
    """Split → what may be its source, by names alone."""
    found: dict[str, list[_Candidate]] = {}
    for name in _names(folder):
        path, split = folder / name, SPLIT_OF.get(name.lower())
        if _is_metadata(name):
            found.setdefault(TRAIN, []).append(_Candidate([path]))
        elif split is not None and os.path.isdir(path):
            tables = [path / table for table in _names(path) if _is_metadata(table)]
            found.setdefault(split, []).extend(_Candidate([table], name) for table in tables)
        elif (split := _split_of_table(name)) is not None and os.path.isfile(path):
            found.setdefault(split, []).append(_Candidate([path]))
    for place in (folder, folder / "data"):
        shards: dict[tuple[str, str], list[Path]] = {}
        for name in _names(place):
            if match := _SHARD.fullmatch(name):
                shards.setdefault((match["split"], match["count"]), []).append(place / name)
        for (word, count), files in shards.items():
            if word.lower() in SPLIT_OF:
                found.setdefault(SPLIT_OF[word.lower()], []).append(_Candidate(files, shards=int(count)))
    return {split: several for split, several in found.items() if several}


def _open_candidate(candidate: _Candidate, columns: Mapping[str, str], asks: bool | None) -> Source:
    if candidate.shards:
        parts = [_table(path, columns, "", asks) for path in candidate.files]
        return parts[0] if len(parts) == 1 else ShardedSource(parts)
    [path] = candidate.files
    if not candidate.prefix:
        return _open_file(path, columns, asks)
    return _table(path, columns, f"{candidate.prefix}/", asks, path.parent.parent)


def _open_file(path: Path, columns: Mapping[str, str], asks: bool | None) -> Source:
    name = path.name.lower()
    if not name.endswith(wanted := _table_endings()):
        raise InputError(f"{path}: no table and no published format by its ending; wanted {', '.join(wanted)}")
    if not name.removesuffix(".gz").endswith((".json", ".jsonl")):
        return _table(path, columns, "", asks)
    look = look_at(path)
    if VqaPairs.annotates(look) and not VqaPairs.fits(look):
        raise InputError(f"{path}: holds annotations alone; name its questions, or both as QUESTIONS,ANNOTATIONS")
    # Columns are named for tables only: a list whose columns are named is one, whatever it looks like.
    if look.kind == "object" or not columns:
        for reader in READERS:
            if reader.fits(look):
                return reader(path)
    if look.kind == "object":
        keys = ", ".join(map(shown, list(look.inside)[:5])) or "none"
        known = ", ".join(reader.kind for reader in READERS)
        raise InputError(f"{path}: a JSON object of no known format (its first keys: {keys}); known are {known}")
    return _table(path, columns, "", asks)


def _open_pair(*names: str) -> Source:
    paths = [Path(name.strip()) for name in names]
    if missing := [f"{path}: no such file" for path in paths if not os.path.isfile(path)]:
        raise InputError(missing)
    questions = [path for path in paths if VqaPairs.fits(look_at(path))]
    annotations = [path for path in paths if VqaPairs.annotates(look_at(path))]
    if len(paths) == 2 and len(questions) == 1 and len(set(questions + annotations)) == 2:
        return VqaPairs(questions[0], annotations[0])
    raise InputError(
        f"{','.join(names)}: of files joined by a comma, one must hold `questions` and one `annotations` with "
        "`question_id` and `answers`, as VQA v2's do"
    )


def _table(
    path: Path, columns: Mapping[str, str], prefix: str, asks: bool | None, pictures_from: Path | None = None
) -> Source:
    from sources.tables import TableSource

    source = TableSource(path, columns, prefix, asks)
    if pictures_from is not None:
        source.pictures_from = pictures_from
    return source


def _table_endings() -> tuple[str, ...]:
    from sources.raw_tables import TABLE_ENDINGS

    return TABLE_ENDINGS


def _names(folder: Path) -> list[str]:
    """The names in a folder, sorted; none where there is no such folder, or it may not be listed."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []


def _is_metadata(name: str) -> bool:
    return name.lower() in {METADATA + ending for ending in METADATA_ENDINGS}


def _split_of_table(name: str) -> str | None:
    """The split of `train.csv`, `validation.jsonl.gz` and so on; None for other names."""
    name = name.lower()
    for ending in _table_endings():
        if name.endswith(ending):
            return SPLIT_OF.get(name.removesuffix(ending))
    return None


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(path.name if path.parent == paths[0].parent else str(path) for path in paths)
