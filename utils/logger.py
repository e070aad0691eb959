"""What a run shows of itself: the tables' columns, plots, GIFs, TensorBoard."""

import os
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence

from utils import distributed
from utils.cli import UserError, catching_signals, progress, say, stop
from utils.files import MARK, HISTORY, STEPS, atomic, make_folder, optional, output_folder, write_csv
from utils.options import unlike_template
from utils.schedules import teacher_forcing_ratio

STEP_ROWS = 2000  # of steps.csv in a run, at most
FIRST_STEPS = 20  # by which a run's duration is estimated


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


def write_validation(model, plot, gif, table=None, guard=nullcontext):
    """Write the last validation rollout: a plot and a table of PSNR per frame, and a GIF.

    The GIF shows pose, prediction and truth side by side. guard: called with each path for a
    context to write the file in.
    """
    if table:
        rows = [{"frame": t, "psnr": psnr} for t, psnr in enumerate(model.psnr_per_frame, 1)]
        with guard(table):
            write_csv(table, ("frame", "psnr"), rows)
    with guard(plot):
        plot_psnr(model.psnr_per_frame, plot)
    with guard(gif):  # three times (3, H, W) -> (3, H, 3 * W)
        model.make_gif([torch.cat(row, 2) for row in zip(*model.val_sequence)], gif)


def write_test(model):
    """Validate a checkpoint, and write what its rollout is like; other files stay as they are."""
    names = "psnr_per_frame.png", "val_pred.gif", "psnr_per_frame.csv"
    with catching_signals(stop):
        # a run's own files are of its best epoch
        root = output_folder(model.args.save_root, names, of_a_run=True)
        psnr_mean = model.eval()
        psnrs = model.psnr_per_frame
        say(f"validation PSNR mean {psnr_mean:.2f} min {min(psnrs):.2f} last {psnrs[-1]:.2f} dB, "
            f"in {root}")
        write_validation(model, *map(make_folder(root).joinpath, names))


def enlarge(model):
    """Write val_pred_large.gif, for people."""
    if distributed.rank() == 0:
        path = Path(model.args.save_root) / "val_pred.gif"
        with optional(path):
            enlarge_gif(path)


# ---------------------------------------------------------------- a run's tables

def epoch_bar(model, steps):
    """Return the progress bar of an epoch of `steps` steps; None where only the time ends it."""
    state = model.state
    return progress(total=steps, initial=state.step, unit="step", leave=False,
                    disable=distributed.rank() > 0, desc=f"train {state.epoch}/{state.num_epoch}")


def rollout_bar(model, count):
    """Return the progress bar of a validation of `count` sequences."""
    return progress(total=count * (model.args.val_vi_len - 1), unit="frame", leave=False,
                    desc=f"val   {model.current_epoch}")


def print_start(model):
    """Print the device, the data and the number of steps; and where the run is too short for its schedules."""
    args, state, session = model.args, model.state, model.session
    clips = f" in {len(session.clips) - 1} clips" if args.pool else ""
    window = f" (--train_vi_len {args.train_vi_len}: a step predicts {args.train_vi_len - 1} frames of each rollout)"
    say(f"{args.device}, {model.picked_precision[1]}; {state.train_frames} training frames{clips}, "
        f"{model.steps_in(state.epoch)} steps an epoch" + window * bool(args.pool and args.train_vi_len > 2))
    say(f"unlike the template: {unlike_template(args) or 'nothing'}")
    lowest = teacher_forcing_ratio(args, args.num_epoch)
    if args.pool and lowest > 0.5 and {"tfr", "tfr_sde", "tfr_d_step"}.isdisjoint(args.given):
        seventh = max(1, round(args.num_epoch / 7))
        say(f"--tfr_sde {args.tfr_sde}: teacher forcing stays at {lowest:.2f} or more in {args.num_epoch} epochs, so "
            f"rollouts will be poor; expected --tfr_sde {seventh + 1} --tfr_d_step {1 / seventh:.2g}, or --max_minutes")


def print_duration(model):
    """Print, after the first steps, how long the whole run will take."""
    state, session = model.state, model.session
    steps, began = session.first_step
    if session.budget or state.steps_done - steps != FIRST_STEPS:
        return
    seconds = (time.monotonic() - began) / FIRST_STEPS * (session.total_steps - state.steps_done)
    line = f"about {duration(seconds)} of training left, and validation after each epoch"
    if seconds > 3 * 3600 and model.device.type == "cpu":
        line += "; --max_minutes M fits the run, schedules included, to M minutes"
    say(line)


def duration(seconds):
    """Return a duration in words."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(1, minutes)} min"


def add_step(model, finite):
    """Add a step's losses and settings to the means of the epoch and of the next row of steps.csv."""
    state = model.state
    figures = torch.stack([term.detach() for term in model.losses.values()])
    figures = figures.to(torch.float32 if figures.device.type == "mps" else torch.float64)
    counts = torch.stack([finite, ~finite]).to(figures)  # steps taken, steps skipped
    figures = torch.cat([torch.where(finite, figures, 0.0), counts])
    settings = {"lr": model.optim.param_groups[0]["lr"], "tfr": model.tfr, "beta": model.beta()}
    for means in (state.epoch_means, state.step_means):
        means.add(model.losses, figures, {**settings, **model.session.drawn})
    state.skipped_in_a_row = (state.skipped_in_a_row + 1) * ~finite


