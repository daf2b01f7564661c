"""Answers of VQA v2: normalisation, vocabulary, soft scores, and the official accuracy."""

from __future__ import annotations

import json
import os
import re
from codecs import BOM_UTF8
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from beit3.system.errors import InputError

MIN_ANSWER_COUNT = 9  # an answer given less often is not in the vocabulary
ANSWER_FILE = "answer2label.txt"
MIN_PEOPLE = 4  # per question; with fewer, even an answer that all of them gave has an official accuracy below 1

# Soft score by votes of the ten annotators, of BEiT-3 and its predecessors (the official accuracy, averaged over which
# annotator is left out, would give these values for 1, 2, 3 and 4 votes: 0.3, 0.6, 0.9, 1.0).
_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)

# The tables and rules of the official evaluation code of VQA (https://visualqa.org/evaluation, vqaEval.py), kept with
# their quirks ("somebody'd" loses its apostrophe; "Im" never matches, as words are lower-cased first): the vocabulary
# of released heads and published scores depend on them.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER_WORDS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_CONTRACTIONS = {
    "aint": "ain't", "arent": "aren't", "cant": "can't", "couldve": "could've", "couldnt": "couldn't",
    "couldn'tve": "couldn't've", "couldnt've": "couldn't've", "didnt": "didn't", "doesnt": "doesn't", "dont": "don't",
    "hadnt": "hadn't", "hadnt've": "hadn't've", "hadn'tve": "hadn't've", "hasnt": "hasn't", "havent": "haven't",
    "hed": "he'd", "hed've": "he'd've", "he'dve": "he'd've", "hes": "he's", "howd": "how'd", "howll": "how'll",
    "hows": "how's", "Id've": "I'd've", "I'dve": "I'd've", "Im": "I'm", "Ive": "I've", "isnt": "isn't", "itd": "it'd",
    "itd've": "it'd've", "it'dve": "it'd've", "itll": "it'll", "let's": "let's", "maam": "ma'am", "mightnt": "mightn't",
    "mightnt've": "mightn't've", "mightn'tve": "mightn't've", "mightve": "might've", "mustnt": "mustn't",
    "mustve": "must've", "neednt": "needn't", "notve": "not've", "oclock": "o'clock", "oughtnt": "oughtn't",
    "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at", "shant": "shan't", "shed've": "she'd've",
    "she'dve": "she'd've", "she's": "she's", "shouldve": "should've", "shouldnt": "shouldn't",
    "shouldnt've": "shouldn't've", "shouldn'tve": "shouldn't've", "somebody'd": "somebodyd",
    "somebodyd've": "somebody'd've", "somebody'dve": "somebody'd've", "somebodyll": "somebody'll",
    "somebodys": "somebody's", "someoned": "someone'd", "someoned've": "someone'd've", "someone'dve": "someone'd've",
    "someonell": "someone'll", "someones": "someone's", "somethingd": "something'd", "somethingd've": "something'd've",
    "something'dve": "something'd've", "somethingll": "something'll", "thats": "that's", "thered": "there'd",
    "thered've": "there'd've", "there'dve": "there'd've", "therere": "there're", "theres": "there's", "theyd": "they'd",
    "theyd've": "they'd've", "they'dve": "they'd've", "theyll": "they'll", "theyre": "they're", "theyve": "they've",
    "twas": "'twas", "wasnt": "wasn't", "wed've": "we'd've", "we'dve": "we'd've", "weve": "we've", "werent": "weren't",
    "whatll": "what'll", "whatre": "what're", "whats": "what's", "whatve": "what've", "whens": "when's",
    "whered": "where'd", "wheres": "where's", "whereve": "where've", "whod": "who'd", "whod've": "who'd've",
    "who'dve": "who'd've", "wholl": "who'll", "whos": "who's", "whove": "who've", "whyll": "why'll", "whyre": "why're",
    "whys": "why's", "wont": "won't", "wouldve": "would've", "wouldnt": "wouldn't", "wouldnt've": "wouldn't've",
    "wouldn'tve": "wouldn't've", "yall": "y'all", "yall'll": "y'all'll", "y'allll": "y'all'll",
    "yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've", "youd": "you'd",
    "youd've": "you'd've", "you'dve": "you'd've", "youll": "you'll", "youre": "you're", "youve": "you've",
}  # fmt: skip


