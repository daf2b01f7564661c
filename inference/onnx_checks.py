"""Whether an exported model is the model: the same numbers, and the same score on the data of validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from beit3.data.loading import EvaluationSampler, build_loader
from beit3.data.tokenizer import BOS_ID
from beit3.system.errors import InputError
from beit3.system.progress_bar import ProgressBar
from inference.predictor import Predictor
from tasks.base import make_task
from tasks.settings import DataSettings

TOLERANCE = 1e-4  # largest difference of a logit in fp32
PICTURES = (1, 3)  # in a batch that is compared
STEPS = 6  # of a caption that are compared, at most
ROUNDS = 2  # batches of each kind
PATCHES = 4  # the made pictures are that many patches of colour wide and high
LEAST = 0.1  # of the colour noise, in shares of the range

Session = Any  # of onnxruntime
Case = tuple[dict[str, np.ndarray], np.ndarray]  # inputs, and the logits that PyTorch gives


@dataclass(frozen=True)
class Parity:
    """How two models agree on `rows` rows of logits.

    Attributes:
        difference: the largest of a logit.
        same_first: share of rows with the same best logit.
    """

    difference: float
    same_first: float
    rows: int


def open_session(file: Path, threads: int | None = None) -> Session:
    """The model in a file, on the CPU. threads: None: as many as there are cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


class OnnxAnswering(nn.Module):
    """An exported model where a task's `predict_step` wants a model; its pictures are uint8."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def forward(self, image: Tensor, question: Tensor, padding_mask: Tensor) -> Tensor:
        feed = {"image": image.numpy(), "token_ids": question.numpy(), "padding_mask": padding_mask.numpy()}
        return torch.from_numpy(self.session.run(["logits"], feed)[0])


def answer_cases(predictor: Predictor, answers: int) -> list[Case]:
    """Pictures and texts of several numbers and lengths, with padding, and the logits that PyTorch gives for them.

    answers: outputs of the head that have a name.
    """
    config, generator = predictor.model.beit3.config, torch.Generator().manual_seed(0)
    longest, cases = predictor.opened.data.num_max_bpe_tokens, []
    for count in PICTURES:
        for length in sorted({1, min(8, longest), longest}) * ROUNDS:
            image = made_pictures(count, config.image_size, generator)
            ids = torch.randint(config.vocab_size, (count, length), generator=generator)
            lengths = torch.randint(1, length + 1, (count, 1), generator=generator)
            mask = torch.arange(length) >= lengths
            ready = predictor.task.prepare({"image": image}, predictor.device, torch.float32)["image"]
            with torch.no_grad():
                wanted = predictor.model(image=ready, question=ids, padding_mask=mask)[:, :answers]
            feed = {"image": image.numpy(), "token_ids": ids.numpy(), "padding_mask": mask.numpy()}
            cases.append((feed, wanted.numpy()))
    return cases


def caption_cases(predictor: Predictor) -> list[Case]:
    """Pictures and beginnings of captions, and the logits that PyTorch gives for the token behind each of their tokens,
    computed as a whole each time: (tokens, N, V)."""
    model, generator = predictor.model, torch.Generator().manual_seed(0)
    config, mask_id = model.beit3.config, predictor.task.tokenizer.mask_id
    longest, cases = predictor.opened.data.num_max_bpe_tokens, []
    for count in PICTURES * ROUNDS:
        image = made_pictures(count, config.image_size, generator)
        tokens = torch.randint(config.vocab_size, (count, min(STEPS, longest - 2)), generator=generator)
        tokens[:, 0] = BOS_ID
        ready = predictor.task.prepare({"image": image}, predictor.device, torch.float32)["image"]
        wanted = []
        for known in range(1, tokens.shape[1] + 1):
            ids = torch.cat([tokens[:, :known], torch.full((count, 1), mask_id)], dim=1)
            masks = torch.arange(count) * (known + 1) + known  # their places in the flattened ids
            with torch.no_grad():
                wanted.append(model(image=ready, text_ids=ids, padding_mask=None, masked_index=masks).numpy())
        cases.append(({"image": image.numpy(), "token_ids": tokens.numpy()}, np.stack(wanted)))
    return cases


def parity_of_answers(cases: Sequence[Case], session: Session) -> Parity:
    """cases: of `answer_cases`."""
    return _parity([(wanted, session.run(["logits"], feed)[0]) for feed, wanted in cases])


def parity_of_captions(cases: Sequence[Case], encoder: Session, step: Session) -> Parity:
    """cases: of `caption_cases`; the files compute them step by step."""
    pairs = []
    for feed, wanted in cases:
        state = first_state(encoder, feed["image"])
        for newest, of_step in zip(feed["token_ids"].T, wanted, strict=True):
            logits, state = next_logits(step, newest, state)
            pairs.append((of_step, logits))
    return _parity(pairs)


def first_state(encoder: Session, image: np.ndarray) -> dict[str, np.ndarray]:
    """What the first step takes beside its token. image: (N, 3, S, S) uint8."""
    keys, values = encoder.run(["image_keys", "image_values"], {"image": image})
    nothing = np.zeros((*keys.shape[:3], 0, keys.shape[4]), np.float32)
    return {"image_keys": keys, "image_values": values, "text_keys": nothing, "text_values": nothing}


def next_logits(
    step: Session, tokens: np.ndarray, state: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits (N, V) of what follows `tokens` (N,) int64, and the state for the next step."""
    names = ["logits", "new_text_keys", "new_text_values"]
    logits, keys, values = step.run(names, {"token_ids": tokens, **state})
    return logits, {**state, "text_keys": keys, "text_values": values}


