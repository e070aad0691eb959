"""--tensorboard: scalars and GIF of every epoch, one line where the package is missing."""

import csv
import sys

import pytest

import Trainer
from conftest import TINY, run_cli
from utils import figures
from utils.cli import UserError


def test_scalars_and_gif(tiny_data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Trainer.main(["--DR", str(tiny_data), "--save_root", str(tmp_path), *TINY, "--tensorboard"])
    everything = {"scalars": 0, "images": 0}
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance=everything)
    board.Reload()
    rows = list(csv.DictReader(open(tmp_path / "history.csv", newline="", encoding="utf-8")))
    for name, column in (
        ("val/psnr_mean", "val_psnr_mean"),
        ("train/kl", "train_kl"),
        ("beta", "beta"),
        ("tfr", "tfr"),
    ):
        assert [event.value for event in board.Scalars(name)] == pytest.approx(
            [float(row[column]) for row in rows]
        )
    with open(tmp_path / "steps.csv", newline="", encoding="utf-8") as file:
        steps = list(csv.DictReader(file))
    for name in ("lr", "tfr", "tf_share", "beta", "loss", "reconstruction", "mse", "kl"):
        events = board.Scalars(f"step/{name}")
        assert [event.step for event in events] == [int(row["step"]) for row in steps]
        logged = [event.value for event in events]
        assert logged == pytest.approx([float(row[name]) for row in steps])
    gif = board.Images("validation")[-1]
    assert gif.encoded_image_string == (tmp_path / "val_pred.gif").read_bytes()
    assert (gif.width, gif.height) == (96, 16)


def test_without_the_package(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="--tensorboard"):
        Trainer.main(["--DR", str(tiny_data), "--save_root", str(tmp_path), *TINY, "--tensorboard"])
    assert not list(tmp_path.glob("*.ckpt"))


def test_a_disk_that_is_full(tiny_data, tmp_path, monkeypatch, capsys):
    """A writer's error ends what is logged there, and no run."""

    class Writer:
        def __init__(self, folder):
            self.left = 20

        def add_scalar(self, name, value, step):
            self.left -= 1
            if self.left < 0:
                raise OSError(28, "No space left on device")

    monkeypatch.setattr(figures, "tensorboard_writer", lambda: Writer)
    Trainer.main(["--DR", str(tiny_data), "--save_root", str(tmp_path), *TINY, "--tensorboard"])
    out = capsys.readouterr().out
    assert out.count("No space left on device") == 1 and "continues without it" in out
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "error",
    ["TypeError('Descriptors cannot be created.\\nIf this call')", "AttributeError('np.string_')"],
)
def test_a_package_that_is_broken(tiny_data, tmp_path, error):
    """As tensorboard 2.8 is beside protobuf 6, and beside NumPy 2."""
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "__init__.py").write_text(f"raise {error}\n")
    done = run_cli(
        "Trainer.py", "--DR", tiny_data, "--save_root", tmp_path / "run", *TINY, "--tensorboard",
        env={"PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    (line,) = done.stderr.splitlines()
    assert "--tensorboard" in line and error.split("(")[0] in line


def test_a_folder_that_cannot_be_written(tmp_path):
    from utils.figures import open_tensorboard

    pytest.importorskip("tensorboard")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="expected a folder"):
        open_tensorboard(tmp_path / "file" / "tensorboard")
