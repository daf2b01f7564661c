"""How far something is: a bar on a terminal, a plain line now and then in a file."""

from __future__ import annotations

import contextlib
import logging
import sys
import time

from tqdm import tqdm

logger = logging.getLogger(__name__)


class ProgressBar:
    """Silent on all processes but the first. `done`: what was done before."""

    def __init__(self, what: str, total: int, is_main: bool, done: int = 0, seconds_between_lines: float = 30) -> None:
        self.what, self.total, self.done = what, total, done
        self.seconds_between_lines = seconds_between_lines
        self.started = self.last_line = time.monotonic()
        self.first = done
        on_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc=what, dynamic_ncols=True) if is_main and on_terminal else None
        self.lines = is_main and not on_terminal

    def advance(self, text: str = "") -> None:
        """One more is done; `text` says how it goes."""
        self.done += 1
        if self.bar is not None:
            if text:
                self.bar.set_postfix_str(text, refresh=False)
            with contextlib.suppress(OSError):  # the terminal was closed; what it showed goes on
                self.bar.update()
        elif self.lines and text and time.monotonic() - self.last_line >= self.seconds_between_lines:
            self.last_line = time.monotonic()
            left = (self.last_line - self.started) / max(self.done - self.first, 1) * (self.total - self.done)
            logger.info("%s %d/%d  %s  %s left", self.what, self.done, self.total, text, duration(left))

    def close(self) -> None:
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.close()


def duration(seconds: float) -> str:
    """As people write it: 3:07, 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
