"""The tasks by the names of `--task`. A new task is a file here, its dataset, its head, and a line below."""

from __future__ import annotations

from tasks.base import Record, Task, TaskSettings
from tasks.vqav2 import VQAv2

TASKS: dict[str, type[Task]] = {VQAv2.name: VQAv2}
# Names of `--task` that are accepted and not there yet.
PLANNED = ("coco_captioning", "nocaps", "nlvr2", "flickr30k", "coco_retrieval", "imagenet")

__all__ = ["PLANNED", "TASKS", "Record", "Task", "TaskSettings"]
