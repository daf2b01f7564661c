"""Answers stay with their texts: a head that is fine-tuned or asked on data that numbers the answers otherwise."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import modeling_finetune  # noqa: F401  registers the models
import run_beit3_finetuning as run
from beit3.data.tokenizer import Tokenizer
from beit3.model.weights import Checkpoint, HeadRows, load_weights, read_checkpoint, write_weights
from beit3.system.errors import InputError
from datasets import VQAv2Dataset
from engine_for_finetuning import evaluate
from runs.command_line import read_settings
from tasks.base import make_task
from tasks.captioning.settings import CaptioningSettings
from tasks.settings import DataSettings
from tasks.vqav2.answers import answer_lines, answers_said, is_exact, rows_by_text, vqa_accuracy
from tasks.vqav2.settings import VQAv2Settings
from tasks.vqav2.task import _report_lines
from tests import reference
from utils import Process

SPM = reference.MINI_COCO / "mini.spm"
OLD, NEW = ["yes", "no", "red", "two"], ["red", "blue", "yes"]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco") / "data"
    shutil.copytree(reference.MINI_COCO, folder)
    VQAv2Dataset.make_dataset_index(folder, folder / "mini.spm", folder / "vqa")
    return folder


def tiny(answers):
    return reference.build("beit3_tiny_patch16_64_vqav2", vocab_size=100, num_classes=answers)


def the_task(folder, answers=None, **own):
    if answers is not None:
        (folder / "answer2label.txt").write_text("".join(answer_lines(answers)))
    return make_task(VQAv2Settings(**own), DataSettings(data_path=folder, input_size=64), None)


def checkpoint_of(answers, rows=None, path="x.pth"):
    state = tiny(rows or len(answers)).state_dict()
    state["head.3.weight"] = torch.arange(len(state["head.3.bias"])).float()[:, None].expand_as(state["head.3.weight"])
    state["head.3.bias"] = 10 + torch.arange(len(state["head.3.bias"])).float()
    return Checkpoint(state, {"answers": answers}, path)


def flags(coco, out, *more, **changes):
    every = {
        "task": "vqav2", "model": "beit3_tiny_patch16_64", "sentencepiece_model": coco / "mini.spm", "data_path": coco,
        "output_dir": out, "batch_size": 16, "epochs": 1, "warmup_epochs": 0, "vocab_size": 100, "num_workers": 0,
        "device": "cpu", "save_ckpt_freq": 1, **changes,
    }  # fmt: skip
    return [*(text for name, value in every.items() if value is not None for text in (f"--{name}", str(value))), *more]


def test_answers_find_their_old_numbers():
    assert rows_by_text(OLD, NEW) == (2, -1, 0)
    assert rows_by_text(OLD, OLD) == (0, 1, 2, 3)
    assert rows_by_text([], NEW) == (-1, -1, -1)


def test_rows_of_the_head_follow_their_answers(tmp_path):
    task, old = the_task(tmp_path, NEW), checkpoint_of(OLD)
    checkpoint, rows = task.starting_head(old)
    assert rows == HeadRows(("head.3.weight", "head.3.bias"), (2, -1, 0), "2 answers kept, 1 new, 2 gone")
    model = tiny(3)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_weights(model, checkpoint, new_head=True, head_rows=rows)
    now = model.state_dict()
    assert now["head.3.bias"][[0, 2]].tolist() == [12, 10]
    assert now["head.3.weight"][:, 0].tolist()[::2] == [2, 0]
    assert torch.equal(now["head.3.bias"][1], fresh["head.3.bias"][1])
    assert torch.equal(now["head.3.weight"][1], fresh["head.3.weight"][1])
    assert torch.equal(now["head.0.weight"], old.state_dict["head.0.weight"])
    assert str(report).endswith("; head: 2 answers kept, 1 new, 2 gone")
    assert old.state_dict["head.3.bias"].tolist() == [10, 11, 12, 13]  # the checkpoint is nobody's to change


def test_the_same_list_loads_the_same_bits(tmp_path):
    old = checkpoint_of(OLD)
    checkpoint, rows = the_task(tmp_path, OLD).starting_head(old)
    model = tiny(4)
    assert "head" not in str(load_weights(model, checkpoint, new_head=True, head_rows=rows))
    assert all(torch.equal(tensor, old.state_dict[name]) for name, tensor in model.state_dict().items())


def test_rows_without_an_answer_are_left_out_and_more_answers_than_rows_are_fine(tmp_path):
    many = [f"answer {n}" for n in range(30)] + OLD
    checkpoint, rows = the_task(tmp_path, many).starting_head(checkpoint_of(OLD, rows=20))
    assert rows.told == "4 answers kept, 30 new, 0 gone"
    model = tiny(34)
    load_weights(model, checkpoint, new_head=True, head_rows=rows)
    assert model.state_dict()["head.3.bias"][30:].tolist() == [10, 11, 12, 13]


def test_a_new_head_takes_nothing_of_the_old_one(tmp_path):
    checkpoint, rows = the_task(tmp_path, NEW, new_head=True).starting_head(checkpoint_of(OLD))
    assert rows is None
    report = load_weights(tiny(3), checkpoint, new_head=True, head_rows=rows)
    assert report.new == [
        "head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias", "head.3.weight", "head.3.bias",
    ]  # fmt: skip


def test_a_head_that_says_nothing_stays_as_it_is(tmp_path):
    task, released = the_task(tmp_path, NEW), replace(checkpoint_of(OLD), description={})
    assert task.starting_head(released) == (released, None)
    assert task.model_options(released.state_dict) == {"num_classes": 4}
    with pytest.raises(InputError, match=r"5 answers, but the head of the checkpoint has 4 rows.*--new_head"):
        the_task(tmp_path, [*OLD, "blue"]).model_options(released.state_dict)


def test_a_head_with_fewer_rows_than_it_says_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"x\.pth: says 4 answers, but its head has 3 rows"):
        the_task(tmp_path, NEW).starting_head(checkpoint_of(OLD, rows=3))


@pytest.mark.parametrize("said", [7, "yes", {"yes": 0}, [], ["yes", 3], [None]])
def test_a_description_with_other_answers_than_texts_is_refused(said):
    with pytest.raises(InputError, match="no list of texts"):
        answers_said({"answers": said})


def index_line(qid, labels, scores):
    return json.dumps({"image_path": "a.jpg", "text_segment": [5], "labels": labels, "scores": scores, "qid": qid})


def test_scores_compare_texts_not_numbers(tmp_path, caplog):
    """The checkpoint's rows are OLD's, the data's labels NEW's: yes is 0 there and 2 here."""
    lines = [index_line(1, [2], [1.0]), index_line(2, [0, 1], [0.3, 0.9]), index_line(3, [1], [1.0])]
    (tmp_path / "vqa.rest_val.jsonl").write_text("\n".join(lines) + "\n")
    task = the_task(tmp_path, NEW)
    task._tokenizer = type("T", (), {"vocab_size": 100})()
    task.adopt({"answers": OLD})
    task.meet_data()
    assert "1 of the 3 answers" in caplog.text and "never gives them" in caplog.text
    dataset = task.dataset("val", training=False)
    predicted = {"row": torch.arange(3), "label": torch.tensor([0, 2, 1])}  # yes, red, no
    assert task.score(predicted, dataset, "val", final=False).metrics["score"] == pytest.approx(100 * (1 + 0.3 + 0) / 3)
    assert [entry["answer"] for entry in task.submission(predicted, dataset, "val")] == ["yes", "red", "no"]


def test_a_caption_found_among_nan_is_marked_as_broken(coco):
    """The search goes on with NaN as with any number, and comes out with words."""
    task = make_task(CaptioningSettings(), DataSettings(data_path=coco, num_max_bpe_tokens=8), Tokenizer(SPM))
    model = reference.build("beit3_tiny_patch16_64_captioning", vocab_size=100)
    pictures = torch.zeros(2, 3, 64, 64)
    pictures[1, 0, 0, 0] = torch.nan
    columns = task.predict_step(model, {"image": pictures})
    assert columns["finite"].tolist() == [True, False] and len(columns["caption"]) == 2


@pytest.fixture(scope="module")
def trained(coco, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    assert run.main(flags(coco, out)) == 0
    return out / "checkpoint-best"


def renumbered(coco, folder):
    """The same data, whose answers have other numbers."""
    shutil.copytree(coco, folder)
    answers = [json.loads(line)["answer"] for line in (coco / "answer2label.txt").read_text().splitlines()]
    order = np.random.default_rng(0).permutation(len(answers)).tolist()
    (folder / "answer2label.txt").write_text("".join(answer_lines(answers[number] for number in order)))
    for file in folder.glob("vqa.*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows = [{**row, "labels": [order.index(label) for label in row["labels"]]} for row in rows]
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder, order


def test_a_run_on_renumbered_data_starts_scores_and_goes_on_as_it_should(coco, trained, tmp_path):
    other, order = renumbered(coco, tmp_path / "other")
    prediction = ["--eval", "--split", "val", "--finetune", str(trained)]
    reports = []
    for data, out in ((coco, "a"), (other, "b")):
        assert run.main(flags(data, tmp_path / out, *prediction)) == 0
        reports.append((tmp_path / out / "submit_vqav2_val.json").read_bytes())
    assert reports[0] == reports[1]

    assert run.main(flags(other, tmp_path / "c", "--finetune", str(trained), lr=0, min_lr=0)) == 0
    old, new = (load_file(f / "model.safetensors") for f in (trained, tmp_path / "c" / "checkpoint-best"))
    assert torch.equal(new["head.3.bias"], old["head.3.bias"][order])
    assert torch.equal(new["head.3.weight"], old["head.3.weight"][order])
    assert torch.equal(new["head.0.weight"], old["head.0.weight"])
    assert read_checkpoint(tmp_path / "c" / "checkpoint-best").description["answers"] == [
        json.loads(line)["answer"] for line in (other / "answer2label.txt").read_text().splitlines()
    ]
    first, again = (
        read_checkpoint(path).description["score"] for path in (trained, tmp_path / "c" / "checkpoint-best")
    )
    assert first == pytest.approx(again, abs=1e-4)  # the same weights, asked the same


def test_a_run_with_fewer_answers_has_a_smaller_head_and_goes_on(coco, trained, tmp_path):
    """The head's rows go, so do the optimizer's and the average's; a second start finds what the first one kept."""
    few = tmp_path / "few"
    shutil.copytree(coco, few)
    answers = [json.loads(line)["answer"] for line in (coco / "answer2label.txt").read_text().splitlines()]
    (few / "answer2label.txt").write_text("".join(answer_lines(answers[:-3])))
    for file in few.glob("vqa.*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows = [row for row in rows if all(label < len(answers) - 3 for label in row["labels"])]
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    more = ["--finetune", str(trained), "--model_ema", "--save_ckpt_steps", "2"]
    assert run.main(flags(few, tmp_path / "out", *more, epochs=2)) == 0
    whole = load_file(tmp_path / "out" / "checkpoint-last" / "model.safetensors")
    assert len(whole["head.3.bias"]) == len(answers) - 3
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(tmp_path / "out" / "checkpoint-0.pth", again)
    assert run.main(flags(few, again, *more, epochs=2)) == 0
    resumed = load_file(again / "checkpoint-last" / "model.safetensors")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_new_head_is_for_training_only(coco, trained, tmp_path):
    with pytest.raises(InputError, match="--new_head: for training"):
        read_settings(flags(coco, tmp_path, "--eval", "--new_head", "--finetune", str(trained)))


@pytest.fixture
def other_spm(tmp_path):
    """The same tokenizer but for one byte at its end, which is enough to be another file."""
    file = tmp_path / "other.spm"
    content = (reference.MINI_COCO / "mini.spm").read_bytes()
    file.write_bytes(content + b"\xa2\x06\x00")  # an unknown field of length 0
    return file


def test_another_tokenizer_is_refused_in_training(coco, trained, tmp_path, other_spm):
    with pytest.raises(InputError) as caught:
        read_settings(flags(coco, tmp_path, "--finetune", str(trained), sentencepiece_model=other_spm))
    assert any(
        f"{trained}: made with the tokenizer of SHA-256" in problem and str(other_spm) in problem
        for problem in caught.value.problems
    )


def test_another_tokenizer_is_refused_for_a_pth_file_too(coco, trained, tmp_path, other_spm, capfd):
    (coco / "vqa.index.json").unlink(missing_ok=True)
    single = trained.with_name("checkpoint-best.pth")
    assert run.main(flags(coco, tmp_path / "o", "--finetune", str(single), sentencepiece_model=other_spm)) == 2
    assert f"{single}: made with the tokenizer of SHA-256" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["checkpoint-best", "checkpoint-best.pth"])
