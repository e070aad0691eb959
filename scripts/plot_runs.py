#!/usr/bin/env python3
"""Draw the figures of one or more training runs, from history.csv and psnr_per_frame.csv alone.

    python scripts/plot_runs.py runs/Cyclical runs/Monotonic runs/None -o figures

Each RUN is a folder that Trainer.py wrote (its --save_root); a run is called by its folder's name. Into OUT go, as PNG and PDF:

    loss_curves      total loss, MSE and KL, with beta under them on the same epochs
    beta_schedules   the weight on KL by epoch, one panel for each schedule (the assignment's figure 5)
    teacher_forcing  the ratio, the share of steps that used ground truth, and the loss under them
    val_psnr         validation PSNR by epoch: mean over the frames, and last frame
    psnr_per_frame   PSNR of every frame of the best epoch's validation rollout
    psnr_summary     the table of all this, also as psnr_summary.csv

A figure whose numbers are missing is left out, and a line says so. Where an axis is cut, the figure says so.
"""

import csv
import io
import math
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.font_manager import get_font_names
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.cli import Parser, UserError, run
from utils.files import HISTORY, atomic, make_folder

# Okabe and Ito 2008, without its yellow, which is lost on white paper; dashes and markers say the same without colour.

# Okabe and Ito 2008, without its yellow, which is lost on white paper; dashes and markers say the same without colour.
STYLES = [
    ("#0072B2", "-", "o"),
    ("#D55E00", (0, (5, 1.6)), "s"),
    ("#009E73", (0, (3, 1.2, 1, 1.2)), "^"),
    ("#CC79A7", (0, (1.2, 1.2)), "D"),
    ("#E69F00", (0, (7, 1.4, 1.4, 1.4, 1.4, 1.4)), "v"),
    ("#56B4E9", (0, (2.5, 1)), "P"),
    ("#000000", (0, (4, 1.2, 1, 1.2, 1, 1.2)), "X"),
]
CJK = ["Noto Sans CJK TC", "Noto Sans TC", "PingFang TC", "Microsoft JhengHei", "WenQuanYi Zen Hei", "Arial Unicode MS"]

plt.rcParams.update({
    "font.family": ["DejaVu Sans", *sorted(set(CJK) & set(get_font_names()), key=CJK.index)],
    "font.size": 9, "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "legend.fontsize": 8.5, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e2e2e2", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "pdf.fonttype": 42, "lines.linewidth": 1.6, "lines.markersize": 4.5,
})


# ---------------------------------------------------------------- reading

