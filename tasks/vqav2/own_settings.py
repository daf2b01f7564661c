"""Questions about people's own pictures, before PyTorch is loaded: flags, files, and how its index is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from beit3.system.flags import flag
from sources.making import make_if_needed
from sources.settings import AnswerSettings, SourceSettings
from tasks.settings import DataSettings, missing_split
from tasks.vqav2.index import index_file
from tasks.vqav2.own_index import KIND
from tasks.vqav2.settings import VQAv2Settings

SPLIT_FILES = {"train": ("train",), "val": ("val",), "test": ("test",)}


@dataclass(frozen=True)
class VQASettings(AnswerSettings, SourceSettings, VQAv2Settings):
    balance_answers: bool = flag(
        False, "rows of rare answers count more in training, so that all answers count alike", decides_steps=True
    )

    name: ClassVar[str] = "vqa"
    task: ClassVar[str] = "tasks.vqav2.own_task:VQA"
    trains_as: ClassVar[str] = "vqa"
    answers_for: ClassVar[tuple[str, ...]] = ("vqav2",)
    splits: ClassVar[tuple[str, ...]] = ("test", "val")
    split_files: ClassVar[Mapping[str, tuple[str, ...]]] = SPLIT_FILES

    def _missing_files(self, data: DataSettings, training: bool) -> list[str]:
        name = index_file(data.split)
        made = (data.data_path / index_file("train")).is_file()
        if not training and made and not (data.data_path / name).is_file():
            return missing_split(data, name)
        return super()._missing_files(data, training)

    def maker(self, data: DataSettings) -> str:
        return (
            f'VQADataset.make_dataset_index(train="table.csv", data_path="{data.data_path}", '
            f'tokenizer="{data.sentencepiece_model}")'
        )

    def make_index(self, data_path: Path, tokenizer: str, image_path: Path | None = None) -> None:
        make_if_needed(KIND, self, data_path, tokenizer, image_path)
