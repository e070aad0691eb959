"""fp16 with scaled losses, as GPUs without bf16 train.

Here on a CPU, which computes the same, slowly.
"""

import signal

import pytest
import torch

import Trainer
from utils.averaging import network_state
from conftest import TINY, in_process, send_at, steps
from utils.checkpoint import read_checkpoint
from scripts.kill_test import compare, differences, rows

# a window of 4 with a KL term: the template's recipe, whose KL gradient is large
FLAGS = [
    *TINY, "--precision", "auto", "--recipe", "template", "--train_vi_len", "4",
    "--kl_anneal_cycle", "1", "--frame_H", "8", "--frame_W", "16"
]


@pytest.fixture(autouse=True)
def fp16(monkeypatch):
    """What is picked on a T4."""
    monkeypatch.setattr(Trainer, "pick_precision", lambda *_: ("fp16", "fp16"))


@pytest.mark.parametrize("optim", ["Adam", "Muon"])
def test_an_overflowing_gradient_only_halves_the_scale(optim):
    model = Trainer.VAE_Model(Trainer.build_parser().parse_args([*FLAGS, "--optim", optim]))
    img, label = torch.rand(2, 2, 4, 3, 8, 16, generator=torch.Generator().manual_seed(1))
    model.kl_annealing.get_beta = lambda: 0.0
    model.training_one_step(img, label, True)
    assert steps(model) == (1, 0)
    before, scale = network_state(model), model.scaler.get_scale()

    model.kl_annealing.get_beta = lambda: 1.0
    assert model.training_one_step(img, label, True).isfinite()
    assert steps(model) == (1, 1) and model.scaler.get_scale() == scale / 2
    assert differences(before, network_state(model)) == []

    while model.state.skipped_in_a_row:
        model.training_one_step(img, label, True)
    assert steps(model)[0] == 2 and differences(before, network_state(model)) != []


def test_a_resumed_run_keeps_the_scale(tiny_data, tmp_path, monkeypatch):
    def train(folder, *flags):
        return in_process(Trainer.main, "--DR", tiny_data, "--save_root", folder, *FLAGS, *flags)

    assert train(tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        # the sixth of eight steps of epoch 1
        send_at(patch, "training_one_step", 14, signal.SIGTERM)
        assert train(tmp_path / "run") == 143
    assert train(tmp_path / "run", "--resume") == 0
    assert compare(tmp_path / "run", tmp_path / "whole") == []
    assert int(rows(tmp_path / "run" / "history.csv")[1]["skipped_steps"]) > 0
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["resume"]["scaler"]["scale"] < 65536
