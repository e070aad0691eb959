"""A run that is stopped and resumed ends bitwise identical to one that was not.

`scripts/kill_test.py` is the long version.
"""

import shutil
import signal
import time

import pytest
import torch

import dataloader
import Trainer
from conftest import TINY, in_process, send_at
from utils.files import ROLLOUT_FILES
from utils.schedules import learning_rate_factor
from scripts.kill_test import command, compare, differences, kill_test, rows


def train(data, folder, *flags):
    return in_process(Trainer.main, "--DR", data, "--save_root", folder, *TINY, *flags)


def load(path):
    return torch.load(path, weights_only=True)


def test_two_kills(tiny_data, tmp_path):
    """SIGKILL at random times, one of them inside a write, both recipes.

    What is not killed runs in this process.
    """

    def finish(*args, **options):
        began = time.monotonic()
        return (
            in_process(Trainer.main, *command(*args, **options)[2:]), "see the captured output",
            time.monotonic() - began
        )

    equal, in_write, problems = kill_test(
        tiny_data, tmp_path, 2, variants=("pool", "template, loader processes"), finish=finish
    )
    assert (equal, problems) == (2, [])
    assert in_write >= 1


def test_the_comparison_sees_one_bit(tiny_run, tmp_path):
    copy = shutil.copytree(tiny_run, tmp_path / "copy")
    assert compare(copy, tiny_run) == []
    changed = load(copy / "last.ckpt")
    changed["resume"]["pool"] = None
    weights = changed["state_dict"]["Generator.7.bias"]
    weights.view(torch.int32)[0] ^= 1
    torch.save(changed, copy / "last.ckpt")
    assert "last.ckpt['state_dict']['Generator.7.bias']" in compare(copy, tiny_run)
    # equal as numbers, not bitwise
    assert differences({"a": torch.zeros(1)}, {"a": -torch.zeros(1)}) == ["['a']"]


def test_a_checkpoint_that_is_named_is_what_a_test_loads(tiny_data, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "last.ckpt").write_text("nothing that loads")
    assert train(tiny_data, folder, "--resume", "--test") == 2
    best = str(folder / "best.ckpt")
    assert train(tiny_data, folder, "--resume", "--test", "--ckpt_path", best) == 0


def test_another_optimizer_starts_without_state_and_says_so(tiny_data, tiny_run, tmp_path, capsys):
    for optim, said in (("Adam", 1), ("Muon", 0)):
        folder = shutil.copytree(tiny_run, tmp_path / optim)
        assert train(tiny_data, folder, "--resume", "--optim", optim, "--num_epoch", "3") == 0
        assert capsys.readouterr().out.count("another optimizer's") == said


def test_a_finished_run_says_so(tiny_data, tiny_run, tmp_path, capsys):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert train(tiny_data, folder, "--resume") == 0
    assert "all 2 epochs are done" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    (folder / "val_pred_large.gif").unlink()  # as after a kill in a run's last file
    (folder / ".val_pred_large.gif.123.part.gif").write_bytes(b"half a GIF")
    assert train(tiny_data, folder, "--resume") == 0
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_finished_run_that_was_fitted_to_minutes_says_so(tiny_data, tmp_path, capsys):
    flags = ["--num_epoch", "100000", "--max_minutes", "0.1"]
    assert train(tiny_data, tmp_path / "run", *flags) == 0
    before = (tmp_path / "run" / "last.ckpt").read_bytes()
    assert train(tiny_data, tmp_path / "run", *flags, "--resume") == 0
    assert "epochs are done" in capsys.readouterr().out
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == before


def test_a_checkpoint_of_another_run_meanwhile_is_refused(
    tiny_data, tiny_run, tmp_path, capsys, monkeypatch
):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    original = dataloader.open_training_data

    def slow(self):
        shutil.copy(folder / "best.ckpt", folder / "new")
        (folder / "new").rename(folder / "last.ckpt")  # as a run that is about to stop does
        original(self)

    monkeypatch.setattr(dataloader, "open_training_data", slow)
    assert train(tiny_data, folder, "--num_epoch", "3", "--resume") == 2
    assert "last.ckpt: another run has written it" in capsys.readouterr().err
    assert (folder / "last.ckpt").read_bytes() == (folder / "best.ckpt").read_bytes()


def test_from_scratch_where_there_is_nothing_to_resume(tiny_data, tiny_run, tmp_path, capsys):
    assert train(tiny_data, tmp_path / "new", "--resume") == 0
    assert "last.ckpt, so this starts from scratch" in capsys.readouterr().out
    assert compare(tmp_path / "new", tiny_run) == []  # and --seed repeats a run bitwise


