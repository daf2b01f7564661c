"""Karpathy's splits of Flickr8k, Flickr30k and COCO. https://cs.stanford.edu/people/karpathy/deepimagesent/

    {"images": [{"split": "restval", "filename": "COCO_val2014_000000391895.jpg", "filepath": "val2014",
                 "cocoid": 391895, "imgid": 0, "sentences": [{"raw": "A man with a red helmet …", …}, …]}, …]}

Flickr's have neither `filepath` nor `cocoid`. What is restval belongs to training, by convention. Captions are raw, as
people wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator

from beit3.data.findings import shown, wrong_id, wrong_list, wrong_path, wrong_string, wrong_text
from sources.look import NOTHING, Look
from sources.readers.base import FormatSource, Once, given, wrong_split
from sources.rows import SPLIT_OF, Reading, Row

_IMAGE = {"split": wrong_split, "filename": wrong_path, "sentences": wrong_list}
_OPTIONAL = {"filepath": wrong_string, "cocoid": wrong_id, "imgid": wrong_id}
_SENTENCE = {"raw": wrong_text}


class Karpathy(FormatSource):
    kind, asks = "Karpathy's captions", False

    @staticmethod
    def fits(look: Look) -> bool:
        return look.inside.get("images", NOTHING) >= {"filename", "sentences"}

    def rows(self, reading: Reading) -> Iterator[Row]:
        findings = reading.findings
        ids = {name: Once(self.path, name, reading) for name in ("cocoid", "imgid")}
        for number, entry in enumerate(findings.stream(self.path, "images", reading.on_bytes)):
            place = f"images[{number}]"
            if not findings.check_fields(self.path, place, entry, _IMAGE | given(entry, _OPTIONAL)):
                continue
            if not findings.check_list(self.path, f"{place}.sentences", entry["sentences"], _SENTENCE):
                continue
            name = "cocoid" if entry.get("cocoid") is not None else "imgid"
            image_id = entry.get(name)
            if image_id is not None and not ids[name].is_new(image_id, place):
                continue
            path = f"{entry['filepath']}/{entry['filename']}" if entry.get("filepath") else entry["filename"]
            if what := wrong_path(path):
                findings.note(f"{self.path}: `filepath` {what}", f"{place} has {shown(entry['filepath'])}")
            elif captions := [sentence["raw"] for sentence in entry["sentences"]]:
                yield Row(place, path, captions=captions, split=SPLIT_OF[entry["split"].lower()], image_id=image_id)
            else:
                reading.leave_out("a picture without captions", self.path, place)
