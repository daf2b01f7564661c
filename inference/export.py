"""A checkpoint as files for ONNX runtimes: what stands behind `python3 -m inference export`.

What is written beside each other, for an output `model.onnx`:

    model.onnx                            of a model that answers questions; weights in model.onnx.data
    model.encoder.onnx, model.step.onnx   of a model that writes captions; weights in *.onnx.data
    model.json                            what an application has to know: sizes, answers, calibration, ids of tokens
    model.spm                             the tokenizer

A model that answers takes image (N, 3, S, S) uint8, token_ids (N, T) int64 and padding_mask (N, T) bool, True =
padding, and gives logits (N, answers). Of a model that writes captions the encoder takes image and gives keys and
values; the step takes these and the newest tokens, see `inference.onnx_parts.CaptionStep`. Nothing is written unless
the files compute what PyTorch computes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit3.system.errors import BadImageError, InputError
from beit3.system.terminal import for_terminal, print_anywhere

if TYPE_CHECKING:
    from inference.onnx_checks import Parity
    from inference.opening import Opened
    from inference.predictor import Predictor

FORMAT = 1  # of the .json file
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
WORD_HEAD = "mlm_head.weight"  # of models that write
DESCRIPTION = """\
Writes a checkpoint as ONNX, for applications without PyTorch, and checks that the files compute the same.

  python3 -m inference export output/checkpoint-best model.onnx
  python3 -m inference export output/checkpoint-best small.onnx --int8 --data_path /data/coco

Beside model.onnx lie its weights, model.json with all that an application has to know, and model.spm, the tokenizer.
A model for captions becomes model.encoder.onnx and model.step.onnx. examples/ shows how to use them."""
EPILOG = "exit status: 0 done; 1 the files would compute something else, and none is left; 2 wrong input"


class NotTheSame(RuntimeError):
    """What was exported computes something else than PyTorch."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python3 -m inference export", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("checkpoint", type=Path, help="folder or file")
    made.add_argument("output", type=Path, help="model.onnx; the other files are named after it")
    made.add_argument("--int8", action="store_true", help="weights in 8 bits: smaller, faster, a little less exact")
    made.add_argument("--overwrite", action="store_true", help="write anew what is there already")
    made.add_argument("--data_path", type=Path, help="folder with index files: tell the score beside PyTorch's")
    made.add_argument("--image_path", type=Path, help="folder with the pictures, where they lie elsewhere")
    made.add_argument("--split", default="val", help="of --data_path (val)")
    made.add_argument("--batch_size", type=int, default=8, help="pictures at a time in the scoring (8)")
    made.add_argument("--tokenizer", type=Path, help="beit3.spm, for checkpoints that do not hold it")
    made.add_argument("--answers", type=Path, help="answer2label.txt, for checkpoints that do not hold it")
    made.add_argument("--task", help="where the checkpoint does not say it")
    return made


def main(argv: Sequence[str]) -> int:
    """The exit status: 0, 1 where the files would compute something else, 2 for what is wrong with the input."""
    print_anywhere()
    asked = parser().parse_args(argv)
    try:
        _export(asked)
    except (InputError, BadImageError, NotTheSame) as error:
        print(for_terminal(f"error: {error}"), file=sys.stderr)
        return 1 if isinstance(error, NotTheSame) else 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def _export(asked: argparse.Namespace) -> None:
    from inference.opening import open_checkpoint

    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"exporting needs {', '.join(missing)}: pip install -r requirements-export.txt")
    opened = open_checkpoint(asked.checkpoint, tokenizer=asked.tokenizer, answers=asked.answers, task=asked.task)
    parts = part_names(opened)
    problems = _wrong_flags(asked, opened, parts)
    if problems:
        raise InputError(problems)
    # PyTorch and the weights are loaded from here on.
    import utils
    from inference.predictor import Predictor

    utils.set_up_logging(is_main=True)
    predictor = Predictor(opened, device="cpu", precision="fp32")
    # Made in a folder beside the output, on the same disk; what is not moved out of it goes with it.
    with tempfile.TemporaryDirectory(prefix=f".{asked.output.name}.", dir=asked.output.parent) as folder:
        made = _made(asked, predictor, parts, Path(folder))
        (made / f"{asked.output.stem}.json").write_text(_about(predictor, asked, parts), encoding="utf-8")
        assert opened.tokenizer is not None
        (made / f"{asked.output.stem}.spm").write_bytes(opened.tokenizer.content)
        _move(made, asked.output.parent, asked.output.stem)


