"""scripts/plot_runs.py through its command line, on small made-up run folders."""

import csv
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
HISTORY = ("epoch,lr,tfr,tf_share,beta,train_loss,train_mse,train_kl,val_mse,val_psnr_mean,val_psnr_min,val_psnr_last,"
           "skipped_steps,seconds,frames_per_second")
FIGURES = ["loss_curves", "beta_schedules", "teacher_forcing", "val_psnr", "psnr_per_frame", "psnr_summary"]


def beta_of(kind, epoch, epochs):
    cycle = max(1, epochs // 10) if kind == "Cyclical" else max(2, epochs)
    return 1.0 if kind == "None" else min(1.0, (epoch % cycle) / max(1, cycle - 1))


def make_run(path, kind="Cyclical", epochs=70, frames=629, tfr=(1.0, 10, 0.1), gif=False, psnr=True):
    """A run folder as Trainer.py leaves it, without checkpoints. Its numbers are drawn from a formula, no training behind them."""
    path.mkdir(parents=True, exist_ok=True)
    noise = random.Random(str(path.name))
    rows = []
    for e in range(epochs):
        ratio = max(0, tfr[0] - tfr[2] * max(0, e - tfr[1] + 1))
        beta = beta_of(kind, e, epochs)
        mse = 0.004 + 0.05 * math.exp(-e / 6) + 0.01 * (1 - ratio) * math.exp(-max(0, e - 15) / 20) + 0.0004 * noise.random()
        kl = (3 if beta else 60) * (0.5 + math.exp(-e / 12)) * (1 + 0.1 * noise.random()) / (0.2 + beta)
        spike = 400 if kind == "None" and e == 7 else 1
        psnr_mean = 24 - 12 * math.exp(-e / 14) + noise.random()
        rows.append([e, 0.001, ratio, min(1, max(0, ratio + (noise.random() - 0.5) * 0.1 * (0 < ratio < 1))), beta,
                     spike * (mse + 1e-4 * beta * kl), spike * mse, spike * kl, 10 ** (-psnr_mean / 10), psnr_mean,
                     psnr_mean - 6, psnr_mean - 2, 0, 60.0, 300.0])
    (path / "history.csv").write_text("\n".join([HISTORY, *(",".join(f"{x:.8g}" for x in row) for row in rows)]) + "\n")
    values = [22 + 12 * math.exp(-f / 9) + 2 * math.sin(f / 40) + noise.gauss(0, 0.5) for f in range(1, frames + 1)]
    if psnr:
        (path / "psnr_per_frame.csv").write_text("frame,psnr\n" + "".join(f"{i},{p:.6f}\n" for i, p in enumerate(values, 1)))
    if gif:
        make_gif(path / "val_pred.gif", frames + 1)
    return path


def made_up_frame(t, size=(64, 32)):
    """Pose, prediction and ground truth side by side; frames 3k and 3k + 1 are equal, so that Pillow merges them."""
    w, h = size
    picture = Image.new("RGB", (3 * w, h), "black")
    draw = ImageDraw.Draw(picture)
    x = (t - (t % 3 == 1)) % w
    draw.line([(x, 4), (x, 26)], fill=(255, 200, 0), width=2)
    draw.rectangle([w, 0, 2 * w - 1, h], fill=(60, 90, 160))
    draw.ellipse([w + x - 5, 8, w + x + 5, 26], fill=(220, 180, 150))
    draw.rectangle([2 * w, 0, 3 * w, h], fill=(50, 80, 170))
    draw.ellipse([2 * w + x - 5, 6, 2 * w + x + 5, 27], fill=(230, 190, 150))
    return picture


def make_gif(path, ticks):
    frames = [made_up_frame(t) for t in range(ticks)]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=40, loop=0)


def command(script, *words, cwd=None, **env):
    return subprocess.run([sys.executable, ROOT / "scripts" / script, *map(str, words)], cwd=cwd, text=True,
                          capture_output=True, timeout=300, env={**os.environ, **env})


def refused(result, *words):
    """Exit status 2, one line on stderr that holds all `words`, no traceback."""
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert all(str(word) in result.stderr for word in words), result.stderr


