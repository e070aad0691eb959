"""Build the tables of a report: lists of rows of strings, a header row first.

Not a program; make_report.py uses it. Settings are the flags that were given or their defaults;
everything else was recorded during training.
"""

import math
from pathlib import Path

import numpy as np

from plot_runs import psnr_cells
from run_folders import HIGHEST_PSNR, by_step, frames_of, objective, summarise
from utils.cli import UserError
from utils.options import OF_THE_MACHINE, build_parser

SILENT = {"save_root", "resume", "given", "test"}  # flags that say nothing about the training
TEMPLATE = {action.dest: action.default for action in build_parser("", "")._actions}
TEMPLATE["recipe"] = "template"  # its default is ours
DASH = "\u2013"
COINCIDE = 0.02  # mean difference between two curves in [0, 1] below which they are the same


# ---------------------------------------------------------------- settings


def read_settings(path):
    """Return a run's flags from a checkpoint, None where none has them; UserError if damaged."""
    for name in ("last.ckpt", "best.ckpt"):
        if (path / name).is_file():
            try:
                # only here: the rest of the report needs no torch, and starts faster without
                import torch

                loaded = torch.load(path / name, weights_only=True, map_location="cpu", mmap=True)
                args = loaded.get("args")
            except ImportError:
                return None
            except Exception as error:  # a damaged archive fails in many ways
                raise UserError(
                    f"{path / name}: is not a whole checkpoint ({type(error).__name__})"
                ) from None
            if isinstance(args, dict):
                plain = (str, int, float, bool, type(None))
                values = {k: v for k, v in args.items() if k not in SILENT and isinstance(v, plain)}
                for key in (
                    "DR",
                    "ckpt_path",
                    "cache_dir",
                ):  # a report is handed on: folder names only
                    if values.get(key):
                        values[key] = Path(values[key]).name
                at = Path(str(args.get("ckpt_path")))
                if (at.name, at.parent.name) == ("last.ckpt", path.resolve().name):
                    values["ckpt_path"] = None  # a run that was resumed, no setting
                return values
    return None


def with_settings(runs):
    """Return the runs whose settings are known."""
    return [r for r in runs if r.settings is not None]


def fmt_setting(value):
    """Format a flag's value: "yes", "no", "not set", or the value as text."""
    words = {True: "yes", False: "no", None: "not set"}
    return words[value] if isinstance(value, (bool, type(None))) else str(value)


def same_values(values):
    """Return whether all values are equal; a bool equals no number: True is not 1."""
    return all(
        v == values[0] and isinstance(v, bool) == isinstance(values[0], bool) for v in values
    )


def split_columns(rows, keep, most=5):
    """Split a table: each part has the first `keep` columns and at most `most` of the others."""
    if not rows:
        return []
    starts = range(keep, len(rows[0]), most)
    return [[[*row[:keep], *row[start : start + most]] for row in rows] for start in starts]


def settings_tables(runs):
    """Return (rows of what differs between the runs, rows of what is equal in all)."""
    known = with_settings(runs)
    differs, equal = [["Flag", *(r.label for r in known)]], [["Flag", "Value"]]
    for flag in sorted({flag for r in known for flag in r.settings}):
        values = [r.settings.get(flag, "not recorded") for r in known]
        if same_values(values):
            equal.append([f"`--{flag}`", fmt_setting(values[0])])
        else:
            differs.append([f"`--{flag}`", *map(fmt_setting, values)])
    return differs, equal


def against_template(runs, flags=None):
    """Return (a sentence on what all runs set unlike the template, rows of how they differ).

    flags: only these; None: all that affect training, except DR and seed. The sentence and the rows
    are None where there is nothing to report. The rows have the template's values beside the runs'.
    """
    known = with_settings(runs)
    rows, common = [["Flag", "Template", *(r.label for r in known)]], []
    wanted = flags or sorted(
        {f for r in known for f in r.settings}
        - (OF_THE_MACHINE - {"max_minutes"})
        - {"DR", "seed"}
    )
    for flag in wanted:
        values = [r.settings.get(flag, "not recorded") for r in known]
        if flag not in TEMPLATE or not any(flag in r.settings for r in known):
            continue
        if not same_values(values):
            rows.append([f"`--{flag}`", fmt_setting(TEMPLATE[flag]), *map(fmt_setting, values)])
        elif not same_values([values[0], TEMPLATE[flag]]):
            common.append(f"`--{flag} {fmt_setting(values[0])}` ({fmt_setting(TEMPLATE[flag])})")
    sentence = None
    if common:
        who = "all of these runs" if len(known) > 1 else known[0].label
        sentence = (
            f"Flags of {who} that differ from the template (its values in brackets): "
            f"{', '.join(common)}."
        )
    return sentence, rows if len(rows) > 1 else None


