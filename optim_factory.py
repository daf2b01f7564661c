"""Layer ids, parameter groups, optimizer and learning-rate schedule, as the released models were fine-tuned with."""

from __future__ import annotations

import math
import re
from typing import Any

import torch

_LAYER = re.compile(r"^beit3\.encoder\.layers\.(\d+)\.")


def layer_id(name: str, num_layers: int) -> int:
    """Depth of a parameter for layer-wise decay: 0 for embeddings, i+1 for encoder layer i, num_layers+1 beyond."""
    if "embed" in name:
        return 0
    match = _LAYER.match(name)
    return int(match.group(1)) + 1 if match else num_layers + 1


def lr_scale(name: str, num_layers: int, layer_decay: float, task_head_lr_weight: float) -> float:
    """Factor on the schedule's learning rate; `task_head_lr_weight` counts only without layer-wise decay."""
    if layer_decay < 1.0:
        return layer_decay ** (num_layers + 1 - layer_id(name, num_layers))
    if task_head_lr_weight > 1 and name.startswith("head"):
        return task_head_lr_weight
    return 1.0


def parameter_groups(
    model: Any, weight_decay: float, layer_decay: float = 1.0, task_head_lr_weight: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer, one per (weight decay, lr_scale), in order of first appearance.

    Args:
        model: a module with `num_layers` and `no_weight_decay()`.
        weight_decay: of parameters of two and more dimensions; 1-D ones, biases and `no_weight_decay()` get 0.

    Returns:
        Dicts of params, names, weight_decay and lr_scale.
    """
    spared = model.no_weight_decay()
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or name.endswith(".bias") or name in spared
        decay = 0.0 if plain else weight_decay
        scale = lr_scale(name, model.num_layers, layer_decay, task_head_lr_weight)
        group = groups.setdefault((decay, scale), {"params": [], "names": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def create_optimizer(
    groups: list[dict[str, Any]],
    name: str = "adamw",
    *,
    lr: float,
    eps: float = 1e-8,
    betas: tuple[float, float] = (0.9, 0.999),
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """AdamW as one fused kernel, or any other optimizer by its timm name.

    Raises:
        ValueError: the name is unknown.
    """
    groups = [{k: v for k, v in group.items() if k != "names"} for group in groups]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, eps=eps, betas=betas, weight_decay=0.0, fused=True)
    from timm.optim import create_optimizer_v2, list_optimizers

    known = [str(each) for each in list_optimizers()]
    if name not in known:
        raise ValueError(f"--opt {name} is not known; one of: {', '.join(known)}")
    adaptive: dict[str, Any] = {"eps": eps, "betas": betas} if "adam" in name else {}
    return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=0.0, momentum=momentum, **adaptive)


def cosine_schedule(
    lr: float, min_lr: float, *, epochs: int, steps_per_epoch: int, warmup_epochs: float = 0, warmup_steps: int = -1
) -> list[float]:
    """Learning rate of each optimizer step: linear from 0 to `lr`, both included, then half a cosine to `min_lr`.

    Args:
        warmup_steps: overrides `warmup_epochs` when above 0. A warm-up longer than the training is cut at its end.

    Returns:
        epochs × steps_per_epoch values.
    """
    total = epochs * steps_per_epoch
    warmup = min(warmup_steps if warmup_steps > 0 else int(warmup_epochs * steps_per_epoch), total)
    rising = [lr * step / (warmup - 1) if warmup > 1 else 0.0 for step in range(warmup)]
    rest = total - warmup
    falling = [min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * step / rest)) for step in range(rest)]
    return rising + falling


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Give every group its `lr_scale` times `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
