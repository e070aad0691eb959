"""--max_minutes: epochs and schedules are fitted to the time, and the run ends with best.ckpt."""

import csv
import time

import torch

import Trainer
from conftest import TINY


def run(data, folder, *words):
    """(seconds, rows of history.csv, last.ckpt) of a run in this process."""
    began = time.monotonic()
    Trainer.main(["--DR", str(data), "--save_root", str(folder), *TINY, *words])
    seconds = time.monotonic() - began
    rows = list(csv.DictReader(open(folder / "history.csv", newline="", encoding="utf-8")))
    assert (folder / "best.ckpt").exists()
    return seconds, rows, torch.load(folder / "last.ckpt", weights_only=True)


def test_a_run_is_fitted_to_the_time(tiny_data, tmp_path, capsys):
    words = ["--num_epoch", "100000", "--tfr_sde", "0", "--max_minutes", "0.2", "--fast_train", "--fast_train_epoch", "1"]
    seconds, rows, last = run(tiny_data, tmp_path, *words)
    assert seconds < 24 and 0 < len(rows) < 100000  # 12 on a machine that does nothing else
    assert last["args"]["num_epoch"] == len(rows) and last["last_epoch"] == len(rows) - 1
    (group,) = last["optimizer"]["param_groups"]
    assert group["lr"] < 0.05 * 0.001  # the cosine came to its end
    assert "--max_minutes 0.2" in capsys.readouterr().out


def test_a_run_with_time_to_spare_is_left_alone(tiny_data, tiny_run, tmp_path):
    _, rows, last = run(tiny_data, tmp_path, "--max_minutes", "60")
    assert len(rows) == 2 and last["args"]["num_epoch"] == 2
    plain = torch.load(tiny_run / "last.ckpt", weights_only=True)
    assert all(torch.equal(value, plain["state_dict"][name]) for name, value in last["state_dict"].items())


def test_a_fitted_run_of_the_template_begins_on_ground_truth(tiny_data, tmp_path):
    _, rows, last = run(tiny_data, tmp_path, "--recipe", "template", "--train_vi_len", "4", "--num_epoch", "100000", "--max_minutes", "0.1")
    assert float(rows[0]["tfr"]) == 1  # fitted to nearly no epochs, its decay would round to start before the first
    assert last["args"]["tfr_sde"] == 1 and last["args"]["tfr_d_step"] > 0.1
