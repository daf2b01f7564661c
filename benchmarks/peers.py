"""The other side: each path the way it was done before, written plainly from the specification of the released models.

The encoder is that of the package torchscale 0.2.0 (in `benchmarks/.peers`, see run.sh), imported when first wanted;
nothing else here needs more than the toolkit does.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor, nn

from beit3.data.augmentation import (
    ENHANCE_FACTOR,
    FILL,
    N_OPERATIONS,
    OPERATIONS,
    PROBABILITY,
    ROTATION,
    SHEAR,
    TRANSLATION,
    Key,
    crop_box,
)
from beit3.model.encoder import FIRST_POSITION, EncoderConfig
from modeling_finetune import VQA_ANSWERS, Pooler
from tasks.vqav2.answers import MIN_ANSWER_COUNT, normalize_word, vote_score
from tasks.vqav2.index import OFFICIAL_FILES, Split

PACKAGES = Path(__file__).parent / ".peers"
BOS, EOS = 0, 2


# Models


def torchscale_encoder(config: EncoderConfig) -> nn.Module:
    """torchscale's BEiT-3 of this shape; its parameters have the names of ours."""
    if str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))  # last: nothing in there may hide a package of the environment
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports timm by names that timm calls old
        from torchscale.architecture.config import EncoderConfig as TorchscaleConfig
        from torchscale.model.BEiT3 import BEiT3 as TorchscaleBEiT3
    return TorchscaleBEiT3(
        TorchscaleConfig(
            img_size=config.image_size,
            patch_size=config.patch_size,
            vocab_size=config.vocab_size,
            multiway=True,
            layernorm_embedding=False,
            normalize_output=config.final_norm,
            no_output_layer=True,
            drop_path_rate=config.drop_path_rate,
            encoder_embed_dim=config.width,
            encoder_attention_heads=config.heads,
            encoder_ffn_embed_dim=4 * config.width,
            encoder_layers=config.layers,
            checkpoint_activations=config.recompute_activations,
        )
    )


class PeerForVisualQuestionAnswering(nn.Module):
    """All positions through all layers, then the class token's output into the head."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.beit3: Any = torchscale_encoder(config)
        width = config.width
        self.pooler = Pooler(width)
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, VQA_ANSWERS)
        )

    def forward(self, image: Tensor, question: Tensor, padding_mask: Tensor) -> Tensor:
        """As `BEiT3ForVisualQuestionAnswering`."""
        output = self.beit3(textual_tokens=question, visual_tokens=image, text_padding_position=padding_mask)
        return self.head(self.pooler(output["encoder_out"]))


class PeerForCaptioning(nn.Module):
    """One attention over picture and text under a mask made for every batch."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.beit3: Any = torchscale_encoder(config)
        self.mlm_head = nn.Linear(config.width, config.vocab_size)
        self.image_length = config.patches + 1

    def forward(self, image: Tensor, text_ids: Tensor, padding_mask: Tensor, language_masked_pos: Tensor) -> Tensor:
        """As `BEiT3ForCaptioning`."""
        length = self.image_length + text_ids.shape[1]
        hidden = torch.zeros(length, length, device=image.device)  # 1 = may not attend
        hidden[: self.image_length, self.image_length :] = 1
        hidden[self.image_length :, self.image_length :] = torch.ones_like(
            hidden[self.image_length :, self.image_length :]
        ).triu(1)
        output = self.beit3(
            textual_tokens=text_ids, visual_tokens=image, text_padding_position=padding_mask, attn_mask=hidden
        )
        text = output["encoder_out"][:, self.image_length :]
        return self.mlm_head(text[language_masked_pos.bool()])


PEERS = {"vqav2": PeerForVisualQuestionAnswering, "captioning": PeerForCaptioning}


def one_hot_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """KL divergence from the smoothed one-hot target, written out: logits (n, V), targets (n,) → (n,)."""
    one_hot = torch.zeros_like(logits).scatter(1, targets[:, None], 1.0)
    smoothed = one_hot * (1 - smoothing) + (1 - one_hot) * smoothing / (logits.shape[1] - 1)
    return F.kl_div(F.log_softmax(logits.float(), dim=1), smoothed, reduction="none").sum(dim=1)


# Generation


class NextToken(Protocol):
    """A model that predicts the token behind a caption."""

    def __call__(self, tokens: Tensor, parents: list[int] | None) -> Tensor:
        """Logits (rows, V) behind the tokens (rows, n), `<s>` first; row i goes on from row parents[i] of the last
        call (None at the first)."""


