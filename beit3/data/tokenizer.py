"""The tokenizer of BEiT-3: a SentencePiece model with the id layout of XLM-RoBERTa.

    id             token
    0, 1, 2, 3     <s>, <pad>, </s>, <unk>
    piece + 1      piece 3, 4, … of the SentencePiece model (its own 0, 1, 2 are <unk>, <s>, </s>)
    last           <mask>

Gives what `XLMRobertaTokenizer` of transformers 4.57 gives, without needing transformers, and much faster.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from numbers import Integral
from typing import Any

import sentencepiece

from beit3.system.errors import InputError
from beit3.system.machine import cores

BOS_ID, PAD_ID, EOS_ID, UNK_ID = 0, 1, 2, 3

BatchEncoder = Callable[[list[str]], list[list[int]]]

MANY_TEXTS = 1000  # are tokenized by several threads

_SPECIAL = re.compile("(<s>|<pad>|</s>|<unk>|<mask>)")
_SPACE_MARK = "\u2581"  # how SentencePiece writes a space


class Tokenizer:
    """Turns text into token ids and back.

    source: a SentencePiece file such as the released `beit3.spm` (64002 ids, `<mask>` 64001), or its content. Raises
    InputError when it is missing or is not a SentencePiece model with `<unk>`, `<s>`, `</s>` as its first pieces.
    `content` holds the file's bytes, `sha256` their hash.
    """

    bos_id, pad_id, eos_id, unk_id = BOS_ID, PAD_ID, EOS_ID, UNK_ID

    def __init__(self, source: str | os.PathLike[str] | bytes):
        self.path = "of the checkpoint" if isinstance(source, bytes) else os.fspath(source)
        self.content = source if isinstance(source, bytes) else _read(self.path)
        self.model, self.sha256 = _load_model(self.path, self.content)
        self.vocab_size: int = self.model.get_piece_size() + 2  # <pad> and <mask> are not in the file
        self.mask_id: int = self.vocab_size - 1
        self._id_of_piece = [UNK_ID, *range(2, self.model.get_piece_size() + 1)]
        self._special_ids = {
            "<s>": BOS_ID, "<pad>": PAD_ID, "</s>": EOS_ID, "<unk>": UNK_ID, "<mask>": self.mask_id,
        }  # fmt: skip

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` without `<s>` and `</s>`; [] for empty text. See `encode_batch`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without `<s>` and `</s>`.

        A special token written out in a text (`"a <mask> b"`) becomes its id. Raises ValueError for a text with half
        a surrogate pair, which is no valid Unicode.
        """
        texts = list(texts)
        ids = self._encode_plain(texts)
        if "<" in "".join(texts):  # seldom
            for row, text in enumerate(texts):
                if _SPECIAL.search(text):
                    ids[row] = self._encode_with_specials(text)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of the ids, white space at its ends removed; special tokens are left out or written as `<s>`.

        Ids beyond the tokenizer's (rows of the embedding that no token uses) count as `<unk>`.
        """
        names = {number: name for name, number in self._special_ids.items()}
        pieces = []
        for number in map(int, ids):
            if number < 0:
                raise ValueError(f"token id {number} is negative")
            name = names.get(number if number < self.vocab_size else UNK_ID)
            if name is None:
                pieces.append(self.model.id_to_piece(number - 1))
            elif not skip_special:
                pieces.append(name)
        return "".join(pieces).replace(_SPACE_MARK, " ").strip()

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts, special tokens written in them taken as ordinary characters."""
        try:
            # Starting threads costs more than a few short sentences take.
            threads = min(4, cores()) if len(texts) >= MANY_TEXTS else 1
            pieces = self.model.encode(texts, out_type=int, num_threads=threads)
        except (RuntimeError, UnicodeError, TypeError) as error:
            _name_bad_text(texts, error)
            raise
        id_of = self._id_of_piece.__getitem__
        return [list(map(id_of, row)) for row in pieces]

    def _encode_with_specials(self, text: str) -> list[int]:
        parts = _SPECIAL.split(text)  # plain, special, plain, …, plain
        plain, specials = parts[::2], parts[1::2]
        for number, name in enumerate(specials):
            if name == "<mask>":  # takes the white space before it along; Python knows more kinds than SentencePiece
                plain[number] = plain[number].rstrip()
        ids = self._encode_plain(plain)
        for number, name in enumerate(specials):
            ids[number].append(self._special_ids[name])
        return list(chain.from_iterable(ids))


