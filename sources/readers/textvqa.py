"""TextVQA: questions about text in pictures of Open Images. https://textvqa.org/dataset/

    {"dataset_type": "train", "data": [{"question": "what is the brand of this camera?", "image_id": "003a8ae2ef43b901",
      "question_id": 34602, "answers": ["nous les gosses", "dakota", … ten of them], "set_name": "train"}, …]}

The picture is `<image_id>.jpg`. Questions of the test set have no answers.
"""

from __future__ import annotations

from collections.abc import Iterator

from beit3.data.findings import wrong_text
from sources.look import NOTHING, Look
from sources.readers.base import (
    FormatSource,
    Once,
    given,
    named_after,
    votes_of,
    wrong_number_or_text,
    wrong_picture_id,
    wrong_split,
    wrong_texts,
)
from sources.rows import SPLIT_OF, Reading, Row

_QUESTION = {"question_id": wrong_number_or_text, "image_id": wrong_picture_id, "question": wrong_text}
_OPTIONAL = {"answers": wrong_texts, "set_name": wrong_split}


class TextVqa(FormatSource):
    kind, asks = "TextVQA", True

    @staticmethod
    def fits(look: Look) -> bool:
        return look.inside.get("data", NOTHING) >= _QUESTION.keys()

    def rows(self, reading: Reading) -> Iterator[Row]:
        findings, ids = reading.findings, Once(self.path, "question_id", reading)
        for number, entry in enumerate(findings.stream(self.path, "data", reading.on_bytes)):
            place = f"data[{number}]"
            if not findings.check_fields(self.path, place, entry, _QUESTION | given(entry, _OPTIONAL)):
                continue
            question_id, image_id, answers = entry["question_id"], entry["image_id"], entry.get("answers")
            if ids.is_new(question_id, place):
                votes = None if answers is None else votes_of(answers)
                split = SPLIT_OF.get((entry.get("set_name") or "").lower())
                yield Row(place, named_after(image_id), entry["question"], votes, (), split, question_id, image_id)
