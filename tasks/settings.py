"""The half of a task that needs no PyTorch: its name, its flags, its files. Help and mistakes are told from here.

A task folder has a subclass of `TaskSettings`; its other half is the class that `TaskSettings.task` names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from beit3.data.index_description import Fit
from beit3.system.flags import flag

CROP_SCALE = (0.5, 1.0)  # share of a picture's area that the published recipes keep


@dataclass(frozen=True)
class DataSettings:
    """What examples are made of, and how they are loaded."""

    data_path: Path = flag(Path("dataset"), "folder with pictures and index files", essential=True)
    image_path: Path | None = flag(None, "folder with the pictures, where they lie elsewhere than in --data_path")
    sentencepiece_model: Path | None = flag(None, "the tokenizer, beit3.spm", essential=True)
    input_size: int = flag(
        224,
        "side of the pictures, pixels; as in --model",
        at_least=16,
        at_most=4096,
        decides_steps=True,
        said_by="image_size",
        essential=True,
    )
    num_max_bpe_tokens: int = flag(
        64,
        "longest text, with <s> and </s>",
        at_least=3,
        at_most=1022,
        decides_steps=True,
        said_by="num_max_bpe_tokens",
    )
    split: str = flag("test", "what --eval predicts: test, val, …", essential=True)
    seed: int = flag(0, "of everything that is drawn", at_least=0, at_most=2**63 - 1, decides_steps=True)
    randaug: bool = flag(False, "RandAugment on training pictures", decides_steps=True)
    train_interpolation: str = flag(
        "bicubic",
        "of training pictures; random: one of the two for each picture",
        choices=("bicubic", "bilinear", "random"),
        decides_steps=True,
    )
    crop_scale: tuple[float, float] = flag(
        CROP_SCALE,
        "share of the area a training crop keeps, smallest and largest",
        above=0,
        at_most=1,
        decides_steps=True,
    )
    mirror: bool = flag(
        True,
        "mirror half of the training pictures, left for right",
        no="for questions and captions that say left or right",
        decides_steps=True,
    )
    skip_bad_images: bool = flag(
        False,
        "train on another row where a picture cannot be read, the same one each time; evaluation never does",
        decides_steps=True,
    )
    num_workers: int = flag(10, "loader processes per process; no more than cores", at_least=0, at_most=1000)
    pin_mem: bool = flag(True, "page-locked batches, for GPUs", no="ordinary memory for batches")

    def problems(self) -> list[str]:
        """What is wrong among several flags."""
        problems = []
        if self.crop_scale[0] > self.crop_scale[1]:
            problems.append(f"--crop_scale {self.crop_scale[0]} {self.crop_scale[1]}: the smallest share comes first")
        if not self.data_path.is_dir():
            problems.append(f"--data_path {self.data_path}: no such folder")
        if self.image_path is not None and not self.image_path.is_dir():
            problems.append(f"--image_path {self.image_path}: no such folder")
        return problems


@dataclass(frozen=True)
class TaskSettings:
    """The flags of one task, and what is known of it before PyTorch is loaded.

    Attributes:
        name: as `--task` takes it.
        task: `module:Class` of the other half, a `tasks.base.Task`.
        trains_as: what checkpoints say they are for; tasks with the same can use each other's.
        answers_for: what checkpoints may say besides, that this task can predict with.
        model_suffix: of the registered model names, see `beit3.model.names`.
        splits: what `--eval` can predict.
        uses_text: whether there is a tokenizer.
        asks: whether people ask a question of a picture.
        most_answers: that are told of a question.
        steps_version: higher than before when a training step computes other bits; runs of another one cannot go on.
        published: values of flags that a released checkpoint was trained with and cannot say.
    """

    name: ClassVar[str]
    task: ClassVar[str]
    trains_as: ClassVar[str]
    answers_for: ClassVar[tuple[str, ...]] = ()
    model_suffix: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]
    uses_text: ClassVar[bool] = True
    asks: ClassVar[bool] = False
    most_answers: ClassVar[int] = 1
    steps_version: ClassVar[int] = 1
    published: ClassVar[Mapping[str, Any]] = {}

    def problems(self, data: DataSettings, training: bool) -> list[str]:
        """What is wrong with the flags together, and files that are missing, each with how to get it."""
        raise NotImplementedError

    @classmethod
    def can_use(cls, said: str | None) -> bool:
        """Whether a checkpoint that says this of its task, None for nothing, can be predicted with."""
        return said in (None, cls.trains_as, *cls.answers_for)

    def index_fit(self, data: DataSettings, training: bool, tokenizer: tuple[str, str] | None) -> list[Fit]:
        """How the index files fit what is there now. tokenizer: its name for people and its SHA-256."""
        return []

    def head_said(
        self, description: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], answers: Path | None
    ) -> tuple[dict[str, Any], list[str]]:
        """What the head of a checkpoint means, as parts of its description, and what is wrong or missing.

        shapes: of the checkpoint's parameters. answers: a file of the user's that says it; None: the checkpoint does.
        """
        return {}, [] if answers is None else [f"--answers {answers}: a model for {self.name} has no list of answers"]

    def make_index(self, data_path: Path, tokenizer: str, image_path: Path | None = None) -> None:
        """Make the index files in `data_path` from annotations or tables, unless they are there and fit.

        image_path: holds the pictures; None: `data_path` does.
        """
        raise NotImplementedError


def missing_index(data: DataSettings, missing: list[str], makers: list[str]) -> list[str]:
    """The problem that index files are missing, with what to type in a Python shell; none when none is.

    makers: calls, the class that has them first.
    """
    if not missing:
        return []
    calls = "; ".join(makers)
    tokenizer = "from transformers import XLMRobertaTokenizer; " if "XLMRobertaTokenizer" in calls else ""
    return [
        f"{data.data_path}: {', '.join(missing)} not found. Make the index files once, in a Python shell: "
        f"from datasets import {calls.split('.')[0]}; {tokenizer}{calls}"
    ]


def missing_split(data: DataSettings, name: str) -> list[str]:
    """The problem that own data has no rows of the split that is to be predicted."""
    return [
        f"{data.data_path}: {name} not found: the data was made without rows of the split {data.split}; --split val "
        "predicts validation, and for others name a table: TEST=table.csv bash bash.sh, or --test of tasks.make_index"
    ]
