"""Draw a run's worst validation frames: pose, prediction, truth and the nearest training pose.

    python scripts/worst_frames.py ckpt -o worst_frames.png
    python scripts/worst_frames.py ckpt -o worst_frames.png --count 5 --DR data

The script rolls out RUN/best.ckpt on the validation sequence of its data. Over each frame stands
its PSNR, under it the number of the nearest training pose and the mean squared difference of both
pose images (values in [0, 1]).
"""

import csv
import sys
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from Trainer import VAE_Model, build_parser  # noqa: E402
from utils.checkpoint import adopt_settings  # noqa: E402
from dataloader import Frames, image_number, list_pairs  # noqa: E402
from utils.cli import Parser, UserError, number, path, png_path, run, say  # noqa: E402
from utils.files import atomic  # noqa: E402

ROWS = "pose", "prediction", "truth", "nearest\ntraining pose"
COLUMNS = 5  # frames beside each other
PIXEL = 4  # screen pixels of a frame's pixel
DPI = 100


def load(run, data):
    """Return the model of run/best.ckpt; data: the data folder, None for the checkpoint's."""
    if not (run / "best.ckpt").is_file():
        raise UserError(
            f"{run}: has no best.ckpt; expected a folder that Trainer.py wrote (its --save_root)"
        )
    args = build_parser().parse_args(
        ["--ckpt_path", str(run / "best.ckpt"), *(["--DR", data] if data else [])]
    )
    adopt_settings(args, build_parser())
    if args.DR is None:
        raise UserError("--DR: is missing, and the checkpoint has none; expected the data folder")
    model = VAE_Model(args)
    model.load_checkpoint()
    return model


def roll_out(model):
    """Return poses, predictions, truth, each (T - 1, 3, H, W) in [0, 1], and PSNRs in dB."""
    img, label = next(iter(model.val_dataloader()))
    _, psnrs = model.val_one_step(img, label)
    return label[0, 1:].cpu(), model.predicted[0], img[0, 1:].cpu(), psnrs


def nearest(poses, train):
    """Return index and mean squared difference of the training pose nearest to each pose.

    poses: (N, 3, H, W) in [0, 1]. train: uint8 (M, 3, H, W).
    """
    poses, best = poses.flatten(1), []
    for block in train.split(1024):
        distance = torch.cdist(poses, block.flatten(1).float().div(255).to(poses.device)).square()
        best.append(distance.min(1))  # (N, block) -> (N,)
    smallest, block = torch.stack([found.values for found in best]).min(0)
    index = torch.stack([found.indices for found in best]).gather(0, block[None])[0] + 1024 * block
    return index.tolist(), (smallest / poses.shape[1]).tolist()


def check_psnr(run, psnrs):
    """Say so where the rollout is not the one that the run recorded."""
    try:
        with open(run / "psnr_per_frame.csv", newline="", encoding="utf-8") as file:
            recorded = fmean(float(row["psnr"]) for row in csv.DictReader(file))
    except OSError:
        raise UserError(
            f"{run}: has no psnr_per_frame.csv; expected a folder that Trainer.py wrote"
        ) from None
    except (KeyError, ValueError):
        raise UserError(
            f"{run / 'psnr_per_frame.csv'}: is not readable; expected the columns frame and psnr"
        ) from None
    if abs(fmean(psnrs) - recorded) > 0.05:
        say(
            f"{run / 'psnr_per_frame.csv'}: the run recorded a mean of {recorded:.2f} dB, this "
            f"rollout has {fmean(psnrs):.2f} dB (other device, precision or data)"
        )


def draw(columns, file):
    """Write the figure. columns: [(title, note, images (3, H, W) in the order of ROWS)]."""
    height, width = (PIXEL * side for side in columns[0][2][0].shape[1:])
    gap, left, title = 8, 90, 34  # pixels
    bands = -(-len(columns) // COLUMNS)
    total_w = left + min(COLUMNS, len(columns)) * (width + gap)
    band = title + len(ROWS) * (height + gap) + title
    figure = Figure(figsize=(total_w / DPI, bands * band / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    for at, (above, below, images) in enumerate(columns):
        x, top = left + at % COLUMNS * (width + gap), at // COLUMNS * band
        for row, image in enumerate(images):
            y = bands * band - top - title - (row + 1) * (height + gap) + gap
            place = x / total_w, y / (bands * band), width / total_w, height / (bands * band)
            axes = figure.add_axes(place, xticks=[], yticks=[])
            axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            if row == 0:
                axes.set_title(above, fontsize=9, pad=4)
            if row == len(ROWS) - 1:
                axes.set_xlabel(below, fontsize=8, labelpad=4)
            if at % COLUMNS == 0:
                axes.set_ylabel(ROWS[row], fontsize=8)
    with atomic(file) as aside:
        figure.savefig(aside, format="png")


def main(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="folder with best.ckpt and psnr_per_frame.csv"
    )
    parser.add_argument("-o", required=True, type=png_path, metavar="PNG", help="figure to write")
    parser.add_argument(
        "--count", type=number(int, 1, 100), default=10, metavar="N", help="how many frames"
    )
    parser.add_argument(
        "--DR", type=path, metavar="DIR", help="data folder, where it is not the checkpoint's"
    )
    asked = parser.parse_args(argv)
    model = load(asked.run, asked.DR)
    args = model.args
    poses, predicted, truth, psnrs = roll_out(model)
    check_psnr(asked.run, psnrs)

    train = Frames(
        args.DR, "train", args.frame_H, args.frame_W, args.cache_dir, args.num_workers
    ).labels
    index, distance = nearest(poses, train)
    names = [image_number(file) for file in list_pairs(args.DR, "train")[1]]
    worst = sorted(np.argsort(psnrs)[: asked.count].tolist())
    columns = [
        (
            f"frame {t + 1}, {psnrs[t]:.1f} dB",
            f"training pose {names[index[t]]}, mse {distance[t]:.5f}",
            [poses[t], predicted[t], truth[t], train[index[t]].float() / 255],
        )
        for t in worst
    ]
    draw(columns, asked.o)
    for t in worst:
        near = f"nearest training pose {names[index[t]]}, mse {distance[t]:.5f}"
        print(f"frame {t + 1}: {psnrs[t]:.2f} dB, {near}")
    near = f"nearest training pose at a median mse of {np.median(distance):.5f}"
    print(f"all {len(psnrs)} frames: mean {fmean(psnrs):.2f} dB, {near}")


if __name__ == "__main__":
    run(main)
