"""`python -m tasks.make_index TASK DATA_PATH SPM [IMAGE_PATH]`: make a task's index files unless they are there.

The same as calling the data set's `make_dataset_index` in a Python shell.
"""

from __future__ import annotations

import sys
from pathlib import Path

from beit3.system.errors import InputError
from beit3.system.terminal import for_terminal, print_anywhere
from tasks import TASKS, settings_of


def main(task_name: str, data_path: str, tokenizer_path: str, image_path: str | None = None) -> int:
    print_anywhere()
    try:
        if task_name not in TASKS:
            raise InputError(f"task {task_name} is not there yet; there is {', '.join(TASKS)}")
        if not Path(tokenizer_path).is_file():
            raise InputError(f"{tokenizer_path}: no such tokenizer file")
        images = None if image_path is None else Path(image_path)
        settings_of(task_name).make_index(Path(data_path), tokenizer_path, images)
    except InputError as error:
        print(for_terminal(f"error: {error}"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
