"""A step whose loss or gradient is not finite changes nothing; many of them end the run."""

import math
import shutil

import pytest
import torch

import Tester
import Trainer
from utils import cli
from utils.averaging import network_state
from conftest import TINY, in_process, run_cli, steps
from utils.checkpoint import read_checkpoint
from scripts.kill_test import differences, rows


def train(data, folder, *flags):
    return in_process(Trainer.main, "--DR", data, "--save_root", folder, *TINY, *flags)


def one_line(err):
    """The one line on stderr that is no progress bar."""
    (line,) = [
        line
        for line in err.splitlines()
        if "it/s" not in line and "step/s" not in line and "frame/s" not in line
    ]
    assert line.startswith("error: ")
    return line


@pytest.fixture
def model():
    return Trainer.VAE_Model(Trainer.build_parser().parse_args([*TINY, "--ema", "0.9"]))


def window(frames=4):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 2, frames, 3, 16, 32, generator=generator).unbind()


def spoil_frame(img, label):
    img[0, 2, 0, 3, 3] = math.inf


def spoil_pose(img, label):
    label[1, 1, 2, 0, 0] = math.nan  # goes through BatchNorm, whose running averages would keep it


def overflow(img, label):
    img[:, 1:] = 2e19  # squared it is infinite, while the gradient is finite


@pytest.mark.parametrize("teacher_forced", [True, False])
@pytest.mark.parametrize("spoil", [spoil_frame, spoil_pose, overflow])
def test_a_step_that_is_not_finite_changes_nothing(model, spoil, teacher_forced):
    model.training_one_step(*window(), teacher_forced)
    before = (
        network_state(model),
        {k: v.clone() for k, v in model.optim.state_dict()["state"][0].items()},
    )
    img, label = (x.clone() for x in window())
    spoil(img, label)
    loss = model.training_one_step(img, label, teacher_forced)
    assert not loss.isfinite() and steps(model) == (1, 1)
    after = network_state(model), model.optim.state_dict()["state"][0]
    assert differences(before, after) == []
    assert model.training_one_step(*window(), teacher_forced).isfinite()
    assert steps(model) == (2, 1)
    assert differences(before[0], network_state(model)) != []
    # the epoch's means are over the steps that were taken
    assert model.state.epoch_means.figures.isfinite().all()


def plant(monkeypatch, steps):
    """Give chosen training steps, counted from 0, an infinite image."""
    original, calls = Trainer.VAE_Model.training_one_step, []

    def planted(self, img, label, flags):
        calls.append(1)
        img = torch.full_like(img, math.inf) if len(calls) - 1 in steps else img
        return original(self, img, label, flags)

    monkeypatch.setattr(Trainer.VAE_Model, "training_one_step", planted)


def test_skipped_steps_are_counted_in_the_history(tiny_data, tmp_path, monkeypatch):
    plant(monkeypatch, {0, 3, 4, 20})  # 16 steps an epoch
    assert train(tiny_data, tmp_path / "run") == 0
    history = rows(tmp_path / "run" / "history.csv")
    assert [row["skipped_steps"] for row in history] == ["3", "1"]
    assert all(math.isfinite(float(value)) for row in history for value in row.values())


def test_an_epoch_of_skipped_steps_has_no_loss(tiny_data, tmp_path, monkeypatch):
    plant(monkeypatch, range(16))
    assert train(tiny_data, tmp_path / "run") == 0
    first, second = rows(tmp_path / "run" / "history.csv")
    assert first["skipped_steps"] == "16" and second["skipped_steps"] == "0"
    for name in ("train_loss", "train_reconstruction", "train_mse", "train_kl"):
        assert math.isnan(float(first[name])) and math.isfinite(float(second[name]))


