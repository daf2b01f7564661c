"""The loss of captioning: hidden tokens, with a smoothed target, the worst of them left out."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


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