class CachedDecoder:
    """torchscale's encoder with keys and values of earlier steps.

    Every beam has a picture of its own, which it encodes, keeps, and copies when beams change parents.
    """

    def __init__(self, model: PeerForCaptioning, images: Tensor, num_beams: int, mask_id: int) -> None:
        self.model, self.mask_id = model, mask_id
        self.images = images.repeat_interleave(num_beams, dim=0)
        self.states: dict[int, dict[str, Tensor]] = {n: {} for n in range(len(model.beit3.encoder.layers))}

    def __call__(self, tokens: Tensor, parents: list[int] | None) -> Tensor:
        length = tokens.shape[1]
        text = torch.cat([tokens[:, -1:], torch.full_like(tokens[:, -1:], self.mask_id)], dim=1)  # token and <mask>
        known = 0 if parents is None else self._reorder(torch.tensor(parents, device=tokens.device))
        image_length = self.model.image_length if parents is None else 0
        keys = known + image_length + 2
        hidden = torch.zeros(image_length + 2, keys, device=tokens.device)  # 1 = may not attend
        hidden[:image_length, image_length:] = 1
        hidden[-2, -1] = 1  # the token does not see the <mask> behind it
        positions = None
        if parents is not None:
            positions = torch.arange(length - 1, length + 1, device=tokens.device)[None] + FIRST_POSITION
        output = self.model.beit3(
            textual_tokens=text,
            visual_tokens=self.images if parents is None else None,
            attn_mask=hidden,
            incremental_state=self.states,
            positions=positions,
        )
        return self.model.mlm_head(output["encoder_out"][:, -1])

    def _reorder(self, parents: Tensor) -> int:
        """Give each beam its parent's keys and values, without those of the `<mask>`; returns how many there are."""
        for state in self.states.values():
            for name, tensor in state.items():
                state[name] = tensor[:, :, :-1].index_select(0, parents)
        return tensor.shape[2] - 1


@torch.no_grad()
def per_beam_search(
    predict: NextToken, batch: int, *, num_beams: int, length_penalty: float, max_tokens: int, device: torch.device
) -> list[list[int]]:
    """Best captions of a batch: candidates are walked one by one in Python, and finished pictures go on with the rest.

    The rules are those of `tasks.captioning.generation.generate`. predict: sees batch * num_beams rows, the beams of a
    picture one after the other.
    """
    rows = batch * num_beams
    tokens = torch.full((rows, 1), BOS, device=device)
    sums = torch.full((batch, num_beams), -torch.inf, device=device)
    sums[:, 0] = 0.0  # all beams are the same at first
    sums = sums.flatten()
    best: list[tuple[float, list[int]]] = [(-math.inf, [])] * batch  # score, tokens
    done = [False] * batch
    parents = None
    while not all(done):
        log_probabilities = predict(tokens, parents).float().log_softmax(dim=-1)  # (rows, V)
        vocabulary, length = log_probabilities.shape[1], tokens.shape[1]
        totals = (sums[:, None] + log_probabilities).view(batch, -1)
        candidates = totals.topk(3 * num_beams, dim=1)
        chosen: list[tuple[float, int, int]] = []  # total, parent, token of each beam of the next step
        for picture in range(batch):
            scores, places = candidates.values[picture], candidates.indices[picture]
            done[picture] |= best[picture][0] >= scores[0].item() / (max_tokens - 1) ** length_penalty
            kept: list[tuple[float, int, int]] = []
            for score, place in zip(scores, places, strict=True):
                total, beam, token = score.item(), place.item() // vocabulary, place.item() % vocabulary
                row = picture * num_beams + beam
                if token == EOS or length + 2 == max_tokens:
                    score_of_all = total / (length + 1) ** length_penalty
                    if not done[picture] and score_of_all > best[picture][0]:
                        best[picture] = (score_of_all, tokens[row, 1:].tolist())
                else:
                    kept.append((total, row, token))
                if len(kept) == num_beams:
                    break
            chosen += kept
        if length + 2 == max_tokens:
            break
        parents = [row for _, row, _ in chosen]
        newest = torch.tensor([[token] for _, _, token in chosen], device=device)
        tokens = torch.cat([tokens[parents], newest], dim=1)
        sums = torch.tensor([total for total, _, _ in chosen], device=device)
    return [caption for _, caption in best]


# Pictures


class PillowTransform:
    """The training transform by Pillow, with floats made in the worker; draws what `TrainTransform` draws."""

    def __init__(self, size: int, randaug: bool) -> None:
        self.size, self.randaug = size, randaug

    def __call__(self, path: str, key: Key) -> Tensor:
        """float32 (3, size, size) in [-1, 1]."""
        rng = np.random.default_rng(key)
        with open(path, "rb") as file:
            image = Image.open(file).convert("RGB")
        top, left, height, width = crop_box(rng, image.height, image.width)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.randaug:
            image = pillow_rand_augment(image, rng)
        return TF.normalize(TF.to_tensor(image), [0.5] * 3, [0.5] * 3)


