"""VQAv2 before PyTorch is loaded: its flag, and which files it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from beit3.data.index_description import Fit, hash_of_file, look, make_unless_it_fits, said_of
from beit3.system.errors import InputError
from beit3.system.flags import flag
from tasks.settings import DataSettings, TaskSettings, missing_index
from tasks.vqav2.answers import ANSWER_FILE, answers_said, read_answers
from tasks.vqav2.index import DESCRIPTION, VERSION, index_file, make_dataset_index, official_files

HEAD = "head.3.weight"  # a row per answer
# Split → the index files that it is made of.
SPLIT_FILES = {
    "train": ("train", "trainable_val"),
    "val": ("rest_val",),
    "test": ("test",),
    "test-dev": ("test-dev",),
}


@dataclass(frozen=True)
class VQAv2Settings(TaskSettings):
    new_head: bool = flag(
        False,
        "start the head afresh; otherwise the rows of --finetune whose answers are known stay with their answers",
        decides_steps=True,
    )

    name: ClassVar[str] = "vqav2"
    task: ClassVar[str] = "tasks.vqav2.task:VQAv2"
    trains_as: ClassVar[str] = "vqav2"
    model_suffix: ClassVar[str] = "vqav2"
    asks: ClassVar[bool] = True
    most_answers: ClassVar[int] = 5
    splits: ClassVar[tuple[str, ...]] = ("test", "test-dev", "val")
    split_files: ClassVar[Mapping[str, tuple[str, ...]]] = SPLIT_FILES

    def problems(self, data: DataSettings, training: bool) -> list[str]:
        problems = []
        if self.new_head and not training:
            problems.append("--new_head: for training; --eval needs the head that was trained")
        if data.data_path.is_dir():
            problems += self._missing_files(data, training)
        return problems

    def _missing_files(self, data: DataSettings, training: bool) -> list[str]:
        folder = data.data_path
        splits = ("train", "val") if training else (data.split,)
        files = [index_file(name) for split in splits for name in self.split_files.get(split, ())]
        missing = [name for name in files if not (folder / name).is_file()]
        if training and not (folder / ANSWER_FILE).is_file():
            missing.append(ANSWER_FILE)
        return missing_index(data, missing, [self.maker(data)])

    def maker(self, data: DataSettings) -> str:
        """The call that makes the index files."""
        return (
            f'VQAv2Dataset.make_dataset_index(data_path="{data.data_path}", tokenizer=XLMRobertaTokenizer('
            f'"{data.sentencepiece_model}"), annotation_data_path="{data.data_path / "vqa"}")'
        )

    def index_fit(self, data: DataSettings, training: bool, tokenizer: tuple[str, str] | None) -> list[Fit]:
        return [look(data.data_path, DESCRIPTION, VERSION, data.image_path, tokenizer)]

    def head_said(
        self, description: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], answers: Path | None
    ) -> tuple[dict[str, Any], list[str]]:
        try:
            said = answers_said(description)
            named = None if answers is None else read_answers(answers)
        except InputError as error:
            return {}, error.problems
        if named is None and said is None:
            return {}, [f"does not say what its answers are; name the list: --answers {ANSWER_FILE}"]
        if named is not None and said is not None and named != said:
            return {}, [f"holds its own list of answers, --answers {answers} is another; leave it out"]
        head, known = shapes.get(HEAD, (0,))[0], said if named is None else named
        assert known is not None
        if named is not None and len(named) != head:
            return {}, [f"its head has {head} answers, --answers {answers} has {len(named)}; it is not its list"]
        return {"answers": known}, []

    def make_index(self, data_path: Path, tokenizer: str, image_path: Path | None = None) -> None:
        names = [index_file(name) for files in SPLIT_FILES.values() for name in files]
        annotations = data_path / "vqa" if (data_path / "vqa").is_dir() else data_path
        seed = said_of(data_path, DESCRIPTION, "seed", 0)  # another one would choose other pictures for validation
        make_unless_it_fits(
            data_path,
            [*names, ANSWER_FILE],
            lambda: look(data_path, DESCRIPTION, VERSION, image_path, hash_of_file(tokenizer), thorough=True),
            lambda: make_dataset_index(data_path, tokenizer, annotations, seed, image_path=image_path),
            official_files(annotations),
        )
