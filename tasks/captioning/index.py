"""Makes the index files of captioning: COCO by Karpathy's split, and nocaps.

What the index says is fixed by the released code; how it is made is ours: `dataset_coco.json` (150 megabytes) is
streamed, the captions are tokenized in batches and written at once, and nothing is fetched from anywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from beit3.data.index_table import is_inside
from beit3.data.tokenizer import BatchEncoder, as_batch_encoder
from beit3.system.atomic_files import atomic_writes
from beit3.system.errors import InputError
from tasks.captioning.references import coco_ground_truths
from tasks.vqav2.index import Findings

COCO, NOCAPS = "coco_captioning", "nocaps"  # what the index files are named after
KARPATHY_FILE = "dataset_coco.json"
NOCAPS_FILES = {"val": "nocaps_val_4500_captions.json", "test": "nocaps_test_image_info.json"}
SPLIT_OF = {"train": "train", "restval": "train", "val": "val", "test": "test"}  # Karpathy's name → ours
SPLITS = ("train", "val", "test")
BATCH = 4096  # captions tokenized at a time

Progress = Callable[[int], object]


def index_file(source: str, split: str) -> str:
    """source: `COCO` or `NOCAPS`."""
    return f"{source}.{split}.jsonl"


def ground_truth_file(split: str) -> str:
    """The captions people wrote for the images of "val" or "test", in COCO's format; beside the index."""
    return f"{COCO}.{split}.references.json"


def make_coco_captioning_index(data_path: str | os.PathLike[str], tokenizer: Any, progress: bool | None = None) -> None:
    """Write `coco_captioning.{train,val,test}.jsonl` and the ground truth of val and test into `data_path`.

    See `datasets.CaptioningDataset.make_coco_captioning_dataset_index`, which is how users call it.
    """
    data = Path(data_path)
    source = data / KARPATHY_FILE
    problems = _missing(data, {source: "get Karpathy's split (caption_datasets.zip) and unpack it there"})
    try:
        encode = as_batch_encoder(tokenizer)
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(problems)

    findings, pictures = Findings(), Pictures(data)
    counts = {split: Count() for split in SPLITS}
    names = [index_file(COCO, split) for split in SPLITS] + [ground_truth_file(split) for split in ("val", "test")]
    targets = [data / name for name in names]
    with _progress_bar("COCO captioning index", [source], progress) as bar, atomic_writes(targets) as files:
        file_of = dict(zip(names, files, strict=True))
        images = _karpathy_images(source, findings, bar.update)
        kept = (image for image in images if pictures.has(image.path, findings, counts[image.split]))
        for split, line in _lines(kept, source, encode, findings, counts):
            file_of[index_file(COCO, split)].write(line)
        pictures.note_problems(findings)
        findings.raise_any()
        for split, count in counts.items():
            if not count.lines:
                findings.note(f"{source}: no image left of the split {split!r}; pictures missing", count.missing)
        findings.raise_any()
        truths = coco_ground_truths(source, ["val", "test"])
        for split, truth in truths.items():
            json.dump(truth, file_of[ground_truth_file(split)], ensure_ascii=False)
    _print_summary(data, COCO, counts)


def make_nocaps_index(data_path: str | os.PathLike[str], progress: bool | None = None) -> None:
    """Write `nocaps.{val,test}.jsonl` into `data_path`.

    See `datasets.CaptioningDataset.make_nocaps_captioning_dataset_index`, which is how users call it.
    """
    data = Path(data_path)
    sources = {split: data / name for split, name in NOCAPS_FILES.items()}
    problems = _missing(data, dict.fromkeys(sources.values(), "get it from https://nocaps.org/download"))
    if problems:
        raise InputError(problems)
    findings, pictures = Findings(), Pictures(data)
    counts = {split: Count() for split in sources}
    targets = [data / index_file(NOCAPS, split) for split in sources]
    with _progress_bar("nocaps index", sources.values(), progress) as bar, atomic_writes(targets) as files:
        for file, (split, source) in zip(files, sources.items(), strict=True):
            for image in _nocaps_images(source, split, findings, bar.update):
                if pictures.has(image.path, findings, counts[split]):
                    counts[split].add(lines=1)
                    file.write(_line(image.path, None, image.id))
        pictures.note_problems(findings)
        findings.raise_any()
        for split, count in counts.items():
            if not count.lines:
                findings.note(f"{sources[split]}: no image left; pictures missing", count.missing)
        findings.raise_any()
    _print_summary(data, NOCAPS, counts)