def test_training_takes_the_tokenizer_that_the_checkpoint_holds(coco, trained, tmp_path, name, capfd):
    start = trained.with_name(name)
    assert run.main(flags(coco, tmp_path / "o", "--finetune", str(start), sentencepiece_model=None)) == 0
    assert f"tokenizer: the one that {start} holds" in capfd.readouterr().err
    held = tmp_path / "o" / "checkpoint-best" / "tokenizer.spm"
    assert held.read_bytes() == (coco / "mini.spm").read_bytes()


def test_weights_without_a_tokenizer_need_one_named(coco, tmp_path):
    write_weights(tmp_path / "bare", tiny(14).state_dict(), {})
    with pytest.raises(InputError, match=r"--sentencepiece_model is needed.*bare holds none"):
        read_settings(flags(coco, tmp_path, "--finetune", str(tmp_path / "bare"), sentencepiece_model=None))


class Rows:
    """A data set of which only the places are asked."""

    def place(self, row):
        return f"x.jsonl:{row + 1}"


class Loader(list):
    dataset = Rows()


def test_an_answer_computed_from_nan_is_an_error_that_names_the_row(tmp_path):
    task = the_task(tmp_path, NEW)

    def model(image, question, padding_mask):
        return torch.where(image[:, 0, 0, :1] > 0, torch.nan, torch.ones(len(image), 3))

    def batch(*rows):
        image = torch.zeros(len(rows), 3, 2, 2)
        image[:, 0, 0, 0] = torch.tensor([row in (1, 4) for row in rows]).float()
        text = torch.zeros(len(rows), 3, dtype=torch.int64)
        return {"image": image, "token_ids": text, "padding_mask": text.bool(), "row": torch.tensor(rows)}

    model.eval = lambda: None
    process = Process(0, 1, 0, torch.device("cpu"))
    with pytest.raises(FloatingPointError, match=r"evaluation: .* not finite for x\.jsonl:2, x\.jsonl:5\. Use"):
        evaluate(task, model, Loader([batch(0, 1, 2), batch(3, 4)]), process, autocast=torch.no_grad)
    columns, _ = evaluate(task, model, Loader([batch(0, 2), batch(3)]), process, autocast=torch.no_grad)
    assert columns.keys() == {"row", "label", "labels", "logits"}


