"""The benchmarks' own code: the table, and that the other sides compute what this toolkit does. Nothing is timed."""

import gc
import json
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch

from beit3.data.augmentation import OPERATIONS, EvalTransform, TrainTransform
from beit3.data.images import normalize
from beit3.data.tokenizer import Tokenizer
from benchmarks import gpu, memory, models, peers, pictures, questions, runs
from benchmarks.table import Line, Reach, Row, Settings, interleave, read_sections, run_row, write_sections
from modeling_finetune import HEADS
from runs.command_line import read_settings
from tasks.captioning.generation import generate
from tasks.captioning.losses import masked_token_losses
from tests import reference
from tests.test_generation import MASK, small_model

needs_torchscale = pytest.mark.skipif(
    not (peers.PACKAGES / "torchscale").is_dir(), reason="torchscale is not there; benchmarks/run.sh installs it"
)


# The table


def test_a_line_shows_medians_ranges_the_ratio_and_whether_it_is_reached():
    line = Line("path", "images/s", [30.0, 20.0, 25.0], [10.0, 8.0, 12.5], Reach("≥", 2.5))
    assert line.markdown() == "| path | 25 images/s (20–30) | 10 images/s (8–12.5) | 2.5× | ≥ 2.5× | yes |"


def test_a_line_that_falls_short_says_so():
    assert Line("path", "MB", [50.0], [100.0], Reach("≤", 0.4)).markdown().endswith("| 0.5× | ≤ 0.4× | **no** |")


def test_a_line_without_another_side_is_judged_by_its_own_number():
    line = Line("index", "s", [59.0, 61.5, 20.0], reach=Reach("≤", 60, absolute=True))
    assert line.markdown() == "| index | 59 s (20–61.5) | – | – | ≤ 60 s | yes |"


def test_a_line_without_a_goal_is_neither_reached_nor_missed():
    assert Line("path", "s", [1234.5], [1000.0]).markdown() == "| path | 1234 s | 1000 s | 1.23× | – | – |"


def test_a_row_that_fails_is_a_line_of_the_table_and_not_an_error():
    def fail():
        raise RuntimeError("the two sides differ | by 3\nmore")

    lines, went_well = run_row(Row("generation", fail))
    assert lines == ["| generation | failed: the two sides differ / by 3 | – | – | – | **no** |"]
    assert not went_well


def test_sides_take_turns_after_one_call_of_each():
    calls = []
    times = interleave([partial(calls.append, "A"), partial(calls.append, "B")], repeats=3)
    assert calls == list("ABABABAB")
    assert [len(side) for side in times] == [3, 3]


def test_new_sections_replace_old_ones_and_leave_the_others(tmp_path):
    path = tmp_path / "RESULTS.md"
    write_sections(path, "# Title\n", {"b": ["old", "", "| x |"], "a": ["stays"]}, order=["a", "b", "c"])
    write_sections(path, "# Title\n", {"b": ["new"], "c": ["added"]}, order=["a", "b", "c"])
    assert read_sections(path) == {"a": ["stays"], "b": ["new"], "c": ["added"]}
    assert path.read_text() == "# Title\n\n## a\n\nstays\n\n## b\n\nnew\n\n## c\n\nadded\n"


# Memory


def test_memory_kept_for_the_backward_pass_counts_each_storage_once_and_no_parameter():
    weight = torch.nn.Parameter(torch.ones(1000, 1000))
    x = torch.ones(1000, 1000)
    kept = memory.kept_for_backward(lambda: ((x @ weight) + (x @ weight)).sum())
    assert kept == 4.0  # megabytes: x, which both products keep; the weight does not count


def test_counting_what_is_kept_frees_it_again():
    x, seen = torch.ones(10, requires_grad=True), []

    def forward():
        kept = x.exp()  # its backward pass needs its own output
        seen.append(weakref.ref(kept.untyped_storage()))
        return kept.sum()

    gc.disable()
    try:
        memory.kept_for_backward(forward)
        assert seen[0]() is None or seen[0]().nbytes() == 0
    finally:
        gc.enable()


# The other sides


def test_the_loss_with_one_hot_vectors_is_our_loss():
    torch.manual_seed(0)
    logits, targets = torch.randn(7, 50), torch.randint(0, 50, (7,))
    torch.testing.assert_close(
        peers.one_hot_loss(logits, targets, 0.1), masked_token_losses(logits, targets, 0.1), rtol=1e-5, atol=1e-5
    )


def whole_model_predictor(model, images, num_beams):
    """Predicts from the whole text anew at each step, without keys and values of earlier ones."""
    images = images.repeat_interleave(num_beams, dim=0)

    def predict(tokens, parents):
        text = torch.cat([tokens, torch.full_like(tokens[:, :1], MASK)], dim=1)
        masked = torch.zeros_like(text)
        masked[:, -1] = 1
        return model(image=images, text_ids=text, padding_mask=None, language_masked_pos=masked)

    return predict


