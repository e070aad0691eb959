"""Prove that a run which is killed and resumed ends bitwise identical to one never stopped.

    python scripts/kill_test.py                    # 20 kills, six to eight minutes on two cores
    python scripts/kill_test.py --kills 3 --seed 7

For each variant of training a reference run trains to the end. Then, again and again: start the
run, SIGKILL it at a random time after training has begun, resume it with --resume, and compare
with the reference the list of files and, bitwise, every tensor and number in every checkpoint
(weights, averages, optimizer state, random states), history.csv, steps.csv, psnr_per_frame.csv and
the GIF. Only timings and the flags of OF_THE_START may differ. At most half of the kills wait until
a file is being written. A kill that came too late, when the run had ended, does not count. Exit
status 0 only when all are equal.
"""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils.cli import Parser, number, progress, run, say  # noqa: E402

TINY = (
    "--frame_H", "16", "--frame_W", "32", "--F_dim", "16", "--L_dim", "8", "--N_dim", "4",
    "--D_out_dim", "16", "--val_vi_len", "20", "--num_epoch", "3", "--device", "cpu"
)
# what differs between them: pool and averages; the template's windows and one Bernoulli sample an
# epoch; loader processes; a data share that changes
VARIANTS = {
    "pool": ("--save_every_steps", "2", "--tfr", "0.6", "--tfr_sde", "1", "--tfr_d_step", "0.4"),
    "template": (
        "--recipe", "template", "--train_vi_len", "4", "--tfr", "0.6", "--tfr_sde", "1",
        "--save_every_steps", "1"
    ),
    "pool, no cache, fast_train": (
        "--no_cache", "--fast_train", "--fast_train_epoch", "1", "--tf_coin", "batch",
        "--tfr", "0.5", "--save_every_steps", "3", "--num_workers", "2"
    ),
    "template, loader processes": (
        "--recipe", "template", "--train_vi_len", "3", "--tfr", "0.7", "--tf_coin", "frame",
        "--no_cache", "--num_workers", "2", "--ema", "0.9", "--refresh_norm",
        "--save_every_steps", "2"
    ),
}
TIMINGS = {"seconds", "frames_per_second"}
# flags that say where a run is and how it was started
OF_THE_START = {"save_root", "resume", "ckpt_path"}
BEGUN = "training frames"  # Trainer.py prints a line with these words when its first step is next


# ---------------------------------------------------------------- runs


def command(data, save_root, flags, resume=False):
    """Return the command line of a run."""
    return [
        sys.executable, str(ROOT / "Trainer.py"), "--DR", str(data), "--save_root", str(save_root),
        *TINY, *flags, *["--resume"] * resume
    ]


def environment():
    """Return the environment of a run.

    Each process has one thread: tiny networks run fastest so, and sums have a fixed order.
    """
    return {**os.environ, "OMP_NUM_THREADS": "1"}


class Run:
    """Start a training run in the background.

    `begun` is set when its first step is next, and when it ended before.
    """

    def __init__(self, *args, **options):
        self.process = subprocess.Popen(
            command(*args, **options), env=environment(), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT
        )
        self.begun, self.lines, self.began_at = threading.Event(), [], None
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        """Keep the output, and the time of the line after which the first step begins."""
        for line in self.process.stdout:
            self.lines.append(line)
            if BEGUN in line and self.began_at is None:
                self.began_at = time.monotonic()
                self.begun.set()
        self.begun.set()

    def wait(self, timeout=300):
        """Return the run's exit status and output."""
        status = self.process.wait(timeout)
        self.reader.join(60)
        return status, "".join(self.lines)


def finish(data, save_root, flags, resume=False):
    """Train to the end; return exit status, output, and seconds of training."""
    run = Run(data, save_root, flags, resume=resume)
    status, output = run.wait()
    return status, output, time.monotonic() - (run.began_at or 0)


def kill_at_random(run, duration, chance, folder, aim):
    """Kill a run (SIGKILL) at a uniform time of its duration; with `aim`, at the next write.

    Return whether the run was still there to be killed.
    """
    run.begun.wait()
    time.sleep(chance.uniform(0, duration))
    while aim and run.process.poll() is None and not any(folder.glob(".*.part*")):
        pass  # a write of a tiny checkpoint takes about a millisecond
    run.process.send_signal(signal.SIGKILL)
    # what it started may live for seconds yet; a resume must not mind
    return run.process.wait(60) == -signal.SIGKILL


