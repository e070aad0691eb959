"""Profile training steps, and summarize all steps of scripts/gpu_check.sh.

    python scripts/gpu_report.py profile OUT   # OUT/profile.json, and traces for a browser
    python scripts/gpu_report.py summary OUT   # OUT/summary.json and OUT/summary.md

GPU_CHECK_DEVICE (default cuda) is the device; on a CPU sizes are tiny and operations stand for
kernels.
"""

import argparse
import csv
import json
import os
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from scripts import benchmark
from utils.cli import Parser, UserError, run
from utils import graphs
from utils.averaging import begin_average
from utils.hardware import pick_device

TRAINED = "train", "train_compiled"  # steps of gpu_check.sh that train
STEPS = 5  # profiled, as many before them warm up; on a CPU one is enough


# ---------------------------------------------------------------- the profile

def models(args):
    """Return {name: function that takes a training step}, at the pool recipe's batch and window."""
    ours = benchmark.our_model(args, "pool")
    batch = ours.args.batch_size
    img, label = torch.rand(2, batch, 2, 3, args.frame_H, args.frame_W, device=args.device)
    teacher_forced = torch.zeros(2, dtype=torch.bool)
    begin_average(ours)
    graphs.record_step(ours, type(ours))
    template = benchmark.template_model(args, ours)
    return {"pool step": lambda: ours.training_one_step(img, label, teacher_forced),
            "template step": lambda: template.training_one_step(img, label, True)}


def busy_time(intervals):
    """Return the length of the union of (start, end) intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def kernels_of(events, device):
    """Return (name, start, end) in microseconds of a GPU's kernels, or a CPU's operations."""
    if device.startswith("cuda"):  # annotations are ranges that span kernels and gaps alike
        chosen = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA
                  and not getattr(e, "is_user_annotation", False)]
    else:  # only the innermost: their parents contain them
        chosen = [e for e in events if e.name.startswith("aten::") and not e.cpu_children]
    return [(e.name, e.time_range.start, e.time_range.end) for e in chosen]


def profile_step(step, device, trace):
    """Profile a few steps: kernels a step, the time they take, and the gaps between them."""
    kinds, steps = [ProfilerActivity.CPU], 1
    if device.startswith("cuda"):  # without the CPU's events, which take minutes to write
        kinds, steps = [ProfilerActivity.CUDA], STEPS
    for _ in range(steps):
        step()
    benchmark.wait(device)
    with profile(activities=kinds) as profiler:
        for _ in range(steps):
            step()
        benchmark.wait(device)
    profiler.export_chrome_trace(str(trace))
    kernels = kernels_of(profiler.events(), device)
    if not kernels:
        raise UserError(f"{device}: the profiler saw no kernels there; expected some")
    busy = busy_time([(start, end) for _, start, end in kernels])
    span = max(end for *_, end in kernels) - min(start for _, start, _ in kernels)
    longest = Counter()
    for name, start, end in kernels:
        longest[name] += end - start
    return {"kernels": len(kernels) / steps,
            "ms": span / steps / 1e3, "ms busy": busy / steps / 1e3,
            "share of gaps": 1 - busy / span,
            "longest, ms": {name: us / steps / 1e3 for name, us in longest.most_common(12)}}


def settings(device):
    """Return the benchmark's sizes: the default ones on a GPU, tiny ones on a CPU."""
    words = [] if device.startswith("cuda") else ["--quick"]
    return benchmark.sized(benchmark.build_parser().parse_args(["--device", device, *words]))


