"""Train several runs that differ in one thing, then draw figures and write the report; called by sweep_kl.sh and sweep_tfr.sh.

    python scripts/sweep.py kl DATA OUT [--jobs N] [any Trainer flags]
    python scripts/sweep.py tfr DATA OUT [--jobs N] [any Trainer flags]

Each run lands in OUT/{name}/, with what it printed in OUT/{name}/train.log; figures and report.html land in OUT/. Called again,
it skips the runs that are done and goes on with the others where they stopped. OUT/sweep.json holds the flags of the sweep and
the runs that are done. Exit status: 0 done, 1 a run failed, 2 wrong input (also where every failed run says so), 130 and 143
stopped by Ctrl-C and SIGTERM.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils.cli import UserError, number, run, say
from utils.options import OF_THE_MACHINE
from utils.files import atomic, locked

# a sweep may go on with other values of these
NOT_COMPARED = OF_THE_MACHINE - {"ckpt_path", "max_minutes"} | {"checkpoint_steps"}
FORBIDDEN = {"DR", "save_root", "resume", "test"}  # the sweep's own business
TURNED = {"kl": ["kl_anneal_type"], "tfr": ["tfr", "tfr_sde", "tfr_d_step"]}  # what a sweep itself sets
POLL = 0.2  # seconds between two looks at the children


# ---------------------------------------------------------------- what is trained

def kl_runs(num_epoch):
    """The three strategies of the assignment: {name: flags}."""
    return {kind: ["--kl_anneal_type", kind] for kind in ("Cyclical", "Monotonic", "None")}


def tfr_runs(num_epoch):
    """Four teacher forcing strategies: {name: flags}.

    Both decays take a seventh of the run, the template's 10 of 70 epochs; one starts after a seventh as the template's does,
    the other after four sevenths. In short runs they take two epochs at least, so that there is a slope to see.
    """
    if num_epoch < 3:
        raise UserError(f"--num_epoch {num_epoch}: expected at least 3, or the decays of teacher forcing don't show")
    length = max(2, round(num_epoch / 7))
    step = -(-1_000_000 // length) / 1_000_000  # 1 / length rounded up, so that the last step reaches 0
    early = max(1, round(num_epoch / 7))
    late = max(early + 1, round(num_epoch * 4 / 7))
    flags = lambda tfr, start, drop: ["--tfr", str(tfr), "--tfr_sde", str(start), "--tfr_d_step", str(drop)]
    return {"always": flags(1, early, 0), "decay_late": flags(1, late, step),
            "decay_early": flags(1, early, step), "never": flags(0, early, 0)}


def parse(argv):
    """The command line as (kind, data, out, jobs, num_epoch, {flag: words} to hand to Trainer.py). Checks every flag now, once."""
    from Trainer import build_parser  # here: it loads torch, which takes seconds
    kind = argv[0] if argv else ""
    if kind not in TURNED:
        raise UserError(f"sweep.py {kind}: expected kl or tfr")
    parser = build_parser()
    parser.prog = f"sweep_{kind}.sh"
    parser.usage = "%(prog)s DATA OUT [--jobs N] [any Trainer flags]"
    turned = ", ".join(f"--{flag}" for flag in TURNED[kind])
    parser.description = f"Train runs that differ in {turned} alone, then draw figures and write report.html."
    parser.epilog = None
    parser.add_argument("data", metavar="DATA", help="data folder, with train/, val/ and test/ in it")
    parser.add_argument("out", metavar="OUT", help="folder for the runs, the figures and the report")
    parser.add_argument("--jobs", type=number(int, 1, 64), default=1, metavar="N", help="runs at a time")
    args = parser.parse_args(argv[1:])
    flags = {}
    for action in parser._actions:
        if action.dest in args.given and action.dest not in ("data", "out", "jobs"):
            if action.dest in FORBIDDEN or action.dest in TURNED[kind]:
                raise UserError(f"--{action.dest}: is set by the sweep itself; leave it out")
            value = getattr(args, action.dest)
            flags[action.dest] = [f"--{action.dest}"] + ([] if action.nargs == 0 else [str(value)])
    flags.setdefault("seed", ["--seed", str(args.seed)])
    if not Path(args.data).is_dir():
        raise UserError(f"DATA {args.data}: no such folder")
    return kind, Path(args.data), Path(args.out), args.jobs, args.num_epoch, flags


# ---------------------------------------------------------------- what is remembered between calls

class Record:
    """OUT/sweep.json: the flags that make the sweep's runs comparable, and which runs are done."""

    def __init__(self, out, kind, data, flags):
        self.path, self.out = out / "sweep.json", out
        wanted = {"sweep": kind, "data": str(data.resolve()),
                  "flags": sorted(" ".join(words) for name, words in flags.items() if name not in NOT_COMPARED)}
        self.content = {**wanted, "done": []}
        if self.path.is_file():
            try:
                before = json.loads(self.path.read_text(encoding="utf-8"))
                self.content = {key: before[key] for key in (*wanted, "done")}
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.path}: is not a sweep's record; remove it to go on with the runs as they are") from None
            for key, value in wanted.items():
                if self.content[key] != value:
                    raise UserError(f"OUT {out}: holds a sweep with {key} {self.content[key]}, not {value}; expected the same, "
                                    f"or another OUT, or {self.path.name} there removed")
        self.save()

    def save(self):
        with atomic(self.path) as aside:
            aside.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")

    def done(self, name):
        return name in self.content["done"] and (self.out / name / "history.csv").is_file()

    def add(self, name):
        self.content["done"] = sorted({*self.content["done"], name})
        self.save()