# ---------------------------------------------------------------- comparing


def differences(a, b, where=""):
    """Return the names of what is not bitwise identical in two checkpoints, timings aside."""
    import torch

    if type(a) is not type(b):
        return [f"{where}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        passed_over = OF_THE_START if where.endswith("['args']") else TIMINGS
        keys = [key for key in a if key not in passed_over]
        return [d for key in keys for d in differences(a[key], b[key], f"{where}[{key!r}]")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)} items"]
        return [d for i, pair in enumerate(zip(a, b)) for d in differences(*pair, f"{where}[{i}]")]
    if torch.is_tensor(a):
        if a.dtype != b.dtype or a.shape != b.shape:
            return [where]
        a, b = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (a, b))
        return [] if a.equal(b) else [where]
    return [] if a == b or (a != a and b != b) else [f"{where}: {a!r} and {b!r}"]


def rows(path):
    """Return the rows of a CSV as text, without timings."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k not in TIMINGS} for row in csv.DictReader(file)]


def compare(folder, reference):
    """Return the names of what differs between the folders of two runs.

    Compared are the list of files, every checkpoint, the CSV files and the GIF.
    """
    import torch

    names, expected = (
        sorted(p.name for p in root.iterdir() if p.name != ".lock") for root in (folder, reference)
    )
    if names != expected:
        return [f"files {names}, expected {expected}"]
    found = []
    for name in names:
        ours, theirs = folder / name, reference / name
        if name.endswith(".ckpt"):
            found += differences(*(torch.load(p, weights_only=True) for p in (ours, theirs)), name)
        elif name.endswith(".csv") and rows(ours) != rows(theirs):
            found.append(name)
        elif name.endswith(".gif") and ours.read_bytes() != theirs.read_bytes():
            found.append(name)
    return found


# ---------------------------------------------------------------- the test


def kill_test(
    data, work, kills, seed=0, variants=tuple(VARIANTS), finish=finish, step=lambda: None
):
    """Kill `kills` runs, resume and compare.

    Return (equal runs, kills that hit a write, lines on what differed). finish: the function that
    trains a run to its end, an argument for tests.
    """
    chance, references, equal, in_write, problems, done = random.Random(seed), {}, 0, 0, [], 0
    while done < kills:
        variant = variants[done % len(variants)]
        flags = VARIANTS[variant]
        if variant not in references:
            status, output, references[variant] = finish(data, work / f"whole {variant}", flags)
            if status:
                raise RuntimeError(f"the reference run ended with {status}:\n{output}")
        folder = work / f"killed {done}"
        aim = done // len(variants) % 2 == 1 if kills > len(variants) else done % 2 == 1
        if not kill_at_random(Run(data, folder, flags), references[variant], chance, folder, aim):
            shutil.rmtree(folder)
            continue  # it had ended: not a kill
        hit = any(folder.glob(".*.part*"))
        from_scratch = not (folder / "last.ckpt").exists()
        status, output, _ = finish(data, folder, flags, resume=True)
        if status:
            found = [f"the resumed run ended with {status}: {output[-2000:]}"]
        else:
            found = compare(folder, work / f"whole {variant}")
        done, in_write, equal = done + 1, in_write + hit, equal + (not found)
        problems += [f"kill {done} ({variant}): {line}" for line in found[:10]]
        when = ", inside a write" * hit + ", before the first checkpoint" * from_scratch
        result = f"DIFFERENT: {found[0]}" if found else "equal"
        say(f"kill {done} ({variant}){when}: {result}")
        step()
        if not found:
            shutil.rmtree(folder)
    return equal, in_write, problems


def draw(data):
    """Draw tiny demo data; return their folder."""
    subprocess.run(
        [
            sys.executable, str(ROOT / "scripts" / "make_demo_data.py"), str(data),
            "--train_frames", "64", "--sequence_frames", "20"
        ],
        check=True, capture_output=True
    )
    return data


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=number(int, 1), default=20, help="runs to kill")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="seed of the kill times")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as work,
        progress(total=args.kills, unit="kill", desc="killed and resumed") as bar,
    ):
        work = Path(work)
        equal, in_write, problems = kill_test(
            draw(work / "data"), work, args.kills, args.seed, step=bar.update
        )
    for line in problems:
        print(line, file=sys.stderr)
    print(f"{equal} of {args.kills} equal ({in_write} killed inside a write)")
    return 0 if equal == args.kills else 1


if __name__ == "__main__":
    run(main)