@dataclass(frozen=True)
class _Image:
    """An image of the annotation file: `split` is ours, `path` relative to the data folder."""

    split: str
    path: str
    id: int
    captions: list[str]


@dataclass
class Count:
    """What became of the images of one split."""

    lines: int = 0
    images: int = 0
    missing: int = 0  # images whose picture is not on the disk

    def add(self, lines: int) -> None:
        self.lines += lines
        self.images += 1


@dataclass
class Pictures:
    """Which pictures are on the disk. Each folder is listed once: asking for every file is slow on network disks."""

    data: Path
    names: dict[str, set[str] | None] = field(default_factory=dict)  # folder → its files, None: cannot be used
    links: dict[str, set[str]] = field(default_factory=dict)  # folder → links out of the data folder
    used: set[str] = field(default_factory=set)  # folders of pictures that were found
    problems: list[str] = field(default_factory=list)

    def has(self, path: str, findings: Findings, count: Count) -> bool:
        """Whether the picture is there and may be read; counts it if it is not there."""
        folder, name = os.path.split(path)
        if folder not in self.names:
            self.names[folder] = self._list(folder)
        names = self.names[folder]
        if names is None or name not in names:
            count.missing += 1
            return False
        self.used.add(folder)
        if name in self.links[folder]:
            what = f"{self.data / folder}: links out of {self.data}, which reading refuses; copy the files"
            findings.note(what, name)
            return False
        return True

    def note_problems(self, findings: Findings) -> None:
        """Hand over what is wrong with the folders themselves."""
        findings.broken_files += self.problems
        for folder, names in self.names.items():
            if names is not None and folder not in self.used:
                findings.broken_files.append(f"{self.data / folder}: none of the pictures wanted is in it")

    def _list(self, folder: str) -> set[str] | None:
        path, root = self.data / folder, os.path.realpath(self.data)
        if not path.is_dir():
            self.problems.append(f"{path}: folder of pictures missing; put the pictures of {folder} there")
        elif not is_inside(root, os.fspath(path)):
            self.problems.append(f"{path}: leads out of {self.data} through a link, which reading refuses")
        else:
            with os.scandir(path) as entries:
                linked = {entry.name: entry.is_symlink() for entry in entries}
            self.links[folder] = {
                name for name, is_link in linked.items() if is_link and not is_inside(root, os.fspath(path / name))
            }
            return set(linked)
        return None


def _karpathy_images(source: Path, findings: Findings, progress: Progress) -> Iterator[_Image]:
    """Yield the sound images of `dataset_coco.json`; note what is wrong with others."""
    seen: set[int] = set()
    for position, entry in enumerate(findings.stream(source, "images", progress)):
        try:
            cocoid, split, folder, name = (entry[key] for key in ("cocoid", "split", "filepath", "filename"))
            captions = [sentence["raw"] for sentence in entry.get("sentences") or ()]
            typed = type(cocoid) is int and {str}.issuperset(map(type, [split, folder, name, *captions]))
        except (KeyError, TypeError, AttributeError):
            typed = False
        if not typed:
            findings.note(f"{source}: not an image of Karpathy's split; number in the file, from 0", position)
            continue
        if cocoid in seen:
            findings.note(f"{source}: more than one image has this cocoid", cocoid)
        elif split not in SPLIT_OF:
            findings.note(f"{source}: the split of an image is none of {', '.join(SPLIT_OF)}; cocoid", cocoid)
        elif not captions:
            findings.note(f"{source}: image without sentences; cocoid", cocoid)
        elif not all(caption.strip() for caption in captions):
            findings.note(f"{source}: image with an empty caption; cocoid", cocoid)
        elif _is_unsafe(f"{folder}/{name}"):
            findings.note(f"{source}: filepath or filename leads out of the data folder; cocoid", cocoid)
        else:
            yield _Image(SPLIT_OF[split], f"{folder}/{name}", cocoid, captions)
        seen.add(cocoid)


