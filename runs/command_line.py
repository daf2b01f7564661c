"""From a command line to `Settings`: help, checks, and what the checkpoint to predict with says. Needs no PyTorch.

So help, and any mistake in the flags, is there at once.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from beit3.data.tokenizer import Tokenizer
from beit3.model.description import About, about, answers_at_once
from beit3.model.names import REGISTERED, layers_of, name_by_shapes, names_with, pixels_of
from beit3.system.errors import InputError, printable
from beit3.system.flags import Flag, Parser, flags_of, unknown_flags, values, without_values
from beit3.training import freezing
from runs.settings import CONCERNS, TITLES, ModelSettings, Settings
from tasks import PLANNED, TASKS, settings_of
from tasks.checkpoint import other_tokenizer, task_by_head
from tasks.settings import DataSettings, TaskSettings

# Flags of the released command line that do nothing here: values they take, and why.
WITHOUT_EFFECT = {
    "--warmup_lr": (1, "the warm-up rises from 0"),
    "--task_cache_path": (1, "what people wrote lies beside the index"),
    "--dist_eval": (0, "processes always share the evaluation, each example once"),
    "--world_size": (1, "the launcher says"),
    "--local_rank": (1, "the launcher's environment says"),
    "--local-rank": (1, "the launcher's environment says"),
    "--deepspeed_config": (1, "the configuration is made from the flags"),
    "--deepscale": (0, "DeepSpeed's old name"),
    "--deepscale_config": (1, "DeepSpeed's old name"),
}

EXAMPLES = """examples:
  learn VQAv2 from the released weights, on one GPU
    python3 run_beit3_finetuning.py --task vqav2 --model beit3_base_patch16_480 --input_size 480 \\
      --finetune beit3_base_patch16_224.pth --sentencepiece_model beit3.spm --data_path /data/coco --output_dir output
  answer the test questions with what was learned
    python3 run_beit3_finetuning.py --eval --finetune output/checkpoint-best --data_path /data/coco --output_dir answers
  the published recipe on eight GPUs
    DATA_PATH=/data/coco SPM=beit3.spm FINETUNE=beit3_base_patch16_224.pth GPUS=8 bash bash.sh
"""


def read_settings(argv: Sequence[str] | None = None) -> Settings:
    """The settings that a command line asks for, checked.

    Raises:
        InputError: listing every mistake.
        SystemExit: after `--help` or `--help_all`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h", "--help_all"} & set(argv):
        print(help_text(whole="--help_all" in argv))
        raise SystemExit(0)
    try:
        return _Reader(argv).settings()
    except InputError as error:
        raise InputError([printable(problem) for problem in error.problems]) from error
    except OSError as error:  # a path that may not be looked at, or is longer than paths can be
        raise InputError(f"{printable(str(error.filename))}: {error.strerror}") from error


