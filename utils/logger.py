"""What a run shows of itself: the table of epochs, plots, GIFs, TensorBoard."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from utils.cli import UserError
from utils.files import atomic

HISTORY = ("epoch", "lr", "tfr", "tf_share", "beta", "kl_weight", "train_loss", "train_reconstruction", "train_mse",
           "train_kl", "val_mse", "val_psnr_mean", "val_psnr_min", "val_psnr_last", "skipped_steps", "seconds",
           "frames_per_second")
STEPS = "step", "epoch", "lr", "tfr", "tf_share", "beta", "loss", "reconstruction", "mse", "kl"


def write_gif(images, path, duration):
    """Frames (3, H, W), float in [0, 1], as an endless GIF of `duration` milliseconds a frame, atomically."""
    pictures = [Image.fromarray(np.rint(image.float().clamp(0, 1).mul(255).cpu().numpy()).astype(np.uint8).transpose(1, 2, 0))
                for image in images]
    with atomic(path) as aside:
        pictures[0].save(aside, format="GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0)


def enlarge_gif(path, scale=4):
    """Write {name}_large.gif beside a GIF: the same frames `scale` times as large, with sharp pixels."""
    path = Path(path)
    large = path.with_name(f"{path.stem}_large.gif")
    if not path.exists() or large.exists() and large.stat().st_mtime >= path.stat().st_mtime:
        return
    with Image.open(path) as gif:
        images, durations = [], []
        for image in ImageSequence.Iterator(gif):
            durations.append(image.info["duration"])
            palette = image.convert("RGB").quantize(256)  # a frame of a GIF has no more colours
            images.append(palette.resize((scale * gif.width, scale * gif.height), Image.NEAREST))
    with atomic(large) as aside:
        images[0].save(aside, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)


def plot_psnr(psnrs, path):
    """PSNR per frame as a PNG."""
    import matplotlib  # slow to import, and not needed before the first picture

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    axes.plot(range(1, len(psnrs) + 1), psnrs, color="#0072B2", linewidth=1)
    axes.axhline(np.mean(psnrs), color="#D55E00", linestyle="--", linewidth=1, label=f"mean {np.mean(psnrs):.2f} dB")
    axes.set(xlabel="frame", ylabel="PSNR (dB)", title="validation rollout")
    axes.legend()
    axes.grid(alpha=0.3)
    with atomic(path) as aside:
        figure.savefig(aside, dpi=120, format="png")
    plt.close(figure)


def tensorboard_writer():
    """TensorBoard's SummaryWriter, a class. UserError where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: the package is not installed; expected it after pip install tensorboard") from None
    return SummaryWriter


def log_to_tensorboard(board, row, gif=None):
    """One epoch's row of the history as scalars, and the validation GIF."""
    for name, value in row.items():
        board.add_scalar(name.replace("train_", "train/").replace("val_", "val/"), value, row["epoch"])
    if gif:  # TensorBoard shows a GIF as it is; add_video would need another package
        from tensorboard.compat.proto.summary_pb2 import Summary

        with Image.open(gif) as frame:
            picture = Summary.Image(width=frame.width, height=frame.height, colorspace=3, encoded_image_string=Path(gif).read_bytes())
        board.file_writer.add_summary(Summary(value=[Summary.Value(tag="validation", image=picture)]), row["epoch"])
    board.flush()
