"""Conversations about a picture, as LLaVA and ShareGPT have them: JSON lists, or JSON lines.

https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md
https://llamafactory.readthedocs.io/en/latest/getting_started/data_preparation.html (ShareGPT, OpenAI)

    [{"id": "997bb945", "image": "part_1/997bb945.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is in the photo?"}, {"from": "gpt", "value": "A dog."}]}, …]

or `images` with one picture, and `messages` with `role` and `content`. Read are conversations of one question and one
answer, whatever the system is told before; others are left out. `id` names a conversation and may repeat, as in LLaVA's
own files, so it is no question id.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beit3.data.findings import Findings, wrong_list, wrong_path, wrong_string
from beit3.data.json_stream import stream_lines
from sources.look import Look, look_at
from sources.readers.base import FormatSource, given
from sources.rows import Reading, Row

QUESTION_ROLES, ANSWER_ROLES = {"human", "user"}, {"gpt", "assistant", "chatgpt", "model"}
IMAGE_TOKEN = "<image>"

_TURNS = {"conversations": ("from", "value"), "messages": ("role", "content")}  # key → keys of who speaks and what


class Conversations(FormatSource):
    kind, asks = "conversations", True

    def __init__(self, path: Path):
        super().__init__(path)
        self.lines = look_at(path).kind == "lines"

    @staticmethod
    def fits(look: Look) -> bool:
        return look.kind in ("list", "lines") and bool(look.entry & _TURNS.keys())

    def rows(self, reading: Reading) -> Iterator[Row]:
        for place, entry in self._entries(reading):
            read = self._read(place, entry, reading.findings)
            if isinstance(read, Row):
                yield read
            elif read is not None:
                reading.leave_out(read, self.path, place)

    def _entries(self, reading: Reading) -> Iterator[tuple[str, Any]]:
        """Yield (place, conversation)."""
        findings = reading.findings
        if self.lines:
            for number, entry in findings.until_broken(self.path, stream_lines(self.path, reading.on_bytes)):
                yield f"line {number}", entry
        else:
            for number, entry in enumerate(findings.stream(self.path, None, reading.on_bytes)):
                yield f"[{number}]", entry

    def _read(self, place: str, entry: Any, findings: Findings) -> Row | str | None:
        """The row of a conversation, or why it is left out; None where it is wrong, which is noted."""
        key = next((key for key in _TURNS if type(entry) is dict and key in entry), "conversations")
        pictures = {"image": _wrong_pictures, "images": _wrong_pictures}
        if not findings.check_fields(self.path, place, entry, {key: wrong_list} | given(entry, pictures)):
            return None
        who, what = _TURNS[key]
        if not findings.check_list(self.path, f"{place}.{key}", entry[key], {who: wrong_string, what: _wrong_content}):
            return None
        images = entry.get("image") or entry.get("images") or []
        if type(images) is list and len(images) != 1:
            return "several pictures" if images else "no picture"
        turns = [(turn[who].lower(), turn[what]) for turn in entry[key] if turn[who].lower() != "system"]
        if why := _why_not(turns):
            return why
        question, answer = (text.replace(IMAGE_TOKEN, "").strip() for _, text in turns)
        if not (question and answer):
            return "a blank answer" if question else "a blank question"
        return Row(place, images if type(images) is str else images[0], question, {answer: 1})


def _why_not(turns: list[tuple[str, Any]]) -> str | None:
    """Why turns, pairs of who speaks and what, are not one question and one answer; None: they are."""
    asked = [QUESTION_ROLES.__contains__(role) for role, _ in turns]
    if not all(role in QUESTION_ROLES | ANSWER_ROLES for role, _ in turns):
        return "somebody speaks who neither asks nor answers"
    if len(turns) > 2:
        return "several turns"
    if True not in asked:
        return "no question"
    if False not in asked:
        return "no answer"
    if asked != [True, False]:
        return "the answer stands before the question"
    return None if all(type(text) is str for _, text in turns) else "a turn that is no plain text"


def _wrong_content(value: Any) -> str | None:
    """What is wrong with what is said: a text, or parts or nothing, which other conversations have."""
    return None if value is None or type(value) is list else wrong_string(value)


def _wrong_pictures(value: Any) -> str | None:
    """What is wrong with the path of a picture, or a list of some."""
    if type(value) is not list:
        return wrong_path(value)
    wrong = [what for each in value if (what := wrong_path(each))]
    return f"holds what {wrong[0]}" if wrong else None
