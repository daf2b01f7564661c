"""A trained model that answers or captions pictures, from Python."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import utils
from beit3.data.augmentation import EvalTransform
from beit3.data.image_text import pad_text
from beit3.model.weights import read_checkpoint
from beit3.system.errors import InputError
from beit3.training.backends import choose_precision, prediction_context
from inference.opening import Opened, open_checkpoint
from inference.pictures import is_one, load_pixels
from inference.questions import token_ids
from modeling_finetune import BEiT3Model, load_model
from tasks.base import Answer, Caption, Task, make_task
from tasks.calibration import UNCALIBRATED

BATCH_SIZE = 16


def load(
    checkpoint: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    answers: str | os.PathLike[str] | None = None,
    task: str | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Predictor:
    """A model to ask, from a checkpoint folder of this toolkit or a released `.pth`.

    tokenizer, answers: `beit3.spm` and `answer2label.txt`, for checkpoints that do not hold them. device: "auto" (the
    GPU where there is one), "cpu", "cuda:1", …; precision: "auto" (bf16 or fp16 on a GPU, fp32 on a CPU), "fp32", …

    Raises:
        InputError: listing all that is wrong, before weights are loaded where it can be known by then.
    """
    opened = open_checkpoint(
        Path(checkpoint),
        tokenizer=None if tokenizer is None else Path(tokenizer),
        answers=None if answers is None else Path(answers),
        task=task,
    )
    return Predictor(opened, device=device, precision=precision)


class Predictor:
    """A model to ask. `calibrated`: whether the confidence of its answers was fitted to what validation saw."""

    def __init__(self, opened: Opened, *, device: str = "auto", precision: str = "auto") -> None:
        try:
            self.device = utils.resolve_device(device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
            self.precision = choose_precision(precision, self.device)
        except (ValueError, RuntimeError) as error:  # RuntimeError: PyTorch does not know the device
            raise InputError(str(error).splitlines()[0]) from error
        self.opened = opened
        self.task: Task = make_task(opened.task, opened.data, opened.tokenizer)
        self.task.adopt(opened.description)
        weights = opened.about.weights or read_checkpoint(opened.about.path)
        options = self.task.model_options(weights.state_dict)
        model, self.report = load_model(opened.model, weights, vocab_size=opened.vocab_size, **options)
        self.model: BEiT3Model = model.to(self.device)
        self.transform = EvalTransform(opened.data.input_size, upright=True)

    @property
    def asks(self) -> bool:
        """Whether it answers questions; otherwise it writes captions."""
        return self.opened.task.asks

    @property
    def calibrated(self) -> bool:
        return self.task.calibration != UNCALIBRATED

    def answer(
        self, pictures: Any, questions: str | Sequence[str], *, top: int = 5, batch_size: int = BATCH_SIZE
    ) -> Any:
        """The `top` best answers, the best first: a list of `Answer`, and a list of such lists for a list of pictures.

        pictures: one or a list; a path, a PIL image, a uint8 array (H, W, 3) or tensor (3, H, W). EXIF orientation is
        applied. questions: one for all pictures, or one each. top: 1-5, as many as the model has answers at most.

        Raises:
            InputError: a checkpoint for captions, an empty question, one that the tokenizer does not know, as many
                questions as pictures are wanted, no picture of a known form.
            ImageError: a file that cannot be read.
            FloatingPointError: what the model computed are no numbers.
        """
        if not self.asks:
            raise InputError(f"{self.opened.about.path}: writes captions and answers no questions; use caption()")
        if not 1 <= top <= self.opened.task.most_answers:
            raise InputError(f"top={top}: from 1 to {self.opened.task.most_answers} answers are told")
        several = [pictures] if is_one(pictures) else list(pictures)
        asked = [questions] * len(several) if isinstance(questions, str) else list(questions)
        if len(asked) != len(several):
            raise InputError(f"{len(asked)} questions for {len(several)} pictures; give one for all, or one each")
        told = [answers[:top] for answers in self._told(several, asked, batch_size)]
        return told[0] if is_one(pictures) else told

    def caption(
        self, pictures: Any, *, num_beams: int | None = None, top: int = 1, batch_size: int = BATCH_SIZE
    ) -> Any:
        """The best `Caption`, a list of them for a list of pictures; with `top` above 1 a list of the best of each.

        pictures: as in `answer`. num_beams: of the search, 3 by default; 1 is greedy. top: at most num_beams.

        Raises:
            InputError, ImageError, FloatingPointError: as `answer`.
        """
        if self.asks:
            raise InputError(f"{self.opened.about.path}: answers questions and writes no captions; use answer()")
        before = self.task.settings, self.task.alternatives
        try:
            self.choose(num_beams=num_beams, alternatives=top)
            several = [pictures] if is_one(pictures) else list(pictures)
            told = self._told(several, [None] * len(several), batch_size)
        finally:
            self.task.settings, self.task.alternatives = before
        best: list[Any] = [captions[0] for captions in told] if top == 1 else told
        return best[0] if is_one(pictures) else best

    def choose(self, *, num_beams: int | None = None, alternatives: int = 1) -> None:
        """How captions are searched from here on, see `caption`; for answers nothing is to be chosen."""
        if self.asks:
            return
        beams = self.task.settings.num_beams if num_beams is None else num_beams
        if not 1 <= alternatives <= beams:
            raise InputError(
                f"{alternatives} captions of each picture: from 1 to the number of beams, {beams}, is wanted"
            )
        self.task.settings, self.task.alternatives = replace(self.task.settings, num_beams=beams), alternatives

    def item(self, picture: Any, question: str | None) -> dict[str, Tensor]:
        """A picture and its question as the model takes them: "image" uint8 (3, S, S), "token_ids" int64 (T,)."""
        item = {"image": self.transform.resized(load_pixels(picture))}
        if question is not None:
            assert self.opened.tokenizer is not None
            ids = token_ids(self.opened.tokenizer, question, self.opened.data.num_max_bpe_tokens)
            item["token_ids"] = torch.tensor(ids)
        return item

    def collate(self, items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Items as one batch."""
        batch = {"image": torch.stack([item["image"] for item in items])}
        if "token_ids" in items[0]:
            longest = self.opened.data.num_max_bpe_tokens
            batch["token_ids"], batch["padding_mask"] = pad_text([item["token_ids"] for item in items], longest)
        return batch

    @torch.no_grad()
    def tell(self, batch: Mapping[str, Tensor]) -> list[list[Answer] | list[Caption] | None]:
        """What the model says of each row of a batch, the best first; None where its numbers are none.

        The same step as in evaluation (`Task.predict_step`).
        """
        ready = self.task.prepare(batch, self.device, torch.float32)
        with prediction_context(self.precision, self.device)():
            columns = self.task.predict_step(self.model, ready)
        columns = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in columns.items()}
        told = self.task.told(columns)
        finite: list[bool] = columns["finite"].tolist()
        return [told[row] if right else None for row, right in enumerate(finite)]

    def _told(self, pictures: list[Any], questions: Sequence[str | None], batch_size: int) -> list[Any]:
        told: list[Any] = []
        for start in range(0, len(pictures), batch_size):
            pairs = zip(pictures[start : start + batch_size], questions[start : start + batch_size], strict=True)
            told += self.tell(self.collate([self.item(picture, question) for picture, question in pairs]))
        if None in told:
            raise FloatingPointError(
                f"the model's numbers are not finite for picture {told.index(None) + 1} of {len(told)}; use "
                "precision='fp32', or another checkpoint"
            )
        return told
