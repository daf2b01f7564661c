"""Which checkpoint, and whether it can be asked: all that can be known before PyTorch and the weights are loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit3.data.tokenizer import Tokenizer
from beit3.model.description import BEST, MODEL_FILE, About, about, answers_at_once
from beit3.model.names import REGISTERED, name_by_shapes, names_with, pixels_of
from beit3.system.errors import InputError
from tasks import TASKS, settings_of
from tasks.checkpoint import other_tokenizer, task_by_head
from tasks.settings import DataSettings, TaskSettings

OUTPUT = Path("output")  # where bash.sh puts the folders of its runs
WORD_TABLE = "beit3.text_embed.weight"


@dataclass(frozen=True)
class Opened:
    """A checkpoint that can be asked.

    Attributes:
        about: the checkpoint without its weights.
        model: the registered name of its model.
        task: the task's settings.
        data: how its pictures and texts are made.
        tokenizer: its own or the user's; None for a task without text.
        description: what the checkpoint says, and what the user said in its place.
    """

    about: About
    model: str
    task: TaskSettings
    data: DataSettings
    tokenizer: Tokenizer | None
    description: Mapping[str, Any]

    def identity(self) -> dict[str, str]:
        """Tells this model from another of the same name, with what was named beside its file."""
        file = answers_at_once(self.about.path) or self.about.path
        status = file.stat()
        answers = json.dumps(self.description.get("answers")).encode()
        return {
            "checkpoint": f"{file.resolve()} {status.st_size} {status.st_mtime_ns}",
            "task": self.task.name,
            "tokenizer": "" if self.tokenizer is None else self.tokenizer.sha256,
            "answers": hashlib.sha256(answers).hexdigest(),
        }

    @property
    def vocab_size(self) -> int:
        return self.about.shapes[WORD_TABLE][0]


def newest_checkpoint(folder: Path = OUTPUT) -> Path:
    """The `checkpoint-best` in the folder, or in a folder of it, that was written last.

    Raises:
        InputError: there is none.
    """
    found = [*folder.glob(f"{BEST}/{MODEL_FILE}"), *folder.glob(f"*/{BEST}/{MODEL_FILE}")]
    if not found:
        raise InputError(
            f"no checkpoint named, and no {BEST} under {folder}/: set FINETUNE=…, or train one (`bash bash.sh`, a few "
            "minutes without any data)"
        )
    return max(found, key=lambda file: file.stat().st_mtime).parent


def open_checkpoint(
    path: Path, *, tokenizer: Path | None = None, answers: Path | None = None, task: str | None = None
) -> Opened:
    """Look at a checkpoint. A `.safetensors` file tells all from its header; a `.pth` has to be read by PyTorch.

    tokenizer, answers: files for checkpoints that do not hold them, as released ones; others must agree with them.
    task: None: the checkpoint says it, or its head does.

    Raises:
        InputError: listing all that is wrong or missing, and what to do.
    """
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint; set FINETUNE to a checkpoint folder or file")
    checkpoint = about(path)
    settings = _task_of(checkpoint, task)
    name = _model_of(checkpoint, settings)
    short = name.removesuffix(f"_{settings.model_suffix}")
    problems: list[str] = []
    spm = _tokenizer_of(checkpoint, settings, tokenizer, problems)
    head, wrong = settings.head_said(checkpoint.description, checkpoint.shapes, answers)
    problems += [f"{path}: {problem}" for problem in wrong]
    if problems:
        raise InputError(problems)
    said = checkpoint.description
    longest = said.get("num_max_bpe_tokens", settings.published.get("num_max_bpe_tokens"))
    lengths = {} if longest is None else {"num_max_bpe_tokens": longest}
    data = DataSettings(input_size=pixels_of(short), **lengths)
    return Opened(checkpoint, name, settings, data, spm, {**said, **head})


def _task_of(checkpoint: About, task: str | None) -> TaskSettings:
    said = checkpoint.description.get("task")
    name = task or said or task_by_head(checkpoint.shapes)
    if name not in TASKS:
        wanted = f"one of {', '.join(TASKS)} is wanted"
        if name is None:
            raise InputError(
                f"{checkpoint.path}: has no head that answers or captions, so it was not fine-tuned; {wanted}"
            )
        raise InputError(f"{checkpoint.path}: for the task {name!r}; {wanted}")
    settings = settings_of(name)()
    if not settings.can_use(said):
        raise InputError(f"{checkpoint.path}: made for the task {said}, asked for {name}")
    return settings


def _model_of(checkpoint: About, settings: TaskSettings) -> str:
    name = checkpoint.description.get("model")
    if name is None:
        short = name_by_shapes(checkpoint.shapes)
        name = None if short is None else f"{short}_{settings.model_suffix}"
    known = names_with(settings.model_suffix) if settings.model_suffix in REGISTERED else []
    if name is None or name.removesuffix(f"_{settings.model_suffix}") not in known:
        said = "its shapes are those of no model" if name is None else f"its model {name!r} is not known"
        raise InputError(f"{checkpoint.path}: {said} for {settings.name}; there are {', '.join(sorted(known))}")
    if len(checkpoint.shapes.get(WORD_TABLE, ())) != 2:
        raise InputError(f"{checkpoint.path}: {WORD_TABLE} is missing; it is no whole checkpoint")
    return name


def _tokenizer_of(
    checkpoint: About, settings: TaskSettings, file: Path | None, problems: list[str]
) -> Tokenizer | None:
    if not settings.uses_text:
        return None
    source = checkpoint.tokenizer if file is None else file
    if source is None:
        problems.append(f"{checkpoint.path}: holds no tokenizer; name it: SPM=beit3.spm, or tokenizer=… in Python")
        return None
    if isinstance(source, Path) and not source.is_file():
        problems.append(f"{source}: no such file; the tokenizer (beit3.spm) is wanted")
        return None
    try:
        tokenizer = Tokenizer(source)
    except InputError as error:
        problems += error.problems
        return None
    if tokenizer.vocab_size > checkpoint.shapes[WORD_TABLE][0]:
        problems.append(
            f"the tokenizer {tokenizer.path} makes ids up to {tokenizer.vocab_size - 1}, the model of "
            f"{checkpoint.path} knows {checkpoint.shapes[WORD_TABLE][0]}: is it the tokenizer of these weights?"
        )
    problems += other_tokenizer(checkpoint.path, checkpoint.description, tokenizer, file is None, flag="--tokenizer")
    return tokenizer
