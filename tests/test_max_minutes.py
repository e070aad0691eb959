"""--max_minutes: epochs and schedules are fitted to the time, and the run ends with best.ckpt."""

import csv
import signal
import time
from types import SimpleNamespace

import pytest
import torch

import Trainer
from conftest import TINY, send_at
from utils.cli import Stopped


def run(data, folder, *words):
    """(seconds, rows of history.csv, last.ckpt) of a run in this process."""
    began = time.monotonic()
    Trainer.main(["--DR", str(data), "--save_root", str(folder), *TINY, *words])
    seconds = time.monotonic() - began
    rows = list(csv.DictReader(open(folder / "history.csv", newline="", encoding="utf-8")))
    assert (folder / "best.ckpt").exists()
    return seconds, rows, torch.load(folder / "last.ckpt", weights_only=True)


def test_a_run_is_fitted_to_the_time(tiny_data, tmp_path, capsys):
    words = [
        "--num_epoch", "100000", "--tfr_sde", "0", "--max_minutes", "0.2", "--fast_train",
        "--fast_train_epoch", "1"
    ]
    seconds, rows, last = run(tiny_data, tmp_path, *words)
    assert seconds < 24 and 0 < len(rows) < 100000  # 12 on a machine that does nothing else
    assert last["args"]["num_epoch"] == 100000 and last["last_epoch"] == len(rows) - 1
    (group,) = last["optimizer"]["param_groups"]
    assert group["lr"] < 0.05 * 0.001  # the cosine came to its end
    assert "--max_minutes 0.2" in capsys.readouterr().out


def test_a_run_with_time_to_spare_is_left_alone(tiny_data, tiny_run, tmp_path):
    _, rows, last = run(tiny_data, tmp_path, "--max_minutes", "60")
    assert len(rows) == 2 and last["args"]["num_epoch"] == 2
    plain = torch.load(tiny_run / "last.ckpt", weights_only=True)
    assert all(
        torch.equal(value, plain["state_dict"][name]) for name, value in last["state_dict"].items()
    )


@pytest.fixture
def clock(monkeypatch):
    """Have time.monotonic() pass by 0.1 s in a training step, and by nothing else.

    A test may set `pace`: the seconds of a step by its number, trial steps included.
    """
    clock = SimpleNamespace(now=0.0, steps=0, pace=lambda number: 0.1)
    step = Trainer.VAE_Model.training_one_step

    def timed(*args):
        clock.steps += 1
        clock.now += clock.pace(clock.steps)
        return step(*args)

    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(Trainer.VAE_Model, "training_one_step", timed)
    return clock


def test_steps_that_become_slower_end_the_curves_in_time(clock, tiny_data, tmp_path, capsys):
    """Time for two epochs of 64 steps at first; then for half of what is left."""
    clock.pace = lambda number: 0.1 if number <= 40 else 0.2
    words = ["--batch_size", "1", "--max_minutes", "0.32"]
    _, rows, last = run(tiny_data, tmp_path, *words)
    assert capsys.readouterr().out.count("time sets the rest of the run") == 1
    assert 60 * 0.32 - 7 < clock.now < 60 * 0.32 and len(rows) == 2
    steps = list(csv.DictReader(open(tmp_path / "steps.csv", newline="", encoding="utf-8")))
    lrs = [float(row["lr"]) for row in steps]
    falling = lrs[lrs.index(max(lrs)):]
    assert sorted(falling, reverse=True) == falling and lrs[-1] < 0.02 * max(lrs)
    assert int(steps[-1]["step"]) < 128
    run(tiny_data, tmp_path, *words, "--resume")
    assert "all 2 epochs are done" in capsys.readouterr().out


def test_a_run_that_became_slower_resumes_where_time_had_brought_it(
    clock, tiny_data, tmp_path, monkeypatch
):
    clock.pace = lambda number: 0.1 if number <= 40 else 0.2
    words = ["--batch_size", "1", "--max_minutes", "0.32"]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        send_at(patch, "training_one_step", 75, signal.SIGINT)
        run(tiny_data, tmp_path, *words)
    run(tiny_data, tmp_path, *words, "--resume")
    steps = list(csv.DictReader(open(tmp_path / "steps.csv", newline="", encoding="utf-8")))
    lrs = [float(row["lr"]) for row in steps]
    falling = lrs[lrs.index(max(lrs)):]
    assert sorted(falling, reverse=True) == falling and lrs[-1] < 0.02 * max(lrs)