@pytest.mark.parametrize("seed", range(8))
def test_the_search_beam_by_beam_finds_the_same_captions(seed):
    model, images = small_model(seed, eos_bias=(-50.0, 0.0, 1.0, 2.0)[seed % 4]), reference.images(seed, 3, 32)
    settings = {"num_beams": 1 + seed % 3, "length_penalty": 0.6, "max_tokens": 4 + seed}
    predict = whole_model_predictor(model, images, settings["num_beams"])
    found = peers.per_beam_search(predict, 3, **settings, device=torch.device("cpu"))
    assert found == generate(model, images, mask_id=MASK, **settings).best()


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    return pictures.make_pictures(tmp_path_factory.mktemp("pictures"), 12)


def test_made_pictures_are_like_those_of_coco(jpegs):
    sizes = [Path(path).stat().st_size for path in jpegs]
    assert 80_000 < sum(sizes) / len(sizes) < 130_000


@pytest.mark.parametrize("randaug", [False, True])
def test_pillows_training_pictures_are_ours(jpegs, randaug):
    sides = TrainTransform(96, randaug=randaug), peers.PillowTransform(96, randaug)
    pictures.check_pictures(*(pictures.load(transform, jpegs) for transform in sides))


def test_other_pictures_are_noticed(jpegs):
    with pytest.raises(RuntimeError, match="differ by"):
        pictures.check_pictures(*(pictures.load(TrainTransform(96), paths) for paths in (jpegs, jpegs[::-1])))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_pillows_operations_are_ours_within_a_grey_level_on_average(jpegs, name, sign):
    from PIL import Image

    planes = EvalTransform(96)(jpegs[0]).numpy()
    by_pillow = peers._pillow_operation(name, Image.fromarray(planes.transpose(1, 2, 0).copy()), sign)
    ours = torch.from_numpy(OPERATIONS[name](planes, sign))
    theirs = torch.frombuffer(bytearray(by_pillow.tobytes()), dtype=torch.uint8).reshape(96, 96, 3).permute(2, 0, 1)
    assert (ours.float() - theirs.float()).abs().mean() < 1.0


def test_pillows_evaluation_pictures_are_ours(jpegs):
    ours = torch.stack([EvalTransform(96)(path) for path in jpegs[:3]])
    assert (normalize(ours) - torch.stack([peers.pillow_evaluation(path, 96) for path in jpegs[:3]])).abs().max() < 0.02


def test_the_plain_index_is_ours(tmp_path):
    """With a tokenizer that is ours underneath, so that transformers is not needed."""

    class OneByOne:
        def __init__(self, path):
            self.encode = Tokenizer(path).encode

        def tokenize(self, text):
            return text

        def convert_tokens_to_ids(self, text):
            return self.encode(text)

    tree = questions.make_tree(tmp_path, 0.0005)
    questions.make_index(tree)
    assert peers.plain_index(tree, OneByOne(tree / questions.TOKENIZER), tree / "plain") == 604
    questions.check_index(tree)
    train = (tree / "plain" / "train.jsonl").read_text().splitlines()
    (tree / "plain" / "train.jsonl").write_text("\n".join(train[1:]) + "\n")
    with pytest.raises(RuntimeError, match="the train index of the two sides differs"):
        questions.check_index(tree)
    assert json.loads(train[0])["image_path"].startswith("train2014/COCO_train2014_")


@pytest.fixture(scope="module")
def questions_tree(tmp_path_factory):
    """A hundredth of a per cent of VQAv2, with its index."""
    return questions.indexed_tree(tmp_path_factory.mktemp("questions"), 0.0001)


