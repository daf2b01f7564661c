"""`--patience`: training ends when validation has not improved for so long, and a resumed run remembers the count."""

import json
import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

import run_beit3_finetuning as run
import utils
from beit3.model.description import about
from optim_factory import cosine_schedule
from runs.state import RunPosition
from tasks.base import Scores
from tests.test_new_task import full_checkpoints, one_line_more, pictures, training_flags  # noqa: F401  fixtures
from tests.toy_task import Colour


def settings(epochs, patience):
    return SimpleNamespace(optimizer=SimpleNamespace(epochs=epochs), run=SimpleNamespace(patience=patience))


@pytest.mark.parametrize(
    ("epoch", "step", "best_epoch", "patience", "over"),
    [
        (0, 0, -1, 1, False),  # nothing was validated yet
        (5, 0, -1, 1, False),  # begun at --start_epoch 5
        (1, 0, 0, 1, False),  # the first validation is the best
        (2, 0, 0, 1, True),
        (4, 0, 1, 3, False),
        (5, 0, 1, 3, True),
        (9, 0, 1, 3, True),  # the flag was smaller when the run was started again
        (5, 0, 1, 0, False),  # no patience asked for
        (5, 7, 1, 3, False),  # an epoch that was begun is ended first
        (20, 0, 19, 0, True),
        (20, 0, 19, 3, True),
    ],
)
def test_when_a_run_is_over(epoch, step, best_epoch, patience, over):
    assert RunPosition(epoch, step, 50.0, best_epoch).is_over(settings(20, patience)) is over


SCORES = [40.0, 60.0, 60.0, 55.0, 59.0, 70.0, 1.0]  # of validation after each epoch
EPOCHS = 7


@pytest.fixture
def heard(caplog, monkeypatch):
    monkeypatch.setattr(utils, "set_up_logging", lambda is_main: None)
    caplog.set_level("INFO")
    return caplog


@pytest.fixture
def start(pictures, heard, monkeypatch):
    """Start the run with a patience; gives what was said. Validation scores as it is written above."""

    def go(out, patience, *more, scores=SCORES):
        done = len(epochs_of(out)) if (out / "log.txt").exists() else 0
        left = iter([{} if scores is None else {"accuracy": score} for score in SCORES[done:]])
        monkeypatch.setattr(Colour, "score", lambda *_, **__: Scores(next(left)))
        heard.clear()
        flags = [*training_flags(pictures, out), "--epochs", str(EPOCHS), "--patience", str(patience), *more]
        assert run.main(flags) == 0
        return heard.text

    return go


def epochs_of(out):
    return [json.loads(line)["epoch"] for line in (out / "log.txt").read_text().splitlines()]


def test_a_run_ends_after_so_many_validations_without_a_better_one(start, tmp_path):
    said = start(tmp_path, 2, "--save_ckpt_freq", "10")
    assert epochs_of(tmp_path) == [0, 1, 2, 3]
    assert "no improvement for 2 epochs: training ends after epoch 3 of 7" in said
    assert "best validation accuracy 60.00, after epoch 1" in said
    assert [path.name for path in full_checkpoints(tmp_path)] == ["checkpoint-3.pth"]
    assert about(tmp_path / "checkpoint-best").description["epoch"] == 1
    assert about(tmp_path / "checkpoint-last").description["epoch"] == 3
    # The learning rate falls as it would over all epochs.
    rates = [json.loads(line)["train_lr"] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert rates == pytest.approx(cosine_schedule(1e-3, 1e-6, epochs=EPOCHS, steps_per_epoch=12)[11:48:12])

    last = (tmp_path / "checkpoint-last" / "model.safetensors").stat().st_mtime_ns
    said = start(tmp_path, 2, "--save_ckpt_freq", "10")  # the same command again
    assert epochs_of(tmp_path) == [0, 1, 2, 3]
    assert "checkpoint-3.pth: already finished after epoch 3" in said and "training ends after epoch 3 of 7" in said
    assert (tmp_path / "checkpoint-last" / "model.safetensors").stat().st_mtime_ns == last

    said = start(tmp_path, 4)  # more patience meets the best epoch, the last but one
    assert "going on with epoch 4, step 0" in said and "no improvement" not in said
    assert epochs_of(tmp_path) == list(range(EPOCHS))
    assert "best validation accuracy 70.00, after epoch 5" in said


def test_a_resumed_run_remembers_how_long_it_has_waited_and_ends_as_the_one_that_went_through(start, tmp_path):
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    start(through, 3)
    assert epochs_of(through) == [0, 1, 2, 3, 4]
    resumed.mkdir()
    shutil.copy(through / "checkpoint-3.pth", resumed)
    (resumed / "log.txt").write_text("".join((through / "log.txt").read_text().splitlines(keepends=True)[:4]))
    said = start(resumed, 3)
    assert epochs_of(resumed) == [0, 1, 2, 3, 4] and "no improvement for 3 epochs" in said
    ended, wanted = (load_file(out / "checkpoint-last" / "model.safetensors") for out in (resumed, through))
    assert all(ended[name].equal(wanted[name]) for name in wanted)


def test_without_a_score_patience_has_no_effect_and_says_so_once(start, tmp_path):
    said = start(tmp_path, 1, "--epochs", "3", scores=None)
    assert epochs_of(tmp_path) == [0, 1, 2]
    assert said.count("--patience has no effect: validation gives no accuracy here to improve") == 1
    assert "no improvement" not in said