def test_more_epochs_and_other_data_are_reported(tiny_data, tiny_run, tmp_path, capsys):
    data, folder = tmp_path / "data", shutil.copytree(tiny_run, tmp_path / "run")
    shutil.copytree(tiny_data, data, ignore=shutil.ignore_patterns(".frame_cache"))
    for kind in ("img", "label"):
        for number in range(56, 64):
            (data / "train" / f"train_{kind}" / f"{number}.png").unlink()
    assert train(data, folder, "--resume", "--num_epoch", 3) == 0
    out = capsys.readouterr().out
    assert "--num_epoch 3: the checkpoint has 2" in out
    assert f"--DR {data}: the checkpoint has {tiny_data}" in out
    assert "56 training frames, the checkpoint's run had 64" in out
    assert [row["epoch"] for row in rows(folder / "history.csv")] == ["0", "1", "2"]
    assert rows(folder / "history.csv")[:2] == rows(tiny_run / "history.csv")


@pytest.mark.parametrize(
    "flag, value", [("--F_dim", 32), ("--L_dim", 4), ("--N_dim", 8), ("--D_out_dim", 32)]
)
def test_another_size_is_an_error(tiny_data, tiny_run, tmp_path, capsys, flag, value):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    before = (folder / "last.ckpt").read_bytes()
    assert train(tiny_data, folder, "--resume", "--num_epoch", 3, flag, value) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "last.ckpt" in err and flag in err
    assert (folder / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize("flags", [("--pool", 16), ("--frame_H", 8)])
def test_another_pool_or_frame_shape_resumes(tiny_data, tiny_run, tmp_path, capsys, flags):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    assert train(tiny_data, folder, "--resume", "--num_epoch", 3, *flags) == 0
    assert f"{flags[0]} {flags[1]}: the checkpoint has" in capsys.readouterr().out


def test_scores_of_other_validations_do_not_compete(tiny_data, tiny_run, tmp_path, capsys):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    saved = load(folder / "last.ckpt")
    saved["resume"]["state"]["best_psnr"] = 40.0  # as after shorter rollouts
    torch.save(saved, folder / "last.ckpt")
    flags = "--resume", "--num_epoch", 3
    whole = shutil.copytree(folder, tmp_path / "whole")
    assert train(tiny_data, whole, *flags) == 0
    assert load(whole / "best.ckpt")["last_epoch"] < 2
    assert train(tiny_data, folder, *flags, "--val_vi_len", 10) == 0
    assert "--val_vi_len 10: PSNR does not compare" in capsys.readouterr().out
    assert load(folder / "best.ckpt")["last_epoch"] == 2
    assert len(rows(folder / "psnr_per_frame.csv")) == 9


@pytest.mark.parametrize("recipe", ["pool", "template", "template --lr 0.002"])
def test_a_third_party_checkpoints_rate_is_not_the_runs_peak(
    tiny_data, tiny_run, tmp_path, monkeypatch, recipe
):
    """A template's checkpoint holds the last epoch's learning rate, a hundredth of the peak."""
    weights = load(tiny_run / "last.ckpt")["state_dict"]
    torch.save({"state_dict": weights, "optimizer": weights, "lr": 1e-5, "tfr": 0.5,
                "last_epoch": 5}, tmp_path / "theirs.ckpt")
    own = "--num_epoch", 8, "--recipe", *recipe.split()
    flags = "--ckpt_path", tmp_path / "theirs.ckpt", "--train_vi_len", 2, *own
    assert train(tiny_data, tmp_path / "whole", *flags) == 0
    with monkeypatch.context() as patch:
        send_at(patch, "training_one_step", 5, signal.SIGINT)
        assert train(tiny_data, tmp_path / "run", *flags) == 130
    assert train(tiny_data, tmp_path / "run", "--resume", *own) == 0
    assert compare(tmp_path / "run", tmp_path / "whole") == []


def test_a_finished_run_is_not_written_into_another_folder(tiny_data, tiny_run, tmp_path, capsys):
    flags = "--ckpt_path", tiny_run / "last.ckpt", "--resume"
    for folder in (tmp_path / "new", tmp_path):
        assert train(tiny_data, folder, *flags) == 0
        assert "all 2 epochs are done" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe, batch", [("pool", 2), ("template", 1)])
def test_another_batch_size_moves_no_schedule_and_skips_no_data(
    tiny_data, tmp_path, monkeypatch, capsys, recipe, batch
):
    """Stopped in the middle of the second of two epochs, and resumed with twice the batch."""
    flags = ["--recipe", recipe, "--train_vi_len", 2, "--schedule", "cosine"]
    flags += ["--tfr_sde", 1, "--tfr_d_step", 0.5]
    with monkeypatch.context() as patch:
        send_at(patch, "training_one_step", 48, signal.SIGTERM)
        assert train(tiny_data, tmp_path, *flags, "--batch_size", batch) == 143
    assert train(tiny_data, tmp_path, *flags, "--batch_size", 2 * batch, "--resume") == 0
    assert "16 steps an epoch, the checkpoint's run had 32" in capsys.readouterr().out
    found = [{name: float(cell) for name, cell in row.items()}
             for row in rows(tmp_path / "steps.csv")]
    assert [row["step"] for row in found] == list(range(1, 57))  # 8 of 16 steps are left
    ends = [step / 32 for step in range(1, 49)] + [1 + step / 16 for step in range(9, 17)]
    assert [row["epoch"] for row in found] == pytest.approx(ends)
    args = Trainer.build_parser().parse_args(["--schedule", "cosine", "--num_epoch", "2"])
    shares = [step / 64 for step in range(48)] + [(16 + step) / 32 for step in range(8, 16)]
    factors = [learning_rate_factor(args, 0, share) for share in shares]
    peak = found[32]["lr"] / factors[32]
    assert [row["lr"] / peak for row in found] == pytest.approx(factors)
    if recipe == "pool":
        assert [row["tfr"] for row in found] == pytest.approx(
            [max(0.035, 1 - 0.5 * 2 * share) for share in shares])


def test_resuming_from_any_checkpoint_of_ours(tiny_data, tiny_run, tmp_path):
    assert train(tiny_data, tmp_path / "on", "--ckpt_path", tiny_run / "epoch=0.ckpt") == 0
    resumed, whole = (load(folder / "last.ckpt") for folder in (tmp_path / "on", tiny_run))
    assert differences(resumed, whole) == []
    assert rows(tmp_path / "on" / "history.csv") == rows(tiny_run / "history.csv")
    assert {p.name for p in (tmp_path / "on").iterdir()} >= {
        "best.ckpt", "val_pred.gif", "psnr_per_frame.csv", "psnr_per_frame.png"
    }


def test_another_ratio_holds_from_the_next_epoch_on(tiny_data, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    assert train(tiny_data, folder, "--resume", "--num_epoch", 3, "--tfr", 0.5) == 0
    assert [float(row["tfr"]) for row in rows(folder / "history.csv")] == [1, 1, 0.5]


@pytest.mark.parametrize("there", [True, False])
def test_resuming_in_another_folder_keeps_the_best(
    tiny_data, tiny_run, tmp_path, monkeypatch, capsys, there
):
    """It is copied from beside the checkpoint; where it is missing, the run says so."""
    def eval(model):
        score(model)
        return scores[model.current_epoch]

    # two epochs before, with above 6 dB
    score, scores = Trainer.VAE_Model.eval, {2: 2.0, 3: 4.0, 4: 3.0}
    monkeypatch.setattr(Trainer.VAE_Model, "eval", eval)
    names = ["last.ckpt", "best.ckpt", *ROLLOUT_FILES] if there else ["last.ckpt"]
    (tmp_path / "old").mkdir()
    for name in names:
        shutil.copy(tiny_run / name, tmp_path / "old")
    if not there:
        saved = load(tiny_run / "last.ckpt")
        saved["resume"]["state"]["best_psnr"] = 40.0  # of an epoch before it
        torch.save(saved, tmp_path / "old" / "last.ckpt")
    for folder in (tmp_path / "new", tmp_path / "old"):
        flags = "--ckpt_path", tmp_path / "old" / "last.ckpt", "--num_epoch", 5
        assert train(tiny_data, folder, *flags) == 0
        said = "best.ckpt is the best epoch from here on" in capsys.readouterr().out
        assert said == (not there)
        if there:
            assert all((folder / name).read_bytes() == (tiny_run / name).read_bytes()
                       for name in ("best.ckpt", *ROLLOUT_FILES))
        assert there or load(folder / "best.ckpt")["last_epoch"] == 3


def test_a_best_checkpoint_by_another_name_is_taken_along(tiny_data, tiny_run, tmp_path, capsys):
    """Also where a kill came before the folder's first last.ckpt: it is no earlier run."""
    best = load(tiny_run / "best.ckpt")["last_epoch"]
    shutil.copy(tiny_run / "best.ckpt", tmp_path / f"epoch={best}.ckpt")
    flags = "--ckpt_path", tmp_path / f"epoch={best}.ckpt", "--num_epoch", best + 2
    with pytest.MonkeyPatch.context() as patch:
        send_at(patch, "training_one_step", 2, signal.SIGTERM)
        patch.setattr(Trainer.VAE_Model, "write", lambda *_: None)  # as a kill would end it
        assert train(tiny_data, tmp_path / "new", *flags) == 143
    copy = (tmp_path / "new" / "best.ckpt").read_bytes()
    assert copy == (tiny_run / "best.ckpt").read_bytes()
    (tmp_path / "new" / "history.csv").unlink()
    (tmp_path / "new" / "steps.csv").unlink()
    assert train(tiny_data, tmp_path / "new", *flags) == 0
    assert "earlier" not in capsys.readouterr().out


def test_a_model_that_has_trained_takes_a_checkpoints_weights(tiny_data, tiny_run, tmp_path):
    words = ["--DR", str(tiny_data), "--save_root", str(tmp_path), *TINY, "--seed", "1"]
    model = Trainer.VAE_Model(Trainer.build_parser().parse_args([*words, "--num_epoch", "1"]))
    model.training_stage()
    model.args.ckpt_path = str(tiny_run / "best.ckpt")
    model.load_checkpoint()
    model.save(tmp_path / "again.ckpt")
    files = tmp_path / "again.ckpt", tiny_run / "best.ckpt"
    again, best = (load(file)["state_dict"] for file in files)
    assert all(torch.equal(again[key], best[key]) for key in best)


@pytest.mark.parametrize(
    "before, now, steps", [("AdamW", "Adam", 3), ("Muon", "AdamW", 1), ("AdamW", "Muon", 1)]
)
def test_another_optimizer_resumes_with_its_own_settings(
    tiny_data, tmp_path, capsys, before, now, steps
):
    """Optimizer state is kept where both optimizers have the same kind, else made anew."""
    folder = tmp_path / "run"
    assert train(tiny_data, folder, "--optim", before) == 0
    weight_decay = {"Adam": 0, "AdamW": 0.01, "Muon": 0.1}
    (group,) = load(folder / "last.ckpt")["optimizer"]["param_groups"]
    assert group["weight_decay"] == weight_decay[before]
    assert train(tiny_data, folder, "--resume", "--num_epoch", 3, "--optim", now) == 0
    assert f"--optim {now}: the checkpoint has {before}" in capsys.readouterr().out
    optimizer = load(folder / "last.ckpt")["optimizer"]
    assert optimizer["param_groups"][0]["weight_decay"] == weight_decay[now]
    assert {float(state["step"]) for state in optimizer["state"].values()} == {steps * 16}


def test_a_shorter_command_line_resumes_the_same_run(tiny_data, tmp_path, capsys):
    """Everything about the training comes from the checkpoint.

    So does whether --lr was given, which --fast_train asks for.
    """
    flags = (
        "--fast_train", "--fast_train_epoch", 3, "--lr", 0.002, "--recipe", "template",
        "--train_vi_len", 4, "--num_epoch", 3
    )
    assert train(tiny_data, tmp_path / "whole", *flags) == 0
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.copy(folder / "epoch=0.ckpt", folder / "last.ckpt")
    (folder / "history.csv").unlink()
    assert in_process(Trainer.main, "--save_root", folder, "--resume", "--device", "cpu") == 0
    assert rows(folder / "history.csv") == rows(tmp_path / "whole" / "history.csv")
    assert differences(*(load(root / "last.ckpt") for root in (folder, tmp_path / "whole"))) == []


def test_a_clock_does_not_decide_how_a_resumed_run_sums(
    tiny_data, tiny_run, tmp_path, capsys, monkeypatch
):
    """The precision that `auto` found stays as it was."""
    monkeypatch.setattr(
        Trainer, "pick_precision", lambda wanted, device: ("bf16", "bf16 as it was faster")
    )
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    assert train(tiny_data, folder, "--resume", "--num_epoch", 3, "--precision", "auto") == 0
    assert "fp32 as in the checkpoint" in capsys.readouterr().out
    assert load(folder / "last.ckpt")["resume"]["precision"] == "fp32"


def test_every_random_state_is_in_the_checkpoint(tiny_run):
    resume = load(tiny_run / "last.ckpt")["resume"]
    (rank,) = resume["ranks"]
    assert {"torch", "sampler", "pool"} <= rank.keys() and "generator" in rank["pool"]
    assert rank["pool"]["frames"].shape == (64, 3, 16, 32)
    trained = load(tiny_run / "last.ckpt")["train_state_dict"]
    assert resume["state"]["average"].keys() < trained.keys()


def test_a_resume_without_the_pool_trains_on(tiny_data, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    assert train(tiny_data, folder, "--resume", "--num_epoch", 3, "--pool", 0) == 0
    assert len(rows(folder / "history.csv")) == 3
