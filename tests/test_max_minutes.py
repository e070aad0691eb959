"""--max_minutes: epochs and schedules are fitted to the time, and the run ends with best.ckpt."""

import csv
import signal
import time

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
    """Have time.monotonic() pass by 0.1 s in a training step, and by nothing else."""
    now, step = [0.0], Trainer.VAE_Model.training_one_step

    def timed(*args):
        now[0] += 0.1
        return step(*args)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Trainer.VAE_Model, "training_one_step", timed)


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
