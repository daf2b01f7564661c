"""Penn Treebank tokens of captions, as pycocoevalcap's Java tokenizer gives them, in Python.

Published caption scores rest on the tokens of stanford-corenlp 3.4.1 (`PTBTokenizer -preserveLines -lowerCase`), from
which pycocoevalcap removes a list of punctuation. This is a tokenizer of the same kind: at each place the longest
match of a table of rules wins, among equals the earlier rule. The rules were found by comparing outputs and keep the
reference's oddities, for equal scores: `(` stays as `-lrb-`, `!!` stays where `!` goes, £ becomes #, an emoji vanishes,
and a full stop at the end of a caption can depend on the caption in the next line (see `tokenize_lines`).

Not copied, because there the reference moves words from one caption to the next: a line end within a caption (also
U+000B, U+000C, U+000D, U+2028, U+2029) is read as a space, and a tag such as `<a b="…">` ends with its line.
Known to differ: the lower case of Σ beside a hyphen, underscore or digit, where Java finds word ends of its own, and
an address that is nothing but one emoji (`http://😀`), in which Java counts two characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from tasks.captioning.scores import ptb_tables as tables

# What pycocoevalcap removes. It spells brackets in capitals, so the `-lrb-` of the lower-casing tokenizer stays.
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

_LINE_ENDS = str.maketrans(dict.fromkeys("\n\x0b\x0c\r\u2028\u2029", " "))


def tokenize(caption: str) -> str:
    """The tokens of one caption, lower case, joined by spaces: `"A dog's ball."` → `"a dog 's ball"`.

    As the reference tokenizes it in a line of its own with nothing behind it. "" for a caption of nothing but
    punctuation. A token can hold a no-break space (`1\\u00a01/2`, telephone numbers). Any string is accepted.
    """
    text = caption.translate(_LINE_ENDS)
    return " ".join(_tokens(text + "\n", 0, len(text)))


def tokenize_lines(captions: Sequence[str]) -> list[str]:
    """The tokens of each caption, as the reference gives them when it reads all of them as the lines of one file.

    That is how pycocoevalcap calls it, and it can show where a caption ends with an initial or with "no.": before a
    line that begins with "A " or "The " the full stop of `vitamin C.` is the end of a sentence and goes, else it
    stays with the letter. Equal to `tokenize` for captions that do not end like that, but for a `:)`, `'n` or `'99`
    with which the last caption ends: the reference wants to see a character behind these.
    """
    lines = [caption.translate(_LINE_ENDS) for caption in captions]
    text = "\n".join(lines)
    tokenized, start = [], 0
    for line in lines:
        tokenized.append(" ".join(_tokens(text, start, start + len(line))))
        start += len(line) + 1
    return tokenized


def _tokens(text: str, start: int, end: int) -> list[str]:
    """The tokens that begin in text[start:end], without punctuation; what follows `end` is only looked at."""
    tokens: list[str] = []
    at = start
    while at < end:
        plain = _PLAIN_WORD.match(text, at)
        if plain and plain[1].lower() not in _SPLIT_WORDS:
            tokens.append(plain[1])
            at = plain.end()
            continue
        longest: re.Match[str] | None = None
        emit_longest: Emit = _nothing
        reach = at
        for rule, emit in _rules():
            found = rule.match(text, at)
            if found and found.end() > reach:  # what a rule looks at behind its token counts, as in the reference
                longest, emit_longest, reach = found, emit, found.end()
        if longest is None:
            at += 1  # a character the reference drops
            continue
        tokens += emit_longest(longest[1])
        at = longest.end(1)
    if tokens:
        tokens[-1] = tokens[-1].rstrip()  # pycocoevalcap strips the line, which can cut into an address
    return [token for token in map(str.lower, tokens) if token not in PUNCTUATION]


# --- What becomes of the text a rule has matched ---

Emit = Callable[[str], list[str]]

_QUOTES = str.maketrans(
    {"\u2018": "`", "\u201b": "`", "\u2039": "`", "\u0091": "`", "\u2019": "'", "\u203a": "'", "\u0092": "'"}
    | {"\u201c": "``", "\u00ab": "``", "\u0093": "``", "\u201d": "''", "\u00bb": "''", "\u0094": "''"}
)


def _word(text: str) -> list[str]:
    """A soft hyphen is invisible; one that stands alone is a hyphen."""
    return [text.replace("\u00ad", "") or "-"]


def _as_written(text: str) -> list[str]:
    return [text]


def _ascii_quotes(text: str) -> list[str]:
    return [text.replace("&apos;", "'").translate(_QUOTES)]


def _ampersands(text: str) -> list[str]:
    return _word(re.sub(_caseless("&amp;"), "&", text))


def _with_spaces(text: str) -> list[str]:
    """A token with spaces inside (a tag, a telephone number, 1 1/2) carries no-break spaces there."""
    return [text.replace(" ", "\u00a0")]


def _with_brackets(text: str) -> list[str]:
    return _with_spaces(text.replace("(", "-lrb-").replace(")", "-rrb-"))


def _always(token: str) -> Emit:
    return lambda text: [token]


def _punctuation(text: str) -> list[str]:
    """Of the marks that pycocoevalcap removes it does not matter which one it was."""
    return ["."]


def _nothing(text: str) -> list[str]:
    return []


# --- Fragments of the rules ---


def _char_class(ranges: str) -> str:
    """`"41-5a 61"` → the inside of a regular expression's `[…]`."""
    ends = [span.split("-") for span in ranges.split()]
    return "".join(f"\\u{int(span[0], 16):04x}-\\u{int(span[-1], 16):04x}" for span in ends)


