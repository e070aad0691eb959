#!/usr/bin/env python3
"""Write a report of one or more training runs: report.md, and report.html that needs nothing but a browser.

    python scripts/make_report.py runs/Cyclical runs/Monotonic runs/None -o report

Each RUN is a folder that Trainer.py wrote (its --save_root). Into OUT go the figures of plot_runs.py, the best and worst
frames of every run, and the two reports, with a section for each line of the assignment's rubric. Numbers come from
history.csv and psnr_per_frame.csv, frames from val_pred.gif, settings from last.ckpt (else best.ckpt). What has no data is
left out, and the report says so. The analysis is the writer's: text written into the places for it in report.md is kept when
it is made again; a report.md that was changed elsewhere, and a report.html that somebody wrote in and saved, are renamed, not replaced.
"""

import ast
import base64
import html
import io
import json
import math
import re
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import plot_runs
from utils.cli import Parser, UserError, run
from plot_runs import load_runs, plt, summarise, write
from utils.files import make_folder
from report_page import PAGE

ROOT = Path(__file__).resolve().parent.parent
TICK = 40                  # milliseconds a frame of val_pred.gif
PAGE_BYTES = 9_500_000     # what report.html may weigh; above it, frames are stored with loss, and the page says so
SILENT = {"save_root", "resume", "given", "test"}  # flags that say nothing about the training

CAPTIONS = {
    "loss_curves": "Training loss by epoch: total, MSE and KL, and beta under them on the same epochs. The total holds beta times KL, "
                   "so totals of runs with different beta measure different things; MSE and KL can be compared.",
    "beta_schedules": "beta, the weight on KL, by epoch. Runs with the same schedule share a panel.",
    "teacher_forcing": "Teacher forcing ratio by epoch (line), the share of training steps that used ground truth (crosses), and the "
                       "training loss under them.",
    "val_psnr": "Validation PSNR by epoch: mean over the frames of the rollout, and its last frame.",
    "psnr_per_frame": "PSNR of every frame of the validation rollout, best epoch of each run.",
    "psnr_summary": "PSNR of the validation rollout, best epoch of each run. The same numbers are in psnr_summary.csv.",
}


# ---------------------------------------------------------------- reading

def read_settings(path):
    """The flags a run was trained with, from its checkpoint: a dict, or None where there is no checkpoint that has them."""
    for name in ("last.ckpt", "best.ckpt"):
        if (path / name).is_file():
            try:
                import torch  # only here: the rest of the report needs no torch, and starts faster without
                args = torch.load(path / name, map_location="cpu", weights_only=True, mmap=True).get("args")
            except ImportError:
                return None
            except Exception as error:  # a damaged archive fails in many ways
                raise UserError(f"{path / name}: is not a whole checkpoint ({type(error).__name__})") from None
            if isinstance(args, dict):
                plain = (str, int, float, bool, type(None))
                values = {k: v for k, v in args.items() if k not in SILENT and isinstance(v, plain)}
                for key in ("DR", "ckpt_path", "cache_dir"):  # a report is handed on: folder names only
                    if values.get(key):
                        values[key] = Path(values[key]).name
                return values
    return None


def read_rollout(path):
    """The frames of val_pred.gif, one for each tick: uint8 (ticks, H, 3 * W, 3). None where there is no GIF.

    Pillow writes equal neighbours as one frame that lasts longer; its duration says how many there were.
    """
    if not path.is_file():
        return None
    frames = []
    try:
        with Image.open(path) as gif:
            for frame in ImageSequence.Iterator(gif):
                picture = np.asarray(frame.convert("RGB"))
                frames += [picture] * max(1, round(frame.info.get("duration", TICK) / TICK))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a GIF: {error}") from None
    frames = np.stack(frames)
    if frames.shape[2] % 3:
        raise UserError(f"{path}: is {frames.shape[2]} pixels wide; expected three pictures side by side")
    return frames


