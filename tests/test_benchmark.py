"""scripts/benchmark.py at tiny sizes: every part runs, and both ways compute the same."""

import json
import os
import subprocess
import sys

import benchmark
import pytest
from conftest import ROOT

from utils.cli import UserError


def run_benchmark(*flags):
    # one thread: these sizes are too small for more, and the tests share the machine
    words = [sys.executable, ROOT / "scripts" / "benchmark.py", *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, env=environment)


def test_every_part_runs_and_both_ways_agree(tmp_path):
    done = run_benchmark("--quick", "--device", "cpu", "--precision", "fp32", "--runs", 1,
                         "--json", tmp_path / "speed.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "speed.json").read_text())

    names = [row["name"] for row in found["timings"]]
    assert [name.split(",")[0].split(":")[0] for name in names] == [
        "data", "training", "training", "training", "rollout of 5 sequences"]
    for row in found["timings"]:
        assert set(row["seconds"]) == {"template", "ours"}
        for seconds in row["seconds"].values():
            assert len(seconds) in (1, 4) and min(seconds) > 0
        low, middle, high = (row["times_as_fast"]["ours"][key] for key in ("min", "median", "max"))
        assert 0 < low <= high and middle > 0
    flops = {row["name"]: row["gflop"] for row in found["timings"] if "gflop" in row}
    forced = next(gflop for name, gflop in flops.items() if "teacher forcing" in name)
    assert forced["ours"] < forced["template"]  # no frame is encoded twice
    operations = [row["operations"] for row in found["timings"] if "operations" in row]
    assert len(operations) == 4 and all(0 < row["ours"] < row["template"] for row in operations)
    assert 0 < found["matmul_peak_gflops"]["fp32"]

    assert found["batches are bitwise identical"]
    assert len(found["equality"]) == 5 and max(found["equality"].values()) < 1e-5
    assert [row["window"] for row in found["memory"]] == [4, 4, 4]
    assert all(row["MB"] >= 0 for row in found["memory"])
    assert {row["what"] for row in found["growth"]} == {"batch", "window", "frame"}
    assert found["machine"]["cores"] == os.cpu_count()

    assert "| training, teacher forcing, batch 2, window 4 |" in done.stdout  # rows to paste
    assert "say nothing about speed" in done.stdout


def test_wrong_input_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--only", "trainings"])
    assert stopped.value.code == 2 and "--only" in capsys.readouterr().err
    with pytest.raises(UserError, match="--json"):
        benchmark.main(["--device", "cpu", "--json", str(tmp_path / "none" / "x.json")])
    with pytest.raises(UserError, match="nothing"):
        benchmark.main(["--device", "cpu", "--quick", "--only", "data",
                        "--DR", str(tmp_path / "nothing")])
