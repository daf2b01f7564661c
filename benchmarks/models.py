"""Rows of the model: encoder, train step, caption loss, captions of one picture together, generation.

Both sides have the same weights, pictures, texts and dtype; what they give is compared before anything is timed. Texts
are as long as real ones; this toolkit trims a batch to its longest, the other side fills up to the usual maximum.
A train step is forward, loss and backward: the optimizer is the same on both sides. Drop path is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.data.image_text import TEXT_MULTIPLE
from beit3.data.tokenizer import EOS_ID, PAD_ID
from beit3.model.encoder import EncoderConfig
from benchmarks import memory
from benchmarks.peers import PEERS, CachedDecoder, one_hot_loss, per_beam_search
from benchmarks.table import Line, Reach, Row, Settings, interleave, rates
from modeling_finetune import HEADS, SIZES, VQA_ANSWERS
from tasks.captioning.generation import generate
from tasks.captioning.losses import masked_token_losses
from tasks.vqav2.task import soft_answer_loss
from tests import reference

VOCABULARY, MASK_ID = 64010, 64001
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TASK_NAMES = {"vqav2": "VQAv2", "captioning": "captioning"}
LENGTHS = {"vqav2": (10, 8, 12, 9), "captioning": (12, 14, 11, 13)}  # tokens of real texts, with <s> and </s>
FULL_LENGTH = {"vqav2": 64, "captioning": 32}  # what the other side fills up to
SMOOTHING = 0.1


@dataclass(frozen=True)
class Batch:
    """One batch as both sides want it.

    Attributes:
        image: (B, 3, H, H) in [-1, 1].
        text, padding: (B, T) trimmed.
        masked_index: (masked positions,) which tokens of the flattened text are to be predicted.
        full_text, full_padding: the same, (B, full length); full_masked: 1 where a token is to be predicted.
        targets: of captioning (masked positions,) token ids, of VQAv2 (B, answers) in [0, 1].
    """

    image: Tensor
    text: Tensor
    padding: Tensor
    masked_index: Tensor
    full_text: Tensor
    full_padding: Tensor
    full_masked: Tensor
    targets: Tensor


def make_batch(task: str, batch: int, pixels: int, device: torch.device) -> Batch:
    lengths = [LENGTHS[task][row % 4] for row in range(batch)]
    width = -(-max(lengths) // TEXT_MULTIPLE) * TEXT_MULTIPLE
    text, padding = reference.tokens(1, lengths, MASK_ID, width)
    masked = torch.zeros_like(padding)
    masked[:, 1:] = 1 - padding[:, 1:]
    masked[:, 3::3] = 0  # about two thirds of the tokens stay hidden
    targets = text[masked.bool()]
    if task == "captioning":
        text = text.masked_fill(masked.bool(), MASK_ID)
    else:
        targets = torch.zeros(batch, VQA_ANSWERS)
        targets[torch.arange(batch), torch.arange(batch) * 7] = 0.9
    fill = (0, FULL_LENGTH[task] - width)
    tensors = (
        reference.images(2, batch, pixels), text, padding, masked.flatten().nonzero().squeeze(1),
        F.pad(text, fill, value=PAD_ID), F.pad(padding, fill, value=1), F.pad(masked, fill), targets,
    )  # fmt: skip
    return Batch(*(tensor.to(device) for tensor in tensors))


def make_config(task: str, size: str, pixels: int) -> EncoderConfig:
    return EncoderConfig(
        **SIZES[size],
        image_size=pixels,
        vocab_size=VOCABULARY,
        recompute_activations=False,
        final_norm=HEADS[task].final_norm,
    )


def make_pair(task: str, size: str, pixels: int, device: torch.device) -> tuple[Any, Any]:
    """The model of this toolkit and its peer, with the same weights."""
    torch.manual_seed(0)
    config = make_config(task, size, pixels)
    ours, peer = HEADS[task](config), PEERS[task](config)
    peer.load_state_dict(ours.state_dict())
    return ours.to(device), peer.to(device)


def our_loss(task: str, model: nn.Module, batch: Batch) -> Tensor:
    if task == "vqav2":
        return soft_answer_loss(answer_logits(model, batch), batch.targets)
    return our_caption_loss(model, batch, batch.image)


def answer_logits(model: nn.Module, batch: Batch) -> Tensor:
    return model(image=batch.image, question=batch.text, padding_mask=batch.padding)


def our_caption_loss(model: nn.Module, batch: Batch, image: Tensor) -> Tensor:
    """image: (B, 3, H, H), or fewer pictures that the texts share evenly."""
    logits = model(image=image, text_ids=batch.text, padding_mask=batch.padding, masked_index=batch.masked_index)
    return masked_token_losses(logits, batch.targets, SMOOTHING).mean()


def peer_loss(task: str, model: nn.Module, batch: Batch) -> Tensor:
    if task == "vqav2":
        logits = model(image=batch.image, question=batch.full_text, padding_mask=batch.full_padding)
        return F.binary_cross_entropy_with_logits(logits.float(), batch.targets) * VQA_ANSWERS
    logits = model(
        image=batch.image,
        text_ids=batch.full_text,
        padding_mask=batch.full_padding,
        language_masked_pos=batch.full_masked,
    )
    return one_hot_loss(logits, batch.targets, SMOOTHING).mean()


def autocast(dtype: str, device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if dtype == "fp32" else torch.autocast(device.type, DTYPES[dtype])


def train_step(model: nn.Module, loss: Callable[[], Tensor], dtype: str, device: torch.device) -> None:
    """Forward, loss and backward, as `beit3.training.backends` does them; the gradients are thrown away."""
    with autocast(dtype, device):
        value = loss()
    value.backward()
    model.zero_grad(set_to_none=True)


def check_close(what: str, sides: Iterable[Any], dtype: str) -> None:
    """Raises RuntimeError unless the two agree: in fp32 within 1e-4 of the largest value, in bf16 within 5 %."""
    ours, peer = sides
    tolerance = 1e-4 if dtype == "fp32" else 5e-2
    difference = (ours.float() - peer.float()).abs().max().item()
    largest = peer.float().abs().max().item()
    if not difference <= tolerance * largest:
        raise RuntimeError(f"{what}: the two sides differ by {difference:.3g} where values reach {largest:.3g}")


# Encoder


def encoder_row(size: str, pixels: int, dtype: str, pictures: int, settings: Settings) -> list[Line]:
    device = settings.device
    batch = make_batch("vqav2", pictures, pixels, device)
    ours, peer = (model.beit3.eval() for model in make_pair("vqav2", size, pixels, device))

    @torch.no_grad()
    def run_ours() -> tuple[Tensor, Tensor]:
        with autocast(dtype, device):
            return ours(batch.image, batch.text, batch.padding)

    @torch.no_grad()
    def run_peer() -> Tensor:
        with autocast(dtype, device):
            return peer(
                textual_tokens=batch.full_text,
                visual_tokens=batch.image,
                text_padding_position=batch.full_padding,
            )["encoder_out"]

    (image, text), joint = run_ours(), run_peer()
    check_close("picture", [image, joint[:, : image.shape[1]]], dtype)
    real = ~batch.padding.bool()
    check_close("text", [text[real], joint[:, image.shape[1] :][~batch.full_padding.bool()]], dtype)
    our_times, peer_times = interleave([run_ours, run_peer], settings.repeats, device)
    what = f"encoder forward, {size}, {pixels} px, {dtype}, batch {pictures}"
    return [Line(what, "images/s", rates(pictures, our_times), rates(pictures, peer_times))]


# Train step


def train_row(task: str, size: str, pixels: int, dtype: str, pictures: int, settings: Settings) -> list[Line]:
    device = settings.device
    on_gpu = device.type == "cuda"
    ours, peer = make_pair(task, size, pixels, device)
    batch = make_batch(task, pictures, pixels, device)
    sides = ((ours, our_loss), (peer, peer_loss))
    check_gradients(task, ours, peer, batch, dtype)
    steps = [partial(train_step, model, partial(loss, task, model, batch), dtype, device) for model, loss in sides]
    our_times, peer_times = interleave(steps, settings.repeats, device)
    what = f"train step, {TASK_NAMES[task]}, {size}, {pixels} px, {dtype}, batch {pictures}"
    wanted = Reach("≥", 2.3 if on_gpu else 1.25) if on_gpu or dtype == "fp32" else None
    lines = [Line(what, "images/s", rates(pictures, our_times), rates(pictures, peer_times), wanted)]
    if on_gpu:
        what = "– memory at its peak, above the weights"
        our_memory, peer_memory = (memory.peak_allocated(step, device) for step in steps)
    else:
        what = "– memory kept for the backward pass, per picture"
        our_memory, peer_memory = (kept_per_picture(task, model, loss, pixels, dtype, device) for model, loss in sides)
    return [*lines, Line(what, "MB", [our_memory], [peer_memory], Reach("≤", 0.4))]


def check_gradients(task: str, ours: nn.Module, peer: nn.Module, batch: Batch, dtype: str) -> None:
    """Both losses, and the gradients of some parameters near the input and near the output, agree."""
    losses = []
    for model, loss in ((ours, our_loss), (peer, peer_loss)):
        with autocast(dtype, batch.image.device):
            losses.append(loss(task, model, batch))
        losses[-1].backward()
    check_close("loss", losses, dtype)
    for name in ("beit3.vision_embed.proj.weight", "beit3.encoder.layers.0.ffn.B.fc1.weight"):
        check_close(f"gradient of {name}", [model.get_parameter(name).grad for model in (ours, peer)], dtype)
    for model in (ours, peer):
        model.zero_grad(set_to_none=True)


def kept_per_picture(
    task: str, model: nn.Module, loss: Callable[..., Tensor], pixels: int, dtype: str, device: torch.device
) -> float:
    """Megabytes that one more picture keeps: the difference leaves out what does not depend on the batch (copies of
    weights)."""

    def forward(pictures: int) -> Tensor:
        with autocast(dtype, device):
            return loss(task, model, make_batch(task, pictures, pixels, device))

    return memory.kept_for_backward(partial(forward, 2)) - memory.kept_for_backward(partial(forward, 1))


# Captions of one picture together


def captions_together_row(size: str, pixels: int, together: int, settings: Settings) -> list[Line]:
    """`--captions_per_image 5` against 1: the same captions of the same picture, in one pass or each with its own."""
    device = settings.device
    model, _ = make_pair("captioning", size, pixels, device)
    batch = make_batch("captioning", together, pixels, device)
    image = batch.image[:1]

    each_with_its_own = image.expand(together, -1, -1, -1).contiguous()
    losses = [partial(our_caption_loss, model, batch, pictures) for pictures in (image, each_with_its_own)]
    check_close("loss", [loss() for loss in losses], "fp32")
    steps = [partial(train_step, model, loss, "fp32", device) for loss in losses]
    our_times, peer_times = interleave(steps, settings.repeats, device)
    what = f"train step, captioning, {size}, {pixels} px, fp32, {together} captions of a picture together"
    return [Line(what, "captions/s", rates(together, our_times), rates(together, peer_times), Reach("≥", 3))]


# What single ideas bring


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As `beit3.model.encoder.Attention.attend`, with all scores in memory and their softmax in fp32."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.float().softmax(dim=-1).to(v.dtype), v).flatten(2)


def whole_last_layer(model: Any, batch: Batch) -> Tensor:
    features, _ = model.beit3(batch.image, batch.text, batch.padding)
    return model.head(model.pooler(features))


def texts_filled_up(model: nn.Module, batch: Batch) -> Tensor:
    return answer_logits(model, replace(batch, text=batch.full_text, padding=batch.full_padding))


def with_patch(name: str, replacement: Any, model: nn.Module, batch: Batch) -> Tensor:
    """With something of `beit3` replaced."""
    with patch(f"beit3.model.{name}", replacement):
        return answer_logits(model, batch)


# What is left out → logits of VQAv2 without it.
IDEAS: dict[str, Callable[[Any, Batch], Tensor]] = {
    "attention in one kernel, scores never in memory": partial(
        with_patch, "encoder.Attention.attend", staticmethod(plain_attention)
    ),
    "last layer for the class token alone": whole_last_layer,
    "questions as long as the longest of the batch": texts_filled_up,
    "norms recomputed in the backward pass": partial(with_patch, "recompute.recomputes", lambda *_: False),
}


def idea_loss(logits: Callable[[Any, Batch], Tensor], task: str, model: nn.Module, batch: Batch) -> Tensor:
    return soft_answer_loss(logits(model, batch), batch.targets)


def idea_row(idea: str, pixels: int, pictures: int, settings: Settings) -> list[Line]:
    """A train step of VQAv2 with everything; other side: with one idea left out."""
    device = settings.device
    model = HEADS["vqav2"](make_config("vqav2", "base", pixels)).to(device)
    batch = make_batch("vqav2", pictures, pixels, device)

    losses = [partial(idea_loss, logits) for logits in (answer_logits, IDEAS[idea])]
    check_close("loss", [loss("vqav2", model, batch) for loss in losses], "fp32")
    steps = [partial(train_step, model, partial(loss, "vqav2", model, batch), "fp32", device) for loss in losses]
    our_times, other_times = interleave(steps, settings.repeats, device)
    what = f"train step, VQAv2, base, {pixels} px, fp32, batch {pictures}; {idea}; other side: without"
    kept = [kept_per_picture("vqav2", model, loss, pixels, "fp32", device) for loss in losses]
    return [
        Line(what, "images/s", rates(pictures, our_times), rates(pictures, other_times)),
        Line("– memory kept for the backward pass, per picture", "MB", kept[:1], kept[1:]),
    ]


# Caption loss


def loss_row(rows: int, settings: Settings) -> list[Line]:
    """Cross-entropy against the divergence written out, forward and backward; other side: one-hot vectors."""
    device = settings.device
    steps = [loss_step(loss, rows, device) for loss in LOSSES.values()]
    losses, gradients = zip(*(step() for step in steps), strict=True)
    check_close("loss", losses, "fp32")
    check_close("gradient", gradients, "fp32")
    our_times, peer_times = interleave([partial(repeat, step, 5) for step in steps], settings.many_repeats, device)
    what = f"caption loss and its gradient, {rows} × {VOCABULARY}, fp32"
    time = Line(what, "losses/s", rates(5, our_times), rates(5, peer_times), Reach("≥", 10))
    if device.type == "cuda":
        what = "– memory allocated at its peak, above the logits"
        our_memory, peer_memory = (memory.peak_allocated(step, device) for step in steps)
    else:
        what = "– growth of a process at its peak, above the logits"
        our_memory, peer_memory = (memory.in_fresh_process(loss_peak, name, rows) for name in LOSSES)
    return [time, Line(what, "MB", [our_memory], [peer_memory], Reach("≤", 1 / 3))]


LOSSES = {"ours": masked_token_losses, "peer": one_hot_loss}


def loss_step(loss: Callable[..., Tensor], rows: int, device: torch.device) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that gives the losses and the gradient of their mean, the same each time."""
    torch.manual_seed(0)
    logits = torch.randn(rows, VOCABULARY, device=device)
    targets = torch.randint(4, VOCABULARY, (rows,), device=device)
    logits.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        losses = loss(logits, targets, SMOOTHING)
        return losses.detach(), torch.autograd.grad(losses.mean(), logits)[0]

    return step


