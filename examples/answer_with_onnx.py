"""Answers a question about a picture with an exported model; needs onnxruntime, sentencepiece, numpy and Pillow alone.

    python3 examples/answer_with_onnx.py model.json photo.jpg "What colour is the car?"

model.json is what `python3 -m inference export` wrote; the files that it names lie beside it.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import sentencepiece
from PIL import Image, ImageOps


def pixels(picture, size):
    """uint8 (1, 3, size, size): upright as a phone held it, its sides not kept in proportion."""
    with Image.open(picture) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    return np.asarray(upright.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)[None]


def text_ids(text, spm, special):
    """Token ids of a text. Special tokens may be written out in it; `<mask>` takes the white space before it along."""
    ids = []
    for part in re.split(r"(<s>|<pad>|</s>|<unk>|\s*<mask>)", text):
        known = special.get(part.strip())
        # Ids are those of the pieces and 1, but for piece 0, the unknown.
        ids += [piece + 1 if piece else special["<unk>"] for piece in spm.encode(part)] if known is None else [known]
    return ids


def answer(about_file, picture, question, top=3):
    """[(answer, confidence), …], the best first."""
    about, folder = json.loads(Path(about_file).read_text(encoding="utf-8")), Path(about_file).parent
    spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / about["files"]["tokenizer"]))
    special = about["special_tokens"]
    ids = text_ids(question, spm, special)[: about["longest_text"] - 2]
    ids = np.array([[special["<s>"], *ids, special["</s>"]]], np.int64)
    model = onnxruntime.InferenceSession(folder / about["files"]["model"], providers=["CPUExecutionProvider"])
    image = pixels(picture, about["image_size"])
    feed = {"image": image, "token_ids": ids, "padding_mask": np.zeros(ids.shape, bool)}
    [logits] = model.run(["logits"], feed)[0]
    best = np.argsort(-logits, kind="stable")[:top]
    # In fp64, where exp does not overflow for any logit of a model.
    scaled = about["calibration"]["slope"] * logits[best].astype(float) + about["calibration"]["offset"]
    return [(about["answers"][n], c) for n, c in zip(best, 1 / (1 + np.exp(-scaled)), strict=True)]


if __name__ == "__main__":
    for text, confidence in answer(*sys.argv[1:4]):
        print(f"{text}  {confidence:.2f}")
