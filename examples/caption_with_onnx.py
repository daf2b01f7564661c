"""Captions a picture with an exported model, greedily; needs onnxruntime, sentencepiece, numpy and Pillow alone.

    python3 examples/caption_with_onnx.py model.json photo.jpg

model.json is what `python3 -m inference export` wrote; the files that it names lie beside it.
"""

import json
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


def greedy(encoder, step, image, about):
    """Token ids of the caption: those of the toolkit's search with one beam.

    A caption of n tokens has the score (sum of log-probabilities) / (n + 2) ** length_penalty. The search does not end
    at the first `</s>` but when nothing that goes on can beat the best caption found.
    """
    end, penalty, longest = about["special_tokens"]["</s>"], about["length_penalty"], about["longest_text"] - 3
    keys, values = encoder.run(["image_keys", "image_values"], {"image": image})
    nothing = np.zeros((*keys.shape[:3], 0, keys.shape[4]), np.float32)
    state = {"image_keys": keys, "image_values": values, "text_keys": nothing, "text_values": nothing}
    tokens: list[int] = []
    best: list[int] = []
    newest, total, score = about["special_tokens"]["<s>"], 0.0, -np.inf
    while True:
        feed = {"token_ids": np.array([newest], np.int64), **state}
        logits, state["text_keys"], state["text_values"] = step.run(None, feed)
        sums = total + logits[0] - logits.max() - np.log(np.exp(logits[0] - logits.max()).sum())
        first = int(sums.argmax())
        if score >= sums[first] / (longest + 2) ** penalty:
            return best
        if (first == end or len(tokens) == longest) and sums[first] / (len(tokens) + 2) ** penalty > score:
            best, score = list(tokens), sums[first] / (len(tokens) + 2) ** penalty
        if len(tokens) == longest:
            return best
        sums[end] = -np.inf
        newest = int(sums.argmax())
        total = float(sums[newest])
        tokens.append(newest)


def caption(about_file, picture):
    """The caption as text."""
    about, folder = json.loads(Path(about_file).read_text(encoding="utf-8")), Path(about_file).parent
    files, special = about["files"], about["special_tokens"].values()
    spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / files["tokenizer"]))
    encoder, step = (
        onnxruntime.InferenceSession(folder / files[part], providers=["CPUExecutionProvider"])
        for part in ("encoder", "step")
    )
    ids = greedy(encoder, step, pixels(picture, about["image_size"]), about)
    # The pieces of the tokenizer are the ids without 1; rows of the model behind `<mask>` belong to no piece.
    pieces = [spm.id_to_piece(number - 1) for number in ids if number not in special and number < max(special)]
    return "".join(pieces).replace("\u2581", " ").strip()


if __name__ == "__main__":
    print(caption(*sys.argv[1:3]))