# ---------------------------------------------------------------- training

def last_line(log):
    """What a run said last."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "nothing printed"


def last_epoch(folder):
    """The newest row of a run's history.csv; None before the first epoch has ended."""
    try:
        with open(folder / "history.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return rows[-1] if rows else None
    except (OSError, ValueError):
        return None


def tell_epoch(name, row, num_epoch):
    short = lambda key: f"{float(row[key]):.4g}" if row.get(key) else "-"
    say(f"{name}: epoch {int(row['epoch']) + 1} of {num_epoch}, loss {short('train_loss')}, validation PSNR {short('val_psnr_mean')} dB")


def start(name, words, out, jobs):
    """Start one command, a script of the root and its words, in a session of its own: Ctrl-C reaches it through us, once."""
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if jobs > 1:  # runs that each take every core get in each other's way
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    with open(folder / "train.log", "a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env,
                                start_new_session=True)


class Stop:
    """Remembers the signals that ask the sweep to stop: the first lets the runs save, the second does not wait."""

    def __init__(self):
        self.signals = []
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP; nohup has it ignored
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
                signal.signal(getattr(signal, name), lambda received, _: self.signals.append(received))


def train_all(runs, out, jobs, num_epoch, record, stop):
    """Train what is not done, `jobs` at a time. Returns {name: exit status} of the runs that failed."""
    waiting = [name for name in runs if not record.done(name)]
    for name in runs:
        if name not in waiting:
            say(f"{name}: done already, skipped")
    running, seen, failed, asked = {}, {}, {}, 0
    while running or (waiting and not stop.signals):
        while waiting and len(running) < jobs and not stop.signals:
            name = waiting.pop(0)
            row = last_epoch(out / name)
            seen[name] = row and row["epoch"]
            running[name] = start(name, runs[name], out, jobs)
            say(f"{name}: {'started' if row is None else 'goes on'}, its output goes to {out / name / 'train.log'}")
        if len(stop.signals) > asked:
            if asked == 0 and running:
                say(f"stopping: {', '.join(running)} will save first; once more to stop at once")
            for child in running.values():
                try:
                    if asked == 0:
                        child.send_signal(signal.SIGTERM)
                    else:
                        os.killpg(child.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            asked = len(stop.signals)
        time.sleep(POLL)
        for name, child in list(running.items()):
            status = child.poll()
            row = last_epoch(out / name)
            if row and row.get("epoch") != seen[name]:
                seen[name] = row.get("epoch")
                tell_epoch(name, row, num_epoch)
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
                say(f"{name}: failed with status {status}; the others go on")
    return failed


def tell_failed(failed, out):
    """Print a line for each run that failed; failed: {name: exit status}. Returns the exit status."""
    for name, status in failed.items():
        log = out / name / "train.log"
        print(f"{name} failed with status {status}: {last_line(log)} (all of it: {log})", file=sys.stderr)
    return 2 if set(failed.values()) == {2} else 1


def write_report(folders, out):
    """Figures and page of all runs that have a history. Returns the exit status."""
    if not folders:
        return 0
    say(f"figures and report of {', '.join(folder.name for folder in folders)}")
    return subprocess.run([sys.executable, str(ROOT / "scripts" / "make_report.py"), *map(str, folders), "-o", str(out)]).returncode


def main():
    kind, data, out, jobs, num_epoch, flags = parse(sys.argv[1:])
    turned = {"kl": kl_runs, "tfr": tfr_runs}[kind](num_epoch)
    if kind == "tfr" and "max_minutes" in flags:
        starts = " and ".join(words[words.index("--tfr_sde") + 1] for name, words in turned.items() if "decay" in name)
        say(f"--max_minutes: the decays start in epochs {starts}, as --num_epoch {num_epoch} places them, and runs of fewer epochs don't show them")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out, "OUT", "sweep"):
            record = Record(out, kind, data, flags)
            common = [word for words in flags.values() for word in words]
            runs = {name: ["Trainer.py", "--DR", str(data), "--save_root", str(out / name), "--resume", *words, *common]
                    for name, words in turned.items()}
            stop = Stop()
            failed = train_all(runs, out, jobs, num_epoch, record, stop)
            if stop.signals:
                say("stopped; the same command goes on from here")
                return 128 + stop.signals[0]
            reported = write_report([out / name for name in runs if (out / name / "history.csv").is_file()], out)
    except OSError as error:
        raise UserError(f"OUT {out}: {error.strerror or error}") from None
    return tell_failed(failed, out) if failed else reported


if __name__ == "__main__":
    run(main)
