"""scripts/gpu_check.sh on a CPU: every step runs, and the summary has what each one found."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, run_cli

STEPS = ["data", "train", "rollout", "profile", "benchmark", "tests", "train_compiled",
         "benchmark_compiled", "fallbacks"]


def gpu_check(*words):
    environment = {**os.environ, "GPU_CHECK_DEVICE": "cpu", "PYTHON": sys.executable}
    return subprocess.run(["bash", ROOT / "scripts" / "gpu_check.sh", *map(str, words)],
                          capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "out"
    done = gpu_check(out)
    logs = [f"{path.name}:\n{path.read_text()[-800:]}" for path in sorted(out.glob("*.log"))]
    assert done.returncode == 0, "\n".join([done.stdout, done.stderr, *logs])
    return out


def test_every_step_runs_and_the_summary_says_so(checked):
    found = json.loads((checked / "summary.json").read_text())
    assert [row["step"] for row in found["steps"]] == STEPS
    assert all(row["status"] == 0 for row in found["steps"])
    assert found["tests"]["passed"] > 10 and found["tests"]["failed"] == []
    for name in ("train", "train_compiled"):
        assert [row["epoch"] for row in found["training"][name]] == [0, 1]
        assert all(row["frames_per_second"] > 0 for row in found["training"][name])
    assert {row["whose"] for row in found["timings"]} == {"ours", "compiled"}
    assert found["memory"] and found["profile"].keys() == {"pool step", "template step"}
    for row in found["profile"].values():
        assert row["kernels"] > 100 and 0 < row["ms busy"] <= row["ms"]
    assert (checked / "rollout" / "submission.csv").exists()


def test_the_summary_is_tables_to_paste(checked):
    text = (checked / "summary.md").read_text()
    for row in ("| machine | |", "| step | status | seconds | limit |", "| profile of |",
                "| rollout of 5 sequences"):
        assert row in text
    assert "no figure says anything of speed" in text


def test_a_step_that_fails_does_not_stop_the_next(tmp_path):
    """Without data neither training step can work; both are tried, and the summary is written."""
    done = gpu_check(tmp_path, "train", "rollout")
    steps = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert done.returncode == 1 and [row["step"] for row in steps] == ["train", "rollout"]
    assert all(row["status"] == 2 for row in steps)
    assert (tmp_path / "train.log").read_text().startswith("error: ")


def test_wrong_words_are_one_line(tmp_path):
    assert gpu_check().returncode == 2
    done = gpu_check(tmp_path / "out", "test")
    assert done.returncode == 2 and "STEP test: expected one of" in done.stderr
    assert not (tmp_path / "out").exists()
    done = run_cli("scripts/gpu_report.py", "summary", tmp_path / "nothing")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nothing" in done.stderr
