"""Makes the index files of captioning: COCO by Karpathy's split, and nocaps.

What the index says is fixed by the released code; how it is made is ours: `dataset_coco.json` (150 megabytes) is
streamed, the captions are tokenized in batches and written at once, and nothing is fetched from anywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from beit3.data import index_writing as writing
from beit3.data.findings import Findings, shown, wrong_id, wrong_path
from beit3.data.index_description import describe_index, tokenizer_hash
from beit3.data.json_stream import OnCharacters
from beit3.data.tokenizer import BatchEncoder
from beit3.system.atomic_files import atomic_writes
from tasks.captioning.references import KarpathyImage, as_coco, captions_of, karpathy_images

COCO, NOCAPS, OWN = "coco_captioning", "nocaps", "captioning"  # what the index files are named after
COCO_SPLITS = ("train", "val", "test")
KARPATHY_FILE = "dataset_coco.json"
KARPATHY_COUNTS = {"train": 113287, "val": 5000, "test": 5000}  # images in it, restval counted with train
NOCAPS_FILES = {"val": "nocaps_val_4500_captions.json", "test": "nocaps_test_image_info.json"}
NOCAPS_IMAGE = {"id": wrong_id, "file_name": wrong_path}  # what is wrong with the fields of an image

VERSION = 1  # of the makers; raise it with every change of what is written

CAPTION = itemgetter(2)  # of a _Row


def index_file(source: str, split: str) -> str:
    """source: `COCO`, `NOCAPS` or `OWN`."""
    return f"{source}.{split}.jsonl"


def description_file(source: str) -> str:
    return f"{source}.index.json"


def ground_truth_file(split: str, source: str = COCO) -> str:
    """The captions people wrote for the images of "val" or "test", in COCO's format; beside the index."""
    return f"{source}.{split}.references.json"


def make_coco_captioning_dataset_index(
    data_path: str | os.PathLike[str],
    tokenizer: Any,
    progress: bool | None = None,
    image_path: str | os.PathLike[str] | None = None,
) -> None:
    """Write the index files of COCO captioning into `data_path`, all or none of them.

        CaptioningDataset.make_coco_captioning_dataset_index(
            data_path="…", tokenizer=XLMRobertaTokenizer("…/beit3.spm"))

    data_path: holds Karpathy's `dataset_coco.json` and the COCO pictures in `train2014/` and `val2014/`; only
    pictures that are there are indexed. tokenizer: see `beit3.data.tokenizer.as_batch_encoder`; the path of
    beit3.spm does as well. progress: show a bar; None: on a terminal only. image_path: holds the pictures'
    folders, which may lie on a disk that is only read; None: data_path does.

    Writes `coco_captioning.{train,val,test}.jsonl` and, for the scores, the captions people wrote as
    `coco_captioning.{val,test}.references.json` in COCO's format; prints what was written and what left out.
    Raises InputError listing what is missing or wrong; nothing is written then.
    """
    data = Path(data_path)
    source, pictures = data / KARPATHY_FILE, writing.Pictures(data if image_path is None else Path(image_path))
    remedy = "get Karpathy's split (caption_datasets.zip) and unpack it there"
    encode = writing.check_inputs_and_tokenizer(tokenizer, [data, pictures.root], {source: remedy}, data)
    findings, tokens = Findings(), writing.TokenCount()
    counts = {split: Count() for split in COCO_SPLITS}
    truths: dict[str, list[KarpathyImage]] = {"val": [], "test": []}
    names = [index_file(COCO, split) for split in COCO_SPLITS] + [ground_truth_file(split) for split in truths]
    with (
        writing.progress_bar("COCO captioning index", [source], progress) as bar,
        atomic_writes([data / name for name in (*names, description_file(COCO))]) as (*files, description),
    ):
        file_of = dict(zip(names, files, strict=True))
        images = _noted(karpathy_images(source, findings, bar.update), truths)
        rows = _rows(images, pictures, counts)
        for split, line in _lines(rows, source, encode, findings, tokens):
            counts[split].lines += 1
            file_of[index_file(COCO, split)].write(line)
        _raise_findings(findings, pictures, dict.fromkeys(counts, source), counts)
        for split, truth in truths.items():
            file_of[ground_truth_file(split)].write(json.dumps(as_coco(truth, split), ensure_ascii=False))
        folders = _folders(pictures)
        described = describe_index(data, VERSION, file_of, [source], folders, tokenizer_sha256=tokenizer_hash(encode))
        description.write(described)
    writing.print_summary(f"{COCO} index written to {data}", _summary_lines(COCO, counts), tokens)