def load_report_runs(paths):
    """plot_runs.load_runs, and with each run its settings, its frames (ticks, H, 3 * W, 3) and the number of its first frame."""
    runs = load_runs(paths)
    for r in runs:
        r.settings = read_settings(r.path)
        r.frames = read_rollout(r.path / "val_pred.gif")
        r.first, r.problem = 1, None
        if r.frames is None:
            r.problem = f"{r.name} has no val_pred.gif: its frames are left out."
        elif r.psnr is not None:
            # 629 frames 1..629, or 630 with the given frame 0; anything else is not the rollout of psnr_per_frame.csv
            r.first = int(r.psnr["frame"][-1]) - len(r.frames) + 1
            if r.first not in (0, 1):
                r.problem = (f"{r.name}: val_pred.gif lasts {len(r.frames)} frames and psnr_per_frame.csv ends with frame "
                             f"{r.psnr['frame'][-1]:g}, so they are not of the same rollout; its frames are left out.")
                r.frames = None
    return runs


def source(place):
    """A function of this repository without importing it: (file, qualified name, line, text), or None where it is not there."""
    file, name = place.split(":")
    try:
        text = (ROOT / file).read_text(encoding="utf-8")
        body = ast.parse(text).body
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None
    for part in name.split("."):
        node = next((n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == part), None)
        if node is None:
            return None
        body = node.body
    lines = text.splitlines()[node.lineno - 1:node.end_lineno]
    indent = len(lines[0]) - len(lines[0].lstrip())
    return file, name, node.lineno, "\n".join(line[indent:] for line in lines)


# ---------------------------------------------------------------- the numbers

