"""A checkpoint says all about itself: prediction needs nothing else, and what contradicts it is refused.

On the made-up COCO of data/mini_coco with the tiny model.
"""

import json
import shutil

import pytest
import torch

import run_beit3_finetuning as run
from beit3.data.tokenizer import Tokenizer
from beit3.model.weights import read_checkpoint
from beit3.system.errors import InputError
from runs.command_line import read_settings
from runs.settings import CONCERNS
from tasks.captioning import task as captioning
from tasks.captioning.scores.scores import caption_metrics
from tests import reference
from tests.test_run import start, tiny_flags
from tests.test_settings import EVERY_FLAG, TASK_FLAGS, coco  # noqa: F401  a fixture

LENGTHS = {"vqav2": 12, "coco_captioning": 16}
SUBMISSIONS = {"vqav2": "submit_vqav2_test.json", "coco_captioning": "submit_coco_captioning_test.json"}
TASKS = list(LENGTHS)


@pytest.fixture(scope="module", autouse=True)
def without_java():
    """METEOR and SPICE take most of a minute, and are not what this is about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            captioning, "caption_metrics", lambda *given, **_: caption_metrics(*given, meteor=False, spice=False)
        )
        yield


@pytest.fixture(scope="module")
def trained(coco, tmp_path_factory):
    """Task → the output folder of a run of one epoch."""
    folders = {}
    for task, length in LENGTHS.items():
        folders[task] = tmp_path_factory.mktemp(task) / "out"
        argv = tiny_flags(coco, folders[task], task=task, num_max_bpe_tokens=length, epochs=1, warmup_epochs=0)
        assert run.main(argv) == 0
    return folders


@pytest.fixture(scope="module")
def bare(coco, tmp_path_factory):
    """The data without the tokenizer and the list of answers, which the checkpoint has."""
    folder = tmp_path_factory.mktemp("bare") / "data"
    shutil.copytree(coco, folder)
    (folder / "mini.spm").unlink()
    (folder / "answer2label.txt").unlink()
    return folder


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr("utils.set_up_logging", lambda is_main: None)


def short(weights, data, out, *more):
    """The whole command."""
    places = {"--finetune": weights, "--data_path": data, "--output_dir": out}
    return ["--eval", *(str(part) for place in places.items() for part in place), *more]


@pytest.fixture(scope="module")
def wanted(coco, trained, tmp_path_factory):
    """Task → the submission that the command with all flags writes."""
    contents = {}
    for task, length in LENGTHS.items():
        out = tmp_path_factory.mktemp("all")
        weights = trained[task] / "checkpoint-best"
        argv = tiny_flags(coco, out, task=task, num_max_bpe_tokens=length, finetune=weights, eval=True)
        assert run.main(argv) == 0
        contents[task] = (out / SUBMISSIONS[task]).read_bytes()
        assert len(json.loads(contents[task])) == {"vqav2": 84, "coco_captioning": 15}[task]
    return contents


def refused(argv):
    with pytest.raises(InputError) as caught:
        read_settings(argv)
    return caught.value.problems


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "weights", ["checkpoint-best", "checkpoint-best.pth", "checkpoint-0.pth", "checkpoint-last", ".",
                "checkpoint-best/model.safetensors"],
)  # fmt: skip
def test_a_checkpoint_and_the_data_are_a_whole_command(trained, bare, wanted, tmp_path, task, weights):
    """The same bytes as with all flags; the run has one epoch, so all its checkpoints hold the same weights."""
    assert run.main(short(trained[task] / weights, bare, tmp_path, "--device", "cpu", "--num_workers", "0")) == 0
    assert (tmp_path / SUBMISSIONS[task]).read_bytes() == wanted[task]


@pytest.mark.slow
def test_so_is_one_of_deepspeed(coco, bare, tmp_path):
    flags = tiny_flags(coco, tmp_path / "out", epochs=1, warmup_epochs=0, num_max_bpe_tokens=12, enable_deepspeed=True)
    ended = start(flags)
    assert ended.returncode == 0, ended.stderr
    contents = set()
    for weights in ("checkpoint-0", "checkpoint-best", "checkpoint-last", "."):
        argv = short(tmp_path / "out" / weights, bare, tmp_path / "said", "--device", "cpu", "--num_workers", "0")
        settings = read_settings(argv)
        assert (settings.task.name, settings.data.num_max_bpe_tokens) == ("vqav2", 12)
        assert run.main(argv) == 0
        contents.add((tmp_path / "said" / SUBMISSIONS["vqav2"]).read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("task", TASKS)
def test_flags_that_say_the_same_again_are_fine(trained, coco, tmp_path, task):
    again = ["--task", task, "--model", "beit3_tiny_patch16_64", "--input_size", "64", "--vocab_size", "100"]
    again += ["--num_max_bpe_tokens", str(LENGTHS[task]), "--sentencepiece_model", str(coco / "mini.spm")]
    read_settings(short(trained[task] / "checkpoint-best", coco, tmp_path, *again))
    read_settings(short(trained[task] / "checkpoint-best.pth", coco, tmp_path, "--model", settings_name(task)))


def settings_name(task):
    return {"vqav2": "beit3_tiny_patch16_64_vqav2", "coco_captioning": "beit3_tiny_patch16_64_captioning"}[task]


def test_what_a_description_holds(trained, coco):
    for task, out in trained.items():
        for name in ("checkpoint-best", "checkpoint-best.pth", "checkpoint-0.pth", "checkpoint-last"):
            checkpoint = read_checkpoint(out / name)
            said = checkpoint.description
            assert said["task"] == task
            assert said["model"] == settings_name(task)
            assert (said["image_size"], said["vocab_size"], said["num_max_bpe_tokens"]) == (64, 100, LENGTHS[task])
            assert said["tokenizer_sha256"] == Tokenizer(coco / "mini.spm").sha256
            every = [*EVERY_FLAG.values(), *TASK_FLAGS[task]]
            own = {each.name for each in TASK_FLAGS[task]}
            shared = {name for settings in CONCERNS.values() for name in settings.__dataclass_fields__}
            wanted = {each.name for each in every if each.facts.decides_steps and each.name in own | shared}
            assert said["flags"].keys() == {"task"} | wanted - {"zero_stage"}  # which is of DeepSpeed alone
            assert (said["flags"]["lr"], said["flags"]["opt_betas"]) == (1e-3, [0.9, 0.999])
            meaning = {"meaning of the head"} if task == "vqav2" else set()
            assert said["data"].keys() == {"training data", "validation data", "tokenizer"} | meaning
            assert said["data"]["tokenizer"] == said["tokenizer_sha256"]
        best, metric = read_checkpoint(out / "checkpoint-best").description, {"vqav2": "score"}.get(task, "CIDEr")
        (log,) = map(json.loads, (out / "log.txt").read_text().splitlines())
        assert best[metric] == log[f"val_{metric}"]
        assert best["epoch"] == 0
        for name in ("checkpoint-best", "checkpoint-last"):
            assert (out / name / "tokenizer.spm").read_bytes() == (coco / "mini.spm").read_bytes()
    lines = (coco / "answer2label.txt").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert read_checkpoint(trained["vqav2"] / "checkpoint-best").description["answers"] == answers


# What contradicts the checkpoint


@pytest.mark.parametrize("weights", ["checkpoint-best", "checkpoint-0.pth"])
@pytest.mark.parametrize(
    ("flags", "stated", "given"),
    [
        (["--num_max_bpe_tokens", "6"], "num_max_bpe_tokens 12", "--num_max_bpe_tokens 6"),
        (["--vocab_size", "64010"], "vocab_size 100", "--vocab_size 64010"),
        (["--input_size", "480"], "image_size 64", "--input_size 480"),
        (["--model", "beit3_base_patch16_480"], "model beit3_tiny_patch16_64", "--model beit3_base_patch16_480"),
        (["--task", "coco_captioning"], "task vqav2", "--task coco_captioning"),
        (["--task=nocaps"], "task vqav2", "--task nocaps"),
    ],
)
def test_a_flag_that_contradicts_the_checkpoint_is_refused_naming_both(
    trained, bare, tmp_path, weights, flags, stated, given
):
    path = trained["vqav2"] / weights
    told = refused(short(path, bare, tmp_path, *flags))
    assert told[0] == f"{path}: made with {stated}, the command line says {given}"
    assert not (tmp_path / SUBMISSIONS["vqav2"]).exists()


def test_all_contradictions_are_told_at_once(trained, bare, tmp_path):
    flags = "--num_max_bpe_tokens 6 --vocab_size 7 --model beit3_base_patch16_480 --input_size 480 --lr -1".split()
    told = refused(short(trained["vqav2"] / "checkpoint-best", bare, tmp_path, *flags))
    assert len(told) == 6  # and that the tokenizer has more tokens than seven
    assert sum("made with" in problem for problem in told) == 4


def another_tokenizer(path):
    """A SentencePiece file with the same tokens that is not the same file."""
    content = (reference.MINI_COCO / "mini.spm").read_bytes()
    path.write_bytes(content + b"\xba\x3e\x03new")  # a field that SentencePiece does not know, which it passes over
    assert Tokenizer(path).vocab_size == 88
    return path


def test_another_tokenizer_is_refused_naming_both(trained, coco, bare, tmp_path):
    spm = another_tokenizer(tmp_path / "other.spm")
    ours, other = (Tokenizer(file).sha256[:12] for file in (coco / "mini.spm", spm))
    path = trained["vqav2"] / "checkpoint-best"
    told, of_index = refused(short(path, bare, tmp_path, "--sentencepiece_model", str(spm)))
    assert "index" in of_index and "tokenizer" in of_index  # which was made with the checkpoint's
    assert told.startswith(
        f"{path}: made with the tokenizer of SHA-256 {ours}…, the command line says --sentencepiece_model {spm}, "
        f"which is {other}…"
    )
    changed = copied(path, tmp_path / "changed")
    shutil.copy(spm, changed / "tokenizer.spm")
    told, of_index = refused(short(changed, bare, tmp_path))
    assert "index" in of_index
    assert ours in told and other in told and "give the right one as --sentencepiece_model" in told
    read_settings(short(changed, bare, tmp_path, "--sentencepiece_model", str(coco / "mini.spm")))


def copied(folder, to):
    shutil.copytree(folder, to)
    return to


def test_a_folder_without_its_tokenizer_is_told(trained, coco, bare, tmp_path):
    folder = copied(trained["vqav2"] / "checkpoint-best", tmp_path / "folder")
    (folder / "tokenizer.spm").unlink()
    (told,) = refused(short(folder, bare, tmp_path))
    assert told == f"--sentencepiece_model is needed: the tokenizer, beit3.spm; {folder} holds none"
    read_settings(short(folder, bare, tmp_path, "--sentencepiece_model", str(coco / "mini.spm")))
    (folder / "tokenizer.spm").write_bytes(b"<html>")
    (told,) = refused(short(folder, bare, tmp_path))
    assert f"{folder / 'tokenizer.spm'}: is not a SentencePiece model" in told


# What else may be typed


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "--finetune {path}: no such file or folder"),
        ("empty", "{path}: a folder without model.safetensors"),
        ("text", "{path}: not a readable checkpoint but"),
        ("", "--eval needs a checkpoint: --finetune FILE"),
    ],
)
def test_a_checkpoint_that_is_none_is_the_one_thing_told(bare, tmp_path, name, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("some notes of mine, which are no weights")
    path = tmp_path / name if name else ""
    (told,) = refused(short(path, bare, tmp_path))
    assert told.startswith(said.format(path=path))


def test_the_last_of_two_checkpoints_counts_and_resume_is_no_second_one(trained, bare, tmp_path):
    best, full = (trained["vqav2"] / name for name in ("checkpoint-best", "checkpoint-0.pth"))
    assert read_settings(short(full, bare, tmp_path, "--finetune", str(best))).checkpoint.path == best
    (told,) = refused(short(best, bare, tmp_path, "--resume", str(full)))
    assert told == f"--eval takes one checkpoint: --finetune {best} or --resume {full}, not both"
    resume = ["--eval", "--resume", str(full), "--data_path", str(bare), "--output_dir", str(tmp_path)]
    assert read_settings(resume).task.name == "vqav2"


def test_what_is_wrong_beside_the_checkpoint(trained, bare, tmp_path):
    path = trained["coco_captioning"]
    for split in ("tset", "test-dev", ""):
        (told,) = refused(short(path, bare, tmp_path, "--split", split))
        assert told == f"--split {split or repr(split)}: coco_captioning has test, val"
    (told,) = refused(["--eval", "--finetune", str(path), "--data_path", str(bare), "--output_dir", ""])
    assert told == "--eval needs --output_dir, where the submission is written"
    (told,) = refused(short(path, tmp_path, tmp_path))
    assert "coco_captioning.test.jsonl not found" in told
    assert f'XLMRobertaTokenizer("{path / "checkpoint-best" / "tokenizer.spm"}")' in told


# Descriptions that a training does not write


def with_description(trained, to, change, task="vqav2"):
    """A copy of a checkpoint folder whose description is `change(description)`, text or a JSON value."""
    folder = copied(trained[task] / "checkpoint-best", to)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    described = change(json.loads(header["__metadata__"]["description"]))
    header["__metadata__"]["description"] = described if isinstance(described, str) else json.dumps(described)
    header["__metadata__"].pop("sha256")
    written = json.dumps(header).encode()
    file.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + length :])
    return folder


HOSTILE = [
    ("task", 5), ("task", None), ("task", ["vqav2"]), ("task", {}), ("task", ""), ("task", "a\x1b[2Jb\n"),
    ("task", "x" * 10**5), ("task", "nlvr2"), ("task", "imagenet"), ("task", "coco_captioning"),
    ("model", 7), ("model", None), ("model", "a\x1b[2Jb"), ("model", "x" * 10**5), ("model", "beit3_huge_patch16_64"),
    ("model", "../../etc/passwd"), ("model", "beit3_base_patch16_480_vqav2"),
    ("image_size", "64"), ("image_size", 64.5), ("image_size", -64), ("image_size", 10**9), ("image_size", True),
    ("image_size", None), ("image_size", float("nan")), ("image_size", 480),
    ("vocab_size", 10**12), ("vocab_size", 0), ("vocab_size", [100]), ("vocab_size", 50),
    ("num_max_bpe_tokens", 10**9), ("num_max_bpe_tokens", 2), ("num_max_bpe_tokens", "12"),
    ("answers", "abc"), ("answers", 5), ("answers", [1, 2]), ("answers", []), ("answers", None), ("answers", {"a": 1}),
    ("tokenizer_sha256", 5), ("tokenizer_sha256", None), ("tokenizer_sha256", "\x1b" * 64),
    ("tokenizer_sha256", "0" * 64),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), HOSTILE, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("kind", ["folder", "pth"])
def test_a_description_of_another_form_is_one_sentence(trained, bare, tmp_path, capsys, name, value, kind):
    if kind == "folder":
        path = with_description(trained, tmp_path / "folder", lambda said: {**said, name: value})
    else:
        path = tmp_path / "weights.pth"
        content = torch.load(trained["vqav2"] / "checkpoint-best.pth", weights_only=True)
        content["description"][name] = value
        torch.save(content, path)
    assert run.main(short(path, bare, tmp_path / "out")) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("error: ")
    assert str(path) in told or (name, value) == ("vocab_size", 50)
    assert name.replace("image", "") in told or name in ("model", "vocab_size", "tokenizer_sha256")
    assert told.rstrip("\n").isprintable() and len(told) < 1000 + len(str(path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[1]", "5", "null", "{", "", "[" * 10**5, '"vqav2"', "{}\x1b[2J"])
def test_a_description_that_is_no_mapping_is_one_sentence(trained, bare, tmp_path, text):
    path = with_description(trained, tmp_path / "folder", lambda said: text)
    (told,) = refused(short(path, bare, tmp_path))
    assert told.startswith(f"{path / 'model.safetensors'}: not a readable safetensors file (")
    assert told.isprintable()


def test_more_answers_than_the_head_has_outputs_are_refused(trained, bare, tmp_path, caplog):
    path = with_description(trained, tmp_path / "folder", lambda said: {**said, "answers": ["a"] * 15})
    assert run.main(short(path, bare, tmp_path / "out", "--device", "cpu", "--num_workers", "0")) == 2
    assert "15 answers, but the head of the checkpoint has 14" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("shape", ["x", ["a", 2], [[1], 2], [], [5], None, [1.5, 2], [True, 2]])
def test_shapes_of_another_form_end_in_one_sentence(coco, bare, tmp_path, shape):
    names = ("beit3.text_embed.weight", "beit3.encoder.embed_positions.A.weight", "beit3.encoder.layers.0.a")
    header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name in names}).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    told = refused(short(path, bare, tmp_path, "--task", "vqav2", "--sentencepiece_model", str(coco / "mini.spm")))
    assert len(told) == 1
    assert "not a readable safetensors file" in told[0] or "--model is needed" in told[0]


# Released files, which say nothing


def released(to, name, **options):
    """A `.pth` file as the BEiT-3 repository's are: weights and nothing else."""
    model = reference.build(name, vocab_size=100, **options)
    torch.save({"model": model.state_dict()}, to)
    return to


