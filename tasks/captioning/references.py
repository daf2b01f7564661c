"""The captions people wrote: Karpathy's `dataset_coco.json`, and files in COCO's caption format."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit3.data.findings import Findings, shown, wrong_id, wrong_list, wrong_path, wrong_text
from beit3.data.json_stream import OnCharacters
from beit3.system.errors import InputError
from tasks.captioning.scores.scores import ImageId

# Our splits, and the parts of Karpathy's that they have. His restval images are trained on, by convention.
KARPATHY_PARTS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
_SPLIT_OF = {part: split for split, parts in KARPATHY_PARTS.items() for part in parts}


@dataclass(frozen=True)
class KarpathyImage:
    """An image of `dataset_coco.json`: `split` is ours, `place` tells people where it stands in the file."""

    id: int
    split: str
    folder: str
    name: str
    captions: list[str]
    place: str


def karpathy_images(
    source: Path, findings: Findings, on_characters: OnCharacters | None = None
) -> Iterator[KarpathyImage]:
    """Yield the sound images of `dataset_coco.json` in its order; note all that is wrong with others.

    Captions are the raw sentences, as people wrote them.
    """
    for place, cocoid, entry, right in findings.numbered(source, "images", "cocoid", _IMAGE, on_characters):
        sentences: Any = entry.get("sentences") if type(entry) is dict else None
        if type(sentences) is list and not findings.check_list(source, f"{place}.sentences", sentences, _SENTENCE):
            continue
        if right:
            captions = [sentence["raw"] for sentence in sentences]
            yield KarpathyImage(
                cocoid, _SPLIT_OF[entry["split"]], entry["filepath"], entry["filename"], captions, place
            )


def coco_ground_truth(dataset_coco: str | os.PathLike[str], split: str) -> dict[str, Any]:
    """The reference captions of one split, "train" (with restval), "val" or "test", as `as_coco` gives them.

    Raises InputError listing every mistake in the file, or that it has no image of the split.
    """
    findings = Findings()
    images = [image for image in karpathy_images(Path(dataset_coco), findings) if image.split == split]
    findings.raise_any()
    if not images:
        raise InputError(f"{dataset_coco}: no image of the split {split!r}")
    return as_coco(images, split)


def as_coco(images: Iterable[KarpathyImage], split: str) -> dict[str, Any]:
    """The captions of the images of a split as a dict in COCO's caption format.

    It has `images` (`id`, `file_name`) and `annotations` (`id`, `image_id`, `caption`), both in the order given; ids of
    images are COCO's, ids of annotations count from 1.
    """
    images = list(images)
    pairs = [(image.id, caption) for image in images for caption in image.captions]
    return {
        # pycocotools wants `info`, and its official files say `type`.
        "info": {"description": f"COCO captions, Karpathy split: {' + '.join(KARPATHY_PARTS[split])}"},
        "type": "captions",
        "licenses": [],
        "images": [{"id": image.id, "file_name": image.name} for image in images],
        "annotations": [
            {"id": number, "image_id": cocoid, "caption": caption}
            for number, (cocoid, caption) in enumerate(pairs, start=1)
        ],
    }


def load_references(path: str | os.PathLike[str]) -> dict[ImageId, list[str]]:
    """Image id → its captions, from a caption file in COCO's format, in the order of the file's `images`.

    Raises InputError for a file that is missing, is not JSON or has no `images` and `annotations`, and listing every
    mistake in it: an image twice or without captions, a caption of an unknown image, an empty caption.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise InputError(f"{path}: wanted a caption file in COCO's format, with the lists `images` and `annotations`")
    findings = Findings()
    place_of: dict[ImageId, str] = {}
    for number, image in enumerate(content["images"]):
        place = f"images[{number}]"
        if not findings.check_fields(path, place, image, {"id": _wrong_image_id}):
            continue
        if place_of.setdefault(image["id"], place) != place:
            found = shown(image["id"])
            findings.note(f"{path}: `id` of another image", f"{place} has {found}, as {place_of[image['id']]}")
    references = captions_of(path, place_of, content["annotations"], findings)
    findings.raise_any()
    return references


def captions_of(
    path: Path, place_of: dict[ImageId, str], annotations: Iterable[Any], findings: Findings
) -> dict[ImageId, list[str]]:
    """Image id → its captions, images in the order of `place_of`; notes what is wrong with captions.

    place_of: image id → where it stands in the file. annotations: the elements of the file's list.
    """
    references: dict[ImageId, list[str]] = {image: [] for image in place_of}
    for number, annotation in enumerate(annotations):
        place = f"annotations[{number}]"
        right = findings.check_fields(path, place, annotation, _ANNOTATION)
        image = annotation.get("image_id") if type(annotation) is dict else None
        if _wrong_image_id(image):
            continue
        if image not in references:
            findings.note(f"{path}: `image_id` is not among `images`", f"{place} has {shown(image)}")
        else:  # a caption that is wrong is noted already; that its image has none need not be told as well
            references[image].append(annotation["caption"] if right else "")
    for image, captions in references.items():
        if not captions:
            findings.note(f"{path}: image without captions", f"{place_of[image]} (id {shown(image)})")
    return references


def _wrong_image_id(value: Any) -> str | None:
    return None if type(value) in (int, str) else "is neither a whole number nor a text"


def _wrong_split(value: Any) -> str | None:
    if type(value) is str and value in _SPLIT_OF:
        return None
    return f"is none of {', '.join(_SPLIT_OF)}"


def _wrong_sentences(value: Any) -> str | None:
    return wrong_list(value) or (None if value else "has no caption")


# What is wrong with the fields of an image, and of a sentence, in Karpathy's file; of a caption in COCO's format.
_IMAGE = {
    "cocoid": wrong_id,
    "split": _wrong_split,
    "filepath": wrong_path,
    "filename": wrong_path,
    "sentences": _wrong_sentences,
}
_SENTENCE = {"raw": wrong_text}
_ANNOTATION = {"image_id": _wrong_image_id, "caption": wrong_text}
