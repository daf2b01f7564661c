"""Kills a training at random moments until it is done, and compares what comes out with an undisturbed run.

    python -m tests.chaos --runs 100            plain PyTorch and DeepSpeed ZeRO-1 in turn, two processes
    python -m tests.chaos --runs 4 --seed 7

A run is one training of two epochs that is killed (kill -9, all processes or one) at up to three moments, each followed
by the same command again. Moments are numbered by events, so that they can be hit exactly: optimizer steps, and every
open, rename, removal and mkdir in the output folder, which is where saves are. At least a third of the kills fall into
saves. Weights, optimizer, average and logged values must be bitwise those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from datasets import VQAv2Dataset
from tests import reference
from tests.workers import Run

PROCESSES = 2
TIMED = ("images_per_second",)  # the only logged values that may differ


def make_data(folder: Path) -> Path:
    """The made-up COCO with its index files."""
    shutil.copytree(reference.MINI_COCO, folder)
    VQAv2Dataset.make_dataset_index(
        data_path=str(folder), tokenizer=str(folder / "mini.spm"), annotation_data_path=str(folder / "vqa")
    )
    return folder


def command(data: Path, out: Path, deepspeed: bool, **changes: Any) -> list[str]:
    """A training of 2 epochs of 6 steps, with an average, workers and a checkpoint every other step."""
    flags: dict[str, Any] = {
        "task": "vqav2", "model": "beit3_tiny_patch16_64", "input_size": 64, "vocab_size": 100, "device": "cpu",
        "sentencepiece_model": data / "mini.spm", "data_path": data, "output_dir": out, "batch_size": 16, "epochs": 2,
        "warmup_epochs": 1, "lr": 1e-3, "num_workers": 1, "save_ckpt_freq": 1, "save_ckpt_steps": 2,
        "keep_checkpoints": 2, "model_ema_decay": 0.9, "clip_grad": 1.0, "timeout": 300,
    }  # fmt: skip
    flags.update(changes)
    switches = ["--model_ema", *(["--enable_deepspeed"] if deepspeed else [])]
    return [*switches, *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]


def watch(rank: int, out: str, report: str, kill_at: tuple[str, int] | None, victims: list[int]) -> None:
    """In each process, before it begins: count events, and die at one.

    report: file for the counts of rank 0 (when nobody is to die). kill_at: kind of event and its number.
    """
    counts: collections.Counter[str] = collections.Counter()
    open_report = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if rank == 0 and kill_at is None else None

    def happened(kind: str) -> None:
        counts[kind] += 1
        if open_report is not None:
            os.write(open_report, f"{kind}\n".encode())
        if kill_at == (kind, counts[kind]) and rank in victims:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(arguments[0]).startswith(out):
            happened("file")

    sys.addaudithook(audit)
    import engine_for_finetuning as engine

    step = engine._optimizer_step

    def counted_step(*arguments: Any) -> Any:
        outcome = step(*arguments)
        happened("step")
        return outcome

    engine._optimizer_step = counted_step


def last_state(out: Path) -> dict[str, Any]:
    """Everything the last checkpoints hold, but for times."""
    state: dict[str, Any] = {}
    for file in sorted(out.rglob("*.pt")) + sorted(out.glob("checkpoint-[0-9]*.pth")):
        if "checkpoint-1/" in f"{file}/" or file.name == "checkpoint-1.pth":
            state[str(file.relative_to(out))] = _load(file)
    for file in sorted(out.rglob("model.safetensors")):
        if file.parent.name in ("checkpoint-best", "checkpoint-last"):
            with safe_open(file, framework="pt") as content:  # safetensors orders its header at random
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
                state[str(file.relative_to(out))] = {"tensors": tensors, "metadata": dict(content.metadata())}
    log = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    state["log"] = [{k: v for k, v in entry.items() if not k.endswith(TIMED)} for entry in log]
    return state


def _load(file: Path) -> Any:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(file, weights_only=True, map_location="cpu")


def first_difference(a: Any, b: Any, where: str = "") -> str | None:
    """The place of the first difference of two nested values, None when they are bitwise equal."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return None if same else where
    if type(a) is not type(b):
        return where
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"
        pairs: Any = [(a[key], b[key], f"{where}/{key}") for key in a]
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return where
        pairs = [(x, y, f"{where}[{number}]") for number, (x, y) in enumerate(zip(a, b, strict=True))]
    elif hasattr(a, "__dict__"):
        pairs = [(vars(a), vars(b), where)]
    else:
        return None if a == b else f"{where}: {str(a)[:200]} {str(b)[:200]}"
    return next((found for x, y, place in pairs if (found := first_difference(x, y, place))), None)


