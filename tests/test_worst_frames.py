"""scripts/worst_frames.py: which frames it draws, the nearest training pose, and its errors."""

import csv
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import run_cli, run_main
from PIL import Image

from scripts.worst_frames import nearest


def test_the_lowest_frames_are_drawn(tiny_data, tiny_run, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    for kind in ("img", "label"):  # training pose 40 is the pose of validation frame 7
        shutil.copy(
            data / "val" / f"val_{kind}" / "7.png", data / "train" / f"train_{kind}" / "40.png"
        )
    done = run_cli(
        "scripts/worst_frames.py",
        tiny_run,
        "-o",
        tmp_path / "worst.png",
        "--count",
        19,
        "--DR",
        data,
    )
    assert done.returncode == 0, done.stderr
    with open(tiny_run / "psnr_per_frame.csv", newline="", encoding="utf-8") as file:
        recorded = {int(row["frame"]): float(row["psnr"]) for row in csv.DictReader(file)}
    found = re.findall(
        r"frame (\d+): (\S+) dB, nearest training pose (\d+), mse (\S+)", done.stdout
    )
    assert {int(frame): float(psnr) for frame, psnr, *_ in found} == pytest.approx(
        recorded, abs=0.006
    )
    exact = {int(frame): (int(pose), float(mse)) for frame, _, pose, mse in found}
    assert exact[7] == (40, pytest.approx(0, abs=1e-5))
    assert "the run recorded" not in done.stdout

    done = run_main("worst_frames.py", tiny_run, "-o", tmp_path / "three.png", "--count", 3)
    lowest = sorted(sorted(recorded, key=recorded.get)[:3])
    assert [int(frame) for frame in re.findall(r"frame (\d+):", done.stdout)] == lowest
    with Image.open(tmp_path / "three.png") as image, Image.open(tmp_path / "worst.png") as larger:
        assert (
            larger.height == 4 * image.height and larger.width > image.width
        )  # 19 in rows of five
        pixels = np.asarray(image.convert("RGB")).astype(int)
    frames = sorted((tiny_data / "val" / "val_img").iterdir(), key=lambda file: int(file.stem))
    with Image.open(frames[lowest[0]]) as truth:
        wanted = np.asarray(
            truth.convert("RGB").resize((32, 16), Image.Resampling.BILINEAR)
        ).astype(int)
    wanted = wanted.repeat(4, 0).repeat(4, 1)  # 4 x 4 equal pixels, inside the axes' lines
    windows = np.lib.stride_tricks.sliding_window_view(pixels[:, 85:230], (58, 122, 3))[:, :, 0]
    assert np.abs(windows - wanted[3:61, 3:125]).max((2, 3, 4)).min() <= 2


def test_a_figure_of_another_kind_is_refused(tiny_run, tmp_path):
    done = run_main("worst_frames.py", tiny_run, "-o", tmp_path / "worst.pdf")
    assert done.returncode == 2 and ".png" in done.stderr and not list(tmp_path.iterdir())


def test_nearest_is_that_of_a_plain_search():
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(256, (2500, 3, 4, 6), generator=generator).to(torch.uint8)
    poses = torch.rand(5, 3, 4, 6, generator=generator)
    poses[3] = train[2050].float() / 255
    index, distance = nearest(poses, train)
    squared = [(pose - train.float() / 255).square().mean((1, 2, 3)) for pose in poses]
    assert index == [int(s.argmin()) for s in squared] and index[3] == 2050
    assert distance == pytest.approx([float(s.min()) for s in squared], abs=1e-5)


@pytest.mark.parametrize("missing", ["best.ckpt", "psnr_per_frame.csv"])
def test_a_folder_that_is_no_run(missing, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / missing).unlink()
    done = run_main("worst_frames.py", folder, "-o", tmp_path / "worst.png")
    (line,) = done.stderr.strip().splitlines()
    assert (
        done.returncode == 2
        and missing in line
        and str(folder) in line
        and not (tmp_path / "worst.png").exists()
    )
