"""Weights in and out: reading checkpoints of any origin safely, and loading them with every key accounted for."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from beit3.model.description import MODEL_FILE, TOKENIZER_FILE
from beit3.model.untrusted import (
    SAFETENSORS,
    check_file,
    check_plain,
    check_sizes,
    kind_of,
    load_untrusted,
    read_safetensors,
    refuse,
)
from beit3.system.atomic_files import atomic_write, sha256_of
from beit3.system.errors import InputError, printable

logger = logging.getLogger(__name__)

POSITION_TABLE = "beit3.encoder.embed_positions.A.weight"
# Rows of the image position table that belong to no patch: two unused ones and the class token.
LEADING_ROWS = 3
_UNSEALED = "0" * 64  # as long as a SHA-256 in hexadecimal
DEEPSPEED_FILE = "mp_rank_00_model_states.pt"
HUGGING_FACE_FILE = "pytorch_model.bin"
MODEL_KEY = "model|module"  # where a `.pth` keeps its state dict unless the user says otherwise
MAX_TOKENIZER = 1 << 26  # bytes; beit3.spm has 1.4 million
# A float of 8 bits means something only together with a scale that stands elsewhere.
USABLE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Checkpoint:
    """Weights as read from a file.

    Attributes:
        state_dict: {name: tensor on the CPU}.
        description: what the model is and what its head means (see `tasks`); empty for files made elsewhere.
        path: the file that the weights came from.
        prefix: what stood before the model's own names in the file and was taken off, such as "module.".
        tokenizer: content of the tokenizer's file, where a `.pth` holds one.
    """

    state_dict: dict[str, Tensor]
    description: dict[str, Any]
    path: Path
    prefix: str = ""
    tokenizer: bytes | None = None


@dataclass(frozen=True)
class HeadRows:
    """Which rows of a checkpoint's head go where, for a head whose rows mean something else now.

    Attributes:
        parameters: names of the tensors that have these rows.
        sources: for each row of the model the row of the checkpoint, -1 for one that starts afresh.
        told: what becomes of the rows, for people.
    """

    parameters: tuple[str, ...]
    sources: tuple[int, ...]
    told: str


@dataclass
class LoadReport:
    """What became of every key, as lists of names, the prefix that was taken off them, and the head's rows in words."""

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    prefix: str = ""
    head: str = ""

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded"]
        if self.prefix:
            lines.append(f"{printable(self.prefix)[:80]} taken off their names")
        for what, names in (("resized", self.resized), ("new", self.new), ("unused", self.unused)):
            if names:
                shown = _listed(names)
                lines.append(f"{what}: {shown}")
        if self.head:
            lines.append(f"head: {self.head}")
        return "; ".join(lines)


def _seal_safetensors(file: Path) -> None:
    """Put the hash of the tensors where `write_weights` left room for it."""
    with open(file, "r+b") as content:
        header = content.read(int.from_bytes(content.read(8), "little"))
        digest = sha256_of(content)
        content.seek(8 + header.index(_UNSEALED.encode()))
        content.write(digest.encode())


def find_weights(path: Path) -> Path:
    """The file that holds the weights: `path` itself, or the one in a folder.

    A folder may be a checkpoint (of this toolkit, of DeepSpeed, of Hugging Face), or hold some: then `checkpoint-best`
    is taken, else the one that DeepSpeed's `latest` names, else the only one, and the log says which.

    Raises:
        InputError: nothing there, or several and no reason to take one of them.
    """
    try:
        if path.is_file():
            return path
        if not path.is_dir():
            refuse(path, "neither a file nor a folder" if path.exists() else "no such checkpoint")
        own = _file_in(path)
        if own is not None:
            return own
        names = sorted(entry.name for entry in path.iterdir())
        inside = _best_in(path, names)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte in it
        if isinstance(error, InputError):
            raise
        refuse(path, f"no checkpoint that can be read ({getattr(error, 'strerror', None) or error})")
    if inside is None:
        refuse(path, _nothing_in(names))
    logger.info("%s: a folder with checkpoints; the weights are those of %s", path, inside.relative_to(path))
    return inside


def _file_in(folder: Path) -> Path | None:
    candidates = (folder / name for name in (MODEL_FILE, DEEPSPEED_FILE, HUGGING_FACE_FILE))
    return next((file for file in candidates if file.is_file()), None)


