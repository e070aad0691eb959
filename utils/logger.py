"""Log a run: progress bars, printed lines, history.csv and steps.csv, means over steps."""

import math
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from utils import distributed
from utils.cli import catching_signals, progress, say, stop
from utils.figures import enlarge_gif, log_to_tensorboard, write_validation
from utils.files import (
    HISTORY, ROLLOUT_FILES, STEPS, make_folder, optional, output_folder, write_csv)
from utils.options import unlike_template
from utils.schedules import share_done, teacher_forcing_ratio

STEP_ROWS = 2000  # rows of steps.csv in a run, at most
WARM_UP, TIMED = 10, 20  # a run's first steps, and those that its duration is estimated from


# ---------------------------------------------------------------- validation of a checkpoint


def write_test(model):
    """Validate a checkpoint; print its PSNR and write the figures and table of its rollout.

    Files of a run or of another program are not overwritten (`output_folder`).
    """
    with catching_signals(stop):
        # the files in a run's own folder belong to its best epoch
        root = output_folder(model.args.save_root, ROLLOUT_FILES, of_a_run=True)
        psnr_mean = model.eval()
        psnrs = model.psnr_per_frame
        say(f"validation PSNR mean {psnr_mean:.2f} min {min(psnrs):.2f} last {psnrs[-1]:.2f} dB, "
            f"in {root}")
        write_validation(model, *map(make_folder(root).joinpath, ROLLOUT_FILES))


def enlarge(model):
    """Write val_pred_large.gif, large enough to watch."""
    if distributed.rank() == 0:
        path = Path(model.args.save_root) / "val_pred.gif"
        with optional(path):
            enlarge_gif(path)


# ---------------------------------------------------------------- bars and printed lines

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
    """Print the device, the data, the number of steps and the settings.

    A further line names a schedule that needs a longer run.
    """
    args, state, session = model.args, model.state, model.session
    clips = f" in {len(session.clips) - 1} clips" if args.pool else ""
    window = (f" (--train_vi_len {args.train_vi_len}: a step predicts {args.train_vi_len - 1} "
              f"frames of each rollout)" if args.pool and args.train_vi_len > 2 else "")
    say(f"{args.device}, {model.picked_precision[1]}; {state.train_frames} training frames{clips}, "
        f"{model.steps_in(state.epoch)} steps an epoch{window}")
    say(f"unlike the template: {unlike_template(args) or 'nothing'}")
    lowest = teacher_forcing_ratio(args, args.num_epoch)
    if args.pool and lowest > 0.5 and {"tfr", "tfr_sde", "tfr_d_step"}.isdisjoint(args.given):
        seventh = round(args.num_epoch / 7)
        say(f"--tfr_sde {args.tfr_sde}: the teacher forcing ratio is still {lowest:.2f} at the "
            f"end of --num_epoch {args.num_epoch}, so few inputs are generated frames; expected "
            f"--tfr_sde {seventh + 1} --tfr_d_step {1 / max(1, seventh):.2g}, or --num_epoch 70 "
            f"and --max_minutes")


def print_duration(model):
    """Print, after the first steps, how long the rest of the training will take."""
    state, session = model.state, model.session
    done = state.steps_done - session.steps_before
    if done == WARM_UP:  # a GPU takes up to half a minute to its first step
        session.warm = time.monotonic()
    if session.budget or done != WARM_UP + TIMED:
        return
    left = (1 - share_done(model)) * session.total_steps
    seconds = (time.monotonic() - session.warm) / TIMED * left
    line = f"about {duration(seconds)} of training left, and validation after each epoch"
    if seconds > 3 * 3600 and model.device.type == "cpu":
        line += "; --max_minutes M fits the run, schedules included, to M minutes"
    say(line)


def duration(seconds):
    """Return seconds as text, like "3 h 20 min" or "5 min"."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(1, minutes)} min"


# ---------------------------------------------------------------- a run's tables

def add_step(model, finite):
    """Add a step's losses and settings to the means of the epoch and of the next row of steps.csv.

    finite: bool tensor, whether the step was taken; the losses of a skipped step do not count.
    """
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
    """Add a row to the table of steps whenever another two-thousandth of the run is done.

    share_before: the share of the run in [0, 1] that was done before the newest step.
    """
    state = model.state
    if int(STEP_ROWS * share_before) == int(STEP_ROWS * state.share_done):
        return
    means = state.step_means.means()
    if not means["taken"]:
        return
    epoch = state.epoch + state.step / model.steps_in(state.epoch)
    row = {name: means[name] for name in STEPS[2:]}
    state.steps.append({"step": state.steps_done, "epoch": epoch, **row})
    state.step_means = RunningMeans()
    with logging_to_tensorboard(model) as board:
        if board:
            for name, mean in row.items():
                board.add_scalar(f"step/{name}", mean, state.steps_done)


@contextmanager
def logging_to_tensorboard(model):
    """Give TensorBoard's writer, or None, inside; an error there is one line and ends its use."""
    board, model.session.board = model.session.board, None
    with optional(Path(model.args.save_root) / "tensorboard"):
        yield board
        model.session.board = board