def write_profile(out):
    """Write OUT/profile.json and a trace for each step."""
    device = str(pick_device(os.environ.get("GPU_CHECK_DEVICE", "cuda")))
    found = {}
    for name, step in models(settings(device)).items():
        found[name] = profile_step(step, device, out / f"{name.replace(' ', '_')}.json.gz")
    (out / "profile.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


# ---------------------------------------------------------------- the summary

def read_json(path):
    """Return what a JSON file holds, None where its step did not get that far."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def read_steps(out):
    """Return what each step of gpu_check.sh came to, in the order in which they ran."""
    files = sorted((out / "steps").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [{"step": path.stem, **json.loads(path.read_text())} for path in files]


def read_tests(out):
    """Return how many tests passed, failed and were skipped, and the names of those that failed."""
    try:
        suite = ElementTree.parse(out / "tests.xml").getroot().find("testsuite")
    except (OSError, ElementTree.ParseError):
        return None
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    failed = [case.get("name") for case in suite.iter("testcase")
              if case.find("failure") is not None or case.find("error") is not None]
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return {"passed": passed, "skipped": counts["skipped"], "failed": failed}


def read_training(folder):
    """Return the rows of a run's history that hold what it cost and scored."""
    try:
        with open(folder / "history.csv", encoding="utf-8") as table:
            rows = list(csv.DictReader(table))
    except OSError:
        return None
    names = ("epoch", "train_loss", "val_psnr_mean", "skipped_steps", "seconds",
             "frames_per_second")
    return [{name: float(row[name]) for name in names} for row in rows]


def timings(found):
    """Return the rows of a benchmark's JSON in short: median seconds, times as fast, peak share."""
    rows = []
    for row in (found or {}).get("timings", []):
        for who, ratio in row["times_as_fast"].items():
            rows.append({"work": row["name"], "whose": who,
                         "template, s": row["median"]["template"], "ours, s": row["median"][who],
                         "times as fast": ratio["median"], "first call, s": row["first_call"][who]})
    return rows


def collect(out):
    """Return everything that the steps left behind, as one dict."""
    device = os.environ.get("GPU_CHECK_DEVICE", "cuda")
    here = device == "cpu" or torch.cuda.is_available()
    found = read_json(out / "benchmark.json")
    return {
        "machine": benchmark.machine(device if here else "cpu"), "device": device,
        "steps": read_steps(out), "tests": read_tests(out),
        "training": {name: read_training(out / name) for name in TRAINED},
        "timings": timings(found) + timings(read_json(out / "benchmark_compiled.json")),
        "memory": (found or {}).get("memory", []), "profile": read_json(out / "profile.json")}


def cell(value):
    """Return a table's cell: four digits of a number that is not whole."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows):
    """Return dicts with the same keys as a Markdown table's lines."""
    if not rows:
        return ["nothing measured"]
    head = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    return head + ["| " + " | ".join(map(cell, row.values())) + " |" for row in rows]


def markdown(found):
    """Return the summary's lines."""
    lines = ["| machine | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in found["machine"].items()]
    if found["device"] == "cpu":
        lines += ["", "On a CPU at tiny sizes, nothing compiled: no figure says anything of speed."]
    lines += ["", *table(found["steps"])]
    tests = found["tests"]
    if tests:
        lines += ["", f"Tests: {tests['passed']} passed, {tests['skipped']} skipped, "
                      f"{len(tests['failed'])} failed {' '.join(tests['failed'])}".rstrip()]
    for name, rows in found["training"].items():
        lines += ["", f"Recommended command, two epochs ({name}):", "", *table(rows)]
    lines += ["", *table(found["timings"]), "", *table(found["memory"])]
    profiles = [{"profile of": name, **{key: row[key] for key in row if key != "longest, ms"}}
                for name, row in (found["profile"] or {}).items()]
    return [*lines, "", *table(profiles)]


def write_summary(out):
    """Write OUT/summary.json and OUT/summary.md."""
    found = collect(out)
    (out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    text = "\n".join(markdown(found)) + "\n"
    (out / "summary.md").write_text(text)
    print(text)


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("profile", "summary"), help="what to write")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder of gpu_check.sh")
    args = parser.parse_args(argv)
    if not args.out.is_dir():
        raise UserError(f"{args.out}: expected a folder that is there")
    {"profile": write_profile, "summary": write_summary}[args.what](args.out)


if __name__ == "__main__":
    run(main)
