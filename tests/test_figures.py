"""scripts/plot_runs.py through its command line, on small made-up run folders."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run_cli, run_main
from made_up import make_run
from matplotlib.figure import Figure
from PIL import Image

from utils import logger

import plot_runs  # noqa: E402
import run_folders  # noqa: E402

HISTORY = ",".join(logger.HISTORY)
FIGURES = [
    "loss_curves",
    "loss_parts",
    "beta_schedules",
    "teacher_forcing",
    "teacher_forcing_losses",
    "val_psnr",
    "psnr_per_frame",
    "psnr_summary",
]


def refused(result, *words):
    """Exit status 2, one line on stderr that holds all `words`, no traceback."""
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert all(str(word) in result.stderr for word in words), result.stderr


def test_three_runs_give_every_figure(tmp_path):
    runs = [
        make_run(tmp_path / kind, kind, epochs=12, frames=80)
        for kind in ("Cyclical", "Monotonic", "None")
    ]
    result = run_cli("scripts/plot_runs.py", *runs, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr.lower()
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == sorted(
        [f"{f}.{kind}" for f in FIGURES for kind in ("png", "pdf")] + ["psnr_summary.csv"]
    )
    for figure in FIGURES:
        assert Image.open(tmp_path / "out" / f"{figure}.png").width > 500
        assert (tmp_path / "out" / f"{figure}.pdf").read_bytes().startswith(b"%PDF")


def test_summary_repeats_the_numbers_of_the_run(tmp_path):
    run = make_run(tmp_path / "a", epochs=3, frames=4)
    (run / "psnr_per_frame.csv").write_text("frame,psnr\n1,30\n2,20\n3,25\n4,21\n")
    assert run_main("plot_runs.py", run, "-o", tmp_path / "out").returncode == 0
    (row,) = csv.DictReader((tmp_path / "out" / "psnr_summary.csv").open())
    best = max(
        csv.DictReader((run / "history.csv").open()), key=lambda r: float(r["val_psnr_mean"])
    )["epoch"]
    assert row == {
        "run": "a",
        "epochs": "3",
        "best_epoch": best,
        "psnr_mean": "24.0",
        "psnr_median": "23.0",
        "psnr_first": "30.0",
        "psnr_last": "21.0",
        "psnr_min": "20.0",
        "psnr_min_frame": "2",
        "psnr_max": "30.0",
        "psnr_max_frame": "1",
    }


def test_the_best_epoch_is_the_one_whose_files_are_there(tmp_path):
    """A run that went on in another folder has better epochs in its history, of before."""
    run = make_run(tmp_path / "a", epochs=3, frames=4)
    (run / "psnr_per_frame.csv").write_text("frame,psnr\n1,30\n2,20\n3,25\n4,21\n")
    header, *rows = [line.split(",") for line in (run / "history.csv").read_text().splitlines()]
    for row, mean in zip(rows, ("25", "23", "24")):
        row[header.index("val_psnr_mean")] = mean
    (run / "history.csv").write_text("\n".join(map(",".join, [header, *rows])) + "\n")
    assert run_main("plot_runs.py", run, "-o", tmp_path / "out").returncode == 0
    (row,) = csv.DictReader((tmp_path / "out" / "psnr_summary.csv").open())
    assert row["best_epoch"] == "2"


def test_names_that_no_font_has_are_told_apart(tmp_path):
    names = "\U0001fae8 b", "\U0001fae9"
    runs = [make_run(tmp_path / name, epochs=2, frames=3) for name in names]
    result = run_cli("scripts/plot_runs.py", *runs, "-o", tmp_path / "out")
    assert result.returncode == 0 and result.stderr == ""
    for number, run in enumerate(runs, 1):
        name = run.name.split()[0]
        assert f'no font here has "{name}": figures call it "unnamed {number}"' in result.stdout


@pytest.mark.parametrize("count, epochs", [(1, 1), (6, 2)])
def test_few_epochs_and_many_runs(tmp_path, count, epochs):
    runs = [
        make_run(tmp_path / f"{'_$x_' if i == 0 else 'run'}{i}", "None", epochs=epochs, frames=3)
        for i in range(count)
    ]
    result = run_cli("scripts/plot_runs.py", *runs, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr.lower()


def test_a_figure_without_data_is_left_out_and_said(tmp_path):
    run = make_run(tmp_path / "a", epochs=2, psnr=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "loss_curves_mse.png").write_text("of an earlier call")
    result = run_main("plot_runs.py", run, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "psnr_per_frame: left out" in result.stdout
    assert result.stdout.endswith("of an earlier call: loss_curves_mse\n")
    assert not (tmp_path / "out" / "psnr_per_frame.png").exists()
    assert (tmp_path / "out" / "loss_curves.png").exists()


def drawn(name, *folders):
    """A figure of run folders, as matplotlib has it."""
    figure, _ = plot_runs.make_figure(getattr(plot_runs, name), run_folders.load_runs(folders))
    return figure


def words(figure):
    return " ".join(
        " ".join(text.get_text() for ax in figure.axes for text in [ax.title, *ax.texts]).split()
    )


def test_values_that_are_not_finite_are_named_in_the_figure(tmp_path):
    """The PDF's text is compressed, so the figure is asked through the module."""
    run = make_run(tmp_path / "a", "None", epochs=12, frames=30)
    header, *rows = [line.split(",") for line in (run / "history.csv").read_text().splitlines()]
    rows[4][header.index("train_loss")], rows[4][header.index("val_psnr_mean")] = "nan", "-300"
    (run / "history.csv").write_text("\n".join(map(",".join, [header, *rows])) + "\n")
    assert "Not finite, so not drawn: epoch a 4" in words(drawn("loss_curves", run))
    (run / "psnr_per_frame.csv").write_text("frame,psnr\n1,30\n2,20\n3,nan\n4,21\n")
    assert "Not finite, so not drawn: frame a 3" in words(drawn("psnr_per_frame", run))
    said = "Axis cut: 1 value lies below it (triangles); lowest -300.0 dB, a, epoch 4"
    assert said in words(drawn("val_psnr", run))