# ---------------------------------------------------------------- numbers


def fmt(value, digits=4):
    """Format a number with `digits` significant digits; an en dash where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return DASH
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, float) and math.isinf(value):
        return "not finite"
    return f"{value:.{digits}g}"


def fmt_time(seconds):
    minutes = np.nansum(seconds) / 60
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def best_psnr(run):
    """Return the validation PSNR of the best epoch as text."""
    h, best = run.history, summarise(run)["best_epoch"]
    return (
        DASH
        if best is None
        else f"{min(HIGHEST_PSNR, h['val_psnr_mean'][h['epoch'] == best][0]):.2f}"
    )


def runs_table(uses):
    """Return the table of runs; uses: [(run, the sections it serves)]."""
    rows = [["Run", "Serves", "Epochs", "Steps", "Training time", "Best validation PSNR (dB)"]]
    for r, sections in uses:
        steps = DASH if r.steps is None else f"{r.steps['step'][-1]:,.0f}"
        rows.append(
            [
                r.label,
                sections,
                str(len(r.history["epoch"])),
                steps,
                fmt_time(r.history["seconds"]),
                best_psnr(r),
            ]
        )
    return rows


def cycles(beta):
    """Return how often beta rises from near 0 to near 1."""
    count, low = 0, False
    for value in beta:
        if value < 0.15:
            low = True
        elif value > 0.85 and low:
            count, low = count + 1, False
    return count


def beta_table(runs):
    """Return the table of beta and of the weight on KL, as recorded."""
    rows = [
        [
            "Run",
            "beta: lowest",
            "highest",
            "mean",
            "rises from 0 to 1",
            "kl_weight",
            "weight on KL: highest",
        ]
    ]
    for r in runs:
        beta, weight = by_step(r, "beta")[1], by_step(r, "weight")[1]
        rows.append(
            [
                r.label,
                *(fmt(float(f(beta)), 3) for f in (np.min, np.max, np.mean)),
                str(cycles(beta)),
                fmt(float(r.history["kl_weight"][-1]), 3),
                fmt(float(weight.max()), 3),
            ]
        )
    return rows


def loss_table(runs):
    """Return the rows of the table of losses, its header first."""
    rows = [
        [
            "Run",
            "Epochs",
            "Total loss, last epoch",
            "Reconstruction",
            "weight x KL",
            "KL (nats)",
            "MSE",
            "Lowest MSE (epoch)",
            "Best PSNR (dB)",
            "Steps skipped",
        ]
    ]
    for r in runs:
        h, low = r.history, DASH
        if np.isfinite(h["train_mse"]).any():
            at = np.where(np.isfinite(h["train_mse"]), h["train_mse"], np.inf).argmin()
            low = f"{fmt(h['train_mse'][at])} ({h['epoch'][at]:g})"
        part = fmt(h["train_reconstruction"][-1]) + f" ({objective(r)})"
        with np.errstate(invalid="ignore"):  # an epoch whose steps were all skipped
            weighted = h["train_loss"][-1] - h["train_reconstruction"][-1]
        rows.append(
            [
                r.label,
                str(len(h["epoch"])),
                fmt(h["train_loss"][-1]),
                part,
                fmt(weighted, 3),
                fmt(h["train_kl"][-1]),
                fmt(h["train_mse"][-1]),
                low,
                best_psnr(r),
                f"{np.nansum(h['skipped_steps']):g}",
            ]
        )
    return rows


def place(epoch):
    """Format a decimal epoch; an en dash for None."""
    return DASH if epoch is None else f"{epoch:.2f}"


def near(run, epoch):
    """Return the reconstruction of a run at a decimal epoch, as text."""
    x, part = by_step(run, "reconstruction")
    return fmt(None if epoch is None else float(part[np.abs(x - epoch).argmin()]))


def forcing_table(runs):
    """Return the table of recorded teacher forcing, and the reconstruction around its drop."""
    rows = [
        [
            "Run",
            "Ratio: first",
            "lowest",
            "mean",
            "teacher-forced share",
            "Drop begins (epoch)",
            "Lowest from (epoch)",
            "Reconstruction: at the drop",
            "at the lowest",
            "last epoch",
            "Best PSNR (dB)",
        ]
    ]
    for r in runs:
        x, ratio = by_step(r, "tfr")
        below, lowest = ratio < ratio[0] - 1e-6, ratio <= ratio.min() + 1e-6
        drops = below.any()
        begin, end = (int(below.argmax()), int(lowest.argmax())) if drops else (None, None)
        begin_at, end_at = (None if at is None else float(x[at]) for at in (begin, end))
        share = float(np.mean(by_step(r, "tf_share")[1]))
        rows.append(
            [
                r.label,
                *(fmt(float(v), 3) for v in (ratio[0], ratio.min(), ratio.mean(), share)),
                place(begin_at),
                place(end_at),
                near(r, begin_at),
                near(r, end_at),
                fmt(r.history["train_reconstruction"][-1]),
                best_psnr(r),
            ]
        )
    return rows


def psnr_table(runs):
    """Return the rows of the table of PSNR in dB, its header first."""
    rows = [
        [
            "Run",
            "Best epoch (from 0)",
            "Mean (dB)",
            "Median",
            "First frame",
            "Last frame",
            "Lowest (frame)",
            "Highest (frame)",
        ]
    ]
    return rows + [[row["run"], *psnr_cells(row)] for row in map(summarise, runs)]


def speed_table(runs):
    """Return the rows of the table of speed, its header first."""
    rows = [
        [
            "Run",
            "Best validation PSNR (dB)",
            "at epoch",
            "Learning rate: highest",
            "lowest",
            "Frames per second",
            "Training time",
        ]
    ]
    for r in runs:
        h, rate = r.history, by_step(r, "lr")[1]
        speed = (
            float(np.nanmedian(h["frames_per_second"]))
            if np.isfinite(h["frames_per_second"]).any()
            else None
        )
        rows.append(
            [
                r.label,
                best_psnr(r),
                fmt(summarise(r)["best_epoch"]),
                fmt(float(rate.max()), 3),
                fmt(float(rate.min()), 3),
                fmt(speed, 3),
                fmt_time(h["seconds"]),
            ]
        )
    return rows


# ---------------------------------------------------------------- what a comparison is worth


def curve(run, quantity, places=400):
    """Return a recorded schedule at `places` evenly spaced points of the run."""
    x, y = by_step(run, quantity)
    return np.interp(np.linspace(x[0], x[-1], places), x, y)


def single_epochs(runs):
    """Return a sentence on runs of one epoch, whose means are over the whole run; else None."""
    names = [r.label for r in runs if len(r.history["epoch"]) == 1 and r.steps is not None]
    if not names:
        return None
    return (
        f"{', '.join(names)}: a single epoch, whose means include its first steps; steps.csv has "
        f"the losses at its end."
    )


def warnings(runs, quantity, name):
    """Return lines on invalid comparisons: unequal lengths, equal schedules, beta never near 1."""
    said, unit, lengths = [], "frames", [frames_of(r.history) for r in runs]
    if not np.isfinite(lengths).all():
        unit, lengths = "epochs", [len(r.history["epoch"]) for r in runs]
    if max(lengths) > 1.1 * min(lengths):  # runs of --max_minutes are never quite as long
        counts = ", ".join(f"{r.label} {length:.0f}" for r, length in zip(runs, lengths))
        said.append(f"Runs of unequal length ({unit}: {counts}): their ends do not compare.")
    for i, a in enumerate(runs):
        for b in runs[i + 1 :]:
            if np.abs(curve(a, quantity) - curve(b, quantity)).mean() < COINCIDE:
                said.append(
                    f"{a.label} and {b.label} had the same {name} throughout: "
                    f"what differs between them is not the effect of {name}."
                )
        if quantity == "beta" and by_step(a, "beta")[1].max() < 0.85:
            said.append(
                f"{a.label} never reached beta = 1 (highest {by_step(a, 'beta')[1].max():.2f})."
            )
    return said
