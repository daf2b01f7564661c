"""What may be shown on a terminal or in a log, and printing that never fails."""

from __future__ import annotations

import sys

from beit3.system.errors import printable


def for_terminal(message: str) -> str:
    """A message of one or several lines as a log or terminal may show it: nothing in it moves a cursor, and no line
    behind the first can be taken for a message of its own, because it is indented."""
    return "\n  ".join(printable(line.replace("\t", " ")) for line in message.split("\n"))


def print_anywhere() -> None:
    """From here on printing does not fail where the terminal lacks a letter: its escape is shown instead."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what tests put in their place may not have it
            stream.reconfigure(errors="backslashreplace")