def _move(made: Path, folder: Path, stem: str) -> None:
    """The files to where they belong, the models last and older ones away first: whoever finds a model finds what
    belongs to it."""
    files = sorted(made.iterdir(), key=lambda file: (file.suffix == ".onnx", file.name))
    # The quantizer makes files that their owner alone may read; these are the rights of any other new file.
    rights = (made / f"{stem}.json").stat().st_mode
    for file in files:
        if file.suffix == ".onnx":
            (folder / file.name).unlink(missing_ok=True)
    for file in files:
        file.chmod(rights)
        target = folder / file.name
        os.replace(file, target)
        print(f"{target}  {target.stat().st_size / 1e6:.1f} MB")


def part_names(opened: Opened) -> dict[str, str]:
    """What the model becomes: part → what stands before .onnx in its file's name, behind the output's own.

    Raises:
        InputError: it neither answers nor writes.
    """
    if opened.task.asks and opened.description.get("answers"):
        return {"model": ""}
    if not opened.task.asks and opened.task.uses_text and WORD_HEAD in opened.about.shapes:
        return {"encoder": ".encoder", "step": ".step"}
    raise InputError(
        f"{opened.about.path}: a model for {opened.task.name} has neither answers nor captions; only such can be "
        "exported"
    )


def _wrong_flags(asked: argparse.Namespace, opened: Opened, parts: dict[str, str]) -> list[str]:
    output: Path = asked.output
    if output.suffix != ".onnx":
        return [f"{output}: a name that ends in .onnx is wanted"]
    if not output.parent.is_dir():
        return [f"{output}: the folder {output.parent} is not there"]
    if not os.access(output.parent, os.W_OK | os.X_OK):
        return [f"{output}: {output.parent} cannot be written to"]
    names = [f"{output.stem}.json", f"{output.stem}.spm"]
    names += [f"{output.stem}{part}.onnx{end}" for part in parts.values() for end in ("", ".data")]
    there = [name for name in names if (output.parent / name).exists()]
    problems = [f"{output.parent / name}: is there already; --overwrite writes it anew" for name in there]
    problems = [] if asked.overwrite else problems
    if asked.batch_size < 1:
        problems.append(f"--batch_size {asked.batch_size}: at least 1 is wanted")
    if asked.data_path is None:
        if asked.image_path is not None:
            problems.append("--image_path: goes with --data_path, which is not given")
        return problems
    if not opened.task.asks:
        return [*problems, f"--data_path: for models that answer; {opened.about.path} writes captions"]
    if asked.split not in opened.task.splits:
        return [*problems, f"--split {asked.split}: one of {', '.join(opened.task.splits)} is wanted"]
    data = _data(asked, opened)
    return problems + (data.problems() or opened.task.problems(data, training=False))


def _data(asked: argparse.Namespace, opened: Opened) -> Any:
    """`DataSettings` of the rows to score on."""
    return replace(opened.data, data_path=asked.data_path, image_path=asked.image_path, split=asked.split)