def loss_peak(name: str, rows: int) -> float:
    """Megabytes by which a process grows for one loss and its gradient."""
    once, step = (loss_step(LOSSES[name], number, torch.device("cpu")) for number in (1, rows))
    once()  # what is set up once
    return memory.peak_growth(step)


def repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


# Generation


def generation_row(size: str, pixels: int, pictures: int, max_tokens: int, settings: Settings) -> list[Line]:
    device = settings.device
    ours, peer = make_generators(size, pixels, device)
    images = reference.images(9, pictures, pixels).to(device)
    search: dict[str, Any] = {"num_beams": 3, "length_penalty": 0.6, "max_tokens": max_tokens}

    def run_ours() -> list[list[int]]:
        return generate(ours, images, mask_id=MASK_ID, **search).best()

    @torch.no_grad()
    def run_peer() -> list[list[int]]:
        decoder = CachedDecoder(peer, images, search["num_beams"], MASK_ID)
        return per_beam_search(decoder, pictures, **search, device=device)

    check_captions(run_ours(), run_peer())
    our_times, peer_times = interleave([run_ours, run_peer], settings.repeats, device)
    what = f"generation, 3 beams, {size}, {pixels} px, fp32, captions of {max_tokens - 3} tokens, batch {pictures}"
    wanted = Reach("≥", 8 if device.type == "cuda" else 4)
    return [Line(what, "captions/s", rates(pictures, our_times), rates(pictures, peer_times), wanted)]