def fmt(value, digits=4):
    """A number as people write it; an en dash where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "\u2013"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, float) and math.isinf(value):
        return "not finite"
    return f"{value:.{digits}g}"


def settings_tables(runs):
    """(rows of what differs between the runs, rows of what is equal), each with a header row. Runs without settings are left out."""
    known = [r for r in runs if r.settings is not None]
    flags = sorted({flag for r in known for flag in r.settings})
    differs = [["Flag", *(r.name for r in known)]]
    equal = [["Flag", "Value"]]
    for flag in flags:
        values = [r.settings.get(flag, "not recorded") for r in known]
        if len(known) > 1 and any(v != values[0] or type(v) is not type(values[0]) for v in values):
            differs.append([f"`--{flag}`", *map(fmt_setting, values)])
        else:
            equal.append([f"`--{flag}`", fmt_setting(values[0])])
    return differs, equal


def fmt_setting(value):
    return {True: "yes", False: "no", None: "not set"}[value] if isinstance(value, (bool, type(None))) else str(value)


def choice(runs, *flags):
    """Rows of some settings by run, with a header row; None where no run knows them."""
    known = [r for r in runs if r.settings is not None]
    flags = [f for f in flags if any(f in r.settings for r in known)]
    rows = [[r.name, *(fmt_setting(r.settings.get(f)) for f in flags)] for r in known]
    return [["Run", *(f"`--{f}`" for f in flags)], *rows] if flags else None


def any_setting(runs, test):
    return any(r.settings is not None and test(r.settings) for r in runs)


def loss_table(runs):
    rows = [["Run", "Epochs", "Total loss, last epoch", "MSE, last epoch", "KL, last epoch", "beta, last epoch", "Lowest MSE (epoch)",
             "Steps skipped", "Training time"]]
    for r in runs:
        h = r.history
        low = "\u2013"
        if np.isfinite(h["train_mse"]).any():
            at = np.where(np.isfinite(h["train_mse"]), h["train_mse"], np.inf).argmin()
            low = f"{fmt(h['train_mse'][at])} ({h['epoch'][at]:g})"
        minutes = np.nansum(h["seconds"]) / 60
        epochs = str(len(h["epoch"])) + (f" of {r.settings['num_epoch']}" if r.settings and "num_epoch" in r.settings else "")
        rows.append([r.name, epochs, *(fmt(h[c][-1]) for c in ("train_loss", "train_mse", "train_kl", "beta")),
                     low, f"{np.nansum(h['skipped_steps']):g}", f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"])
    return rows


def forcing_table(runs):
    rows = [["Run", "Ratio, first epoch", "Ratio, last epoch", "First epoch below the start", "First epoch at 0",
             "MSE before the drop", "MSE, first epoch at 0", "MSE, last epoch"]]
    for r in runs:
        h = r.history
        below, zero = h["tfr"] < h["tfr"][0] - 1e-9, (h["tfr"] < 1e-9) & (h["tfr"][0] > 1e-9)
        drop, gone = (int(mask.argmax()) if mask.any() else None for mask in (below, zero))
        rows.append([r.name, fmt(h["tfr"][0]), fmt(h["tfr"][-1]),
                     "never" if drop is None else f"{h['epoch'][drop]:g}", "never" if gone is None else f"{h['epoch'][gone]:g}",
                     fmt(None if drop is None else h["train_mse"][drop - 1]), fmt(None if gone is None else h["train_mse"][gone]),
                     fmt(h["train_mse"][-1])])
    return rows


def psnr_table(runs):
    rows = [["Run", "Best epoch", "Mean (dB)", "Median", "First frame", "Last frame", "Lowest (frame)", "Highest (frame)"]]
    return rows + [[row["run"], *plot_runs.psnr_cells(row)] for row in map(summarise, runs)]


def speed_table(runs):
    rows = [["Run", "Best validation PSNR (dB)", "at epoch", "Learning rate, first", "Learning rate, last", "Frames per second"]]
    for r in runs:
        h, best = r.history, summarise(r)["best_epoch"]
        rows.append([r.name, "\u2013" if best is None else f"{h['val_psnr_mean'][h['epoch'] == best][0]:.2f}", fmt(best),
                     fmt(h["lr"][0], 3), fmt(h["lr"][-1], 3), fmt(float(np.nanmedian(h["frames_per_second"])), 3)
                     if np.isfinite(h["frames_per_second"]).any() else "\u2013"])
    return rows


# ---------------------------------------------------------------- frames

def best_and_worst(run, count=3):
    """Indices into run.psnr of the best and of the worst frames, each kept apart from the others: neighbours look the same."""
    order = [i for i in np.argsort(run.psnr["psnr"]) if np.isfinite(run.psnr["psnr"][i])]
    apart = max(1, len(order) // 20)

    def pick(candidates):
        taken = []
        for i in candidates:
            if len(taken) < count and all(abs(i - j) >= apart for j in taken):
                taken.append(int(i))
        return taken

    return pick(order[::-1]), pick(order)


def frames_figure(run):
    """Best and worst frames of a run: pose, prediction and ground truth under each other."""
    best, worst = best_and_worst(run)
    height, width = run.frames.shape[1], run.frames.shape[2] // 3
    columns, left, top, gap = len(best) + len(worst), 0.85, 0.42, 0.04  # inches
    cell = (7 - left) / max(columns, 4)
    tall = cell * height / width
    size = left + columns * cell, top + 3 * (tall + gap)
    fig = plt.figure(figsize=size)
    for column, i in enumerate(best + worst):
        number = int(run.psnr["frame"][i])
        picture = run.frames[number - run.first]
        middle = (left + (column + 0.5) * cell) / size[0]
        kind = "best" if column < len(best) else "worst"
        fig.text(middle, 1 - 0.08 / size[1], f"{kind}: frame {number}\n{run.psnr['psnr'][i]:.2f} dB", fontsize=7.5, ha="center", va="top")
        for row in range(3):
            y = size[1] - top - (row + 1) * tall - row * gap
            ax = fig.add_axes(((left + column * cell) / size[0], y / size[1], (cell - gap) / size[0], tall / size[1]))
            ax.imshow(picture[:, row * width:(row + 1) * width], interpolation="nearest", aspect="auto")
            ax.set_axis_off()
            ax.add_artist(plt.Rectangle((0, 0), 1, 1, transform=ax.transAxes, fill=False, edgecolor="#b0b0b0", linewidth=0.6))
    for row, name in enumerate(("Pose", "Prediction", "Ground truth")):
        fig.text(0.02 / size[0], (size[1] - top - (row + 0.5) * tall - row * gap) / size[1], name, fontsize=8, va="center")
    return fig


def sprite_sheets(runs, budget):
    """The frames of all runs for the page: (sheets as data URIs, {run name: layout}, a line about loss or None).

    One sheet for each run's poses, predictions and truths; equal ones (all runs see the same poses) are stored once.
    """
    panels, layouts = {}, {}
    for r in runs:
        ticks, height, triple = r.frames.shape[:3]
        width = triple // 3
        columns = max(1, min(math.ceil(math.sqrt(ticks)), 16000 // width))  # WebP ends at 16383 pixels
        layouts[r.name] = dict(width=width, height=height, columns=columns, ticks=ticks, first=r.first, sheets=[])
        for part in range(3):
            sheet = np.zeros((math.ceil(ticks / columns) * height, columns * width, 3), np.uint8)
            for t in range(ticks):
                y, x = t // columns * height, t % columns * width
                sheet[y:y + height, x:x + width] = r.frames[t][:, part * width:(part + 1) * width]
            key = (sheet.shape, sheet.tobytes())
            layouts[r.name]["sheets"].append(panels.setdefault(key, len(panels)))
    pictures = [Image.fromarray(np.frombuffer(data, np.uint8).reshape(shape)) for shape, data in panels]

    def encode(kind, **options):
        encoded = []
        for picture in pictures:
            buffer = io.BytesIO()
            picture.save(buffer, kind, **options)
            encoded.append(f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}")
        return encoded

    exact = encode("WEBP", lossless=True, quality=40, method=3)
    note, sheets = None, exact
    for quality in (95, 90, 80, 60):
        if sum(map(len, sheets)) <= budget:
            break
        # JPEG, as lossy WebP always halves the resolution of colour, which shows on pictures this small
        lossy = encode("JPEG", quality=quality, subsampling=0, optimize=True)
        sheets = [a if len(a) < 1.5 * len(b) else b for a, b in zip(exact, lossy)]
        note = (f"To keep this page small, the player's frames are stored with some loss (JPEG, quality {quality}); "
                f"val_pred.gif has them as they were.")
    return sheets, layouts, note


def player_data(runs, layouts, sheets, names):
    """What the page's script gets: frames, and for each run its colour and PSNR by frame (null where it is not finite)."""
    entries = []
    for r in runs:
        if r.name in layouts:
            psnr = None
            if r.psnr is not None:
                psnr = {str(int(f)): round(float(p), 3) for f, p in zip(r.psnr["frame"], r.psnr["psnr"]) if math.isfinite(p)}
            colour = plot_runs.STYLES[names.index(r.name) % len(plot_runs.STYLES)][0]
            entries.append(dict(layouts[r.name], name=r.name, psnr=psnr, colour=colour))
    return dict(tick=TICK, sheets=sheets, runs=entries)


