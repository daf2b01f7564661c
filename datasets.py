"""The door to the data sets: what people import, under the names of the BEiT-3 repository; the code is in the rooms.

An index file has one JSON object per line; paths in it are relative to the data folder. What an example is depends on
(seed, epoch, row) alone and the order of rows on (seed, epoch), so that any number of loader workers, and a run that
was resumed, see the same examples in the same order.
"""

from beit3.data.image_text import ImageTextDataset, collate_image_text, pad_text
from beit3.data.loading import EpochSampler, EvaluationSampler, build_loader
from tasks.captioning.dataset import CaptioningDataset, collate_captions, mask_caption
from tasks.captioning.own_dataset import CaptionDataset
from tasks.vqav2.answers import normalize_word
from tasks.vqav2.dataset import VQAv2Dataset, collate_vqa, read_answers
from tasks.vqav2.own_dataset import VQADataset

__all__ = [
    "CaptionDataset",
    "CaptioningDataset",
    "EpochSampler",
    "EvaluationSampler",
    "ImageTextDataset",
    "VQADataset",
    "VQAv2Dataset",
    "build_loader",
    "collate_captions",
    "collate_image_text",
    "collate_vqa",
    "mask_caption",
    "normalize_word",
    "pad_text",
    "read_answers",
]