def as_batch_encoder(tokenizer: Any) -> BatchEncoder:
    """A function that turns a list of texts into lists of token ids, whatever kind of tokenizer the user has.

    tokenizer: a `Tokenizer`; the path of a SentencePiece file; transformers' `XLMRobertaTokenizer` (4.57; its file is
    read by our faster `Tokenizer`); or any object with `tokenize` and `convert_tokens_to_ids`, asked text by text.
    Raises InputError for anything else.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.encode_batch
    if isinstance(tokenizer, (str, os.PathLike)):
        return Tokenizer(tokenizer).encode_batch
    if _is_plain_xlm_roberta(tokenizer):
        ours = Tokenizer(tokenizer.vocab_file)
        if _same_vocabulary(ours, tokenizer):
            return ours.encode_batch
    if callable(getattr(tokenizer, "tokenize", None)) and callable(getattr(tokenizer, "convert_tokens_to_ids", None)):
        return functools.partial(_encode_by, tokenizer)
    raise InputError(
        f'tokenizer: cannot tokenize with a {type(tokenizer).__name__}; give XLMRobertaTokenizer("…/beit3.spm") of '
        "transformers 4, or the path of beit3.spm itself"
    )


def _encode_by(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids that a tokenizer of the user's gives, text by text. Raises ValueError where they are no token ids."""
    encoded = [list(tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))) for text in texts]
    for text, ids in zip(texts, encoded, strict=True):
        wrong = [number for number in ids if not _is_token_id(number)]
        if wrong:
            raise ValueError(f"the tokenizer gives {text!r:.80} the id {wrong[0]!r}; wanted whole numbers from 0 on")
    return [list(map(int, ids)) for ids in encoded]  # numpy's numbers print in another way


def _is_token_id(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool) and 0 <= int(number) < 1 << 31


def _is_plain_xlm_roberta(tokenizer: Any) -> bool:
    """Whether it is transformers' slow XLM-RoBERTa tokenizer itself (a subclass may tokenize in its own way)."""
    kind = type(tokenizer)
    return (
        kind.__name__ == "XLMRobertaTokenizer"
        and kind.__module__.startswith("transformers.")
        and hasattr(tokenizer, "sp_model")
        and not getattr(tokenizer, "sp_model_kwargs", None)  # these can switch on random segmentation
        and os.path.isfile(getattr(tokenizer, "vocab_file", None) or "")
    )


def _same_vocabulary(ours: Tokenizer, theirs: Any) -> bool:
    """Whether nobody added tokens to the user's tokenizer or renamed its special ones."""
    added = {str(token): number for number, token in theirs.added_tokens_decoder.items()}
    return len(theirs) == ours.vocab_size and added == ours._special_ids


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{path}: cannot read the SentencePiece model ({error.strerror}); give beit3.spm") from None


def _load_model(path: str, content: bytes) -> tuple[sentencepiece.SentencePieceProcessor, str]:
    """The model in the file, and the SHA-256 of the file in hexadecimal."""
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.load_from_serialized_proto(content)
        first = [model.id_to_piece(number) for number in range(3)]
    except (RuntimeError, IndexError) as error:
        raise InputError(f"{path}: is not a SentencePiece model ({error or 'empty'}); give beit3.spm") from None
    if first != ["<unk>", "<s>", "</s>"]:
        raise InputError(
            f"{path}: its first pieces are {first}; the layout of XLM-RoBERTa wants ['<unk>', '<s>', '</s>']; "
            "give beit3.spm"
        )
    return model, hashlib.sha256(content).hexdigest()


def _name_bad_text(texts: list[str], error: Exception) -> None:
    """Raise a ValueError naming the text that SentencePiece choked on, if it is one that is not Unicode."""
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"a text to tokenize must be a str, got {text!r}") from error
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"text {text!r} holds half a surrogate pair: it is no valid Unicode") from error
