"""The errors that users meet: mistakes in their inputs, pictures that cannot be read, disks that are full."""

from __future__ import annotations

from collections.abc import Sequence

MAX_LISTED = 20  # beyond this a longer list hides more than it shows


def printable(text: str) -> str:
    """The text with everything that could move a cursor or forge a line of a log written as its escape.

    These are the characters that are not printable, line breaks among them: "a\\n\\x1b[2J" for a line break and an
    escape sequence. Letters of any language stay as they are.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class InputError(ValueError):
    """Mistakes in what the user gave: files, folders, arguments. Lists every mistake found, not only the first.

    Each problem says what is wrong, what was found, what was wanted and how to mend it. `problems` holds all of
    them; the message shows the first `MAX_LISTED`. Survives pickling, so it can cross from a loader's worker.
    """

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        assert self.problems, "an InputError without a problem"
        super().__init__(_list_problems(self.problems))

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return type(self), (self.problems,)


class BadImageError(RuntimeError):
    """A picture that is missing or cannot be decoded; the message names the file, the row and the index line."""


class UnreadableError(BadImageError):
    """Pictures that evaluation could not read, told on all processes when all others have been looked at."""


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written; the message names it and says what became of the older ones."""


def _list_problems(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    shown = "".join(f"\n- {problem}" for problem in problems[:MAX_LISTED])
    hidden = len(problems) - MAX_LISTED
    return f"{len(problems)} problems:{shown}" + (f"\n… and {hidden} more" if hidden > 0 else "")