def _best_in(folder: Path, names: list[str]) -> Path | None:
    """The weights to take from a folder that holds checkpoints, None where nothing tells which."""
    wanted = ["checkpoint-best"]
    latest = folder / "latest"  # one line with the name of the folder that DeepSpeed wrote last
    if latest.is_file() and latest.stat().st_size < 1000:
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
        wanted += [tag] if tag in names else []
    for name in wanted:
        if (found := _file_in(folder / name)) is not None:
            return found
    if (folder / "checkpoint-best.pth").is_file():
        return folder / "checkpoint-best.pth"
    single = [file for name in names if (file := _file_in(folder / name)) is not None]
    single += [folder / name for name in names if re.fullmatch(r"checkpoint-.*\.pth", name)]
    return single[0] if len(single) == 1 else None


def _nothing_in(names: list[str]) -> str:
    """Why a folder with these names in it gives no weights."""
    shown = f"it holds {_listed(names)}" if names else "it is empty"
    if any(name.startswith("checkpoint-") for name in names):
        return f"a folder without checkpoint-best; name one of what is there: {shown}"
    if any(name.endswith(".index.json") for name in names):
        return "its weights are split into several files, which this toolkit does not join"
    if any(name.startswith("zero_pp_rank_0_") for name in names):
        return "its weights are split among processes; join them with DeepSpeed's zero_to_fp32.py"
    if {"data.pkl", "data"} <= set(names):
        return "a .pth that was unpacked; zip the folder again with `zip -0 -r`"
    return f"a folder without {MODEL_FILE}, {DEEPSPEED_FILE} or {HUGGING_FACE_FILE}; is it a checkpoint? {shown}"


