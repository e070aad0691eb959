"""scripts/sweep_kl.sh and sweep_tfr.sh: order, skipping, resuming, failing and stopping.

A Trainer.py that only pretends takes the place of the real one.

It trains an epoch in a moment, saves on SIGTERM and resumes, as the real one does. One short
sweep at the end runs the real one.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import sweep as sweeps
from utils.logger import HISTORY

PRETENDER = f'''
import os, signal, sys, time
from pathlib import Path
from utils import options
from utils.schedules import beta_at

def build_parser():
    parser = options.build_parser("Trainer.py", "pretends")
    parser.add_argument("--store_visualization", action="store_true")
    return parser

def stopped(*_):
    print("saved")
    sys.exit(143)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stopped)
    args = build_parser().parse_args()
    root = Path(args.save_root)
    history = root / "history.csv"
    rows = ["{",".join(HISTORY)}"]
    if args.resume and history.exists():
        rows = history.read_text().splitlines()
    with open(os.environ["STARTS"], "a", errors="backslashreplace") as starts:
        threads = "OMP=" + os.environ.get("OMP_NUM_THREADS", "")
        print(root.name, "epoch", len(rows) - 1, *sys.argv[1:], threads, file=starts)
    if root.name == os.environ.get("FAILS"):
        history.write_text(rows[0] + "\\n")  # as a run does that is stopped in its first epoch
        sys.exit("no luck")
    for e in range(len(rows) - 1, args.num_epoch):
        time.sleep(float(os.environ.get("PACE", 0)))
        tfr = max(0, args.tfr - args.tfr_d_step * max(0, e - args.tfr_sde + 1))
        beta = beta_at(args, e)
        loss = 0.1 + 5 * beta
        rows.append(f"{{e}},0.001,{{tfr}},{{tfr}},{{beta}},1,{{loss}},0.1,0.1,5,0.01,20,18,19,0,1,100")
        history.write_text("\\n".join(rows) + "\\n")
'''


REPORT = """
import sys
from pathlib import Path
(Path(sys.argv[-1]) / "report.html").write_text(" ".join(sys.argv), errors="backslashreplace")
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the scripts beside a Trainer.py and a make_report.py that pretend, and data."""
    tree = tmp_path / "a project"
    shutil.copytree(
        ROOT / "scripts", tree / "scripts", ignore=shutil.ignore_patterns("__pycache__")
    )
    for room in ("utils",):
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "Trainer.py").write_text(PRETENDER)
    (tree / "scripts" / "make_report.py").write_text(REPORT)
    (tmp_path / "data").mkdir()
    return tmp_path


def sweep(project, kind, *words, wait=True, **env):
    env = {**os.environ, "PYTHON": sys.executable, "STARTS": str(project / "starts"), **env}
    process = subprocess.Popen(
        ["bash", project / "a project" / "scripts" / f"sweep_{kind}.sh", *map(str, words)],
        cwd=project,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # tests in the background have it ignored
    if not wait:
        return process
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess([], process.returncode, out, err)


def starts(project):
    path = project / "starts"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def column(run, name):
    return [float(row[name]) for row in csv.DictReader((run / "history.csv").open())]


def test_kl_sweep_trains_three_that_differ_in_one_flag(project):
    shutil.copy(ROOT / "scripts" / "make_report.py", project / "a project" / "scripts")
    result = sweep(
        project,
        "kl",
        "data",
        "out",
        "--num_epoch",
        2,
        "--lr=0.002",
        "--fast_train",
        "--kl_anneal_ratio=0.25",
    )
    assert result.returncode == 0, result.stderr
    lines = starts(project)
    assert [line[0] for line in lines] == ["Cyclical", "Monotonic", "None"]
    rest = [
        [
            w
            for w in line[3:]
            if w not in ("Cyclical", "Monotonic", "None") and not w.startswith("out/")
        ]
        for line in lines
    ]
    assert rest[0] == rest[1] == rest[2]
    for word in ("--seed", "--lr", "0.002", "--fast_train", "--resume"):
        assert word in rest[0]
    own = dict(zip(rest[0], rest[0][1:]))  # Fu et al.'s cycles, but what was given stays
    assert (
        own["--kl_anneal_cycle"] == "4"
        and own["--kl_anneal_ratio"] == "0.25"
        and own["--tfr_sde"] == "1"
    )
    assert [line[line.index("--kl_anneal_type") + 1] for line in lines] == [
        "Cyclical",
        "Monotonic",
        "None",
    ]
    for name in (
        "report.html",
        "report.md",
        "loss_curves.png",
        "loss_curves.pdf",
        "None/train.log",
    ):
        assert (project / "out" / name).is_file()
    assert "Cyclical: epoch 2 of 2" in result.stdout


@pytest.mark.parametrize("epochs", [5, 70])
def test_tfr_sweep_shows_its_decays_in_short_runs_too(project, epochs):
    done = sweep(project, "tfr", "data", "out", "--num_epoch", epochs, "--recipe", "template")
    assert done.returncode == 0
    ratios = {
        name: column(project / "out" / name, "tfr")
        for name in ("always", "never", "decay_early", "decay_late")
    }
    assert set(ratios["always"]) == {1} and set(ratios["never"]) == {0}
    for name in ("decay_early", "decay_late"):
        assert ratios[name][0] == 1 and any(0 < r < 1 for r in ratios[name])
    assert ratios["decay_early"][-1] == 0
    assert sum(ratios["decay_late"]) > sum(ratios["decay_early"])
    if epochs == 70:  # the template's own: full until epoch 9, gone in epoch 19
        assert (
            ratios["decay_early"][9] == 1
            and ratios["decay_early"][10] == pytest.approx(0.9)
            and ratios["decay_early"][18] > 0
        )
        assert ratios["decay_early"][19] == pytest.approx(0, abs=1e-9)


def settings(**flags):
    return argparse.Namespace(
        **{
            **{
                "recipe": "pool",
                "num_epoch": 20,
                "kl_anneal_type": "Cyclical",
                "kl_anneal_cycle": 4,
                "kl_anneal_ratio": 0.5,
                "tfr": 1,
                "tfr_sde": 10,
                "tfr_d_step": 0.1,
                "tfr_min": 0.035,
                "max_minutes": None,
            },
            **flags,
        }
    )


@pytest.mark.parametrize("kind", ["kl", "tfr"])
@pytest.mark.parametrize(
    "recipe, epochs",
    [("pool", 2), ("pool", 70), ("template", 5), ("template", 20), ("template", 70)],
)
def test_the_curves_of_a_sweep_differ_and_reach_both_ends(kind, recipe, epochs):
    curves = sweeps.curves(kind, settings(recipe=recipe, num_epoch=epochs))
    for name, values in curves.items():
        assert name in sweeps.FLAT or max(values) >= 0.9 and min(values) <= 0.1
    assert len({tuple(values) for values in curves.values()}) == len(curves)
    flat = {"kl": {"None": 1}, "tfr": {"always": 1, "never": 0}}[
        kind
    ]  # never: not the recipe's floor
    assert all(set(curves[name]) == {value} for name, value in flat.items())
    assert sweeps.problem(kind, settings(recipe=recipe, num_epoch=epochs)) is None


def test_cyclical_rises_and_has_plateaus():
    values = sweeps.curves("kl", settings(recipe="template"))["Cyclical"]
    assert sum(b < a for a, b in zip(values, values[1:])) == 3  # four cycles
    assert values.count(1) >= 8 and any(0 < value < 1 for value in values)


@pytest.mark.parametrize(
    "kind, words, said",
    [
        ("kl", ["--num_epoch", "3"], ["Cyclical and Monotonic", "--num_epoch 4"]),
        (
            "kl",
            ["--num_epoch", "20", "--kl_anneal_cycle", "10", "--kl_anneal_ratio", "1"],
            [
                "never reaches a beta of 1 (0.50 at most)",
                "--kl_anneal_cycle 4 --kl_anneal_ratio 0.5",
            ],
        ),
        ("tfr", ["--num_epoch", "2"], ["decay_late and decay_early", "--num_epoch 3"]),
        ("kl", ["--num_epoch", "20", "--max_minutes", "5"], ["--max_minutes", "--num_epoch"]),
    ],
)
def test_a_sweep_that_would_compare_nothing_is_refused(project, kind, words, said):
    result = sweep(project, kind, "data", "out", "--recipe", "template", *words)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert all(word in line for word in said), line
    assert not starts(project) and not (project / "out").exists()


def test_tfr_sweep_has_one_beta_and_a_small_kl_weight(project):
    assert (
        sweep(project, "tfr", "data", "out", "--num_epoch", 4, "--recipe", "template").returncode
        == 0
    )
    for line in starts(project):
        own = dict(zip(line, line[1:]))
        assert (
            own["--kl_anneal_type"] == "None"
            and float(own["--kl_weight"]) <= 1e-4
            and own["--tfr_min"] == "0"
        )


def test_a_switch_that_is_turned_off_stays_off(project):
    sweep(project, "kl", "data", "out", "--num_epoch", 20, "--no-refresh_norm")
    assert len(starts(project)) == 3
    for line in starts(project):
        assert "--no-refresh_norm" in line and "--refresh_norm" not in line


def test_runs_that_are_done_are_skipped(project):
    assert sweep(project, "kl", "data", "out", "--num_epoch", 1).returncode == 0
    again = sweep(project, "kl", "data", "out", "--num_epoch", 1, "--num_workers", 0)
    assert again.returncode == 0 and len(starts(project)) == 3
    assert again.stdout.count("done already") == 3
    shutil.rmtree(project / "out" / "None")
    assert sweep(project, "kl", "data", "out", "--num_epoch", 1).returncode == 0
    assert [line[0] for line in starts(project)[3:]] == ["None"]


def test_a_failed_run_is_reported_at_the_end_and_stops_no_other(project):
    result = sweep(project, "kl", "data", "out", "--num_epoch", 1, FAILS="Cyclical")
    assert result.returncode == 1
    assert len(starts(project)) == 3
    (last,) = result.stderr.strip().splitlines()
    assert "Cyclical failed with status 1: no luck" in last and "train.log" in last
    assert "Cyclical" not in json.loads((project / "out" / "sweep.json").read_text())["done"]
    report = (project / "out" / "report.html").read_text()
    assert "out/Monotonic out/None -o" in report and "Cyclical" not in report
    assert sweep(project, "kl", "data", "out", "--num_epoch", 1).returncode == 0
    assert [line[0] for line in starts(project)[3:]] == ["Cyclical"]


def test_a_folder_whose_name_is_not_utf_8(project):
    out = os.fsdecode(b"caf\xe9")
    done = sweep(project, "kl", "data", out, "--num_epoch", 1)
    assert done.returncode == 0, done.stderr
    assert (project / out / "Cyclical" / "train.log").is_file()


def test_jobs_run_at_once(project):
    process = sweep(
        project, "kl", "data", "out", "--num_epoch", 2, "--jobs", 3, wait=False, PACE="1"
    )
    until(lambda: len(starts(project)) == 3)
    assert not (project / "out" / "Cyclical" / "history.csv").exists()
    assert all(not line[-1].endswith("=") for line in starts(project))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err


def test_an_error_of_the_sweep_leaves_no_run_behind(project):
    (project / "out").mkdir()
    (project / "out" / "None").write_text("a file where the third run's folder goes")
    done = sweep(project, "kl", "data", "out", "--num_epoch", 9, "--jobs", 3, PACE="9")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(project / "a project") not in running


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_sweep_saves_its_runs_and_resumes_them(project, number, status):
    words = "kl", "data", "out", "--num_epoch", 3, "--max_minutes", 5
    process = sweep(project, *words, wait=False, PACE="0.7")
    until(lambda: (project / "out" / "Cyclical" / "history.csv").exists())
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    assert "Traceback" not in err + out
    assert (project / "out" / "Cyclical" / "train.log").read_text().rstrip().endswith("saved")
    assert not (project / "out" / "report.html").exists()
    again = sweep(project, *words)
    assert again.returncode == 0
    assert "Cyclical: resumed for another 5 minutes" in again.stdout  # unlike the others
    assert "None: epoch 3, loss" in again.stdout  # of how many is not known
    lines = starts(project)
    assert [line[0] for line in lines] == ["Cyclical", "Cyclical", "Monotonic", "None"]
    assert int(lines[1][2]) > 0, "the first run began again"
    assert column(project / "out" / "Cyclical", "epoch") == [0, 1, 2]


def test_two_sweeps_do_not_share_a_folder(project):
    process = sweep(project, "kl", "data", "out", "--num_epoch", 2, wait=False, PACE="1.5")
    until(lambda: starts(project))
    second = sweep(project, "kl", "data", "out", "--num_epoch", 2)
    process.terminate()
    process.communicate(timeout=120)
    assert second.returncode == 2 and "another sweep" in second.stderr


@pytest.mark.parametrize(
    "kind, words, said",
    [
        ("kl", ["absent", "out"], "absent"),
        ("kl", ["data"], "OUT"),
        ("kl", ["data", "out", "--no_such_flag"], "--no_such_flag"),
        ("kl", ["data", "out", "--num_epoch", "0"], "--num_epoch"),
        ("kl", ["data", "out", "--jobs", "0"], "--jobs"),
        ("kl", ["data", "out", "--kl_anneal_type", "None"], "--kl_anneal_type"),
        ("kl", ["data", "out", "--save_root=x"], "--save_root"),
        ("tfr", ["data", "out", "--tfr", "1"], "--tfr"),
        ("tfr", ["data", "out", "--kl_anneal_type", "Cyclical"], "--kl_anneal_type"),
        ("tfr", ["data", "out", "--num_epoch", "1"], "--num_epoch"),
        ("kl", ["data", "starts"], "starts"),
    ],
)
def test_user_errors_are_one_line_and_start_nothing(project, kind, words, said):
    (project / "starts").write_text("")
    result = sweep(project, kind, *words)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert said in line
    assert not starts(project) and not (project / "out").exists()


def test_other_flags_need_another_folder(project):
    assert sweep(project, "kl", "data", "out", "--num_epoch", 1).returncode == 0
    other = sweep(project, "kl", "data", "out", "--num_epoch", 2)
    assert (
        other.returncode == 2
        and "--num_epoch 1" in other.stderr
        and "--num_epoch 2" in other.stderr
    )
    assert sweep(project, "tfr", "data", "out", "--num_epoch", 3).returncode == 2
    for name in ("Cyclical", "Monotonic", "None"):  # as after a mistyped command that trained none
        shutil.rmtree(project / "out" / name)
    assert sweep(project, "tfr", "data", "out", "--num_epoch", 3).returncode == 0


def test_without_PYTHON_scripts_take_the_virtual_environment(project):
    python = project / "a project" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho used >> "{project}/used"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    assert sweep(project, "kl", "data", "out", "--num_epoch", 1, PYTHON="").returncode == 0
    assert (project / "used").exists()


def test_the_real_trainer_in_a_short_sweep(tmp_path):
    """Three tiny runs end to end: settings from their checkpoints, frames from their GIFs."""
    demo = subprocess.run(
        [
            sys.executable,
            ROOT / "scripts" / "make_demo_data.py",
            tmp_path / "data",
            "--train_frames",
            "32",
            "--sequence_frames",
            "12",
        ],
        capture_output=True,
        text=True,
    )
    assert demo.returncode == 0, demo.stderr
    small = (
        "--num_epoch 4 --val_vi_len 12 --train_vi_len 4 --F_dim 8 --L_dim 2 --N_dim 4 "
        "--D_out_dim 8 --frame_H 8 --frame_W 16 "
        "--num_workers 0 --device cpu --recipe template"
    ).split()
    result = subprocess.run(
        ["bash", ROOT / "scripts" / "sweep_kl.sh", "data", "out", *small],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert result.returncode == 0, result.stderr + result.stdout
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| `--kl_anneal_type` | Cyclical | Cyclical | Monotonic | None |" in text
    assert "`--recipe" not in text.partition("## Appendix")[0]  # as in the template
    assert (tmp_path / "out" / "Cyclical" / "val_pred_large.gif").is_file()
    assert "left out" not in text and "not found in this copy" not in text
    assert "data:image/" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "frames_Cyclical.png").is_file()
