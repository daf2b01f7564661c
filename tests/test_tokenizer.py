"""beit3/tokenizer.py against the reference ids and against transformers 4.57's XLMRobertaTokenizer."""

import hashlib
import io
import json
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import sentencepiece

from beit3.data.tokenizer import Tokenizer, as_batch_encoder
from beit3.system.errors import InputError

DATA = Path(__file__).parent / "data"
MINI = DATA / "mini_coco" / "mini.spm"

# What splits texts in unusual ways: special tokens and halves of them, white space of all kinds, signs that Unicode
# normalisation changes, signs the model does not know.
PARTS = [
    "<s>", "</s>", "<pad>", "<unk>", "<mask>", "<", "s", ">", "/", " ", "  ", "\n", "\t", "\r", "\x85", "\x1f", "\xa0",
    "\u3000", "\u200b", "\u2028", "\ufeff", "\u2581", "\x00", "a", "the", "What", "circle", "é", "e\u0301",
    "\ufb01", "\uff1c", "İ", "☃", "日本", "🙂", "?", ".", "'", "don't", "1,000", "<0x41>", "<MASK>",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(MINI)


@pytest.fixture(scope="module")
def reference():
    """transformers' tokenizer, where a version is installed that can open an .spm file."""
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) >= 5:
        pytest.skip("transformers 5 cannot open an .spm file")
    return transformers.XLMRobertaTokenizer(str(MINI))


def random_texts(count, seed):
    draw = random.Random(seed)
    from_parts = ["".join(draw.choices(PARTS, k=draw.randint(0, 12))) for _ in range(count)]
    planes = [(32, 127), (0, 0xD800), (0xE000, 0x110000)]  # all of Unicode but the surrogates
    of_signs = [
        "".join(chr(draw.randrange(*draw.choice(planes))) for _ in range(draw.randint(0, 12))) for _ in range(count)
    ]
    return from_parts + of_signs


def spm_bytes(**options):
    """A small trained SentencePiece model."""
    content = io.BytesIO()
    sentences = ["what is this?", "a red square and a blue circle", "how many are there"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=content, vocab_size=30, hard_vocab_limit=False, minloglevel=2,
        **options,
    )  # fmt: skip
    return content.getvalue()


def test_the_ids_are_those_of_the_reference_file(tokenizer):
    expected = json.loads((DATA / "tokenize.json").read_text())
    assert {text: tokenizer.encode(text) for text in expected} == expected


def test_a_batch_gives_the_same_ids_as_its_texts_one_by_one(tokenizer):
    texts = list(json.loads((DATA / "tokenize.json").read_text()))
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_random_texts_get_the_ids_that_transformers_gives(tokenizer, reference):
    texts = random_texts(4000, seed=1)
    expected = [reference.convert_tokens_to_ids(reference.tokenize(text)) for text in texts]
    assert sum(4 in ids and 87 in ids for ids in expected) > 100  # masks among ordinary tokens did occur
    assert tokenizer.encode_batch(texts) == expected


@pytest.mark.parametrize("skip_special", [True, False])
def test_random_ids_give_the_text_that_transformers_gives(tokenizer, reference, skip_special):
    draw = random.Random(2)
    for _ in range(2000):
        ids = draw.choices([*range(88), 0, 1, 2, 3, 3, 87, 4, 4], k=draw.randint(0, 10))
        expected = reference.decode(ids, skip_special_tokens=skip_special)
        assert tokenizer.decode(ids, skip_special) == expected, ids


def test_decoding_written_out(tokenizer):
    assert tokenizer.decode([0, 4, 38, 33, 21, 20, 2, 1, 1]) == "A red square."
    assert tokenizer.decode([0, 4, 38, 2, 1], skip_special=False) == "<s> A</s><pad>"
    assert tokenizer.decode([4, 38, 3, 87]) == "A"


def test_ids_that_only_the_embedding_has_decode_as_unknown(tokenizer):
    assert tokenizer.decode([4, 38, 88, 64009]) == "A"
    assert tokenizer.decode([4, 38, 88], skip_special=False) == "A<unk>"


def test_a_negative_id_is_refused(tokenizer):
    with pytest.raises(ValueError, match="-1 is negative"):
        tokenizer.decode([-1])


def test_the_layout_is_that_of_xlm_roberta(tokenizer):
    layout = (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.mask_id)
    assert layout == (0, 1, 2, 3, 87)
    assert tokenizer.vocab_size == 88
    assert tokenizer.sha256 == hashlib.sha256(MINI.read_bytes()).hexdigest()


def test_half_a_surrogate_pair_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"'b\\ud800' holds half a surrogate pair"):
        tokenizer.encode_batch(["a", "b\ud800"])


def test_a_text_that_is_no_string_is_named(tokenizer):
    with pytest.raises(TypeError, match="must be a str, got 7"):
        tokenizer.encode_batch(["a", 7])


def test_a_tokenizer_survives_pickling(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer)).encode("A red square.") == [4, 38, 33, 21, 20]


def test_it_needs_no_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from beit3.data.tokenizer import as_batch_encoder\n"
        f"print(as_batch_encoder({str(MINI)!r})(['A red square.']))"
    )
    root = Path(__file__).parents[1]
    output = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert output == "[[4, 38, 33, 21, 20]]\n"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.spm: cannot read the SentencePiece model \(No such file"):
        Tokenizer(tmp_path / "none.spm")


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 1000])
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "bad.spm"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.spm: is not a SentencePiece model"):
        Tokenizer(path)


def test_a_model_of_another_layout_is_refused(tmp_path):
    path = tmp_path / "other.spm"
    path.write_bytes(spm_bytes(bos_id=-1))
    with pytest.raises(InputError, match=r"other\.spm: its first pieces are"):
        Tokenizer(path)


def test_a_batch_encoder_comes_from_a_tokenizer_or_a_path(tokenizer):
    for given in (tokenizer, MINI, str(MINI)):
        assert as_batch_encoder(given)(["A red square.", "</s>"]) == [[4, 38, 33, 21, 20], [2]]


def test_transformers_tokenizer_is_replaced_by_the_fast_one(reference, monkeypatch):
    monkeypatch.setattr(reference, "tokenize", None)
    assert as_batch_encoder(reference)(["A red square."]) == [[4, 38, 33, 21, 20]]


def test_transformers_tokenizer_with_added_tokens_is_asked_itself(reference):
    changed = type(reference)(str(MINI))
    changed.add_tokens(["square"])
    assert as_batch_encoder(changed)(["A red square."]) == [[4, 38, 33, 88, 4, 20]]


def test_any_other_tokenizer_is_asked_text_by_text():
    class Letters:
        def tokenize(self, text):
            return list(text)

        def convert_tokens_to_ids(self, tokens):
            return [ord(token) for token in tokens]

    assert as_batch_encoder(Letters())(["ab", ""]) == [[97, 98], []]


@pytest.mark.parametrize("wrong", [None, -1, 4.0, True, "4", 2**40])
def test_ids_that_are_none_of_another_tokenizer_are_named(wrong):
    class Wrong:
        def tokenize(self, text):
            return list(text)

        def convert_tokens_to_ids(self, tokens):
            return [numpy.int64(5), wrong]

    with pytest.raises(ValueError, match=f"gives 'ab' the id {re.escape(repr(wrong))}; wanted whole numbers from 0"):
        as_batch_encoder(Wrong())(["ab"])


def test_what_is_no_tokenizer_is_refused():
    with pytest.raises(InputError, match="cannot tokenize with a dict"):
        as_batch_encoder({})