def test_an_epoch_of_skipped_steps_only_is_an_error(coco, tmp_path, capfd, monkeypatch):
    """25 skipped steps in a row, which end a run too, are never reached in 13."""
    monkeypatch.setattr("tasks.vqav2.task.soft_answer_loss", lambda logits, targets: logits.sum() * torch.nan)
    assert run.main(flags(coco, tmp_path)) == 1
    told = capfd.readouterr().err
    assert "all 13 steps of epoch 0 had a loss or gradient that is not finite and were skipped: nothing was" in told
    assert not list(tmp_path.glob("checkpoint*"))


def annotation(question_id, *answers):
    given = [{"answer": answer} for answer in answers]
    return {"question_id": question_id, "answers": given, "answer_type": "other", "question_type": "what"}


def test_one_answer_per_question_gives_exact_match():
    given = [annotation(1, "a cat"), annotation(2, "dog"), annotation(3, "Two"), annotation(4, "red")]
    result = vqa_accuracy({1: "cat", 2: "cat", 3: "2", 4: "red"}, given)
    assert result["exact_match"] == result["by_answer_type"]["other"] == result["by_question_type"]["what"] == 75.0
    assert "overall" not in result and result["questions_of_few_people"] == 4
    lines = _report_lines(result)
    assert lines[0] == "exact match: 75.00 on 4 questions"
    assert "fewer than 4 people" in lines[1] and not any("0.00" in line for line in lines[1:])


def test_questions_of_few_people_among_others_are_told_apart():
    given = [annotation(1, *["cat"] * 10), annotation(2, "dog", "cat", "cat"), annotation(3, "dog")]
    result = vqa_accuracy({1: "cat", 2: "cat", 3: "cat"}, given)
    assert result["overall"] == pytest.approx(100 * (1 + (0 / 3 + 2 * (1 / 3) + 2 / 3) / 3) / 3)
    assert (result["exact_match"], result["questions_of_few_people"]) == (50.0, 2)


def test_four_people_are_enough_for_the_official_formula():
    result = vqa_accuracy({1: "cat"}, [annotation(1, *["cat"] * 4)])
    assert result["overall"] == 100.0 and "exact_match" not in result


@pytest.mark.parametrize(
    ("answer", "given", "exact"),
    [("The cat", ["cat."], True), ("cat\n", ["cat"], True), ("cat", ["cats"], False), ("cat", [], False)],
)
def test_exactness(answer, given, exact):
    assert is_exact(answer, given) is exact
