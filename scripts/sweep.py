"""Train runs that differ in one thing, then draw figures and write the report.

    python scripts/sweep.py kl DATA OUT [--jobs N] [any Trainer flags]
    python scripts/sweep.py tfr DATA OUT [--jobs N] [any Trainer flags]

sweep_kl.sh and sweep_tfr.sh call it. Before training, the schedules of the strategies are computed:
a sweep whose runs would not differ, or never reach 0 or 1, is refused. Each run is written to
OUT/{name}/, its output to OUT/{name}/train.log, figures and report.html to OUT/. Called again, the
sweep skips the runs that are done and resumes the others. OUT/sweep.json holds the flags of the
sweep and the runs that are done. Exit status: 0 done, 1 a run failed, 2 wrong input (also where
every failed run reports it), 129, 130 and 143 stopped by SIGHUP, Ctrl-C and SIGTERM.
"""

import argparse
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils.cli import UserError, number, run, say  # noqa: E402
from utils.files import atomic, locked  # noqa: E402
from utils.options import OF_THE_MACHINE  # noqa: E402
from utils.schedules import beta_at, continuous, teacher_forcing_ratio  # noqa: E402

# a sweep may resume with other values of these
NOT_COMPARED = OF_THE_MACHINE - {"ckpt_path", "max_minutes"} | {"checkpoint_steps"}
FORBIDDEN = {"DR", "save_root", "resume", "test"}  # the sweep's own business
# what differs between the runs of a sweep, or must not
TURNED = {
    "kl": {"kl_anneal_type"},
    "tfr": {"tfr", "tfr_sde", "tfr_d_step", "tfr_min", "kl_anneal_type"},
}
CYCLES = {"kl_anneal_cycle": 4, "kl_anneal_ratio": 0.5}  # Fu et al. 2019, section 4
VISIBLE_KL = 1e-4  # a weight on KL beside which the reconstruction can be seen in the loss
REACHED = 0.1  # a curve has reached 0 or 1 where it is nearer than this
FEWEST = 0.05  # share of the run in which a curve must be near 1
SAME = 0.02  # curves with a smaller mean difference coincide
POLL = 0.2  # seconds between two looks at the children


# ---------------------------------------------------------------- what is trained


def kl_runs(args):
    """Return the three strategies of the assignment: {name: flags}."""
    return {kind: {"kl_anneal_type": kind} for kind in ("Cyclical", "Monotonic", "None")}


def tfr_runs(args):
    """Return four teacher forcing strategies: {name: flags}; beta is 1 throughout in all.

    Both decays take a seventh of the run, at least two epochs. One starts after a seventh, as the
    template's does, the other after four sevenths, or earlier where it would not reach 0.
    """
    n = args.num_epoch
    length, step = decay_length(n), drop(decay_length(n))
    early = max(1, round(n / 7))
    latest = n - length + continuous(args)  # so that it reaches 0 in the last epoch
    late = min(max(early + 1, round(n * 4 / 7)), max(early, latest))
    flags = lambda tfr, sde, d_step: {
        "tfr": tfr,
        "tfr_sde": sde,
        "tfr_d_step": d_step,
        "tfr_min": 0,
        "kl_anneal_type": "None",
    }
    return {
        "always": flags(1, early, 0),
        "decay_late": flags(1, late, step),
        "decay_early": flags(1, early, step),
        "never": flags(0, early, 0),
    }


def own_defaults(kind, args):
    """Return a sweep's own {flag: default}, which keep the other factors constant."""
    own = {"seed": args.seed}
    if kind == "tfr":
        own["kl_weight"] = min(VISIBLE_KL, args.kl_weight)
    else:
        own.update(CYCLES)
        if not {"tfr", "tfr_sde", "tfr_d_step"} & set(
            args.given
        ):  # the template's decay, fitted to the run
            own.update(
                tfr_sde=max(1, round(args.num_epoch / 7)),
                tfr_d_step=drop(decay_length(args.num_epoch)),
            )
    return own


def decay_length(num_epoch):
    """Return a decay's epochs: num_epoch / 7 as in the template; at least 2 if num_epoch >= 4."""
    return max(2 if num_epoch >= 4 else 1, round(num_epoch / 7))


