"""Rows of asking a model: from the command to an answer, a folder of pictures, memory at many rows."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import utils
from beit3.data.tokenizer import Tokenizer
from beit3.model.weights import write_weights
from benchmarks.pictures import make_pictures
from benchmarks.questions import TOKENIZER, make_tree
from benchmarks.table import Line, Reach, Row, Settings, interleave, rates
from datasets import EvaluationSampler, build_loader
from engine_for_finetuning import evaluate
from inference.many import tell_many
from inference.opening import open_checkpoint
from inference.predictor import Predictor
from inference.rows import find_rows
from modeling_finetune import create_model
from tasks.settings import DataSettings
from tasks.vqav2.settings import VQAv2Settings
from tasks.vqav2.task import VQAv2

ROOT = Path(__file__).parent.parent
SCALE = 0.001  # of VQAv2: for its tokenizer
ANSWERS, BATCH = 3129, 16
TINY, TINY_PIXELS = "beit3_tiny_patch16_64_vqav2", 64
QUESTION = "what color is the"
COLD, MEMORY, THROUGHPUT, GROWTH, ONNX_FP32, ONNX_INT8 = 1.3, 1.2, 0.95, 1.1, 0.95, 1.8
# What cannot be done without: PyTorch, the weights, one pass.
FLOOR = """
import sys, torch
from safetensors.torch import load_file
from modeling_finetune import load_model
from beit3.model.weights import Checkpoint
name, file, pixels, answers = sys.argv[1:]
model, _ = load_model(name, Checkpoint(load_file(file), {}, file), num_classes=int(answers))
with torch.no_grad():
    model(torch.zeros(1, 3, int(pixels), int(pixels)), torch.full((1, 8), 5))
"""


# A process begins with the peak of memory of the one that starts it, so a small one does.
MEASURED = """
import os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
print(time.perf_counter() - started, usage.ru_maxrss * 1024)
sys.exit(process.returncode)
"""


@dataclass(frozen=True)
class Ended:
    """Seconds and the most memory, in bytes, that a process took."""

    seconds: float
    memory: int


def run(command: list[str]) -> Ended:
    """Run a command to its end. Raises RuntimeError where it fails."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[:4]} ended with status {done.returncode}: {done.stderr.strip()[-300:]}")
    seconds, memory = done.stdout.split()
    return Ended(float(seconds), int(memory))


def make_checkpoint(folder: Path, model: str, pixels: int) -> Path:
    """Fresh weights that say all about themselves."""
    path = folder / model
    if path.exists():
        return path
    tokenizer = Tokenizer(make_tree(folder, SCALE) / TOKENIZER)
    said = {
        "format": 2, "model": model, "task": "vqav2", "image_size": pixels, "vocab_size": 64010,
        "num_max_bpe_tokens": 64, "tokenizer_sha256": tokenizer.sha256,
        "answers": [f"answer {number}" for number in range(ANSWERS)],
    }  # fmt: skip
    weights = create_model(model, vocab_size=64010, num_classes=ANSWERS).state_dict()
    write_weights(path, weights, said, tokenizer.content)
    return path


def ask(checkpoint: Path, *argv: str) -> list[str]:
    return [sys.executable, "-m", "inference", *argv, "--checkpoint", str(checkpoint), "--device", "cpu"]


def cold_start_row(model: str, pixels: int, settings: Settings) -> list[Line]:
    """One picture and one question in a process of their own."""
    checkpoint = make_checkpoint(settings.folder, model, pixels)
    [picture] = make_pictures(settings.folder / "one", 1)
    file = checkpoint / "model.safetensors"
    floor = [sys.executable, "-c", FLOOR, model, str(file), str(pixels), str(ANSWERS)]
    whole = ask(checkpoint, str(picture), QUESTION)
    for command in (floor, whole):  # the file system's memory is warm afterwards
        run(command)
    rounds = [(run(whole), run(floor)) for _ in range(settings.many_repeats)]
    ours, peer = zip(*rounds, strict=True)
    what = f"command to an answer, {model.removesuffix('_vqav2')}, CPU; other side: import torch, weights, one pass"
    return [
        Line(what, "s", [each.seconds for each in ours], [each.seconds for each in peer], Reach("≤", COLD)),
        Line(
            "– peak of memory, by that of the other side", "GB", [each.memory / 1e9 for each in ours],
            [each.memory / 1e9 for each in peer], Reach("≤", MEMORY),
        ),
    ]  # fmt: skip


def write_table(path: Path, pictures: list[str], rows: int) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "question"))
        writer.writerows((pictures[row % len(pictures)], QUESTION) for row in range(rows))
    return path


