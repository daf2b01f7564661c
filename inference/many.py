"""Many pictures: in constant memory, over several processes, and going on where it was when it is started again.

Rows are done in chunks. A chunk's results are one file, which is there whole or not at all; what is there is not done
again. When all are there they are joined, in the order of the rows, into the file that was asked for. So the result
depends neither on the number of processes nor on how often the work was interrupted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

import utils
from beit3.data.loading import DeafLoader
from beit3.system.atomic_files import UNFINISHED, atomic_write
from beit3.system.errors import InputError, printable
from beit3.system.machine import cores
from beit3.system.progress_bar import ProgressBar
from inference.outputs import Told, write_results
from inference.predictor import Predictor
from inference.rows import Row, Rows
from tasks.base import Answer

CHUNK = 256  # rows
JOB = "job.json"  # what the parts beside it are parts of


class _Batches(IterableDataset[dict[str, Any]]):
    """Batches of the chunks that this process does. Each names its chunk, its rows and what is wrong with some."""

    def __init__(self, predictor: Predictor, rows: Rows, chunks: Sequence[int], batch_size: int) -> None:
        self.predictor, self.rows, self.chunks, self.batch_size = predictor, rows, chunks, batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        mine, total = set(self.chunks[first::step]), len(self.rows)
        pending: list[Row] = []
        chunk = 0
        for number, row in enumerate(self.rows):
            if number // CHUNK != chunk:
                yield from self._flush(pending, chunk, last=True)
                pending, chunk = [], number // CHUNK
            if chunk in mine:
                pending.append(row)
                # The last rows of a chunk wait for its end, which they are to tell.
                if len(pending) == self.batch_size and number + 1 < min((chunk + 1) * CHUNK, total):
                    yield from self._flush(pending, chunk, last=False)
                    pending = []
        yield from self._flush(pending, chunk, last=True)

    def _flush(self, rows: list[Row], chunk: int, last: bool) -> Iterator[dict[str, Any]]:
        if rows:
            items, problems = [], []
            for row in rows:
                problem = row.problem
                if problem is None:
                    try:
                        items.append(self.predictor.item(row.file, row.question))
                    except Exception as error:  # whatever a stranger's picture makes a decoder throw
                        problem = _reason(error, row)
                problems.append(problem)
            batch = self.predictor.collate(items) if items else {}
            yield {"chunk": chunk, "rows": rows, "problems": problems, "batch": batch, "last": last}


def _reason(error: Exception, row: Row) -> str:
    """Why a row could not be asked, without the file's name, which the row has."""
    text = getattr(error, "problem", None) or str(error) or type(error).__name__
    return printable(text.splitlines()[0].removeprefix(f"{row.file}: "))[:300]