def drop(length):
    """Return 1 / length rounded up, so that the last step reaches 0."""
    return math.ceil(1e6 / length) / 1e6


RUNS = {"kl": kl_runs, "tfr": tfr_runs}
QUANTITY = {"kl": ("beta", beta_at), "tfr": ("teacher forcing ratio", teacher_forcing_ratio)}
FLAT = {"None", "always", "never"}  # strategies that need not move


def curves(kind, args):
    """Return the schedule of each strategy over the run: {name: values}."""
    places = 1000 if continuous(args) else args.num_epoch
    at = [args.num_epoch * (i + 0.5) / places if continuous(args) else i for i in range(places)]
    schedule = QUANTITY[kind][1]
    return {
        name: [schedule(argparse.Namespace(**{**vars(args), **flags}), e) for e in at]
        for name, flags in RUNS[kind](args).items()
    }


def problem(kind, args):
    """Return why strategies are too alike or do not reach 0 or 1; None where all is well."""
    laid_out, what = curves(kind, args), QUANTITY[kind][0]
    for name, values in laid_out.items():
        high = sum(value >= 1 - REACHED for value in values)
        if name not in FLAT and not high:
            return f"{name} never reaches a {what} of 1 ({max(values):.2f} at most)"
        if kind == "kl" and name not in FLAT and high < FEWEST * len(values):
            return f"{name} reaches a {what} of 1 in {high} of {len(values)} epochs only"
        if name not in FLAT and min(values) > REACHED:
            return f"{name} never reaches a {what} of 0 ({min(values):.2f} at least)"
    names = list(laid_out)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            difference = sum(abs(x - y) for x, y in zip(laid_out[a], laid_out[b])) / len(
                laid_out[a]
            )
            if difference < SAME:
                return f"{a} and {b} have the same {what} throughout"
    return None


def remedies(kind, args):
    """Return the changes of flags that would help, as text."""
    changed = lambda **flags: argparse.Namespace(**{**vars(args), **flags})
    found = []
    cycles = " ".join(f"--{flag} {value}" for flag, value in CYCLES.items())
    if kind == "kl" and problem(kind, changed(**CYCLES)) is None:
        found.append(cycles)
    longer = (
        n
        for n in range(args.num_epoch + 1, args.num_epoch + 500)
        if problem(kind, changed(num_epoch=n)) is None
    )
    enough = next(longer, None)
    if enough:
        found.append(f"--num_epoch {enough}")
    if not continuous(args) and problem(kind, changed(recipe="pool")) is None:
        found.append("--recipe pool")
    return " or ".join(found) or f"{cycles} and more epochs"


def check_curves(kind, args):
    """Raise UserError where a sweep would compare nothing or its epochs are not known before."""
    if args.max_minutes and not continuous(args):
        raise UserError(
            "--max_minutes: with --recipe template schedules go by whole epochs, and how many of "
            "them fit is not known before; expected --num_epoch, or --recipe pool"
        )
    reason = problem(kind, args)
    if reason:
        raise UserError(f"--num_epoch {args.num_epoch}: {reason}; expected {remedies(kind, args)}")


def sweep_parser(kind):
    """Return Trainer.py's parser, changed for the sweep's command line."""
    from Trainer import build_parser  # here: it loads torch, which takes seconds

    parser = build_parser()
    parser.prog = f"sweep_{kind}.sh"
    parser.usage = "%(prog)s DATA OUT [--jobs N] [any Trainer flags]"
    turned = ", ".join(f"--{flag}" for flag in sorted(TURNED[kind]))
    parser.description = (
        f"Train runs whose {turned} the sweep sets, then draw figures and write report.html."
    )
    parser.epilog = None
    parser.add_argument(
        "data", metavar="DATA", help="data folder, with train/, val/ and test/ in it"
    )
    parser.add_argument(
        "out", metavar="OUT", help="folder for the runs, the figures and the report"
    )
    parser.add_argument(
        "--jobs", type=number(int, 1, 64), default=1, metavar="N", help="runs at a time"
    )
    return parser


def words_of(action, value):
    """Return the words that give a flag its value on the command line."""
    if action.nargs == 0:
        return [f"--{action.dest}" if value else f"--no-{action.dest}"]
    return [f"--{action.dest}", *map(str, value if isinstance(value, list) else [value])]


