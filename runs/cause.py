"""Why a run ends, left for the launcher. Needs no PyTorch."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path


def leave(message: str) -> None:
    """Leave the message where torchrun looks for it, which repeats it below the traceback of its own."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        with contextlib.suppress(OSError):
            content = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(file).write_text(json.dumps({"message": content}), encoding="utf-8")
