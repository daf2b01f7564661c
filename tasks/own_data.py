"""`python -m tasks.own_data DATA_PATH TASK IMAGE_PATH [FLAGS]`: what a script has to know of somebody's own data.

Values may be empty. Prints three lines: the task, which follows from the columns where none is named; the folder of the
index, beside the table where none is named; the folder of the pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path

from beit3.system.errors import InputError
from beit3.system.terminal import for_terminal, print_anywhere
from sources.gathering import NoSource, home_of, sources_of
from sources.settings import SourceSettings
from tasks.make_index import last_given, read_flags

QUESTIONS, CAPTIONS = OWN_TASKS = ("vqa", "captioning")


def main(data_path: str, task: str, image_path: str, *flags: str) -> int:
    print_anywhere()
    try:
        for line in told(data_path, task, image_path, *flags):
            print(line)
    except InputError as error:
        print(for_terminal(f"error: {error}"), file=sys.stderr)
        return 2
    return 0


def told(data_path: str, task: str, image_path: str, *flags: str) -> tuple[str, str, str]:
    """Task, folder of the index, folder of the pictures. Raises InputError as `sources_of` does."""
    settings = read_flags(SourceSettings, flags)
    task, image_path = last_given(flags, "--task") or task, last_given(flags, "--image_path") or image_path
    data = Path(data_path) if data_path else None
    asks = {QUESTIONS: True, CAPTIONS: False}.get(task)
    try:
        sources = sources_of(settings, data, asks)
    except NoSource:
        made = [name for name in OWN_TASKS if data is not None and (data / f"{name}.train.jsonl").is_file()]
        named = task or (made[0] if len(made) == 1 else "")
        if named not in made:
            raise
        return named, data_path, image_path or data_path  # an index without its sources
    found = QUESTIONS if next(iter(sources.values())).asks else CAPTIONS
    home = str(home_of(sources))
    data_path = data_path or home
    unpacked = any(source.unpacked_bytes for source in sources.values())
    return task or found, data_path, data_path if unpacked else image_path or home


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