@dataclass
class Undisturbed:
    """A run without kills: what it left, and how many events of each kind it had."""

    state: dict[str, Any]
    events: list[str]


def undisturbed(data: Path, folder: Path, deepspeed: bool) -> Undisturbed:
    out, report = folder / "undisturbed", folder / "events.txt"
    ended = Run(command(data, out, deepspeed), PROCESSES, watch, (str(out), str(report), None, [])).wait()
    assert ended.statuses == [0] * PROCESSES, ended.output
    return Undisturbed(last_state(out), report.read_text().split())


def disturbed(
    data: Path, out: Path, deepspeed: bool, kills: list[tuple[tuple[str, int], list[int]]]
) -> tuple[dict[str, Any], int, int]:
    """What a run leaves that is killed at these moments, how many of the kills happened, and how many in saves."""
    happened = in_saves = 0
    for kill_at, victims in kills:
        ended = Run(command(data, out, deepspeed), PROCESSES, watch, (str(out), os.devnull, kill_at, victims)).wait()
        if -signal.SIGKILL in ended.statuses:
            happened += 1
            in_saves += kill_at[0] == "file"
        else:  # the event did not come any more; the run is done
            assert ended.statuses == [0] * PROCESSES, ended.output
    ended = Run(command(data, out, deepspeed), PROCESSES).wait()
    assert ended.statuses == [0] * PROCESSES, ended.output
    left_over = [path.name for path in out.rglob(".*")]
    assert not left_over, left_over
    return last_state(out), happened, in_saves


def draw_kills(rng: random.Random, events: list[str], count: int) -> list[tuple[tuple[str, int], list[int]]]:
    """Moments of the undisturbed run; after a kill fewer are left, so later numbers are smaller."""
    kills = []
    for number in range(count):
        kind = "file" if rng.random() < 0.5 else "step"
        most = max(1, events.count(kind) // (number + 1))
        kills.append(((kind, rng.randint(1, most)), rng.choice([[0], [1], [0, 1]]) if kind == "step" else [0]))
    return kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    totals: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_data(folder / "data")
        for deepspeed in (False, True):
            kind = "DeepSpeed ZeRO-1" if deepspeed else "plain PyTorch"
            base = folder / kind.split()[0]
            base.mkdir()
            whole = undisturbed(data, base, deepspeed)
            print(f"{kind}: undisturbed, {collections.Counter(whole.events)}", flush=True)
            for run in range(deepspeed, args.runs, 2):
                rng = random.Random(f"{args.seed} {run}")
                kills = draw_kills(rng, whole.events, rng.randint(1, 3))
                state, happened, in_saves = disturbed(data, base / str(run), deepspeed, kills)
                difference = first_difference(whole.state, state)
                totals += collections.Counter(
                    runs=1, kills=happened, kills_in_saves=in_saves, different=difference is not None
                )
                print(f"run {run} ({kind}): {kills}: {difference or 'bitwise equal'}", flush=True)
                shutil.rmtree(base / str(run))
    print(
        ", ".join(
            f"{name.replace('_', ' ')}: {totals[name]}" for name in ("runs", "kills", "kills_in_saves", "different")
        )
    )
    return int(totals["different"] > 0)


if __name__ == "__main__":
    sys.exit(main())
