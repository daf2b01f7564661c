"""The Python tokenizer against what pycocoevalcap's Java tokenizer gave (data/captions/ptb.json), and live."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.captioning.scores.ptb_tokenizer import PUNCTUATION, tokenize, tokenize_lines
from tests.data.captions import strings

TABLE = json.loads(strings.TABLE.read_text(encoding="utf-8"))
FRESH_SEED, FRESH_COUNT = 7, 300


def differences(captions, expected, tokens):
    return [row for row in zip(captions, expected, tokens, strict=True) if row[1] != row[2]]


@pytest.mark.parametrize("family", TABLE["families"])
def test_the_tokens_are_those_of_the_java_tokenizer(family):
    captions, expected = zip(*TABLE["families"][family], strict=True)
    assert len(captions) >= 250
    assert not differences(captions, expected, map(tokenize, captions))


def test_the_lines_of_a_file_are_tokenized_as_the_java_tokenizer_does_it_next_line_in_view():
    captions, expected = zip(*TABLE["lines"], strict=True)
    assert not differences(captions, expected, tokenize_lines(captions))
    # The table would not notice a tokenizer that never looks at the next line, if its lines did not matter.
    assert len(differences(captions, expected, map(tokenize, captions))) > 10


@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_the_tokens_of_strings_that_are_in_no_table_are_those_of_the_java_tokenizer(capfd):
    fresh = strings.make_strings(FRESH_COUNT, FRESH_SEED)
    captions = [caption for some in fresh.values() for caption in some]
    assert len(captions) > 3000
    assert not differences(captions, strings.java_tokens(captions), map(tokenize, captions))
    lines = strings.make_lines(1000, FRESH_SEED)
    assert not differences(lines, strings.java_lines(lines), tokenize_lines(lines))


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man's dog doesn't run.", "a man 's dog does n't run"),
        ("You CANNOT, I can’t; he’ll gonna", "you can not i ca n't he 'll gon na"),
        ("'Tis 5 o'clock, y'all: rock 'n' roll", "'t is 5 o'clock y' all rock 'n' roll"),
        ("The '90s, the class of '99", "the '90s the class of '99"),
        ("1,000 people at 7:30 pay $5.50 or 50%", "1,000 people at 7:30 pay $ 5.50 or 50 %"),
        ("1 1/2 pizzas and ½ a cake", "1\u00a01/2 pizzas and 1/2 a cake"),
        ("Mr. Smith of the U.S. at 5 p.m.", "mr. smith of the u.s. at 5 p.m."),
        ("A black-and-white cat/dog -- sleeping", "a black-and-white cat/dog sleeping"),
        ("“Stop!” (sign) 'x' [y] {z}", "stop -lrb- sign -rrb- x -lsb- y -rsb- -lcb- z -rcb-"),
        ("AT&T, R&amp;B and salt&pepper", "at&t r&b and salt & pepper"),
        ("www.example.com me@example.com #love @me 001.jpg", "www.example.com me@example.com #love @me 001.jpg"),
        ("Wait... what?! No way!!", "wait what ?! no way !!"),
        ("A cat 😀👨\u200d👩\u200d👧🇺🇸 naps", "a cat naps"),
        ("I ❤ café 犬 so\u00adft", "i ❤ café 犬 soft"),
        ("£5 €6 ¥7 8¢", "# 5 $ 6 ¥ 7 8 cents"),
        ("see http://ab.c\u0085", "see http://ab.c"),
        ("", ""),
        (" .  , ", ""),
    ],
)
def test_a_caption_reads(caption, tokens):
    assert tokenize(caption) == tokens


def test_a_line_end_within_a_caption_is_a_space_and_moves_no_word_to_the_next_caption():
    for line_end in "\n\x0b\x0c\r\u2028\u2029":
        assert tokenize_lines([f"a{line_end}dog", f"{line_end}", "cat"]) == ["a dog", "", "cat"]
        assert tokenize(f"1{line_end}1/2") == tokenize("1 1/2")
    assert tokenize_lines(['a <b c="d', 'e"> f', "cat"]) == ["a < b c = d", "e > f", "cat"]


def test_the_next_line_decides_on_the_full_stop_behind_an_initial():
    assert tokenize_lines(["vitamin C.", "A dog"]) == ["vitamin c", "a dog"]
    assert tokenize_lines(["vitamin C.", "Big dog"]) == ["vitamin c.", "big dog"]
    assert tokenize("vitamin C.") == "vitamin c."
    assert tokenize_lines(["there is no.", "5 dogs"]) == ["there is no.", "5 dogs"]
    assert tokenize_lines(["there is no.", "a dog"]) == ["there is no", "a dog"]


@given(st.lists(st.text()))
@settings(max_examples=300, deadline=None)
def test_any_text_is_tokenized_line_by_line(captions):
    tokenized = tokenize_lines(captions)
    assert len(tokenized) == len(captions)
    for tokens in [*tokenized, *map(tokenize, captions)]:
        assert not tokens or not PUNCTUATION.intersection(tokens.split(" "))
        assert tokens == tokens.lower()


def test_half_a_surrogate_pair_is_dropped():
    assert tokenize("a \ud83d dog") == "a dog"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "piece", ["x", "~", "a-", "é", "\u00ad", "a@", "<!a ", "http://", "&#", "1 ", "'", "a.b", "(", "1.", "b. "]
)
def test_very_long_captions_take_no_minutes(piece):
    tokenize(piece * 2000)  # a pattern that backtracks would be busy for hours