def made_pictures(count: int, size: int, generator: torch.Generator) -> Tensor:
    """uint8 (count, 3, size, size): patches of colour with noise, as pictures have both smooth parts and edges."""
    patches = torch.rand(count, 3, PATCHES, PATCHES, generator=generator)
    smooth = nn.functional.interpolate(patches, size=(size, size), mode="nearest")
    noise = LEAST * torch.randn(smooth.shape, generator=generator)
    return ((smooth + noise).clamp(0, 1) * 255).round().to(torch.uint8)


def _parity(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Parity:
    """pairs: logits (N, K) of each model. What is no number on one side alone differs without bounds."""
    differences, same, rows = [], 0, 0
    for wanted, found in pairs:
        assert wanted.shape == found.shape, f"logits of {found.shape} for {wanted.shape}"
        both = np.isfinite(wanted) & np.isfinite(found)
        differences.append(float(np.abs(wanted - found).max()) if both.all() else np.inf)
        same += int((wanted.argmax(1) == found.argmax(1)).sum())
        rows += len(wanted)
    return Parity(max(differences), same / rows, rows)


def scores_on_data(predictor: Predictor, session: Session, data: DataSettings, batch_size: int) -> tuple[float, float]:
    """The task's score of PyTorch's model and of the exported one on a split, in the task's own unit.

    Raises:
        InputError: the right answers are not known.
        BadImageError: a picture cannot be read.
    """
    task = make_task(predictor.opened.task, data, predictor.opened.tokenizer)
    task.adopt(predictor.opened.description)
    task.meet_data()
    dataset, exported = task.dataset(data.split, training=False), OnnxAnswering(session)
    sampler = EvaluationSampler(len(dataset), batch_size, rank=0, world_size=1)
    loader = build_loader(dataset, sampler, data.num_workers, pin_memory=False)
    wanted: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    bar = ProgressBar(f"scoring {data.split}", len(loader), is_main=True)
    for number, batch in enumerate(loader):
        ready = task.prepare(batch, predictor.device, torch.float32)
        with torch.no_grad():
            wanted.append({"row": batch["row"], **task.predict_step(predictor.model, ready)})
            found.append({"row": batch["row"], **task.predict_step(exported, batch)})
        # Asked after the first batch, not after all.
        if number == 0 and task.best_metric not in task.score(wanted[0], dataset, data.split, final=False).metrics:
            raise InputError(f"--split {data.split}: the right answers are not known in {data.data_path}")
        bar.advance("of pictures")
    bar.close()
    of_pytorch, of_file = (
        task.score(_joined(columns), dataset, data.split, final=False).metrics[task.best_metric]
        for columns in (wanted, found)
    )
    return of_pytorch, of_file


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Columns of tensors (N, …) of all batches, one behind the other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
