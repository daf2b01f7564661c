"""VizWiz-VQA: pictures and spoken questions of blind people. https://vizwiz.org/tasks-and-datasets/vqa/

    [{"image": "VizWiz_train_00000000.jpg", "question": "What's the name of this product?",
      "answers": [{"answer": "basil leaves", "answer_confidence": "yes"}, … ten of them],
      "answer_type": "other", "answerable": 1}, …]

Questions have no id. The test file has pictures and questions alone. "unanswerable" is an answer like others.
"""

from __future__ import annotations

from collections.abc import Iterator

from beit3.data.findings import wrong_list, wrong_path, wrong_string, wrong_text
from sources.look import Look
from sources.readers.base import FormatSource, given, votes_of
from sources.rows import Reading, Row

_QUESTION = {"image": wrong_path, "question": wrong_text}
_ANSWERS = {"answers": wrong_list}
_ANSWER = {"answer": wrong_string}


class VizWiz(FormatSource):
    kind, asks = "VizWiz", True

    @staticmethod
    def fits(look: Look) -> bool:
        typed = look.entry & {"answer_type", "answerable"}
        return look.kind == "list" and look.entry >= {"image", "question"} and bool(typed)

    def rows(self, reading: Reading) -> Iterator[Row]:
        findings = reading.findings
        for number, entry in enumerate(findings.stream(self.path, None, reading.on_bytes)):
            place = f"[{number}]"
            if not findings.check_fields(self.path, place, entry, _QUESTION | given(entry, _ANSWERS)):
                continue
            answers = entry.get("answers")
            if answers is None:
                yield Row(place, entry["image"], entry["question"])
            elif findings.check_list(self.path, f"{place}.answers", answers, _ANSWER):
                votes = votes_of(each["answer"] for each in answers)
                yield Row(place, entry["image"], entry["question"], votes)