def test_three_runs_give_every_figure(tmp_path):
    runs = [make_run(tmp_path / kind, kind, epochs=12, frames=80) for kind in ("Cyclical", "Monotonic", "None")]
    result = command("plot_runs.py", *runs, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr.lower()
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == sorted([f"{f}.{kind}" for f in FIGURES for kind in ("png", "pdf")] + ["psnr_summary.csv"])
    for figure in FIGURES:
        assert Image.open(tmp_path / "out" / f"{figure}.png").width > 500
        assert (tmp_path / "out" / f"{figure}.pdf").read_bytes().startswith(b"%PDF")


def test_summary_repeats_the_numbers_of_the_run(tmp_path):
    run = make_run(tmp_path / "a", epochs=3, frames=4)
    (run / "psnr_per_frame.csv").write_text("frame,psnr\n1,30\n2,20\n3,25\n4,21\n")
    assert command("plot_runs.py", run, "-o", tmp_path / "out").returncode == 0
    row, = csv.DictReader((tmp_path / "out" / "psnr_summary.csv").open())
    best = max(csv.DictReader((run / "history.csv").open()), key=lambda r: float(r["val_psnr_mean"]))["epoch"]
    assert row == {"run": "a", "epochs": "3", "best_epoch": best, "psnr_mean": "24.0", "psnr_median": "23.0", "psnr_first": "30.0",
                   "psnr_last": "21.0", "psnr_min": "20.0", "psnr_min_frame": "2", "psnr_max": "30.0", "psnr_max_frame": "1"}


def test_the_best_epoch_is_the_one_whose_files_are_there(tmp_path):
    """A run that went on in another folder has better epochs in its history, of before."""
    run = make_run(tmp_path / "a", epochs=3, frames=4)
    (run / "psnr_per_frame.csv").write_text("frame,psnr\n1,30\n2,20\n3,25\n4,21\n")
    header, *rows = [line.split(",") for line in (run / "history.csv").read_text().splitlines()]
    for row, mean in zip(rows, ("25", "23", "24")):
        row[header.index("val_psnr_mean")] = mean
    (run / "history.csv").write_text("\n".join(map(",".join, [header, *rows])) + "\n")
    assert command("plot_runs.py", run, "-o", tmp_path / "out").returncode == 0
    row, = csv.DictReader((tmp_path / "out" / "psnr_summary.csv").open())
    assert row["best_epoch"] == "2"


@pytest.mark.parametrize("count, epochs", [(1, 1), (6, 2)])
def test_few_epochs_and_many_runs(tmp_path, count, epochs):
    runs = [make_run(tmp_path / f"{'_$x_' if i == 0 else 'run'}{i}", "None", epochs=epochs, frames=3) for i in range(count)]
    result = command("plot_runs.py", *runs, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr.lower()


def test_a_figure_without_data_is_left_out_and_said(tmp_path):
    run = make_run(tmp_path / "a", epochs=2, psnr=False)
    result = command("plot_runs.py", run, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "psnr_per_frame: left out" in result.stdout
    assert not (tmp_path / "out" / "psnr_per_frame.png").exists()
    assert (tmp_path / "out" / "loss_curves.png").exists()


def test_values_that_are_not_finite_are_named_in_the_figure(tmp_path):
    """The PDF's text is compressed, so the figure is asked through the module."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import plot_runs
    run = make_run(tmp_path / "a", "None", epochs=12, frames=30)
    lines = (run / "history.csv").read_text().splitlines()
    cells = lines[5].split(",")
    cells[5], cells[9] = "nan", "-300"
    (run / "history.csv").write_text("\n".join([*lines[:5], ",".join(cells), *lines[6:]]))
    runs = plot_runs.load_runs([run])
    words = {name: " ".join(t.get_text() for ax in figure.axes for t in ax.texts) for name, figure in plot_runs.make_figures(runs)[0].items()}
    plot_runs.plt.close("all")
    assert "Not finite, so not drawn: a 4" in words["loss_curves"]
    assert "Axis cut: 1 value lies below it (triangles); lowest -300.0 dB, a, epoch 4" in words["val_psnr"]


def test_a_spike_stays_inside_the_axis(tmp_path):
    sys.path.insert(0, str(ROOT / "scripts"))
    import plot_runs
    runs = plot_runs.load_runs([make_run(tmp_path / "None", "None", epochs=20, frames=5)])
    figure = plot_runs.loss_curves(runs)
    for ax, column in zip(figure.axes, ("train_loss", "train_mse", "train_kl")):
        assert ax.get_ylim()[0] <= runs[0].history[column].min() and runs[0].history[column].max() <= ax.get_ylim()[1]
    plot_runs.plt.close("all")


def test_user_errors_are_one_line_and_write_nothing(tmp_path):
    good = make_run(tmp_path / "good", epochs=2, frames=3)
    out = tmp_path / "out"
    refused(command("plot_runs.py", tmp_path / "absent", "-o", out), tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    refused(command("plot_runs.py", good, tmp_path / "empty", "-o", out), "history.csv")
    refused(command("plot_runs.py", good, good, "-o", out), "twice")
    refused(command("plot_runs.py", good, "-o", good / "history.csv"), "-o")
    assert not out.exists()


@pytest.mark.parametrize("file, text, word", [
    ("history.csv", "", "is empty"),
    ("history.csv", HISTORY + "\n", "no rows"),
    ("history.csv", "epoch,lr\n0,1\n", "train_loss"),
    ("history.csv", HISTORY + "\n0,1,1\n", "line 2: 3 values, expected 15"),
    ("history.csv", HISTORY + "\n0,1,x" + ",1" * 12 + "\n", "line 2"),
    ("history.csv", HISTORY + ("\n0" + ",1" * 14) * 2, "count upwards"),
    ("psnr_per_frame.csv", "frame,psnr\n1,30\n2\n", "line 3"),
    ("psnr_per_frame.csv", "\0\xff", "psnr_per_frame.csv"),
])
def test_malformed_files(tmp_path, file, text, word):
    run = make_run(tmp_path / "a", epochs=2, frames=3)
    (run / file).write_bytes(text.encode("latin1"))
    refused(command("plot_runs.py", run, "-o", tmp_path / "out"), run / file, word)
    assert not (tmp_path / "out").exists()
