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
        logits: (n, V). targets: (n,) token ids. smoothing: ε in [0, 1).

    Returns:
        (n,) in fp32.
    """
    vocab = logits.shape[1]
    entropy = 0.0
    if smoothing > 0:
        entropy = (1 - smoothing) * math.log(1 - smoothing) + smoothing * math.log(smoothing / (vocab - 1))
    return _SmoothedCrossEntropy.apply(logits, targets, smoothing * vocab / (vocab - 1)) + entropy


class _SmoothedCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=s), in less memory.

    Of the (n, V) values only the probabilities outlive the forward pass; cross_entropy needs three more like them. A
    few rows at a time are taken, so that what is made of them stays in the cache.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
        probabilities = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for rows in _few_rows(logits):
            log_p = torch.log_softmax(logits[rows].float(), dim=1)
            true = log_p.gather(1, targets[rows, None]).squeeze(1)
            losses[rows] = -(1 - smoothing) * true - smoothing / logits.shape[1] * log_p.sum(dim=1)
            if probabilities is not None:
                probabilities[rows] = log_p.exp_()
        ctx.smoothing = smoothing
        if probabilities is not None:
            ctx.save_for_backward(probabilities, targets)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        probabilities, targets = ctx.saved_tensors
        result = torch.empty_like(probabilities)
        grad = grad[:, None].to(result.dtype)
        for rows in _few_rows(result):
            part = torch.sub(probabilities[rows], ctx.smoothing / result.shape[1], out=result[rows])
            part.scatter_add_(1, targets[rows, None], part.new_full((part.shape[0], 1), ctx.smoothing - 1))
            part.mul_(grad[rows])  # (softmax minus the smoothed target) times what comes from above
        return result, None, None


def _few_rows(values: Tensor) -> list[slice]:
    """Slices of the rows of (n, V): as many as fill a cache of the CPU, or keep a GPU busy."""
    step = max(1, (1 << 26 if values.is_cuda else 1 << 18) // values.shape[1])
    return [slice(start, start + step) for start in range(0, values.shape[0], step)]


def drop_worst(losses: Tensor, ratio: float) -> Tensor:
    """Mean of the int(n·(1-ratio)) smallest losses: (n,) → ()."""
    if ratio <= 0:
        return losses.mean()
    keep = int(losses.shape[0] * (1 - ratio))
    return losses.topk(keep, largest=False, sorted=False).values.mean() if keep else losses.sum() * 0.0
