"""The command line: ask a model about pictures. `bash prediction.sh` comes here when pictures are named."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit3.system.errors import InputError, printable
from beit3.system.terminal import for_terminal, print_anywhere
from inference.arguments import add_device_arguments, add_model_arguments, within

if TYPE_CHECKING:
    from inference.opening import Opened
    from inference.predictor import Predictor
    from inference.rows import Rows

SECONDS_FOR_THE_OTHERS = 30 * 24 * 3600.0
USAGE = 'bash prediction.sh PICTURE… ["QUESTION"] [options]'
DESCRIPTION = """\
Answers a question about pictures, or captions them, with a model that bash.sh trained or that was released.

  bash prediction.sh photo.jpg "What colour is the car?"
  bash prediction.sh photo.jpg                                       with a checkpoint for captions
  bash prediction.sh photos/ "Is there a dog?" --output answers.csv  a folder, a pattern, several pictures
  bash prediction.sh questions.csv --output answers.jsonl            a table with the columns image and question

The checkpoint is FINETUNE=…, else the newest checkpoint-best under output/. Without a picture prediction.sh answers a
whole split of the data and writes the submission; python3 run_beit3_finetuning.py --help has those flags. For
applications without PyTorch: python3 -m inference export --help"""
EPILOG = """\
exit status: 0 done; 2 something is wrong with what was asked; 3 done, but some rows have an error and no answer"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python3 -m inference", usage=USAGE, description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("what", nargs="+", metavar="PICTURE", help="picture, folder, pattern; or a table")
    made.add_argument("--question", help="the same as a last argument that is no file")
    made.add_argument(
        "--columns", help="names of a table's columns, where they are other ones: image=datei,question=frage"
    )
    made.add_argument("--output", type=Path, help="file for results: .csv, .tsv, .jsonl, .parquet; goes on if stopped")
    made.add_argument("--overwrite", action="store_true", help="write --output anew where it is there already")
    made.add_argument("--json", action="store_true", help="print rows of JSON")
    made.add_argument("--top", type=within(int, 1), help="answers that are told (3; 5 in files), or captions (1)")
    made.add_argument("--min_confidence", type=within(float, 0, 1), default=0.0, help="below it no answer is given (0)")
    made.add_argument("--beams", type=within(int, 1), help="of the search for captions (3); 1 is fastest")
    add_model_arguments(made)
    made.add_argument("--task", help="where the checkpoint does not say it")
    made.add_argument("--batch_size", type=within(int, 1), default=16, help="pictures at a time (16)")
    made.add_argument(
        "--num_workers", type=within(int, 0), default=10, help="processes that load pictures, at most one per core (10)"
    )
    add_device_arguments(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 2 for what is wrong with the input, 3 where some rows have an error."""
    print_anywhere()
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["export"]:
        from inference import export

        return export.main(argv[1:])
    asked = parser().parse_args(argv)
    try:
        return _run(asked)
    except InputError as error:
        mine = str(error).startswith(f"process {os.environ.get('RANK')}: ")  # no other process tells it
        if int(os.environ.get("RANK", "0")) == 0 or mine:
            print(for_terminal(f"error: {error}"), file=sys.stderr)
        return 2
    except BrokenPipeError:  # who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        again = "; make room, and the same command goes on from here" if asked.output else ""
        print(for_terminal(f"error: {error.filename or 'output'}: {error.strerror}{again}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "; the same command goes on from here" if asked.output else ""
        print(f"stopped{again}", file=sys.stderr)
        return 130


def _run(asked: argparse.Namespace) -> int:
    from inference.opening import newest_checkpoint, open_checkpoint
    from inference.rows import find_rows
    from sources.columns import parse_columns

    named = asked.checkpoint or (Path(os.environ["FINETUNE"]) if os.environ.get("FINETUNE") else None)
    if named is None:
        named = newest_checkpoint()
        print(f"checkpoint: {named}", file=sys.stderr)
    opened = open_checkpoint(named, tokenizer=asked.tokenizer, answers=asked.answers, task=asked.task)
    pictures, question = split_question(asked.what, asked.question)
    problems = _wrong_flags(asked, opened)
    if problems:
        raise InputError(problems)
    columns = parse_columns(asked.columns) if asked.columns is not None else None
    rows = find_rows(pictures, question, opened.task.asks, columns)
    _check_question(opened, question)
    # PyTorch and the weights are loaded from here on.
    import utils
    from inference.predictor import Predictor

    utils.set_up_logging(is_main=True)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    try:
        # A process may be done long before the others.
        process = None if alone else utils.start_processes(asked.device, timeout_seconds=SECONDS_FOR_THE_OTHERS)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"process {os.environ.get('RANK')}: {str(error).splitlines()[0]}") from error
    try:
        predictor = Predictor(opened, device=asked.device, precision=asked.precision)
        process = process or utils.Process(0, 1, 0, predictor.device)
        predictor.choose(num_beams=asked.beams, alternatives=_top(asked, opened))
        if process.is_main and opened.task.asks and not predictor.calibrated:
            print("the confidences are uncalibrated: no validation was fitted for this checkpoint", file=sys.stderr)
        return (_to_file if asked.output else _to_terminal)(asked, predictor, rows, process)
    finally:
        utils.stop_processes()


def split_question(what: Sequence[str], question: str | None) -> tuple[list[str], str | None]:
    """The pictures, and the question: the last argument where it names no file and is not written like one."""
    if question is not None or len(what) == 1:
        return list(what), question
    last = what[-1]
    from inference.rows import TABLE_ENDINGS, is_picture

    written_as_a_path = ("/" in last or "*" in last) and not any(map(str.isspace, last))
    if (
        os.path.exists(last)
        or is_picture(os.path.basename(last))
        or last.lower().endswith(TABLE_ENDINGS)
        or written_as_a_path
    ):
        return list(what), None
    return list(what[:-1]), last


def _wrong_flags(asked: argparse.Namespace, opened: Opened) -> list[str]:
    problems = []
    if opened.task.asks and asked.beams is not None:
        problems.append(f"--beams: for captions; {opened.about.path} answers questions")
    if not opened.task.asks and asked.min_confidence:
        problems.append(f"--min_confidence: for answers; {opened.about.path} writes captions")
    if opened.task.asks and (asked.top or 1) > opened.task.most_answers:
        problems.append(f"--top {asked.top}: {opened.task.most_answers} answers are the most that are told")
    beams = asked.beams or getattr(opened.task, "num_beams", 1)
    if not opened.task.asks and (asked.top or 1) > beams:
        problems.append(f"--top {asked.top}: no more captions than --beams, {beams}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and asked.output is None:
        problems.append("several processes need --output, a file that all results go to")
    if asked.output is not None:
        from inference.outputs import check_output

        problems += check_output(asked.output, asked.overwrite)
    return problems


def _check_question(opened: Opened, question: str | None) -> None:
    if question is not None:
        from inference.questions import token_ids

        assert opened.tokenizer is not None
        token_ids(opened.tokenizer, question, opened.data.num_max_bpe_tokens)


def _top(asked: argparse.Namespace, opened: Opened) -> int:
    if asked.top is not None:
        return int(asked.top)
    return 1 if not opened.task.asks else 5 if asked.output else 3


def _to_file(asked: argparse.Namespace, predictor: Predictor, rows: Rows, process: Any) -> int:
    from inference.many import tell_many

    top, opened = _top(asked, predictor.opened), predictor.opened
    decides = {
        **opened.identity(), "top": top, "beams": asked.beams, "min_confidence": asked.min_confidence,
        "precision": predictor.precision,
    }  # fmt: skip
    done, failed = tell_many(
        predictor, rows, process, output=asked.output, settings=decides, batch_size=asked.batch_size,
        num_workers=asked.num_workers, top=top, min_confidence=asked.min_confidence,
    )  # fmt: skip
    if process.is_main:
        wrong = f", {failed} of them with an error" if failed else ""
        print(f"{asked.output}: {done} rows{wrong}", file=sys.stderr)
    return 3 if failed else 0


def _to_terminal(asked: argparse.Namespace, predictor: Predictor, rows: Rows, process: Any) -> int:
    from inference.many import tell

    top, failed = _top(asked, predictor.opened), 0
    for entry in tell(predictor, rows, asked.batch_size, top, asked.min_confidence):
        failed += "error" in entry
        if "error" in entry and len(rows) == 1:
            raise InputError(f"{entry['image']}: {entry['error']}")
        if asked.json:
            calibrated = {"calibrated": predictor.calibrated} if predictor.asks else {}
            print(json.dumps({**entry, **calibrated}, ensure_ascii=False), flush=True)
        else:
            name = "" if len(rows) == 1 else f"{printable(entry['image'])}: "
            print(name + printable(line_of(entry)), flush=True)
    if failed:
        print(f"{failed} of {len(rows)} rows have an error", file=sys.stderr)
    return 3 if failed else 0


def line_of(entry: dict[str, Any]) -> str:
    """A row of results as people read it: "red 0.93 · blue 0.04", a caption, or what is wrong."""
    if "error" in entry:
        return f"error: {entry['error']}"
    if "caption" in entry:
        return " · ".join(f"{each['caption']}" for each in entry.get("top", [entry]))
    if entry.get("note"):
        return f"not sure enough: {entry['confidence']:.2f} {entry['note']}"
    return " · ".join(f"{each['answer']} {each['confidence']:.2f}" for each in entry.get("top", [entry]))
