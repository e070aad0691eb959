#!/usr/bin/env python3
"""Draw the figures of training runs from history.csv, steps.csv and psnr_per_frame.csv alone.

    python scripts/plot_runs.py runs/Cyclical runs/Monotonic runs/None -o figures

Each RUN is a folder that Trainer.py wrote (its --save_root); a run has the name of its folder.
The figures are written to OUT as PNG and PDF:

    loss_curves      total loss, reconstruction, MSE, KL and its weight; validation PSNR
    loss_parts       the total loss of each run as the sum of reconstruction and weighted KL
    beta_schedules   beta, one panel for each schedule (the assignment's figure 5)
    teacher_forcing  the ratio, the teacher-forced share, and the loss, on one x axis
    teacher_forcing_losses  ratio, reconstruction and validation PSNR of several runs together
    val_psnr         validation PSNR by epoch: mean over the frames, and last frame
    psnr_per_frame   PSNR of every frame of the best epoch's validation rollout
    psnr_summary     the table of the PSNRs per frame, also as psnr_summary.csv

Thin lines are from steps.csv, marks are the means over the epochs. A figure whose numbers are
missing is left out, and a line reports this. A cut axis is noted in the figure.
"""

import csv
import io
import itertools
import math
import sys
import textwrap
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font, get_font_names
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.cli import Parser, run  # noqa: E402
from utils.files import atomic, make_folder  # noqa: E402
from run_folders import (
    WITHOUT,
    by_epoch,
    by_objective,
    by_step,
    load_runs,
    objective,
    summarise,  # noqa: E402
    without_annealing,
)