def tell_many(
    predictor: Predictor,
    rows: Rows,
    process: utils.Process,
    *,
    output: Path,
    settings: Mapping[str, Any],
    batch_size: int = 16,
    num_workers: int = 10,
    top: int = 5,
    min_confidence: float = 0.0,
) -> tuple[int, int]:
    """Ask every row and write the results to `output`; (rows, rows with an error). Collective.

    settings: whatever else decides the results, in plain values; parts of a job with other ones are refused.

    Raises:
        InputError: parts of another job are there.
    """
    parts = output.with_name(f"{output.name}.parts")
    job = {"rows": rows.digest(), "chunk": CHUNK, **settings}
    chunks = range(-(-len(rows) // CHUNK))
    missing: list[int] | str = []
    with contextlib.ExitStack() as held:
        if process.is_main:
            missing = _begin(parts, job, held) or [chunk for chunk in chunks if not _part(parts, chunk).exists()]
        missing = utils.broadcast(missing)
        if isinstance(missing, str):
            raise InputError(missing)
        mine = missing[process.rank :: process.world_size]
        _ask_chunks(predictor, rows, process, parts, mine, batch_size, num_workers, top, min_confidence)
        utils.barrier()
        failed: int | str = 0
        if process.is_main:
            failed = _join(parts, [_part(parts, chunk) for chunk in chunks], output, predictor.asks, top)
        failed = utils.broadcast(failed)
    if isinstance(failed, str):
        raise InputError(failed)
    return len(rows), failed


def _ask_chunks(
    predictor: Predictor, rows: Rows, process: utils.Process, parts: Path, left: list[int], batch_size: int,
    num_workers: int, top: int, min_confidence: float,
) -> None:  # fmt: skip
    """Ask the rows of these chunks, and write a part for each."""
    here = sum(_length(chunk, len(rows)) for chunk in left)
    bar = ProgressBar(rows.name, here, process.is_main)
    unfinished: dict[int, list[Told]] = {}
    started, asked = time.monotonic(), 0
    for batch in _loader(_Batches(predictor, rows, left, batch_size), num_workers, len(left)):
        told = unfinished.setdefault(batch["chunk"], [])
        told += _ask(predictor, batch, top, min_confidence)
        if batch["last"]:
            with atomic_write(_part(parts, batch["chunk"])) as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in unfinished.pop(batch["chunk"]))
        asked += len(batch["rows"])
        rate = f"{asked * process.world_size / (time.monotonic() - started):.1f} rows/s"
        for _ in batch["rows"]:
            bar.advance(rate)
    bar.close()


def _join(parts: Path, files: Sequence[Path], output: Path, asks: bool, top: int) -> int | str:
    """Write the rows of all parts to the output; how many have an error, or why it cannot be written."""
    failed = 0

    def counted() -> Iterator[Told]:
        nonlocal failed
        for entry in _entries(files):
            failed += "error" in entry
            yield entry

    try:
        write_results(output, counted(), asks, top)
    except OSError as error:
        return f"{output}: cannot be written ({error.strerror}); make room, and the same command writes it from {parts}"
    shutil.rmtree(parts)
    return failed


def tell(predictor: Predictor, rows: Rows, batch_size: int, top: int, min_confidence: float) -> Iterator[Told]:
    """The results of all rows, one after the other."""
    chunks = range(-(-len(rows) // CHUNK))
    workers = 0 if len(rows) <= batch_size else 1  # one: several bring chunks side by side
    for batch in _loader(_Batches(predictor, rows, chunks, batch_size), workers, len(chunks)):
        yield from _ask(predictor, batch, top, min_confidence)


def _begin(parts: Path, job: Mapping[str, Any], held: contextlib.ExitStack) -> str | None:
    """Make the folder of parts, or see that those in it are of this job; what is wrong, None for nothing.

    held: keeps another command out of the folder until it is closed.
    """
    named = parts / JOB
    try:
        parts.mkdir(parents=True, exist_ok=True)
        lock = held.enter_context((parts / ".in_use").open("a", encoding="utf-8"))
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return f"{parts}: another command is at work there; wait for it, or name another --output"
        except OSError:
            pass  # a file system without locks
        if named.exists():
            before = json.loads(named.read_text(encoding="utf-8"))
            changed = sorted(name for name in {*before, *job} if before.get(name) != job.get(name))
            if changed:
                return (
                    f"{parts}: holds a part of the results of another job ({', '.join(changed)} changed); remove the "
                    "folder, or name another --output"
                )
            for file in parts.iterdir():
                if UNFINISHED.fullmatch(file.name):
                    file.unlink()
            return None
        with atomic_write(named) as said:
            json.dump(dict(job), said)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{parts}: cannot be used for the parts of the results ({error}); remove it, or name another --output"
    return None


def _part(parts: Path, chunk: int) -> Path:
    return parts / f"{chunk:08d}.jsonl"


def _length(chunk: int, rows: int) -> int:
    return min(CHUNK, rows - chunk * CHUNK)


def _loader(batches: _Batches, num_workers: int, chunks: int) -> DeafLoader:
    workers = min(num_workers, chunks, cores())
    if batches.predictor.device.type == "cpu":
        workers = min(workers, 1)  # more would take the cores from the model
    fork = "fork" if workers and sys.platform == "linux" else None  # others would copy the model
    return DeafLoader(batches, batch_size=None, num_workers=workers, multiprocessing_context=fork)


def _ask(predictor: Predictor, batch: Mapping[str, Any], top: int, min_confidence: float) -> Iterator[Told]:
    told = iter(predictor.tell(batch["batch"]) if batch["batch"] else ())
    for row, problem in zip(batch["rows"], batch["problems"], strict=True):
        said = None if problem is not None else next(told)
        if said is None and problem is None:
            problem = "the model's numbers are not finite; use --precision fp32, or another checkpoint"
        yield row_of(row, said, problem, top, min_confidence)


def _writable(text: str) -> str:
    """A name that is no UTF-8, or half a surrogate pair, as its escape: any file can hold it."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def row_of(row: Row, said: Any, problem: str | None, top: int, min_confidence: float) -> Told:
    """A row of the output: what was asked, what was said, or why not."""
    entry: Told = {"image": _writable(row.image)}
    if row.question is not None:
        entry["question"] = _writable(row.question)
    if said is None:
        return {**entry, "error": problem}
    if isinstance(said[0], Answer):
        sure = said[0].confidence >= min_confidence
        best: Told = {"answer": said[0].text if sure else "", "confidence": round(said[0].confidence, 6)}
        if not sure:
            return {**entry, **best, "note": f"below --min_confidence {min_confidence:g}"}
        others = [{"answer": each.text, "confidence": round(each.confidence, 6)} for each in said[:top]]
    else:
        best = {"caption": said[0].text, "score": round(said[0].score, 6)}
        others = [{"caption": each.text, "score": round(each.score, 6)} for each in said[:top]]
    return {**entry, **best, **({"top": others} if len(others) > 1 else {})}


def _entries(parts: Sequence[Path]) -> Iterator[Told]:
    for part in parts:
        with open(part, encoding="utf-8") as lines:
            yield from map(json.loads, lines)