def read_table(path, columns):
    """{column: float array} of a CSV file whose header has at least `columns`.

    An empty cell was not measured: NaN. A cell that says nan or inf was measured and is not finite: inf, so that it gets shown.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [(reader.line_num, row) for reader in [csv.reader(file)] for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV: {error}")
    if not rows:
        raise UserError(f"{path}: is empty; expected the columns {','.join(columns)}")
    header = [name.strip() for name in rows[0][1]]
    missing = [name for name in columns if name not in header]
    if missing:
        raise UserError(f"{path}: lacks the column {', '.join(missing)}; expected {','.join(columns)}")
    if len(rows) == 1:
        raise UserError(f"{path}: has a header and no rows; the first epoch has not ended")
    values = []
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise UserError(f"{path}, line {line}: {len(row)} values, expected {len(header)}")
        try:
            numbers = [float(cell) if cell.strip() else math.nan for cell in row]
        except ValueError as error:
            raise UserError(f"{path}, line {line}: {error}")
        values.append([x if math.isfinite(x) or not cell.strip() else math.inf for x, cell in zip(numbers, row)])
    table = dict(zip(header, np.array(values).T))
    order = table[columns[0]]
    if not np.isfinite(order).all() or (np.diff(order) <= 0).any():
        raise UserError(f"{path}: column {columns[0]} does not count upwards")
    return table


def load_runs(paths):
    """Read every run folder: a list with path, name, history and psnr (None where there is no psnr_per_frame.csv)."""
    paths = [Path(path) for path in paths]
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such run folder")
        if not (path / "history.csv").is_file():
            raise UserError(f"{path}: has no history.csv; expected a folder that Trainer.py wrote (its --save_root)")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("RUN: the same folder is given twice")
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(Path(path.resolve().parent.name) / path.resolve().name) for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    runs = []
    for path, name in zip(paths, names):
        psnr = path / "psnr_per_frame.csv"
        runs.append(SimpleNamespace(
            path=path, name=name, history=read_table(path / "history.csv", HISTORY),
            psnr=read_table(psnr, ["frame", "psnr"]) if psnr.is_file() else None))
    return runs


def summarise(run):
    """The numbers of one run, as a dict; None where they were not measured."""
    history, mean = run.history, run.history["val_psnr_mean"]
    row = {"run": run.name, "epochs": len(mean), "best_epoch": None}
    if np.isfinite(mean).any():
        best = np.argmax(np.where(np.isfinite(mean), mean, -np.inf))
        # a run that went on in another folder has better epochs in its history than the one whose files are there
        same = [] if run.psnr is None else np.flatnonzero(np.isclose(mean, run.psnr["psnr"].mean(), rtol=0, atol=1e-6))
        if len(same) and best not in same:
            best = same[-1]
        row["best_epoch"] = int(history["epoch"][best])
    keys = "psnr_mean psnr_median psnr_first psnr_last psnr_min psnr_min_frame psnr_max psnr_max_frame".split()
    row.update(dict.fromkeys(keys))
    if run.psnr is not None and np.isfinite(run.psnr["psnr"]).any():
        keep = np.isfinite(run.psnr["psnr"])
        frame, psnr = run.psnr["frame"][keep], run.psnr["psnr"][keep]
        low, high = psnr.argmin(), psnr.argmax()
        row.update(zip(keys, [psnr.mean(), np.median(psnr), psnr[0], psnr[-1],
                              psnr[low], int(frame[low]), psnr[high], int(frame[high])]))
    return row


# ---------------------------------------------------------------- pieces of a figure

def label(name):
    """A name that matplotlib prints as it is: no mathtext, and no leading underscore, which hides a legend entry."""
    name = name if len(name) <= 40 else name[:19] + "\u2026" + name[-20:]
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def style(index, count=0, runs=1):
    """Line options of run `index`; with `count` points its markers stand at their own places, so that equal curves all show."""
    colour, dashes, marker = STYLES[index % len(STYLES)]
    step = max(1, count // 12)
    size = 4.5 if step > 1 else 4.5 + 1.6 * min(3, max(0, runs - 1 - index))  # every point marked: equal ones lie in rings
    return dict(color=colour, linestyle=dashes, marker=marker, markersize=size, markeredgecolor=colour,
                markerfacecolor="white" if index >= len(STYLES) else colour,
                markevery=(index * step // max(1, runs) % step, step))


def draw(ax, x, y, **options):
    """Plot the finite points. Return the x of those that are not finite (inf; NaN was not measured)."""
    ax.plot(x[np.isfinite(y)], y[np.isfinite(y)], **options)
    return x[np.isinf(y)]


def note(ax, text):
    """A line in small print under the axis."""
    ax.annotate(text, (0, 0), (0, -30), xycoords="axes fraction", textcoords="offset points", fontsize=7.5, va="top",
                color="#8a2c00", annotation_clip=False)


def note_not_finite(ax, bad):
    """Say which epochs could not be drawn. bad: {run name: epochs}."""
    parts = [f"{label(name)} {', '.join(f'{e:g}' for e in epochs[:6])}{' ...' if len(epochs) > 6 else ''}"
             for name, epochs in bad.items() if len(epochs)]
    if parts:
        note(ax, "Not finite, so not drawn: " + "; ".join(parts))


def epoch_axis(ax, histories):
    """Whole epochs on the x axis, with some room on both sides; one epoch alone stands in the middle."""
    first, last = min(h["epoch"][0] for h in histories), max(h["epoch"][-1] for h in histories)
    room = max(0.5, 0.02 * (last - first))
    ax.set_xlim(first - room, last + room)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def log_where_it_helps(ax, series):
    """A log axis where positive values span more than a factor of 8; with zeros among them, linear near zero (symlog)."""
    values = np.concatenate([s[np.isfinite(s)] for s in series])
    positive = values[values > 0]
    if len(positive) and len(positive) == len(values) and values.max() > 8 * values.min():
        ax.set_yscale("log")
    elif len(positive) and values.min() == 0 and positive.max() > 8 * positive.min():
        ax.set_yscale("symlog", linthresh=positive.min(), linscale=0.3)
        ax.text(0.995, 1.01, f"linear below {positive.min():.1e}", transform=ax.transAxes, ha="right", va="bottom", fontsize=7)
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
    """Where a few values lie so far down that they would flatten all others, cut the axis, mark them and say so.

    drawn: [(run name, colour, x, y)].
    """
    values = np.concatenate([y[np.isfinite(y)] for _, _, _, y in drawn])
    if len(values) < 10:
        return
    low, high = np.percentile(values, 10), values.max()
    floor = low - 1.5 * max(high - low, 1)
    if values.min() >= floor - (high - floor):
        return
    ax.set_ylim(floor, high + 0.05 * (high - floor))
    count, lowest = 0, (math.inf, "", 0)
    for name, colour, x, y in drawn:
        out = np.isfinite(y) & (y < floor)
        ax.plot(x[out], np.full(out.sum(), floor), linestyle="none", marker="v", markersize=7, color=colour, clip_on=False,
                zorder=5)
        count += out.sum()
        if out.any():
            lowest = min(lowest, (y[out].min(), name, x[out][y[out].argmin()]))
    values_lie = "value lies" if count == 1 else "values lie"
    note(ax, f"Axis cut: {count} {values_lie} below it (triangles); "
             f"lowest {lowest[0]:.1f} dB, {label(lowest[1])}, {x_name} {lowest[2]:g}")


def same_series(runs, column):
    """Group runs whose `column` is equal at equal epochs: [(indices, epochs, values)]."""
    groups = []
    for i, r in enumerate(runs):
        for members, epochs, values in groups:
            if np.array_equal(epochs, r.history["epoch"]) and np.allclose(values, r.history[column], equal_nan=True):
                members.append(i)
                break
        else:
            groups.append(([i], r.history["epoch"], r.history[column]))
    return groups


def legend_on_top(fig, ax):
    """One legend for the figure, above its panels."""
    handles, names = ax.get_legend_handles_labels()
    widest = max(map(len, names))
    lines = math.ceil(len(names) / max(1, 105 // (widest + 9)))
    fig.legend(handles, names, loc="outside upper center", ncols=math.ceil(len(names) / lines), handlelength=3.6)


# ---------------------------------------------------------------- the figures

def loss_curves(runs):
    panels = [("train_loss", "Total loss (reconstruction + weighted KL)"), ("train_mse", "MSE"), ("train_kl", "KL divergence (nats)"),
              ("beta", "beta, the weight on KL")]
    fig, axes = plt.subplots(4, 1, layout="constrained", figsize=(7, 9), sharex=True, height_ratios=[1.3, 1.3, 1.3, 0.8])
    for ax, (column, title) in zip(axes, panels):
        bad = {}
        for i, r in enumerate(runs):
            y = r.history[column]
            bad[r.name] = draw(ax, r.history["epoch"], y, label=label(r.name), **style(i, len(y), len(runs)))
        ax.set_title(title)
        if column == "beta":
            ax.set_ylim(-0.05, 1.08)
        else:
            log_where_it_helps(ax, [r.history[column] for r in runs])
            note_not_finite(ax, bad)
    epoch_axis(axes[-1], [r.history for r in runs])
    axes[-1].set_xlabel("Epoch")
    legend_on_top(fig, axes[0])
    return fig


def beta_schedules(runs):
    groups = same_series(runs, "beta")
    columns = min(3, len(groups))
    rows = math.ceil(len(groups) / columns)
    fig, axes = plt.subplots(rows, columns, layout="constrained", figsize=(max(3.4, 2.45 * columns), 2.2 * rows), squeeze=False,
                             sharey=True, sharex=True)
    for ax in axes.flat[len(groups):]:
        ax.set_visible(False)
    for ax, (members, epochs, beta) in zip(axes.flat, groups):
        colour, _, marker = STYLES[members[0] % len(STYLES)]
        ax.plot(epochs, beta, color=colour, marker=marker, markersize=3 if len(epochs) > 20 else 4.5)
        ax.set_title(textwrap.fill(", ".join(label(runs[i].name) for i in members), 28), fontsize=9.5 if len(members) < 3 else 8)
        ax.set_ylim(-0.05, 1.08)
    for ax in axes[:, 0]:
        ax.set_ylabel("beta")
    for i, ax in enumerate(axes.flat[:len(groups)]):
        epoch_axis(ax, [r.history for r in runs])
        if i + columns >= len(groups):
            ax.set_xlabel("Epoch")
            ax.tick_params(labelbottom=True)
    return fig


def teacher_forcing(runs):
    columns = 2 if len(runs) == 4 else min(3, len(runs))
    blocks = math.ceil(len(runs) / columns)
    fig, axes = plt.subplots(2 * blocks, columns, layout="constrained", figsize=(max(4.6, 2.45 * columns), 4.1 * blocks), squeeze=False,
                             height_ratios=[1, 1.25] * blocks, sharex=True)
    losses = [r.history[c] for r in runs for c in ("train_loss", "train_mse")]
    blue, orange = STYLES[0][0], STYLES[1][0]
    shared = None
    for i in range(blocks * columns):
        top, bottom = axes[2 * (i // columns), i % columns], axes[2 * (i // columns) + 1, i % columns]
        if i >= len(runs):
            top.set_visible(False)
            bottom.set_visible(False)
            continue
        h = runs[i].history
        markers = dict(marker="" if len(h["epoch"]) > 20 else "o", markersize=4)
        draw(top, h["epoch"], h["tfr"], color=blue, linewidth=2.2, label="ratio set", **markers)
        draw(top, h["epoch"], h["tf_share"], color="#000000", linestyle="none", marker="x", label="share of steps that used it",
             markersize=3 if len(h["epoch"]) > 20 else 5, markeredgewidth=0.8)
        top.set_title(label(runs[i].name))
        top.set_ylim(-0.06, 1.08)
        bad = draw(bottom, h["epoch"], h["train_loss"], color=orange, linewidth=2.6, label="total loss", **markers | {"markersize": 7})
        draw(bottom, h["epoch"], h["train_mse"], color="#000000", linestyle=(0, (3, 1.5)), linewidth=1.2, label="MSE", **markers)
        if shared is None:
            shared = bottom
        else:
            bottom.sharey(shared)
        if i % columns:
            top.tick_params(labelleft=False)
            bottom.tick_params(labelleft=False)
        else:
            top.set_ylabel("Teacher forcing")
            bottom.set_ylabel("Training loss")
        bottom.set_xlabel("Epoch")
        bottom.tick_params(labelbottom=True)
        note_not_finite(bottom, {"epoch": bad})
    log_where_it_helps(shared, losses)
    epoch_axis(shared, [r.history for r in runs])
    handles = [*axes[0, 0].get_legend_handles_labels()[0], *axes[1, 0].get_legend_handles_labels()[0]]
    fig.legend(handles, [h.get_label() for h in handles], loc="outside upper center", ncols=4 if columns > 2 else 2, handlelength=2.6)
    return fig


def val_psnr(runs):
    fig, axes = plt.subplots(2, 1, layout="constrained", figsize=(7, 6), sharex=True)
    for ax, column, title in [(axes[0], "val_psnr_mean", "Validation PSNR, mean over the frames (best epoch ringed)"),
                              (axes[1], "val_psnr_last", "Validation PSNR of the last frame")]:
        bad, drawn = {}, []
        for i, r in enumerate(runs):
            x, y = r.history["epoch"], r.history[column]
            options = style(i, len(y), len(runs))
            bad[r.name] = draw(ax, x, y, label=label(r.name), **options)
            drawn.append((r.name, options["color"], x, y))
            best = summarise(r)["best_epoch"]
            if column == "val_psnr_mean" and best is not None:
                ax.plot(best, y[x == best][0], "o", markersize=11, markerfacecolor="none", markeredgecolor=options["color"],
                        markeredgewidth=1.4)
        ax.set_title(title)
        ax.set_ylabel("PSNR (dB)")
        note_not_finite(ax, bad)
        cut_low_outliers(ax, drawn, "epoch")
    epoch_axis(axes[1], [r.history for r in runs])
    axes[1].set_xlabel("Epoch")
    legend_on_top(fig, axes[0])
    return fig


def psnr_per_frame(runs):
    fig, ax = plt.subplots(layout="constrained", figsize=(7, 4.2))
    bad, drawn, window, smoothed = {}, [], 15, False
    for i, r in enumerate(runs):
        if r.psnr is None:
            continue
        x, y = r.psnr["frame"], r.psnr["psnr"]
        options = style(i, len(y), len(runs))
        name = f"{label(r.name)} (mean {summarise(r)['psnr_mean']:.2f} dB)"
        if len(y) > 60 and np.isfinite(y).all():
            # 629 noisy points a run cannot be told apart in print: each frame thin, a running mean over it
            smoothed = True
            ax.plot(x, y, color=options["color"], linewidth=0.6, alpha=0.45 if len(runs) < 4 else 0.25)
            middle = np.convolve(y, np.ones(window) / window, "valid")
            ax.plot(x[window // 2: window // 2 + len(middle)], middle, label=name, **options)
        else:
            bad[r.name] = draw(ax, x, y, label=name, **options)
        drawn.append((r.name, options["color"], x, y))
    ax.set_xlabel("Frame")
    ax.set_ylabel("PSNR (dB)")
    ax.set_title("Validation PSNR per frame" + (f" (thin: each frame; thick: mean over {window} frames)" if smoothed else ""))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.margins(x=0.015)
    note_not_finite(ax, bad)
    cut_low_outliers(ax, drawn, "frame")
    legend_on_top(fig, ax)
    return fig


def psnr_cells(row):
    """A run's line in a table of PSNR, from `summarise`: best epoch, mean, median, first, last, lowest and highest frame, as texts."""
    two = lambda key: "\u2013" if row[key] is None else f"{row[key]:.2f}"
    at = lambda key: "\u2013" if row[key] is None else f"{row[key]:.2f} ({row[key + '_frame']})"
    return ["\u2013" if row["best_epoch"] is None else str(row["best_epoch"]), two("psnr_mean"), two("psnr_median"),
            two("psnr_first"), two("psnr_last"), at("psnr_min"), at("psnr_max")]


