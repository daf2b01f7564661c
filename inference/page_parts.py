"""What stands on the page, and what its buttons ask the model. Imports gradio; `inference.page` looks for it first."""

from __future__ import annotations

import functools
import html
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import gradio
import numpy as np
import torch

from beit3.data.images import PIXEL_LIMIT, ImageError
from beit3.system.errors import InputError, printable
from inference.looked_at import looked_at, overlay
from inference.pictures import load_pixels
from inference.predictor import Predictor
from tasks.base import make_task

TOP = 5  # answers that are shown
MOST_BEAMS = 10
LONGEST_QUESTION = 1000  # characters; what goes beyond the model's own length is cut, as everywhere
FILE_LIMIT = 50 * 1024 * 1024  # bytes of an uploaded picture
WAITING = 20  # requests; further ones are told that the page is busy
FORGET_AFTER = 3600  # seconds after which uploaded pictures are deleted
MOST_EXAMPLES = 5

# Fonts of the reader's system: nothing is fetched.
THEME = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
# Small pictures are enlarged to the frame.
STYLE = "#picture img, #seen img { width: 100%; height: 100%; object-fit: contain; }"
MAP_NOTE = (
    "From grey to yellow: how much of the best answer came from each patch of the picture through the attention of all "
    "layers, as far as it spoke for the answer. It shows where the answer came from, not why it was given; a bright "
    "patch does not make an answer right."
)
BEFORE = "a picture is wanted: upload one, paste one, or choose an example"