def make_generators(size: str, pixels: int, device: torch.device) -> tuple[Any, Any]:
    """A pair whose captions differ from picture to picture and are as long as they may be."""
    ours, peer = make_pair("captioning", size, pixels, device)
    reference.fill(ours)
    with torch.no_grad():
        ours.mlm_head.bias[EOS_ID] = -50.0
    peer.load_state_dict(ours.state_dict())
    return ours.eval(), peer.eval()


def check_captions(ours: list[list[int]], peer: list[list[int]]) -> None:
    if ours != peer:
        differing = sum(one != other for one, other in zip(ours, peer, strict=True))
        raise RuntimeError(f"{differing} of {len(peer)} captions differ between the two sides")


# What is measured


def encoder_rows(settings: Settings) -> list[Row]:
    cases = [(224, "fp32", 4)] if settings.quick else [(224, "fp32", 4), (224, "bf16", 4), (480, "fp32", 2)]
    return [
        Row(f"encoder forward, {pixels} px, {dtype}", partial(encoder_row, "base", pixels, dtype, pictures, settings))
        for pixels, dtype, pictures in cases
    ]


def train_rows(settings: Settings) -> list[Row]:
    sizes = {224: 2} if settings.quick else {224: 8, 480: 2}  # pixels: pictures
    return [
        Row(
            f"train step, {TASK_NAMES[task]}, {pixels} px, {dtype}",
            partial(train_row, task, "base", pixels, dtype, pictures, settings),
        )
        for pixels, pictures in sizes.items()
        for task in TASK_NAMES
        for dtype in (("fp32",) if settings.quick else DTYPES)
    ]


def idea_rows(settings: Settings) -> list[Row]:
    pixels, pictures = (224, 2) if settings.quick else (480, 2)
    return [Row(idea, partial(idea_row, idea, pixels, pictures, settings)) for idea in IDEAS]


def captions_together_rows(settings: Settings) -> list[Row]:
    pixels = 224 if settings.quick else 480
    return [Row("captions of a picture together", partial(captions_together_row, "base", pixels, 5, settings))]


def loss_rows(settings: Settings) -> list[Row]:
    return [Row("caption loss", partial(loss_row, 48, settings))]


def generation_rows(settings: Settings) -> list[Row]:
    sizes = {224: 2} if settings.quick else {224: 4, 480: 4}  # pixels: pictures
    return [
        Row(f"generation, {pixels} px", partial(generation_row, "base", pixels, pictures, 16, settings))
        for pixels, pictures in sizes.items()
    ]