def parse(argv):
    """Return (kind, args, {flag: words for Trainer.py}); UserError for any wrong flag."""
    kind = argv[0] if argv else ""
    if kind not in TURNED:
        raise UserError(f"sweep.py {kind}: expected kl or tfr")
    parser = sweep_parser(kind)
    args = parser.parse_args(argv[1:])
    flags = {}
    for action in parser._actions:
        if action.dest in args.given and action.dest not in ("data", "out", "jobs"):
            if action.dest in FORBIDDEN or action.dest in TURNED[kind]:
                raise UserError(
                    f"--{action.dest}: is set by the sweep itself; expected it left out"
                )
            flags[action.dest] = words_of(action, getattr(args, action.dest))
    for flag, value in own_defaults(kind, args).items():
        if flag not in flags:
            setattr(args, flag, value)
            flags[flag] = [f"--{flag}", str(value)]
    if not Path(args.data).is_dir():
        raise UserError(f"DATA {args.data}: no such folder")
    check_curves(kind, args)
    return kind, args, flags


# ---------------------------------------------------------------- what is remembered between calls


class Record:
    """Keep OUT/sweep.json: the flags that make the runs comparable, and which runs are done."""

    def __init__(self, out, kind, data, flags):
        self.path, self.out = out / "sweep.json", out
        wanted = {
            "sweep": kind,
            "data": str(data.resolve()),
            "flags": sorted(
                " ".join(words) for name, words in flags.items() if name not in NOT_COMPARED
            ),
        }
        self.content = {**wanted, "done": []}
        trained = any(out.glob("*/history.csv")) or any(out.glob("*/last.ckpt"))
        if trained and self.path.is_file():
            try:
                before = json.loads(self.path.read_text(encoding="utf-8"))
                self.content = {key: before[key] for key in (*wanted, "done")}
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self.path}: is not a sweep's record; remove it to resume the runs as "
                    f"they are"
                ) from None
            for key, value in wanted.items():
                if self.content[key] != value:
                    raise UserError(
                        f"OUT {out}: holds a sweep with {key} {self.content[key]}, not {value}; "
                        f"expected the same, or another OUT"
                    )
        self.save()

    def save(self):
        """Write the record, atomically."""
        with atomic(self.path) as aside:
            aside.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")

    def done(self, name):
        """Return whether a run is recorded as done and its history is there."""
        return name in self.content["done"] and (self.out / name / "history.csv").is_file()

    def add(self, name):
        """Record a run as done."""
        self.content["done"] = sorted({*self.content["done"], name})
        self.save()


# ---------------------------------------------------------------- training


def last_line(log):
    """Return the last line that a run printed."""
    lines = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    return lines[-1] if lines else "nothing printed"


def last_epoch(folder):
    """Return the newest row of a run's history.csv; None before the first epoch has ended."""
    try:
        with open(folder / "history.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return rows[-1] if rows else None
    except (OSError, ValueError, csv.Error):
        return None


def tell_epoch(name, row, of_total):
    """Print a row of a run's history. of_total: " of N" epochs, "" where time sets N."""
    short = lambda key: f"{float(row[key]):.4g}" if row.get(key) else "-"
    psnr = f"{min(100, float(row.get('val_psnr_mean') or 'nan')):.2f} dB"
    say(
        f"{name}: epoch {int(row['epoch']) + 1}{of_total}, loss {short('train_loss')}, "
        f"validation PSNR {psnr.replace('nan dB', '-')}"
    )


def start(name, words, out, jobs):
    """Start the script words[0] of the root in its own session: Ctrl-C reaches the sweep alone."""
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if jobs > 1:  # runs that each take every core get in each other's way
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    with open(folder / "train.log", "a", encoding="utf-8", errors="backslashreplace") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )


def end(child, at_once):
    """Ask a run to save and stop; with `at_once`, kill it and all that it started."""
    try:
        if os.name == "nt":  # Ctrl-C reaches every process of a console there, and none has a group
            if at_once:
                child.kill()
        elif at_once:
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.send_signal(signal.SIGTERM)
    except ProcessLookupError:
        pass


class Stop:
    """Record the signals to stop the sweep: at the first the runs save, the second kills them."""

    def __init__(self):
        self.signals = []
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP; nohup has it ignored
            if (
                hasattr(signal, name)
                and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN
            ):
                signal.signal(
                    getattr(signal, name), lambda received, _: self.signals.append(received)
                )


