"""Weights in and out: reading checkpoints of any origin safely, and loading them with every key accounted for."""

from __future__ import annotations

import argparse
import json
import logging
import math
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from beit3.system.atomic_files import atomic_write, sha256_of
from beit3.system.errors import InputError

logger = logging.getLogger(__name__)

POSITION_TABLE = "beit3.encoder.embed_positions.A.weight"
# Rows of the image position table that belong to no patch: two unused ones and the class token.
LEADING_ROWS = 3
MODEL_FILE = "model.safetensors"
_UNSEALED = "0" * 64  # as long as a SHA-256 in hexadecimal
DEEPSPEED_FILE = "mp_rank_00_model_states.pt"


@dataclass(frozen=True)
class Checkpoint:
    """Weights as read from a file.

    Attributes:
        state_dict: {name: tensor on the CPU}.
        description: what the model is and what its head means (see `tasks`); empty for files made elsewhere.
        path: where the weights came from.
    """

    state_dict: dict[str, Tensor]
    description: dict[str, Any]
    path: Path


@dataclass
class LoadReport:
    """What became of every key, as lists of names."""

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded"]
        for what, names in (("resized", self.resized), ("new", self.new), ("unused", self.unused)):
            if names:
                shown = ", ".join(names[:6]) + (f", … ({len(names)} in all)" if len(names) > 6 else "")
                lines.append(f"{what}: {shown}")
        return "; ".join(lines)


def load_untrusted(path: Path) -> Any:
    """`torch.load` on the CPU of tensors and plain values; code hidden in the file is refused and never runs.

    Raises:
        InputError: not a checkpoint, damaged, or holds anything but tensors and plain values.
    """
    try:
        # Namespace is a bare holder of attributes; checkpoints of the original keep their arguments in one.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error)
        if "GLOBAL" in reason or "Unsupported" in reason:
            unsafe = [line.strip() for line in reason.splitlines() if "GLOBAL" in line or "Unsupported" in line]
            raise InputError(
                [f"{path}: refused, it holds more than tensors and plain values ({unsafe[0][:200]})"]
            ) from error
        raise InputError([f"{path}: not a readable checkpoint ({reason.splitlines()[0][:200]})"]) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise InputError([f"{path}: not a readable checkpoint ({str(error).splitlines()[0][:200]})"]) from error


def check_file(file: Path) -> None:
    """Read a file of weights whole and compare its checksums, where it has any.

    A `.pth` in torch's zip container has a CRC-32 of every part, a `.safetensors` of this toolkit the SHA-256 of its
    tensors. torch and safetensors look at neither: a flipped bit would be a changed weight that nobody sees.

    Raises:
        InputError: truncated or altered.
    """
    try:
        if file.suffix == ".safetensors":
            _check_safetensors(file)
        elif zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as container:
                part = container.testzip()
            if part is not None:
                raise InputError(f"{file}: damaged, {part} in it was altered since it was written")
        elif _starts_as_zip(file):
            raise InputError(f"{file}: damaged, its end is missing")
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: damaged ({error})") from error


def _starts_as_zip(file: Path) -> bool:
    with open(file, "rb") as content:
        return content.read(2) == b"PK"


def _check_safetensors(file: Path) -> None:
    """Layout: 8 bytes with the length of the JSON header, the header, the tensors (safetensors' format description)."""
    with open(file, "rb") as content:
        length = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(min(length, 1 << 28)).decode("utf-8"))
        wanted = header.get("__metadata__", {}).get("sha256")
        if wanted is not None and sha256_of(content) != wanted:
            raise InputError(f"{file}: damaged, its tensors were altered since they were written")


def _seal_safetensors(file: Path) -> None:
    """Put the hash of the tensors where `write_weights` left room for it."""
    with open(file, "r+b") as content:
        header = content.read(int.from_bytes(content.read(8), "little"))
        digest = sha256_of(content)
        content.seek(8 + header.index(_UNSEALED.encode()))
        content.write(digest.encode())


