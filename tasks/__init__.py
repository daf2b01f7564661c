"""The tasks. A new one is a folder here, its head in `modeling_finetune`, and a line in `TASKS`."""

from __future__ import annotations

import importlib
from typing import Any

from tasks.settings import TaskSettings

# --task NAME → `module:Class` of its settings
TASKS = {
    "vqav2": "tasks.vqav2.settings:VQAv2Settings",
    "coco_captioning": "tasks.captioning.settings:CaptioningSettings",
    "nocaps": "tasks.captioning.settings:NoCapsSettings",
    "vqa": "tasks.vqav2.own_settings:VQASettings",
    "captioning": "tasks.captioning.own_settings:OwnCaptioningSettings",
}

# Names of --task, and their flags, that the BEiT-3 repository has and this one has not yet.
PLANNED = {
    "nlvr2": (),
    "flickr30k": (),
    "coco_retrieval": (),
    "imagenet": (
        "nb_classes", "mixup", "cutmix", "cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode",
        "color_jitter", "aa", "smoothing", "crop_pct", "reprob", "remode", "recount", "resplit",
    ),
}  # fmt: skip


def imported(place: str) -> Any:
    """What `module:name` names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def settings_of(name: str) -> type[TaskSettings]:
    """The settings class of a name in `TASKS`."""
    return imported(TASKS[name])
