"""Makes the index of people's own captions from plain rows (`sources`), all files or none."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from beit3.data import index_writing as writing
from beit3.data.findings import MAX_ID, shown
from beit3.data.index_description import tokenizer_hash
from beit3.data.tokenizer import BatchEncoder
from beit3.system.atomic_files import atomic_writes
from sources.gathering import Gathered, Lengths, summary_of_left_out, told_in_rows
from sources.making import IndexKind, making
from sources.rows import SPLITS, TEST, TRAIN, VAL, Row, Source
from tasks.captioning.index import OWN, description_file, ground_truth_file, index_file

VERSION = 1  # of the maker; raise it with every change of what is written

Picture = tuple[str, list[tuple[str, float, Row]]]  # its path; its captions, each with weight and row


def write_index(
    data: Path,
    sources: Mapping[str, Source],
    settings: Any,
    tokenizer: Any,
    images: Path | None,
    progress: bool | None = None,
) -> None:
    """Write `captioning.{train,val,test}.jsonl` and the captions that are scored against; tell what was left out.

    settings: an `OwnCaptioningSettings`. images: holds the pictures; None: the folder of the training table does.

    Raises:
        InputError: listing all that is wrong; nothing is written then.
    """
    with making(KIND, data, sources, settings, tokenizer, images, progress) as (made, encode):
        findings = made.reading.findings
        pictures = {split: _by_picture(made, split) for split in made.splits}
        for split in (TRAIN, VAL):
            if not pictures[split]:
                findings.note(f"{made.table()}: column caption: no row of {split} has one; rows", len(made.rows[split]))
        findings.raise_any()
        tokens, lengths = writing.TokenCount(), Lengths()
        told = {
            split: ground_truth_file(split, OWN)
            for split in made.splits
            if split != TRAIN and any(captions for _, captions in pictures[split])
        }
        names = [*(index_file(OWN, split) for split in made.splits), *told.values()]
        with atomic_writes([data / name for name in (*names, description_file(OWN))]) as (*opened, description):
            file_of = dict(zip(names, opened, strict=True))
            file_of[index_file(OWN, TRAIN)].writelines(_training_lines(made, pictures[TRAIN], encode, tokens, lengths))
            for split in made.splits:
                ids = _ids(pictures[split])
                if split != TRAIN:
                    rows = zip(pictures[split], ids, strict=True)
                    file_of[index_file(OWN, split)].writelines(_line(path, None, number) for (path, _), number in rows)
                if split in told:
                    file_of[told[split]].write(json.dumps(_as_coco(pictures[split], ids), ensure_ascii=False))
            findings.raise_any()
            hashed = tokenizer_hash(encode)
            description.write(made.describe(data, VERSION, file_of, settings, tokenizer_sha256=hashed))
            made.keep_pictures()
        for split in SPLITS:  # of an earlier index
            for name in {index_file(OWN, split), ground_truth_file(split, OWN)} - {*names}:
                (data / name).unlink(missing_ok=True)
    kind = ", ".join(dict.fromkeys(source.kind for source in sources.values()))
    told_rows = [f"{index_file(OWN, split)}: {told_in_rows(made, split, 'rows of captions')}" for split in made.splits]
    lines = [*told_rows, *summary_of_left_out(made.reading), lengths.line()]
    writing.print_summary(f"index of {kind} written to {data}", lines, tokens)


def _by_picture(made: Gathered, split: str) -> list[Picture]:
    """The pictures of a split in order of first appearance, each with the captions of all its rows.

    Those without a caption are left out, but for a test that nobody described.
    """
    described = split != TEST or any(row.captions for row, _ in made.rows[split])
    found: dict[str, list[tuple[str, float, Row]]] = {}
    for row, path in made.rows[split]:
        found.setdefault(path, []).extend((caption, row.weight, row) for caption in row.captions)
        if not row.captions and described:
            made.reading.leave_out("they have no caption", made.table(), row.place)
    return [(path, captions) for path, captions in found.items() if captions or not described]


def _ids(pictures: list[Picture]) -> list[int]:
    """The pictures' ids where all are whole numbers that tell them apart, else their numbers from 1."""
    ids = [captions[0][2].image_id if captions else None for _, captions in pictures]
    plain = [each for each in ids if type(each) is int and -MAX_ID <= each <= MAX_ID]
    return plain if len(set(plain)) == len(pictures) else list(range(1, len(pictures) + 1))


def _training_lines(
    made: Gathered, pictures: list[Picture], encode: BatchEncoder, tokens: writing.TokenCount, lengths: Lengths
) -> Iterator[str]:
    """A line per caption; the captions of a picture stand together."""
    table, findings = made.table(), made.reading.findings
    numbered = zip(pictures, _ids(pictures), strict=True)
    rows = ((path, number, *each) for (path, captions), number in numbered for each in captions)
    for (path, number, caption, weight, row), ids in writing.tokenized(rows, lambda r: r[2], encode, tokens, table):
        if not ids:
            findings.note(
                f"{table}: column caption: the tokenizer leaves nothing of it", f"{row.place}, {shown(caption)}"
            )
            continue
        lengths.add(len(ids))
        line = _line(path, ids, number, weight)
        if findings.check_line(line, table, row.place):
            yield line


def _line(path: str, ids: list[int] | None, image_id: int, weight: float = 1.0) -> str:
    text = "null" if ids is None else ids
    more = "" if weight == 1 else f', "weight": {json.dumps(weight)}'
    return f'{{"image_path": {json.dumps(path)}, "text_segment": {text}, "image_id": {image_id}{more}}}\n'


def _as_coco(pictures: list[Picture], ids: list[int]) -> dict[str, Any]:
    """What people wrote, in COCO's caption format; pictures that nobody described are not in it."""
    described = [(number, each) for number, each in zip(ids, pictures, strict=True) if each[1]]
    pairs = [(number, caption) for number, (_, captions) in described for caption, _, _ in captions]
    return {
        "info": {"description": "captions of own pictures"},
        "type": "captions",
        "licenses": [],
        "images": [{"id": number, "file_name": path} for number, (path, _) in described],
        "annotations": [
            {"id": place, "image_id": number, "caption": caption} for place, (number, caption) in enumerate(pairs, 1)
        ],
    }


KIND = IndexKind(
    asks=False,
    needed=(index_file(OWN, TRAIN), index_file(OWN, VAL), ground_truth_file(VAL, OWN)),
    further=(index_file(OWN, TEST), ground_truth_file(TEST, OWN)),
    description=description_file(OWN),
    version=VERSION,
    write=write_index,
)
