"""Refusals that all processes of a run share."""

from __future__ import annotations

import utils
from beit3.system.errors import InputError


class SharedRefusal(InputError):
    """Raised by all processes alike, so the first one tells for all."""


def refuse_together(problems: list[str]) -> None:
    """Give the first process's problems to all. Collective.

    Raises:
        SharedRefusal: on all processes, when there are any.
    """
    problems = utils.broadcast(problems)
    if problems:
        raise SharedRefusal(problems)