def _any_of(words: Iterable[str]) -> str:
    """Alternatives, the longer before the shorter, because Python takes the first that fits."""
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


def _caseless(pattern: str) -> str:
    """Its ASCII letters in either case. Not `(?i:…)`, which takes the long s for an s, too."""
    return re.sub("[A-Za-z]", lambda letter: f"[{letter[0].lower()}{letter[0].upper()}]", pattern)


def _first_letter_caseless(word: str) -> str:
    return _caseless(word[0]) + word[1:]


_PLAIN_WORD = re.compile("([A-Za-z]+)(?:,?[ \t]|\n)")  # no rule has anything to say on these, apart from:
_SPLITS = "can-not gon-na got-ta lem-me gim-me wan-na 't-is 't-was"
_SPLIT_WORDS = frozenset(_SPLITS.replace("-", "").split())

_LETTER = _char_class(tables.LETTER_RANGES)
_DIGIT = _char_class(tables.DIGIT_RANGES)
_MARK = _char_class(tables.MARK_RANGES)
_ACCENTED = _caseless("&(?:a|e|i|o|u)(?:acute|grave|uml);")  # a letter spelt as an HTML entity
_SPACES = " \t\u00a0\u2000-\u200a\u3000"
_BLANK = f"[{_SPACES}\n\u0085]"
_SOFT = "\u00ad"  # the soft hyphen

_FIRST = f"(?:[{_LETTER}{_MARK}{_SOFT}]|{_ACCENTED})"
_NEXT = f"(?:[{_LETTER}{_MARK}{_DIGIT}{_SOFT}]|{_ACCENTED})"
_WORD = f"{_FIRST}{_NEXT}*(?:[.!?]{_FIRST}{_NEXT}*)*"

_CURLY = f"(?:[\u0092\u2019]|{_caseless('&apos;')})"
_APOSTROPHE = f"(?:'|{_CURLY})"
_ANY_APOSTROPHE = f"(?:['`\u0091\u2018\u201b]|{_CURLY})"
_CLITIC = "(?:[lL][lL]|[vV][eE]|[rR][eE]|[sSdDmM])"

_ALNUM = f"[{_LETTER}{_DIGIT}]"
_PART = f"(?:[dDoOlL]{_ANY_APOSTROPHE}{_ALNUM})?{_ALNUM}+"  # O'Neil, d'Artagnan, l'eau
_HYPHEN = "[-_\u058a\u2010\u2011]"
_HYPHENED = f"{_PART}(?:{_HYPHEN}{_PART})*"
_INITIALS = r"[A-Za-z](?:\.[A-Za-z])+\."
_DOTTED_HYPHENED = f"[A-Za-z0-9][A-Za-z0-9.,{_SOFT}]*(?:-(?:{_INITIALS}|[A-Za-z0-9{_SOFT}]+))+"  # U.S.-based, 1,000-a
_SLASHED = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_ACRONYMS = f"[A-Z]+(?:(?:{_caseless('&amp;')}|[+&])[A-Z]+)+"  # AT&T

_ABBREVIATION = _any_of(
    [
        *map(_caseless, tables.ABBREVIATIONS.split()),
        *map(_first_letter_caseless, tables.FIRST_LETTER_ABBREVIATIONS.split()),
    ]
)
_ENDING_ABBREVIATION = _any_of(
    [
        r"(?:[pP][hH]|[eE][dD])\.[dD]",
        *map(_caseless, tables.ENDING_ABBREVIATIONS.split()),
        *(word[0].upper() + _caseless(word[1:]) for word in tables.CAPITALISED_ABBREVIATIONS.split()),
        *map(_first_letter_caseless, tables.FIRST_LETTER_ENDING_ABBREVIATIONS.split()),
    ]
)
_NUMBERED_ABBREVIATION = _any_of(map(_caseless, tables.NUMBERED_ABBREVIATIONS.split()))
_STARTER = _any_of(
    re.escape(word[0].upper()) + _caseless(re.escape(word[1:])) for word in tables.SENTENCE_STARTERS.split()
)