def test_curves_are_those_of_steps_csv(tmp_path):
    """By step where there is a steps.csv, by epoch where there is none."""
    run, old = make_run(tmp_path / "a", epochs=4), make_run(tmp_path / "b", epochs=4, steps=False)
    steps = run_folders.read_table(run / "steps.csv", logger.STEPS)
    beta = drawn("beta_schedules", run).axes[0].lines[0]
    assert np.array_equal(beta.get_xdata(), steps["epoch"]) and np.array_equal(
        beta.get_ydata(), steps["beta"]
    )
    assert len(drawn("beta_schedules", old).axes[0].lines[0].get_xdata()) == 4
    # a long run's first row comes after some epochs
    (old / "steps.csv").write_text(",".join(logger.STEPS) + "\n")
    assert len(drawn("beta_schedules", old).axes[0].lines[0].get_xdata()) == 4
    loss = drawn("loss_curves", run).axes[0].lines
    assert np.array_equal(loss[0].get_ydata(), steps["loss"])
    assert np.allclose(
        loss[1].get_xdata(), [0.5, 1.5, 2.5, 3.5]
    )  # means in the middle of their epochs


@pytest.mark.parametrize("steps, frames, end", [
    (480, 960 + 1e-12, 1),   # a stop in a further epoch's validation
    (440, 1760, 440 / 240),  # an epoch of 240 steps of four frames, repeated until time was over
    (124, 496, 124 / 240),   # or ended by it
    (300, 960, 1),           # a whole epoch, and a stop in the next
    (239, 960, 1),           # a last step that is not in the table
])
def test_a_fitted_runs_validation_stands_where_it_was(tmp_path, steps, frames, end):
    run = make_run(tmp_path / "a", epochs=1, frames=3)
    header, row = ((run / "history.csv").read_text().splitlines())
    cells = dict(zip(header.split(","), row.split(",")))
    cells.update(seconds="2", frames_per_second=str(frames / 2))
    (run / "history.csv").write_text(f"{header}\n{','.join(cells.values())}\n")
    lines = [f"{n},{n / 240},0.001,1,1,0,0.1,0.1,0.1,1" for n in range(1, steps + 1)]
    (run / "steps.csv").write_text("\n".join([",".join(logger.STEPS), *lines]) + "\n")
    assert drawn("val_psnr", run).axes[0].lines[0].get_xdata() == pytest.approx([end])
    assert drawn("loss_curves", run).axes[0].lines[1].get_xdata() == pytest.approx([end / 2])


