"""Captions of people's own pictures, before PyTorch is loaded: flags, files, and how its index is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sources.making import make_if_needed
from sources.settings import SourceSettings
from tasks.captioning.index import COCO, OWN, ground_truth_file, index_file
from tasks.captioning.own_index import KIND
from tasks.captioning.settings import CaptioningSettings
from tasks.settings import DataSettings, missing_split


@dataclass(frozen=True)
class OwnCaptioningSettings(SourceSettings, CaptioningSettings):
    name: ClassVar[str] = OWN
    task: ClassVar[str] = "tasks.captioning.own_task:OwnCaptioning"
    trains_as: ClassVar[str] = OWN
    answers_for: ClassVar[tuple[str, ...]] = (COCO,)
    source: ClassVar[str] = OWN
    training_source: ClassVar[str] = OWN

    def _missing_files(self, data: DataSettings, training: bool) -> list[str]:
        name = index_file(OWN, data.split)
        made = (data.data_path / index_file(OWN, "train")).is_file()
        if not training and made and not (data.data_path / name).is_file():
            return missing_split(data, name)
        return super()._missing_files(data, training)

    def maker(self, source: str, data: DataSettings) -> str:
        return (
            f'CaptionDataset.make_dataset_index(train="table.csv", data_path="{data.data_path}", '
            f'tokenizer="{data.sentencepiece_model}")'
        )

    def reference_files(self, folder: Path, split: str) -> list[Path]:
        return [folder / ground_truth_file(split, OWN)]

    def make_index(self, data_path: Path, tokenizer: str, image_path: Path | None = None) -> None:
        make_if_needed(KIND, self, data_path, tokenizer, image_path)
