"""Two ranks on the CPU: identical weights, files by rank 0 alone, own windows for each rank.

A run that is stopped and resumed ends bitwise identical.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import Trainer
from conftest import ROOT, TINY, in_process
from utils import distributed
from utils.checkpoint import read_checkpoint
from utils.files import locked
from utils.schedules import set_learning_rate
from utils.training_state import capture, restore
from scripts.kill_test import compare

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def two_ranks(tiny_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [*TORCHRUN, str(ROOT / "tests" / "two_ranks.py"), str(tiny_data), str(out)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out, json.loads((out / "report.json").read_text()), done.stdout


@pytest.mark.parametrize("recipe", ["pool", "template"])
def test_weights_averages_and_optimizer_agree_on_all_ranks(two_ranks, recipe):
    assert two_ranks[1][recipe]["same"]


@pytest.mark.parametrize("recipe", ["pool", "template"])
def test_each_rank_has_windows_of_its_own(two_ranks, recipe):
    first, second = (
        [window for step in windows for window in step]
        for windows in two_ranks[1][recipe]["windows"]
    )
    assert len(first) == len(second) and first != second
    # in order, a window to one rank alone: 16 windows, 8 each, over two epochs
    if recipe == "template":
        assert len(set(first)) == len(set(second)) == 8 and not set(first) & set(second)


@pytest.mark.parametrize(
    "recipe, where", [("pool", "training"), ("pool", "validation"), ("template", "training")]
)
def test_a_signal_to_one_rank_stops_all_and_resume_is_exact(two_ranks, recipe, where):
    out, report, _ = two_ranks
    assert report[recipe][where] == {"stopped": [True, True], "same": True}
    assert compare(out / f"{recipe} {where}", out / recipe) == []


def test_rank_0_alone_writes_and_prints(two_ranks, tiny_run):
    out, _, said = two_ranks
    assert {p.name for p in (out / "pool").iterdir()} == {p.name for p in tiny_run.iterdir()}
    # five runs came to its end, once each, some of them after a stop
    assert said.count("epoch 0:") == 5
    assert len(read_checkpoint(out / "pool" / "last.ckpt")["resume"]["ranks"]) == 2


def test_torchrun_on_the_command_line(tiny_data, tmp_path):
    """SIGTERM to torchrun itself; the line says how to resume with torchrun."""
    folder, log = tmp_path / "run", tmp_path / "log"
    with open(log, "w") as file:
        agent = subprocess.Popen(
            [
                *TORCHRUN, str(ROOT / "Trainer.py"), "--DR", str(tiny_data),
                "--save_root", str(folder), *TINY, "--num_epoch", "1000", "--gpu", "2"
            ],
            stdout=file, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + 90
    while (
        "epoch 0:" not in log.read_text() and agent.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    agent.send_signal(signal.SIGTERM)
    agent.wait(60)
    said = log.read_text()
    assert said.count("saved; resume with: torchrun --nproc_per_node=2 ") == 1
    assert "--resume" in said
    assert 'Trainer.py", line' not in said  # torchrun has a traceback of its own; ours has none
    assert len(read_checkpoint(folder / "last.ckpt")["resume"]["ranks"]) == 2


def test_an_error_of_one_rank_alone_ends_all(tiny_data, tmp_path):
    with locked(tmp_path):  # rank 0 alone looks
        done = subprocess.run(
            [
                *TORCHRUN, str(ROOT / "Trainer.py"), "--DR", str(tiny_data),
                "--save_root", str(tmp_path), *TINY
            ],
            capture_output=True, text=True, timeout=90
        )
    assert done.returncode != 0 and done.stderr.count("another run is using it") == 1


def test_several_gpus_without_torchrun(tiny_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.chdir(ROOT)
    status = in_process(
        Trainer.main, "--DR", tiny_data, "--save_root", tmp_path / "run", *TINY, "--gpu", 2
    )
    assert status == 2
    err = capsys.readouterr().err
    command = f"torchrun --nproc_per_node=2 Trainer.py --DR {tiny_data} --save_root "
    assert err.count("\n") == 1 and "--gpu 2: " in err and command in err and "kernel" not in err
    assert not (tmp_path / "run").exists()


def test_another_number_of_processes_is_reported(tiny_data, two_ranks, tmp_path, capsys):
    out, _, _ = two_ranks
    assert "LOCAL_WORLD_SIZE" not in os.environ
    status = in_process(
        Trainer.main, "--DR", tiny_data, "--save_root", tmp_path / "one", *TINY, "--num_epoch", 3,
        "--ckpt_path", out / "pool" / "last.ckpt"
    )
    assert status == 0
    assert "1 process(es), the checkpoint's run had 2" in capsys.readouterr().out


def test_a_further_rank_samples_teacher_forcing_as_the_others_do(monkeypatch):
    """A run of one process, resumed with two."""
    first, second = (Trainer.VAE_Model(Trainer.build_parser().parse_args(TINY)) for _ in range(2))
    set_learning_rate(first)
    first.sample_teacher_forcing(9)
    saved = capture(first)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    restore(second, saved)
    first.tfr = second.tfr = 0.5
    for model in first, second:
        monkeypatch.setattr(model, "teacher_forcing_ratio_update", lambda: None)
    samples = [model.sample_teacher_forcing(64) for model in (first, second)]
    assert 10 < samples[0].sum() < 54 and torch.equal(*samples)
