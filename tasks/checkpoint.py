"""What a checkpoint says, or shows by its shapes, of the task it is for. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beit3.data.tokenizer import Tokenizer
from beit3.model.names import suffix_by_shapes
from beit3.system.errors import printable
from tasks import TASKS, settings_of

SENTENCEPIECE = "--sentencepiece_model"


def task_by_head(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """For a checkpoint that does not say its task: the first task whose models have this head."""
    suffix = suffix_by_shapes(shapes)
    return next((name for name in TASKS if settings_of(name).model_suffix == suffix), None)


def other_tokenizer(
    path: Path, description: Mapping[str, Any], tokenizer: Tokenizer, held: bool, flag: str = SENTENCEPIECE
) -> list[str]:
    """The problem that a checkpoint was made with another tokenizer; none where it was not, or does not say.

    held: whether the tokenizer is the checkpoint's own. flag: what names the tokenizer on the command line.
    """
    stated = description.get("tokenizer_sha256")
    if stated in (None, tokenizer.sha256):
        return []
    made = f"{path}: made with the tokenizer of SHA-256 {printable(str(stated))[:12]}…"
    here = f"{tokenizer.sha256[:12]}…"
    if held:
        return [f"{made}, the one it holds is {here}; give the right one as {flag}"]
    return [
        f"{made}, the command line says {flag} {tokenizer.path}, which is {here}: the same number would "
        "mean another word. Leave it out where the checkpoint holds its tokenizer, or name that file"
    ]