def pillow_evaluation(path: str, size: int) -> Tensor:
    """The evaluation transform by Pillow: float32 (3, size, size) in [-1, 1]."""
    with open(path, "rb") as file:
        image = Image.open(file).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return TF.normalize(TF.to_tensor(image), [0.5] * 3, [0.5] * 3)


def pillow_rand_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    names = list(OPERATIONS)
    for _ in range(N_OPERATIONS):
        name = names[rng.integers(len(names))]
        applied, sign = rng.random() < PROBABILITY, (-1, 1)[rng.integers(2)]
        if applied:
            image = _pillow_operation(name, image, sign)
    return image


def _pillow_operation(name: str, image: Image.Image, sign: int) -> Image.Image:
    by_name: dict[str, Callable[[], Image.Image]] = {
        "Identity": lambda: image,
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Brightness": lambda: ImageEnhance.Brightness(image).enhance(ENHANCE_FACTOR),
        "Sharpness": lambda: ImageEnhance.Sharpness(image).enhance(ENHANCE_FACTOR),
        "ShearX": lambda: _affine(image, (1, sign * SHEAR, 0, 0, 1, 0)),
        "ShearY": lambda: _affine(image, (1, 0, 0, sign * SHEAR, 1, 0)),
        "TranslateX": lambda: _affine(image, (1, 0, sign * TRANSLATION, 0, 1, 0)),
        "TranslateY": lambda: _affine(image, (1, 0, 0, 0, 1, sign * TRANSLATION)),
        "Rotate": lambda: image.rotate(
            sign * np.degrees(ROTATION), Image.Resampling.BILINEAR, fillcolor=(FILL, FILL, FILL)
        ),
    }
    return by_name[name]()


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(FILL, FILL, FILL)
    )


# Questions


def plain_index(folder: Path, tokenizer: Any, target: Path) -> int:
    """The index of VQAv2: whole files in memory, one question after the other; returns how many questions there were.

    folder: holds the official files and the pictures. target: a folder for `train.jsonl`, `val.jsonl` and so on; what
    is in them is what `VQAv2Dataset.make_dataset_index` writes, rest_val and trainable_val left out.
    """
    read = {split: json.loads((folder / split.questions).read_text())["questions"] for split in OFFICIAL_FILES}
    annotated = {
        s: json.loads((folder / s.annotations).read_text())["annotations"] for s in OFFICIAL_FILES if s.annotated
    }
    counts: dict[str, int] = {}
    for entries_of_split in annotated.values():
        for annotation in entries_of_split:
            answer = normalize_word(annotation["multiple_choice_answer"])
            counts[answer] = counts.get(answer, 0) + 1
    label_of = {answer: n for n, answer in enumerate(a for a, count in counts.items() if count >= MIN_ANSWER_COUNT)}
    target.mkdir(exist_ok=True)
    for split, questions in read.items():
        annotation_of = {entry["question_id"]: entry for entry in annotated.get(split, ())}
        entries = [_plain_entry(folder, split, entry, annotation_of, label_of, tokenizer) for entry in questions]
        with (target / f"{split.index}.jsonl").open("w", encoding="utf-8") as file:
            for entry in entries:
                if entry is not None:
                    file.write(json.dumps(entry) + "\n")
    return sum(map(len, read.values()))


def _plain_entry(
    folder: Path,
    split: Split,
    question: dict[str, Any],
    annotation_of: dict[int, dict[str, Any]],
    label_of: dict[str, int],
    tokenizer: Any,
) -> dict[str, Any] | None:
    """The line of a question, None when it is left out."""
    path = f"{split.folder}/COCO_{split.folder}_{question['image_id']:012}.jpg"
    labels: list[int] = []
    scores: list[float] = []
    if split.annotated:
        votes: dict[str, int] = {}
        for given in annotation_of[question["question_id"]]["answers"]:
            votes[given["answer"]] = votes.get(given["answer"], 0) + 1
        labels = [label_of[answer] for answer in votes if answer in label_of]
        scores = [vote_score(count) for answer, count in votes.items() if answer in label_of]
    ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(question["question"]))
    if (split.annotated and not labels) or not (folder / path).exists():
        return None
    return {
        "image_path": path,
        "text_segment": ids,
        "labels": labels,
        "scores": scores,
        "qid": question["question_id"],
    }


def plain_rows(index_files: Sequence[Path]) -> list[dict[str, Any]]:
    """Index files as a list with a dictionary per line."""
    return [json.loads(line) for file in index_files for line in file.read_text(encoding="utf-8").splitlines()]