# ---------------------------------------------------------------- the report as a list of blocks

def build_blocks(runs, figures, left_out, player_note):
    """The report as blocks (kind, content), which to_markdown and to_html write out.

    Kinds: h2, h3, p, table, wide table, figure (name, caption), code (places), analysis (key), player.
    """
    blocks = []
    add = lambda kind, content: blocks.append((kind, content))
    missing = dict(line.split(": ", 1) for line in left_out)

    def figure(name):
        if name in figures:
            add("figure", (name, CAPTIONS[name]))
        if name in missing:
            add("p", f"Figure {name}: {missing[name]}.")

    add("h2", "Runs and settings")
    add("p", f"{len(runs)} run{'s' * (len(runs) > 1)}: {', '.join(r.name for r in runs)}.")
    unknown = [r.name for r in runs if r.settings is None]
    if unknown:
        add("p", f"Settings of {', '.join(unknown)} are not known (no last.ckpt or best.ckpt that holds them), "
                 f"so the tables below leave {'them' if len(unknown) > 1 else 'it'} out.")
    if len(unknown) < len(runs):
        differs, equal = settings_tables(runs)
        if len(differs) > 1:
            add("p", "What differs between the runs:")
            add("table", differs)
        elif len(runs) - len(unknown) > 1:
            add("p", "No setting differs between the runs.")
        add("p", "What is equal in all runs:" if len(runs) - len(unknown) > 1 else "Settings:")
        add("wide table", equal)

    add("h2", "A. Introduction (5%)")
    add("analysis", "A")

    add("h2", "B. Implementation details (30%)")
    add("h3", "B.i How do you write your training/testing protocol (15%)")
    add("p", "Training. For every frame to predict, `RGB_Encoder` encodes the past frame, `Label_Encoder` the pose, "
             "and `Gaussian_Predictor` the frame itself together with its pose into mu and logvar, from which z is "
             "drawn. `Decoder_Fusion` joins past frame, pose and z, and `Generator` makes the frame. The past frame is "
             "ground truth for the first prediction of a window and where teacher forcing says so, else the frame just "
             "generated. The loss is the mean squared error (with `--objective log_mse`, the logarithm of each picture's, on the scale "
             "1e-3 log(1 + MSE / 1e-5)) plus the weighted KL divergence between N(mu, exp(logvar)) and N(0, I). Gradients are clipped by norm before each step of the optimizer.")
    if any_setting(runs, lambda s: s.get("pool")):
        add("p", "Runs with `--pool` above 0 keep that many running rollouts: the past frame of a training window is "
                 "one that the network generated earlier, in a rollout that has gone on since, and the window's last "
                 "prediction is put back in its place (`RolloutPool`).")
    add("p", "Testing. The first frame and all poses are given, nothing else: z comes from the prior N(0, I) at every "
             "step, every generated frame is clamped to [0, 1] and becomes the past frame of the next one, and "
             "BatchNorm uses its running statistics. The PSNR of a frame is -10 log10 of its mean squared error; a "
             "rollout's score is the mean over its frames.")
    if any_setting(runs, lambda s: s.get("z") == "zero"):
        add("p", "Runs with `--z zero` use z = 0, the mean of the prior, in place of a draw from it.")
    settings = choice(runs, "recipe", "batch_size", "train_vi_len", "val_vi_len", "optim", "lr", "num_epoch", "fast_train", "pool")
    if settings:
        add("table", settings)
    add("code", ["Trainer.py:VAE_Model.training_one_step", "Trainer.py:VAE_Model.forward", "Trainer.py:VAE_Model.rollout",
                 "Trainer.py:VAE_Model.val_one_step", "Tester.py:Test_model.eval"])
    add("analysis", "B.i")

    add("h3", "B.ii How do you implement reparameterization tricks (5%)")
    add("p", "z = mu + exp(logvar / 2) * eps with eps from N(0, I): the draw is moved into eps, so gradients pass "
             "through mu and logvar. The network gives the logarithm of the variance, which may be any real number, so "
             "the variance is positive without a constraint.")
    add("code", ["modules/modules.py:Gaussian_Predictor.reparameterize", "Trainer.py:kl_criterion"])
    add("analysis", "B.ii")

    add("h3", "B.iii How do you set your teacher forcing strategy (5%)")
    add("p", "The ratio is the chance that a step gets ground truth as its past frame. With epochs e from 0: tfr(e) = "
             "max(0, tfr - tfr_d_step * max(0, e - tfr_sde + 1)). It stays at `--tfr` until `--tfr_sde`, then drops by "
             "`--tfr_d_step` an epoch, never below 0. `--tf_coin` says how often the coin is tossed: once an epoch, "
             "for each batch, or for each frame.")
    if any_setting(runs, lambda s: s.get("pool")):
        add("p", "With `--pool`, it is the chance that a running rollout restarts from ground truth.")
    settings = choice(runs, "tfr", "tfr_sde", "tfr_d_step", "tf_coin")
    if settings:
        add("table", settings)
    add("code", ["Trainer.py:VAE_Model.teacher_forcing_ratio_update", "Trainer.py:teacher_forcing_ratio"])
    add("analysis", "B.iii")

    add("h3", "B.iv How do you set your kl annealing ratio (5%)")
    add("p", "beta in [0, 1] weighs the KL term, one value an epoch (Fu et al. 2019). Cyclical: `--kl_anneal_cycle` "
             "cycles, in each of which beta climbs linearly from 0 towards 1 over the first `--kl_anneal_ratio` of the "
             "cycle and then stays at 1. Monotonic: one such cycle over all epochs. None: 1 throughout. `--kl_weight` "
             "is a constant factor beside beta.")
    settings = choice(runs, "objective", "kl_anneal_type", "kl_anneal_cycle", "kl_anneal_ratio", "kl_weight")
    if settings:
        add("table", settings)
    figure("beta_schedules")
    add("code", ["Trainer.py:kl_annealing"])
    add("analysis", "B.iv")

    add("h2", "C. Analysis & Discussion (25%)")
    add("h3", "C.i Plot Teacher forcing ratio (5%): analysis, and comparison with the loss curve")
    figure("teacher_forcing")
    add("table", forcing_table(runs))
    add("analysis", "C.i")

    add("h3", "C.ii Plot the loss curve while training with different settings; analyze the difference between them (15%)")
    kinds = {str(r.settings["kl_anneal_type"]) for r in runs if r.settings and "kl_anneal_type" in r.settings}
    if kinds and not kinds >= {"Cyclical", "Monotonic", "None"}:
        absent = [k for k in ("Monotonic", "Cyclical", "None") if k not in kinds]
        add("p", f"The assignment asks for KL annealing Monotonic, Cyclical and without. Not among these runs: {', '.join(absent)}.")
    figure("loss_curves")
    add("table", loss_table(runs))
    add("analysis", "C.ii")

    add("h3", "C.iii Plot the PSNR-per-frame diagram in the validation dataset (5%)")
    figure("psnr_per_frame")
    if "psnr_summary" in figures:
        add("table", psnr_table(runs))
    elif "psnr_summary" in missing:
        add("p", f"Table of PSNR: {missing['psnr_summary']}.")
    for r in runs:
        if r.problem:
            add("p", r.problem)
    if any(r.frames is not None for r in runs):
        add("player", player_note)
    for r in runs:
        if f"frames_{r.file}" in figures:
            add("figure", (f"frames_{r.file}", f"{r.name}: frames with the highest and the lowest PSNR of the validation rollout, "
                                               f"chosen apart from each other. Pose, prediction, ground truth."))
    add("analysis", "C.iii")

    add("h3", "C.iv Other training strategy analysis (Bonus 10%)")
    figure("val_psnr")
    add("table", speed_table(runs))
    settings = choice(runs, "recipe", "optim", "schedule", "ema", "pool", "fast_train", "precision", "refresh_norm")
    if settings:
        add("table", settings)
    add("analysis", "C.iv")
    return blocks


