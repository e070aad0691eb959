"""scripts/ablate.py: equal numbers of frames, results in a CSV, nothing run or written twice."""

import csv

import ablate
from conftest import TINY, in_process, run_main

SIZES = [
    word
    for flag in (
        "--frame_H", "--frame_W", "--F_dim", "--L_dim", "--N_dim", "--D_out_dim", "--val_vi_len",
        "--device", "--precision"
    )
    for word in (flag, TINY[TINY.index(flag) + 1])
]


def run_ablate(data, tmp_path, *words):
    return run_main(
        "ablate.py", data, tmp_path / "runs", *words, "--csv", tmp_path / "ablation.csv", *SIZES
    )


def test_settings_at_equal_frames(tiny_data, tmp_path, monkeypatch):
    words = ["pool", "template+batch_1", "--points", 2, "--frames", 64]
    done = run_ablate(tiny_data, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "ablation.csv").read_text()
    rows = list(csv.DictReader(table.splitlines()))
    assert [(row["setting"], row["epoch"]) for row in rows] == [
        ("pool", "0"), ("pool", "1"), ("template+batch_1", "0"), ("template+batch_1", "1")
    ]
    # 2 windows of 16 an epoch, 15 of them predicted
    assert [row["frames"] for row in rows] == ["32", "64", "30", "60"]
    assert all(0 < float(row["psnr_min"]) <= float(row["psnr_mean"]) for row in rows)
    assert "template+batch_1" in done.stdout

    monkeypatch.setattr(ablate.subprocess, "run", None)  # nothing is trained
    again = run_ablate(tiny_data, tmp_path, *words)
    assert again.returncode == 0 and (tmp_path / "ablation.csv").read_text() == table


def test_errors(tiny_data, tmp_path, capfd):
    for words, named in (
        (["pool"], "--frames"),
        (["nothing", "--frames", 64], "SETTING nothing"),
        (["pool", "--frames", 64, "--lr", "-1"], "--lr"),
    ):
        status = in_process(
            ablate.main, tiny_data, tmp_path / "runs", *words, "--csv", tmp_path / "ablation.csv",
            *SIZES
        )
        assert status == 2
        err = capfd.readouterr().err
        assert named in err and "Traceback" not in err
    assert not (tmp_path / "ablation.csv").exists()


def test_runs_of_other_flags_are_not_taken_for_these(tiny_data, tmp_path, capfd):
    words = [
        tiny_data, tmp_path / "runs", "pool", "--frames", 32, "--points", 1,
        "--csv", tmp_path / "ablation.csv", *SIZES
    ]
    assert in_process(ablate.main, *words) == 0
    table = (tmp_path / "ablation.csv").read_text()
    for more, flag in ((["--lr", "1e-6"], "--lr"), (["--points", 2], "--num_epoch")):
        assert in_process(ablate.main, *words, *more) == 2
        err = capfd.readouterr().err
        assert flag in err and "pool_s0_32frames" in err and "Traceback" not in err
    assert (tmp_path / "ablation.csv").read_text() == table


def test_a_table_that_cannot_be_written_is_an_error_first(tiny_data, tmp_path, capfd):
    (tmp_path / "file").write_text("setting,psnr\npool,30\n")
    for path in (tmp_path, tmp_path / "file", tmp_path / "file" / "in.csv"):
        status = in_process(
            ablate.main, tiny_data, tmp_path / "runs", "pool", "--frames", 32, "--csv", path, *SIZES
        )
        assert status == 2
        err = capfd.readouterr().err
        assert "--csv" in err and "Traceback" not in err
    assert not (tmp_path / "runs").exists()