def read_checkpoint(path: str | Path, model_key: str = MODEL_KEY, prefix: str = "") -> Checkpoint:
    """Read weights from `.pth`, `.safetensors` or a checkpoint folder.

    Args:
        model_key: where a `.pth` may keep its state dict, tried in this order; a bare state dict is fine too.
        prefix: put before each key.

    Raises:
        InputError: missing, damaged, unsafe, or no state dict inside.
    """
    file = find_weights(Path(path))
    check_file(file)
    state_dict: Mapping[Any, Any]
    tokenizer = None
    if kind_of(file) == SAFETENSORS:
        state_dict, metadata = read_safetensors(file)
        description = _parsed(metadata.get("description", "{}"), file)
    else:
        content = load_untrusted(file)
        if not isinstance(content, Mapping):
            refuse(file, f"holds a {type(content).__name__}, wanted a state dict")
        description = {} if content.get("description") is None else content["description"]
        state_dict, tokenizer = _state_dict_in(content, model_key, file), _tokenizer_in(content, file)
    check_plain(description, file, "description")
    tensors = {
        f"{prefix}{name}": value
        for name, value in state_dict.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        refuse(file, "holds no tensor")
    check_sizes(tensors, file)
    foreign = "" if prefix else _prefix_of(tensors, file)
    return Checkpoint(_without_prefix(tensors, foreign, file), dict(description), file, foreign, tokenizer)


def _parsed(text: str, file: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError([f"{printable(str(file))}: its description is no JSON that can be read"]) from error


def _state_dict_in(content: Mapping[Any, Any], model_key: str, file: Path) -> Mapping[Any, Any]:
    """The state dict under the first of the keys that is there, or the content itself.

    Raises:
        InputError: no tensor there; lists the keys that are there.
    """
    key = next((key for key in model_key.split("|") if key in content), None)
    found = content if key is None else content[key]
    if not isinstance(found, Mapping):
        refuse(file, f"holds a {type(found).__name__} under {printable(str(key))}, wanted a state dict")
    asked = printable(model_key).replace("|", " or ")[:80]
    names = _listed([name if isinstance(name, str) else f"a {type(name).__name__}" for name in found], 8)
    holds_weights = _has_tensor(found)
    if key is None and holds_weights and model_key != MODEL_KEY:
        refuse(file, f"has no {asked}, which --model_key asks for; its keys are {names}")
    if key is None and not holds_weights:
        hint = next(
            (name for name, value in content.items() if isinstance(value, Mapping) and _has_tensor(value)), None
        )
        advice = f"; try --model_key {printable(str(hint))[:40]}" if hint is not None else ""
        refuse(file, f"no weights under {asked} nor at the top; its keys are {names or 'none'}{advice}")
    if not holds_weights:
        refuse(file, f"no weights under {printable(str(key))}; its keys are {names or 'none'}")
    return found


def _has_tensor(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())


def _prefix_of(names: Iterable[str], file: Path) -> str:
    """What stands before `beit3.` in all names that have it, such as "module." or "_orig_mod.module."; "" for none.

    Raises:
        InputError: several, so several models.
    """
    names = list(names)
    if any(name.startswith("beit3.") for name in names):
        return ""
    found = sorted({name.split(".beit3.")[0] + "." for name in names if ".beit3." in name})
    if len(found) > 1:
        refuse(file, f"holds {len(found)} models, under {_listed(found, 4)}; save one of them alone")
    return found[0] if found else ""


def _without_prefix(tensors: dict[str, Tensor], prefix: str, file: Path) -> dict[str, Tensor]:
    """Names that do not have the prefix, such as a counter beside the model, stay as they are."""
    renamed = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        refuse(file, f"holds some names with {printable(prefix)[:60]} before them and without; which ones count?")
    return renamed


def _listed(names: Sequence[str], most: int = 6, width: int = 60) -> str:
    """The first names of a file or folder, printable and cut, and how many there are."""
    shown = ", ".join(printable(name)[:width] for name in names[:most])
    return shown + (f", … ({len(names)} in all)" if len(names) > most else "")


def write_weights(
    path: Path, state_dict: Mapping[str, Tensor], description: Mapping[str, Any], tokenizer: bytes | None = None
) -> None:
    """Write weights with their description and the tokenizer's file, complete or not at all.

    A path ending in `.pth` becomes one torch file with `model`, `description` and `tokenizer`; any other path a folder
    with a safetensors file, which is what tells that the folder is a checkpoint, and beside it the tokenizer.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    if path.suffix == ".pth":
        with atomic_write(path, "wb") as file:
            held = {} if tokenizer is None else {"tokenizer": as_tensor(tokenizer)}
            torch.save({"model": tensors, "description": dict(description), **held}, file)
        return
    path.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        with atomic_write(path / TOKENIZER_FILE, "wb") as file:
            file.write(tokenizer)
    with atomic_write(path / MODEL_FILE, "wb") as file:
        metadata = {"format": "pt", "description": json.dumps(dict(description)), "sha256": _UNSEALED}
        save_file(tensors, file.name, metadata=metadata)
        _seal_safetensors(Path(file.name))


def as_tensor(content: bytes) -> Tensor:
    """A file's content as uint8 (N,), the way in which a torch file can hold it that is read without running code."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _tokenizer_in(content: Mapping[Any, Any], file: Path) -> bytes | None:
    """The tokenizer that `write_weights` put into a `.pth` file."""
    held = content.get("tokenizer")
    if held is None:
        return None
    if not isinstance(held, Tensor) or held.dtype != torch.uint8 or held.ndim != 1 or held.numel() > MAX_TOKENIZER:
        refuse(file, "holds a tokenizer that is not one of this toolkit")
    return held.numpy().tobytes()


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


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    new_head: bool,
    head_rows: HeadRows | None = None,
    assign: bool = False,
) -> LoadReport:
    """Load a checkpoint into a model; the image position table is resized when the resolution differs.

    Args:
        new_head: keys outside `beit3.` may be missing and keep their fresh values (fine-tuning).
        head_rows: None: the rows of the head stay where they are.
        assign: the model's tensors become the checkpoint's own, in fp32, instead of taking their values; for a model
            on the device "meta", which has no values. Nothing is copied where they are fp32 already.

    Raises:
        InputError: listing every missing key, every shape that does not fit, and the tensors that are no numbers.
    """
    wanted = model.state_dict()
    given = dict(checkpoint.state_dict)
    path = printable(str(checkpoint.path))
    report = LoadReport(unused=sorted(given.keys() - wanted.keys()), prefix=checkpoint.prefix)
    if wanted.keys().isdisjoint(given):
        raise InputError([f"{path}: {_of_another_model(given, wanted)}"])
    unusable = {name: fault for name in given.keys() & wanted.keys() if (fault := _fault(given[name], wanted[name]))}
    problems = []
    if unusable:
        shown = _listed([f"{name[:60]} ({fault})" for name, fault in sorted(unusable.items())], 3, width=100)
        problems.append(f"{path}: {len(unusable)} tensors cannot be weights: {shown}")
    elif POSITION_TABLE in given and POSITION_TABLE in wanted:
        problems += _fit_positions(given, wanted[POSITION_TABLE], report, path)
    if head_rows is not None and not unusable:
        report.head = head_rows.told
        for name in given.keys() & wanted.keys() & set(head_rows.parameters):
            given[name] = _moved_rows(given[name], wanted[name], head_rows.sources)
    for name, own in wanted.items():
        if name not in given:
            if new_head and not name.startswith("beit3."):
                report.new.append(name)
            else:
                problems.append(f"{path}: {name} is missing")
        elif given[name].shape != own.shape:
            problems.append(f"{path}: {name} is {tuple(given[name].shape)}, the model has {tuple(own.shape)}")
        else:
            report.loaded.append(name)
    if problems and all(".encoder.layer_norm." in problem and problem.endswith("is missing") for problem in problems):
        problems = [
            f"{path}: has no norm behind its last layer, as models for questions and classes have none, and this model "
            "wants it; start from pre-trained weights"
        ]
    if problems:
        raise InputError(problems)
    if assign:
        own = {name: given[name].float() for name in report.loaded}
        model.load_state_dict(own, strict=True, assign=True)
        return report
    with torch.no_grad():
        for name in report.loaded:
            wanted[name].copy_(given[name])
    return report


def _moved_rows(table: Tensor, own: Tensor, sources: Sequence[int]) -> Tensor:
    """The model's own fresh rows, with those of `table` in their new places; `table` itself where it does not fit."""
    if table.dim() == 0 or table.shape[1:] != own.shape[1:] or max(sources, default=-1) >= table.shape[0]:
        return table  # will be told as a shape
    rows = torch.tensor(sources)
    moved = own.clone()
    moved[rows >= 0] = table[rows[rows >= 0]].to(own.dtype)
    return moved


def _of_another_model(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    if any(f"beit3.{name}" in wanted for name in given):
        return "its names lack the beit3. of this model's; add --model_prefix beit3."
    return f"the weights of another model, none of its names is known here: {_listed(sorted(given), 3)}"


def _fault(tensor: Tensor, own: Tensor) -> str | None:
    """Why a tensor of a file cannot stand in for the model's own one, None when it can. Shapes are looked at apart."""
    if tensor.is_quantized:
        return "quantised"
    if tensor.layout != torch.strided or tensor.is_nested:
        return "sparse"
    if tensor.is_meta:
        return "without values"
    kind = str(tensor.dtype).removeprefix("torch.")
    if not own.is_floating_point():
        return None if tensor.dtype == own.dtype else kind
    if tensor.dtype not in USABLE_DTYPES:
        return kind
    if tensor.shape != own.shape and own.dim() != tensor.dim():
        return None  # told as a shape; a file decides how large this one is
    # One value that is NaN or infinite makes the sum so, and a sum is read faster than a mask is made. Sums of finite
    # values can be infinite too, so a broken sum is looked into.
    total = tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    if total.isfinite() or tensor.isfinite().all():
        return None
    return "NaN or infinity inside"


def _fit_positions(given: dict[str, Tensor], own: Tensor, report: LoadReport, path: str) -> list[str]:
    """Resize the table of image positions in `given` where it has another number of rows; returns what is wrong."""
    table = given[POSITION_TABLE]
    if table.dim() != 2 or table.shape == own.shape or table.shape[1] != own.shape[1]:
        return []  # fits, or will be told as a shape
    try:
        given[POSITION_TABLE] = resize_positions(table, own.shape[0])
    except (ValueError, RuntimeError):
        return [f"{path}: {POSITION_TABLE} has {table.shape[0]} rows, wanted 3 and a square number of patches"]
    report.resized.append(f"{POSITION_TABLE} {table.shape[0]} → {own.shape[0]} rows")
    return []