def psnr_summary(runs):
    rows = [summarise(r) for r in runs]
    titles = ["Run", "Epochs", "Best\nepoch", "Mean", "Median", "First\nframe", "Last\nframe", "Lowest (frame)", "Highest (frame)"]

    cells = [[label(row["run"]), str(row["epochs"]), *psnr_cells(row)] for row in rows]
    widths = [max(10, max(len(c[0]) for c in cells) + 1), 7, 6, 8, 8, 8, 8, 15, 15]
    right = np.cumsum(widths) / sum(widths)
    height = 0.27 * len(rows) + 1.0
    fig = plt.figure(figsize=(0.088 * sum(widths), height))
    ax = fig.add_axes((0.02, 0, 0.96, 1))
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(0, height))
    ax.text(0, height - 0.13, "PSNR (dB) of the best epoch's validation rollout", weight="bold", va="center", fontsize=9)
    means = [row["psnr_mean"] for row in rows if row["psnr_mean"] is not None]
    for line, row in enumerate([titles, *cells]):
        y = height - 0.52 if line == 0 else height - 0.72 - 0.27 * line + 0.01
        best = line > 0 and len(means) > 1 and rows[line - 1]["psnr_mean"] == max(means)
        for column, value in enumerate(row):
            ax.text(0 if column == 0 else right[column], y, value, ha="left" if column == 0 else "right",
                    va="center_baseline" if line == 0 else "baseline", fontsize=8.5, linespacing=0.95,
                    weight="bold" if line == 0 or best else "normal")
    for y, width in [(height - 0.28, 1.2), (height - 0.74, 0.7), (0.12, 1.2)]:
        ax.axhline(y, color="black", linewidth=width)
    return fig


