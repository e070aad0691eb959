"""What a run shows of itself: the tables' columns, plots, GIFs, TensorBoard."""

import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from utils.cli import UserError
from utils.files import MARK, atomic

HISTORY = ("epoch", "lr", "tfr", "tf_share", "beta", "kl_weight", "train_loss",
           "train_reconstruction", "train_mse", "train_kl", "val_mse", "val_psnr_mean",
           "val_psnr_min", "val_psnr_last", "skipped_steps", "seconds", "frames_per_second")
STEPS = "step", "epoch", "lr", "tfr", "tf_share", "beta", "loss", "reconstruction", "mse", "kl"


def write_gif(images, path, duration):
    """Write frames (3, H, W), float in [0, 1], as an endless GIF, atomically.

    duration: milliseconds a frame. Pillow merges equal neighbours into one that lasts longer.
    """
    import imageio.v3

    frames = [np.rint(image.float().clamp(0, 1).mul(255).cpu().numpy()).astype(np.uint8)
              .transpose(1, 2, 0) for image in images]
    with atomic(path) as aside:
        imageio.v3.imwrite(aside, frames, plugin="pillow", extension=".gif", duration=duration,
                           loop=0, comment=MARK.encode())


def figure_on_agg(**options):
    """Return a matplotlib Figure that draws with Agg, whatever backend the user has chosen.

    pyplot stays out of it: a notebook's backend and open figures are left as they are.
    """
    if "matplotlib" not in sys.modules:  # its import raises where MPLBACKEND names no backend
        backend = os.environ.pop("MPLBACKEND", None)
        try:
            import matplotlib
        finally:
            if backend is not None:
                os.environ["MPLBACKEND"] = backend
        if backend:
            with suppress(ValueError):
                matplotlib.rcParams["backend"] = backend
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure


def plot_psnr(psnrs, path):
    """Draw the PSNR per frame as a PNG."""
    figure = figure_on_agg(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(psnrs) + 1), psnrs, color="#0072B2", linewidth=1)
    mean = np.mean(psnrs)
    axes.axhline(mean, color="#D55E00", linestyle="--", linewidth=1, label=f"mean {mean:.2f} dB")
    axes.set(xlabel="frame", ylabel="PSNR (dB)", title="validation rollout")
    axes.legend()
    axes.grid(alpha=0.3)
    with atomic(path) as aside:
        figure.savefig(aside, dpi=120, format="png", metadata={"Software": MARK})


def tensorboard_writer():
    """Return TensorBoard's SummaryWriter, a class. UserError where it can't be imported."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:  # also TypeError with another protobuf, AttributeError, ...
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"--tensorboard: the package can't be imported ({problem}); "
                        f"expected it after pip install -U tensorboard") from None
    return SummaryWriter


def open_tensorboard(folder):
    """Return a SummaryWriter into a folder. UserError where nothing can be written there."""
    try:
        return tensorboard_writer()(str(folder))
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; "
                        f"expected a folder that can be written") from None


def log_to_tensorboard(board, row, gif=None):
    """Log one epoch's row of the history as scalars, and the validation GIF."""
    for name, value in row.items():
        board.add_scalar(name.replace("train_", "train/").replace("val_", "val/"), value,
                         row["epoch"])
    if gif:  # TensorBoard shows a GIF as it is; add_video would need another package
        from tensorboard.compat.proto.summary_pb2 import Summary

        with Image.open(gif) as frame:
            image = Summary.Image(width=frame.width, height=frame.height, colorspace=3,
                                  encoded_image_string=Path(gif).read_bytes())
        board.file_writer.add_summary(Summary(value=[Summary.Value(tag="validation", image=image)]),
                                      row["epoch"])
    board.flush()