# ---------------------------------------------------------------- report.md

def analysis_marks(key):
    return (f"<!-- your analysis {key}: what stands between these two lines is kept when the report is made again -->",
            f"<!-- end of your analysis {key} -->")


PLACEHOLDER = "*(write here)*"
ANALYSIS = re.compile(r"<!-- your analysis (\S+):[^\n]*-->\n(.*?)\n<!-- end of your analysis \1 -->", re.S)


def kept_analysis(text):
    """{section: text} of what the writer put into an earlier report.md."""
    return {key: body.strip() for key, body in ANALYSIS.findall(text) if body.strip() not in ("", PLACEHOLDER)}


def signature(text):
    """A last line for report.md, by which a later call sees whether anything outside the places for analyses was changed."""
    ours = "\n".join(line.rstrip() for line in ANALYSIS.sub("", text).splitlines() if line.strip())
    return f"<!-- made by make_report.py, {zlib.crc32(ours.encode()):08x} -->"


def changed_elsewhere(text):
    """Whether somebody wrote into a report.md where the next one would not keep it."""
    body, _, last = text.rstrip().rpartition("\n")
    return last != signature(body)


def markdown_table(rows):
    escape = lambda cell: cell.replace("|", "\\|").replace("\n", " ")
    lines = ["| " + " | ".join(map(escape, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def to_markdown(blocks, title, analysis):
    out = [f"# {title}", "Made by `scripts/make_report.py`; figures lie beside this file, also as PDF. `report.html` is the same, "
                         "with a player for the frames."]
    for kind, content in blocks:
        if kind in ("h2", "h3"):
            out.append(f"{'#' * int(kind[1])} {content}")
        elif kind == "p":
            out.append(content)
        elif kind.endswith("table"):
            out.append(markdown_table(content))
        elif kind == "figure":
            out.append(f"![{content[1]}]({content[0]}.png)\n\n*{content[1]}*")
        elif kind == "code":
            for place in content:
                found = source(place)
                out.append(f"`{found[1]}` ({found[0]}, line {found[2]})\n\n```python\n{found[3]}\n```" if found
                           else f"`{place.split(':')[1]}` ({place.split(':')[0]}): not found in this copy of the project.")
        elif kind == "player":
            out.append("The frames themselves, with a slider: `report.html`.")
        elif kind == "analysis":
            first, last = analysis_marks(content)
            out.append(f"**Your analysis:**\n\n{first}\n\n{analysis.get(content, PLACEHOLDER)}\n\n{last}")
    text = "\n\n".join(out)
    return f"{text}\n\n{signature(text)}\n"


# ---------------------------------------------------------------- report.html

def inline(text):
    """Escaped text with `code` marked up."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def html_table(rows, wide=False):
    body = lambda row, tag: "<tr>" + "".join(f"<{tag}>{inline(cell)}</{tag}>" for cell in row) + "</tr>"
    if wide:  # a long list of pairs, set in columns
        pairs = "".join(f"<div><span>{inline(a)}</span><span>{inline(b)}</span></div>" for a, b in rows[1:])
        return f'<div class="pairs">{pairs}</div>'
    below = "".join(body(row, "td") for row in rows[1:])
    return f'<div class="scroll"><table><thead>{body(rows[0], "th")}</thead><tbody>{below}</tbody></table></div>'


def to_html(blocks, title, analysis, figures, data):
    out = []
    for kind, content in blocks:
        if kind in ("h2", "h3"):
            out.append(f"<{kind}>{html.escape(content)}</{kind}>")
        elif kind == "p":
            out.append(f"<p>{inline(content)}</p>")
        elif kind.endswith("table"):
            out.append(html_table(content, wide=kind.startswith("wide")))
        elif kind == "figure":
            name, caption = content
            picture = base64.b64encode(figures[name]).decode()
            width = round(Image.open(io.BytesIO(figures[name])).width * 0.72)  # letters of all figures about as large as the page's
            out.append(f'<figure><img src="data:image/png;base64,{picture}" width="{width}" alt="{html.escape(caption)}">'
                       f"<figcaption>{html.escape(caption)}</figcaption></figure>")
        elif kind == "code":
            for place in content:
                found = source(place)
                if found:
                    out.append(f"<details><summary><code>{found[1]}</code> in {found[0]}, line {found[2]}</summary>"
                               f"<pre>{html.escape(found[3])}</pre></details>")
                else:
                    file, name = place.split(":")
                    out.append(f"<p><code>{name}</code> in {file}: not found in this copy of the project.</p>")
        elif kind == "player":
            out.append('<section id="player"></section>' + (f'<p class="small">{html.escape(content)}</p>' if content else ""))
        elif kind == "analysis":
            out.append(f'<div class="analysis" contenteditable="true" role="textbox" aria-multiline="true" data-key="{content}" '
                       f'data-placeholder="Your analysis ({content}): click and write.">{html.escape(analysis.get(content, ""))}</div>')
    # "<" is escaped so that no name can end the script element
    parts = {"TITLE": html.escape(title), "BODY": "\n".join(out), "DATA": json.dumps(data).replace("<", "\\u003c")}
    return re.sub(r"\{\{(TITLE|BODY|DATA)\}\}", lambda match: parts[match[1]], PAGE)


def put_aside(path):
    """Rename a report that somebody wrote in, and say so."""
    number = 1
    while (aside := path.with_name(f"report_edited_{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    print(f"{path} held text of yours: kept as {aside}")


# ---------------------------------------------------------------- command line

def build_parser():
    parser = Parser(prog="make_report.py", description="Write a report of one or more training runs.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a folder that Trainer.py wrote (its --save_root)")
    parser.add_argument("-o", "--out", metavar="OUT", required=True, help="folder for report.html, report.md and the figures")
    parser.add_argument("--title", default="Lab 4: Conditional VAE for Video Prediction", help="the report's title")
    return parser


def main():
    args = build_parser().parse_args()
    runs = load_report_runs(args.runs)
    out = make_folder(args.out, "-o")
    page_path, markdown = out / "report.html", out / "report.md"
    try:
        before = markdown.read_text(encoding="utf-8") if markdown.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{markdown}: cannot be read: {error}; nothing is replaced that may hold your text") from None

    figures, left_out = plot_runs.write_figures(runs, out)
    for r in runs:
        r.file = re.sub(r"[^\w.-]+", "_", r.name)
        if r.frames is not None and r.psnr is not None and np.isfinite(r.psnr["psnr"]).any():
            figure = frames_figure(r)
            figures[f"frames_{r.file}"] = plot_runs.render(figure, "png")
            write(out / f"frames_{r.file}.png", figures[f"frames_{r.file}"])
            plt.close(figure)

    budget = PAGE_BYTES - sum(len(picture) * 4 // 3 for picture in figures.values()) - 200_000
    shown = [r for r in runs if r.frames is not None]
    sheets, layouts, note = sprite_sheets(shown, budget) if shown else ([], {}, None)
    blocks = build_blocks(runs, figures, left_out, note)
    analysis = kept_analysis(before)
    page = to_html(blocks, args.title, analysis, figures, player_data(runs, layouts, sheets, [r.name for r in runs]))
    if before and changed_elsewhere(before):
        put_aside(markdown)
    write(markdown, to_markdown(blocks, args.title, analysis))
    if page_path.is_file() and b"data-edited=" in page_path.read_bytes()[:2000]:
        put_aside(page_path)
    write(page_path, page)
    for line in [*left_out, *(r.problem for r in runs if r.problem)]:
        print(line)
    print(f"{page_path} ({len(page) / 1e6:.1f} MB) and {markdown}")


if __name__ == "__main__":
    run(main)
