"""Captioning before PyTorch is loaded: its flags, and which files it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from beit3.data.index_description import Fit, hash_of_file, look, make_unless_it_fits
from beit3.system.flags import flag
from tasks.captioning.index import (
    COCO,
    COCO_SPLITS,
    KARPATHY_FILE,
    NOCAPS,
    NOCAPS_FILES,
    VERSION,
    description_file,
    ground_truth_file,
    index_file,
    make_coco_captioning_dataset_index,
    make_nocaps_captioning_dataset_index,
)
from tasks.settings import DataSettings, TaskSettings, missing_index

MIN_TOKENS = 4  # of `--num_max_bpe_tokens`: <s>, a token of the caption, <mask> and </s>


@dataclass(frozen=True)
class CaptioningSettings(TaskSettings):
    captioning_mask_prob: float = flag(
        0.6, "share of a caption's tokens hidden", above=0, at_most=1, decides_steps=True
    )
    drop_worst_ratio: float = flag(
        0.2, "share of hidden tokens left out as too hard", at_least=0, below=1, decides_steps=True
    )
    drop_worst_after: int = flag(12000, "steps before that begins", at_least=0, at_most=10**9, decides_steps=True)
    label_smoothing: float = flag(0.1, "probability spread over other tokens", at_least=0, below=1, decides_steps=True)
    captions_per_image: int = flag(
        1, "captions learned in one pass over their picture", at_least=1, at_most=1000, decides_steps=True
    )
    num_beams: int = flag(3, "beams of the search; 1 = greedy", at_least=1, at_most=1000)
    length_penalty: float = flag(0.6, "exponent of the length that divides scores", at_least=-10, at_most=10)

    name: ClassVar[str] = COCO
    task: ClassVar[str] = "tasks.captioning.task:Captioning"
    trains_as: ClassVar[str] = COCO
    model_suffix: ClassVar[str] = "captioning"
    splits: ClassVar[tuple[str, ...]] = ("test", "val")
    steps_version: ClassVar[int] = 2  # 1: a loss made by hand, which rounded otherwise
    published: ClassVar[Mapping[str, Any]] = {"num_max_bpe_tokens": 32}
    source: ClassVar[str] = COCO  # of the pictures that are predicted
    training_source: ClassVar[str] = COCO  # of those that are learned

    def problems(self, data: DataSettings, training: bool) -> list[str]:
        problems = []
        if data.num_max_bpe_tokens < MIN_TOKENS:
            problems.append(
                f"--num_max_bpe_tokens {data.num_max_bpe_tokens}: captions need at least {MIN_TOKENS}, for <s>, a "
                "token, <mask> and </s>"
            )
        if data.data_path.is_dir():
            problems += self._missing_files(data, training)
        return problems

    def _missing_files(self, data: DataSettings, training: bool) -> list[str]:
        """Index files, and what validation is scored against."""
        folder = data.data_path
        training_files = [(self.training_source, "train"), (self.source, "val")]
        wanted = training_files if training else [(self.source, data.split)]
        missing = [(source, split) for source, split in wanted if not (folder / index_file(source, split)).is_file()]
        calls = [self.maker(source, data) for source in dict.fromkeys(source for source, _ in missing)]
        problems = missing_index(data, [index_file(*each) for each in missing], calls)
        references = self.reference_files(folder, "val")
        if training and self.source == self.training_source and not any(file.is_file() for file in references):
            karpathy = "; the first is written when the index is made, the second is Karpathy's file"
            problems.append(
                f"{folder}: validation cannot be scored without {' or '.join(file.name for file in references)}"
                + (karpathy if len(references) > 1 else ", which is written when the index is made")
            )
        return problems

    def maker(self, source: str, data: DataSettings) -> str:
        """The call that makes the index files of a source."""
        if source == NOCAPS:
            return f'CaptioningDataset.make_nocaps_captioning_dataset_index(data_path="{data.data_path}")'
        return (
            f'CaptioningDataset.make_coco_captioning_dataset_index(data_path="{data.data_path}", '
            f'tokenizer=XLMRobertaTokenizer("{data.sentencepiece_model}"))'
        )

    def reference_files(self, folder: Path, split: str) -> list[Path]:
        """Where the captions people wrote may be, the better first."""
        return [folder / ground_truth_file(split), folder / KARPATHY_FILE]

    def index_fit(self, data: DataSettings, training: bool, tokenizer: tuple[str, str] | None) -> list[Fit]:
        """Only the rows of training hold texts."""
        folder, sources = data.data_path, {self.source: None, **({self.training_source: tokenizer} if training else {})}
        return [
            look(folder, description_file(source), VERSION, data.image_path, asked) for source, asked in sources.items()
        ]

    def make_index(self, data_path: Path, tokenizer: str, image_path: Path | None = None) -> None:
        asked = hash_of_file(tokenizer)
        make_unless_it_fits(
            data_path,
            [index_file(COCO, split) for split in COCO_SPLITS],
            lambda: look(data_path, description_file(COCO), VERSION, image_path, asked, thorough=True),
            lambda: make_coco_captioning_dataset_index(data_path, tokenizer, image_path=image_path),
            [data_path / KARPATHY_FILE],
        )


@dataclass(frozen=True)
class NoCapsSettings(CaptioningSettings):
    name: ClassVar[str] = NOCAPS
    task: ClassVar[str] = "tasks.captioning.task:NoCaps"
    source: ClassVar[str] = NOCAPS

    def reference_files(self, folder: Path, split: str) -> list[Path]:
        return [folder / NOCAPS_FILES["val"]] if split == "val" else []  # the test's are secret

    def make_index(self, data_path: Path, tokenizer: str, image_path: Path | None = None) -> None:
        super().make_index(data_path, tokenizer, image_path)
        make_unless_it_fits(
            data_path,
            [index_file(NOCAPS, split) for split in NOCAPS_FILES],
            lambda: look(data_path, description_file(NOCAPS), VERSION, image_path, thorough=True),
            lambda: make_nocaps_captioning_dataset_index(data_path, image_path=image_path),
            [data_path / name for name in NOCAPS_FILES.values()],
        )