def help_text(whole: bool) -> str:
    """What `--help` (what one needs to start) and `--help_all` (every flag) print."""
    parser = Parser(
        usage="run_beit3_finetuning.py --task TASK --model NAME [flags], torchrun in front for several processes",
        description="Fine-tune BEiT-3 for a task, or predict with what was learned. Of a flag given twice the last "
        "one counts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("task")
    group.add_argument("--task", metavar="{" + ",".join(TASKS) + "}", help="what to fine-tune for, or to predict")
    group.add_argument("--help", action="store_true", help="what one needs to start")
    group.add_argument("--help_all", action="store_true", help="every flag")
    for concern, settings in CONCERNS.items():
        group = parser.add_argument_group(TITLES[concern])
        for each in flags_of(settings):
            if whole or each.facts.essential:
                each.add_to(group)
    for names, own in _own_flags().items() if whole else ():
        group = parser.add_argument_group(f"--task {' and '.join(names)}")
        for each in own:
            each.add_to(group)
    return parser.format_help()


def _own_flags() -> dict[tuple[str, ...], list[Flag]]:
    """Flags that only some tasks have: names of these tasks → the flags they share."""
    owners: dict[str, list[str]] = {}
    found: dict[str, Flag] = {}
    for task in TASKS:
        for each in flags_of(settings_of(task)):
            owners.setdefault(each.name, []).append(task)
            found[each.name] = each
    groups: dict[tuple[str, ...], list[Flag]] = {}
    for name, tasks in owners.items():
        groups.setdefault(tuple(tasks), []).append(found[name])
    return groups


class _Reader:
    """One command line on its way to `Settings`; `problems` collects every mistake."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.problems: list[str] = []
        self.tokenizer: tuple[str, str] | None = None  # its name for people and its SHA-256
        parser = Parser()
        parser.add_argument("--task", dest="task", nargs="*")
        for flags in [*map(flags_of, CONCERNS.values()), *_own_flags().values()]:
            for each in flags:
                each.add_to(parser, any_count=True)
        for name, (count, _) in WITHOUT_EFFECT.items():
            how: dict[str, Any] = {"nargs": "*"} if count else {"action": "store_true"}
            parser.add_argument(name, dest=name, default=None, **how)
        for planned in PLANNED.values():
            for name in planned:
                parser.add_argument(f"--{name}", dest=f"planned {name}", nargs="*", default=None)
        known = {option: action.nargs for action in parser._actions for option in action.option_strings}
        switches = {option for option, nargs in known.items() if nargs == 0}
        parsed, left_over = parser.parse_known_args(without_values(argv, switches, self.problems))
        self.problems += unknown_flags(left_over, [*known, "--help", "--help_all"])
        self.given = {name: value for name, value in vars(parsed).items() if value is not None}
        self.assumed: tuple[str, ...] = ()
        self.ignored = tuple(f"{name}: {why}" for name, (_, why) in WITHOUT_EFFECT.items() if name in self.given)

    def settings(self) -> Settings:
        read = {concern: values(settings, self.given, self.problems) for concern, settings in CONCERNS.items()}
        checkpoint = self._checkpoint(read) if read["run"].get("eval") else None
        task = self._task(checkpoint)
        if task is None:
            raise InputError(self.problems)
        self._refuse_flags_of_other_tasks(task)
        own = values(task, self.given, self.problems)
        if checkpoint is not None:
            self._take_over(checkpoint, task, read, own)
        if "input_size" not in read["data"] and "model" in read["model"]:
            read["data"] |= _size_by_name(read["model"]["model"].removesuffix(f"_{task.model_suffix}"), task)
        settings = Settings(
            task(**own),
            **{concern: CONCERNS[concern](**read[concern]) for concern in CONCERNS},
            checkpoint=checkpoint,
            ignored=self.ignored,
            assumed=self.assumed,
        )
        readable = own.keys() | {name for concern in read.values() for name in concern}
        settings = replace(settings, tokenizer=self._tokenizer(settings))
        settings = self._look_at_index(settings)
        self.problems += self._model_problems(settings) + _problems(settings)
        self.problems = _without_followers(self.problems, {f"--{name}" for name in self.given.keys() - readable})
        if self.problems:
            raise InputError(self.problems)
        return settings

    def _checkpoint(self, read: Mapping[str, Mapping[str, Any]]) -> About | None:
        """What the checkpoint to predict with says of itself."""
        finetune, resume = read["model"].get("finetune"), read["run"].get("resume")
        named = finetune or resume
        if finetune and resume:
            self.problems.append(f"--eval takes one checkpoint: --finetune {finetune} or --resume {resume}, not both")
            return None
        if not named:
            self.problems.append("--eval needs a checkpoint: --finetune FILE")
            return None
        if not Path(named).exists():
            self.problems.append(f"--{'finetune' if finetune else 'resume'} {named}: no such file or folder")
            return None
        if self.problems and answers_at_once(Path(named)) is None:
            return None  # what is wrong already need not wait for PyTorch
        try:
            keys = (
                read["model"].get(name, default)
                for name, default in (("model_key", "model|module"), ("model_prefix", ""))
            )
            return about(Path(named), *keys)
        except InputError as error:
            self.problems += error.problems
            return None

    def _task(self, checkpoint: About | None) -> type[TaskSettings] | None:
        """The settings class of the task; None where there is no telling which."""
        name = self.given.get("task")
        by = "--task"
        if name is not None:
            name = " ".join(name)
        elif checkpoint is not None:
            name = checkpoint.description.get("task") or self._task_by_head(checkpoint)
            by = f"{checkpoint.path}: made for the task"
        if name in TASKS:
            return settings_of(name)
        if name in PLANNED:
            self.problems.append(f"{by} {name} is not there yet; there is {', '.join(TASKS)}")
        elif name is None and not (self.problems and checkpoint is None):
            silent = "" if checkpoint is None else f", because {checkpoint.path} does not say what it is for"
            self.problems.append(f"--task is needed{silent}: one of {', '.join(TASKS)}; see --help")
        elif name is not None:
            self.problems.append(f"{by} {name or repr(name)}: one of {', '.join(TASKS)} is wanted")
        return None

    def _task_by_head(self, checkpoint: About) -> str | None:
        """For a checkpoint that does not say its task: the first task whose models have this head."""
        name = task_by_head(checkpoint.shapes)
        if name is not None:
            self.assumed += (f"{checkpoint.path} does not say its task; by its head it is --task {name}",)
        return name

    def _refuse_flags_of_other_tasks(self, task: type[TaskSettings]) -> None:
        own = {each.name for each in flags_of(task)}
        for names, flags in _own_flags().items():
            for each in flags:
                if each.name in self.given and each.name not in own:
                    owners = " and ".join(f"--task {name}" for name in names)
                    self.problems.append(f"--{each.name}: a flag of {owners}; --task {task.name} does not have it")
        for name, planned in PLANNED.items():
            self.problems += [
                f"--{each}: a flag of --task {name}, which is not there yet"
                for each in planned
                if f"planned {each}" in self.given
            ]

    def _take_over(
        self, checkpoint: About, task: type[TaskSettings], read: dict[str, dict[str, Any]], own: dict[str, Any]
    ) -> None:
        """Give flags the values that the checkpoint states; what was given must agree with it."""
        said, suffix = checkpoint.description, f"_{task.model_suffix}"
        if not task.can_use(said.get("task")):
            self._differs(checkpoint, "task", said["task"], f"--task {task.name}")
            raise InputError(self.problems)  # what else differs follows from it
        for values_read, flags in [(read[name], flags_of(CONCERNS[name])) for name in CONCERNS] + [
            (own, flags_of(task))
        ]:
            for each in flags:
                what = each.facts.said_by
                if what is None or what not in said:
                    continue
                stated = str(said[what]).removesuffix(suffix)
                try:
                    value = each.read(stated)
                except ValueError as error:
                    self.problems.append(f"{checkpoint.path}: its description says {what} {stated[:80]!r}: {error}")
                    continue
                given = values_read.setdefault(each.name, value)
                if given != value and str(given).removesuffix(suffix) != value:
                    self._differs(checkpoint, what, value, f"--{each.name} {given or repr(given)}")
        if "model" not in said:
            _guess(checkpoint, task, read)

    def _differs(self, checkpoint: About, what: str, stated: Any, given: str) -> None:
        self.problems.append(f"{checkpoint.path}: made with {what} {stated}, the command line says {given}")

    def _tokenizer(self, settings: Settings) -> Path | bytes | None:
        """The tokenizer of the command line, else the checkpoint's own; told when it does not fit.

        The checkpoint: to predict with, or to start from.
        """
        if not settings.task.uses_text:
            return None
        file = settings.data.sentencepiece_model
        checkpoint = settings.checkpoint if settings.run.eval else self._to_start_from(settings)
        source = file if file is not None or checkpoint is None else checkpoint.tokenizer
        if source is None and settings.run.eval and checkpoint is None:
            return None  # the checkpoint is wrong, which is told; it may hold a tokenizer
        if source is None:
            held = "" if checkpoint is None else f"; {checkpoint.path} holds none"
            self.problems.append(f"--sentencepiece_model is needed: the tokenizer, beit3.spm{held}")
            return None
        if file is not None and not file.is_file():
            self.problems.append(f"--sentencepiece_model {file}: no such file")
            return None
        try:
            tokenizer = Tokenizer(source)
        except InputError as error:
            self.problems += error.problems
            return None
        self.tokenizer = (str(tokenizer.path), tokenizer.sha256)
        if tokenizer.vocab_size > settings.model.vocab_size:
            self.problems.append(
                f"the tokenizer {tokenizer.path} makes ids up to {tokenizer.vocab_size - 1}, the model has "
                f"--vocab_size {settings.model.vocab_size}: is it the tokenizer of these weights?"
            )
        if checkpoint is not None:
            self.problems += other_tokenizer(checkpoint.path, checkpoint.description, tokenizer, held=file is None)
        return source

    def _look_at_index(self, settings: Settings) -> Settings:
        """Refuse an index that was made with another tokenizer; the rest is told when the run begins."""
        data, training = settings.data, not settings.run.eval
        if not data.data_path.is_dir() or settings.task.problems(data, training):
            return settings  # the files that are missing are what matters
        remarks: list[str] = []
        for fit in settings.task.index_fit(data, training, self.tokenizer):
            self.problems += [f"{problem}. Make the index again with yours" for problem in fit.tokenizer]
            remarks += fit.told
            if fit.stale:
                remarks.append(
                    f"the index is out of date: {'; '.join(fit.stale)}. To make it again: "
                    f"python3 -m tasks.make_index {settings.task.name} {data.data_path} SPM"
                )
        return replace(settings, remarks=tuple(remarks))

    def _named(self, settings: Settings, name: str) -> str:
        """The flag, or the checkpoint where it was the one that said the value."""
        said = settings.checkpoint is not None and name not in self.given
        return f"{settings.checkpoint.path}: its {name}" if said and settings.checkpoint else f"--{name}"

    def _model_problems(self, settings: Settings) -> list[str]:
        """An unknown model, and pictures of another size than its own."""
        task, name, size = settings.task, settings.model.model, settings.data.input_size
        if settings.run.eval and settings.checkpoint is None:
            return []  # the checkpoint is wrong, which is told; it may say the model
        known = names_with(task.model_suffix) if task.model_suffix in REGISTERED else []
        short = settings.model_name.removesuffix(f"_{task.model_suffix}")
        if short not in known:
            wanted = f"for --task {task.name}; one of {', '.join(sorted(known))}"
            if name == ModelSettings.model:
                return [f"--model is needed {wanted}"]
            return [f"{self._named(settings, 'model')} {name or repr(name)}: unknown {wanted}"]
        if size != pixels_of(short):
            return [f"{self._named(settings, 'input_size')} {size}: {name} takes pictures of {pixels_of(short)} pixels"]
        return []

    def _to_start_from(self, settings: Settings) -> About | None:
        """What the weights to start from say of themselves, where that can be read at once, or is needed.

        Of a `.pth` file they are read once more later, so it is opened here only for the tokenizer that it may hold.
        """
        named = Path(settings.model.finetune)
        if not settings.model.finetune or not named.exists():
            return None
        if answers_at_once(named) is None and (self.problems or settings.data.sentencepiece_model is not None):
            return None
        try:
            return about(named, settings.model.model_key, settings.model.model_prefix)
        except InputError as error:
            self.problems += error.problems
            return None


def _without_followers(problems: list[str], unread: set[str]) -> list[str]:
    """Of each flag whose value could not be read only the first problem: the next is one of its default."""
    kept: list[str] = []
    for problem in problems:
        about_flag = problem.split()[0].rstrip(":")
        if about_flag not in unread or not any(each.split()[0].rstrip(":") == about_flag for each in kept):
            kept.append(problem)
    return kept


def _size_by_name(name: str, task: type[TaskSettings]) -> dict[str, int]:
    """`--input_size` where it was not given: that of the model; nothing for a model that is not there."""
    return {"input_size": pixels_of(name)} if name in names_with(task.model_suffix) else {}


def _guess(checkpoint: About, task: type[TaskSettings], read: dict[str, dict[str, Any]]) -> None:
    """For a checkpoint that says nothing of itself: the model from the shapes, the rest as it was published."""
    name = name_by_shapes(checkpoint.shapes)
    if name is not None:
        read["model"].setdefault("model", name)
        read["model"].setdefault("vocab_size", checkpoint.shapes["beit3.text_embed.weight"][0])
    for flag_name, value in task.published.items():
        for concern, settings in CONCERNS.items():
            if flag_name in {each.name for each in flags_of(settings)}:
                read[concern].setdefault(flag_name, value)


def _problems(settings: Settings) -> list[str]:
    """What is wrong among several flags, and files that are not there."""
    model, run, deepspeed, task = settings.model, settings.run, settings.deepspeed, settings.task
    problems = []
    if not run.eval:  # the checkpoint to predict with has been looked at
        for name, value in (("finetune", model.finetune), ("resume", run.resume)):
            if value and not Path(value).exists():
                problems.append(f"--{name} {value}: no such file or folder")
    elif not run.output_dir:
        problems.append("--eval needs --output_dir, where the submission is written")
    if run.check and run.eval:
        problems.append("--check looks at a training; leave --eval out")
    wrong_split = run.eval and settings.data.split not in task.splits
    if wrong_split:
        split = settings.data.split
        problems.append(f"--split {split or repr(split)}: {task.name} has {', '.join(task.splits)}")
    if not re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:\d+)?", run.device):
        problems.append(f"--device {run.device}: auto, cpu, cuda or cuda:N is wanted")
    if (wrong := _freezing_problem(settings)) is not None:
        problems.append(wrong)
    if model.compile and deepspeed.enable_deepspeed and deepspeed.zero_stage == 3:
        problems.append("--compile: not with --zero_stage 3, which takes the layers' weights apart; use 0, 1 or 2")
    problems += settings.data.problems()
    return problems if wrong_split else problems + task.problems(_with_tokenizer(settings), training=not run.eval)


def _freezing_problem(settings: Settings) -> str | None:
    """What is wrong with `--freeze`; of an unknown model, which is told, not whether it has so many layers."""
    suffix, name = settings.task.model_suffix, settings.model_name
    known = suffix in REGISTERED and name.removesuffix(f"_{suffix}") in names_with(suffix)
    return freezing.problem_of(settings.model.freeze, layers_of(name) if known else None)


def _with_tokenizer(settings: Settings) -> DataSettings:
    """The data's settings, with the name of a tokenizer's file for advice that has one in it."""
    data, held = settings.data, settings.tokenizer
    file = data.sentencepiece_model or (held if isinstance(held, Path) else Path("beit3.spm"))
    return replace(data, sentencepiece_model=file)