def test_of_a_released_file_the_shapes_tell_model_size_and_vocabulary(coco, bare, tmp_path):
    spm = ["--sentencepiece_model", str(coco / "mini.spm")]
    captioning = released(tmp_path / "captioning.pth", "beit3_tiny_patch16_64_captioning")
    settings = read_settings(short(captioning, bare, tmp_path, "--task", "coco_captioning", *spm))
    assert settings.model_name == "beit3_tiny_patch16_64_captioning"
    assert (settings.data.input_size, settings.model.vocab_size) == (64, 100)
    assert settings.data.num_max_bpe_tokens == 32  # as published
    chosen = short(captioning, bare, tmp_path, "--task", "coco_captioning", "--num_max_bpe_tokens", "16", *spm)
    assert read_settings(chosen).data.num_max_bpe_tokens == 16
    vqa = released(tmp_path / "vqa.pth", "beit3_tiny_patch16_64_vqav2", num_classes=14)
    settings = read_settings(short(vqa, bare, tmp_path, "--task", "vqav2", *spm))
    assert (settings.model_name, settings.data.num_max_bpe_tokens) == ("beit3_tiny_patch16_64_vqav2", 64)
    (told,) = refused(short(vqa, bare, tmp_path, "--task", "vqav2"))
    assert told == f"--sentencepiece_model is needed: the tokenizer, beit3.spm; {vqa} holds none"


