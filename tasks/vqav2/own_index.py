"""Makes the index of people's own questions from plain rows (`sources`), all files or none."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from beit3.data import index_writing as writing
from beit3.data.findings import MAX_ID, Findings, shown
from beit3.data.index_description import tokenizer_hash
from beit3.data.tokenizer import BatchEncoder
from beit3.system.atomic_files import atomic_writes
from beit3.system.errors import InputError, printable
from sources.gathering import (
    Gathered,
    Lengths,
    summary_of_left_out,
    told_in_rows,
)
from sources.making import IndexKind, making
from sources.rows import TEST, TRAIN, VAL, Row, Source
from tasks.vqav2.answers import ANSWER_FILE, answer_lines, normalize_word, read_answers
from tasks.vqav2.index import DESCRIPTION, index_file, without_garbage_collection

VERSION = 1  # of the maker; raise it with every change of what is written
FULL_SHARE = 3  # an answer that a third of the people gave is as right as can be

Votes = Mapping[str, int]


def soft_score(votes: int, people: int) -> float:
    """Score in [0, 1] of an answer that `votes` of so many people gave: three times their share, 1 at most.

    Of ten people these are VQA v2's 0.3, 0.6, 0.9 and 1; one person's only answer scores 1.
    """
    return round(min(1.0, FULL_SHARE * votes / people), 6)


def given_most(votes: Votes) -> list[str]:
    """The answers that nobody outvotes, in order of first appearance."""
    most = max(votes.values())
    return [answer for answer, count in votes.items() if count == most]


def counted(votes: Votes, normalize: bool) -> Votes:
    """Votes of the answers in the form in which they are counted."""
    if not normalize:
        return votes
    forms: dict[str, int] = {}
    for answer, count in votes.items():
        if form := normalize_word(answer):  # nothing is left of "the"
            forms[form] = forms.get(form, 0) + count
    return forms


@without_garbage_collection()
def write_index(
    data: Path,
    sources: Mapping[str, Source],
    settings: Any,
    tokenizer: Any,
    images: Path | None,
    progress: bool | None = None,
) -> None:
    """Write `vqa.{train,val,test}.jsonl` and `answer2label.txt` into `data`; tell what was read and what left out.

    settings: a `VQASettings`. images: holds the pictures; None: the folder of the training table does.

    Raises:
        InputError: listing all that is wrong; nothing is written then.
    """
    with making(KIND, data, sources, settings, tokenizer, images, progress) as (made, encode):
        findings = made.reading.findings
        answers = _vocabulary(made, settings)
        findings.raise_any()
        tokens, lengths = writing.TokenCount(), Lengths()
        names = [*map(index_file, made.splits), ANSWER_FILE]
        with atomic_writes([data / name for name in (*names, DESCRIPTION)]) as (*opened, description):
            file_of = dict(zip(names, opened, strict=True))
            file_of[ANSWER_FILE].writelines(answer_lines(answers))
            covered = {}
            for split in made.splits:
                lines = _Lines(made, split, answers, settings.normalize_answers, encode, tokens, lengths)
                file_of[index_file(split)].writelines(lines)
                covered[split] = lines.coverage()
            findings.raise_any()
            hashed = tokenizer_hash(encode)
            description.write(made.describe(data, VERSION, file_of, settings, tokenizer_sha256=hashed))
            made.keep_pictures()
        if "test" not in made.splits:
            (data / index_file("test")).unlink(missing_ok=True)  # of an earlier index
    _print_summary(data, made, answers, covered, tokens, lengths, settings)


def _vocabulary(made: Gathered, settings: Any) -> list[str]:
    """The answers to learn: of the training rows, in order of first appearance, or those of the user's file."""
    counts: Counter[str] = Counter()
    for row, _ in made.rows[TRAIN]:
        if row.answers and (votes := counted(row.answers, settings.normalize_answers)):
            counts.update(given_most(votes))
    note, table = made.reading.findings.note, made.table()
    if not counts:
        note(f"{table}: column answer: no training row has an answer; rows", len(made.rows[TRAIN]))
        return []
    if not any(row.answers for row, _ in made.rows[VAL]):
        note(
            f"{table}: column answer: no validation row has an answer, so none can be scored; rows", len(made.rows[VAL])
        )
    if settings.answers is not None:
        named = _named_answers(settings.answers, made.reading.findings)
        if settings.normalize_answers:
            named = list(dict.fromkeys(form for answer in named if (form := normalize_word(answer))))
        if named and counts.keys().isdisjoint(named):
            note(f"--answers {settings.answers}: none of them is an answer of {table}; answers", len(named))
        return named
    if len(counts) == 1:
        note(f"{table}: column answer: all rows have the same answer, so there is nothing to learn", shown(*counts))
    elif max(counts.values()) == 1 and len(counts) > 2:
        what = f"{table}: column answer: all answers are different, and a model that chooses among answers it has seen "
        note(f"{what}cannot learn from that; answers", len(counts))
    kept = [answer for answer, count in counts.items() if count >= settings.min_answer_count]
    if not kept:
        note(f"{table}: column answer: none is there {settings.min_answer_count} times (--min_answer_count)", "answers")
    if settings.max_answers and len(kept) > settings.max_answers:
        ranked = {answer for answer, _ in counts.most_common(settings.max_answers)}
        kept = [answer for answer in kept if answer in ranked]
    return kept


