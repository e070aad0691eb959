"""Schedules: teacher forcing, the KL weight, the learning rate, --fast_train's first epochs."""

import argparse
import csv

import pytest
import torch
from conftest import TINY

import Trainer
from utils.cli import UserError
from utils.schedules import beta_at, data_share, learning_rate_factor, teacher_forcing_ratio
from Trainer import kl_annealing


def flags(*words):
    return Trainer.build_parser().parse_args(list(words))


def betas(kind="Cyclical", cycles=10, ratio=1.0, epochs=70, past=0):
    """get_beta() of every epoch, and of some past the last."""
    args = argparse.Namespace(
        kl_anneal_type=kind, kl_anneal_cycle=cycles, kl_anneal_ratio=ratio, num_epoch=epochs
    )
    schedule = kl_annealing(args)
    values = []
    for _ in range(epochs + past):
        values.append(schedule.get_beta())
        schedule.update()
    return values


def fu(n_iter, start=0.0, stop=1.0, n_cycle=4, ratio=0.5):
    """Fu et al. 2019, eq. 6 to 8: tau = mod(t - 1, T / M) / (T / M), linear up to R, then stop."""
    values = [stop] * n_iter
    period = n_iter / n_cycle
    for cycle in range(n_cycle):
        first = int(cycle * period)
        i = 0
        while start + i * (stop - start) / (period * ratio) <= stop + 1e-9 and first + i < n_iter:
            values[first + i] = start + i * (stop - start) / (period * ratio)
            i += 1
    return values


# ---------------------------------------------------------------- teacher forcing


@pytest.mark.parametrize(
    "tfr, sde, step, expected",
    [
        (1.0, 10, 0.1, [1.0] * 10 + [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0, 0, 0]),
        (1.0, 0, 0.25, [0.75, 0.5, 0.25, 0, 0, 0]),
        (0.5, 2, 0.0, [0.5] * 6),
        (0.3, 1, 1.0, [0.3, 0, 0]),
        (0.0, 3, 0.1, [0.0] * 5),
    ],
)
def test_teacher_forcing(tfr, sde, step, expected):
    words = ["--tfr", str(tfr), "--tfr_sde", str(sde), "--tfr_d_step", str(step)]
    args = flags(*words, "--tfr_min", "0", *TINY)
    found = [teacher_forcing_ratio(args, epoch) for epoch in range(len(expected))]
    assert found == pytest.approx(expected)
    model, found = Trainer.VAE_Model(args), []
    for model.current_epoch in range(len(expected)):
        model.teacher_forcing_ratio_update()
        found.append(model.tfr)
    assert found == pytest.approx(expected)
    for floor in (0.035, 0.5, 1.0):
        args = flags(*words, "--tfr_min", str(floor))
        ratios = [teacher_forcing_ratio(args, epoch) for epoch in range(len(expected))]
        assert ratios == pytest.approx([max(floor, ratio) for ratio in expected])


@pytest.mark.parametrize("recipe, floor", [("pool", 0.035), ("template", 0.0)])
def test_the_ratio_falls_from_1_to_the_recipes_floor(recipe, floor):
    args = flags("--recipe", recipe)
    ratios = [teacher_forcing_ratio(args, epoch) for epoch in range(70)]
    assert ratios[:11] == pytest.approx([1] * 10 + [0.9]) and ratios[18] == pytest.approx(0.1)
    assert ratios[20:] == [floor] * 50


# ---------------------------------------------------------------- the KL weight


def test_the_templates_schedule():
    assert betas() == pytest.approx([i / 7 for i in range(7)] * 10)


