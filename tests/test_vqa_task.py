"""VQAv2 against the contract: what is checked, learned, predicted, scored and handed in."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from beit3.data.tokenizer import Tokenizer
from beit3.system.errors import InputError
from beit3.system.flags import flags_of
from datasets import EvaluationSampler, build_loader
from engine_for_finetuning import evaluate
from modeling_finetune import create_model
from tasks.base import make_task
from tasks.settings import DataSettings
from tasks.vqav2.settings import VQAv2Settings
from tasks.vqav2.task import HEAD, VQAv2
from tests import reference
from utils import Process

CPU = torch.device("cpu")
ANSWERS = ["square", "don't know", "purple", "circle", "dog", "triangle", "1", "2"]
ANSWERS += ["yellow", "black & white", "yes", "red", "no", "orange"]


@pytest.fixture
def coco(tmp_path):
    """Pictures of mini_coco with the index that the original makes of it, and no official file."""
    root = tmp_path / "coco"
    shutil.copytree(reference.MINI_COCO / "expected", root)
    for folder in ("train2014", "val2014", "test2015"):
        shutil.copytree(reference.MINI_COCO / folder, root / folder)
    return root


def settings(data_path, **changes):
    common = {"sentencepiece_model": reference.MINI_COCO / "mini.spm", "input_size": 64, "num_max_bpe_tokens": 24}
    return DataSettings(data_path=data_path, **{**common, **changes})


def vqa(data_path, **changes):
    data = settings(data_path, **changes)
    return make_task(VQAv2Settings(), data, Tokenizer(data.sentencepiece_model))


def write_index(coco, entries, split="rest_val"):
    """An index of (question id, {label: score}), all about one picture."""
    lines = [
        {
            "image_path": "val2014/COCO_val2014_000000000101.jpg",
            "text_segment": [4, 11, 12],
            "labels": list(scores),
            "scores": list(scores.values()),
            "qid": qid,
        }
        for qid, scores in entries
    ]
    (coco / f"vqa.{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def columns(rows, labels):
    return {"row": torch.tensor(rows), "label": torch.tensor(labels)}


def score(task, predicted, split="val", final=False):
    return task.score(predicted, task.dataset(split, training=False), split, final)


# ---- settings -------------------------------------------------------------------------------------------------------


def test_names_are_those_of_the_command_line_and_of_the_outputs(coco):
    task = vqa(coco)
    assert type(task) is VQAv2
    assert (task.name, VQAv2Settings.model_suffix, VQAv2Settings.trains_as, task.best_metric) == (
        "vqav2", "vqav2", "vqav2", "score",
    )  # fmt: skip
    assert task.submission_file("test-dev") == "submit_vqav2_test-dev"
    assert task.report_file("val") == "vqav2_result_val"


def test_its_own_flags():
    assert [each.name for each in flags_of(VQAv2Settings)] == ["new_head"]


def test_missing_files_are_named_with_the_way_to_make_them(coco):
    data = settings(coco)
    assert VQAv2Settings().problems(data, training=True) == []
    assert VQAv2Settings().problems(settings(coco, split="test-dev"), training=False) == []
    for name in ("trainable_val", "rest_val", "test-dev"):
        (coco / f"vqa.{name}.jsonl").unlink()
    (coco / "answer2label.txt").unlink()
    [problem] = VQAv2Settings().problems(data, training=True)
    assert f"{coco}: vqa.trainable_val.jsonl, vqa.rest_val.jsonl, answer2label.txt not found" in problem
    assert f'VQAv2Dataset.make_dataset_index(data_path="{coco}"' in problem
    # Prediction needs the file of its split alone; the checkpoint says what the answers are.
    assert VQAv2Settings().problems(settings(coco, split="test"), training=False) == []
    [problem] = VQAv2Settings().problems(settings(coco, split="test-dev"), training=False)
    assert "vqa.test-dev.jsonl not found" in problem
    assert VQAv2Settings().problems(settings(coco / "nowhere"), training=True) == []  # told with the data's flags


def test_index_files_that_are_there_are_kept(coco):
    before = (coco / "vqa.rest_val.jsonl").read_bytes()
    VQAv2Settings().make_index(coco, str(reference.MINI_COCO / "mini.spm"))
    assert (coco / "vqa.rest_val.jsonl").read_bytes() == before


# ---- what the head means --------------------------------------------------------------------------------------------


def test_the_answers_are_those_of_the_data_folder(coco):
    task = vqa(coco)
    assert task.answers == ANSWERS
    assert task.describe() == {"answers": ANSWERS}
    json.dumps(task.describe())


def test_a_checkpoint_brings_its_own_answers(coco):
    (coco / "answer2label.txt").unlink()
    write_index(coco, [(10, {1: 1.0}), (11, {})])
    task = vqa(coco)
    task.adopt({"answers": ["yes", "no"], "task": "vqav2"})
    assert task.answers == ["yes", "no"]
    assert task.describe() == {"answers": ["yes", "no"]}
    assert task.model_options({}) == {"num_classes": 2}
    dataset = task.dataset("val", training=False)
    assert dataset.num_answers == 2
    assert task.submission(columns([0, 1], [1, 0]), dataset, "val") == [
        {"question_id": 10, "answer": "no"}, {"question_id": 11, "answer": "yes"},
    ]  # fmt: skip
    write_index(coco, [(10, {2: 1.0})])
    with pytest.raises(InputError, match=r"labels: 2 is not one of the integers 0 … 1"):
        task.dataset("val", training=False)


def test_the_list_of_a_checkpoint_is_not_changed_with_the_tasks(coco):
    stated, task = ["yes", "no"], vqa(coco)
    task.adopt({"answers": stated})
    stated.append("maybe")
    assert task.answers == ["yes", "no"]


def test_a_checkpoint_without_answers_needs_the_file(coco):
    task = vqa(coco)
    task.adopt({})
    assert task.answers == ANSWERS
    (coco / "answer2label.txt").unlink()
    with pytest.raises(InputError, match=r"does not say what its answers are, and .*answer2label\.txt.* is not there"):
        vqa(coco).meet_data()


def test_the_head_has_an_output_per_answer_or_those_of_the_weights(coco):
    task = vqa(coco)
    assert task.model_options({}) == {"num_classes": 14}
    assert task.model_options({"beit3.x": torch.zeros(3)}) == {"num_classes": 14}
    for rows in (14, 3129):
        assert task.model_options({HEAD: torch.zeros(rows, 8)}) == {"num_classes": rows}
    with pytest.raises(InputError, match="14 answers, but the head of the checkpoint has 13"):
        task.model_options({HEAD: torch.zeros(13, 8)})


def test_the_head_is_named_as_in_the_model(coco):
    model = create_model("beit3_tiny_patch16_64_vqav2", vocab_size=88, **vqa(coco).model_options({}))
    assert model.state_dict()[HEAD].shape[0] == 14


# ---- learning and predicting ----------------------------------------------------------------------------------------


def wide_head(image, question, padding_mask):
    """Logits of a head with six outputs more than there are answers, the highest of all among these."""
    logits = torch.zeros(len(image), 20)
    logits[:, 17] = 9.0
    logits[torch.arange(len(image)), 5 + torch.arange(len(image))] = 2.0
    return logits


def read_batch(task, rows, split="val"):
    dataset = task.dataset(split, training=False)
    return task.prepare(dataset.collate([dataset[row] for row in rows]), CPU, torch.float32)


def test_a_head_with_more_outputs_than_answers_answers_from_the_list(coco):
    task = vqa(coco)
    assert task.predict_step(wide_head, read_batch(task, [0, 1, 2]))["label"].tolist() == [5, 6, 7]


def test_outputs_without_an_answer_learn_to_stay_silent(coco):
    write_index(coco, [(10, {5: 0.3, 2: 1.0}), (11, {})])
    task = vqa(coco)
    outputs = task.training_step(wide_head, read_batch(task, [0, 1]), step=0)
    assert outputs.keys() == {"loss"}

    def entropy(logit, target):
        share = 1 / (1 + math.exp(-logit))
        return -target * math.log(share) - (1 - target) * math.log(1 - share)

    first = entropy(2, 0.3) + entropy(0, 1.0) + entropy(9, 0) + 17 * entropy(0, 0)
    second = entropy(2, 0) + entropy(9, 0) + 18 * entropy(0, 0)
    assert outputs["loss"].item() == pytest.approx((first + second) / 2, rel=1e-5)


def test_prediction_sees_no_label_and_no_row(coco):
    task = vqa(coco)
    batch = read_batch(task, [0, 1, 2])
    seen = {name: batch[name] for name in ("image", "token_ids", "padding_mask")}
    assert task.predict_step(wide_head, seen).keys() == {"label", "labels", "logits", "finite"}


def test_every_question_is_answered_once_whatever_the_batches(coco):
    task = vqa(coco)
    dataset = task.dataset("test-dev", training=False)
    model = create_model("beit3_tiny_patch16_64_vqav2", vocab_size=88, num_classes=14)
    reference.fill(model)
    found = []
    for batch_size in (5, 28):
        loader = build_loader(dataset, EvaluationSampler(28, batch_size, 0, 1), num_workers=0, pin_memory=False)
        found.append(evaluate(task, model, loader, Process(0, 1, 0, CPU), autocast=torch.no_grad)[0])
    assert found[0].keys() == {"row", "label", "labels", "logits"}
    assert found[0]["row"].tolist() == list(range(28))
    assert found[0]["label"].tolist() == found[1]["label"].tolist()
    assert [entry["question_id"] for entry in task.submission(found[0], dataset, "test-dev")] == [
        json.loads(line)["qid"] for line in (coco / "vqa.test-dev.jsonl").read_text().splitlines()
    ]


def test_the_memory_of_a_step_is_foreseen_from_question_and_answers(coco):
    assert vqa(coco).text_tokens() == 24
    assert vqa(coco).output_values(SimpleNamespace()) == 14


# ---- scores ---------------------------------------------------------------------------------------------------------

VALIDATION = [(10, {3: 0.3, 0: 1.0}), (11, {6: 0.9}), (12, {}), (13, {0: 0.6})]


def test_the_score_is_the_mean_of_what_the_labels_give(coco):
    write_index(coco, VALIDATION)
    scores = score(vqa(coco), columns([0, 1, 2, 3], [3, 6, 6, 0]))
    assert scores.metrics == {"score": pytest.approx(100 * (0.3 + 0.9 + 0.0 + 0.6) / 4)}
    assert (scores.report, list(scores.lines), dict(scores.files)) == (None, [], {})


@pytest.mark.parametrize(
    ("rows", "labels", "expected"),
    [
        ([0, 1, 2, 3], [0, 6, 0, 0], 1.0 + 0.9 + 0.6),
        ([0, 1, 2, 3], [6, 3, 3, 3], 0.0),  # each the answer to another question
        ([3, 0], [0, 3], 0.6 + 0.3),  # of a part of the rows, in any order
        ([2], [0], 0.0),  # the next row's label
        ([1], [13], 0.0),
    ],
)
def test_an_answer_counts_by_the_labels_of_its_own_row(coco, rows, labels, expected):
    write_index(coco, VALIDATION)
    found = score(vqa(coco), columns(rows, labels)).metrics["score"]
    assert found == pytest.approx(100 * expected / len(rows), abs=1e-5)


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("split", ["test", "test-dev"])
def test_without_labels_there_is_no_score(coco, split, final):
    task = vqa(coco)
    count = len(task.dataset(split, training=False))
    scores = score(task, columns(list(range(count)), [0] * count), split, final)
    assert (scores.metrics, scores.report, list(scores.lines), dict(scores.files)) == ({}, None, [], {})


def annotation(question, image, given, answer_type="other", question_type="what"):
    """given: answer → how many of the ten people gave it."""
    answers = [{"answer": answer} for answer, count in given.items() for _ in range(count)]
    assert len(answers) == 10
    return {
        "question_id": question, "image_id": image, "answers": answers, "answer_type": answer_type,
        "question_type": question_type,
    }  # fmt: skip


def write_annotations(coco, name="val2014", folder="vqa"):
    """Of the questions of `VALIDATION`; 14 is not in the index, 15 and 16 are about another picture."""
    annotations = [
        annotation(10, 101, {"circle": 1, "square": 9}),
        annotation(11, 101, {"1": 2, "2": 8}, "number", "how many"),
        annotation(12, 102, {"a thing": 10}),
        annotation(13, 102, {"square": 5, "red": 5}),
        annotation(14, 102, {"another": 10}),
        annotation(15, 103, {"square": 10}),
        annotation(16, 103, {"circle": 10}),
    ]
    (coco / folder).mkdir(exist_ok=True)
    (coco / folder / f"v2_mscoco_{name}_annotations.json").write_text(json.dumps({"annotations": annotations}))


@pytest.mark.parametrize("folder", ["vqa", "."])
def test_a_prediction_also_has_the_official_accuracy(coco, folder):
    write_index(coco, VALIDATION)
    write_annotations(coco, folder=folder)
    task, predicted = vqa(coco), columns([0, 1, 2, 3], [3, 6, 0, 0])  # circle, 1, square, square
    scores = score(task, predicted, final=True)
    assert scores.metrics == {"score": pytest.approx(100 * (0.3 + 0.9 + 0.6) / 4)}
    # One of ten people: for him none of the others said so, for nine others one did, a third each. Two of ten: 0.6.
    expected = {
        "split": "val",
        "overall": pytest.approx(100 * (0.3 + 0.6 + 0 + 1) / 4),
        "by_answer_type": {"other": pytest.approx(100 * (0.3 + 0 + 1) / 3), "number": pytest.approx(60)},
        "by_question_type": {"what": pytest.approx(100 * (0.3 + 0 + 1) / 3), "how many": pytest.approx(60)},
        "questions": 4,
        "not_answered": 1,
        "not_annotated": 0,
        "overall_with_unindexed": pytest.approx(100 * (0.3 + 0.6 + 0 + 1) / 5),
    }
    assert scores.report == expected
    json.dumps(scores.report)
    assert list(scores.lines) == [
        "official VQA accuracy: 47.50 on 4 questions",
        "  38.00 when the 1 questions of these pictures without an answer in the vocabulary count as wrong",
        "  by answer type:",
        "    number                        60.00",
        "    other                         43.33",
        "  by question type:",
        "    how many                      60.00",
        "    what                          43.33",
    ]
    after_epoch = score(task, predicted, final=False)
    assert (after_epoch.metrics, after_epoch.report, list(after_epoch.lines)) == (scores.metrics, None, [])


def test_a_test_split_whose_annotations_are_there_has_a_report_and_no_metrics(coco):
    write_index(coco, [(qid, {}) for qid, _ in VALIDATION], "test")
    write_annotations(coco, "test2015")
    scores = score(vqa(coco), columns([0, 1, 2, 3], [0, 7, 0, 0]), "test", final=True)
    assert scores.metrics == {}
    assert (scores.report["split"], scores.report["overall"]) == ("test", pytest.approx(75))


def test_questions_without_annotation_are_counted(coco):
    write_index(coco, [*VALIDATION, (99, {0: 1.0})])
    write_annotations(coco)
    report = score(vqa(coco), columns([0, 1, 2, 3, 4], [0] * 5), final=True).report
    assert (report["questions"], report["not_annotated"]) == (4, 1)


# ---- submission -----------------------------------------------------------------------------------------------------


def write_questions(coco, questions, name="test2015"):
    (coco / "vqa").mkdir(exist_ok=True)
    file = coco / "vqa" / f"v2_OpenEnded_mscoco_{name}_questions.json"
    file.write_text(json.dumps({"questions": [{"question_id": question} for question in questions]}))
    return file


def submission(coco, questions, labels, split="test"):
    write_index(coco, [(qid, {}) for qid in questions], {"val": "rest_val"}.get(split, split))
    task = vqa(coco)
    predicted = columns(list(range(len(labels))), labels)
    return task.submission(predicted, task.dataset(split, training=False), split)


def problems_of(coco, questions, split="test"):
    """What is said of such an index before anything is predicted."""
    write_index(coco, [(qid, {}) for qid in questions], split)
    task = vqa(coco)
    return task.check_rows(task.dataset(split, training=False), split)


@pytest.mark.parametrize(("split", "name"), [("test", "test2015"), ("test-dev", "test-dev2015")])
def test_a_submission_has_one_answer_for_each_official_question(coco, split, name):
    write_questions(coco, [22, 20, 21], name)
    assert submission(coco, [20, 21, 22], [9, 1, 0], split) == [
        {"question_id": 20, "answer": "black & white"},
        {"question_id": 21, "answer": "don't know"},
        {"question_id": 22, "answer": "square"},
    ]


def test_an_answer_belongs_to_the_question_of_its_row(coco):
    write_index(coco, VALIDATION)
    task = vqa(coco)
    dataset = task.dataset("val", training=False)
    assert task.submission(columns([2, 0], [11, 12]), dataset, "val") == [
        {"question_id": 12, "answer": "red"}, {"question_id": 10, "answer": "no"},
    ]  # fmt: skip


def test_two_missing_and_unknown_answers_are_all_named(coco):
    file = write_questions(coco, [20, 21, 22, 23])
    assert problems_of(coco, [20, 21, 30, 20, 20]) == [
        "question 20 has 3 answers, one for each time it is in the index",
        f"question 22 of {file} has no answer, it is not in the index",
        f"question 23 of {file} has no answer, it is not in the index",
        f"question 30 is not in {file}",
        "are all pictures of the split on the disk? Complete them and make the index again",
    ]


def test_without_the_official_questions_a_submission_is_what_was_predicted(coco):
    assert [entry["question_id"] for entry in submission(coco, [20, 30], [0, 0])] == [20, 30]
    assert problems_of(coco, [20, 30]) == []
    assert problems_of(coco, [20, 20])[0].startswith("question 20 has 2 answers")


def test_validation_is_a_part_of_the_official_questions(coco):
    write_questions(coco, [20, 21, 22], "val2014")
    assert [entry["question_id"] for entry in submission(coco, [21], [0], "val")] == [21]
