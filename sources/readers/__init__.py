"""Readers of published formats, one module for each."""

from __future__ import annotations

from sources.readers.aokvqa import AOkVqa
from sources.readers.base import FormatSource
from sources.readers.coco_captions import CocoCaptions
from sources.readers.conversations import Conversations
from sources.readers.gqa import Gqa
from sources.readers.karpathy import Karpathy
from sources.readers.textcaps import TextCaps
from sources.readers.textvqa import TextVqa
from sources.readers.vizwiz import VizWiz
from sources.readers.vqa_pairs import VqaPairs

# A file is read by the first one that it fits.
READERS: tuple[type[FormatSource], ...] = (
    VqaPairs,
    VizWiz,
    AOkVqa,
    TextCaps,
    TextVqa,
    Karpathy,
    CocoCaptions,
    Conversations,
    Gqa,
)
