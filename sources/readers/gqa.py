"""GQA: questions made from scene graphs. https://cs.stanford.edu/people/dorarad/gqa/download.html

    {"201307251": {"imageId": "2354786", "question": "Is it overcast?", "answer": "no", "fullAnswer": …}, …}

The key is the question's id, and the picture is `<imageId>.jpg`. Questions of the test and challenge files have no
answer.
"""

from __future__ import annotations

from collections.abc import Iterator

from beit3.data.findings import shown, wrong_text
from beit3.data.json_stream import stream_members
from sources.look import Look
from sources.readers.base import FormatSource, Once, given, named_after, wrong_picture_id
from sources.rows import Reading, Row

_QUESTION = {"imageId": wrong_picture_id, "question": wrong_text}
_ANSWER = {"answer": wrong_text}


class Gqa(FormatSource):
    kind, asks = "GQA", True

    @staticmethod
    def fits(look: Look) -> bool:
        return any(keys >= _QUESTION.keys() for keys in look.inside.values())

    def rows(self, reading: Reading) -> Iterator[Row]:
        findings, ids = reading.findings, Once(self.path, "question id", reading)
        for key, entry in findings.until_broken(self.path, stream_members(self.path, reading.on_bytes)):
            place = f"question {shown(key)}"
            right = findings.check_fields(self.path, place, entry, _QUESTION | given(entry, _ANSWER))
            if ids.is_new(key, place) and right:
                answer, image_id = entry.get("answer"), entry["imageId"]
                votes = None if answer is None else {answer: 1}
                yield Row(place, named_after(image_id), entry["question"], votes, question_id=key, image_id=image_id)
