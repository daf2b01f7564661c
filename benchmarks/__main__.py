"""`python -m benchmarks`, started by run.sh: measures the groups of rows asked for and writes RESULTS.md."""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from beit3.system.machine import cores
from benchmarks import asking, gpu, models, own_data, pictures, questions, runs
from benchmarks.table import HEADER, Row, Settings, read_sections, run_row, write_sections

GPU, NO_GPU = "gpu", "not measured: no GPU on this machine"
RESULTS = Path(__file__).parent / "RESULTS.md"

GROUPS: dict[str, Callable[[Settings], list[Row]]] = {
    "loss": models.loss_rows,
    "encoder": models.encoder_rows,
    "train": models.train_rows,
    "ideas": models.idea_rows,
    "captions_per_image": models.captions_together_rows,
    "generation": models.generation_rows,
    "loader": pictures.loader_rows,
    "index": questions.index_rows,
    "own_data": own_data.own_rows,
    "dataset": questions.dataset_rows,
    "first_step": runs.first_step_rows,
    "evaluation": runs.evaluation_rows,
    "asking": asking.asking_rows,
    GPU: gpu.gpu_rows,
}


TITLE = """# Results of benchmarks/run.sh

Both sides of a line ran in one process, taking turns, on the same weights, data, dtype and batch, after what they give
was found equal; numbers are medians (least–most), `ratio` is this toolkit's median by the other's. "wanted" is what was
set as a goal before anything was measured. What the other side is: benchmarks/peers.py.
"""


def main() -> int:
    arguments = get_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # The one line there is to say of a GPU where there is none.
    sections = {GPU: [NO_GPU]} if not torch.cuda.is_available() and GPU not in read_sections(RESULTS) else {}
    failed = False
    with tempfile.TemporaryDirectory(prefix="beit3_benchmarks_") as folder:
        settings = Settings(arguments.quick, torch.device("cuda" if arguments.gpu else "cpu"), Path(folder))
        for name in [GPU] if arguments.gpu else arguments.only:
            if name == GPU and not torch.cuda.is_available():
                print(NO_GPU)
                continue
            sections[name] = [conditions(arguments.quick), "", *HEADER]
            for row in GROUPS[name](settings):
                lines, went_well = run_row(row)
                print("\n".join(lines), flush=True)
                sections[name] += lines
                failed |= not went_well
            write_sections(RESULTS, TITLE, sections, order=list(GROUPS))  # an interrupted run keeps what it has
    write_sections(RESULTS, TITLE, sections, order=list(GROUPS))
    print(f"written to {RESULTS}")
    return int(failed)


def get_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer repeats")
    parser.add_argument("--gpu", action="store_true", help="what a GPU can tell, and nothing else")
    parser.add_argument("--only", help=f"groups with commas between: {','.join(GROUPS)}")
    arguments = parser.parse_args()
    everything = [name for name in GROUPS if name != GPU]
    arguments.only = arguments.only.split(",") if arguments.only else everything
    unknown = sorted(set(arguments.only) - set(everything))
    if unknown:
        parser.error(f"--only {','.join(unknown)}: there are {', '.join(everything)}")
    return arguments


def conditions(quick: bool) -> str:
    """The machine, the versions and the kind of run, in a line."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    packages = ["torch", "torchvision", "transformers", "Pillow"]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return (
        f"{'Quick run' if quick else 'Full run'} of {datetime.date.today()} at commit {commit()}: {processor()}, "
        f"{cores()} cores, {torch.get_num_threads()} threads, "
        f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB{gpu}; "
        f"Python {platform.python_version()}, {versions}."
    )


def processor() -> str:
    """What the processor calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of what is checked out, with a + when files other than the results differ from it."""

    def git(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *command], cwd=RESULTS.parent, capture_output=True, text=True, check=False)

    described = git("describe", "--always", "--exclude=*").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", ":(top)", f":(exclude){RESULTS.name}").returncode
    return described + "+" * bool(changed) if described else "unknown"


if __name__ == "__main__":
    sys.exit(main())
