"""Read the run folders that Trainer.py wrote, for plot_runs.py and make_report.py.

Not a program. `load_runs` returns one namespace a folder: path, name, label (the name in figures),
history, steps, psnr, ends (of its epochs, on the x axis of figures).
"""

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from utils.cli import UserError
from utils.files import HISTORY, STEPS

HIGHEST_PSNR = 100.0  # dB; the error of a frame is not counted below 1e-10
WITHOUT = "w/o annealing (beta = 1)"
# the column of history.csv that has a quantity's mean over an epoch; steps.csv calls it by the
# quantity
BY_EPOCH = {
    "loss": "train_loss",
    "reconstruction": "train_reconstruction",
    "mse": "train_mse",
    "kl": "train_kl",
}


def read_rows(path, columns):
    """Return the header of a CSV file that has `columns`, and its rows as (line number, cells)."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [
                (reader.line_num, row) for reader in [csv.reader(file)] for row in reader if row
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV: {error}") from None
    if not rows:
        raise UserError(f"{path}: is empty; expected the columns {','.join(columns)}")
    header = [name.strip() for name in rows[0][1]]
    missing = [name for name in columns if name not in header]
    if missing:
        raise UserError(
            f"{path}: lacks the column {', '.join(missing)}; expected {','.join(columns)}"
        )
    return header, rows[1:]


def read_number(name, cell):
    """Return a cell's number: NaN if empty, inf if not finite; PSNR is at most 100 dB."""
    if not cell.strip():
        return math.nan
    value = float(cell)
    if "psnr" in name and value > HIGHEST_PSNR:
        return HIGHEST_PSNR
    return value if math.isfinite(value) else math.inf


def read_table(path, columns, required=True):
    """Return {column: float array} of a CSV file whose header has at least `columns`.

    An empty cell was not measured: NaN. A cell with nan or inf was measured and is not finite: inf,
    so that figures show it. None for a file that is not `required` and is missing or has no rows.
    UserError for a damaged file.
    """
    if not required and not path.is_file():
        return None
    header, rows = read_rows(path, columns)
    if not rows:
        if not required:
            return None
        raise UserError(f"{path}: has a header and no rows; the first epoch has not ended")
    values = []
    for line, row in rows:
        if len(row) != len(header):
            raise UserError(f"{path}, line {line}: {len(row)} values, expected {len(header)}")
        try:
            values.append([read_number(name, cell) for name, cell in zip(header, row)])
        except ValueError as error:
            raise UserError(f"{path}, line {line}: {error}") from None
    table = dict(zip(header, np.array(values).T))
    order = table[columns[0]]
    if not np.isfinite(order).all() or (np.diff(order) <= 0).any():
        raise UserError(f"{path}: column {columns[0]} does not count upwards")
    return table


