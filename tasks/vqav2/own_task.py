"""Visual question answering on people's own pictures: as VQAv2, scored from the rows of the index themselves."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from beit3.data.image_text import ImageTextDataset
from beit3.data.index_description import said_of
from tasks.base import Columns, Scores, told_twice
from tasks.calibration import fit
from tasks.vqav2.index import DESCRIPTION
from tasks.vqav2.own_dataset import VQADataset
from tasks.vqav2.own_index import Votes
from tasks.vqav2.own_scores import Worth, report_lines, report_on, row_score
from tasks.vqav2.task import VQAv2


class VQA(VQAv2):
    def dataset(self, split: str, training: bool) -> VQADataset:
        return VQADataset(
            self.data.data_path,
            split,
            self.transform(training),
            balance=training and self.settings.balance_answers,
            num_max_bpe_tokens=self.data.num_max_bpe_tokens,
            vocab_size=self.tokenizer.vocab_size,
            num_answers=len(self.data_answers),
            seed=self.data.seed,
            image_path=self.data.image_path,
        )

    @functools.cached_property
    def normalize(self) -> bool:
        """Whether the index counts answers in their normalised form."""
        chosen: dict[str, Any] = said_of(self.data.data_path, DESCRIPTION, "chosen", {})
        return chosen.get("normalize_answers") is True

    def training_step(self, model: nn.Module, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """With weights the loss is the mean over rows of weight times loss."""
        if "weight" not in batch:
            return super().training_step(model, batch, step)
        logits = model(image=batch["image"], question=batch["token_ids"], padding_mask=batch["padding_mask"])
        targets = F.pad(batch["targets"], (0, logits.shape[1] - batch["targets"].shape[1]))
        losses = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").sum(dim=1)
        return {"loss": (losses * batch["weight"]).mean()}

    def predictions(self, columns: Columns, dataset: ImageTextDataset) -> Iterator[dict[str, Any]]:
        rows = columns["row"].tolist()
        for row, told in zip(rows, self.told(columns), strict=True):
            said, best = self._said(dataset, row), told[0]
            votes, worth = self._votes(dataset, row), self._worth(dataset, row)
            entry = {
                "question_id": said.get("question_id", int(dataset.table["qid"][row])),
                "image": dataset.table["image_path"][row],
                "question": self._question(dataset, row),
                "answer": best.text,
                "confidence": round(best.confidence, 6),
                "top": [{"answer": each.text, "confidence": round(each.confidence, 6)} for each in told],
            }
            if votes:
                score_of = functools.partial(row_score, votes=votes, normalize=self.normalize, worth=worth)
                entry["right_answers"] = {answer: score_of(answer) for answer in votes}
                entry["score"] = score_of(best.text)
            yield entry

    def score(self, columns: Columns, dataset: ImageTextDataset, split: str, final: bool) -> Scores:
        """From the answers that the rows hold; rows without any do not count."""
        known = [
            (row, label, votes)
            for row, label in zip(columns["row"].tolist(), columns["label"].tolist(), strict=True)
            if (votes := self._votes(dataset, row))
        ]
        if not known:
            return Scores()
        predicted = [self.answers[label] for _, label, _ in known]
        questions = [self._question(dataset, row) for row, _, _ in known]
        worth = [self._worth(dataset, row) for row, _, _ in known]
        report = report_on(predicted, questions, [votes for _, _, votes in known], self.normalize, worth)
        metrics = {name: report[name] for name in ("score", "exact_match", "macro_average")}
        calibration = None
        if not final and "logits" in columns and len(known) == len(columns["row"]):
            calibration = fit(columns["logits"].numpy(), self._scores_of_best(columns, dataset))
        report = {"split": split, **report, "questions_without_answers": len(columns["row"]) - len(known)}
        return Scores(metrics, report if final else None, report_lines(report), calibration=calibration)

    def check_rows(self, dataset: ImageTextDataset, split: str) -> list[str]:
        problems = told_twice(Counter(dataset.table["qid"][:].tolist()), "question", "answers")
        return [*problems, "give each question an id of its own and make the index again"] if problems else []

    def check_references(self, split: str, final: bool) -> list[str]:
        return []  # the rows hold them

    def submission(self, columns: Columns, dataset: ImageTextDataset, split: str) -> list[dict[str, Any]]:
        ids = self._question_ids(columns, dataset)
        said = (self._said(dataset, row).get("question_id") for row in columns["row"].tolist())
        named = [number if own is None else own for number, own in zip(ids, said, strict=True)]
        return [{"question_id": q, "answer": a} for q, a in zip(named, self._answer_texts(columns), strict=True)]

    def _said(self, dataset: Any, row: int) -> dict[str, Any]:
        return dataset.said[row]

    def _question(self, dataset: Any, row: int) -> str:
        """As it was asked; of an index that does not say it, from its tokens."""
        asked = self._said(dataset, row).get("question")
        return asked if isinstance(asked, str) else self.tokenizer.decode(dataset.table["text_segment"][row].tolist())

    def _votes(self, dataset: Any, row: int) -> Votes:
        """Answer → how many gave it; of an index that does not say it, its labels, the best first. Empty where nothing
        is known."""
        worth = self._worth(dataset, row)
        if worth is None:
            return self._said(dataset, row)["answers"]
        return dict.fromkeys(sorted(worth, key=lambda answer: -worth[answer]), 1)

    def _worth(self, dataset: Any, row: int) -> Worth | None:
        """Answer → score in [0, 1], of an index that does not say who gave which; None where it does."""
        given = self._said(dataset, row).get("answers")
        if isinstance(given, dict) and all(type(count) is int and count > 0 for count in given.values()):
            return None
        labels, scores = dataset.table["labels"][row].tolist(), dataset.table["scores"][row].tolist()
        return {self.data_answers[n]: round(score, 6) for n, score in zip(labels, scores, strict=True) if score > 0}