def _nocaps_images(source: Path, split: str, findings: Findings, progress: Progress) -> Iterator[_Image]:
    """Yield the sound images of an annotation file of nocaps; note what is wrong with others."""
    seen: set[int] = set()
    for position, entry in enumerate(findings.stream(source, "images", progress)):
        try:
            image_id, name = entry["id"], entry["file_name"]
        except (KeyError, TypeError):
            image_id = name = None
        if type(image_id) is not int or type(name) is not str:
            findings.note(f"{source}: not an image of nocaps; number in the file, from 0", position)
            continue
        if image_id in seen:
            findings.note(f"{source}: more than one image has this id", image_id)
        elif _is_unsafe(f"{split}/{name}"):
            findings.note(f"{source}: file_name leads out of the data folder; id", image_id)
        else:
            yield _Image(split, f"{split}/{name}", image_id, [])
        seen.add(image_id)


def _lines(
    images: Iterable[_Image], source: Path, encode: BatchEncoder, findings: Findings, counts: dict[str, Count]
) -> Iterator[tuple[str, str]]:
    """Yield (split, line): one per caption in training, one per image else, in the order of the file."""
    rows = ((image, caption) for image in images for caption in (image.captions if image.split == "train" else [None]))
    images_seen: set[int] = set()
    while batch := list(islice(rows, BATCH)):
        try:
            encoded = iter(encode([caption for _, caption in batch if caption is not None]))
        except ValueError as error:
            raise InputError(f"{source}: {error}") from error
        for image, caption in batch:
            ids = None if caption is None else next(encoded)
            if ids == []:
                findings.note(f"{source}: image with an empty caption; cocoid", image.id)
            counts[image.split].lines += 1
            counts[image.split].images += image.id not in images_seen
            images_seen.add(image.id)
            yield image.split, _line(image.path, ids, image.id)


def _line(path: str, ids: list[int] | None, image_id: int) -> str:
    # Lists of numbers print as JSON writes them, and faster.
    text = "null" if ids is None else ids
    return f'{{"image_path": {json.dumps(path)}, "text_segment": {text}, "image_id": {image_id}}}\n'


def _is_unsafe(path: str) -> bool:
    return os.path.isabs(path) or "\0" in path or not {"", ".", ".."}.isdisjoint(path.split("/"))


def _missing(data: Path, files: dict[Path, str]) -> list[str]:
    """What is not there: the data folder, and files, each with where to get it."""
    if not data.is_dir():
        return [f"{data}: no such folder"]
    return [f"{file}: missing; {remedy}" for file, remedy in files.items() if not file.is_file()]


def _progress_bar(what: str, files: Iterable[Path], progress: bool | None) -> Any:
    """A bar over the bytes of the files; `progress` None: on a terminal only."""
    total = sum(file.stat().st_size for file in files)
    hidden = None if progress is None else not progress
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=hidden)


def _print_summary(data: Path, source: str, counts: dict[str, Count]) -> None:
    print(f"{source} index written to {data}")
    for split, count in counts.items():
        what = f"{count.lines} captions of {count.images} images" if split == "train" else f"{count.lines} images"
        left_out = f"; {count.missing} images left out, their pictures are missing" if count.missing else ""
        truth = f" (their captions: {ground_truth_file(split)})" if source == COCO and split != "train" else ""
        print(f"  {index_file(source, split)}: {what}{truth}{left_out}")