# Okabe and Ito 2008, without its yellow, which is lost on white paper; dashes and markers say the
# same without colour.
STYLES = [
    ("#0072B2", "-", "o"),
    ("#D55E00", (0, (5, 1.6)), "s"),
    ("#009E73", (0, (3, 1.2, 1, 1.2)), "^"),
    ("#CC79A7", (0, (1.2, 1.2)), "D"),
    ("#E69F00", (0, (7, 1.4, 1.4, 1.4, 1.4, 1.4)), "v"),
    ("#56B4E9", (0, (2.5, 1)), "P"),
    ("#000000", (0, (4, 1.2, 1, 1.2, 1, 1.2)), "X"),
]
CJK = [
    "Noto Sans CJK TC",
    "Noto Sans TC",
    "PingFang TC",
    "Microsoft JhengHei",
    "WenQuanYi Zen Hei",
    "Arial Unicode MS",
]
SETTINGS = {
    "font.family": ["DejaVu Sans", *sorted(set(CJK) & set(get_font_names()), key=CJK.index)],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e2e2e2",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "pdf.fonttype": 42,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}
STAND_INS = itertools.count(1)  # numbers of the names that no font can draw
EPOCHS = "Epochs trained"  # the x axis: epoch e of history.csv reaches from e to e + 1


# ---------------------------------------------------------------- pieces of a figure


def new_figure(*size, **options):
    """Return a Figure of width and height in inches, drawn by Agg and unknown to pyplot."""
    figure = Figure(figsize=size, **options)
    FigureCanvasAgg(figure)
    return figure


@cache
def drawable(character):
    """Return whether a font of the figures has a character."""
    fonts = (get_font(findfont(family)) for family in SETTINGS["font.family"])
    return any(font.get_char_index(ord(character)) for font in fonts)


@cache
def stand_in(text):
    """Return what figures show for a text that no font has, a name of its own; print one line."""
    name = f"unnamed {next(STAND_INS)}"
    advice = "; Noto Sans CJK has it" if any("\u2e80" <= c <= "\u9fff" for c in text) else ""
    print(f'no font here has "{text}": figures call it "{name}"{advice}')
    return name


def label(name):
    """Shorten a name to 40 characters; escape what matplotlib would read as math or hide."""
    missing = [i for i, character in enumerate(name) if not drawable(character)]
    if missing:
        first, end = missing[0], missing[-1] + 1
        name = name[:first] + stand_in(name[first:end]) + name[end:]
    name = name if len(name) <= 40 else name[:19] + "\u2026" + name[-20:]
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def fill(text, room=25):
    """Break a text into lines of `room` characters for a panel; "beta = 1" stays whole."""
    whole = text.replace("beta = 1", "beta\u00a0=\u00a01")
    return textwrap.fill(whole, room).replace("\u00a0", " ")


def kl_label(run):
    """Return a run's name for figures about the KL term, with a note if it has no annealing."""
    named = WITHOUT in run.label or not without_annealing(run)
    return label(run.label if named else f"{run.label}, {WITHOUT}")


def style(index, count=0, runs=1):
    """Return line options of run `index`; markers on `count` points are shifted from run to run."""
    colour, dashes, marker = STYLES[index % len(STYLES)]
    step = max(1, count // 12)
    # where every point is marked, equal ones lie in rings
    size = 4.5 if step > 1 else 4.5 + 1.6 * min(3, max(0, runs - 1 - index))
    return {
        "color": colour,
        "linestyle": dashes,
        "marker": marker,
        "markersize": size,
        "markeredgecolor": colour,
        "markerfacecolor": "white" if index >= len(STYLES) else colour,
        "markevery": (index * step // max(1, runs) % step, step),
    }


def draw(ax, x, y, **options):
    """Plot the finite points; return which are infinite (NaN was not measured)."""
    ax.plot(x[np.isfinite(y)], y[np.isfinite(y)], **options)
    return np.isinf(y)


def draw_steps(ax, run, quantity, **options):
    """Plot a quantity by step, or its means over the epochs where there is no steps.csv."""
    draw(ax, *by_step(run, quantity), **options)


def draw_quantity(ax, runs, quantity, name=lambda r: label(r.label)):
    """Plot a quantity of all runs: by step thin, the means over the epochs on top."""
    bad = {}
    for i, r in enumerate(runs):
        x, y = by_epoch(r, quantity)
        options = style(i, len(y), len(runs))
        if r.steps is not None:
            draw_steps(ax, r, quantity, color=options["color"], linewidth=0.7, alpha=0.5)
        bad[r.label] = r.history["epoch"][draw(ax, x, y, label=name(r), **options)]
    note_not_finite(ax, bad)


def note(ax, text):
    """Write lines in small print under the axis, no wider than its panel."""
    columns = ax.get_subplotspec().get_gridspec().ncols
    room = max(24, int(15 * ax.figure.get_figwidth() / columns) - 8)
    ax.annotate(
        fill(text, room),
        (0, 0),
        (0, -30),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=7.5,
        va="top",
        color="#8a2c00",
        annotation_clip=False,
    )


def note_not_finite(ax, bad, unit="epoch"):
    """Note which epochs or frames could not be drawn; bad: {run name: their numbers}."""
    few = lambda xs: ", ".join(f"{x:g}" for x in xs[:6]) + (" ..." if len(xs) > 6 else "")
    parts = [f"{label(name)} {few(xs)}" for name, xs in bad.items() if len(xs)]
    if parts:
        note(ax, f"Not finite, so not drawn: {unit} " + "; ".join(parts))


def epoch_axis(ax, runs):
    """Set whole epochs on the x axis, with some room on both sides."""
    first = min(r.history["epoch"][0] for r in runs)
    # a run that was stopped has steps after its last whole epoch
    last = max(r.ends[-1] for r in runs)
    last = max([last, *(r.steps["epoch"][-1] for r in runs if r.steps is not None)])
    room = 0.02 * (last - first)
    ax.set_xlim(first - room, last + room)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def share_axis(ax):
    """Set a y axis for values between 0 and 1."""
    ax.set_ylim(-0.05, 1.08)


def finite(runs, *quantities):
    """Return all values of some quantities, by step and by epoch: a list of arrays."""
    return [y for r in runs for q in quantities for _, y in (by_step(r, q), by_epoch(r, q))]


def log_where_it_helps(ax, series):
    """Set a log axis if positive values span a factor above 8; with zeros, linear near zero."""
    values = np.concatenate([s[np.isfinite(s)] for s in series])
    positive = values[values > 0]
    if len(positive) and len(positive) == len(values) and values.max() > 8 * values.min():
        ax.set_yscale("log")
    elif len(positive) and values.min() == 0 and positive.max() > 8 * positive.min():
        ax.set_yscale("symlog", linthresh=positive.min(), linscale=0.3)
        ax.text(
            0.995,
            1.01,
            f"linear below {positive.min():.1e}",
            transform=ax.transAxes,
            ha="right",
            va="bottom",
            fontsize=7,
        )
        return
    else:
        return
    decades = np.log10(values.max() / values.min())
    short = lambda value: f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    plain = FuncFormatter(lambda value, _: f"{value:g}" if 1e-3 <= value < 1e5 else short(value))
    if decades < 1.7:
        ax.yaxis.set_major_locator(LogLocator(subs=[1, 2, 5]))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(plain)


def cut_low_outliers(ax, drawn, x_name):
    """Cut the axis, with a note, where a few low values would flatten all others.

    drawn: [(run name, colour, x, y, the numbers of the points, which x_name names)].
    """
    values = np.concatenate([y[np.isfinite(y)] for _, _, _, y, _ in drawn])
    if len(values) < 10:
        return
    low, high = np.percentile(values, 10), values.max()
    floor = low - 1.5 * max(high - low, 1)
    if values.min() >= floor - (high - floor):
        return
    ax.set_ylim(floor, high + 0.05 * (high - floor))
    count, lowest = 0, (math.inf, "", 0)
    for name, colour, x, y, numbers in drawn:
        out = np.isfinite(y) & (y < floor)
        ax.plot(
            x[out],
            np.full(out.sum(), floor),
            linestyle="none",
            marker="v",
            markersize=7,
            color=colour,
            clip_on=False,
            zorder=5,
        )
        count += out.sum()
        if out.any():
            lowest = min(lowest, (y[out].min(), name, numbers[out][y[out].argmin()]))
    values_lie = "value lies" if count == 1 else "values lie"
    note(
        ax,
        f"Axis cut: {count} {values_lie} below it (triangles); "
        f"lowest {lowest[0]:.1f} dB, {label(lowest[1])}, {x_name} {lowest[2]:g}",
    )


def legend_on_top(fig, ax):
    """Draw one legend for the figure, above its panels."""
    handles, names = ax.get_legend_handles_labels()
    widest = max(map(len, names))
    lines = math.ceil(len(names) / max(1, 105 // (widest + 9)))
    fig.legend(
        handles,
        names,
        loc="outside upper center",
        ncols=math.ceil(len(names) / lines),
        handlelength=3.6,
    )


def panels(runs, wide=2.45, narrowest=4.6):
    """Return (rows, columns, width in inches) of a figure with a panel for each run."""
    columns = len(runs) if len(runs) <= 4 else 3
    return math.ceil(len(runs) / columns), columns, max(narrowest, wide * columns)


# ---------------------------------------------------------------- the figures


def draw_validation(ax, runs, column, name=lambda r: label(r.label), ring=True):
    """Draw validation PSNR in dB at the end of each epoch; ring the best epoch."""
    bad, drawn = {}, []
    for i, r in enumerate(runs):
        epochs, x, y = r.history["epoch"], r.ends, r.history[column]
        options = style(i, len(y), len(runs))
        bad[r.label] = epochs[draw(ax, x, y, label=name(r), **options)]
        drawn.append((r.label, options["color"], x, y, epochs))
        best = summarise(r)["best_epoch"]
        if ring and best is not None:
            ax.plot(
                x[epochs == best],
                y[epochs == best],
                "o",
                markersize=11,
                markerfacecolor="none",
                markeredgecolor=options["color"],
                markeredgewidth=1.4,
            )
    ax.set_ylabel("PSNR (dB)")
    note_not_finite(ax, bad)
    if any(np.isfinite(y).any() for _, _, _, y, _ in drawn):
        cut_low_outliers(ax, drawn, "epoch")


def reconstruction_title(runs):
    """Return the title of the reconstruction, with the objectives of the runs."""
    return "Reconstruction (" + " or ".join(sorted({objective(r) for r in runs})) + ")"


def loss_curves(runs):
    """Draw total loss, reconstruction, MSE, KL and its weight; validation PSNR beside them."""
    fig = new_figure(9.6, 8.4, layout="constrained")
    axes = fig.subplots(3, 2, sharex=True)
    logarithm = any(objective(r) == "log-MSE" for r in runs)
    for ax, quantity, title in [
        (axes[0, 0], "loss", "Total loss = reconstruction + weight x KL"),
        (axes[1, 0], "reconstruction", reconstruction_title(runs)),
        (axes[2, 0], "kl", "KL (nats)"),
        (axes[2, 1], "weight", "Weight on KL: beta x kl_weight"),
    ]:
        if quantity == "weight":
            for i, r in enumerate(runs):
                colour, dashes, _ = STYLES[i % len(STYLES)]
                draw_steps(ax, r, quantity, color=colour, linestyle=dashes)
            ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
        else:
            draw_quantity(ax, runs, quantity, kl_label)
            log_where_it_helps(ax, finite(runs, quantity))
        ax.set_title(title)
    draw_validation(axes[0, 1], runs, "val_psnr_mean", kl_label)
    axes[0, 1].set_title("Validation PSNR, mean over the frames")
    draw_quantity(axes[1, 1], runs, "mse", kl_label)
    log_where_it_helps(axes[1, 1], finite(runs, "mse"))
    axes[1, 1].set_title("Training MSE" + (" (not in the loss)" if logarithm else ""))
    epoch_axis(axes[2, 0], runs)
    for ax in axes[2]:
        ax.set_xlabel(EPOCHS)
    legend_on_top(fig, axes[0, 0])
    return fig


def loss_parts(runs):
    """Draw the total loss of each run over the areas of its two terms."""
    rows, columns, width = panels(runs)
    fig = new_figure(width, 2.5 * rows + 0.3, layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    totals = np.concatenate([y[np.isfinite(y)] for y in finite(runs, "loss")])
    top = 1.15 * np.percentile(totals, 97) if len(totals) else 1
    for ax, r in zip(axes.flat, runs):
        x, part = by_step(r, "reconstruction")
        with np.errstate(invalid="ignore"):  # an epoch whose steps were all skipped
            term = by_step(r, "weight")[1] * by_step(r, "kl")[1]
        ax.fill_between(x, 0, part, color="#56B4E9", linewidth=0, label=reconstruction_title(runs))
        ax.fill_between(x, part, part + term, color="#E69F00", linewidth=0, label="weight x KL")
        draw_steps(ax, r, "loss", color="black", linewidth=0.8, label="total loss")
        x, y = by_epoch(r, "loss")
        draw(
            ax,
            x,
            y,
            color="black",
            linestyle="none",
            marker=".",
            label="its mean over an epoch",
            markevery=max(1, len(x) // 12),
        )
        ax.set_title(fill(kl_label(r)))
    if len(totals) and totals.max() > top:
        over = max(
            runs, key=lambda r: max([y[np.isfinite(y)].max(initial=0) for y in finite([r], "loss")])
        )
        note(axes[-1, 0], f"Axis cut: the total reaches {totals.max():.3g} ({label(over.label)})")
    axes[0, 0].set_ylim(0, top if top > 0 else 1)
    finish_panels(fig, axes, runs, columns, 4 if columns > 1 else 2)
    return fig


def finish_panels(fig, axes, runs, columns, legend_columns):
    """Hide the panels without a run, label the x axis of the last ones, draw one legend on top."""
    for i, ax in enumerate(axes.flat):
        ax.set_visible(i < len(runs))
        if i + columns >= len(runs):
            ax.set_xlabel(EPOCHS)
            ax.tick_params(labelbottom=True)
    epoch_axis(axes[0, 0], runs)
    handles, names = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside upper center", ncols=legend_columns, handlelength=2.6)


def same_schedule(runs):
    """Return groups of runs with the same beta at the same places."""
    groups = []
    for r in runs:
        x, y = by_step(r, "beta")
        for group in groups:
            other_x, other_y = by_step(group[0], "beta")
            if (
                x.shape == other_x.shape
                and np.allclose(x, other_x)
                and np.allclose(y, other_y, equal_nan=True)
            ):
                group.append(r)
                break
        else:
            groups.append([r])
    return groups


def beta_schedules(runs):
    """Draw beta, one panel for each schedule."""
    groups = same_schedule(runs)
    rows, columns, width = panels(groups, narrowest=3.4)
    fig = new_figure(width, 2.2 * rows, layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, sharey=True, sharex=True)
    for i, ax in enumerate(axes.flat):
        ax.set_visible(i < len(groups))
        if i + columns >= len(groups):
            ax.set_xlabel(EPOCHS)
            ax.tick_params(labelbottom=True)
    for ax, group in zip(axes.flat, groups):
        draw_steps(ax, group[0], "beta", color=STYLES[runs.index(group[0]) % len(STYLES)][0])
        title = ", ".join(kl_label(r) for r in group)
        ax.set_title(fill(title), fontsize=9.5 if len(group) < 3 else 8)
    share_axis(axes[0, 0])
    for ax in axes[:, 0]:
        ax.set_ylabel("beta")
    epoch_axis(axes[0, 0], runs)
    return fig


def forcing_panels(top, bottom, r):
    """Draw one run: ratio and teacher-forced share, over the loss."""
    blue, orange, black = STYLES[0][0], STYLES[1][0], "#000000"
    x, share = by_step(r, "tf_share")
    draw(
        top,
        x,
        share,
        color=black,
        linestyle="none",
        marker="x" if len(x) < 60 else ".",
        markersize=4 if len(x) < 60 else 2,
        markeredgewidth=0.8,
        alpha=0.7,
        label="teacher-forced share",
    )
    draw_steps(top, r, "tfr", color=blue, linewidth=2.2, label="ratio")
    top.set_title(label(r.label))
    share_axis(top)
    bad = None
    for quantity, colour, width, name in [
        ("loss", orange, 2.2, "total loss"),
        ("reconstruction", black, 1, "reconstruction"),
    ]:
        if r.steps is not None:
            draw_steps(bottom, r, quantity, color=colour, linewidth=0.7, alpha=0.5)
        x, y = by_epoch(r, quantity)
        found = draw(
            bottom,
            x,
            y,
            color=colour,
            linewidth=width,
            label=name,
            marker="o",
            markersize=2 + 1.5 * width,
            markevery=max(1, len(x) // 12),
        )
        bad = found if bad is None else bad
    note_not_finite(bottom, {r.label: r.history["epoch"][bad]})


def teacher_forcing(runs):
    """Draw the ratio, the teacher-forced share and the loss of each run on one x axis."""
    blocks, columns, width = panels(runs)
    fig = new_figure(width, 4.1 * blocks, layout="constrained")
    axes = fig.subplots(
        2 * blocks, columns, squeeze=False, height_ratios=[1, 1.25] * blocks, sharex=True
    )
    shared = axes[1, 0]
    for i in range(blocks * columns):
        row, column = 2 * (i // columns), i % columns
        top, bottom = axes[row, column], axes[row + 1, column]
        if i >= len(runs):
            top.set_visible(False)
            bottom.set_visible(False)
            continue
        forcing_panels(top, bottom, runs[i])
        if bottom is not shared:
            bottom.sharey(shared)
        for ax, name in [(top, "Teacher forcing"), (bottom, "Training loss")]:
            if column:
                ax.tick_params(labelleft=False)
            else:
                ax.set_ylabel(name)
        bottom.set_xlabel(EPOCHS)
        bottom.tick_params(labelbottom=True)
    log_where_it_helps(shared, finite(runs, "loss", "reconstruction"))
    epoch_axis(shared, runs)
    handles = [h for ax in axes[:2, 0] for h in ax.get_legend_handles_labels()[0]]
    fig.legend(
        handles,
        [h.get_label() for h in handles],
        loc="outside upper center",
        handlelength=2.6,
        ncols=4 if columns > 2 else 2,
    )
    return fig


def teacher_forcing_losses(runs):
    """Draw ratio, reconstruction and validation PSNR of all runs together."""
    fig = new_figure(7, 7.2, layout="constrained")
    axes = fig.subplots(3, 1, sharex=True, height_ratios=[1, 1.5, 1.3])
    for i, r in enumerate(runs):
        colour, dashes, _ = STYLES[i % len(STYLES)]
        draw_steps(axes[0], r, "tfr", color=colour, linestyle=dashes)
    axes[0].set_title("Teacher forcing ratio")
    share_axis(axes[0])
    draw_quantity(axes[1], runs, "reconstruction")
    log_where_it_helps(axes[1], finite(runs, "reconstruction"))
    axes[1].set_title(f"Training loss: {reconstruction_title(runs).replace('R', 'r', 1)}")
    draw_validation(axes[2], runs, "val_psnr_mean")
    axes[2].set_title("Validation PSNR (free running), mean over the frames")
    epoch_axis(axes[2], runs)
    axes[2].set_xlabel(EPOCHS)
    legend_on_top(fig, axes[1])
    return fig


def val_psnr(runs):
    """Draw validation PSNR by epoch: mean over the frames, and last frame."""
    fig = new_figure(7, 6, layout="constrained")
    axes = fig.subplots(2, 1, sharex=True)
    draw_validation(axes[0], runs, "val_psnr_mean")
    axes[0].set_title("Validation PSNR, mean over the frames (best epoch ringed)")
    draw_validation(axes[1], runs, "val_psnr_last", ring=False)
    axes[1].set_title("Validation PSNR of the last frame")
    epoch_axis(axes[1], runs)
    axes[1].set_xlabel(EPOCHS)
    legend_on_top(fig, axes[0])
    return fig


def psnr_per_frame(runs):
    """Draw the PSNR of every frame of the best epoch's validation rollout."""
    fig = new_figure(7, 4.2, layout="constrained")
    ax = fig.subplots()
    bad, drawn, window, smoothed = {}, [], 15, False
    for i, r in enumerate(runs):
        if r.psnr is None:
            continue
        x, y = r.psnr["frame"], r.psnr["psnr"]
        options = style(i, len(y), len(runs))
        name = f"{label(r.label)} (mean {summarise(r)['psnr_mean']:.2f} dB)"
        if len(y) > 60 and np.isfinite(y).all():
            # 629 noisy points a run cannot be told apart in print: a running mean over thin frames
            smoothed = True
            ax.plot(
                x, y, color=options["color"], linewidth=0.6, alpha=0.45 if len(runs) < 4 else 0.25
            )
            middle = np.convolve(y, np.ones(window) / window, "valid")
            ax.plot(x[window // 2 : window // 2 + len(middle)], middle, label=name, **options)
        else:
            bad[r.label] = x[draw(ax, x, y, label=name, **options)]
        drawn.append((r.label, options["color"], x, y, x))
    ax.set_xlabel("Frame")
    ax.set_ylabel("PSNR (dB)")
    lines = f" (thin: each frame; thick: mean over {window} frames)" if smoothed else ""
    ax.set_title("Validation PSNR per frame" + lines)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.margins(x=0.015)
    note_not_finite(ax, bad, "frame")
    cut_low_outliers(ax, drawn, "frame")
    legend_on_top(fig, ax)
    return fig


def psnr_cells(row):
    """Return a row of `summarise` as the cells of a table, after run and epochs."""
    two = lambda key: "\u2013" if row[key] is None else f"{row[key]:.2f}"
    at = lambda key: "\u2013" if row[key] is None else f"{row[key]:.2f} ({row[key + '_frame']})"
    return [
        "\u2013" if row["best_epoch"] is None else str(row["best_epoch"]),
        two("psnr_mean"),
        two("psnr_median"),
        two("psnr_first"),
        two("psnr_last"),
        at("psnr_min"),
        at("psnr_max"),
    ]


def psnr_summary(runs):
    """Draw the table of the PSNRs per frame, as a figure."""
    rows = [summarise(r) for r in runs]
    titles = [
        "Run",
        "Epochs",
        "Best epoch\n(from 0)",
        "Mean",
        "Median",
        "First\nframe",
        "Last\nframe",
        "Lowest (frame)",
        "Highest (frame)",
    ]
    cells = [[label(row["run"]), str(row["epochs"]), *psnr_cells(row)] for row in rows]
    widths = [max(10, max(len(c[0]) for c in cells) + 1), 7, 10, 8, 8, 8, 8, 15, 15]
    right = np.cumsum(widths) / sum(widths)
    height = 0.27 * len(rows) + 1.0
    fig = new_figure(0.088 * sum(widths), height)
    ax = fig.add_axes((0.02, 0, 0.96, 1))
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(0, height))
    ax.text(
        0,
        height - 0.13,
        "PSNR (dB) of the best epoch's validation rollout",
        weight="bold",
        va="center",
        fontsize=9,
    )
    means = [row["psnr_mean"] for row in rows if row["psnr_mean"] is not None]
    for line, row in enumerate([titles, *cells]):
        y = height - 0.52 if line == 0 else height - 0.72 - 0.27 * line + 0.01
        best = line > 0 and len(means) > 1 and rows[line - 1]["psnr_mean"] == max(means)
        for column, value in enumerate(row):
            ax.text(
                0 if column == 0 else right[column],
                y,
                value,
                fontsize=8.5,
                linespacing=0.95,
                ha="left" if column == 0 else "right",
                va="center_baseline" if line == 0 else "baseline",
                weight="bold" if line == 0 or best else "normal",
            )
    for y, width in [(height - 0.28, 1.2), (height - 0.74, 0.7), (0.12, 1.2)]:
        ax.axhline(y, color="black", linewidth=width)
    return fig


FIGURES = (
    loss_curves,
    loss_parts,
    beta_schedules,
    teacher_forcing,
    teacher_forcing_losses,
    val_psnr,
    psnr_per_frame,
    psnr_summary,
)


LOSSES = (loss_curves, loss_parts, teacher_forcing, teacher_forcing_losses)


def why_not(name, runs):
    """Return why a figure is left out ("" if no line is needed); None where it can be drawn."""
    measured = any(summarise(r)["psnr_mean"] is not None for r in runs)
    validated = any(np.isfinite(r.history["val_psnr_mean"]).any() for r in runs)
    if name == "val_psnr" and not validated:
        return "left out, no run has a validation PSNR in its history.csv"
    if name in ("psnr_per_frame", "psnr_summary") and not measured:
        return "left out, no run has a PSNR per frame (psnr_per_frame.csv)"
    if name == "teacher_forcing_losses" and len(runs) == 1:
        return ""  # teacher_forcing shows all of it
    return None


def make_figure(function, runs):
    """Return (figure or None, a line about what was left out or None)."""
    name = function.__name__
    reason = why_not(name, runs)
    if reason is not None:
        return None, f"{name}: {reason}" if reason else None
    line = None
    with matplotlib.rc_context(SETTINGS):
        if name == "psnr_per_frame":
            without = [r.label for r in runs if summarise(r)["psnr_mean"] is None]
            if without:
                line = f"{name}: without {', '.join(without)}, which has no PSNR per frame"
            runs = [r for r in runs if r.label not in without]
        return function(runs), line


# ---------------------------------------------------------------- writing


def write(path, content):
    """Write bytes or text whole or not at all."""
    with atomic(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def render(figure, kind):
    """Return a figure's bytes as 'png' or 'pdf', without a date: equal runs give equal files."""
    buffer = io.BytesIO()
    dateless = {"CreationDate": None} if kind == "pdf" else None
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(buffer, format=kind, dpi=180, metadata=dateless)
    return buffer.getvalue()


def summary_csv(runs):
    """Return the text of psnr_summary.csv."""
    buffer = io.StringIO()
    rows = [
        {k: round(v, 4) if isinstance(v, float) else v for k, v in summarise(r).items()}
        for r in runs
    ]
    writer = csv.DictWriter(buffer, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def write_figure(figure, name, out):
    """Write a figure as PNG and PDF; return the PNG's bytes."""
    image = render(figure, "png")
    write(out / f"{name}.png", image)
    figure.set_layout_engine("none")  # the PDF keeps the positions of the PNG
    write(out / f"{name}.pdf", render(figure, "pdf"))
    return image


def write_figures(runs, out, functions=FIGURES):
    """Draw and write figures; return {name: PNG bytes} and {name: line on what is left out}.

    Losses of different objectives have no axis in common: each objective has figures of its own.
    """
    images, left_out = {}, {}
    for function in functions:
        for suffix, _, group in by_objective(runs) if function in LOSSES else [("", "", runs)]:
            name = function.__name__ + suffix
            figure, line = make_figure(function, group)
            if line:
                left_out[name] = line
            if figure:
                images[name] = write_figure(figure, name, out)
    if psnr_summary in functions:
        write(out / "psnr_summary.csv", summary_csv(runs))
    return images, left_out


def build_parser():
    parser = Parser(
        prog="plot_runs.py", description="Draw the figures of one or more training runs."
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="a folder that Trainer.py wrote (its --save_root)"
    )
    parser.add_argument("-o", "--out", metavar="OUT", required=True, help="folder for the figures")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    runs = load_runs(args.runs)
    out = make_folder(args.out, "-o")
    images, left_out = write_figures(runs, out)
    for line in left_out.values():
        print(line)
    print(f"{len(images)} figures in {args.out}: {', '.join(images)}")
    names = [f.__name__ + suffix for f in FIGURES for suffix in ("", "_mse", "_log_mse")]
    old = [name for name in names if name not in images and (out / f"{name}.png").exists()]
    if old:
        print(f"{args.out} also has figures of an earlier call: {', '.join(old)}")


if __name__ == "__main__":
    run(main)