_NAME = r"[A-Za-z][A-Za-z0-9_:.-]*"
_ATTRIBUTE = rf"{_NAME}(?: *= *(?:\"[^\"\n]*\"|'[^'\n]*'))?"
_TAG = rf"<(?:[!?][A-Za-z-][^>\n]*|/{_NAME} *|{_NAME}(?: +{_ATTRIBUTE})* */? *)>"
_URL_CHAR = r'[^\t\n "<>|(){}]'
_URL_LAST = r'[^\t\n "<>|(){}.!?,-]'
_PATH = rf'/[^\t\n "<>|()]+{_URL_LAST}'
_HOST = r"(?:[^\t\n !\"$'(),-`{|}]+\.)+"  # a range from "," to "`": no capitals and no digits
_WWW = r'[wW]{3}\.(?:[^\t\n !"(),<>?{|}.]+\.)+[A-Za-z]{2,4}'
_TLD = _caseless("(?:com|net|org|edu)")
_EMAIL_CHAR = r'[^\t\n \u00a0"<>|(){}]'
_EMAIL_PART = r'[^\t\n \u00a0"<>|(){}.]+'

# --- The rules: group 1 is the token, the rest of the match is what must stand behind it ---

_ADDRESS_RULES: list[tuple[str, Emit]] = [
    (f"({_TAG})", _with_spaces),
    (rf"([hH][tT][tT][pP][sS]?://{_URL_CHAR}+{_URL_LAST})", _as_written),
    (rf"((?:<|{_caseless('&lt;')})?[A-Za-z0-9]{_EMAIL_CHAR}*@{_EMAIL_PART}(?:\.{_EMAIL_PART})*>?)", _as_written),
    ("(@[A-Za-z_][A-Za-z_0-9]*)", _as_written),
    (f"(#{_FIRST}+)", _as_written),
]

_APOSTROPHE_RULES: list[tuple[str, Emit]] = [
    # Words that fall into two: can-not, gon-na, 't-is, do-n't, he-'ll
    *((_caseless("({})({})".format(*split.split("-"))), _word) for split in _SPLITS.split()),
    (f"([A-Za-z{_SOFT}]*[A-MO-Za-mo-z]{_SOFT}*)[nN]{_ANY_APOSTROPHE}[tT]", _word),
    (f"([nN]{_ANY_APOSTROPHE}[tT])", _ascii_quotes),
    (f"({_WORD}){_APOSTROPHE}{_CLITIC}", _word),
    (f"('{_CLITIC})(?![A-Za-z])", _ascii_quotes),
    (f"({_CURLY}{_CLITIC})", _ascii_quotes),
    # 'em 'til 'cause; rock 'n' roll; '90s '99; d' j' l' ol' y'-all
    (f"({_APOSTROPHE}{_caseless('(?:em|till?|cause)')})", _as_written),
    (f"({_APOSTROPHE}[nN]{_APOSTROPHE})", _as_written),
    (r"('[nN])(?=[ \t\u00a0\n]|\Z)", _as_written),
    (f"({_CURLY}[nN])", _as_written),
    (f"({_APOSTROPHE}[2-9]0[sS])", _as_written),
    (f"({_APOSTROPHE}[0-9][0-9])(?={_BLANK})", _as_written),
    (f"((?:[dDjJlL]|[oO][lL]){_APOSTROPHE}|[yY]{_APOSTROPHE}(?=[{_LETTER}]))", _as_written),
    # Words that keep their apostrophe: a few by name, B'way, Hawai'i
    (_caseless("(nat'l|c'mon|ev'ry|li'l|e'er|s'mores|cont'd[.])"), _as_written),
    (f"([cC]{_APOSTROPHE}[eE][sS][tT]|[cC][aA][pP]{_APOSTROPHE}[nN]|[oO]{_ANY_APOSTROPHE}[oO])", _as_written),
    (f"([A-HJ-XZn]{_ANY_APOSTROPHE}[{_LETTER}]{{2,}})", _as_written),
    (f"([{_LETTER}]{{2,}}(?<=[aeiouyAEIOUY]){_ANY_APOSTROPHE}[aeiouA-Z][{_LETTER}]*)", _as_written),
]