@pytest.mark.parametrize(
    "recipe, weight, name", [("pool", 1e-4, "log-MSE"), ("template", 1, "MSE")]
)
def test_total_is_the_sum_of_what_the_panels_show(tmp_path, recipe, weight, name):
    run = make_run(tmp_path / "a", epochs=6, recipe=recipe, kl_weight=weight)
    figure = drawn("loss_curves", run)
    panel = {ax.get_title(loc="left"): ax.lines[0].get_ydata() for ax in figure.axes}
    part, kl = panel[f"Reconstruction ({name})"], panel["KL (nats)"]
    total = panel["Total loss = reconstruction + weight x KL"]
    assert np.allclose(total, part + panel["Weight on KL: beta x kl_weight"] * kl, rtol=1e-4)
    areas = drawn("loss_parts", run).axes[0].collections
    top = areas[1].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(total.max(), rel=1e-4)


def test_losses_of_different_objectives_share_no_axis(tmp_path):
    folders = [
        make_run(
            tmp_path / recipe / kind, kind, epochs=4, frames=5, recipe=recipe, kl_weight=weight
        )
        for recipe, weight in (("pool", 1e-4), ("template", 1))
        for kind in ("Cyclical", "None")
    ]
    result = run_main("plot_runs.py", *folders, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    for name in ("loss_curves", "loss_parts", "teacher_forcing", "teacher_forcing_losses"):
        assert not (tmp_path / "out" / f"{name}.png").exists()
        assert all(
            (tmp_path / "out" / f"{name}_{kind}.png").exists() for kind in ("mse", "log_mse")
        )
    assert (tmp_path / "out" / "val_psnr.png").exists()


def test_without_annealing_is_called_so(tmp_path):
    runs = [make_run(tmp_path / kind, kind, epochs=8) for kind in ("Cyclical", "None")]
    for name in ("loss_curves", "loss_parts"):
        figure = drawn(name, *runs)
        names = [t.get_text() for t in figure.legends[0].get_texts()] + [
            ax.get_title(loc="left") for ax in figure.axes
        ]
        assert "w/o annealing (beta = 1)" in names and "None" not in names


def test_ratio_forced_share_and_loss_stand_on_one_axis(tmp_path):
    run = make_run(tmp_path / "a", "None", epochs=20, tfr=(1, 5, 0.25))
    top, bottom = drawn("teacher_forcing", run).axes
    assert top.get_shared_x_axes().joined(top, bottom)
    ratio = next(line for line in top.lines if line.get_label() == "ratio").get_ydata()
    share = next(
        line for line in top.lines if line.get_label() == "teacher-forced share"
    ).get_ydata()
    assert ratio[0] == 1 and ratio[-1] == 0 and np.abs(ratio - share).max() < 0.5
    assert {"total loss", "reconstruction"} <= {line.get_label() for line in bottom.lines}


def test_psnr_ends_at_its_floor_of_error(tmp_path):
    run = make_run(tmp_path / "a", epochs=2, frames=3)
    (run / "psnr_per_frame.csv").write_text("frame,psnr\n1,inf\n2,100\n3,100\n")
    assert run_main("plot_runs.py", run, "-o", tmp_path / "out").returncode == 0
    assert "inf" not in (tmp_path / "out" / "psnr_summary.csv").read_text()
    legend = drawn("psnr_per_frame", run).legends[0].get_texts()[0].get_text()
    assert "mean 100.00 dB" in legend


def test_a_note_leaves_the_panels_as_wide_as_each_other(tmp_path):
    runs = [make_run(tmp_path / kind, kind, epochs=8) for kind in ("Cyclical", "Monotonic", "None")]
    table = [line.split(",") for line in (runs[2] / "steps.csv").read_text().splitlines()]
    table[1][table[0].index("loss")] = "5"
    (runs[2] / "steps.csv").write_text("\n".join(map(",".join, table)) + "\n")
    figure = drawn("loss_parts", *runs)
    assert "Axis cut: the total reaches 5" in words(figure)
    plot_runs.render(figure, "png")  # lays it out
    widths = [ax.get_position().width for ax in figure.axes]
    assert max(widths) - min(widths) < 0.01 and sum(widths) > 0.75


def test_a_spike_stays_inside_the_axis(tmp_path):
    run = make_run(tmp_path / "None", "None", epochs=20, frames=5)
    table = [line.split(",") for line in (run / "steps.csv").read_text().splitlines()]
    for name in ("loss", "reconstruction", "mse", "kl"):
        table[30][table[0].index(name)] = str(400 * float(table[30][table[0].index(name)]))
    (run / "steps.csv").write_text("\n".join(map(",".join, table)) + "\n")
    figure = drawn("loss_curves", run)
    for ax in figure.axes:
        for line in ax.lines:
            assert (
                ax.get_ylim()[0] <= line.get_ydata().min()
                and line.get_ydata().max() <= ax.get_ylim()[1]
            )


def test_user_errors_are_one_line_and_write_nothing(tmp_path):
    good = make_run(tmp_path / "good", epochs=2, frames=3)
    out = tmp_path / "out"
    refused(run_cli("scripts/plot_runs.py", tmp_path / "absent", "-o", out), tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    refused(run_main("plot_runs.py", good, tmp_path / "empty", "-o", out), "history.csv")
    (tmp_path / "empty" / "psnr_per_frame.csv").write_text("frame,psnr\n1,30\n")
    refused(run_main("plot_runs.py", tmp_path / "empty", "-o", out), "validation (--test)")
    refused(run_main("plot_runs.py", good, good, "-o", out), "twice")
    refused(run_main("plot_runs.py", good, "-o", good / "history.csv"), "-o")
    assert not out.exists()


@pytest.mark.parametrize(
    "file, text, word",
    [
        ("history.csv", "", "is empty"),
        ("history.csv", HISTORY + "\n", "no rows"),
        ("history.csv", "epoch,lr\n0,1\n", "train_loss"),
        ("history.csv", HISTORY + "\n0,1,1\n", "line 2: 3 values, expected 17"),
        ("history.csv", HISTORY + "\n0,1,x" + ",1" * 14 + "\n", "line 2"),
        ("history.csv", HISTORY + ("\n0" + ",1" * 16) * 2, "count upwards"),
        ("steps.csv", "step,epoch\n1,0.1\n", "reconstruction"),
        ("psnr_per_frame.csv", "frame,psnr\n1,30\n2\n", "line 3"),
        ("psnr_per_frame.csv", "\0\xff", "psnr_per_frame.csv"),
    ],
)
def test_malformed_files(tmp_path, file, text, word):
    run = make_run(tmp_path / "a", epochs=2, frames=3)
    (run / file).write_bytes(text.encode("latin1"))
    refused(run_main("plot_runs.py", run, "-o", tmp_path / "out"), run / file, word)
    assert not (tmp_path / "out").exists()


def test_steps_after_the_last_whole_epoch_are_inside_the_axis():
    """As a run fitted to its minutes has them, whose last epoch is repeated."""
    steps = {"epoch": np.array([0.5, 1.0, 1.1875])}
    run = SimpleNamespace(history={"epoch": np.array([0])}, ends=np.array([1]), steps=steps)
    axes = Figure().subplots()
    plot_runs.epoch_axis(axes, [run])
    assert axes.get_xlim()[1] > 1.1875
