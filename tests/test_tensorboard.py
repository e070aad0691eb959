"""--tensorboard: scalars and the validation GIF of every epoch, and one line where the package is missing."""

import csv
import sys

import pytest

import Trainer
from conftest import TINY
from utils.cli import UserError


def test_scalars_and_gif(tiny_data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Trainer.main(["--DR", str(tiny_data), "--save_root", str(tmp_path), *TINY, "--tensorboard"])
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    board.Reload()
    rows = list(csv.DictReader(open(tmp_path / "history.csv", newline="", encoding="utf-8")))
    for name, column in (("val/psnr_mean", "val_psnr_mean"), ("train/kl", "train_kl"), ("beta", "beta"), ("tfr", "tfr")):
        assert [event.value for event in board.Scalars(name)] == pytest.approx([float(row[column]) for row in rows])
    with open(tmp_path / "steps.csv", newline="", encoding="utf-8") as file:
        steps = list(csv.DictReader(file))
    for name in ("lr", "tfr", "tf_share", "beta", "loss", "reconstruction", "mse", "kl"):
        events = board.Scalars(f"step/{name}")
        assert [event.step for event in events] == [int(row["step"]) for row in steps]
        assert [event.value for event in events] == pytest.approx([float(row[name]) for row in steps])
    gif = board.Images("validation")[-1]
    assert gif.encoded_image_string == (tmp_path / "val_pred.gif").read_bytes() and (gif.width, gif.height) == (96, 16)


def test_without_the_package(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="--tensorboard"):
        Trainer.main(["--DR", str(tiny_data), "--save_root", str(tmp_path), *TINY, "--tensorboard"])
    assert not list(tmp_path.glob("*.ckpt"))
