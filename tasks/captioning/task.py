"""Captioning: BEiT-3 learns to fill in hidden words of a caption, and writes captions by filling in one after another.

`Captioning` is COCO by Karpathy's split, `NoCaps` trains on the same captions and predicts pictures of nocaps.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from beit3.data.image_text import ImageTextDataset
from beit3.system.errors import InputError, printable
from tasks.base import Caption, Columns, Scores, Task, told_twice
from tasks.captioning.dataset import CaptioningDataset
from tasks.captioning.generation import generate
from tasks.captioning.index import KARPATHY_FILE
from tasks.captioning.losses import drop_worst, masked_token_losses
from tasks.captioning.references import coco_ground_truth, load_references
from tasks.captioning.scores.constant_caption import best_constant_caption
from tasks.captioning.scores.scores import CaptionScores, caption_metrics
from tasks.looking import of_texts

CANDIDATES = 300  # the most frequent captions people wrote, tried for the baseline

References = dict[Any, list[str]]  # image id → the captions people wrote


class Captioning(Task):
    """COCO captions. Scores are in the units of the official evaluation: 0-1, CIDEr 0-10 (papers print × 100)."""

    best_metric = "CIDEr"
    causal_text = True
    dataset_class: ClassVar[type[CaptioningDataset]] = CaptioningDataset

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._references: dict[str, References | None] = {}

    def dataset(self, split: str, training: bool) -> CaptioningDataset:
        return self.dataset_class(
            self.data.data_path,
            split,
            self.transform(training),
            source=self.settings.training_source if split == "train" else self.settings.source,
            vocab_size=self.tokenizer.vocab_size,
            mask_id=self.tokenizer.mask_id,
            num_max_bpe_tokens=self.data.num_max_bpe_tokens,
            mask_prob=self.settings.captioning_mask_prob,
            captions_per_image=self.settings.captions_per_image,
            seed=self.data.seed,
            image_path=self.data.image_path,
        )

    def text_tokens(self) -> int:
        return self.data.num_max_bpe_tokens * self.settings.captions_per_image

    def output_values(self, model: Any) -> int:
        hidden = round(self.text_tokens() * self.settings.captioning_mask_prob)
        return hidden * model.mlm_head.out_features

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
        if "token_weight" in batch:  # own data may say that some captions count more
            losses = losses * batch["token_weight"]
        accuracy = (logits.detach().argmax(dim=1) == targets).float().mean()
        ratio = self.settings.drop_worst_ratio if step > self.settings.drop_worst_after else 0.0
        return {"loss": drop_worst(losses, ratio), "acc": accuracy}

    def predict_step(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
        """ "caption": a text for each picture; "captions": the best ones with their scores, that one first; "finite"
        bool (B,): whether its score is a number."""
        captions = generate(
            getattr(model, "module", model),  # what DDP and DeepSpeed wrap has a forward pass only
            batch["image"],
            mask_id=self.tokenizer.mask_id,
            num_beams=self.settings.num_beams,
            length_penalty=self.settings.length_penalty,
            max_tokens=self.data.num_max_bpe_tokens,
            num_return=self.alternatives,
        )
        return {
            "caption": [self.tokenizer.decode(ids) for ids in captions.best()],
            "finite": captions.scores[:, 0].isfinite(),
            "captions": [
                [Caption(self.tokenizer.decode(ids), score) for ids, score in found] for found in captions.all()
            ],
        }

    def told(self, columns: Columns) -> list[list[Caption]]:
        return columns["captions"]

    def predictions(self, columns: Columns, dataset: ImageTextDataset) -> Iterator[dict[str, Any]]:
        for row, captions in zip(columns["row"].tolist(), columns["captions"], strict=True):
            best, *others = ({"caption": each.text, "score": round(each.score, 6)} for each in captions)
            place = {"image_id": int(dataset.table["image_id"][row]), "image": dataset.table["image_path"][row]}
            yield {**place, **best, **({"others": others} if others else {})}

    def score(self, columns: Columns, dataset: ImageTextDataset, split: str, final: bool) -> Scores:
        """The official scores against the captions people wrote; METEOR and SPICE, which need Java, only if `final`.

        Only pictures that were predicted count: of a split whose pictures are not all on the disk it is a part.

        Raises:
            InputError: an unknown picture was predicted, or one twice.
        """
        predictions = _by_image(columns, dataset)
        kept: dict[str, Any] = {} if final else {self.submission_file(split): _as_submission(predictions)}
        every_reference = self.references(split)
        if every_reference is None:
            return Scores(files=kept)
        # A picture that is not on the disk is in no index and has no prediction; an unknown one is an error below.
        references = {image: captions for image, captions in every_reference.items() if image in predictions}
        scores = caption_metrics(predictions, references, meteor=final, spice=final)
        report = {
            "split": split,
            "images": len(references),
            "images_without_picture": len(every_reference) - len(references),
            **scores.as_json(),
        }
        if final:
            report["constant_caption"] = _constant_caption(references)
        else:
            kept[f"{self.name}_result_{split}"] = report
        return Scores(dict(scores.scores), report, _report_lines(report, scores), kept)

    def looked_at(self, train: ImageTextDataset, val: ImageTextDataset) -> list[str]:
        said, references = [*super().looked_at(train, val), of_texts(train, "captions")], self.references("val")
        if references is not None:
            shown = set(val.table["image_id"][:].tolist())
            constant = _constant_caption({image: told for image, told in references.items() if image in shown})
            said.append(f"CIDEr {constant['CIDEr']:.4f} is reached by saying {constant['caption']!r} of every picture")
        return said

    def check_rows(self, dataset: ImageTextDataset, split: str) -> list[str]:
        """Pictures that stand in the index twice, or that nobody wrote captions of where these are there."""
        counts = Counter(dataset.table["image_id"][:].tolist())
        problems = told_twice(counts, "image", "captions")
        references = self.references(split)
        if references is not None:
            problems += [f"image {image} has no reference captions" for image in counts if image not in references]
        if problems:
            problems.append("was the index made from other files? Make it again")
        return problems

    def check_references(self, split: str, final: bool) -> list[str]:
        try:
            self.references(split)
        except InputError as error:
            return error.problems
        except (OSError, ValueError) as error:
            return [f"the captions that people wrote cannot be read: {error}"]
        return []

    def submission(self, columns: Columns, dataset: ImageTextDataset, split: str) -> list[dict[str, Any]]:
        """A caption for each row; that each picture has just one is for `check_rows` to see."""
        images = dataset.table["image_id"][columns["row"].numpy()].tolist()
        return [{"image_id": image, "caption": text} for image, text in zip(images, columns["caption"], strict=True)]

    def report_file(self, split: str) -> str:
        return f"{self.name}_result" if split == "test" else super().report_file(split)

    def references(self, split: str) -> References | None:
        """Captions people wrote for "val" or "test", image id → captions; None where they are not there.

        They come from beside the index, else from `dataset_coco.json`, and are read once.
        """
        if split not in self._references:
            files = self.settings.reference_files(self.data.data_path, split)
            found = next((file for file in files if file.is_file()), None)
            self._references[split] = None if found is None else self._read_references(found, split)
        return self._references[split]

    def _read_references(self, file: Path, split: str) -> References | None:
        if file.name != KARPATHY_FILE:
            return load_references(file)
        references: References = {}
        for annotation in coco_ground_truth(file, split)["annotations"]:
            references.setdefault(annotation["image_id"], []).append(annotation["caption"])
        return references


class NoCaps(Captioning):
    """Trains on COCO captions, predicts nocaps. Its validation pictures are scored where their captions are there."""

    def score(self, columns: Columns, dataset: ImageTextDataset, split: str, final: bool) -> Scores:
        """As of COCO; after a prediction also by domain (in-domain, near-domain, out-domain), where the file tells it.

        A domain's pictures are scored among themselves: CIDEr takes its document frequencies from their references.
        """
        scores = super().score(columns, dataset, split, final)
        if not final or scores.report is None:
            return scores
        predictions, references = _by_image(columns, dataset), self.references(split) or {}
        by_domain = {}
        for domain, images in sorted(self._domains(split).items()):
            there = [image for image in images if image in predictions and image in references]
            if there:
                of_domain = caption_metrics(
                    {image: predictions[image] for image in there},
                    {image: references[image] for image in there},
                    meteor=False,
                    spice=False,
                )
                by_domain[domain] = {"images": len(there), **of_domain.scores}
        lines = [
            f"  {printable(name)}: {found['images']} pictures, CIDEr {found['CIDEr']:.4f}"
            for name, found in by_domain.items()
        ]
        report = {**scores.report, "by_domain": by_domain} if by_domain else scores.report
        return replace(scores, report=report, lines=[*scores.lines, *lines])

    def _domains(self, split: str) -> dict[str, list[Any]]:
        """Domain → its images, as the file of the captions tells it."""
        (file,) = self.settings.reference_files(self.data.data_path, split)
        domains: dict[str, list[Any]] = {}
        for image in json.loads(file.read_text(encoding="utf-8-sig"))["images"]:
            if isinstance(image.get("domain"), str):
                domains.setdefault(image["domain"], []).append(image["id"])
        return domains

    def _read_references(self, file: Path, split: str) -> References | None:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        if isinstance(content, dict) and not content.get("annotations"):
            return None
        return load_references(file)


def _by_image(columns: Columns, dataset: ImageTextDataset) -> dict[int, str]:
    """Image id → caption. Raises InputError naming every image that has several."""
    images = dataset.table["image_id"][columns["row"].numpy()].tolist()
    counts = Counter(images)
    problems = [f"image {image} has {count} captions, wanted one" for image, count in counts.items() if count > 1]
    if problems:
        raise InputError([*problems, "is a picture twice in the index? Make it again"])
    return dict(zip(images, columns["caption"], strict=True))


def _as_submission(predictions: dict[int, str]) -> list[dict[str, Any]]:
    return [{"image_id": image, "caption": caption} for image, caption in predictions.items()]


def _constant_caption(references: References) -> dict[str, Any]:
    """What a captioner that never looks can reach: the one caption that scores best when said of every picture."""
    candidates = (caption for captions in references.values() for caption in captions)
    caption, cider = best_constant_caption(candidates, references, CANDIDATES)
    return {"caption": caption, "CIDEr": cider}


def _report_lines(report: dict[str, Any], scores: CaptionScores) -> list[str]:
    named = "  ".join(f"{name} {score:.4f}" for name, score in scores.scores.items())
    lines = [f"{report['images']} pictures: {named}"]
    if report["images_without_picture"]:
        lines.append(f"  {report['images_without_picture']} pictures of the split are not on disk and do not count")
    lines += [f"  {name} left out: {reason}" for name, reason in scores.left_out.items()]
    if "constant_caption" in report:
        constant = report["constant_caption"]
        lines.append(f"  CIDEr {constant['CIDEr']:.4f} is reached by saying {constant['caption']!r} of every picture")
    return lines
