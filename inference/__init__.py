"""A trained model without its benchmark: answers and captions for anyone's pictures.

from inference import load
model = load("output/checkpoint-best")
model.answer("photo.jpg", "What colour is the car?", top=5)  # [Answer(text="red", confidence=0.93), …]
model.caption(["a.jpg", "b.jpg"])  # [Caption(text="a red car on a street", score=-1.7), …]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference.predictor import Predictor, load
    from tasks.base import Answer, Caption

__all__ = ["Answer", "Caption", "Predictor", "load"]


def __getattr__(name: str) -> Any:
    """PyTorch is loaded when the first of the names is asked for, so that help and mistakes are told at once."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import inference.predictor as predictor

    return getattr(predictor, name)