def make_nocaps_captioning_dataset_index(
    data_path: str | os.PathLike[str],
    progress: bool | None = None,
    image_path: str | os.PathLike[str] | None = None,
) -> None:
    """Write the index files of nocaps, `nocaps.{val,test}.jsonl`, into `data_path`, both or none.

    data_path: holds `nocaps_val_4500_captions.json`, `nocaps_test_image_info.json` and the pictures in `val/` and
    `test/`. Otherwise as `make_coco_captioning_dataset_index`, which makes the training data.
    """
    data = Path(data_path)
    pictures = writing.Pictures(data if image_path is None else Path(image_path))
    sources = {split: data / name for split, name in NOCAPS_FILES.items()}
    remedies = dict.fromkeys(sources.values(), "get it from https://nocaps.org/download")
    writing.check_inputs([data, pictures.root], remedies, data)
    findings = Findings()
    counts = {split: Count() for split in sources}
    names = [index_file(NOCAPS, split) for split in sources]
    targets = [data / name for name in (*names, description_file(NOCAPS))]
    with (
        writing.progress_bar("nocaps index", sources.values(), progress) as bar,
        atomic_writes(targets) as (*files, description),
    ):
        for file, (split, source) in zip(files, sources.items(), strict=True):
            for image_id, path, place in _nocaps_images(source, split, findings, bar.update):
                if (found := pictures.find(path)) is None:
                    counts[split].missing += 1
                    continue
                line = _line(found, None, image_id)
                if findings.check_line(line, source, place):
                    counts[split].lines += 1
                    counts[split].images += 1
                    file.write(line)
        _raise_findings(findings, pictures, sources, counts)
        file_of = dict(zip(names, files, strict=True))
        description.write(describe_index(data, VERSION, file_of, sources.values(), _folders(pictures)))
    writing.print_summary(f"{NOCAPS} index written to {data}", _summary_lines(NOCAPS, counts))


def _folders(pictures: writing.Pictures) -> dict[str, tuple[Path, int]]:
    """Folder → its path, and how many of the pictures wanted were not in it."""
    return {folder: (pictures.root / folder, count) for folder, count in pictures.missing.items()}


@dataclass
class Count:
    """What became of the images of one split."""

    lines: int = 0
    images: int = 0
    missing: int = 0  # images whose picture is not on the disk


_Row = tuple[KarpathyImage, str, str | None]  # image, its picture relative to the folder of pictures, caption


def _noted(images: Iterable[KarpathyImage], truths: dict[str, list[KarpathyImage]]) -> Iterator[KarpathyImage]:
    """Yield the images as they come; those whose captions are scored against are kept in `truths` on the way."""
    for image in images:
        if image.split in truths:
            truths[image.split].append(image)
        yield image


def _rows(images: Iterable[KarpathyImage], pictures: writing.Pictures, counts: dict[str, Count]) -> Iterator[_Row]:
    """Yield the rows of all indexes, of images whose picture is there: one per caption in training, else per image."""
    for image in images:
        path = pictures.find(f"{image.folder}/{image.name}")
        if path is None:
            counts[image.split].missing += 1
            continue
        counts[image.split].images += 1
        captions = image.captions if image.split == "train" else [None]
        yield from ((image, path, caption) for caption in captions)


def _lines(
    rows: Iterator[_Row], source: Path, encode: BatchEncoder, findings: Findings, tokens: writing.TokenCount
) -> Iterator[tuple[str, str]]:
    """Yield (split, line) in the order of the file; note captions that make no line."""
    for (image, path, caption), ids in writing.tokenized(rows, CAPTION, encode, tokens, source):
        line = _line(path, ids, image.id)
        if ids == []:
            what = f"{source}: the tokenizer leaves nothing of a caption"
            findings.note(what, f"{image.place} has {shown(caption)}")
        elif findings.check_line(line, source, image.place):
            yield image.split, line


def _line(path: str, ids: list[int] | None, image_id: int) -> str:
    # Lists of numbers print as JSON writes them, and faster.
    text = "null" if ids is None else ids
    return f'{{"image_path": {json.dumps(path)}, "text_segment": {text}, "image_id": {image_id}}}\n'


def _nocaps_images(
    source: Path, split: str, findings: Findings, on_characters: OnCharacters
) -> Iterator[tuple[int, str, str]]:
    """Yield (id, path of the picture, place) of the sound images of a file of nocaps; note what is wrong with others.

    Where the file has captions too, they are what validation is scored against, so they are looked at as well.
    """
    place_of: dict[Any, str] = {}
    for place, image_id, entry, right in findings.numbered(source, "images", "id", NOCAPS_IMAGE, on_characters):
        if image_id is not None:
            place_of[image_id] = place
        if right:
            yield image_id, f"{split}/{entry['file_name']}", place
    if not findings.broken_files and (captions := list(findings.stream(source, "annotations", required=False))):
        captions_of(source, place_of, captions, findings)


def _raise_findings(
    findings: Findings, pictures: writing.Pictures, sources: dict[str, Path], counts: dict[str, Count]
) -> None:
    """Raise all that was found; splits that would be empty where nothing else is wrong. sources: file of each split."""
    pictures.note_problems(findings)
    findings.raise_any()
    for split, count in counts.items():
        if not count.lines:
            what = f"{sources[split]}: no image left of the split {split!r}; pictures missing"
            findings.note(what, count.missing)
    findings.raise_any()


def _summary_lines(source: str, counts: dict[str, Count]) -> Iterator[str]:
    in_file = sum(count.images + count.missing for count in counts.values())
    official = source == COCO and writing.is_nearly(in_file, sum(KARPATHY_COUNTS.values()))
    for split, count in counts.items():
        what = f"{count.lines} captions of {count.images} images" if split == "train" else f"{count.lines} images"
        left_out = f"; {count.missing} images left out, their pictures are missing" if count.missing else ""
        truth = f" (their captions: {ground_truth_file(split)})" if source == COCO and split != "train" else ""
        yield f"{index_file(source, split)}: {what}{truth}{left_out}"
        if official:
            named, found = count.images + count.missing, KARPATHY_COUNTS[split]
            yield f"  {writing.beside_official({'images': (named, found), 'pictures': (count.images, found)})}"