def epoch_row(model, psnr_mean):
    """Return the row of history.csv for the epoch that was trained and validated, by HISTORY."""
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
    """Write steps.csv and history.csv as a whole; print a line for one that can't be written."""
    root = Path(model.args.save_root)
    if distributed.rank() == 0:
        with optional(root / "steps.csv"):
            write_csv(root / "steps.csv", STEPS, model.state.steps)
        # last: `catch_up` looks at history.csv alone
        with optional(root / "history.csv"):
            write_csv(root / "history.csv", HISTORY, model.state.history)


def write_epoch(model, best):
    """Write what the newest epoch adds to tables and figures, and print its line.

    best: whether it is the best epoch of the run, whose rollout is then drawn.
    """
    root, row = Path(model.args.save_root), model.state.history[-1]
    epoch = row["epoch"]
    if best:
        write_validation(model, *map(root.joinpath, ROLLOUT_FILES), optional)
    if getattr(model.args, "store_visualization", False):
        names = f"epoch={epoch}_psnr.png", f"epoch={epoch}_pred.gif"
        write_validation(model, *map(root.joinpath, names), guard=optional)
    with logging_to_tensorboard(model) as board:
        if board:
            log_to_tensorboard(board, row, root / "val_pred.gif" if best else None)
    write_tables(model)
    say(f"epoch {epoch}: lr {row['lr']:.2e}, tfr {row['tfr']:.3f}, beta {row['beta']:.2f}, "
        f"loss {row['train_loss']:.5f} (mse {row['train_mse']:.5f}, kl {row['train_kl']:.1f}), "
        f"validation PSNR mean {row['val_psnr_mean']:.2f} min {row['val_psnr_min']:.2f} "
        f"last {row['val_psnr_last']:.2f} dB, {row['frames_per_second']:.1f} frames/s"
        + ", best" * best)


# ---------------------------------------------------------------- means over steps

class RunningMeans:
    """Average loss terms and settings over training steps.

    Losses are added up on their device, so that no step waits for them.
    """

    def __init__(self):
        self.terms, self.figures, self.settings = [], None, {}

    def add(self, terms, figures, settings):
        """Add a step.

        terms: names of the loss terms. figures: a tensor of their values (0 in a skipped step),
        then 1 and 0 for a step that was taken, 0 and 1 for a skipped one. settings: a dict of
        numbers.
        """
        self.terms = list(terms)
        # after a resume they are on the CPU
        before = 0 if self.figures is None else self.figures.to(figures)
        self.figures = before + figures
        for name, value in {**settings, "steps": 1}.items():
            self.settings[name] = self.settings.get(name, 0) + value

    def means(self):
        """Return the means by name, the numbers of steps taken and skipped, and tf_share.

        tf_share: the share in [0, 1] of teacher forcing's samples that were teacher-forced.
        """
        *sums, taken, skipped = [0.0, 0.0] if self.figures is None else self.figures.tolist()
        settings = dict(self.settings)
        steps, forced, drawn = (settings.pop(name, 0) for name in ("steps", "forced", "drawn"))
        return {
            **{name: total / taken if taken else math.nan
               for name, total in zip(self.terms, sums)},
            **{name: total / max(1, steps) for name, total in settings.items()},
            "tf_share": forced / drawn if drawn else 1.0,
            "taken": int(taken), "skipped_steps": int(skipped),
        }

    def state_dict(self):
        """Return the sums as plain types and a tensor."""
        return {"terms": self.terms, "figures": self.figures, "settings": dict(self.settings)}

    def load_state_dict(self, state):
        """Restore the sums of `state_dict`."""
        self.terms, self.settings = list(state["terms"]), dict(state["settings"])
        self.figures = None if state["figures"] is None else state["figures"].clone()
