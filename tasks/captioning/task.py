"""Captioning: BEiT-3 learns to fill in hidden words of a caption, and writes captions by filling in one after another.

`Captioning` is COCO by Karpathy's split, `NoCaps` trains on the same captions and predicts pictures of nocaps.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from beit3.model.losses import drop_worst, masked_token_losses
from beit3.system.errors import InputError
from tasks.base import Record, Task, TaskSettings
from tasks.captioning.dataset import CaptioningDataset
from tasks.captioning.generation import MIN_TOKENS, generate
from tasks.captioning.index import COCO, KARPATHY_FILE, NOCAPS, NOCAPS_FILES, ground_truth_file, index_file
from tasks.captioning.references import coco_ground_truth, load_references
from tasks.captioning.scores.scores import CaptionScores, caption_metrics

logger = logging.getLogger(__name__)

References = dict[Any, list[str]]  # image id → the captions people wrote


class Captioning(Task):
    """COCO captions. Scores are in the units of the official evaluation: 0-1, CIDEr 0-10 (papers print × 100)."""

    name = "coco_captioning"
    model_suffix = "captioning"
    best_metric = "CIDEr"
    id_key = "image_id"
    splits = ("test", "val")
    generates = True
    causal_text = True
    source: ClassVar[str] = COCO  # of the pictures that are predicted
    trains_as: ClassVar[str] = COCO  # what a checkpoint says it was trained for, and may be used for

    def __init__(self, settings: TaskSettings) -> None:
        super().__init__(settings)
        self._references: dict[str, References | None] = {}
        self._scored: tuple[tuple[str, dict[int, str]], CaptionScores] | None = None

    def check(self, training: bool) -> list[str]:
        settings = self.settings
        problems = super().check(training)
        if settings.num_max_bpe_tokens < MIN_TOKENS:
            problems.append(
                f"--num_max_bpe_tokens {settings.num_max_bpe_tokens}: captions need at least {MIN_TOKENS}, for <s>, a "
                "token, <mask> and </s>"
            )
        for flag, least in (("num_beams", 1), ("captions_per_image", 1), ("drop_worst_after", 0)):
            if getattr(settings, flag) < least:
                problems.append(f"--{flag} {getattr(settings, flag)}: at least {least} is needed")
        if not 0 <= settings.drop_worst_ratio < 1:
            problems.append(f"--drop_worst_ratio {settings.drop_worst_ratio}: wanted 0 ≤ value < 1")
        if not 0 < settings.captioning_mask_prob <= 1:
            problems.append(f"--captioning_mask_prob {settings.captioning_mask_prob}: wanted 0 < value ≤ 1")
        if settings.data_path.is_dir():
            problems += self._check_files(training)
        return problems

    def _check_files(self, training: bool) -> list[str]:
        """What is missing of the index files and of what validation is scored against."""
        folder = self.settings.data_path
        wanted = [(COCO, "train"), (self.source, "val")] if training else [(self.source, self.settings.split)]
        missing = [(source, split) for source, split in wanted if not (folder / index_file(source, split)).is_file()]
        problems = []
        if missing:
            makers = {
                COCO: f'make_coco_captioning_dataset_index(data_path="{folder}", '
                f'tokenizer=XLMRobertaTokenizer("{self.settings.sentencepiece_model}"))',
                NOCAPS: f'make_nocaps_captioning_dataset_index(data_path="{folder}")',
            }
            calls = [f"CaptioningDataset.{makers[source]}" for source in dict.fromkeys(source for source, _ in missing)]
            problems.append(
                f"{folder}: {', '.join(index_file(source, split) for source, split in missing)} not found. Make the "
                "index files once, in a Python shell: from datasets import CaptioningDataset; "
                f"from transformers import XLMRobertaTokenizer; {'; '.join(calls)}"
            )
        references = self._reference_files("val")
        if training and self.source == COCO and not any(file.is_file() for file in references):
            problems.append(
                f"{folder}: validation cannot be scored without {' or '.join(file.name for file in references)}; the "
                "first is written when the index is made, the second is Karpathy's file"
            )
        return problems

    @classmethod
    def make_index(cls, data_path: Path, tokenizer: str) -> None:
        names = [index_file(COCO, split) for split in CaptioningDataset.SPLITS[COCO]]
        if not all((data_path / name).is_file() for name in names):
            CaptioningDataset.make_coco_captioning_dataset_index(data_path=data_path, tokenizer=tokenizer)

    def model_options(self, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        return {}

    def describe(self) -> dict[str, Any]:
        return {}  # the head's rows are the tokenizer's ids, and a checkpoint names its tokenizer

    def adopt(self, description: Mapping[str, Any]) -> None:
        pass

    def dataset(self, split: str, training: bool) -> CaptioningDataset:
        settings = self.settings
        return CaptioningDataset(
            settings.data_path,
            split,
            self.transform(training),
            source=COCO if split == "train" else self.source,
            vocab_size=self.tokenizer.vocab_size,
            mask_id=self.tokenizer.mask_id,
            num_max_bpe_tokens=settings.num_max_bpe_tokens,
            mask_prob=settings.captioning_mask_prob,
            captions_per_image=settings.captions_per_image,
            seed=settings.seed,
        )

    def text_tokens(self) -> int:
        return self.settings.num_max_bpe_tokens * self.settings.captions_per_image

    def output_values(self) -> int:
        hidden = round(self.text_tokens() * self.settings.captioning_mask_prob)
        return hidden * self.settings.vocab_size

    def training_step(self, model: nn.Module, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The loss, and `acc`: the share of hidden tokens, 0-1, that the model finds."""
        logits = model(
            image=batch["image"],
            text_ids=batch["masked_ids"],
            padding_mask=batch["padding_mask"],
            masked_index=batch["masked_index"],
        )  # (hidden tokens, vocabulary)
        targets = batch["targets"]
        losses = masked_token_losses(logits, targets, self.settings.label_smoothing)
        accuracy = (logits.detach().argmax(dim=1) == targets).float().mean()
        ratio = self.settings.drop_worst_ratio if step > self.settings.drop_worst_after else 0.0
        return {"loss": drop_worst(losses, ratio), "acc": accuracy}

    def evaluation_step(self, model: nn.Module, batch: dict[str, Tensor]) -> list[Record]:
        captions = generate(
            getattr(model, "module", model),  # what DDP and DeepSpeed wrap has a forward pass only
            batch["image"],
            mask_id=self.tokenizer.mask_id,
            num_beams=self.settings.num_beams,
            length_penalty=self.settings.length_penalty,
            max_tokens=self.settings.num_max_bpe_tokens,
        )
        rows = zip(batch["row"].tolist(), batch["image_id"].tolist(), captions.best(), strict=True)
        return [{"row": row, "image_id": image, "caption": self.tokenizer.decode(ids)} for row, image, ids in rows]

    def metrics(self, records: Sequence[Record]) -> dict[str, float]:
        """Scores of the validation pictures that need no Java, which are quick; empty without their captions.

        Raises InputError for a prediction of an unknown picture, and where a picture has two.
        """
        scores = self._score(records, "val")
        return {} if scores is None else dict(scores.scores)

    def submission(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """One caption per picture. Raises InputError where a picture has two."""
        return [{"image_id": image, "caption": caption} for image, caption in _by_image(records).items()]

    def report(self, records: Sequence[Record]) -> dict[str, Any] | None:
        """All scores that can be computed here, of the whole and of each picture.

        Only pictures that were predicted count: of a split whose pictures are not all on the disk it is a part.
        """
        split = self.settings.split
        scores = self._score(records, split, with_java=True)
        return None if scores is None else self._result(scores, split)

    def report_lines(self, report: Mapping[str, Any]) -> list[str]:
        names = [name for name, value in report.items() if isinstance(value, float)]
        lines = [f"{report['images']} pictures: " + "  ".join(f"{name} {report[name]:.4f}" for name in names)]
        if report["images_without_picture"]:
            lines.append(f"  {report['images_without_picture']} pictures of the split are not on disk and do not count")
        lines += [f"  {name} left out: {reason}" for name, reason in report["left_out"].items()]
        return lines

    def report_file(self) -> str:
        split = self.settings.split
        return f"{self.name}_result.json" if split == "test" else f"{self.name}_result_{split}.json"

    def validation_files(self, records: Sequence[Record], epoch: int) -> dict[str, Any]:
        """What is kept of the validation after an epoch: name of the file → its content, to be written as JSON."""
        files: dict[str, Any] = {f"submit_{self.name}_val_e{epoch}.json": self.submission(records)}
        scores = self._score(records, "val")
        if scores is not None:
            files[f"{self.name}_result_val_e{epoch}.json"] = self._result(scores, "val")
        return files

    def _result(self, scores: CaptionScores, split: str) -> dict[str, Any]:
        references = self.references(split) or {}
        missing = len(references) - len(scores.per_image)
        images = {"split": split, "images": len(scores.per_image), "images_without_picture": missing}
        return {**images, **scores.as_json()}

    def _score(self, records: Sequence[Record], split: str, with_java: bool = False) -> CaptionScores | None:
        """Scores against the captions people wrote, None where these are not there.

        The last scores without Java are remembered: they are asked for as metrics and then for the result file.
        """
        references = self.references(split)
        if references is None:
            return None
        predictions = _by_image(records)
        if self._scored is not None and self._scored[0] == (split, predictions) and not with_java:
            return self._scored[1]
        # A picture that is not on the disk is in no index and has no prediction; an unknown one is an error below.
        references = {image: captions for image, captions in references.items() if image in predictions}
        scores = caption_metrics(predictions, references, meteor=with_java, spice=with_java)
        if not with_java:
            self._scored = ((split, predictions), scores)
        return scores

    def references(self, split: str) -> References | None:
        """Captions people wrote for "val" or "test", image id → captions; None where they are not there.

        They come from beside the index, else from `dataset_coco.json`, read once.
        """
        if split not in self._references:
            found = next((file for file in self._reference_files(split) if file.is_file()), None)
            self._references[split] = None if found is None else self._read_references(found, split)
        return self._references[split]

    def _reference_files(self, split: str) -> list[Path]:
        """Where the captions people wrote may be, the better first."""
        folder = self.settings.data_path
        return [folder / ground_truth_file(split), folder / KARPATHY_FILE]

    def _read_references(self, file: Path, split: str) -> References | None:
        if file.name != KARPATHY_FILE:
            return load_references(file)
        references: References = {}
        for annotation in coco_ground_truth(file, split)["annotations"]:
            references.setdefault(annotation["image_id"], []).append(annotation["caption"])
        return references


class NoCaps(Captioning):
    """Trains on COCO captions, predicts nocaps. Its validation pictures are scored where their captions are there."""

    name = NOCAPS
    source = NOCAPS

    @classmethod
    def make_index(cls, data_path: Path, tokenizer: str) -> None:
        super().make_index(data_path, tokenizer)
        names = [index_file(NOCAPS, split) for split in CaptioningDataset.SPLITS[NOCAPS]]
        if not all((data_path / name).is_file() for name in names):
            CaptioningDataset.make_nocaps_captioning_dataset_index(data_path=data_path)

    def _reference_files(self, split: str) -> list[Path]:
        return [self.settings.data_path / NOCAPS_FILES["val"]] if split == "val" else []  # the test's are secret

    def _read_references(self, file: Path, split: str) -> References | None:
        if not json.loads(file.read_text(encoding="utf-8")).get("annotations"):
            return None
        return load_references(file)


def _by_image(records: Sequence[Record]) -> dict[int, str]:
    """Image id → caption. Raises InputError naming every image that has several."""
    counts = Counter(record["image_id"] for record in records)
    problems = [f"image {image} has {count} captions, wanted one" for image, count in counts.items() if count > 1]
    if problems:
        raise InputError([*problems, "is a picture twice in the index? Make it again"])
    return {record["image_id"]: record["caption"] for record in records}