@pytest.mark.parametrize(
    "kind, cycles, ratio, epochs, expected",
    [
        ("Cyclical", 2, 1.0, 10, [0, 0.2, 0.4, 0.6, 0.8] * 2),
        ("Cyclical", 2, 0.5, 10, [0, 0.4, 0.8, 1, 1] * 2),
        ("Cyclical", 1, 0.5, 8, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]),
        ("Monotonic", 4, 0.5, 8, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]),
        ("Monotonic", 9, 1.0, 4, [0, 0.25, 0.5, 0.75]),
        ("None", 2, 0.5, 5, [1] * 5),
        ("Cyclical", 1, 1.0, 1, [0]),
        ("Monotonic", 1, 0.01, 3, [0, 1, 1]),
    ],
)
def test_values(kind, cycles, ratio, epochs, expected):
    assert betas(kind, cycles, ratio, epochs) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["None", "none", "NONE", "Without", "without", "WITHOUT", None])
def test_no_annealing_has_many_names(name):
    assert betas(name, epochs=4) == [1.0] * 4
    if name is not None:
        assert flags("--kl_anneal_type", name).kl_anneal_type == "None"


@pytest.mark.parametrize("name", ["cyclical", "CYCLICAL", "monotonic", "MONOTONIC"])
def test_names_in_any_case(name):
    names = name, name.capitalize(), flags("--kl_anneal_type", name).kl_anneal_type
    first, *others = (betas(kind, 2, epochs=6) for kind in names)
    assert all(other == first for other in others)


@pytest.mark.parametrize("n_iter", [1, 2, 7, 10, 70, 101])
@pytest.mark.parametrize("n_cycle", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("ratio", [1, 0.5, 0.3, 0.05])
def test_against_the_papers_definition(n_iter, n_cycle, ratio):
    if n_cycle > max(1, n_iter // 2):
        return
    for start, stop in ((0.0, 1.0), (0.2, 0.7)):
        found = kl_annealing.frange_cycle_linear(n_iter, start, stop, n_cycle, ratio)
        assert len(found) == n_iter
        assert found == pytest.approx(fu(n_iter, start, stop, n_cycle, ratio))
        assert all(start <= value <= stop for value in found)
        assert found[0] == start


def test_frange_cycle_linear_has_the_templates_defaults():
    schedule = kl_annealing(flags("--num_epoch", "4"))
    assert schedule.frange_cycle_linear(4) == [0, 0.25, 0.5, 0.75]
    explicit = schedule.frange_cycle_linear(4, start=0.0, stop=1.0, n_cycle=1, ratio=1)
    assert explicit == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("cycles, epochs, used", [(10, 6, 3), (10, 1, 1), (4, 7, 3), (2, 3, 1)])
def test_more_cycles_than_epochs_hold(cycles, epochs, used, capsys):
    found = betas("Cyclical", cycles, 0.5, epochs)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and str(cycles) in said and str(used) in said
    assert found == pytest.approx(fu(epochs, 0.0, 1.0, used, 0.5))


@pytest.mark.parametrize(
    "kind, cycles, epochs", [("Cyclical", 3, 6), ("Monotonic", 10, 2), ("None", 10, 2)]
)
def test_nothing_is_reported_where_the_cycles_fit(kind, cycles, epochs, capsys):
    betas(kind, cycles, 0.5, epochs)
    assert capsys.readouterr().out == ""


def test_the_pool_recipe_has_room_for_every_cycle(capsys):
    schedule = kl_annealing(flags("--num_epoch", "1"))
    assert capsys.readouterr().out == "" and schedule.get_beta() == 0
    betas = [beta_at(flags("--num_epoch", "1"), k / 80) for k in range(81)]
    assert betas == pytest.approx([k % 8 / 8 for k in range(80)] + [1])
    words = ["--num_epoch", "5", "--kl_anneal_type", "Monotonic", "--kl_anneal_ratio", "0.5"]
    monotonic = flags(*words)
    assert [beta_at(monotonic, e) for e in (0, 1.25, 2.5, 4, 5)] == pytest.approx([0, 0.5, 1, 1, 1])


@pytest.mark.parametrize("epochs, cycles, ratio", [(20, 3, 1.0), (10, 4, 0.5), (6, 10, 1.0)])
def test_an_annealing_object_of_the_pool_recipe_has_whole_epochs_too(epochs, cycles, ratio):
    args = flags("--num_epoch", str(epochs), "--kl_anneal_cycle", str(cycles),
                 "--kl_anneal_ratio", str(ratio))
    found = [kl_annealing(args, epoch).get_beta() for epoch in range(epochs)]
    assert found == kl_annealing.frange_cycle_linear(epochs, 0.0, 1.0, cycles, ratio)
    at_the_end = beta_at(args, epochs - 1e-9)
    assert at_the_end == pytest.approx(1.0) and found[-1] <= 1


def test_cut_cycles_are_reported_once_in_a_run(tiny_data, tmp_path, capsys):
    words = [
        "--DR", str(tiny_data), *TINY, "--recipe", "template", "--train_vi_len", "8",
        "--kl_anneal_cycle", "3"
    ]
    Trainer.main([*words, "--save_root", str(tmp_path / "first"), "--num_epoch", "1"])
    assert capsys.readouterr().out.count("epochs hold") == 1
    words += ["--ckpt_path", str(tmp_path / "first/last.ckpt")]
    Trainer.main([*words, "--save_root", str(tmp_path / "more")])
    assert capsys.readouterr().out.count("epochs hold") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"cycles": 0}, {"cycles": -1}, {"ratio": 0.0}, {"ratio": 1.5}, {"ratio": -0.1},
        {"ratio": float("nan")}, {"kind": "Cosine"}
    ],
)
def test_errors(change):
    with pytest.raises(UserError, match="--kl_anneal"):
        betas(**change)