_WORD_RULES: list[tuple[str, Emit]] = [
    (f"({_WORD})", _word),
    (f"({_WWW})", _as_written),
    (f"({_WWW}{_PATH})", _as_written),
    (f"({_HOST}{_TLD}(?:{_PATH})?)", _as_written),  # flickr.com/photos
    (rf"((?:{_ENDING_ABBREVIATION})\.)(?s:..)", _word),
    (rf"((?:{_ENDING_ABBREVIATION}|{_ABBREVIATION})\.)", _word),
    (f"({_INITIALS})", _word),
    (rf"([A-Za-z]\.)(?!{_BLANK}+(?:{_STARTER}|{_TAG}){_BLANK})", _word),
    (rf"({_NUMBERED_ABBREVIATION}\.)(?={_BLANK}?[0-9])", _word),
    (f"({_HYPHENED})", _word),
    (_caseless("((?:anti|pro)-)"), _word),
    (f"({_DOTTED_HYPHENED})", _word),
    (f"({_ACRONYMS})", _ampersands),
    (rf"({_SLASHED}(?:\\?/{_SLASHED}){{1,2}})", _word),
    # "etc.," and even "dog.,": before these marks every word keeps its full stop
    (rf"((?:{_DOTTED_HYPHENED}|{_HYPHENED}|{_WORD}|{_ACRONYMS})\.)[,;:]", _ampersands),
    (rf"({_NEXT}+(?:\.{_NEXT}+)*\.{_caseless(_any_of(tables.FILE_ENDINGS.split()))})(?:{_BLANK}|[.,!?])", _as_written),
    (r"([cC]\+\+|[cCfF]#)", _word),
]

_NUMBER_RULES: list[tuple[str, Emit]] = [
    (f"([-+]?(?:[{_DIGIT}]*(?:[.:,{_SOFT}\u066b\u066c][{_DIGIT}]+)+|[{_DIGIT}]+))", _word),  # 1,000 7:30 -.5
    (rf"((?:[{_DIGIT}]{{1,4}}[- \u00a0])?[{_DIGIT}]{{1,4}}(?:\\?/|\u2044)[{_DIGIT}]{{1,4}})", _with_spaces),  # 1 1/2
    (f"([{_DIGIT}]{{1,2}}[-/][{_DIGIT}]{{1,2}}[-/][{_DIGIT}]{{2,4}})", _word),  # a date
    (
        r"((?:\([0-9]{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0])"
        r"[0-9]{3,4}[- \u00a0]?[0-9]{3,5})",
        _with_brackets,
    ),  # a telephone number, which any three numbers in a row can be
    (r"([A-Z]+\$)", _word),  # US$
]

_FACE_RULES: list[tuple[str, Emit]] = [
    (r"([<>]?[:;=][-o*']?[()DdPpO\\{@|\[\]])(?=[^A-Za-z0-9])", _with_brackets),
    (r"(\((?:[-^x=~<>'][_.]?[-^x=~<>']|[\^x=~<>']-[\^x=~<>'])\))", _with_brackets),
    (r"([-^x=~<>']_[-^x=~<>'])", _word),
]

_SIGN_RULES: list[tuple[str, Emit]] = [
    (f"([{_SPACES}]+|{_caseless('&nbsp;')})", _nothing),
    ("(''|[\"'.,:!?\u0096\u0097\u2013-\u2015\u0085\u2026])", _punctuation),
    (f"({_SOFT}|--?-?-?|{_caseless('&(?:md|mdash|ndash);')}|&(?:apos|quot);)", _punctuation),
    (r"(\.{3,5}|(?:\.[ \u00a0]){2,4}\.)", _punctuation),
    ("(-{5,}|[!?]{2,})", _as_written),
    ("([`\u2018\u2019\u201a-\u201f\u00ab\u00bb\u2039\u203a\u0091-\u0094]{1,2})", _ascii_quotes),
    (r"(\*+|_+|@+|#+|<<|>>|[<>/+\u2044]|(?:\\\*)+)", _as_written),
    (f"([{_char_class(tables.SYMBOL_RANGES)}])", _as_written),
    ("([\u207a\u207b]?[\u00b9\u00b2\u00b3\u2070\u2074-\u2079]+|[\u208a\u208b]?[\u2080-\u2089]+)", _as_written),
    (_caseless("(&(?:ht|tl|ur|lr|qc|ql|qr|odq|cdq|apos|quot);|&#[0-9]+;)"), _as_written),
    ("(-[lLrR][rRcCsS][bB]-)", _as_written),
    *((f"({_caseless(f'&{name};')})", _always(sign)) for name, sign in {"amp": "&", "lt": "<", "gt": ">"}.items()),
    *((f"([{signs}])", _always(token)) for signs, token in tables.RENAMED_SIGNS.items()),
]


@cache
def _rules() -> list[tuple[re.Pattern[str], Emit]]:
    """Compiled at the first caption that needs them, which takes a tenth of a second."""
    table = _ADDRESS_RULES + _APOSTROPHE_RULES + _WORD_RULES + _NUMBER_RULES + _FACE_RULES + _SIGN_RULES
    return [(re.compile(pattern), emit) for pattern, emit in table]
