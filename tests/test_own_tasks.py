"""The tasks of people's own data through the entry point: they learn, are scored from the rows, and answer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import run_beit3_finetuning as run
from beit3.data.augmentation import EvalTransform
from beit3.model.description import about
from beit3.system.errors import InputError
from datasets import CaptionDataset, VQADataset
from tasks.vqav2.answers import vqa_accuracy
from tasks.vqav2.looking import look
from tasks.vqav2.own_scores import answer_type, report_on, row_score
from tests.own_data import SPM, album, lines, write_csv

TINY = [
    "--model", "beit3_tiny_patch16_64", "--vocab_size", "512", "--sentencepiece_model", str(SPM), "--batch_size", "16",
    "--layer_decay", "1.0", "--drop_path", "0", "--crop_scale", "1.0", "1.0", "--num_workers", "0", "--device", "cpu",
    "--clip_grad", "1.0", "--num_max_bpe_tokens", "24", "--lr", "1e-3", "--warmup_steps", "4",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    photos = album(folder, pictures=45)
    common = {"data_path": folder / "index", "image_path": photos, "tokenizer": SPM, "val_fraction": 0.2}
    VQADataset.make_dataset_index(train=folder / "vqa.csv", progress=False, **common)
    CaptionDataset.make_dataset_index(train=folder / "captions.csv", progress=False, **common)
    return folder


def flags(data, task, out, *more):
    paths = ["--data_path", str(data / "index"), "--image_path", str(data / "Fotos"), "--output_dir", str(out)]
    return ["--task", task, *TINY, *paths, *more]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    assert run.main(flags(data, "vqa", out, "--epochs", "12")) == 0
    return out


def log_of(out):
    return lines(Path(out) / "log.txt")


def test_questions_are_learned_and_scored_from_the_rows(trained):
    last = log_of(trained)[-1]
    assert {"val_score", "val_exact_match", "val_macro_average"} <= last.keys()
    assert max(epoch["val_score"] for epoch in log_of(trained)) >= 80  # of three colours, and yes and no
    said = about(trained / "checkpoint-best").description
    assert said["task"] == "vqa" and set(said["answers"]) == {"red", "green", "blue", "yes", "no"}


def test_a_prediction_says_question_answer_right_answers_and_scores(data, trained, tmp_path):
    argv = ["--eval", "--finetune", str(trained / "checkpoint-best"), "--split", "val", "--num_workers", "0"]
    paths = ["--data_path", str(data / "index"), "--image_path", str(data / "Fotos"), "--output_dir", str(tmp_path)]
    assert run.main([*argv, *paths, "--device", "cpu"]) == 0
    rows, asked = lines(tmp_path / "predictions.jsonl"), lines(data / "index" / "vqa.val.jsonl")
    assert [row["question"] for row in rows] == [line["question"] for line in asked]
    report = json.loads((tmp_path / "vqa_result_val.json").read_text())
    right = [row["answer"] in line["answers"] for row, line in zip(rows, asked, strict=True)]
    assert report["score"] == pytest.approx(100 * np.mean(right))
    assert report["score"] == pytest.approx(max(epoch["val_score"] for epoch in log_of(trained)))
    submission = json.loads((tmp_path / "submit_vqa_val.json").read_text())
    assert [entry["answer"] for entry in submission] == [row["answer"] for row in rows]


def test_a_split_that_the_data_has_not_is_named_with_what_there_is(data, trained, tmp_path, capsys):
    argv = ["--eval", "--finetune", str(trained / "checkpoint-best"), "--data_path", str(data / "index")]
    assert run.main([*argv, "--output_dir", str(tmp_path)]) == 2
    assert "vqa.test.jsonl not found" in (said := capsys.readouterr().err) and "--split val" in said


def test_captions_are_learned_and_scored_from_the_rows(data, tmp_path):
    argv = flags(data, "captioning", tmp_path, "--epochs", "10", "--captioning_mask_prob", "0.7")
    assert run.main(argv) == 0
    best = max(epoch["val_CIDEr"] for epoch in log_of(tmp_path))
    assert best > 2  # always the same caption: 0.6
    assert about(tmp_path / "checkpoint-best").description["task"] == "captioning"


def test_other_answers_go_on_from_a_checkpoint_row_by_row(data, trained, tmp_path, capsys):
    table = write_csv(
        tmp_path / "more.csv",
        ["image", "question", "answer", "split"],
        [
            ["Küche/Bild 0.png", "Is it red?", "yes", "train"],
            ["写真/a b/Bild 1.png", "Is it red?", "certainly not", "train"],
            ["Küche/Bild 2.png", "Is it red?", "certainly not", "val"],
        ],
    )
    VQADataset.make_dataset_index(
        train=table, data_path=tmp_path / "index", image_path=data / "Fotos", tokenizer=SPM, progress=False
    )
    argv = ["--data_path", str(tmp_path / "index"), "--finetune", str(trained / "checkpoint-best")]
    more = ["--batch_size", "2", "--epochs", "1", "--no_save_ckpt"]
    assert run.main(flags(data, "vqa", tmp_path / "out", *argv, *more)) == 0
    assert "1 answers kept, 1 new, 4 gone" in capsys.readouterr().err


def test_weights_scale_the_loss_of_their_rows(data):
    dataset = VQADataset(
        data / "index", "train", EvalTransform(64), vocab_size=512, num_answers=5, image_path=data / "Fotos"
    )
    assert dataset.weights is None
    balanced = VQADataset(
        data / "index",
        "train",
        EvalTransform(64),
        balance=True,
        vocab_size=512,
        num_answers=5,
        image_path=data / "Fotos",
    )
    sums = {}
    for row, weight in enumerate(balanced.weights.tolist()):
        [label] = balanced.table["labels"][row].tolist()
        sums[label] = sums.get(label, 0) + weight
    assert np.allclose(list(sums.values()), len(balanced) / 5) and balanced.weights.mean() == pytest.approx(1)


def test_a_weighted_step_is_the_mean_of_weight_times_loss():
    from tasks.settings import DataSettings
    from tasks.vqav2.own_settings import VQASettings
    from tasks.vqav2.own_task import VQA

    logits = torch.tensor([[1.0, -1.0], [0.5, 2.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    batch = {"image": None, "token_ids": None, "padding_mask": None, "targets": targets}
    task = VQA(VQASettings(), DataSettings(), None)

    def loss(weights):
        held = batch if weights is None else {**batch, "weight": torch.tensor(weights)}
        return float(task.training_step(lambda **_: logits, held, 0)["loss"])

    def of_row(row):
        p = torch.sigmoid(logits[row])
        return float(-(targets[row] * p.log() + (1 - targets[row]) * (1 - p).log()).sum())

    assert loss(None) == pytest.approx((of_row(0) + of_row(1)) / 2)
    assert loss([1.0, 1.0]) == pytest.approx(loss(None))
    assert loss([3.0, 0.5]) == pytest.approx((3 * of_row(0) + 0.5 * of_row(1)) / 2)


def test_weights_of_captions_reach_their_hidden_tokens(tmp_path, data):
    rows = [["Küche/Bild 0.png", "A red wall.", 1, "train"], ["Küche/Bild 2.png", "A blue wall.", 3, "train"]]
    rows += [["Küche/Bild 4.png", "A wall.", 1, "val"]]
    table = write_csv(tmp_path / "c.csv", ["image", "caption", "weight", "split"], rows)
    CaptionDataset.make_dataset_index(train=table, image_path=data / "Fotos", tokenizer=SPM, progress=False)
    dataset = CaptionDataset(
        tmp_path, "train", EvalTransform(64), vocab_size=512, image_path=data / "Fotos", num_max_bpe_tokens=24
    )
    batch = dataset.collate([dataset[0], dataset[1]])
    of_text = batch["masked_index"] // batch["masked_ids"].shape[1]
    assert batch["token_weight"].tolist() == [[1.0, 3.0][text] for text in of_text.tolist()]


def test_the_report_is_what_is_worked_out_by_hand():
    votes = [{"red": 1}, {"red": 2, "rot": 1}, {"2": 1}, {"yes": 10}, {"no": 7, "yes": 3}]
    questions = ["What colour is it?", "What colour here?", "How many?", "Is it red?", "Is it big?"]
    report = report_on(["red", "rot", "3", "yes", "yes"], questions, votes, normalize=False)
    assert report["score"] == pytest.approx(100 * (1 + 1 + 0 + 1 + 0.9) / 5)
    assert report["exact_match"] == pytest.approx(80)
    assert report["by_answer_type"] == pytest.approx({"other": 100.0, "number": 0.0, "yes/no": 95.0})
    assert report["by_question_beginning"] == pytest.approx({"what colour": 100.0, "how many?": 0.0, "is it": 95.0})
    assert report["macro_average"] == pytest.approx(100 * (1.0 + 0.0 + 1.0 + 0.9) / 4)  # red, 2, yes, no
    assert report["commonest_answer"] == {"answer": "red", "score": pytest.approx(40)}
    # Of "is it" one says yes, one no: each guesses the other's. The colours guess each other, "how many" the commonest.
    assert report["commonest_by_question"] == {"score": pytest.approx(100 * (1 + 1 + 0 + 0 + 0.9) / 5)}
    annotations = [
        {"question_id": n, "answers": [{"answer": a} for a in votes[n] for _ in range(votes[n][a])],
         "answer_type": "x", "question_type": "y"}
        for n in (3, 4)
    ]  # fmt: skip
    official = vqa_accuracy({3: "yes", 4: "yes"}, annotations)["overall"]
    assert (report["official_vqa_accuracy"], report["questions_of_ten_people"]) == (pytest.approx(official), 2)


def test_a_report_of_nothing_but_right_and_of_one_row():
    report = report_on(["ja"], ["Is it?"], [{"ja": 1}], normalize=False)
    assert report["score"] == report["exact_match"] == report["macro_average"] == 100
    assert "official_vqa_accuracy" not in report


@pytest.mark.parametrize(
    ("answer", "votes", "normalize", "score"),
    [("The Red.", {"red": 1}, True, 1.0), ("Red", {"red": 1}, False, 0.0), ("two", {"2": 1, "3": 3}, True, 0.75)],
)
def test_a_score_compares_answers_as_the_index_counts_them(answer, votes, normalize, score):
    assert row_score(answer, votes, normalize) == score


@pytest.mark.parametrize(
    ("answer", "kind"),
    [("Yes", "yes/no"), ("no.", "yes/no"), ("two", "number"), ("3,5", "number"), ("12:30", "number"), ("red", "other")],
)
def test_the_type_of_an_answer(answer, kind):
    assert answer_type({answer: 1}) == kind


def test_a_look_at_labels_tells_what_can_be_had_without_seeing(data):
    train, val = (
        VQADataset(data / "index", s, EvalTransform(64), vocab_size=512, num_answers=5, image_path=data / "Fotos")
        for s in ("train", "val")
    )
    answers = [line["answer"] for line in lines(data / "index" / "answer2label.txt")]
    no = [line for line in lines(data / "index" / "vqa.train.jsonl") if line["labels"] == [answers.index("no")]]
    said = look(
        train, val, answers, lambda ids: "what color" if ids[0] == train.table["text_segment"][0][0] else "is it"
    )
    assert f"'no' is the commonest, of {100 * len(no) / len(train):.1f} % of the training rows" in said[0]
    assert "highest score that validation allows with these answers: 100.00" in said[1]
    by_hand = [line["answers"] for line in lines(data / "index" / "vqa.val.jsonl")]
    assert f"scores {100 * np.mean(['no' in given for given in by_hand]):.2f}, the commonest by" in said[2]


def test_a_check_trains_nothing_and_says_what_a_training_takes(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert run.main(flags(data, "vqa", out, "--check", "--epochs", "3")) == 0
    assert not out.exists()
    said = capsys.readouterr().err
    assert "'no' is the commonest" in said and "45 files; all of them can be read" in said
    assert "proposed: --batch_size 16" in said and "s per step of 16" in said
    assert "training: 3 epochs of 4 steps" in said and "nothing has to be mended" in said


def test_a_check_of_captions_tells_the_constant_caption(data, tmp_path, capsys):
    assert run.main(flags(data, "captioning", tmp_path, "--check", "--epochs", "3")) == 0
    assert "is reached by saying" in capsys.readouterr().err


def test_a_check_ends_with_2_where_pictures_must_be_mended(data, tmp_path, capsys):
    photos = album(tmp_path, pictures=9)
    VQADataset.make_dataset_index(train=tmp_path / "vqa.csv", image_path=photos, tokenizer=SPM, progress=False)
    (photos / "Küche" / "Bild 0.png").write_bytes(b"no picture at all")
    (photos / "Küche" / "Bild 4.png").write_bytes((photos / "Küche" / "Bild 2.png").read_bytes())
    paths = ["--data_path", str(tmp_path), "--image_path", str(photos), "--output_dir", str(tmp_path / "o")]
    assert run.main(["--task", "vqa", *TINY, *paths, "--check"]) == 2
    said = capsys.readouterr().err
    assert "to be mended: " in said and "Bild 0.png" in said
    assert "1 have the content of another: Küche/Bild 4.png is Küche/Bild 2.png" in said


def test_weights_in_an_index_are_numbers_of_at_least_0(tmp_path, data):
    for name in ("vqa.train.jsonl", "answer2label.txt"):
        (tmp_path / name).write_bytes((data / "index" / name).read_bytes())
    first, *others = lines(tmp_path / "vqa.train.jsonl")
    written = [json.dumps(line) for line in [{**first, "weight": -1}, *others]]
    (tmp_path / "vqa.train.jsonl").write_text("\n".join(written))
    with pytest.raises(InputError, match=r"vqa.train.jsonl:1: weight: a number of at least 0 expected, found -1"):
        VQADataset(tmp_path, "train", EvalTransform(64), vocab_size=512, num_answers=5, image_path=data / "Fotos")


def test_rows_that_say_scores_and_no_votes_are_worth_these():
    worth = {"red": 0.3, "rot": 1.0}
    assert [row_score(said, {"rot": 1, "red": 1}, False, worth) for said in ("red", "rot", "blue")] == [0.3, 1.0, 0.0]
    assert row_score("The Red", {"red": 1}, True, {"red": 0.6}) == 0.6
    report = report_on(["red", "no"], ["What?", "Is it?"], [{"rot": 1, "red": 1}, {"no": 1}], False, [worth, None])
    assert (report["score"], report["exact_match"]) == (pytest.approx(65), 100)
    assert report["commonest_answer"] == {"answer": "rot", "score": pytest.approx(50)}
