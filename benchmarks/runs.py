"""Rows of whole runs: from the command to the first step, and evaluation from files to answers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import utils
from beit3.data.tokenizer import Tokenizer
from benchmarks.first_step import DONE
from benchmarks.models import FULL_LENGTH, make_pair
from benchmarks.peers import pillow_evaluation
from benchmarks.questions import TOKENIZER, indexed_tree
from benchmarks.table import Line, Row, Settings, interleave, rates, seconds
from datasets import EvaluationSampler, build_loader
from engine_for_finetuning import evaluate
from tasks.settings import DataSettings
from tasks.vqav2.dataset import QuestionDataset
from tasks.vqav2.settings import VQAv2Settings
from tasks.vqav2.task import VQAv2
from tests import reference

ROOT = Path(__file__).parent.parent
EVALUATION_PIXELS = 224


def first_step_row(scale: float, pixels: int, settings: Settings) -> list[Line]:
    """Imports, index, a look at every picture, a fresh base model, one step: what a user waits for."""
    tree = indexed_tree(settings.folder, scale)
    command = [sys.executable, "-m", "benchmarks.first_step", *first_step_flags(tree, pixels)]
    times = [seconds(partial(run_to_first_step, command)) for _ in range(settings.repeats)]
    questions = len(open_dataset(tree, "train", pixels))
    what = f"command to first step, VQAv2, base, {pixels} px, batch 1, {questions} training questions"
    return [Line(what, "s", times)]


def first_step_flags(tree: Path, pixels: int) -> list[str]:
    return [
        *("--task", "vqav2", "--data_path", str(tree), "--sentencepiece_model", str(tree / TOKENIZER)),
        *("--model", f"beit3_base_patch16_{pixels}", "--input_size", str(pixels)),
        *("--batch_size", "1", "--num_workers", "1"),
    ]


def run_to_first_step(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode or DONE not in done.stdout:
        raise RuntimeError(f"the run ended with status {done.returncode}: {done.stderr.strip()[-300:]}")


def open_task(tree: Path, pixels: int) -> VQAv2:
    data = DataSettings(tree, input_size=pixels, num_max_bpe_tokens=FULL_LENGTH["vqav2"])
    return VQAv2(VQAv2Settings(), data, Tokenizer(tree / TOKENIZER))


def open_dataset(tree: Path, split: str, pixels: int) -> QuestionDataset:
    return open_task(tree, pixels).dataset(split, training=False)


def evaluation_row(scale: float, batch: int, settings: Settings) -> list[Line]:
    """Validation of VQAv2 with a base model, loading included, in one process."""
    device, pixels = settings.device, EVALUATION_PIXELS
    tree = indexed_tree(settings.folder, scale)
    task = open_task(tree, pixels)
    dataset = task.dataset("val", training=False)
    ours, peer = make_pair("vqav2", "base", pixels, device)
    reference.fill(ours)
    peer.load_state_dict(ours.state_dict())
    sides: list[Callable[[], list[str]]] = [
        partial(our_answers, task, dataset, ours, batch, device),
        partial(peer_answers, task, dataset, peer.eval(), batch, device),
    ]
    check_answers(*(side() for side in sides))
    our_times, peer_times = interleave(sides, settings.repeats, device)
    what = f"evaluation, VQAv2, base, {pixels} px, fp32, batch {batch}, loading included"
    return [Line(what, "images/s", rates(len(dataset), our_times), rates(len(dataset), peer_times))]


def our_answers(task: VQAv2, dataset: QuestionDataset, model: nn.Module, batch: int, device: torch.device) -> list[str]:
    loader = build_loader(dataset, EvaluationSampler(len(dataset), batch, 0, 1), num_workers=0, pin_memory=False)
    columns, _ = evaluate(task, model, loader, utils.Process(0, 1, 0, device), autocast=nullcontext)
    assert columns is not None  # the only process is the first one
    return [entry["answer"] for entry in task.submission(columns, dataset, "val")]


@torch.no_grad()
def peer_answers(
    task: VQAv2, dataset: QuestionDataset, model: nn.Module, batch: int, device: torch.device
) -> list[str]:
    """Pillow and floats for the pictures, texts filled up, an answer read from the device after each batch."""
    answers = []
    for start in range(0, len(dataset), batch):
        rows = range(start, min(start + batch, len(dataset)))
        paths = [str(dataset.table["image_path"][row]) for row in rows]
        image = torch.stack([pillow_evaluation(str(task.data.data_path / path), EVALUATION_PIXELS) for path in paths])
        text, padding = filled_up([dataset.token_ids(row) for row in rows], FULL_LENGTH["vqav2"])
        logits = model(image.to(device), text.to(device), padding.to(device))
        answers += [task.answers[label] for label in logits[:, : len(task.answers)].argmax(dim=1).tolist()]
    return answers


def filled_up(texts: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Texts (B, length) filled up with padding, and the padding mask, 1 = padding."""
    ids, padding = torch.ones(len(texts), length, dtype=torch.int64), torch.ones(len(texts), length, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)], padding[row, : len(text)] = text, 0
    return ids, padding


def check_answers(ours: list[Any], peer: list[Any]) -> None:
    """Raises RuntimeError when more than one answer in 20 differs: pictures differ by a grey level here and there."""
    differing = sum(one != other for one, other in zip(ours, peer, strict=True))
    if differing > len(ours) / 20:
        raise RuntimeError(f"{differing} of {len(ours)} answers differ between the two sides")


def first_step_rows(settings: Settings) -> list[Row]:
    scale, pixels = (0.02, 384) if settings.quick else (1.0, 480)
    return [Row("command to first step", partial(first_step_row, scale, pixels, settings))]


def evaluation_rows(settings: Settings) -> list[Row]:
    scale = 0.00005 if settings.quick else 0.0002
    return [Row("evaluation", partial(evaluation_row, scale, 8, settings))]
