"""Losses of the tasks: the numbers that the released models were trained with."""

from __future__ import annotations

import math

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
        logits: (n, V), in any floating dtype.
        targets: (n,) token ids. smoothing: ε in [0, 1).

    Returns:
        (n,) in fp32.
    """
    vocab = logits.shape[1]
    entropy = 0.0
    if smoothing > 0:
        entropy = (1 - smoothing) * math.log(1 - smoothing) + smoothing * math.log(smoothing / (vocab - 1))
    smoothing = smoothing * vocab / (vocab - 1)
    return F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=smoothing) + entropy


def drop_worst(losses: Tensor, ratio: float) -> Tensor:
    """Mean of the int(n·(1-ratio)) smallest losses: (n,) → ()."""
    if ratio <= 0:
        return losses.mean()
    keep = int(losses.shape[0] * (1 - ratio))
    return losses.topk(keep, largest=False, sorted=False).values.mean() if keep else losses.sum() * 0.0
