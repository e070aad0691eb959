"""The demo data: the course's layout, the same images every time, and nothing half-written."""

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "make_demo_data.py"
TINY = ("--train_frames", "40", "--sequence_frames", "12")


def draw(out, *options):
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(out), *options],
        capture_output=True, text=True, timeout=120
    )


def digests(folder):
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def images(folder):
    return [
        np.asarray(Image.open(p), float) / 255
        for p in sorted(folder.glob("*.png"), key=lambda p: int(p.stem))
    ]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "new" / "set"
    done = draw(out, *TINY, "--with_test_truth")
    assert done.returncode == 0, done.stderr
    assert "drawing" in done.stderr  # the progress bar
    assert [p.name for p in out.parent.iterdir()] == ["set"]  # the folder it was drawn in is gone
    return out


def test_layout(demo):
    expected = {
        "train/train_img": 40, "train/train_label": 40, "val/val_img": 12, "val/val_label": 12
    }
    for i in range(5):
        expected |= {f"test/test_img/{i}": 1, f"test/test_label/{i}": 12, f"test_truth/{i}": 12}
    found = {
        p.relative_to(demo).as_posix()
        for p in demo.rglob("*")
        if p.is_dir() and any(p.glob("*.png"))
    }
    assert found == set(expected)
    for folder, count in expected.items():
        names = {p.name for p in (demo / folder).iterdir()}
        assert names == {f"{i}.png" for i in range(count)}, folder
    for i in range(5):
        first, truth = demo / f"test/test_img/{i}/0.png", demo / f"test_truth/{i}/0.png"
        assert first.read_bytes() == truth.read_bytes()


def test_images(demo):
    for path in demo.rglob("*.png"):
        with Image.open(path) as image:
            width, height = image.size
            assert image.mode == "RGB" and width == 2 * height and width > 64, path
    frames, poses = images(demo / "train/train_img"), images(demo / "train/train_label")
    # lines on white
    assert all(pose[0, 0].min() == 1 and pose.mean() > 0.9 and pose.min() < 0.5 for pose in poses)
    steps = np.array([np.abs(a - b).mean() for a, b in zip(frames, frames[1:])])
    cuts = {9, 19, 29}  # four clips of ten
    assert min(steps[sorted(cuts)]) > 3 * max(np.delete(steps, sorted(cuts)))
    assert 0 < np.median(steps) < 0.01  # a calm figure before a still room


def test_every_sequence_is_another_motion(demo):
    folders = ["train/train_img", "val/val_img", *(f"test_truth/{i}" for i in range(5))]
    seen = [path.read_bytes() for folder in folders for path in (demo / folder).iterdir()]
    assert len(set(seen)) == len(seen)


def test_same_options_same_bytes(demo, tmp_path):
    (tmp_path / "again").mkdir()  # an empty folder is as good as none
    assert draw(tmp_path / "again", *TINY, "--with_test_truth").returncode == 0
    assert digests(tmp_path / "again") == digests(demo)


def test_a_complete_set_is_kept_and_anything_else_refused(demo, tmp_path):
    before = digests(demo)
    done = draw(demo, *TINY, "--with_test_truth")
    assert done.returncode == 0 and "already" in done.stdout and not done.stderr

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    refused = [
        (demo, TINY),
        (tmp_path / "mine", TINY),
        (tmp_path / "file", TINY),
        (tmp_path / "file" / "below", TINY),
        (tmp_path / "few", ("--train_frames", "3")),
        (tmp_path / "few", ("--sequence_frames", "1")),
    ]
    for out, options in refused:
        done = draw(out, *options)
        assert done.returncode == 2, (out, done.stderr)
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
        assert out.name in done.stderr or options[0] in done.stderr, done.stderr
    assert digests(demo) == before
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "mine", "notes.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("stop, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_nothing(tmp_path, stop, status):
    run = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(tmp_path / "set"), "--train_frames", "100000"],
        stderr=subprocess.PIPE, text=True,
        # background jobs ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while not any(tmp_path.rglob("*.png")):
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.05)
        run.send_signal(stop)
        _, stderr = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == status and "Traceback" not in stderr, stderr
    assert not any(tmp_path.iterdir())