def normalize_word(answer: str) -> str:
    """The form of an answer in which answers are counted: no punctuation, case, articles; digits for number words.

    `normalize_word("The left/right, two.") == "left right 2"`. May be "" ("a an the").
    """
    return _tidy_words(_strip_punctuation(answer))


def build_answer_vocabulary(answers: Iterable[str] | Mapping[str, int], min_count: int = MIN_ANSWER_COUNT) -> list[str]:
    """Normalised answers given at least `min_count` times, in order of first appearance; the index is the label.

    answers: the `multiple_choice_answer` of all training questions, then of all validation questions; or how often
    each was given, in order of first appearance. Released heads depend on this order.
    """
    given = answers if isinstance(answers, Mapping) else Counter(answers)
    counts: dict[str, int] = defaultdict(int)
    for answer, count in given.items():
        counts[normalize_word(answer)] += count
    return [answer for answer, count in counts.items() if count >= min_count]


def vote_score(votes: int) -> float:
    """Soft score in [0, 1] of an answer that `votes` of the ten annotators gave."""
    return _SCORES[min(votes, len(_SCORES) - 1)]


def answer_lines(answers: Iterable[str]) -> Iterable[str]:
    """The lines of `answer2label.txt`, each ending in a line feed."""
    for label, answer in enumerate(answers):
        yield json.dumps({"answer": answer, "label": label}) + "\n"


def read_answers(path: str | os.PathLike[str]) -> list[str]:
    """The answers in `answer2label.txt`, at the index of their label.

    Raises InputError naming file and line of each line that is not `{"answer": …, "label": …}`, whose label is not
    its line number (from 0) or whose answer came before.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: missing; VQAv2Dataset.make_dataset_index writes it")
    if not (content := path.read_bytes().removeprefix(BOM_UTF8).rstrip()):
        raise InputError(f"{path}: is empty; VQAv2Dataset.make_dataset_index writes it")
    answers: list[str] = []
    problems: list[str] = []
    first_line: dict[str, int] = {}
    # Bytes: one that is no UTF-8 is then a bad line, with its place. What editors add, a byte order mark and blank
    # lines at the end, is gone here; a blank line between others is a bad one, as lines are counted.
    for label, line in enumerate(content.split(b"\n")):
        place = f"{path}:{label + 1}"
        try:
            answer = _answer_of_line(line, label)
        except ValueError as error:
            problems.append(f"{place}: {error}")
            continue
        if answer in first_line:
            problems.append(f"{place}: answer {answer!r} is in line {first_line[answer]} already")
        first_line.setdefault(answer, label + 1)
        answers.append(answer)
    if problems:
        raise InputError(problems)
    return answers


def answers_said(description: Mapping[str, Any]) -> list[str] | None:
    """The answers, row by row, that a checkpoint says its head has; None where it says none.

    Raises:
        InputError: what it says is no list of texts.
    """
    said = description.get("answers")
    if said is None:
        return None
    if type(said) is not list or not all(type(answer) is str for answer in said) or not said:
        raise InputError(f"the checkpoint's description says answers that are no list of texts: {said!r:.80}")
    return list(said)


def rows_by_text(old: Sequence[str], new: Sequence[str]) -> tuple[int, ...]:
    """For each of the new answers the number that it has among the old ones, -1 where it is not among them.

    `rows_by_text(["yes", "no"], ["red", "yes"]) == (-1, 0)`
    """
    number_of = {answer: number for number, answer in reversed(list(enumerate(old)))}
    return tuple(number_of.get(answer, -1) for answer in new)


def vqa_accuracy(answers: Mapping[int, str], annotations: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The official VQA v2 accuracy.

    answers: the predicted answer by question id. annotations: those of the official file, each with `question_id`,
    `answers` (ten of `{"answer": …}`), `answer_type`, `question_type`; they may come one by one from `stream_array`.
    Questions that are in only one of the two do not count (their numbers are returned).

    Returns percentages in [0, 100], not rounded (the official code rounds to two places): `overall`, `by_answer_type`
    and `by_question_type` (both name → percentage), and counts `questions`, `not_answered`, `not_annotated`. `overall`
    is 0 where no question counts. Where some questions have the answers of fewer than `MIN_PEOPLE`, which the formula
    never gives 100, there are also `questions_of_few_people` and `exact_match`, the percentage of them whose answer
    somebody gave; where all questions are such, the latter takes the place of `overall` and is what is grouped.
    """
    # (grouping, name) → [sum of accuracies, exact matches, count]
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0])
    found = not_answered = few = 0
    for annotation in annotations:
        answer = answers.get(annotation["question_id"])
        if answer is None:
            not_answered += 1
            continue
        found += 1
        humans = [given["answer"] for given in annotation["answers"]]
        accuracy, exact = answer_accuracy(answer, humans), False
        if len(humans) < MIN_PEOPLE:
            few, exact = few + 1, is_exact(answer, humans)
        groups = (("overall", ""), ("answer", annotation["answer_type"]), ("question", annotation["question_type"]))
        for group in groups:
            totals[group][0] += accuracy
            totals[group][1] += exact
            totals[group][2] += 1
    only_few = few > 0 and few == found

    def percentages(grouping: str, exact: bool = only_few) -> dict[str, float]:
        return {name: 100 * sums[exact] / sums[2] for (kind, name), sums in totals.items() if kind == grouping}

    overall = {} if only_few else {"overall": percentages("overall").get("", 0.0)}
    if few:
        overall |= {"exact_match": 100 * totals["overall", ""][1] / few, "questions_of_few_people": few}
    return {
        **overall,
        "by_answer_type": percentages("answer"),
        "by_question_type": percentages("question"),
        "questions": found,
        "not_answered": not_answered,
        "not_annotated": len(answers) - found,
    }