def make_figures(runs):
    """Draw everything that has data. Return {name: figure} and the lines that say what was left out, and why."""
    figures, left_out = {}, []
    without = [r.name for r in runs if r.psnr is None]
    measured = any(summarise(r)["psnr_mean"] is not None for r in runs)
    validated = any(np.isfinite(r.history["val_psnr_mean"]).any() for r in runs)
    if without and measured:
        left_out.append(f"psnr_per_frame: without {', '.join(without)}, which has no psnr_per_frame.csv")
    for draw_figure in (loss_curves, beta_schedules, teacher_forcing, val_psnr, psnr_per_frame, psnr_summary):
        name = draw_figure.__name__
        if name == "val_psnr" and not validated:
            left_out.append("val_psnr: left out, no run has a validation PSNR in its history.csv")
        elif name.startswith("psnr") and not measured:
            left_out.append(f"{name}: left out, no run has a PSNR per frame (psnr_per_frame.csv)")
        else:
            usable = [r for r in runs if r.psnr is None or summarise(r)["psnr_mean"] is not None] if name == "psnr_per_frame" else runs
            figures[name] = draw_figure(usable)
    return figures, left_out


# ---------------------------------------------------------------- writing

def write(path, content):
    """Write bytes or text whole or not at all."""
    with atomic(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def render(figure, kind):
    """The bytes of a figure as 'png' or 'pdf'; the PDF carries no date, so equal runs give equal files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=180, metadata={"CreationDate": None} if kind == "pdf" else None)
    return buffer.getvalue()


def summary_csv(runs):
    buffer = io.StringIO()
    rows = [{k: round(v, 4) if isinstance(v, float) else v for k, v in summarise(r).items()} for r in runs]
    writer = csv.DictWriter(buffer, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def write_figures(runs, out):
    """Draw and write all figures. Return {name: PNG bytes} and the lines about what was left out."""
    figures, left_out = make_figures(runs)
    pictures = {}
    for name, figure in figures.items():
        pictures[name] = render(figure, "png")
        write(out / f"{name}.png", pictures[name])
        write(out / f"{name}.pdf", render(figure, "pdf"))
        plt.close(figure)
    write(out / "psnr_summary.csv", summary_csv(runs))
    return pictures, left_out


def build_parser():
    parser = Parser(prog="plot_runs.py", description="Draw the figures of one or more training runs.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a folder that Trainer.py wrote (its --save_root)")
    parser.add_argument("-o", "--out", metavar="OUT", required=True, help="folder for the figures")
    return parser


def main():
    args = build_parser().parse_args()
    runs = load_runs(args.runs)
    pictures, left_out = write_figures(runs, make_folder(args.out, "-o"))
    for line in left_out:
        print(line)
    print(f"{len(pictures)} figures in {args.out}: {', '.join(pictures)}")


if __name__ == "__main__":
    run(main)
