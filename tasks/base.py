"""The contract between the engine and a task. The engine knows nothing else of a task.

Evaluation asks the model about each example (`predict_step`), brings the answers of all processes together as columns,
one entry per row of the data set, and only then scores them (`score`): the result does not depend on the number of
processes, and scores can be tested without a model.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from beit3.data.augmentation import EvalTransform, TrainTransform
from beit3.data.image_text import ImageTextDataset
from beit3.data.images import normalize
from beit3.data.tokenizer import Tokenizer
from beit3.model.weights import Checkpoint, HeadRows
from tasks.calibration import UNCALIBRATED, Calibration
from tasks.settings import DataSettings, TaskSettings

# What was predicted: name → one entry per example, a tensor (N, …) on the CPU or a list. "row" (N,) is always there.
Columns = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """confidence: how likely it is right, in [0, 1]; see `Task.calibration`."""

    text: str
    confidence: float


@dataclass(frozen=True)
class Caption:
    """score: what the search ranked it by, below 0; see `generate`. Only those of one picture compare."""

    text: str
    score: float


@dataclass(frozen=True)
class Scores:
    """What a split's predictions are worth.

    Attributes:
        metrics: name → value, the task's `best_metric` among them; empty when the right answers are not known.
        report: all of it in values that JSON knows; None when the right answers are not known.
        lines: the report as a person reads it.
        files: what else is kept, name without ending → JSON content.
        calibration: what makes confidences mean something, fitted to these rows; goes into the checkpoint.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    report: dict[str, Any] | None = None
    lines: Sequence[str] = ()
    files: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None


class Task(abc.ABC):
    """One thing BEiT-3 is fine-tuned for: what to load, how to learn, how to score, what to write.

    settings: of the task's own class, see `tasks.settings.TaskSettings`. tokenizer: None for a task without text.
    """

    best_metric: ClassVar[str]  # the larger, the better
    causal_text: ClassVar[bool] = False  # how its model calls the encoder
    image_mean: ClassVar[float] = 0.5
    image_std: ClassVar[float] = 0.5
    calibration: Calibration = UNCALIBRATED
    alternatives: int = 1  # that a task which searches is to tell of each picture

    def __init__(self, settings: Any, data: DataSettings, tokenizer: Tokenizer | None) -> None:
        self.settings: Any = settings
        self.data = data
        self._tokenizer = tokenizer

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def tokenizer(self) -> Tokenizer:
        assert self._tokenizer is not None, f"{self.name} has no text"
        return self._tokenizer

    @abc.abstractmethod
    def dataset(self, split: str, training: bool) -> ImageTextDataset:
        """The examples of a split ("train", "val", or one of `settings.splits`); `training` adds the augmentation."""

    def transform(self, training: bool) -> EvalTransform | TrainTransform:
        """File → uint8 picture (3, S, S), with or without augmentation."""
        data = self.data
        if not training:
            return EvalTransform(data.input_size)
        return TrainTransform(data.input_size, data.train_interpolation, data.randaug, data.crop_scale, data.mirror)

    def model_options(self, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments of the model beside the common ones, given the weights that will be loaded into it."""
        return {}

    def describe(self) -> dict[str, Any]:
        """What the head means, in plain values; stored in every checkpoint."""
        return {}

    def adopt(self, description: Mapping[str, Any]) -> None:
        """Take over what a checkpoint says of its head; called before prediction. Empty for files made elsewhere."""
        self.calibration = Calibration.from_plain(description.get("calibration")) or UNCALIBRATED

    def meet_data(self) -> None:  # noqa: B027  a head may mean nothing of its own
        """Compare what the checkpoint said of its head with the data folder; warns of what differs.

        Raises:
            InputError: neither says what is needed.
        """

    def text_tokens(self) -> int:
        """Tokens of text that go through the encoder with each training picture, at most."""
        return self.data.num_max_bpe_tokens if self.settings.uses_text else 0

    def starting_head(self, checkpoint: Checkpoint) -> tuple[Checkpoint, HeadRows | None]:
        """What training takes of a checkpoint's head: the checkpoint, without what is to start afresh, and which of
        the head's rows go where."""
        return checkpoint, None

    @abc.abstractmethod
    def output_values(self, model: Any) -> int:
        """Values that the model gives out for each training picture, at most."""

    def prepare(self, batch: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """A batch on the device, its uint8 pictures (B, 3, H, W) normalised there."""
        moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        for name, value in moved.items():
            if value.dtype == torch.uint8 and value.ndim == 4:
                moved[name] = normalize(value, self.image_mean, self.image_std, dtype)
        return moved

    @abc.abstractmethod
    def training_step(self, model: nn.Module, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """{"loss": (), and whatever else is worth a line in the log}."""

    @abc.abstractmethod
    def predict_step(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
        """What the model says of a batch: columns, tensors (B, …) or lists. Sees no label and no row number.

        A column "finite", bool (B,) on the device, says whether what the model computed for an example are numbers;
        evaluation takes it off and ends with an error where they are not."""

    def told(self, columns: Columns) -> list[list[Answer]] | list[list[Caption]]:
        """What `predict_step` said of each row as people read it, the best first."""
        raise NotImplementedError(f"{self.name} has nothing to tell of a single picture")

    def predictions(self, columns: Columns, dataset: ImageTextDataset) -> Iterator[dict[str, Any]]:
        """A row of `predictions.jsonl` for each row that was predicted: picture, question, what was said, what is
        right. Empty for a task that keeps none."""
        return iter(())

    @abc.abstractmethod
    def score(self, columns: Columns, dataset: ImageTextDataset, split: str, final: bool) -> Scores:
        """Score a split's predictions, once.

        final: after a prediction (`--eval`), with what takes long or needs the official files; False: after an epoch.
        """

    def looked_at(self, train: ImageTextDataset, val: ImageTextDataset) -> list[str]:
        """What a person should know of the data before training, in sentences; for `--check`."""
        return [f"{len(train)} rows of training, {len(val)} of validation"]

    def check_rows(self, dataset: ImageTextDataset, split: str) -> list[str]:
        """What is wrong with the rows as a submission of the split: asked twice, missing, unknown. Empty: nothing.

        Called before the first batch of a prediction, and again before its results are given out as complete.
        """
        return []

    def check_references(self, split: str, final: bool) -> list[str]:
        """What is wrong with the files of right answers that `score` will read for the split; `final` as there."""
        return []

    def remark(self, split: str) -> str | None:
        """What a user should know of a submission of this split; None: nothing."""
        return None

    def submission(self, columns: Columns, dataset: ImageTextDataset, split: str) -> list[dict[str, Any]] | None:
        """What the evaluation server wants; None for a task that has no server."""
        return None

    def submission_file(self, split: str) -> str:
        """Name of the submission, without its ending."""
        return f"submit_{self.name}_{split}"

    def report_file(self, split: str) -> str:
        """Name of the report, without its ending."""
        return f"{self.name}_result_{split}"


def told_twice(counts: Mapping[int, int], what: str, results: str) -> list[str]:
    """What is wrong where an id stands in the index more than once. counts: id → how often; results: in the plural."""
    return [
        f"{what} {number} has {count} {results}, one for each time it is in the index"
        for number, count in counts.items()
        if count > 1
    ]


def make_task(settings: TaskSettings, data: DataSettings, tokenizer: Tokenizer | None) -> Task:
    """The task whose settings these are."""
    from tasks import imported

    return imported(settings.task)(settings, data, tokenizer)