@pytest.mark.parametrize("cycles, ratio", [(0, 1), (-1, 1), (1, 0), (1, -0.5), (1, 1.5)])
def test_errors_of_the_list(cycles, ratio):
    with pytest.raises(UserError, match="n_cycle"):
        kl_annealing.frange_cycle_linear(10, 0.0, 1.0, cycles, ratio)


def test_past_the_last_epoch():
    assert betas("Monotonic", 1, 1.0, 4, past=3) == [0, 0.25, 0.5, 0.75, 0.75, 0.75, 0.75]
    args = flags("--num_epoch", "4", "--kl_anneal_type", "Monotonic")
    assert kl_annealing(args, current_epoch=2).get_beta() == 0.5


# ---------------------------------------------------------------- learning rate, --fast_train


def test_the_templates_steps():
    args = flags("--recipe", "template")
    found = [learning_rate_factor(args, epoch, 0.5) for epoch in range(8)]
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01])


def test_the_steps_of_the_pool_recipe_move_with_the_share():
    args = flags("--schedule", "step", "--num_epoch", "10")
    found = [learning_rate_factor(args, 0, share) for share in (0, 0.19, 0.2, 0.49, 0.5, 1)]
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_with_warm_up():
    args = flags("--num_epoch", "5")
    factors = [learning_rate_factor(args, 0, done / 1000) for done in range(1001)]
    assert 0 < factors[0] < 0.1 and factors.index(max(factors)) in range(15, 25)
    assert max(factors) > 0.99
    assert factors[-1] == pytest.approx(0, abs=1e-9)
    assert sorted(factors[25:], reverse=True) == factors[25:]
    assert factors[500] == pytest.approx(0.5, abs=0.01)


def history(data, folder, *words):
    sizes = [*TINY, "--val_vi_len", "4", "--num_epoch", "4"]
    Trainer.main(["--DR", str(data), "--save_root", str(folder), *sizes, *words])
    rows = list(csv.DictReader(open(folder / "history.csv", newline="", encoding="utf-8")))
    assert [row["epoch"] for row in rows] == list("0123")
    lrs = [float(row["lr"]) for row in rows]
    frames = [round(float(row["seconds"]) * float(row["frames_per_second"])) for row in rows]
    return lrs, frames