def _named_answers(path: Path, findings: Findings) -> list[str]:
    """The answers in a file: `answer2label.txt`, or one per line."""
    try:
        content = path.read_bytes().removeprefix(BOM_UTF8)
        if content.lstrip().startswith(b"{"):
            return read_answers(path)
        lines = [line.strip() for line in content.decode("utf-8").splitlines()]
    except InputError as error:
        findings.broken_files += error.problems
        return []
    except (OSError, UnicodeDecodeError) as error:
        findings.broken_files.append(f"--answers {path}: cannot be read ({printable(str(error))[:100]})")
        return []
    named = [line for line in lines if line]
    for answer, count in Counter(named).items():
        if count > 1:
            findings.note(f"--answers {path}: an answer stands there more than once", shown(answer))
    if not named:
        findings.broken_files.append(f"--answers {path}: no answer in it; one per line is wanted")
    return named


class _Lines:
    """The lines of one split's index, and what became of its rows."""

    def __init__(
        self,
        made: Gathered,
        split: str,
        answers: list[str],
        normalize: bool,
        encode: BatchEncoder,
        tokens: writing.TokenCount,
        lengths: Lengths,
    ) -> None:
        self.made, self.split, self.normalize, self.lengths = made, split, normalize, lengths
        self.label_of = {answer: label for label, answer in enumerate(answers)}
        self.encode, self.tokens = encode, tokens
        self.covered = 0  # rows of which an answer is in the list
        self.known, self.reached = 0, 0.0  # rows with answers; the best score that the list allows, summed over them

    def __iter__(self) -> Iterator[str]:
        source = self.made.sources.get(self.split, self.made.sources[TRAIN])
        path, findings = source.files[0], self.made.reading.findings
        ids = _numbers(row for row, _ in self.made.rows[self.split])
        rows = zip(self.made.rows[self.split], ids, strict=True)
        encoded = writing.tokenized(rows, lambda each: each[0][0].question, self.encode, self.tokens, path)
        for ((row, picture), number), text in encoded:
            if not text:
                findings.note(
                    f"{path}: column question: the tokenizer leaves nothing of it",
                    f"{row.place}, {shown(row.question)}",
                )
                continue
            self.lengths.add(len(text))
            line = self._line(row, picture, number, text)
            if line is not None and findings.check_line(line, path, row.place):
                yield line

    def _line(self, row: Row, picture: str, number: int, text: list[int]) -> str | None:
        votes = counted(row.answers or {}, self.normalize)
        people = sum(votes.values())
        labels = {
            self.label_of[answer]: soft_score(n, people) for answer, n in votes.items() if answer in self.label_of
        }
        if row.answers is not None:
            self.known += 1
            self.reached += max(labels.values(), default=0.0)
            self.covered += bool(labels)
        if self.split == TRAIN and not labels:
            why = "no answer of theirs is in the list" if row.answers else "they have no answer"
            self.made.reading.leave_out(why, self.made.table(), row.place)
            return None
        weight = "" if row.weight == 1 else f', "weight": {json.dumps(row.weight)}'
        return (
            f'{{"image_path": {json.dumps(picture)}, "text_segment": {text}, "labels": {list(labels)}, '
            f'"scores": {list(labels.values())}, "qid": {number}{weight}{self._said(row)}}}\n'
        )

    def _said(self, row: Row) -> str:
        """What only scores and predictions are made from; training rows need not carry it."""
        if self.split == TRAIN:
            return ""
        said: dict[str, Any] = {"question": row.question}
        if row.question_id is not None:
            said["question_id"] = row.question_id
        if row.answers is not None:
            said["answers"] = dict(row.answers)
        return ", " + json.dumps(said)[1:-1]

    def coverage(self) -> str:
        """For people: of how many questions the list has an answer, and what score that allows at most."""
        if not self.known:
            return ""
        share, best = (100 * part / self.known for part in (self.covered, self.reached))
        return f"; the list has an answer of {share:.1f} % of them, which allows a score of {best:.1f}"


def _numbers(rows: Iterable[Row]) -> Iterator[int]:
    """The questions' ids where all are whole numbers, else their numbers from 1."""
    rows = list(rows)
    ids = [row.question_id for row in rows]
    plain = all(type(each) is int and -MAX_ID <= each <= MAX_ID for each in ids)
    return iter(ids if plain else range(1, len(rows) + 1))  # type: ignore[arg-type]


def _print_summary(
    data: Path,
    made: Gathered,
    answers: list[str],
    covered: Mapping[str, str],
    tokens: writing.TokenCount,
    lengths: Lengths,
    settings: Any,
) -> None:
    lines = []
    for split in made.splits:
        lines.append(f"{index_file(split)}: {told_in_rows(made, split, 'questions')}{covered[split]}")
    lines += summary_of_left_out(made.reading)
    forms = Counter(map(normalize_word, answers))
    double = len(answers) - len(forms)
    if double and not settings.normalize_answers:
        shown_form = next(form for form, count in forms.items() if count > 1)
        alike = ", ".join(shown(answer) for answer in answers if normalize_word(answer) == shown_form)
        lines.append(f"{double} answers differ from others in case or punctuation only ({alike}); --normalize_answers")
    kind = ", ".join(dict.fromkeys(source.kind for source in made.sources.values()))
    head = f"index of {kind} written to {data}: {len(answers)} answers in {ANSWER_FILE}"
    writing.print_summary(head, [*lines, lengths.line()], tokens)


KIND = IndexKind(
    asks=True,
    needed=(index_file(TRAIN), index_file(VAL), ANSWER_FILE),
    further=(index_file(TEST),),
    description=DESCRIPTION,
    version=VERSION,
    write=write_index,
)