def is_exact(answer: str, human_answers: list[str]) -> bool:
    """Whether somebody gave that answer, to the letter or in the form in which answers are counted."""
    answer = _strip_space(answer)
    given = list(map(_strip_space, human_answers))
    return answer in given or normalize_word(answer) in map(normalize_word, given)


def answer_accuracy(answer: str, human_answers: list[str]) -> float:
    """Accuracy in [0, 1] of one answer: for each annotator, min(1, matches among the others / 3); the mean of that.

    Answers are put through the official processing only where the annotators do not all agree to the letter, as in
    the official code: an agreed "The dog." matches "The dog." alone.
    """
    answer = _strip_space(answer)
    human_answers = [_strip_space(given) for given in human_answers]
    if len(set(human_answers)) > 1:
        answer = normalize_word(answer)
        human_answers = [normalize_word(given) for given in human_answers]
    matches = human_answers.count(answer)
    total = sum(min(1.0, (matches - (given == answer)) / 3) for given in human_answers)
    return total / max(len(human_answers), 1)


def _strip_space(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _strip_punctuation(text: str) -> str:
    """Remove or open up punctuation: a sign next to a space anywhere in the text goes, else it becomes a space."""
    remove_all = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for sign in _PUNCTUATION:
        if sign in text:
            removed = remove_all or sign + " " in text or " " + sign in text
            result = result.replace(sign, "" if removed else " ")
    return _PERIOD.sub("", result)


def _tidy_words(text: str) -> str:
    """Lower-case words, number words as digits, articles dropped, apostrophes of contractions restored."""
    words = (_NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _answer_of_line(line: bytes, label: int) -> str:
    """The answer in a line of `answer2label.txt`; ValueError where the line is not what line `label` must be."""
    wanted = '{"answer": "…", "label": ' + str(label) + "}"
    try:
        entry = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"not JSON; {wanted} expected") from None
    if not isinstance(entry, dict) or type(entry.get("answer")) is not str or type(entry.get("label")) is not int:
        raise ValueError(f"{wanted} expected, found {line[:100]!r}")
    entry["answer"].encode()  # UnicodeEncodeError, a ValueError, for half a surrogate pair
    if entry["label"] != label:
        raise ValueError(f"label {entry['label']} in a line whose number, counted from 0, is {label}; wanted {wanted}")
    return entry["answer"]
