"""The tasks by the names of `--task`. A new task is a file here, its dataset, its head, and a line below."""

from __future__ import annotations

from tasks.base import Record, Task, TaskSettings
from tasks.captioning.task import Captioning, NoCaps
from tasks.vqav2.task import VQAv2

TASKS: dict[str, type[Task]] = {task.name: task for task in (VQAv2, Captioning, NoCaps)}
# Names of `--task` that are accepted and not there yet.
PLANNED = ("nlvr2", "flickr30k", "coco_retrieval", "imagenet")

__all__ = ["PLANNED", "TASKS", "Record", "Task", "TaskSettings"]