@pytest.mark.parametrize(
    "recipe, words, whole",
    [
        ("template", ["--train_vi_len", "4"], 48),  # 16 windows of 4 frames, 3 of them predicted
        ("pool", ["--batch_size", "16"], 64),
    ],
)
def test_fast_train_shortens_its_epochs_at_a_larger_lr(recipe, words, whole, tiny_data, tmp_path):
    words = ["--recipe", recipe, *words]
    plain, all_frames = history(tiny_data, tmp_path / "plain", *words)
    assert all_frames == [whole] * 4
    fast = ["--fast_train", "--fast_train_epoch", "2", "--fast_partial", "0.5"]
    lrs, frames = history(tiny_data, tmp_path / "fast", *words, *fast)
    assert frames == [whole // 2, whole // 2, whole, whole]
    assert min(lrs[:2]) > max(lrs[2:]) and max(lrs) > 1.05 * max(plain)

    default = Trainer.build_parser().parse_args(words).lr
    explicit, frames = history(
        tiny_data, tmp_path / "explicit", *words, *fast, "--lr", str(default)
    )
    assert frames == [whole // 2, whole // 2, whole, whole]
    assert max(explicit) <= default
    assert explicit == pytest.approx([lrs[0] / 1.1, lrs[1] / 1.1, *lrs[2:]], rel=1e-6)
    if recipe == "template":
        assert plain == pytest.approx([0.001, 0.001, 0.0001, 0.0001])
        assert lrs == pytest.approx([0.0011, 0.0011, 0.0001, 0.0001])


@pytest.mark.parametrize(
    "epochs, shortened, share",
    [(3, 1, 0.4), (8, 3, 0.4), (70, 5, 0.4), (500, 5, 0.4), (70, 5, 0.05)],
)
def test_every_shortened_epoch_has_a_larger_learning_rate(epochs, shortened, share):
    args = flags(
        "--fast_train", "--num_epoch", str(epochs), "--fast_train_epoch", str(shortened),
        "--fast_partial", str(share)
    )
    ends = [0.0]
    for epoch in range(epochs):
        ends.append(ends[-1] + data_share(args, epoch))
    means = []
    for epoch, (first, last) in enumerate(zip(ends, ends[1:])):
        shares = [(first + (last - first) * step / 200) / ends[-1] for step in range(200)]
        means.append(sum(learning_rate_factor(args, epoch, share) for share in shares) / 200)
    assert min(means[:shortened]) > max(means[shortened:])


@pytest.mark.parametrize("recipe", ["pool", "template"])
def test_a_step_outside_a_training_stage_has_the_whole_lr(recipe):
    model = Trainer.VAE_Model(flags("--recipe", recipe, "--lr", "0.004", *TINY))
    img = torch.rand(1, 3, 3, 16, 32)
    for _ in range(2):
        model.training_one_step(img, img, False)
        assert model.optim.param_groups[0]["lr"] == pytest.approx(0.004, rel=0.01)


def test_fast_train_with_a_share_of_the_rest(tiny_data, tmp_path):
    _, frames = history(
        tiny_data, tmp_path, "--recipe", "template", "--train_vi_len", "4", "--fast_train",
        "--fast_train_epoch", "1", "--fast_partial", "0.25", "--partial", "0.75"
    )
    assert frames == [12, 36, 36, 36]


# ---------------------------------------------------------------- how they move within a run


def steps_of(data, folder, *words):
    """The columns of steps.csv, as lists of numbers, of a run of `words`."""
    words = [*TINY, "--val_vi_len", "4", *words]
    Trainer.main(["--DR", str(data), "--save_root", str(folder), *words])
    with open(folder / "steps.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def test_a_pool_run_of_one_epoch_has_whole_curves(tiny_data, tmp_path):
    words = ["--num_epoch", "1", "--batch_size", "1"]
    words += ["--tfr_sde", "1", "--tfr_d_step", "1", "--tfr_min", "0.25"]
    found = steps_of(tiny_data, tmp_path, *words)
    shares = [step / 64 for step in range(64)]
    assert found["step"] == list(range(1, 65))
    assert found["epoch"] == [step / 64 for step in range(1, 65)]
    assert found["tfr"] == pytest.approx([max(0.25, 1 - share) for share in shares])
    assert found["beta"] == pytest.approx([10 * share % 1 for share in shares])
    assert min(found["beta"]) == 0 and max(found["beta"]) > 0.8
    falls = [b for a, b in zip(found["beta"], found["beta"][1:]) if b < a]
    assert len(falls) == 9  # ten cycles
    args = flags("--num_epoch", "1")
    lrs = [args.lr * learning_rate_factor(args, 0, share) for share in shares]
    assert found["lr"] == pytest.approx(lrs)
    assert len(set(found["lr"])) == 64 and found["lr"][-1] < 0.01 * args.lr


def test_a_number_of_epochs_that_a_script_sets_holds_for_beta_too(tiny_data, tmp_path):
    words = ["--DR", str(tiny_data), "--save_root", str(tmp_path), *TINY, "--val_vi_len", "4"]
    model = Trainer.VAE_Model(flags(*words, "--num_epoch", "70", "--kl_anneal_type", "Monotonic"))
    model.args.num_epoch = 2
    model.training_stage()
    betas = [row["beta"] for row in model.state.steps]
    assert betas == pytest.approx([step / 32 for step in range(32)])


def test_the_templates_recipe_moves_by_whole_epochs(tiny_data, tmp_path):
    words = ["--recipe", "template", "--train_vi_len", "4", "--num_epoch", "4"]
    words += ["--tfr_sde", "1", "--tfr_d_step", "0.5", "--kl_anneal_cycle", "2"]
    found = steps_of(tiny_data, tmp_path, *words)
    each = lambda *values: [value for value in values for _ in range(8)]  # 8 steps an epoch
    assert found["epoch"] == [step / 8 for step in range(1, 33)]
    assert found["tfr"] == pytest.approx(each(1, 0.5, 0, 0))
    assert found["beta"] == pytest.approx(each(0, 0.5, 0, 0.5))
    assert found["lr"] == pytest.approx(each(1e-3, 1e-3, 1e-4, 1e-4))


def test_cut_cycles_are_the_run(tiny_data, tmp_path, capsys):
    words = ["--num_epoch", "2", "--kl_anneal_ratio", "0.5"]
    windows = ["--recipe", "template", "--train_vi_len", "4"]
    found = steps_of(tiny_data, tmp_path / "template", *windows, *words)
    said = capsys.readouterr().out
    assert said.count("--kl_anneal_cycle 10 is more than 2 epochs hold: 1 used") == 1
    assert found["beta"] == [0] * 8 + [1] * 8
    found = steps_of(tiny_data, tmp_path / "pool", *words, "--kl_anneal_cycle", "4")
    assert "epochs hold" not in capsys.readouterr().out
    assert found["beta"] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1, 1] * 4)


def test_a_pool_of_long_windows_reports_its_steps(tiny_data, tmp_path, capsys):
    words = ["--train_vi_len", "16", "--batch_size", "2", "--num_epoch", "1"]
    found = steps_of(tiny_data, tmp_path, *words, "--tfr_sde", "0", "--tfr_d_step", "1")
    said = capsys.readouterr().out
    assert "2 steps an epoch (--train_vi_len 16: a step predicts 15 frames of each rollout)" in said
    assert found["step"] == [1, 2] and found["tfr"] == [0.035] * 2


def test_the_gradient_goes_through_a_long_window_of_the_pool():
    """Free running, the last frame's error reaches the first frame: every step's graph is kept."""
    model = Trainer.VAE_Model(flags(*TINY, "--train_vi_len", "16", "--seed", "3"))
    img = torch.rand(1, 16, 3, 16, 32).requires_grad_()
    for teacher_forced, reaches in ((False, True), (True, False)):
        *_, last = model(img, img.detach(), teacher_forced)
        (gradient,) = torch.autograd.grad(last.sum(), img)
        assert bool(gradient[:, 0].abs().sum() > 0) == reaches
