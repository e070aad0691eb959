"""Figures and GIFs: drawn whatever backend the caller has chosen, in the promised size and time."""

import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from conftest import ROOT, TINY, run_cli
from utils.figures import write_gif

# a notebook's cell: the user's own figure and backend, then ours
CELL = """
import sys
{before}
from utils.figures import plot_psnr
plot_psnr([20.0, 21.0], sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules or {pyplot}
import matplotlib
{after}
"""


def draw(path, backend, before="", after="", pyplot=False):
    code = CELL.format(before=before, after=after, pyplot=pyplot)
    environment = {**os.environ, "MPLBACKEND": backend, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code, str(path)], text=True,
                          capture_output=True, env=environment)


@pytest.mark.parametrize("backend", ["module://no_such_package.backend", "nonsense", "tkagg", ""])
def test_any_backend_in_the_environment(tmp_path, backend):
    done = draw(tmp_path / "a.png", backend)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "a.png").size == (960, 420)


def test_the_callers_backend_and_figures_stay(tmp_path):
    first = draw(tmp_path / "a.png", "svg", after="assert matplotlib.get_backend() == 'svg'")
    assert first.returncode == 0, first.stderr
    done = draw(tmp_path / "b.png", "", pyplot=True,
                before="import matplotlib; matplotlib.use('pdf')\n"
                       "import matplotlib.pyplot as plt; own = plt.figure()",
                after="assert matplotlib.get_backend() == 'pdf'\n"
                      "assert plt.get_fignums() == [1] and plt.gcf() is own")
    assert done.returncode == 0, done.stderr


def test_training_with_a_notebooks_backend(tiny_data, tmp_path):
    """`!python Trainer.py` in a notebook inherits a backend that only the notebook's Python has."""
    done = run_cli("Trainer.py", "--DR", tiny_data, "--save_root", tmp_path, *TINY,
                   "--num_epoch", 1,
                   env={"MPLBACKEND": "module://no_such_package.backend_inline"})
    assert done.returncode == 0, done.stderr
    assert {"last.ckpt", "best.ckpt", "psnr_per_frame.png"} <= set(os.listdir(tmp_path))
    assert "not written" not in done.stdout


@pytest.mark.parametrize("count", [1, 2, 30])
@pytest.mark.parametrize("still", [True, False])
@pytest.mark.parametrize("tick", [20, 40])
def test_a_gif_has_the_promised_size_and_time(tmp_path, count, still, tick):
    """Equal neighbours are merged into one frame that lasts as long as they would."""
    generator = torch.Generator().manual_seed(0)
    frames = [torch.rand(3, 16, 24, generator=generator) for _ in range(count)]
    frames[1::3] = frames[0::3][:len(frames[1::3])]  # every third frame is the one before
    write_gif(frames[:1] * count if still else frames, tmp_path / "a.gif", tick)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.size == (24, 16) and gif.info["loop"] == 0
        lasts = []
        for i in range(gif.n_frames):
            gif.seek(i)
            lasts.append(gif.info["duration"])
    assert sum(lasts) == count * tick
    assert len(lasts) == (1 if still else count - len(frames[1::3]))
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]
