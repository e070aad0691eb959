"""PSNR: at most 100 dB, whoever computes it, also in a run that learns a black frame exactly."""

import csv
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, in_process
from PIL import Image

import Trainer
from scripts import check_submission
from utils.metrics import psnr
from utils.submission import write_submission

EXPECTED = {0.0: 100.0, 1e-12: 100.0, 1e-10: 100.0, 1e-9: 90.0, 1e-4: 40.0, 1.0: 0.0,
            math.inf: -math.inf}


@pytest.mark.parametrize("error", EXPECTED)
def test_a_number_an_array_and_a_tensor_have_the_same_psnr(error):
    found = [psnr(error), *psnr(np.array([error, error])),
             *psnr(torch.tensor([error], dtype=torch.float64)), *psnr(torch.tensor([error]))]
    assert [float(value) for value in found] == pytest.approx([EXPECTED[error]] * 5, abs=1e-4)


@pytest.mark.parametrize("kind", [float, np.array, torch.tensor])
def test_what_is_not_a_number_stays_so(kind):
    assert math.isnan(psnr(kind(math.nan)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_the_templates_function(dtype, data_range):
    frame = torch.full((3, 4, 4), 0.5 * data_range, dtype=dtype)
    assert Trainer.Generate_PSNR(frame, frame, data_range).item() == pytest.approx(100)
    other = frame - 0.25 * data_range
    expected = -20 * math.log10(0.25)
    found = Trainer.Generate_PSNR(frame, other, data_range).item()
    assert found == pytest.approx(expected, abs=0.05)


def test_validation_of_exact_frames(monkeypatch):
    """An exact frame counts 100 dB, in validation and in the template's function."""
    model = Trainer.VAE_Model(Trainer.build_parser().parse_args(TINY))
    first = torch.rand(1, 3, 16, 32)
    monkeypatch.setattr(model, "next_frame", lambda previous, pose, z: previous)
    img = first[:, None].expand(1, 5, -1, -1, -1)
    loss, psnrs = model.val_one_step(img, torch.rand(1, 5, 3, 16, 32))
    assert float(loss) == 0 and psnrs == pytest.approx([100.0] * 4)
    assert psnrs[0] == pytest.approx(Trainer.Generate_PSNR(first, first).item())


@pytest.fixture(scope="module")
def black(tiny_data, tmp_path_factory):
    """Demo data whose frames are all one black image."""
    folder = tmp_path_factory.mktemp("black") / "data"
    shutil.copytree(tiny_data, folder, ignore=shutil.ignore_patterns(".frame_cache"))
    for path in [*folder.glob("*/*_img/*.png"), *folder.glob("test/test_img/*/*")]:
        Image.new("RGB", (64, 32)).save(path)
    return folder


def test_a_black_image_learned_exactly(black, tiny_run, tmp_path):
    """Every mean in history.csv, psnr_per_frame.csv and best.ckpt stays a number."""
    weights = torch.load(tiny_run / "best.ckpt", weights_only=True)["state_dict"]
    weights["Generator.7.bias"] -= 100  # black after the clamp, and no gradient leads away
    torch.save(weights, tmp_path / "black.pt")
    flags = ["--DR", black, "--ckpt_path", tmp_path / "black.pt", "--save_root", tmp_path, *TINY]
    assert in_process(Trainer.main, *flags, "--output", "clamp") == 0
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    columns = ("val_psnr_mean", "val_psnr_min", "val_psnr_last")
    scores = [float(row[column]) for row in rows for column in columns]
    assert scores == pytest.approx([100.0] * 6)
    frames = list(csv.DictReader((tmp_path / "psnr_per_frame.csv").open()))
    assert [float(row["psnr"]) for row in frames] == pytest.approx([100.0] * 19)
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)["resume"]["state"]["best_psnr"]
    assert best == pytest.approx(100)


def test_a_perfect_submission_scores_100(tmp_path, capsys):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    (tmp_path / "truth" / "0").mkdir(parents=True)
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "truth" / "0" / f"{t}.png")
    rows = [",".join(map(str, frame.transpose(2, 0, 1).ravel())) for frame in frames]
    write_submission(tmp_path / "submission.csv", rows, 72)
    shape = ["--sequences", 1, "--frames", 3, "--frame_H", 4, "--frame_W", 6]
    assert in_process(check_submission.main, tmp_path / "submission.csv", *shape,
                      "--ground_truth", tmp_path / "truth") == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:4] == ["all"] + ["100.000"] * 3
