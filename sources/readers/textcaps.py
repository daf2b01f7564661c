"""TextCaps: captions that read the text in pictures of Open Images. https://textvqa.org/textcaps/dataset/

    {"dataset_type": "train", "data": [{"image_id": "0054c91397f2fe05", "image_name": "0054c91397f2fe05",
      "caption_id": 4, "caption_str": "A storefront with …", "reference_strs": ["A storefront with …", … five of them],
      "set_name": "train"}, …]}

A picture has an entry for each of its captions, and each entry may list all of them again. The picture is
`<image_name>.jpg`, or `<image_id>.jpg`. The test set has no captions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from beit3.data.findings import shown, wrong_path, wrong_text
from sources.look import NOTHING, Look
from sources.readers.base import FormatSource, given, named_after, wrong_picture_id, wrong_split, wrong_texts
from sources.rows import SPLIT_OF, Id, Reading, Row

_PICTURE = {"image_id": wrong_picture_id}
_OPTIONAL = {
    "image_name": wrong_path,
    "caption_str": wrong_text,
    "reference_strs": wrong_texts,
    "set_name": wrong_split,
}


class _Picture(NamedTuple):
    """Captions of a picture: those of its own entries, and those that its entries list."""

    place: str
    name: str
    split: str | None
    captions: list[str]
    references: dict[str, None]


class TextCaps(FormatSource):
    kind, asks = "TextCaps", False

    @staticmethod
    def fits(look: Look) -> bool:
        keys = look.inside.get("data", NOTHING)
        return "image_id" in keys and bool(keys & {"caption_str", "reference_strs", "caption_id"})

    def rows(self, reading: Reading) -> Iterator[Row]:
        """A row for each picture, in the order of their first entries."""
        findings = reading.findings
        pictures: dict[Id, _Picture] = {}
        for number, entry in enumerate(findings.stream(self.path, "data", reading.on_bytes)):
            place = f"data[{number}]"
            if not findings.check_fields(self.path, place, entry, _PICTURE | given(entry, _OPTIONAL)):
                continue
            image_id, split = entry["image_id"], SPLIT_OF.get((entry.get("set_name") or "").lower())
            if image_id not in pictures:
                name = named_after(entry.get("image_name") or image_id)
                pictures[image_id] = _Picture(place, name, split, [], {})
            picture = pictures[image_id]
            if split != picture.split:
                found = f"{place} has {shown(entry.get('set_name'))}, unlike {picture.place} of the same picture"
                findings.note(f"{self.path}: `set_name` of one picture differs", found)
            if entry.get("caption_str") is not None:
                picture.captions.append(entry["caption_str"])
            picture.references.update(dict.fromkeys(filter(str.strip, entry.get("reference_strs") or ())))
        for image_id, picture in pictures.items():
            own = set(picture.captions)
            captions = picture.captions + [text for text in picture.references if text not in own]
            yield Row(picture.place, picture.name, captions=captions, split=picture.split, image_id=image_id)
