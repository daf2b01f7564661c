"""Captions in COCO's format. https://cocodataset.org/#format-data (5. Image Captioning)

    {"images": [{"id": 391895, "file_name": "COCO_val2014_000000391895.jpg", …}, …],
     "annotations": [{"id": 770337, "image_id": 391895, "caption": "A man with a red helmet on …"}, …]}

A file without annotations, such as COCO's `image_info_test2014.json`, has the pictures of a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from beit3.data.findings import shown, wrong_path, wrong_text
from sources.look import NOTHING, Look
from sources.readers.base import FormatSource, wrong_number_or_text
from sources.rows import Id, Reading, Row

_IMAGE = {"id": wrong_number_or_text, "file_name": wrong_path}
_CAPTION = {"image_id": wrong_number_or_text, "caption": wrong_text}


class CocoCaptions(FormatSource):
    kind, asks = "COCO captions", False

    @staticmethod
    def fits(look: Look) -> bool:
        images, captions = (look.inside.get(name, NOTHING) for name in ("images", "annotations"))
        return images >= _IMAGE.keys() or captions >= _CAPTION.keys()

    def rows(self, reading: Reading) -> Iterator[Row]:
        """The pictures in the order of `images`, each with all its captions."""
        findings = reading.findings
        images: dict[Id, tuple[str, str]] = {}  # id → place, name; the name is "" where the entry is wrong
        for number, entry in enumerate(findings.stream(self.path, "images", reading.on_bytes)):
            place = f"images[{number}]"
            right = findings.check_fields(self.path, place, entry, _IMAGE)
            image_id: Any = entry.get("id") if type(entry) is dict else None
            if wrong_number_or_text(image_id):
                continue
            if image_id in images:
                found = f"{place} has {shown(image_id)}, as {images[image_id][0]}"
                findings.note(f"{self.path}: `id` of another image", found)
            else:
                images[image_id] = place, entry["file_name"] if right else ""
        captions = None if findings.broken_files else self._captions(images, reading)
        for image_id, (place, name) in images.items():
            written = () if captions is None else captions.get(image_id, ())
            if captions and not written:
                reading.leave_out("a picture without captions", self.path, place)
            elif name:
                yield Row(place, name, captions=written, image_id=image_id)

    def _captions(self, images: dict[Id, tuple[str, str]], reading: Reading) -> dict[Id, list[str]]:
        """Image id → its captions; empty where the file has none."""
        findings, captions = reading.findings, dict[Id, list[str]]()
        for number, entry in enumerate(findings.stream(self.path, "annotations", required=False)):
            place = f"annotations[{number}]"
            if not findings.check_fields(self.path, place, entry, _CAPTION):
                continue
            if entry["image_id"] in images:
                captions.setdefault(entry["image_id"], []).append(entry["caption"])
            else:
                found = f"{place} has {shown(entry['image_id'])}"
                findings.note(f"{self.path}: `image_id` is not among `images`", found)
        return captions