def telling(function: Callable[..., Any]) -> Callable[..., Any]:
    """What is wrong with what was asked is told on the page in a sentence, escaped: gradio shows it as HTML."""

    @functools.wraps(function)
    def asked(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except ImageError as error:  # its message names the file as it lies on the server
            problem = printable(f"the picture cannot be read: {error.problem}")
        except (InputError, FloatingPointError) as error:
            problem = str(error)
        except torch.cuda.OutOfMemoryError:
            problem = (
                "the GPU has no memory left for this; close what else uses it, or start the page with --device cpu"
            )
        raise gradio.Error(
            html.escape(problem, quote=False), title="This cannot be done", duration=None, print_exception=False
        )

    return asked


class Desk:
    """Asks the model for the page, one request at a time. picture: path of an uploaded file; None: there is none."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._one_at_a_time = threading.Lock()

    def answer(self, picture: str | None, question: str | None, look: bool) -> tuple[dict[str, float], Any]:
        """The best answers with their confidences, and with `look` the picture under the map, uint8 (H, W, 3).

        Raises:
            InputError, ImageError, FloatingPointError: as `Predictor.answer`.
        """
        pixels = self._pixels(picture)
        question = question or ""
        if len(question) > LONGEST_QUESTION:
            raise InputError(f"a question of {len(question)} characters; {LONGEST_QUESTION} are the most")
        with self._one_at_a_time:
            answers = self.predictor.answer(pixels, question, top=TOP)
            seen = None
            if look:  # of the answer that is told: the map's own pass may round otherwise
                seen = overlay(pixels, looked_at(self.predictor, pixels, question, answers[0].text)).numpy()
        return {answer.text: answer.confidence for answer in answers}, seen

    def caption(self, picture: str | None, beams: float) -> tuple[str, list[list[Any]]]:
        """The best caption, and [caption, score] of each that the search ended with, the best first.

        Raises:
            InputError, ImageError, FloatingPointError: as `Predictor.caption`.
        """
        pixels = self._pixels(picture)
        if beams != int(beams) or not 1 <= beams <= MOST_BEAMS:
            raise InputError(f"{beams:g} beams; a whole number from 1 to {MOST_BEAMS} is wanted")
        with self._one_at_a_time:
            told = self.predictor.caption(pixels, num_beams=int(beams), top=int(beams))
        captions = told if isinstance(told, list) else [told]
        return captions[0].text, [[caption.text, round(caption.score, 3)] for caption in captions]

    @staticmethod
    def _pixels(picture: str | None) -> torch.Tensor:
        if picture is None:
            raise InputError(BEFORE)
        return load_pixels(picture)


def make_page(predictor: Predictor, examples: Sequence[Sequence[str]] = ()) -> gradio.Blocks:
    """The page for a model; `examples`: what `examples_of` gave."""
    title = "Ask about a picture" if predictor.asks else "Caption a picture"
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(FORGET_AFTER, FORGET_AFTER)) as page:
        gradio.HTML(f"<h1>{title}</h1><p>{html.escape(about_model(predictor))}</p>")
        with gradio.Row():
            (_answering if predictor.asks else _captioned)(Desk(predictor), examples)
    page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=True)
    return page


def about_model(predictor: Predictor) -> str:
    """Which model it is, and what its numbers mean, in plain text."""
    opened = predictor.opened
    model = f"{opened.model} from {opened.about.path}, on {predictor.device} in {predictor.precision}."
    if not predictor.asks:
        return f"{model} A caption's score is below 0, the nearer to it the better; only those of one picture compare."
    if not predictor.calibrated:
        return f"{model} Its confidences are not calibrated: they order the answers, and no more is promised."
    fitted = predictor.task.calibration
    return (
        f"{model} Its confidences are calibrated on {fitted.rows} validation questions, where confidence and score lay "
        f"{fitted.error_after:.1%} apart on average. Each answer has its own; they need not add up to 100 %."
    )


def _answering(desk: Desk, examples: Sequence[Sequence[str]]) -> None:
    with gradio.Column():
        picture = _picture()
        question = gradio.Textbox(
            label="Question", placeholder="What is in the picture?", max_length=LONGEST_QUESTION, elem_id="question"
        )
        look = gradio.Checkbox(True, label="show what the answer looked at", elem_id="look")
        ask = gradio.Button("Ask", variant="primary", elem_id="ask")
        _offer(examples, [picture, question])
    with gradio.Column():
        answers = gradio.Label(label="Answers", num_top_classes=TOP, elem_id="answers")
        seen = gradio.Image(
            label="What the best answer looked at", elem_id="seen", interactive=False, height=360, buttons=[]
        )
        gradio.HTML(f"<p>{html.escape(MAP_NOTE)}</p>")
    gradio.on(
        [ask.click, question.submit], telling(desk.answer), [picture, question, look], [answers, seen],
        api_name="answer", api_description="The best answers to a question about a picture, with confidences.",
    )  # fmt: skip


def _captioned(desk: Desk, examples: Sequence[Sequence[str]]) -> None:
    with gradio.Column():
        picture = _picture()
        at_first = min(desk.predictor.task.settings.num_beams, MOST_BEAMS)
        beams = gradio.Slider(1, MOST_BEAMS, at_first, step=1, label="beams of the search", elem_id="beams")
        ask = gradio.Button("Caption", variant="primary", elem_id="ask")
        _offer(examples, [picture])
    with gradio.Column():
        best = gradio.Textbox(label="Caption", elem_id="best", interactive=False, lines=2)
        others = gradio.Dataframe(
            headers=["caption", "score"], datatype=["str", "number"], label="What the search ended with",
            elem_id="captions", interactive=False, wrap=True, buttons=[], column_widths=["80%", "20%"],
        )  # fmt: skip
    ask.click(
        telling(desk.caption), [picture, beams], [best, others], api_name="caption",
        api_description="The best caption of a picture, and the others that the search ended with.",
    )  # fmt: skip


def _picture() -> Any:
    """An upload whose file reaches the handlers as it is; gradio would open it first and refuse it in its own words."""
    picture: Any = gradio.Image(
        label="Picture", type="filepath", sources=["upload", "clipboard"], elem_id="picture", height=360, buttons=[],
        placeholder=f"drop a picture or choose one, up to {FILE_LIMIT >> 20} MB, {PIXEL_LIMIT // 10**6} megapixels",
    )  # fmt: skip
    into_cache = picture.async_move_resource_to_block_cache

    async def uploaded_alone(named: Any) -> Any:
        if "://" in str(named):  # gradio would have this machine fetch it
            raise gradio.Error("a picture is uploaded; addresses are not fetched", print_exception=False)
        return await into_cache(named)

    picture.async_move_resource_to_block_cache = uploaded_alone
    picture.preprocess = lambda uploaded: None if uploaded is None else uploaded.path
    return picture


def _offer(examples: Sequence[Sequence[str]], inputs: list[Any]) -> None:
    if examples:
        gradio.Examples([list(each) for each in examples], inputs, label="Examples", api_visibility="private")


def examples_of(predictor: Predictor, folder: Path) -> tuple[list[list[str]], str | None]:
    """Pictures of the folder's test split, and with each a question where the model answers; and why there are none.

    Only of data whose tokenizer is the model's own, as the demo's: another model was not made for such pictures, and
    the questions lie there as token ids. No folder, or data for another model, is no problem to be told.
    """
    tokenizer = predictor.opened.tokenizer
    if tokenizer is None or not any(file.read_bytes() == tokenizer.content for file in folder.glob("*.spm")):
        return [], None
    try:
        task = make_task(predictor.opened.task, replace(predictor.opened.data, data_path=folder), tokenizer)
        task.adopt(predictor.opened.description)
        table = task.dataset("test", training=False).table
    except InputError as error:
        return [], str(error)
    rows = {str(table["image_path"][row]): row for row in reversed(range(len(table["image_path"])))}  # first of each
    offered = []
    for name, row in islice(sorted(rows.items(), key=lambda each: each[1]), MOST_EXAMPLES):
        asked = [tokenizer.decode(np.asarray(table["text_segment"][row]).tolist())] if predictor.asks else []
        offered.append([str(folder / name), *asked])
    return offered, None
