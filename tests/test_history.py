"""history.csv and steps.csv: their columns, and that every row adds up to the training loss."""

import csv
import signal
import statistics

import pytest
from conftest import TINY, in_process, send_at

import Trainer
from utils import logger

HISTORY = (
    "epoch,lr,tfr,tf_share,beta,kl_weight,train_loss,train_reconstruction,train_mse,train_kl,"
    "val_mse,val_psnr_mean,"
    "val_psnr_min,val_psnr_last,skipped_steps,seconds,frames_per_second"
)
STEPS = "step,epoch,lr,tfr,tf_share,beta,loss,reconstruction,mse,kl"
# schedules that move in every step of two epochs; a KL term about as large as the reconstruction
MOVING = ["--tfr_sde", "1", "--tfr_d_step", "0.4", "--kl_weight", "0.001", "--seed", "5"]


def train(data, folder, *words):
    return in_process(
        Trainer.main, "--DR", data, "--save_root", folder, *TINY, "--val_vi_len", "4", *words
    )


def table(path):
    """The columns of a CSV as lists of numbers."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


@pytest.fixture(scope="module", params=["pool", "template"])
def run(request, tiny_data, tmp_path_factory):
    """(folder, steps an epoch) of a run of two epochs in either recipe."""
    folder = tmp_path_factory.mktemp("history") / request.param
    steps = {"pool": 16, "template": 8}[request.param]
    words = [
        "--recipe",
        request.param,
        *(["--train_vi_len", "4"] if request.param == "template" else []),
    ]
    assert train(tiny_data, folder, *words, *MOVING) == 0
    return folder, steps


def test_the_first_lines_have_every_setting_unlike_the_templates(tiny_data, tmp_path, capsys):
    words = ["--per_save", "1", "--num_workers", "0", "--max_minutes", "5", "--num_epoch", "1"]
    assert train(tiny_data, tmp_path / "run", *words) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "unlike" in line)
    assert all(f"{flag} {value}" in line for flag, value in zip(words[::2], words[1::2]))
    assert "--pool 64" in line and "--lr 0.002" in line
    assert not any(f"--{name}" in line for name in ("tfr ", "save_root", "compile", "no-compile"))


def test_columns(run):
    folder, _ = run
    for name, columns in (("history.csv", HISTORY), ("steps.csv", STEPS)):
        assert (folder / name).read_text(encoding="utf-8").splitlines()[0] == columns


def test_a_short_run_has_a_row_for_every_step_and_it_adds_up(run):
    folder, each = run
    steps = table(folder / "steps.csv")
    assert steps["step"] == list(range(1, 2 * each + 1))
    assert steps["epoch"] == [step / each for step in steps["step"]]
    assert all(
        value > 0
        for name in ("lr", "tfr", "loss", "reconstruction", "mse", "kl")
        for value in steps[name]
    )
    assert len(set(steps["loss"])) == 2 * each
    assert steps["loss"] == pytest.approx(
        [
            reconstruction + beta * 0.001 * kl
            for reconstruction, beta, kl in zip(steps["reconstruction"], steps["beta"], steps["kl"])
        ],
        rel=1e-5,
    )


def test_the_history_is_the_mean_over_an_epochs_steps(run):
    folder, each = run
    steps, history = table(folder / "steps.csv"), table(folder / "history.csv")
    pairs = [(name, name) for name in ("lr", "tfr", "tf_share", "beta")]
    pairs += [(f"train_{name}", name) for name in ("loss", "reconstruction", "mse", "kl")]
    for column, name in pairs:
        means = [statistics.fmean(steps[name][:each]), statistics.fmean(steps[name][each:])]
        assert history[column] == pytest.approx(means, rel=1e-6, abs=1e-12), column
    weighed = [beta * 0.001 * kl for beta, kl in zip(steps["beta"], steps["kl"])]
    means = [statistics.fmean(weighed[:each]), statistics.fmean(weighed[each:])]
    found = [
        loss - term for loss, term in zip(history["train_loss"], history["train_reconstruction"])
    ]
    assert found == pytest.approx(means, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("recipe, words", [("pool", []), ("template", ["--train_vi_len", "4"])])
def test_a_flat_betas_loss_is_reconstruction_and_weighed_kl(
    recipe, words, tiny_data, tmp_path
):
    assert (
        train(
            tiny_data,
            tmp_path,
            "--recipe",
            recipe,
            *words,
            "--kl_anneal_type",
            "None",
            "--kl_weight",
            "0.003",
        )
        == 0
    )
    history = table(tmp_path / "history.csv")
    assert history["beta"] == [1, 1] and history["kl_weight"] == [0.003] * 2
    found = [
        loss - term for loss, term in zip(history["train_loss"], history["train_reconstruction"])
    ]
    assert found == pytest.approx([0.003 * kl for kl in history["train_kl"]], rel=1e-5)
    if recipe == "template":  # whose reconstruction is the mean squared error
        assert history["train_reconstruction"] == history["train_mse"]


def test_a_long_runs_rows_are_means_and_a_stop_leaves_no_trace(
    tiny_data, tmp_path, monkeypatch
):
    """Five rows for 32 steps in place of 2,000 for more; stopped between two rows, then resumed."""
    assert logger.STEP_ROWS == 2000
    assert train(tiny_data, tmp_path / "each", *MOVING) == 0
    monkeypatch.setattr(logger, "STEP_ROWS", 5)
    assert train(tiny_data, tmp_path / "whole", *MOVING) == 0
    each, whole = (table(tmp_path / name / "steps.csv") for name in ("each", "whole"))
    ends = [int(step) for step in whole["step"]]
    assert len(ends) == 5 and ends[-1] == 32
    for name in ("lr", "tfr", "beta", "loss", "reconstruction", "mse", "kl", "tf_share"):
        means = [statistics.fmean(each[name][first:last]) for first, last in zip([0, *ends], ends)]
        assert whole[name] == pytest.approx(means, rel=1e-6, abs=1e-12), name
    assert whole["epoch"] == [end / 16 for end in ends]

    with monkeypatch.context() as patched:
        send_at(patched, "training_one_step", 10, signal.SIGTERM)
        assert train(tiny_data, tmp_path / "stopped", *MOVING) == 143
    assert train(tiny_data, tmp_path / "stopped", *MOVING, "--resume") == 0
    assert (tmp_path / "stopped" / "steps.csv").read_bytes() == (
        tmp_path / "whole" / "steps.csv"
    ).read_bytes()


def test_a_run_that_is_made_longer_records_its_new_steps_too(tiny_data, tmp_path):
    assert train(tiny_data, tmp_path, "--num_epoch", "1") == 0
    assert train(tiny_data, tmp_path, "--num_epoch", "2", "--resume") == 0
    assert table(tmp_path / "steps.csv")["step"] == list(range(1, 33))
