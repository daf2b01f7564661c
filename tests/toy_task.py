"""A whole new task: which colour has the picture? It has no text, one flag of its own, and a head that is there."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from beit3.data.image_text import ImageTextDataset, collate_image_text
from beit3.data.index_table import IntField, PathField, read_index
from beit3.system.flags import flag
from tasks.base import Scores, Task
from tasks.settings import TaskSettings

COLOURS = ["red", "green", "blue"]


@dataclass(frozen=True)
class ColourSettings(TaskSettings):
    logit_scale: float = flag(1.0, "factor of the logits in training", above=0, decides_steps=True)

    name, trains_as, task = "colour", "colour", "tests.toy_task:Colour"
    model_suffix, splits, uses_text = "imageclassification", ("test", "val"), False

    def problems(self, data, training):
        files = [data.data_path / f"{split}.jsonl" for split in (("train", "val") if training else (data.split,))]
        return [f"{file}: not there" for file in files if not file.is_file()]


class ColourDataset(ImageTextDataset):
    def example(self, row):
        return {"image": self.load_image(row), "label": int(self.table["label"][row]), "row": row}

    @property
    def collate(self):
        return lambda items: {**collate_image_text(items), "label": torch.tensor([item["label"] for item in items])}


class Colour(Task):
    best_metric = "accuracy"

    def dataset(self, split, training):
        fields = [PathField("image_path", self.data.data_path), IntField("label", len(COLOURS))]
        table = read_index([self.data.data_path / f"{split}.jsonl"], fields, how_to_make="the test makes it")
        return ColourDataset(self.data.data_path, table, self.transform(training), seed=self.data.seed)

    def model_options(self, state_dict):
        return {"num_classes": len(COLOURS)}

    def output_values(self, model):
        return len(COLOURS)

    def training_step(self, model, batch, step):
        return {"loss": F.cross_entropy(model(batch["image"]) * self.settings.logit_scale, batch["label"])}

    def predict_step(self, model, batch):
        return {"label": model(batch["image"]).argmax(dim=1)}

    def score(self, columns, dataset, split, final):
        right = columns["label"].numpy() == dataset.table["label"][columns["row"].numpy()]
        return Scores({"accuracy": 100 * float(right.mean())}, {"right": int(right.sum())} if final else None)
