"""Draw a run's figures: GIFs, plots of PSNR, TensorBoard."""

import os
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence

from utils.cli import UserError
from utils.files import MARK, atomic, write_csv


def write_gif(images, path, duration):
    """Write frames (3, H, W), float in [0, 1], as an endless GIF, atomically.

    duration: milliseconds a frame. Pillow merges equal neighbours into one longer frame.
    """
    import imageio.v3

    frames = [np.rint(image.float().clamp(0, 1).mul(255).cpu().numpy()).astype(np.uint8)
              .transpose(1, 2, 0) for image in images]
    with atomic(path) as aside:
        imageio.v3.imwrite(aside, frames, plugin="pillow", extension=".gif", duration=duration,
                           loop=0, comment=MARK.encode())


def figure_on_agg(**options):
    """Return a matplotlib Figure that draws with Agg, whatever backend the user has chosen.

    pyplot is not imported: a notebook's backend and open figures stay as they are.
    """
    if "matplotlib" not in sys.modules:  # the import raises where MPLBACKEND names no backend
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


def enlarge_gif(path, scale=4):
    """Write {name}_large.gif beside a GIF: its frames `scale` times as large, with sharp pixels.

    Nothing is written where there is no GIF, or where the large one is the newer of the two.
    """
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
        images[0].save(aside, format="GIF", save_all=True, append_images=images[1:],
                       duration=durations, loop=0)


def plot_psnr(psnrs, path):
    """Draw the PSNR of each frame in dB, a list, as a PNG."""
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
    """Return TensorBoard's class SummaryWriter. UserError where it can't be imported."""
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
    """Log one epoch's row of history.csv as scalars, and the validation GIF."""
    for name, value in row.items():
        board.add_scalar(name.replace("train_", "train/").replace("val_", "val/"), value,
                         row["epoch"])
    if gif:  # a GIF as it is: add_video would need another package
        from tensorboard.compat.proto.summary_pb2 import Summary

        with Image.open(gif) as frame:
            image = Summary.Image(width=frame.width, height=frame.height, colorspace=3,
                                  encoded_image_string=Path(gif).read_bytes())
        board.file_writer.add_summary(Summary(value=[Summary.Value(tag="validation", image=image)]),
                                      row["epoch"])
    board.flush()


def write_validation(model, plot, gif, table=None, guard=nullcontext):
    """Write the last validation rollout: a plot and a table of PSNR per frame, and a GIF.

    The GIF shows pose, prediction and truth side by side. guard: a function from the path of a file
    to the context in which the file is written.
    """
    with guard(plot):
        plot_psnr(model.psnr_per_frame, plot)
    with guard(gif):  # three times (3, H, W) -> (3, H, 3 * W)
        model.make_gif([torch.cat(row, 2) for row in zip(*model.val_sequence)], gif)
    if table:  # the last one: `output_folder` knows it by the GIF
        rows = [{"frame": t, "psnr": psnr} for t, psnr in enumerate(model.psnr_per_frame, 1)]
        with guard(table):
            write_csv(table, ("frame", "psnr"), rows)
