"""The contrastive loss of retrieval, over the pairs of all processes."""

from __future__ import annotations

import torch
import torch.distributed
import torch.distributed.nn.functional as distributed
import torch.nn.functional as F
from torch import Tensor


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
