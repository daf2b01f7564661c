"""The contract between the engine and a task. The engine knows nothing else of a task.

A record is a plain dict with the row number of its example. Evaluation gathers the records of all processes, keeps one
per row, and only then computes metrics: the result does not depend on the number of processes.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from beit3.data.augmentation import EvalTransform, TrainTransform
from beit3.data.image_text import ImageTextDataset
from beit3.data.tokenizer import Tokenizer

Record = dict[str, Any]


@dataclass(frozen=True)
class TaskSettings:
    """What a task is told, from the command line.

    Attributes:
        data_path: the folder with pictures and index files.
        sentencepiece_model: the `.spm` file.
        image_size: side of the square pictures, pixels.
        vocab_size: rows of the model's token table.
        num_max_bpe_tokens: longest text with `<s>` and `</s>`.
        split: what `--eval` predicts on.
        randaug, train_interpolation, crop_scale, seed: of the training pictures.
        captioning_mask_prob … captions_per_image: of captioning; see the command line's help.
    """

    data_path: Path
    sentencepiece_model: Path
    image_size: int
    vocab_size: int
    num_max_bpe_tokens: int
    split: str
    randaug: bool
    train_interpolation: str
    crop_scale: tuple[float, float]
    seed: int
    captioning_mask_prob: float = 0.6
    drop_worst_ratio: float = 0.2
    drop_worst_after: int = 12000
    num_beams: int = 3
    length_penalty: float = 0.6
    label_smoothing: float = 0.1
    captions_per_image: int = 1


class Task(abc.ABC):
    """One thing BEiT-3 is fine-tuned for: what to load, how to score, what to write."""

    name: ClassVar[str]
    model_suffix: ClassVar[str]
    best_metric: ClassVar[str]
    id_key: ClassVar[str]
    causal_text: ClassVar[bool] = False  # how its model calls the encoder
    generates: ClassVar[bool] = False  # evaluates by more than forward passes of the whole model
    trains_as: ClassVar[str]  # name under which checkpoints are kept: tasks of the same name can use each other's
    splits: ClassVar[tuple[str, ...]]
    image_mean: ClassVar[float] = 0.5
    image_std: ClassVar[float] = 0.5

    def __init__(self, settings: TaskSettings) -> None:
        self.settings = settings

    def check(self, training: bool) -> list[str]:
        """Mistakes that can be seen before anything is loaded, one sentence each; empty when all is well."""
        settings, problems = self.settings, []
        if not settings.data_path.is_dir():
            problems.append(f"--data_path {settings.data_path}: no such folder")
        if settings.num_max_bpe_tokens < 3:
            problems.append(
                f"--num_max_bpe_tokens {settings.num_max_bpe_tokens}: at least 3 are needed, <s>, a token and </s>"
            )
        if not training and settings.split not in self.splits:
            problems.append(f"--split {settings.split}: {self.name} has {', '.join(self.splits)}")
        return problems

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the command line."""
        if not hasattr(self, "_tokenizer"):
            self._tokenizer = Tokenizer(self.settings.sentencepiece_model)
        return self._tokenizer

    @classmethod
    @abc.abstractmethod
    def make_index(cls, data_path: Path, tokenizer: str) -> None:
        """Make the index files in `data_path` from the official annotations, unless they are there."""

    @abc.abstractmethod
    def model_options(self, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments of the model beside the common ones, given the weights that will be loaded into it."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the head means, in plain values; stored in every checkpoint."""

    @abc.abstractmethod
    def adopt(self, description: Mapping[str, Any]) -> None:
        """Take over what a checkpoint says of its head; called before prediction. Empty for files made elsewhere."""

    @abc.abstractmethod
    def dataset(self, split: str, training: bool) -> ImageTextDataset:
        """The examples of a split ("train", "val", or one of `splits`); `training` adds the augmentation."""

    def transform(self, training: bool) -> EvalTransform | TrainTransform:
        """File → uint8 picture (3, S, S), with or without augmentation."""
        settings = self.settings
        if not training:
            return EvalTransform(settings.image_size)
        return TrainTransform(settings.image_size, settings.train_interpolation, settings.randaug, settings.crop_scale)

    def text_tokens(self) -> int:
        """Tokens of text that go through the encoder with each training picture, at most."""
        return self.settings.num_max_bpe_tokens

    @abc.abstractmethod
    def output_values(self) -> int:
        """Values that the model gives out for each training picture, at most."""

    @abc.abstractmethod
    def training_step(self, model: nn.Module, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """{"loss": (), and whatever else is worth a line in the log}."""

    @abc.abstractmethod
    def evaluation_step(self, model: nn.Module, batch: dict[str, Tensor]) -> list[Record]:
        """One record per example, each with its "row"."""

    @abc.abstractmethod
    def metrics(self, records: Sequence[Record]) -> dict[str, float]:
        """Scores of a whole split, `best_metric` among them; empty when nothing is known of the right answers."""

    def validation_files(self, records: Sequence[Record], epoch: int) -> dict[str, Any]:
        """What is kept of the validation after an epoch beside its scores: name of the file → JSON content."""
        return {}

    @abc.abstractmethod
    def submission(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """What the evaluation server wants."""

    @abc.abstractmethod
    def report(self, records: Sequence[Record]) -> dict[str, Any] | None:
        """Official scores of a predicted split, None where its annotations are not there."""

    def report_lines(self, report: Mapping[str, Any]) -> list[str]:
        """The report as a person reads it."""
        return [f"{key}: {value}" for key, value in report.items()]

    def submission_file(self) -> str:
        return f"submit_{self.name}_{self.settings.split}.json"

    def report_file(self) -> str:
        return f"{self.name}_result_{self.settings.split}.json"
