"""Run named settings of the recipe at equal budget, and compare their validation rollouts.

    python scripts/ablate.py DATA OUT --frames 2500               # every setting, equal frames
    python scripts/ablate.py DATA OUT pool template --minutes 8   # two settings, equal wall-clock
    python scripts/ablate.py DATA OUT pool no_ema mse+batch_2 --frames 2500 --seeds 0 1 2

Wall-clock is comparable on an idle machine only. Settings joined by + are combined. Each run lands
in OUT/{setting}_s{seed}_{budget}/; a run that is there and done is not run again, and one of other
flags is an error. After every run its curve (one row an epoch) is appended to --csv,
docs/ablation_schedules.csv by default, so the work can be taken up again.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark import machine  # noqa: E402
from utils.cli import Parser, UserError, number, progress, run, say  # noqa: E402
from utils.options import OF_THE_MACHINE  # noqa: E402
from dataloader import list_pairs  # noqa: E402
from utils.checkpoint import read_checkpoint  # noqa: E402
from utils.files import make_folder  # noqa: E402
from Trainer import build_parser as build_trainer_parser  # noqa: E402

# name: the flags in which a setting differs from the default recipe, without --fast_train
SETTINGS = {
    "pool": [],
    "template": ["--recipe", "template"],
    "no_ema": ["--ema", "0"],
    "no_refresh": ["--no-refresh_norm"],
    "ema_0.99": ["--ema", "0.99"],
    "ema_0.9995": ["--ema", "0.9995"],
    "batch_1": ["--batch_size", "1"],
    "batch_2": ["--batch_size", "2"],
    "batch_8": ["--batch_size", "8"],
    "pool_16": ["--pool", "16"],
    "pool_256": ["--pool", "256"],
    "flat": ["--tfr", "0", "--kl_anneal_type", "None"],  # ratio at its floor, beta 1
    "tfr_flat": ["--tfr", "0"],
    "tfr_min_0": ["--tfr_min", "0"],
    "tfr_min_0.1": ["--tfr_min", "0.1"],
    "always_forced": ["--tfr_min", "1"],
    "next_0": ["--next_share", "0"],
    "next_1": ["--next_share", "1"],
    "window_3": ["--train_vi_len", "3"],
    "window_5": ["--train_vi_len", "5"],
    "mse": ["--objective", "mse"],
    "adamw": ["--optim", "AdamW"],
    "lr_1e-3": ["--lr", "1e-3"],
    "lr_4e-3": ["--lr", "4e-3"],
    "kl_1e-5": ["--kl_weight", "1e-5"],
    "kl_1e-3": ["--kl_weight", "1e-3"],
    "kl_none": ["--kl_anneal_type", "None"],
    "kl_monotonic": ["--kl_anneal_type", "Monotonic"],
    "kl_4_cycles": ["--kl_anneal_cycle", "4", "--kl_anneal_ratio", "0.5"],
    "sigmoid": ["--output", "sigmoid"],
    "z_zero": ["--z", "zero"],
}
COLUMNS = (
    "setting", "seed", "budget", "machine", "epoch", "frames", "minutes", "psnr_mean", "psnr_min",
    "psnr_last"
)


def budget_flags(args, frames_in_data):
    """Return the Trainer's flags for the budget, and its name."""
    if args.minutes:
        return ["--max_minutes", str(args.minutes)], f"{args.minutes:g}min"
    epochs = max(args.points, -(-args.frames // frames_in_data))
    share = min(1.0, args.frames / epochs / frames_in_data)
    # the default's teacher forcing over 70 epochs: 1 for a seventh of the run, down in another
    seventh = round(epochs / 7)
    forcing = ["--tfr_sde", str(seventh + 1), "--tfr_d_step", str(1 / max(1, seventh))]
    budget = ["--num_epoch", str(epochs), "--partial", str(share), *forcing]
    return budget, f"{args.frames}frames"


def curve(folder, setting, seed, budget):
    """Return rows of COLUMNS from a run's history.csv."""
    frames = seconds = 0.0
    rows, here = [], machine(read_checkpoint(folder / "last.ckpt")["args"]["device"])
    name = here.get("gpu") or f"{here['cpu']}, {here['threads']} threads"
    with open(folder / "history.csv", newline="") as file:
        for row in csv.DictReader(file):
            seconds += float(row["seconds"])
            frames += float(row["seconds"]) * float(row["frames_per_second"])
            psnr = (round(float(row[f"val_psnr_{kind}"]), 2) for kind in ("mean", "min", "last"))
            minutes = round(seconds / 60, 1)
            values = setting, seed, budget, name, row["epoch"], round(frames), minutes, *psnr
            rows.append(dict(zip(COLUMNS, values)))
    return rows


def done(folder, flags):
    """Return whether a run is at its end. UserError where it has other flags than these."""
    last = folder / "last.ckpt"
    if not last.exists():
        return False
    checkpoint, wanted = read_checkpoint(last), build_trainer_parser().parse_args(flags)
    try:
        ran = {name: checkpoint["args"][name] for name in checkpoint["resume"]["given"]}
        over = checkpoint["last_epoch"] + 1 >= checkpoint["args"]["num_epoch"]
    except (KeyError, TypeError):
        raise UserError(
            f"{last}: is no checkpoint of a run of ours; expected OUT to be a folder of its own"
        ) from None
    for name in sorted({*ran, *wanted.given} - OF_THE_MACHINE - {"DR"}):
        if name not in ran or name not in wanted.given or ran[name] != getattr(wanted, name):
            raise UserError(
                f"OUT {folder.parent}: {folder.name} there ran with another --{name}; "
                f"expected another OUT, and a --csv of its own"
            )
    return over


def read_results(path):
    """Return the rows of the CSV of results; none where it is not there yet.

    UserError where it is another kind of file, or its folder can't be written.
    """
    make_folder(path.parent, "--csv")
    if not os.path.lexists(path):
        return []
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "is no table"
        raise UserError(f"--csv {path}: {reason}; expected a CSV of results") from None
    if reader.fieldnames and tuple(reader.fieldnames) != COLUMNS:
        raise UserError(f"--csv {path}: has other columns; expected {','.join(COLUMNS)}")
    return rows


def append(path, rows):
    """Add a run's rows to the CSV of results, unless they are there already.

    A new file gets its header first.
    """
    there = read_results(path)
    key = lambda row: tuple(str(row[column]) for column in ("setting", "seed", "budget", "machine"))
    if key(rows[0]) in map(key, there):
        return
    try:
        with open(path, "a", newline="") as file:  # two of these may run at once
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(
            f"--csv {path}: {error.strerror}; expected a file that can be written"
        ) from None


def build_parser():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", metavar="DATA", help="data folder")
    parser.add_argument("out", metavar="OUT", help="folder that the runs land in")
    parser.add_argument(
        "settings", nargs="*", metavar="SETTING",
        help=f"settings to run (none: all of {', '.join(SETTINGS)})"
    )
    parser.add_argument("--frames", type=number(int, 1), help="budget: frames to train on")
    parser.add_argument(
        "--minutes", type=number(float, 0, above=True),
        help="budget: minutes of wall-clock, validation included"
    )
    parser.add_argument(
        "--points", type=number(int, 1), default=7, help="with --frames: validations along the way"
    )
    parser.add_argument(
        "--seeds", type=number(int, 0), nargs="+", default=[0], help="a run for each seed"
    )
    parser.add_argument(
        "--csv", type=Path, default=ROOT / "docs" / "ablation_schedules.csv",
        help="where results are added"
    )
    return parser


def main(argv=None):
    args, flags = build_parser().parse_known_args(argv)
    unknown = [
        setting for setting in args.settings if not set(setting.split("+")) <= SETTINGS.keys()
    ]
    if unknown:
        raise UserError(
            f"SETTING {unknown[0]}: expected one of {', '.join(SETTINGS)}, or several joined by +"
        )
    if (args.frames is None) == (args.minutes is None):
        raise UserError("--frames or --minutes: expected exactly one of them")
    budget, name = budget_flags(args, len(list_pairs(args.data, "train")[0]))
    read_results(args.csv)
    runs = [(setting, seed) for setting in args.settings or SETTINGS for seed in args.seeds]
    results = []
    for setting, seed in progress(runs, desc="runs", unit="run"):
        folder = Path(args.out) / f"{setting}_s{seed}_{name}"
        command = [
            "--DR", args.data, "--save_root", str(folder), "--seed", str(seed), "--resume", *budget,
            *(flag for name in setting.split("+") for flag in SETTINGS[name]),
            *flags,
        ]
        if not done(folder, command):
            command = [sys.executable, str(ROOT / "Trainer.py"), *command]
            status = subprocess.run(command).returncode
            if status:
                words = " ".join(command[1:])
                say(f"{folder}: the run did not end well: status {status} from {words}")
                return status
        rows = curve(folder, setting, seed, name)
        append(args.csv, rows)
        results.append((setting, seed, rows))
    say(f"\n{'setting':14} seed   mean    min   last   curve of the mean ({name})")
    for setting, seed, rows in sorted(results, key=lambda result: -result[2][-1]["psnr_mean"]):
        end = rows[-1]
        psnr = " ".join(f"{end[f'psnr_{kind}']:6.2f}" for kind in ("mean", "min", "last"))
        means = " ".join(f"{row['psnr_mean']:.1f}" for row in rows)
        say(f"{setting:14} {seed:4} {psnr}   {means}")


if __name__ == "__main__":
    run(main)
