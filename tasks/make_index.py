"""`python -m tasks.make_index TASK DATA_PATH SPM [IMAGE_PATH] [FLAGS]`: make a task's index unless it is there.

The same as calling the data set's `make_dataset_index` in a Python shell. FLAGS: those of a training; the ones that
decide an index of own data are taken, such as `--train vqa.csv`, and the others are for the training to judge.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from beit3.system.errors import InputError
from beit3.system.flags import Parser, flags_of, values
from beit3.system.terminal import for_terminal, print_anywhere
from tasks import TASKS, settings_of

T = TypeVar("T")


def main(*arguments: str) -> int:
    print_anywhere()
    try:
        task_name, data_path, tokenizer_path, image_path, flags = _parts(arguments)
        if task_name not in TASKS:
            raise InputError(f"task {task_name} is not there yet; there is {', '.join(TASKS)}")
        if not Path(tokenizer_path).is_file():
            raise InputError(f"{tokenizer_path}: no such tokenizer file")
        settings = read_flags(settings_of(task_name), flags)
        image_path = last_given(flags, "--image_path") or image_path
        settings.make_index(Path(data_path), tokenizer_path, None if image_path is None else Path(image_path))
    except InputError as error:
        print(for_terminal(f"error: {error}"), file=sys.stderr)
        return 2
    return 0


def _parts(arguments: Sequence[str]) -> tuple[str, str, str, str | None, Sequence[str]]:
    """Task, data path, tokenizer, folder of pictures, flags."""
    first = next((place for place, word in enumerate(arguments) if word.startswith("--")), len(arguments))
    if first not in (3, 4):
        raise InputError(f"three or four values are wanted before the flags, found {first}; {__doc__}")
    named = arguments[:first]
    return named[0], named[1], named[2], named[3] if first == 4 else None, arguments[first:]


def read_flags(kind: type[T], flags: Sequence[str]) -> T:
    """Settings of a kind, with those of its own flags that are among these.

    Raises:
        InputError: one of them has a value that it does not take.
    """
    parser = Parser()
    for each in flags_of(kind):
        each.add_to(parser, any_count=True)
    parsed, _ = parser.parse_known_args(list(flags))
    problems: list[str] = []
    read: dict[str, Any] = values(kind, vars(parsed), problems)
    if problems:
        raise InputError(problems)
    return kind(**read)


def last_given(flags: Sequence[str], name: str) -> str | None:
    """The value of the last flag of a name among these; None where there is none."""
    found = None
    for place, word in enumerate(flags):
        if word == name and place + 1 < len(flags):
            found = flags[place + 1]
        elif word.startswith(f"{name}="):
            found = word.removeprefix(f"{name}=")
    return found


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