def test_a_released_file_predicts_and_needs_the_answers_of_the_data(coco, bare, tmp_path, caplog):
    vqa = released(tmp_path / "vqa.pth", "beit3_tiny_patch16_64_vqav2", num_classes=14)
    flags = ["--task", "vqav2", "--sentencepiece_model", str(coco / "mini.spm"), "--device", "cpu"]
    flags += ["--num_workers", "0"]
    assert run.main(short(vqa, bare, tmp_path / "out", *flags)) == 2
    assert "the checkpoint does not say what its answers are" in caplog.records[-1].getMessage()
    assert run.main(short(vqa, coco, tmp_path / "out", *flags)) == 0
    assert len(json.loads((tmp_path / "out" / SUBMISSIONS["vqav2"]).read_text())) == 84


def test_nocaps_is_predicted_with_what_was_learned_from_coco(trained, bare, tmp_path):
    argv = short(trained["coco_captioning"], bare, tmp_path, "--task", "nocaps", "--device", "cpu")
    assert run.main([*argv, "--num_workers", "0", "--split", "test"]) == 0
    captions = json.loads((tmp_path / "submit_nocaps_test.json").read_text())
    assert len(captions) == 15
    assert not (tmp_path / SUBMISSIONS["coco_captioning"]).exists()
    told = refused(short(trained["vqav2"], bare, tmp_path, "--task", "nocaps"))
    assert told == [f"{trained['vqav2']}: made with task vqav2, the command line says --task nocaps"]
