"""What every demo is made with: a folder that is whole or not there, and a tokenizer that knows the demo's texts."""

from __future__ import annotations

import io
import json
import os
import shutil
import string
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from beit3.system.errors import InputError

MARKER = "demo.json"
_VOCABULARY = 300  # pieces at most


def make_folder(out: str | os.PathLike[str], marker: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    """Makes the folder `out` and returns its path; does nothing if it holds what `marker` says already.

    Everything is written aside and renamed at the end: `out` holds a whole demo or is not there. (A kill -9 can leave a
    hidden folder beside it.)

    Args:
        marker: what the content depends on; stands in the folder as `MARKER`.
        write: puts all other files into the empty folder that it is given.

    Raises:
        InputError: `out` holds something else.
    """
    target = Path(out).absolute()
    if _is_made(target, marker):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        made = aside / "demo"  # mkdtemp's own folder is closed to others
        made.mkdir()
        write(made)
        (made / MARKER).write_text(json.dumps(marker), encoding="utf-8")
        if target.is_dir() and _is_made(target, marker):  # another process was faster
            return target
        os.rename(made, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _is_made(target: Path, marker: Mapping[str, Any]) -> bool:
    """Whether `target` holds the demo of this marker; an InputError if it holds anything else."""
    if not os.path.lexists(target):
        return False
    if not target.is_dir():
        raise InputError([f"{target} is there and no folder: choose another place for the demo"])
    if not any(target.iterdir()):
        return False
    try:
        found = json.loads((target / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError([f"{target} holds something that is no demo: choose another place for it"]) from None
    if found == marker:
        return True
    raise InputError([f"{target} holds a demo with other settings, {found}: remove it or choose another place"])


def train_tokenizer(texts: Iterable[str]) -> bytes:
    """A SentencePiece model; <unk>, <s>, </s> come first, as XLM-RoBERTa's conversion of ids expects.

    Letters, digits and usual punctuation are pieces, so other questions in English can be asked as well.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",  # whole words become pieces; the unigram model finds that superfluous with so few words
        vocab_size=_VOCABULARY,
        hard_vocab_limit=False,  # there may be fewer
        character_coverage=1.0,
        required_chars=string.ascii_letters + string.digits + ".,?!'",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,  # the same bytes each time
        minloglevel=2,
    )
    return model.getvalue()