def name_runs(paths):
    """Return a distinct name for each folder: its own, or with its parent's, or its path."""
    for name in (
        lambda p: p.resolve().name,
        lambda p: str(Path(p.resolve().parent.name) / p.resolve().name),
        str,
    ):
        names = [name(path) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def without_annealing(run):
    """Return whether beta was 1 throughout."""
    return np.allclose(run.history["beta"], 1)


class Run(SimpleNamespace):
    """Hold what was read from a run folder; a Run is equal to itself alone."""

    __eq__, __hash__ = object.__eq__, object.__hash__


def read_run(path, name):
    """Return one run folder as a Run."""
    run = Run(
        path=path,
        name=name,
        history=read_table(path / "history.csv", HISTORY),
        steps=read_table(path / "steps.csv", STEPS, required=False),
        psnr=read_table(path / "psnr_per_frame.csv", ("frame", "psnr"), required=False),
    )
    run.ends = epoch_ends(run.history, run.steps)
    own = Path(name).name.lower() in ("none", "without") and without_annealing(run)
    parent = name[: -len(Path(name).name)]
    run.label = (f"{parent[:-1]}: {WITHOUT}" if parent else WITHOUT) if own else name
    return run


def frames_of(history):
    """Return the number of frames that a run trained on, from history.csv's speed and seconds."""
    return float(np.sum(history["seconds"] * history["frames_per_second"]))


def epoch_ends(history, steps):
    """Return the decimal epochs at which the epochs ended: e + 1, except the last of --max_minutes.

    A run that is fitted to its time ends inside its last epoch, or repeats it until the time is
    over. Then steps.csv ends with it; a run that was stopped in a further epoch has rows beyond.
    Which one it is shows in the frames a step, a whole number.
    """
    ends = history["epoch"] + 1
    if steps is None or len(steps["epoch"]) < 2:
        return ends
    epoch, step = steps["epoch"], steps["step"]
    frames = frames_of(history)
    if not (0 < frames < np.inf and np.isfinite(epoch).all() and epoch[-1] > epoch[-2]):
        return ends
    pace = (step[-1] - step[-2]) / (epoch[-1] - epoch[-2])  # steps an epoch
    after = step[-1] + max(0, ends[-1] - epoch[-1]) * pace
    whole = round(np.interp(ends[-1], [*epoch, ends[-1]], [*step, after]))
    uneven = [abs(frames / n - round(frames / n)) * n / frames for n in (step[-1], whole)]
    # steps.csv may lack the last two-thousandth of a run
    if uneven[0] < min(0.002, uneven[1] - 1e-9):
        ends[-1] = epoch[-1]
    return ends


def load_runs(paths):
    """Return a Run for each folder; UserError for one that is no run folder or is given twice."""
    paths = [Path(path) for path in paths]
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such run folder")
        if not (path / "history.csv").is_file():
            if (path / "psnr_per_frame.csv").is_file() and not (path / "last.ckpt").exists():
                raise UserError(
                    f"{path}: holds a validation (--test), whose figures are beside it; expected "
                    f"the folder of a training run"
                )
            raise UserError(
                f"{path}: has no history.csv; expected a folder that Trainer.py wrote (its "
                f"--save_root)"
            )
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("RUN: the same folder is given twice")
    return [read_run(path, name) for path, name in zip(paths, name_runs(paths))]


def objective(run):
    """Return the objective of the reconstruction, "MSE" or "log-MSE", from the numbers alone."""
    h = run.history
    return (
        "MSE"
        if np.allclose(h["train_reconstruction"], h["train_mse"], rtol=1e-3, equal_nan=True)
        else "log-MSE"
    )


def by_objective(runs):
    """Return groups of runs whose losses can share an axis: [(figures' suffix, name, runs)]."""
    groups = {}
    for run in runs:
        groups.setdefault(objective(run), []).append(run)
    return [
        ("_" + name.lower().replace("-", "_") if len(groups) > 1 else "", name, members)
        for name, members in groups.items()
    ]


def kl_weight(run, epochs):
    """Return the constant factor beside beta at decimal epochs."""
    h = run.history
    return h["kl_weight"][
        np.clip(np.searchsorted(h["epoch"], np.floor(epochs)), 0, len(h["epoch"]) - 1)
    ]


def by_epoch(run, quantity):
    """Return (x, y) of a quantity's means over the epochs, each in the middle of its epoch."""
    h = run.history
    middles = (h["epoch"] + run.ends) / 2
    if quantity == "weight":
        return middles, h["beta"] * h["kl_weight"]
    return middles, h[BY_EPOCH.get(quantity, quantity)]


def by_step(run, quantity):
    """Return (x, y) of a quantity from steps.csv, x in epochs; without the file, `by_epoch`."""
    if run.steps is None:
        return by_epoch(run, quantity)
    s = run.steps
    if quantity == "weight":
        return s["epoch"], s["beta"] * kl_weight(run, s["epoch"])
    return s["epoch"], s[quantity]


def summarise(run):
    """Return the numbers of one run as a dict; None where they were not measured."""
    history, mean = run.history, run.history["val_psnr_mean"]
    row = {"run": run.label, "epochs": len(mean), "best_epoch": None}
    if np.isfinite(mean).any():
        best = np.argmax(np.where(np.isfinite(mean), mean, -np.inf))
        # a run that went on in another folder has better epochs in its history than the one whose
        # files are there
        same = (
            []
            if run.psnr is None
            else np.flatnonzero(np.isclose(mean, run.psnr["psnr"].mean(), rtol=0, atol=1e-6))
        )
        if len(same) and best not in same:
            best = same[-1]
        row["best_epoch"] = int(history["epoch"][best])
    places = "mean median first last min min_frame max max_frame".split()
    keys = [f"psnr_{place}" for place in places]
    row.update(dict.fromkeys(keys))
    if run.psnr is not None and np.isfinite(run.psnr["psnr"]).any():
        keep = np.isfinite(run.psnr["psnr"])
        frame, psnr = run.psnr["frame"][keep], run.psnr["psnr"][keep]
        low, high = psnr.argmin(), psnr.argmax()
        row.update(
            zip(
                keys,
                [
                    psnr.mean(),
                    np.median(psnr),
                    psnr[0],
                    psnr[-1],
                    psnr[low],
                    int(frame[low]),
                    psnr[high],
                    int(frame[high]),
                ],
            )
        )
    return row