def test_plain_evaluation_gives_our_answers(questions_tree, monkeypatch):
    monkeypatch.setattr(runs, "EVALUATION_PIXELS", 64)
    task = runs.open_task(questions_tree, 64)
    dataset = task.dataset("val", training=False)
    model = HEADS["vqav2"](models.make_config("vqav2", "tiny", 64)).eval()
    reference.fill(model)
    batch = task.prepare(dataset.collate([dataset[row] for row in range(8)]), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        # No answer is the likelier one for all questions, so that they differ.
        model.head[3].bias -= model(batch["image"], batch["token_ids"], batch["padding_mask"]).mean(dim=0)
    sides = [side(task, dataset, model, 4, torch.device("cpu")) for side in (runs.our_answers, runs.peer_answers)]
    assert [len(side) for side in sides] == [len(dataset)] * 2
    assert len(set(sides[0])) > 1 and set(sides[0]) <= set(task.answers)
    runs.check_answers(*sides)


def test_answers_of_two_sides_that_differ_are_noticed():
    runs.check_answers(["yes"] * 40, ["no"] * 2 + ["yes"] * 38)
    with pytest.raises(RuntimeError, match="3 of 40 answers differ"):
        runs.check_answers(["yes"] * 40, ["no"] * 3 + ["yes"] * 37)


def test_the_command_to_the_first_step_is_a_good_one(questions_tree):
    settings = read_settings(runs.first_step_flags(questions_tree, 384))
    assert (settings.model_name, settings.data.input_size) == ("beit3_base_patch16_384_vqav2", 384)


@needs_torchscale
@pytest.mark.parametrize("task", ["vqav2", "captioning"])
def test_torchscales_models_have_our_losses_and_gradients(task):
    device = torch.device("cpu")
    pair = models.make_pair(task, "tiny", 64, device)
    models.check_gradients(task, *pair, models.make_batch(task, 3, 64, device), "fp32")


@pytest.mark.parametrize("idea", models.IDEAS)
def test_leaving_an_idea_out_changes_no_loss_and_no_gradient(idea):
    model = HEADS["vqav2"](models.make_config("vqav2", "tiny", 64))
    batch = models.make_batch("vqav2", 3, 64, torch.device("cpu"))
    losses, gradients = [], []
    for logits in (models.answer_logits, models.IDEAS[idea]):
        model.zero_grad()
        losses.append(logits(model, batch).sin().sum())
        losses[-1].backward()
        gradients.append(model.get_parameter("beit3.encoder.layers.0.ffn.B.fc1.weight").grad)
    models.check_close("loss", losses, "fp32")
    models.check_close("gradient", gradients, "fp32")


@needs_torchscale
def test_torchscales_keys_and_values_give_our_captions():
    ours, peer = models.make_generators("tiny", 64, torch.device("cpu"))
    images = reference.images(9, 2, 64)
    decoder = peers.CachedDecoder(peer, images, 3, models.MASK_ID)
    search = {"num_beams": 3, "length_penalty": 0.6, "max_tokens": 9}
    with torch.no_grad():
        found = peers.per_beam_search(decoder, 2, **search, device=torch.device("cpu"))
    assert found == generate(ours, images, mask_id=models.MASK_ID, **search).best()
    assert all(len(caption) == 6 for caption in found) and found[0] != found[1]


def test_sides_that_differ_are_noticed():
    with pytest.raises(RuntimeError, match="loss: the two sides differ by 0.01"):
        models.check_close("loss", [torch.tensor([1.0]), torch.tensor([1.01])], "fp32")


# What a GPU is asked, on a CPU and in small


@pytest.mark.parametrize("task", ["vqav2", "captioning"])
def test_training_steps_of_the_gpu_rows_change_the_weights(monkeypatch, task):
    seen = []
    step = gpu.PlainBackend.step
    monkeypatch.setattr(gpu, "STEPS", 2)
    monkeypatch.setattr(gpu.PlainBackend, "step", lambda backend: seen.append(float(step(backend).grad_norm)))
    gpu.training_steps(task, "tiny", 64, 2, torch.device("cpu"))()
    assert len(seen) == 2 and seen[0] != seen[1]


@pytest.fixture
def small_gpu_rows(monkeypatch, tmp_path):
    """Settings under which the rows of a GPU run on a CPU, with a tiny model."""
    monkeypatch.setattr(gpu, "TRAINING", {("captioning", "tiny"): (2, 1000), ("vqav2", "base"): (598, 590)})
    monkeypatch.setattr(gpu, "GENERATION", {"tiny": 1})
    monkeypatch.setattr(gpu, "BATCH", {"tiny": 2})
    monkeypatch.setattr(gpu, "PIXELS", 64)
    monkeypatch.setattr(gpu, "STEPS", 1)
    whole_peak = gpu.matmul_peak
    monkeypatch.setattr(gpu, "matmul_peak", lambda device, size, repeats: whole_peak(device, 64, repeats))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5e9)
    return Settings(quick=True, device=torch.device("cpu"), folder=tmp_path)


def test_the_training_row_of_a_gpu_counts_operations_as_the_original(small_gpu_rows):
    speed, teraflops, share, memory_used = gpu.training_row("captioning", "tiny", small_gpu_rows)
    assert [s * 2 / 1000 for s in speed.ours] == teraflops.ours
    assert speed.reach.value == 1000 and share.unit == "%" and memory_used.ours == [5.0]


def test_the_other_rows_of_a_gpu_run(small_gpu_rows):
    [peak] = gpu.peak_row(small_gpu_rows)
    [captions] = gpu.generation_row("tiny", small_gpu_rows)
    [loading] = gpu.loader_row(32, small_gpu_rows)
    assert all(min(line.ours) > 0 for line in (peak, captions, loading))
    assert loading.reach.value == 590


def test_the_rows_of_a_gpu_have_a_name_each(tmp_path):
    names = [row.name for row in gpu.gpu_rows(Settings(False, torch.device("cpu"), tmp_path))]
    assert len(names) == len(set(names))
