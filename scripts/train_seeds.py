"""Train N seeds, then test with the mean of their predictions; called by train_seeds.sh.

    python scripts/train_seeds.py DATA OUT N [--jobs N] [any Trainer flags]

Seed n is trained into OUT/seed{n}/. OUT/test/ gets the submission and OUT/all/ the validation of
all best.ckpt together; a table shows PSNR of each seed alone and of all together. Called again, the
script skips the seeds that are done and resumes the others; a larger N adds seeds. OUT/sweep.json
and the exit status are those of scripts/sweep.py.
"""

import csv
import sys
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
from sweep import FORBIDDEN, Record, Stop, tell_failed, train_all, words_of  # noqa: E402
from utils.cli import UserError, number, run, say  # noqa: E402
from utils.files import locked  # noqa: E402

OWN = FORBIDDEN | {"seed", "ckpt_path"}  # flags that this script sets
# flags that a test needs as well; the rest comes from the checkpoints
OF_A_TEST = "device", "precision", "num_workers", "no_cache", "cache_dir", "z", "rollouts"


def parse(argv):
    """Return the parsed flags and {flag: words} for Trainer.py; UserError for a flag of OWN."""
    from Trainer import build_parser  # here: it loads torch, which takes seconds

    parser = build_parser()
    parser.prog, parser.epilog = "train_seeds.sh", None
    parser.usage = "%(prog)s DATA OUT N [--jobs N] [any Trainer flags]"
    parser.description = (
        "Train N seeds, test with the mean of their predictions, print PSNR alone and together."
    )
    parser.add_argument(
        "data", metavar="DATA", help="data folder, with train/, val/ and test/ in it"
    )
    parser.add_argument("out", metavar="OUT", help="folder for the runs and the test")
    parser.add_argument(
        "seeds", metavar="N", type=number(int, 1, 1000), help="how many seeds: 0 to N - 1"
    )
    parser.add_argument(
        "--jobs", type=number(int, 1, 64), default=1, metavar="N", help="runs at a time"
    )
    args = parser.parse_args(argv)
    flags = {}
    for action in parser._actions:
        if action.dest in args.given and action.dest not in ("data", "out", "seeds", "jobs"):
            if action.dest in OWN:
                raise UserError(f"--{action.dest}: is set by train_seeds.sh itself; leave it out")
            flags[action.dest] = words_of(action, getattr(args, action.dest))
    if not Path(args.data).is_dir():
        raise UserError(f"DATA {args.data}: no such folder")
    return args, flags


def joined(flags):
    return [word for words in flags.values() for word in words]


def psnr(folder):
    """Return mean, lowest and last PSNR in dB of a folder's psnr_per_frame.csv."""
    with open(folder / "psnr_per_frame.csv", newline="", encoding="utf-8") as file:
        values = [float(row["psnr"]) for row in csv.DictReader(file)]
    return fmean(values), min(values), values[-1]


def table(alone, together):
    """Return the table's lines. alone: {name: (mean, min, last)}; together: the same of all."""
    rows = {
        **alone,
        "mean of the seeds": [fmean(column) for column in zip(*alone.values())],
        "together": together,
    }
    lines = ["validation PSNR, dB      mean     min    last"]
    return lines + [
        f"{name:<21}" + "".join(f"{value:8.2f}" for value in row) for name, row in rows.items()
    ]


def main():
    args, flags = parse(sys.argv[1:])
    data, out = Path(args.data), Path(args.out)
    names = [f"seed{n}" for n in range(args.seeds)]
    where = lambda name: ["--DR", str(data), "--save_root", str(out / name)]
    train = {
        name: ["Trainer.py", *where(name), "--resume", "--seed", str(n), *joined(flags)]
        for n, name in enumerate(names)
    }
    of_a_test = {name: words for name, words in flags.items() if name in OF_A_TEST}
    files = ["--ckpt_path", *(str(out / name / "best.ckpt") for name in names), *joined(of_a_test)]
    test = {
        "test": ["Tester.py", *where("test"), *files],
        "all": ["Trainer.py", *where("all"), "--test", *files],
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out, "OUT", "sweep"):
            record, stop = Record(out, "seeds", data, flags), Stop()
            for runs, jobs in ((train, args.jobs), (test, 1)):
                failed = train_all(runs, out, args, record, stop, jobs)
                if stop.signals:
                    say("stopped; the same command resumes")
                    return 128 + stop.signals[0]
                if failed:
                    return tell_failed(failed, out)
            print("\n".join(table({name: psnr(out / name) for name in names}, psnr(out / "all"))))
    except OSError as error:
        raise UserError(f"OUT {out}: {error.strerror or error}") from None


if __name__ == "__main__":
    run(main)