def _made(asked: argparse.Namespace, predictor: Predictor, parts: dict[str, str], folder: Path) -> Path:
    """Write the models into the folder and compare them with PyTorch; returns the folder below it with those wanted.

    Raises:
        NotTheSame: logits differ.
    """
    from inference import onnx_checks, onnx_parts

    whole, small = folder / "fp32", folder / "int8"
    names = {part: f"{asked.output.stem}{name}.onnx" for part, name in parts.items()}
    whole.mkdir()
    small.mkdir()
    _write(predictor, {part: whole / name for part, name in names.items()})
    cases = _cases(predictor)
    sessions = [onnx_checks.open_session(whole / name) for name in names.values()]
    parity = _parity(predictor, cases, sessions)
    print(
        f"fp32 beside PyTorch: logits differ by {parity.difference:.1e} at most, {onnx_checks.TOLERANCE:.0e} are "
        f"allowed ({parity.rows} rows of made pictures)"
    )
    if not parity.difference <= onnx_checks.TOLERANCE:
        raise NotTheSame(
            f"the exported model's logits differ by {parity.difference:.1e} from PyTorch's, more than "
            f"{onnx_checks.TOLERANCE:.0e}; nothing was written. Try other versions of onnxscript and onnxruntime"
        )
    if asked.int8:
        for name in names.values():
            onnx_parts.quantized(whole / name, small / name)
        sessions = [onnx_checks.open_session(small / name) for name in names.values()]
        parity = _parity(predictor, cases, sessions)
        what = "answers" if predictor.asks else "tokens"
        print(
            f"int8 beside PyTorch: {100 * parity.same_first:.1f} % of the first {what} are the same, logits differ by "
            f"{parity.difference:.2g} at most ({parity.rows} rows of made pictures)"
        )
    if asked.data_path is not None:
        data = _data(asked, predictor.opened)
        of_pytorch, of_file = onnx_checks.scores_on_data(predictor, sessions[0], data, asked.batch_size)
        name = "int8" if asked.int8 else "fp32"
        print(
            f"{predictor.task.best_metric} on {asked.split}: {of_file:.2f} exported, {name}; {of_pytorch:.2f} PyTorch"
        )
    return small if asked.int8 else whole


def _write(predictor: Predictor, files: dict[str, Path]) -> None:
    """Each part of the model into its file."""
    from inference import onnx_parts

    task, model = predictor.task, predictor.model
    if predictor.asks:
        answers = len(predictor.opened.description["answers"])
        module = onnx_parts.Answering(model, answers, task.image_mean, task.image_std)
        onnx_parts.write_answering(module, files["model"])
    else:
        encoder = onnx_parts.PictureEncoder(model, task.image_mean, task.image_std)
        onnx_parts.write_encoder(encoder, files["encoder"])
        onnx_parts.write_step(onnx_parts.CaptionStep(model, task.tokenizer.mask_id), files["step"])


def _cases(predictor: Predictor) -> list[Any]:
    from inference import onnx_checks

    if predictor.asks:
        return onnx_checks.answer_cases(predictor, len(predictor.opened.description["answers"]))
    return onnx_checks.caption_cases(predictor)


def _parity(predictor: Predictor, cases: list[Any], sessions: list[Any]) -> Parity:
    from inference import onnx_checks

    compare = onnx_checks.parity_of_answers if predictor.asks else onnx_checks.parity_of_captions
    return compare(cases, *sessions)


def _about(predictor: Predictor, asked: argparse.Namespace, parts: dict[str, str]) -> str:
    """What an application has to know, as JSON; docs/INFERENCE_EXPORT.md says what the entries mean."""
    opened, task = predictor.opened, predictor.task
    tokenizer, stem = task.tokenizer, asked.output.stem
    about: dict[str, Any] = {
        "format": FORMAT,
        "model": opened.model,
        "precision": "int8" if asked.int8 else "fp32",
        "files": {**{part: f"{stem}{name}.onnx" for part, name in parts.items()}, "tokenizer": f"{stem}.spm"},
        "image_size": opened.data.input_size,
        "longest_text": opened.data.num_max_bpe_tokens,
        "special_tokens": {
            "<s>": tokenizer.bos_id, "<pad>": tokenizer.pad_id, "</s>": tokenizer.eos_id, "<unk>": tokenizer.unk_id,
            "<mask>": tokenizer.mask_id,
        },
    }  # fmt: skip
    if predictor.asks:
        about["answers"] = list(opened.description["answers"])
        about["calibration"] = {"slope": task.calibration.slope, "offset": task.calibration.offset}
        about["calibrated"] = predictor.calibrated
    else:
        about["length_penalty"] = task.settings.length_penalty
    return json.dumps(about, ensure_ascii=False, indent=1) + "\n"
