"""Losses of the tasks (SPEC of the released models, fused where that is the same number)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed
import torch.distributed.nn.functional as distributed
import torch.nn.functional as F
from torch import Tensor


def soft_answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy against soft scores, mean over everything, times the number of answers.

    Args:
        logits: (B, answers). targets: (B, answers), float in [0, 1].

    Returns:
        () in fp32.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float()) * targets.shape[1]


def contrastive_loss(vision: Tensor, language: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of matching pairs over the global batch (CLIP, arXiv 2103.00020).

    Args:
        vision, language: (B, W), unit norm; row i of one belongs to row i of the other.
        scale: (), multiplies the cosine.

    Returns:
        () in fp32: the mean over this process's rows.
    """
    all_vision, all_language, first = vision, language, 0
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        all_vision = torch.cat(distributed.all_gather(vision))
        all_language = torch.cat(distributed.all_gather(language))
        first = torch.distributed.get_rank() * vision.shape[0]
    labels = torch.arange(first, first + vision.shape[0], device=vision.device)
    per_image = (scale * vision @ all_language.T).float()
    per_text = (scale * language @ all_vision.T).float()
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def masked_token_losses(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Kullback-Leibler divergence from the smoothed target to the prediction, per masked token.

    The smoothed target has 1-ε on the true token and ε/(V-1) on each other. Cross-entropy with PyTorch's own smoothing
    puts s/V on every token; s = ε·V/(V-1) makes the two the same up to the entropy of the target, a constant.

    Args:
        logits: (n, V); where they want a gradient it is put in their place, so what else they are for comes first.
        targets: (n,) token ids. smoothing: ε in [0, 1).

    Returns:
        (n,) in fp32.
    """
    vocab = logits.shape[1]
    entropy = 0.0
    if smoothing > 0:
        entropy = (1 - smoothing) * math.log(1 - smoothing) + smoothing * math.log(smoothing / (vocab - 1))
    smoothing = smoothing * vocab / (vocab - 1)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _SmoothedCrossEntropy.apply(logits, targets, smoothing) + entropy
    return F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=smoothing) + entropy


class _SmoothedCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=s), without any other (n, V).

    The gradient is made in the forward pass, where the probabilities are at hand, and in the logits' own memory. The
    backward pass scales it there, so there can be one only. PyTorch says so if a second is tried, or if another
    function's backward pass would read the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        vocab = logits.shape[1]
        losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
        gradient = logits.detach()  # shares memory, and the counter by which autograd sees that it was written to
        for rows in _few_rows(logits):
            x, true = gradient[rows].float(), targets[rows, None]
            x_true, x_max, x_sum = x.gather(1, true).squeeze(1), x.amax(dim=1), x.sum(dim=1)
            p = torch.softmax(x, dim=1, out=x)
            log_sum = x_max - p.amax(dim=1).log()  # the largest probability is never too small for this
            losses[rows] = (smoothing - 1) * (x_true - log_sum) - smoothing / vocab * (x_sum - vocab * log_sum)
            p.sub_(smoothing / vocab).scatter_add_(1, true, p.new_full(true.shape, smoothing - 1))
            if logits.dtype != torch.float32:
                gradient[rows] = p
        ctx.save_for_backward(gradient)  # softmax minus the smoothed target
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad[:, None]), None, None


def _few_rows(values: Tensor) -> list[slice]:
    """Slices of the rows of (n, V), such that fp32 copies of half-precision values stay small."""
    step = max(1, (1 << 26 if values.is_cuda else 1 << 22) // values.shape[1])
    return [slice(start, start + step) for start in range(0, values.shape[0], step)]


def drop_worst(losses: Tensor, ratio: float) -> Tensor:
    """Mean of the int(n·(1-ratio)) smallest losses: (n,) → ()."""
    if ratio <= 0:
        return losses.mean()
    keep = int(losses.shape[0] * (1 - ratio))
    return losses.topk(keep, largest=False, sorted=False).values.mean() if keep else losses.sum() * 0.0
