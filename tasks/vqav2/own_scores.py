"""What answers to people's own questions are worth, from the rows themselves: no official files are needed."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from beit3.system.errors import printable
from tasks.vqav2.answers import answer_accuracy, is_exact, normalize_word
from tasks.vqav2.own_index import Votes, counted, given_most, soft_score

OFFICIAL_PEOPLE = 10  # the official accuracy means something where so many answered
BEGINNING = 2  # words of a question that it is grouped by
MOST_GROUPS = 20
Worth = Mapping[str, float]
_NUMBER = re.compile(r"[-+]?\d+([.,:]\d+)*")


def row_score(answer: str, votes: Votes, normalize: bool, worth: Worth | None = None) -> float:
    """Soft score in [0, 1] of one answer; votes: how many gave which. worth: answer → score, where the row says the
    scores themselves and no votes."""
    if worth is not None:
        form = normalize_word if normalize else str
        return max((score for each, score in worth.items() if form(each) == form(answer)), default=0.0)
    forms = counted(votes, normalize)
    votes_for = forms.get(normalize_word(answer) if normalize else answer, 0)
    return soft_score(votes_for, sum(forms.values())) if votes_for else 0.0


def answer_type(votes: Votes) -> str:
    """ "yes/no", "number" or "other", by the answer that most gave."""
    answer = given_most(votes)[0].strip()
    form = normalize_word(answer)
    if form in ("yes", "no"):
        return "yes/no"
    return "number" if _NUMBER.fullmatch(form) or _NUMBER.fullmatch(answer) else "other"


def beginning(question: str) -> str:
    """The first words of a question, in lower case."""
    return " ".join(question.lower().split()[:BEGINNING])


def _scores(answers: Sequence[str], known: Sequence[tuple[Votes, Worth | None]], normalize: bool) -> list[float]:
    return [row_score(answer, votes, normalize, worth) for answer, (votes, worth) in zip(answers, known, strict=True)]


def report_on(
    predicted: Sequence[str],
    questions: Sequence[str],
    votes: Sequence[Votes],
    normalize: bool,
    worth: Sequence[Worth | None] | None = None,
) -> dict[str, Any]:
    """The scores of answers to questions whose right answers are known, percentages in [0, 100].

    votes, worth: of each question, see `row_score`.

    `score`: mean soft score. `exact_match`: share of answers that somebody gave. `by_answer_type`,
    `by_question_beginning` (the most frequent ones): mean soft scores. `macro_average`: the mean over right answers of
    the mean soft score of their questions, so rare ones count as much as frequent ones. `commonest_answer`: what saying
    one answer to everything reaches, and `commonest_by_question`, the commonest answer of the other questions that
    begin alike (with the question itself among them, few questions would guess themselves).
    `official_vqa_accuracy` with `questions_of_ten_people`: by the official formula, of the questions that ten or more
    people answered, where there are any.
    """
    known = list(zip(votes, worth or [None] * len(votes), strict=True))
    scores = _scores(predicted, known, normalize)
    right = [given_most(given)[0] for given in votes]
    exact = [is_exact(answer, list(given)) for answer, given in zip(predicted, votes, strict=True)]
    starts = [beginning(question) for question in questions]
    most = [start for start, _ in Counter(starts).most_common(MOST_GROUPS)]
    common = Counter(right).most_common(1)[0][0]
    of_start: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for start, answer in zip(starts, right, strict=True):
        of_start[start][answer] += 1
    guesses = [_commonest_but(of_start[start], answer) or common for start, answer in zip(starts, right, strict=True)]
    report = {
        "questions": len(scores),
        "score": _percent(scores),
        "exact_match": _percent(exact),
        "macro_average": _percent(list(_means(right, scores).values())) if scores else 0.0,
        "by_answer_type": _percentages(map(answer_type, votes), scores),
        "by_question_beginning": {
            start: mean for start, mean in _percentages(starts, scores).items() if start in set(most)
        },
        "commonest_answer": {
            "answer": common,
            "score": _percent(_scores([common] * len(known), known, normalize)),
        },
        "commonest_by_question": {"score": _percent(_scores(guesses, known, normalize))},
    }
    ten = [n for n, given in enumerate(votes) if sum(given.values()) >= OFFICIAL_PEOPLE]
    if ten:
        official = [answer_accuracy(predicted[n], list(Counter(votes[n]).elements())) for n in ten]
        report |= {"official_vqa_accuracy": _percent(official), "questions_of_ten_people": len(ten)}
    return report


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The report as a person reads it."""
    common, by_question = report["commonest_answer"], report["commonest_by_question"]
    lines = [
        f"score {report['score']:.2f} on {report['questions']} questions; exact match {report['exact_match']:.2f}, "
        f"mean over answers {report['macro_average']:.2f}",
        f"  {printable(common['answer'])[:60]!r} to all of them scores {common['score']:.2f}, the commonest answer by "
        f"the question's first words {by_question['score']:.2f}",
    ]
    if "official_vqa_accuracy" in report:
        lines.append(
            f"  official VQA accuracy {report['official_vqa_accuracy']:.2f} on the "
            f"{report['questions_of_ten_people']} questions that ten people answered"
        )
    for part, title in (("by_answer_type", "by answer type"), ("by_question_beginning", "by question beginning")):
        lines.append(f"  {title}:")
        ranked = sorted(report[part].items(), key=lambda item: -item[1])
        lines += [f"    {printable(name)[:40]:<28} {mean:6.2f}" for name, mean in ranked]
    return lines


def _commonest_but(counts: Counter[str], own: str) -> str | None:
    """The commonest answer when one `own` is taken away; of equal ones another than `own`. None where none is left."""
    (first, most), *others = counts.most_common(2)
    if first != own:
        return first
    if others and others[0][1] >= most - 1:
        return others[0][0]
    return own if most > 1 else None


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values) if values else 0.0


def _means(groups: Any, scores: Sequence[float]) -> dict[str, float]:
    by_group: defaultdict[str, list[float]] = defaultdict(list)
    for group, score in zip(groups, scores, strict=True):
        by_group[group].append(score)
    return {group: sum(each) / len(each) for group, each in by_group.items()}


def _percentages(groups: Any, scores: Sequence[float]) -> dict[str, float]:
    return {group: 100 * mean for group, mean in _means(groups, scores).items()}