def test_a_run_of_skipped_steps_ends_training(tiny_data, tiny_run, tmp_path, monkeypatch, capsys):
    """Also where an epoch is shorter than that run; what was saved stays as it was."""
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    before = {p.name: p.read_bytes() for p in folder.glob("*.ckpt")}
    plant(monkeypatch, range(8, 10_000))
    assert train(tiny_data, folder, "--resume", "--num_epoch", 9) == 2
    line = one_line(capsys.readouterr().err)
    assert "--lr" in line and "not finite for 20 steps in a row" in line
    last = read_checkpoint(folder / "last.ckpt")
    assert last["last_epoch"] == 2  # 8 skipped steps in epoch 2, 12 in epoch 3
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    assert (folder / "epoch=0.ckpt").read_bytes() == before["epoch=0.ckpt"]


def test_a_learning_rate_that_nothing_survives(tiny_data, tiny_run, tmp_path, capsys):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    status = train(
        tiny_data, folder, "--resume", "--num_epoch", 9, "--lr", 10, "--ema", 0, "--kl_weight", 1e30
    )
    assert status == 2
    line = one_line(capsys.readouterr().err)
    assert "not finite" in line and "expected" in line
    for path in folder.glob("*.ckpt"):
        assert all(value.isfinite().all() for value in read_checkpoint(path)["state_dict"].values())


def test_a_first_step_that_is_skipped_is_no_warning(tiny_data, tmp_path):
    # annealed, the first step would have a beta of 0
    flags = ["--num_epoch", 9, "--kl_weight", 1e300, "--kl_anneal_type", "None"]
    done = run_cli("Trainer.py", "--DR", tiny_data, "--save_root", tmp_path / "run", *TINY, *flags)
    assert done.returncode == 2
    assert "--kl_weight 1e+300: the loss or its gradient was not finite" in one_line(done.stderr)


# ---------------------------------------------------------------- rollouts


@pytest.fixture(scope="module")
def exploded(tiny_run, tmp_path_factory):
    """A checkpoint whose frames overflow."""
    path = tmp_path_factory.mktemp("exploded") / "exploded.ckpt"
    checkpoint = torch.load(tiny_run / "best.ckpt", weights_only=True)
    for name, value in checkpoint["state_dict"].items():
        if name.startswith("Generator") and value.is_floating_point():
            value *= 1e20
    torch.save(checkpoint, path)
    return path


def test_a_test_rollout_that_is_not_finite_writes_nothing(tiny_data, exploded, tmp_path, capsys):
    status = in_process(
        Tester.main, "--DR", tiny_data, "--save_root", tmp_path / "out", "--ckpt_path", exploded,
        "--device", "cpu"
    )
    assert status == 2
    captured = capsys.readouterr()
    assert "rollout of sequence 0: frame 1 is not finite" in captured.err
    assert captured.err.count("error: ") == 1
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_validation_that_is_not_finite(tiny_data, exploded, tmp_path, capsys):
    assert train(tiny_data, tmp_path / "out", "--ckpt_path", exploded, "--test") == 2
    assert "rollout of sequence 0: frame 1 is not finite" in one_line(capsys.readouterr().err)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("sequence, frame", [(0, 1), (1, 40), (2, 33)])
def test_the_line_names_sequence_and_frame(model, sequence, frame):
    label = torch.rand(3, 45, 3, 16, 32)
    label[sequence, frame] = math.nan
    with pytest.raises(
        cli.UserError, match=rf"sequence {sequence}: frame {frame} is not finite"
    ):
        model.rollout(torch.rand(3, 3, 16, 32), label)


@pytest.mark.parametrize("scale", [1, 50, 1e6])
def test_every_other_frame_is_in_range(model, scale):
    with torch.no_grad():
        model.Generator[7].weight.mul_(scale)
    frames = model.rollout(torch.rand(2, 3, 16, 32), torch.rand(2, 40, 3, 16, 32))
    assert frames.shape == (2, 39, 3, 16, 32) and frames.min() >= 0 and frames.max() <= 1