@contextmanager
def stopped_on_error(running):
    """Have the runs, {name: process}, save and stop where an error ends the sweep inside."""
    try:
        yield
    except BaseException:
        for child in running.values():
            end(child, at_once=os.name == "nt")
        for child in running.values():
            child.wait()
        raise


def train_all(runs, out, args, record, stop, jobs):
    """Train what is not done, `jobs` at a time; return {name: exit status} of failed runs."""
    of_total = "" if args.max_minutes else f" of {args.num_epoch}"
    waiting = [name for name in runs if not record.done(name)]
    for name in runs:
        if name not in waiting:
            say(f"{name}: done already, skipped")
    running, seen, failed, asked = {}, {}, {}, 0
    with stopped_on_error(running):
        while running or (waiting and not stop.signals):
            while waiting and len(running) < jobs and not stop.signals:
                name = waiting.pop(0)
                row = last_epoch(out / name)
                seen[name] = row and row.get("epoch")
                resumed = row is not None or (out / name / "last.ckpt").exists()
                again = f" for another {args.max_minutes:g} minutes" if args.max_minutes else ""
                running[name] = start(name, runs[name], out, jobs)
                say(
                    f"{name}: {'resumed' + again if resumed else 'started'}, its output goes to "
                    f"{out / name / 'train.log'}"
                )
            if len(stop.signals) > asked:
                if asked == 0 and running:
                    say(f"stopping: {', '.join(running)} will save first; press Ctrl-C again to "
                        f"kill them without saving")
                for child in running.values():
                    end(child, at_once=asked > 0)
                asked = len(stop.signals)
            time.sleep(POLL)
            for name, child in list(running.items()):
                status = child.poll()
                row = last_epoch(out / name)
                if row and row.get("epoch") != seen[name]:
                    seen[name] = row.get("epoch")
                    tell_epoch(name, row, of_total)
                if status is None:
                    continue
                del running[name]
                if status == 0:
                    record.add(name)
                    say(f"{name}: done")
                elif stop.signals:
                    say(f"{name}: stopped")
                else:
                    failed[name] = status
                    say(f"{name}: failed with status {status}; the others continue")
    return failed


def tell_failed(failed, out):
    """Print a line for each failed run, {name: exit status}; return the sweep's exit status."""
    for name, status in failed.items():
        log = out / name / "train.log"
        print(
            f"{name} failed with status {status}: {last_line(log)} (all of it: {log})",
            file=sys.stderr,
        )
    return 2 if set(failed.values()) == {2} else 1


def write_report(kind, folders, out):
    """Write figures and page of the runs in `folders`; return the exit status."""
    if not folders:
        return 0
    say(f"figures and report of {', '.join(folder.name for folder in folders)}")
    script = ROOT / "scripts" / "make_report.py"
    command = [sys.executable, str(script), f"--{kind}", *map(str, folders), "-o", str(out)]
    return subprocess.run(command).returncode


def sweep(kind, args, flags, out):
    """Train and report; return ({name: exit status} of what failed, exit status)."""
    record = Record(out, kind, Path(args.data), flags)
    common = [word for words in flags.values() for word in words]
    runs = {}
    for name, turned in RUNS[kind](args).items():
        words = [word for flag, value in turned.items() for word in (f"--{flag}", str(value))]
        runs[name] = [
            "Trainer.py",
            "--DR",
            args.data,
            "--save_root",
            str(out / name),
            "--resume",
            *words,
            *common,
        ]
    stop = Stop()
    failed = train_all(runs, out, args, record, stop, args.jobs)
    if stop.signals:
        say("stopped; the same command resumes it")
        return {}, 128 + stop.signals[0]
    with_history = [out / name for name in runs if last_epoch(out / name)]
    return failed, write_report(kind, with_history, out)


def main():
    kind, args, flags = parse(sys.argv[1:])
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out, "OUT", "sweep"):
            failed, status = sweep(kind, args, flags, out)
    except OSError as error:
        raise UserError(
            f"OUT {out}: {error.strerror or error}; expected a folder that can be written"
        ) from None
    return tell_failed(failed, out) if failed else status


if __name__ == "__main__":
    run(main)