def find_weights(path: Path) -> Path:
    """The file that holds the weights: `path` itself, or inside a folder that a DeepSpeed run left.

    Raises:
        InputError: nothing there.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError([f"{path}: no such checkpoint"])
    for candidate in (path / MODEL_FILE, path / DEEPSPEED_FILE, *sorted(path.glob(f"*/{DEEPSPEED_FILE}"))):
        if candidate.is_file():
            return candidate
    raise InputError([f"{path}: a folder without {MODEL_FILE} or {DEEPSPEED_FILE}; is it a checkpoint?"])


def read_checkpoint(path: str | Path, model_key: str = "model|module", prefix: str = "") -> Checkpoint:
    """Read weights from `.pth`, `.safetensors` or a checkpoint folder.

    Args:
        model_key: where a `.pth` may keep its state dict, tried in this order; a bare state dict is fine too.
        prefix: put before each key.

    Raises:
        InputError: missing, damaged, unsafe, or no state dict inside.
    """
    path = Path(path)
    file = find_weights(path)
    check_file(file)
    if file.suffix == ".safetensors":
        state_dict, description = _read_safetensors(file)
    else:
        content = load_untrusted(file)
        if not isinstance(content, Mapping):
            raise InputError([f"{file}: holds a {type(content).__name__}, wanted a state dict"])
        description = content.get("description") or {}
        state_dict = next((dict(content[key]) for key in model_key.split("|") if key in content), dict(content))
    tensors = {f"{prefix}{name}": value for name, value in state_dict.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError([f"{file}: no weights under {model_key.replace('|', ' or ')} nor at the top"])
    return Checkpoint(tensors, dict(description), path)


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, framework="pt", device="cpu") as content:
            description = json.loads((content.metadata() or {}).get("description", "{}"))
            return {name: content.get_tensor(name) for name in content.keys()}, description  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError([f"{file}: not a readable safetensors file ({error})"]) from error


def write_weights(path: Path, state_dict: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write weights with their description, complete or not at all.

    A path ending in `.pth` becomes one torch file with `model` and `description`; any other path a folder that holds
    one safetensors file, so that replacing it is one rename.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    if path.suffix == ".pth":
        with atomic_write(path, "wb") as file:
            torch.save({"model": tensors, "description": dict(description)}, file)
        return
    path.mkdir(parents=True, exist_ok=True)
    with atomic_write(path / MODEL_FILE, "wb") as file:
        metadata = {"format": "pt", "description": json.dumps(dict(description)), "sha256": _UNSEALED}
        save_file(tensors, file.name, metadata=metadata)
        _seal_safetensors(Path(file.name))


def resize_positions(table: Tensor, rows: int) -> Tensor:
    """Image position table for another resolution: bicubic over the square grid of patches.

    Args:
        table: (3 + h·h, W), two unused rows and the class token first; these are kept.
        rows: wanted, 3 + H·H.

    Returns:
        (rows, W), in the table's dtype.
    """
    leading, grid = table[:LEADING_ROWS], table[LEADING_ROWS:]
    old, new = math.isqrt(grid.shape[0]), math.isqrt(rows - LEADING_ROWS)
    if old * old != grid.shape[0] or new * new != rows - LEADING_ROWS:
        raise ValueError(f"position tables of {table.shape[0]} and {rows} rows are not square grids")
    square = grid.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([leading, resized.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)])


def load_weights(model: nn.Module, checkpoint: Checkpoint, *, new_head: bool) -> LoadReport:
    """Load a checkpoint into a model; the image position table is resized when the resolution differs.

    Args:
        new_head: keys outside `beit3.` may be missing and keep their fresh values (fine-tuning).

    Raises:
        InputError: listing every missing key and every shape that does not fit.
    """
    wanted = model.state_dict()
    given = dict(checkpoint.state_dict)
    report = LoadReport(unused=sorted(given.keys() - wanted.keys()))
    table = given.get(POSITION_TABLE)
    if table is not None and POSITION_TABLE in wanted and table.shape != wanted[POSITION_TABLE].shape:
        given[POSITION_TABLE] = resize_positions(table, wanted[POSITION_TABLE].shape[0])
        report.resized.append(f"{POSITION_TABLE} {table.shape[0]} → {wanted[POSITION_TABLE].shape[0]} rows")
    problems = []
    for name, own in wanted.items():
        if name not in given:
            if new_head and not name.startswith("beit3."):
                report.new.append(name)
            else:
                problems.append(f"{checkpoint.path}: {name} is missing")
        elif given[name].shape != own.shape:
            problems.append(
                f"{checkpoint.path}: {name} is {tuple(given[name].shape)}, the model has {tuple(own.shape)}"
            )
        else:
            report.loaded.append(name)
    if problems:
        raise InputError(problems)
    with torch.no_grad():
        for name in report.loaded:
            wanted[name].copy_(given[name])
    return report
