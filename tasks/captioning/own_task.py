"""Captioning of people's own pictures: as COCO, scored against the captions of the table."""

from __future__ import annotations

from typing import ClassVar

from tasks.captioning.dataset import CaptioningDataset
from tasks.captioning.own_dataset import CaptionDataset
from tasks.captioning.task import Captioning


class OwnCaptioning(Captioning):
    dataset_class: ClassVar[type[CaptioningDataset]] = CaptionDataset