def test_a_validation_makes_no_step_slower(clock, tiny_data, tmp_path, monkeypatch, capsys):
    """With hardly more time than all epochs need, and validations as long as epochs."""
    validation = Trainer.VAE_Model.rollout

    def timed(self, first, label, on_block=None):
        clock.now += 6 * (label.shape[1] - 1) / 19
        return validation(self, first, label, on_block)

    monkeypatch.setattr(Trainer.VAE_Model, "rollout", timed)
    words = ["--batch_size", "1", "--num_epoch", "3"]  # 3 * 64 steps and 3 validations: 37.2 s
    _, rows, last = run(tiny_data, tmp_path, *words, "--max_minutes", "0.95")
    assert len(rows) == 3 and not last["resume"]["state"]["by_time"]
    assert "time sets the rest" not in capsys.readouterr().out


def test_a_stop_in_the_last_validation_costs_no_further_minutes(
    clock, tiny_data, tmp_path, monkeypatch
):
    words = ["--batch_size", "1", "--max_minutes", "0.15", "--num_epoch", "70"]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        send_at(patch, "val_one_step", 1, signal.SIGINT)
        run(tiny_data, tmp_path, *words)
    before = torch.load(tmp_path / "last.ckpt", weights_only=True)
    taken = clock.steps
    _, rows, last = run(tiny_data, tmp_path, *words, "--resume")
    assert clock.steps - taken <= 6  # the five of a trial, and one at a learning rate of 0
    assert len(rows) == 1 and last["last_epoch"] == 0
    for name, weight in before["train_state_dict"].items():
        if "running" not in name and "tracked" not in name:  # statistics of BatchNorm
            assert torch.equal(weight, last["train_state_dict"][name])


def test_the_time_that_is_left_is_not_that_of_the_first_steps(clock, tiny_data, tmp_path, capsys):
    clock.pace = lambda number: 600 if number == 1 else 60
    Trainer.main(["--DR", str(tiny_data), "--save_root", str(tmp_path), *TINY,
                  "--batch_size", "1", "--num_epoch", "1"])
    assert "about 34 min of training left" in capsys.readouterr().out  # 34 of 64 steps


def test_a_resumed_run_has_the_rest_of_the_curves(clock, tiny_data, tmp_path, monkeypatch):
    """Stopped half way; more minutes than the epochs need, to which it was fitted."""
    words = ["--batch_size", "1", "--num_epoch", "70"]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        send_at(patch, "training_one_step", 25, signal.SIGINT)
        run(tiny_data, tmp_path, *words, "--max_minutes", "0.15")
    run(tiny_data, tmp_path, *words, "--max_minutes", "0.3", "--resume")
    steps = list(csv.DictReader(open(tmp_path / "steps.csv", newline="", encoding="utf-8")))
    lrs = [float(row["lr"]) for row in steps]
    falling = lrs[lrs.index(max(lrs)):]
    assert len(lrs) > 80 and sorted(falling, reverse=True) == falling
    assert lrs[-1] < 0.02 * max(lrs)


def test_a_fitted_run_has_the_whole_curves_even_in_one_epoch(clock, tiny_data, tmp_path):
    """By the clock 35 of 64 steps fit."""
    words = ["--batch_size", "1", "--max_minutes", "0.15", "--kl_anneal_cycle", "2"]
    words += ["--num_epoch", "70"]
    _, rows, last = run(tiny_data, tmp_path, *words)
    assert len(rows) == 1 and last["last_epoch"] == 0
    steps = list(csv.DictReader(open(tmp_path / "steps.csv", newline="", encoding="utf-8")))
    ratios, betas, lrs = ([float(row[name]) for row in steps] for name in ("tfr", "beta", "lr"))
    done = [int(row["step"]) for row in steps]
    assert done == list(range(done[0], len(done) + done[0]))
    assert done[0] < 3 and done[-1] in (35, 36)  # sums of tenths are rounded
    shares = [(step - 1) / 35 for step in done[1:]]  # the first row may be the mean of two steps
    falling = [max(0.035, 1 - 0.1 * max(0, 70 * share - 9)) for share in shares]
    cycles = [2 * share % 1 if share < 1 else 1 for share in shares]
    assert ratios[1:] == pytest.approx(falling) and betas[1:] == pytest.approx(cycles, abs=1e-6)
    assert ratios[0] == 1 and ratios[-1] == 0.035 and betas[0] < 0.1 and max(betas) > 0.9
    assert lrs[-1] < 0.02 * max(lrs)


def test_a_fitted_template_run_has_schedules_by_epoch(tiny_data, tmp_path):
    _, rows, last = run(
        tiny_data, tmp_path, "--recipe", "template", "--train_vi_len", "4", "--num_epoch", "100000",
        "--max_minutes", "0.1"
    )
    assert float(rows[0]["tfr"]) == 1 and float(rows[0]["lr"]) == 0.001
    assert (last["args"]["tfr_sde"], last["args"]["tfr_d_step"]) == (10, 0.1)
