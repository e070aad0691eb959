"""A run folder as Trainer.py leaves it, made up from formulas: no training behind its numbers."""

import argparse
import csv
import math
import random

import numpy as np
from PIL import Image, ImageDraw

from utils.files import HISTORY, STEPS
from utils.schedules import beta_at, teacher_forcing_ratio

PER_EPOCH = 6  # rows of steps.csv an epoch


def schedules(kind, epochs, tfr, recipe):
    """The flags that schedules read."""
    start, sde, drop = tfr
    return argparse.Namespace(
        recipe=recipe,
        num_epoch=epochs,
        kl_anneal_type=kind,
        kl_anneal_cycle=4,
        kl_anneal_ratio=0.5,
        tfr=start,
        tfr_sde=sde,
        tfr_d_step=drop,
        tfr_min=0,
    )


def step_rows(args, kl_weight, log_mse, noise):
    """The rows of steps.csv, whose loss is the sum of its parts."""
    rows = []
    for n in range(args.num_epoch * PER_EPOCH):
        e = (n + 1) / PER_EPOCH
        at = (n + 0.5) / PER_EPOCH if args.recipe == "pool" else n // PER_EPOCH
        ratio, beta = teacher_forcing_ratio(args, at), beta_at(args, at)
        mse = 0.004 + 0.05 * math.exp(-e / 6) + 0.01 * (1 - ratio) * math.exp(-e / 20)
        mse *= 1 + 0.1 * noise.random()
        kl = 60 * (0.5 + math.exp(-e / 12)) * (1 + 0.1 * noise.random()) / (0.2 + beta)
        part = 1e-3 * math.log1p(mse / 1e-5) if log_mse else mse
        share = sum(noise.random() < ratio for _ in range(40)) / 40
        values = (
            25 * (n + 1),
            e,
            0.001,
            ratio,
            share,
            beta,
            part + beta * kl_weight * kl,
            part,
            mse,
            kl,
        )
        rows.append(dict(zip(STEPS, values)))
    return rows


def history_rows(rows, kl_weight, noise):
    """The rows of history.csv: means over the epochs of steps.csv's rows."""
    history = []
    for e in range(len(rows) // PER_EPOCH):
        block = rows[e * PER_EPOCH : (e + 1) * PER_EPOCH]
        mean = {name: sum(row[name] for row in block) / PER_EPOCH for name in STEPS}
        psnr = 24 - 12 * math.exp(-e / 14) + noise.random()
        values = (
            e,
            mean["lr"],
            mean["tfr"],
            mean["tf_share"],
            mean["beta"],
            kl_weight,
            mean["loss"],
            mean["reconstruction"],
            mean["mse"],
            mean["kl"],
            10 ** (-psnr / 10),
            psnr,
            psnr - 6,
            psnr - 2,
            0,
            60.0,
            300.0,
        )
        history.append(dict(zip(HISTORY, values)))
    return history


def write_table(path, columns, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.8g}" for k, v in row.items()} for row in rows)


def make_run(
    path,
    kind="Cyclical",
    epochs=70,
    frames=629,
    tfr=(1.0, 10, 0.1),
    gif=False,
    psnr=True,
    recipe="pool",
    kl_weight=1e-4,
    steps=True,
):
    """Write a run folder without checkpoints."""
    path.mkdir(parents=True, exist_ok=True)
    noise = random.Random(str(path.name))
    args = schedules(kind, epochs, tfr, recipe)
    rows = step_rows(args, kl_weight, recipe == "pool", noise)
    write_table(path / "history.csv", HISTORY, history_rows(rows, kl_weight, noise))
    if steps:
        write_table(path / "steps.csv", STEPS, rows)
    if psnr:
        values = [
            {
                "frame": f,
                "psnr": 22 + 12 * math.exp(-f / 9) + 2 * math.sin(f / 40) + noise.gauss(0, 0.5),
            }
            for f in range(1, frames + 1)
        ]
        write_table(path / "psnr_per_frame.csv", ("frame", "psnr"), values)
    if gif:
        make_gif(path / "val_pred.gif", frames + 1)
    return path


def made_up_frame(t, size=(64, 32)):
    """Pose, prediction and ground truth side by side; frames 3k and 3k + 1 are equal, so that
    Pillow merges them.
    """
    w, h = size
    image = Image.new("RGB", (3 * w, h), "black")
    draw = ImageDraw.Draw(image)
    x = (t - (t % 3 == 1)) % w
    draw.line([(x, 4), (x, 26)], fill=(255, 200, 0), width=2)
    draw.rectangle([w, 0, 2 * w - 1, h], fill=(60, 90, 160))
    draw.ellipse([w + x - 5, 8, w + x + 5, 26], fill=(220, 180, 150))
    draw.rectangle([2 * w, 0, 3 * w, h], fill=(50, 80, 170))
    draw.ellipse([2 * w + x - 5, 6, 2 * w + x + 5, 27], fill=(230, 190, 150))
    return image


def make_gif(path, ticks):
    frames = [made_up_frame(t) for t in range(ticks)]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=40, loop=0)


def to_array(image):
    return np.asarray(image).astype(int)
