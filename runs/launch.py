"""torchrun whose last line is the cause: `python -m runs.launch --nproc_per_node 8 run_beit3_finetuning.py …`

Takes what torchrun takes. When a process fails, torchrun itself ends with a traceback of its own code, below which
nobody looks for what the process said; here what it said comes last. The exit status is torchrun's, 1, or 128 + signal,
or that of processes which are done and say that a part of it failed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

PARTLY = 3  # exit status of `inference`: done, but some rows have an error


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run.main(list(sys.argv[1:] if argv is None else argv))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 128:  # it was told to stop, and did
            return failure.exitcode
        if failure.exitcode == PARTLY:
            print("done, but for some rows, which have an error", file=sys.stderr, flush=True)
            return PARTLY
        print(f"error: process {rank} {cause(failure)}", file=sys.stderr, flush=True)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


def cause(failure: ProcessFailure) -> str:
    """Why a process failed: in its own words where it left them, see `runs.session.tell`."""
    said = failure.message.get("message") if isinstance(failure.message, dict) else None
    if said:
        return f"ended: {str(said).strip()}"
    if failure.exitcode < 0:
        return f"was ended by {failure.signal_name()}"
    return f"ended with status {failure.exitcode}; what it said stands above"


if __name__ == "__main__":
    sys.exit(main())
