"""A-OKVQA: questions that need knowledge of the world. https://github.com/allenai/aokvqa

    [{"split": "train", "image_id": 299207, "question_id": "22MexNkBPpdZGX6sxbxVBH",
      "question": "What is the man by the bags awaiting?", "choices": ["skateboarder", …], "correct_choice_idx": 3,
      "direct_answers": ["ride", "ride", "bus", … ten of them]}, …]

The direct answers are read, not the choices. Pictures are COCO's of 2017, which carry the image id in their name.
Questions of the test split have no answers.
"""

from __future__ import annotations

from collections.abc import Iterator

from beit3.data.findings import wrong_id, wrong_text
from sources.look import Look
from sources.readers.base import FormatSource, Once, given, votes_of, wrong_number_or_text, wrong_split, wrong_texts
from sources.rows import SPLIT_OF, TEST, Reading, Row

_QUESTION = {
    "split": wrong_split,
    "image_id": wrong_id,
    "question_id": wrong_number_or_text,
    "question": wrong_text,
}
_ANSWERS = {"direct_answers": wrong_texts}


class AOkVqa(FormatSource):
    kind, asks = "A-OKVQA", True

    @staticmethod
    def fits(look: Look) -> bool:
        known = look.entry & {"choices", "direct_answers"}
        return look.kind == "list" and look.entry >= _QUESTION.keys() and bool(known)

    def rows(self, reading: Reading) -> Iterator[Row]:
        findings, ids = reading.findings, Once(self.path, "question_id", reading)
        for number, entry in enumerate(findings.stream(self.path, None, reading.on_bytes)):
            place = f"[{number}]"
            split = SPLIT_OF.get(str(entry.get("split")).lower()) if type(entry) is dict else None
            answers = given(entry, _ANSWERS) if split == TEST else _ANSWERS
            if not findings.check_fields(self.path, place, entry, _QUESTION | answers):
                continue
            if ids.is_new(entry["question_id"], place):
                votes = votes_of(entry["direct_answers"]) if answers else None
                yield Row(place, "", entry["question"], votes, (), split, entry["question_id"], entry["image_id"])