def growth_row(many: int, settings: Settings) -> list[Line]:
    """The peak of memory at many rows, by that at a thousand."""
    checkpoint = make_checkpoint(settings.folder, TINY, TINY_PIXELS)
    pictures = make_pictures(settings.folder / "few", 8)
    peaks, seconds = [], []
    for rows in (many, 1000):
        table = write_table(settings.folder / f"rows_{rows}.csv", pictures, rows)
        command = ask(checkpoint, str(table), "--output", str(table.with_suffix(".jsonl")), "--overwrite")
        ended = run([*command, "--batch_size", "64"])
        peaks.append(ended.memory / 1e9)
        seconds.append(ended.seconds)
    what = f"peak of memory, {many} rows of a table, tiny model; other side: 1000 rows"
    return [
        Line(what, "GB", peaks[:1], peaks[1:], Reach("≤", GROWTH)),
        Line("– rows", "rows/s", [many / seconds[0]]),
    ]


def throughput_row(count: int, settings: Settings) -> list[Line]:
    """A folder of pictures, beside evaluation of the same ones: a tiny model, so that all but the model is seen."""
    checkpoint = make_checkpoint(settings.folder, TINY, TINY_PIXELS)
    pictures = make_pictures(settings.folder / "folder", count)
    opened = open_checkpoint(checkpoint)
    predictor = Predictor(opened, device="cpu")
    assert opened.tokenizer is not None
    ids = opened.tokenizer.encode(QUESTION)
    lines = [{"image_path": each, "text_segment": ids, "labels": [0], "scores": [1.0], "qid": n}
             for n, each in enumerate(os.path.basename(path) for path in pictures)]  # fmt: skip
    folder = settings.folder / "folder"
    (folder / "vqa.rest_val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataSettings(folder, input_size=TINY_PIXELS)
    task = VQAv2(VQAv2Settings(), data, opened.tokenizer)
    task.adopt(opened.description)
    dataset, process = task.dataset("val", training=False), utils.Process(0, 1, 0, settings.device)
    output = settings.folder / "answers.jsonl"

    def by_evaluation() -> None:
        sampler = EvaluationSampler(count, BATCH, 0, 1)
        loader = build_loader(dataset, sampler, num_workers=1, pin_memory=False)
        evaluate(task, predictor.model, loader, process, autocast=nullcontext)

    def by_asking() -> None:
        rows = find_rows([str(folder)], QUESTION, asks=True)
        tell_many(predictor, rows, process, output=output, settings={}, batch_size=BATCH)

    ours, peer = interleave([by_asking, by_evaluation], settings.repeats, settings.device)
    what = f"a folder of {count} pictures, tiny model, CPU; other side: evaluation of them"
    return [Line(what, "pictures/s", rates(count, ours), rates(count, peer), Reach("≥", THROUGHPUT))]


def onnx_row(model: str, pixels: int, settings: Settings) -> list[Line]:
    """The exported model beside PyTorch, a picture and a question at a time."""
    import onnxruntime

    from inference import export

    checkpoint = make_checkpoint(settings.folder, model, pixels)
    predictor = Predictor(open_checkpoint(checkpoint), device="cpu", precision="fp32")
    batch = {
        "image": torch.zeros(1, 3, pixels, pixels, dtype=torch.uint8), "token_ids": torch.full((1, 8), 5),
        "padding_mask": torch.zeros(1, 8, dtype=torch.bool),
    }  # fmt: skip
    feed = {name: value.numpy() for name, value in batch.items()}
    lines = []
    for kind, reach, flags in (("fp32", ONNX_FP32, []), ("int8", ONNX_INT8, ["--int8"])):
        file = settings.folder / f"{kind}.onnx"
        if export.main([str(checkpoint), str(file), *flags, "--overwrite"]):
            raise RuntimeError(f"the export in {kind} failed")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        sides = [partial(session.run, None, feed), partial(predictor.tell, batch)]
        ours, peer = interleave(sides, settings.many_repeats)
        what = f"an answer by ONNX in {kind}, {model.removesuffix('_vqav2')}, CPU; other side: PyTorch in fp32"
        lines.append(Line(what, "answers/s", rates(1, ours), rates(1, peer), Reach("≥", reach)))
    return lines


def asking_rows(settings: Settings) -> list[Row]:
    many = 5000 if settings.quick else 100_000
    return [
        Row("command to an answer", partial(cold_start_row, "beit3_base_patch16_384_vqav2", 384, settings)),
        Row("a folder of pictures", partial(throughput_row, 200 if settings.quick else 1000, settings)),
        Row("an answer by ONNX", partial(onnx_row, "beit3_base_patch16_384_vqav2", 384, settings)),
        Row("memory at many rows", partial(growth_row, many, settings)),
    ]
