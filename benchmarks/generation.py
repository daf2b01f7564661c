"""Captions per second: `beit3.generation` against the slow search of the tests (one beam at a time, no cache).

`python -m benchmarks.generation`: base model, 224 pixels, 3 beams, the same weights and pictures, runs taking turns,
median of three; the captions are compared before anything is timed.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from beit3.generation import generate
from tests import reference
from tests.test_generation import EOS, slow_search

PICTURES, RUNS = 2, 3
SETTINGS: dict[str, Any] = {"mask_id": 87, "num_beams": 3, "length_penalty": 0.6, "max_tokens": 12}


def main() -> None:
    model: Any = reference.build("beit3_base_patch16_224_captioning", vocab_size=88)
    with torch.no_grad():
        model.mlm_head.bias[EOS] = -50.0  # captions of full length
    images = reference.images(9, PICTURES, 224)
    seconds: dict[str, list[float]] = {"generate": [], "slow search": []}
    for _ in range(RUNS):
        started = time.perf_counter()
        fast = generate(model, images, **SETTINGS).best()
        seconds["generate"].append(time.perf_counter() - started)
        started = time.perf_counter()
        slow = [slow_search(model, image, **SETTINGS)[0][1] for image in images]
        seconds["slow search"].append(time.perf_counter() - started)
        assert fast == slow, "the two disagree; timing them means nothing"
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(
            f"{name:<12} {PICTURES / median:6.2f} captions/s  (seconds: {', '.join(f'{s:.2f}' for s in seconds[name])})"
        )
    print(f"ratio {medians['slow search'] / medians['generate']:.1f} on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
