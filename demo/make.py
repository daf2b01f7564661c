"""Makes the demo: `python -m demo.make OUT_DIR`.

OUT_DIR then looks like a folder with COCO and VQA v2 in it, only smaller and made up:

    train2014/ val2014/ test2015/   pictures of 64 x 64 pixels under COCO's names
    vqa/                            the six official files of VQA v2, and the answers for test2015 besides
    dataset_coco.json               five captions per picture, in Karpathy's format
    demo.spm                        a SentencePiece model trained on the demo's texts, in XLM-RoBERTa's order of pieces
    demo.json                       how it was made

`python -m demo.make --table OUT_DIR` makes another one, a table of questions as people bring it: see `demo.table`.

The same settings give the same bytes. No scene of the training pictures occurs in the other splits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from beit3.system.errors import InputError
from demo.making import make_folder, train_tokenizer
from demo.scenes import BACKGROUNDS, BLIND_GREY, PICTURE_SIZE, Scene, draw, pick_scenes, share_out
from demo.table import make_table
from demo.texts import ANSWER_TYPES, Question, Questioner, captions, ten_answers, tokens

VERSION = 1  # of what is made from the same settings; raise it with every change of the bytes
LARGEST_SPLIT = 99_999  # pictures; the ids of the splits begin 100,000 apart
SMALLEST_SPLIT = 10

_FIRST_ID = {"train2014": 1, "val2014": 100_001, "test2015": 200_001}
_SCENE_SHARES = {"train": 0.66, "restval": 0.04, "val": 0.1, "test": 0.1, "test2015": 0.1}
_VAL_PATTERN = ("val", "test", "val", "test", "restval")  # which of Karpathy's splits the pictures of val2014 go to
_JPEG_QUALITY = 95  # with colours at full resolution: halved, shapes this small get coloured rims
_INFO = {
    "description": "Made-up pictures and questions in the format of VQA v2.0",
    "url": "",
    "version": "2.0",
    "year": 2017,
    "contributor": "demo.make",
    "date_created": "2017-04-26 17:07:13",
}
_LICENSE = {"url": "", "name": "Made by a program; free to use for anything"}


@dataclass(frozen=True)
class Settings:
    """What the demo depends on. Sizes are numbers of pictures; `blind` makes each picture one grey."""

    seed: int = 0
    train: int = 6000
    val: int = 400
    test: int = 200
    blind: bool = False


@dataclass(frozen=True)
class Picture:
    """One picture of the plan, with all that is said about it."""

    id: int  # COCO's image id
    folder: str  # "train2014", "val2014" or "test2015"
    split: str  # Karpathy's ("train", "restval", "val", "test"), or "test2015", which has no captions there
    scene: Scene
    shade: str  # key of BACKGROUNDS
    captions: list[str]
    questions: list[Question]

    @property
    def filename(self) -> str:
        return f"COCO_{self.folder}_{self.id:012d}.jpg"


def make_demo(
    out: str | os.PathLike[str],
    seed: int = 0,
    train: int = 6000,
    val: int = 400,
    test: int = 200,
    blind: bool = False,
) -> Path:
    """Makes the demo in the folder `out` and returns its path, see `make_folder`.

    Args:
        seed: another seed, other pictures and texts.
        train, val, test: numbers of pictures in train2014/, val2014/ and test2015/. With fewer than a few hundred, some
            answers are too rare for VQAv2's vocabulary (nine occurrences).
        blind: the same questions and captions, but every picture is one grey: what a model learns from these it knows
            without seeing.

    Raises:
        InputError: a size is out of range, or `out` holds something else.
    """
    settings = Settings(seed, train, val, test, blind)
    _check_sizes(settings)
    marker = {"made_by": "demo.make", "version": VERSION, **asdict(settings)}
    return make_folder(out, marker, lambda folder: _write_demo(folder, settings))


def plan_pictures(settings: Settings) -> list[Picture]:
    """All pictures with their scenes and texts, in the order train2014, val2014, test2015; nothing is drawn yet."""
    rng = random.Random(f"plan {settings.seed}")
    dealt = share_out(_SCENE_SHARES, rng)
    val_splits = [_VAL_PATTERN[i % len(_VAL_PATTERN)] for i in range(settings.val)]
    splits = {
        "train2014": ["train"] * settings.train,
        "val2014": val_splits,
        "test2015": ["test2015"] * settings.test,
    }
    scenes = {
        split: iter(pick_scenes(dealt[split], sum(names.count(split) for names in splits.values()), rng))
        for split in _SCENE_SHARES
    }
    pictures = []
    for folder, names in splits.items():
        questioner = Questioner(rng)  # balanced within each folder
        for number, split in enumerate(names):
            scene, shade = next(scenes[split]), rng.choice(list(BACKGROUNDS))
            said, asked = captions(scene, shade, rng), questioner.ask(scene)
            pictures.append(Picture(_FIRST_ID[folder] + number, folder, split, scene, shade, said, asked))
    return pictures


def _check_sizes(settings: Settings) -> None:
    problems = [
        f"{name} = {size} pictures is out of range: {SMALLEST_SPLIT} to {LARGEST_SPLIT}"
        for name, size in (("train", settings.train), ("val", settings.val), ("test", settings.test))
        if not SMALLEST_SPLIT <= size <= LARGEST_SPLIT
    ]
    if problems:
        raise InputError(problems)


def _write_demo(folder: Path, settings: Settings) -> None:
    pictures = plan_pictures(settings)
    _write_pictures(folder, pictures, settings)
    _write_vqa(folder / "vqa", pictures, settings.seed)
    _write_json(folder / "dataset_coco.json", {"images": _karpathy_images(pictures), "dataset": "coco"})
    (folder / "demo.spm").write_bytes(train_tokenizer(_texts(pictures)))


def _write_pictures(folder: Path, pictures: list[Picture], settings: Settings) -> None:
    blank = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), BLIND_GREY)
    for name in _FIRST_ID:
        (folder / name).mkdir()
    for picture in pictures:
        rng = random.Random(f"picture {settings.seed} {picture.id}")
        image = blank if settings.blind else draw(picture.scene, rng.choice(BACKGROUNDS[picture.shade]), rng)
        image.save(folder / picture.folder / picture.filename, quality=_JPEG_QUALITY, subsampling=0)


def _write_vqa(folder: Path, pictures: list[Picture], seed: int) -> None:
    """Questions and annotations of VQA v2; question ids are image id x 1000 + number, as in the official files.

    test-dev2015 is a part of the questions of test2015: those of every fourth picture.
    """
    folder.mkdir()
    rng = random.Random(f"answers {seed}")
    for subset in (*_FIRST_ID, "test-dev2015"):
        source = "test2015" if subset == "test-dev2015" else subset
        chosen = [picture for picture in pictures if picture.folder == source]
        if subset != source:
            chosen = chosen[::4]
        rows = [
            (picture.id, picture.id * 1000 + number, question)
            for picture in chosen
            for number, question in enumerate(picture.questions)
        ]
        common = {"info": _INFO, "license": _LICENSE, "data_type": "mscoco", "data_subtype": subset}
        questions = [
            {"image_id": image_id, "question": question.text, "question_id": question_id}
            for image_id, question_id, question in rows
        ]
        name = f"v2_OpenEnded_mscoco_{subset}_questions.json"
        _write_json(folder / name, {**common, "task_type": "Open-Ended", "questions": questions})
        if subset == source:
            annotations = [_annotation(*row, rng) for row in rows]
            _write_json(folder / f"v2_mscoco_{subset}_annotations.json", {**common, "annotations": annotations})


def _annotation(image_id: int, question_id: int, question: Question, rng: random.Random) -> dict[str, Any]:
    return {
        "question_type": question.type,
        "multiple_choice_answer": question.answer,
        "answers": ten_answers(question, rng),
        "image_id": image_id,
        "answer_type": ANSWER_TYPES[question.kind],
        "question_id": question_id,
    }


def _karpathy_images(pictures: list[Picture]) -> list[dict[str, Any]]:
    """The pictures of train2014 and val2014 as `dataset_coco.json` lists them."""
    images = []
    captioned = [picture for picture in pictures if picture.folder != "test2015"]
    for imgid, picture in enumerate(captioned):
        sentids = range(5 * imgid, 5 * imgid + 5)
        sentences = [
            {"tokens": tokens(caption), "raw": caption, "imgid": imgid, "sentid": sentid}
            for sentid, caption in zip(sentids, picture.captions, strict=True)
        ]
        images.append(
            {
                "filepath": picture.folder,
                "sentids": list(sentids),
                "filename": picture.filename,
                "imgid": imgid,
                "split": picture.split,
                "sentences": sentences,
                "cocoid": picture.id,
            }
        )
    return images


def _texts(pictures: list[Picture]) -> list[str]:
    """What the tokenizer learns from: the different texts of the training pictures, in order of appearance."""
    training = [picture for picture in pictures if picture.split == "train"]
    texts = (
        text for picture in training for text in (*picture.captions, *(question.text for question in picture.questions))
    )
    return list(dict.fromkeys(texts))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    defaults = asdict(Settings())
    parser = argparse.ArgumentParser(prog="python -m demo.make", description="Makes the demo data set.")
    parser.add_argument("out_dir", help="the folder to make; nothing is overwritten")
    parser.add_argument(
        "--table", action="store_true", help="300 pictures and a CSV table instead, to try one's own data with"
    )
    parser.add_argument("--seed", type=int, default=defaults["seed"], help="another seed, other pictures (%(default)s)")
    for name in ("train", "val", "test"):
        parser.add_argument(f"--{name}", type=int, help=f"pictures for {name} ({defaults[name]})")
    parser.add_argument("--blind", action="store_true", help="one grey instead of each picture, for the baseline")
    given = parser.parse_args(arguments)
    sizes = {name: getattr(given, name) for name in ("train", "val", "test") if getattr(given, name) is not None}
    if given.table and (sizes or given.blind):
        parser.error("--table makes 300 pictures that can be seen: leave out --train, --val, --test and --blind")
    try:
        if given.table:
            made = make_table(given.out_dir, given.seed)
        else:
            made = make_demo(given.out_dir, given.seed, **sizes, blind=given.blind)
    except InputError as error:
        parser.error(str(error))
    print(f"The demo is in {made}")


if __name__ == "__main__":
    main()