def log_steps(model, share_before):
    """Add a row to the table of steps whenever another two-thousandth of the run is done."""
    state = model.state
    if int(STEP_ROWS * share_before) == int(STEP_ROWS * state.share_done):
        return
    means = state.step_means.means()
    if not means["taken"]:
        return
    epoch = state.epoch + state.step / model.steps_in(state.epoch)
    state.steps.append({"step": state.steps_done, "epoch": epoch, **{name: means[name] for name in STEPS[2:]}})
    state.step_means = RunningMeans()
    if model.session.board:
        for name in STEPS[2:]:
            model.session.board.add_scalar(f"step/{name}", means[name], state.steps_done)


def epoch_row(model, psnr_mean):
    """Return the row of history.csv of the epoch that was trained and validated, a dict by HISTORY."""
    args, state, means = model.args, model.state, model.state.epoch_means.means()
    frames = state.step * args.batch_size * (args.train_vi_len - 1) * distributed.world()
    row = {
        **{f"train_{name}": value for name, value in means.items()}, **means,
        "epoch": state.epoch, "kl_weight": args.kl_weight, "val_mse": model.val_loss,
        "val_psnr_mean": psnr_mean, "val_psnr_min": min(model.psnr_per_frame),
        "val_psnr_last": model.psnr_per_frame[-1], "seconds": state.seconds,
        "frames_per_second": frames / max(state.seconds, 1e-9),
    }
    return {name: row[name] for name in HISTORY}


def write_tables(model):
    """Write steps.csv and history.csv, whole; one that can't be written is a line."""
    root = Path(model.args.save_root)
    if distributed.rank() == 0:
        with optional(root / "steps.csv"):
            write_csv(root / "steps.csv", STEPS, model.state.steps)
        with optional(root / "history.csv"):  # last: where it is whole, `catch_up` has nothing to do
            write_csv(root / "history.csv", HISTORY, model.state.history)


def write_epoch(model, best):
    """Write what the newest epoch adds to tables and figures, and print its line."""
    root, row, board = Path(model.args.save_root), model.state.history[-1], model.session.board
    epoch = row["epoch"]
    names = "psnr_per_frame.png", "val_pred.gif", "psnr_per_frame.csv"
    if best:
        write_validation(model, *map(root.joinpath, names), optional)
    if getattr(model.args, "store_visualization", False):
        names = f"epoch={epoch}_psnr.png", f"epoch={epoch}_pred.gif"
        write_validation(model, *map(root.joinpath, names), guard=optional)
    if board:
        with optional(root / "tensorboard"):
            log_to_tensorboard(board, row, root / "val_pred.gif" if best else None)
    write_tables(model)
    say(f"epoch {epoch}: lr {row['lr']:.2e}, tfr {row['tfr']:.3f}, beta {row['beta']:.2f}, "
        f"loss {row['train_loss']:.5f} (mse {row['train_mse']:.5f}, kl {row['train_kl']:.1f}), "
        f"validation PSNR mean {row['val_psnr_mean']:.2f} min {row['val_psnr_min']:.2f} "
        f"last {row['val_psnr_last']:.2f} dB, {row['frames_per_second']:.1f} frames/s" + ", best" * best)


# ---------------------------------------------------------------- means over steps

class RunningMeans:
    """Means over training steps: of the loss terms, added up on the device so that nothing waits, and of settings."""

    def __init__(self):
        self.terms, self.figures, self.settings = [], None, {}

    def add(self, terms, figures, settings):
        """Add a step.

        terms: names of the loss terms. figures: their values, 0 where the step was skipped, then 1 and 0 for a step
        that was taken or 0 and 1 for one that was skipped, a tensor. settings: a dict of numbers.
        """
        self.terms = list(terms)
        self.figures = figures.clone() if self.figures is None else self.figures + figures
        for name, value in {**settings, "steps": 1}.items():
            self.settings[name] = self.settings.get(name, 0) + value

    def means(self):
        """Return the means by name, how many steps were skipped, and tf_share, the share of teacher-forced samples."""
        *sums, taken, skipped = [0.0, 0.0] if self.figures is None else self.figures.tolist()
        settings = dict(self.settings)
        steps, forced, drawn = (settings.pop(name, 0) for name in ("steps", "forced", "drawn"))
        return {
            **{name: total / max(1, taken) for name, total in zip(self.terms, sums)},
            **{name: total / max(1, steps) for name, total in settings.items()},
            "tf_share": forced / drawn if drawn else 1.0, "taken": int(taken), "skipped_steps": int(skipped),
        }

    def state_dict(self):
        """Return the sums as plain types and a tensor."""
        return {"terms": self.terms, "figures": self.figures, "settings": dict(self.settings)}

    def load_state_dict(self, state):
        """Take the sums of `state_dict`."""
        self.terms, self.settings = list(state["terms"]), dict(state["settings"])
        self.figures = None if state["figures"] is None else state["figures"].clone()
