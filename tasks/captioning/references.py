"""The reference captions of an image: from Karpathy's `dataset_coco.json` to COCO-format files and back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from beit3.data.json_stream import stream_array
from beit3.system.atomic_files import atomic_writes
from beit3.system.errors import InputError
from tasks.captioning.scores.scores import ImageId, check_captions

# Karpathy's names of the parts of a split. His restval images are trained on, by convention.
SPLITS = {"train": ("train", "restval"), "restval": ("restval",), "val": ("val",), "test": ("test",)}


def coco_ground_truth(dataset_coco: str | os.PathLike[str], split: str) -> dict[str, Any]:
    """The reference captions of one split as a dict in COCO's caption format.

    dataset_coco: the file of Karpathy and Fei-Fei. split: "train" (with restval), "restval", "val" or "test". The dict
    has `images` (`id`, `file_name`) and `annotations` (`id`, `image_id`, `caption`), both in the order of the file; ids
    of images are COCO's, ids of annotations count from 1. Captions are the raw sentences, as people wrote them.

    Raises InputError, listing every mistake: a file that cannot be read, an image of the split without sentences or
    with an empty one, a `cocoid` that occurs twice anywhere in the file, a split without images.
    """
    return coco_ground_truths(dataset_coco, [split])[split]


def coco_ground_truths(dataset_coco: str | os.PathLike[str], splits: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`coco_ground_truth` of several splits by one pass over the file, which has 150 megabytes."""
    splits = list(splits)
    assert all(split in SPLITS for split in splits), splits
    problems: list[str] = []
    images: dict[str, list[tuple[dict[str, Any], list[Any]]]] = {split: [] for split in splits}
    for place, image in _karpathy_images(dataset_coco, problems):
        wanted_by = [split for split in splits if image.get("split") in SPLITS[split]]
        if not wanted_by:
            continue
        sentences = image.get("sentences")
        captions = (
            [s.get("raw") if isinstance(s, dict) else s for s in sentences] if isinstance(sentences, list) else []
        )
        problems += check_captions(place, captions)
        for split in wanted_by:
            images[split].append((image, captions))
    problems += [f"{dataset_coco}: no image of the split {split!r}" for split in splits if not images[split]]
    if problems:
        raise InputError(problems)
    return {split: _as_coco(images[split], split) for split in splits}


def write_coco_ground_truth(dataset_coco: str | os.PathLike[str], paths: Mapping[str, str | os.PathLike[str]]) -> None:
    """Write the ground truth of splits as COCO-format JSON files, split → path, by one pass over `dataset_coco`.

    All of them appear, or none. Raises as `coco_ground_truth`.
    """
    truths = coco_ground_truths(dataset_coco, paths)
    with atomic_writes(list(paths.values())) as files:
        for file, split in zip(files, paths, strict=True):
            json.dump(truths[split], file, ensure_ascii=False)


def load_references(path: str | os.PathLike[str]) -> dict[ImageId, list[str]]:
    """Image id → its captions, from a caption file in COCO's format, in the order of the file's `images`.

    Raises InputError for a file that is missing, is not JSON or has no `images` and `annotations`, and listing every
    mistake in it: an image twice or without captions, a caption of an unknown image, an empty caption.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, not JSON
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise InputError(f"{path}: wanted a caption file in COCO's format, with the lists `images` and `annotations`")
    problems: list[str] = []
    references: dict[ImageId, list[str]] = {}
    for number, image in enumerate(content["images"]):
        image_id = image.get("id") if isinstance(image, dict) else None
        if not isinstance(image_id, int | str):
            problems.append(f"{path}: images[{number}] has no `id`")
        elif image_id in references:
            problems.append(f"{path}: image {image_id!r} occurs twice")
        else:
            references[image_id] = []
    for number, annotation in enumerate(content["annotations"]):
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not isinstance(image_id, int | str) or image_id not in references:
            problems.append(f"{path}: annotations[{number}] is of image {image_id!r}, which is not among `images`")
        else:
            references[image_id].append(annotation.get("caption"))
    for image_id, captions in references.items():
        problems += check_captions(f"{path}: image {image_id!r}", captions)
    if problems:
        raise InputError(problems)
    return references


def _karpathy_images(dataset_coco: str | os.PathLike[str], problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (how to name it in a message, the image) for each sound image; what is wrong with others → `problems`."""
    seen: dict[int, int] = {}
    try:
        for number, image in enumerate(stream_array(dataset_coco, "images")):
            place = f"{dataset_coco}: images[{number}]"
            cocoid = image.get("cocoid") if isinstance(image, dict) else None
            if not isinstance(cocoid, int):
                problems.append(f"{place} has the `cocoid` {cocoid!r}, wanted a number")
            elif cocoid in seen:
                problems.append(f"{place} has the `cocoid` {cocoid}, as images[{seen[cocoid]}] has; wanted each once")
            else:
                seen[cocoid] = number
                yield f"{place} (cocoid {cocoid})", image
    except OSError as error:
        raise InputError(f"{dataset_coco}: cannot be read ({error})") from error


def _as_coco(images: list[tuple[dict[str, Any], list[Any]]], split: str) -> dict[str, Any]:
    pairs = [(image["cocoid"], caption) for image, captions in images for caption in captions]
    return {
        # pycocotools wants `info`, and its official files say `type`.
        "info": {"description": f"COCO captions, Karpathy split: {' + '.join(SPLITS[split])}"},
        "type": "captions",
        "licenses": [],
        "images": [{"id": image["cocoid"], "file_name": image.get("filename", "")} for image, _ in images],
        "annotations": [
            {"id": number, "image_id": cocoid, "caption": caption}
            for number, (cocoid, caption) in enumerate(pairs, start=1)
        ],
    }
