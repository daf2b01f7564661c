"""Captions of people's own pictures, before PyTorch is loaded: flags, files, and how its index is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from beit3.data.index_description import hash_of_file, make_unless_it_fits
from beit3.system.errors import InputError
from sources.gathering import fit_of, folder_for, home_of, sources_of
from sources.settings import SourceSettings
from tasks.captioning.index import COCO, OWN, description_file, ground_truth_file, index_file
from tasks.captioning.own_index import VERSION, write_index
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
        names = [index_file(OWN, split) for split in ("train", "val")] + [ground_truth_file("val", OWN)]
        try:
            sources = sources_of(self, data_path, asks=False)
        except InputError:
            if self.named() or not all((data_path / name).is_file() for name in names):
                raise
            return  # an index without its sources, made by hand perhaps
        files = [file for source in sources.values() for file in source.files]
        asked = hash_of_file(tokenizer)
        with folder_for(data_path):
            make_unless_it_fits(
                data_path,
                names,
                lambda: fit_of(data_path, description_file(OWN), VERSION, self, files, asked),
                lambda: write_index(data_path, sources, self, tokenizer, image_path or home_of(sources)),
                files,
            )
