"""What is on disk stays whole: half-written files, a full disk, two runs in one folder, a reader at work."""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch

import Trainer
from utils.checkpoint import read_checkpoint, write_checkpoint
from utils import cli
from utils import files
from conftest import ROOT, TINY, in_process
from scripts.kill_test import compare

fork = multiprocessing.get_context("fork")  # a child of a test need not import torch again


def train(data, folder, *flags):
    return in_process(Trainer.main, "--DR", data, "--save_root", folder, *TINY, *flags)


def in_child(function, *args):
    """The exit code of a forked process that calls a function; minus the signal that killed it."""
    child = fork.Process(target=function, args=args)
    child.start()
    child.join(60)
    return child.exitcode


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != ".lock"}


# ---------------------------------------------------------------- an earlier run

def test_a_fresh_run_keeps_the_one_that_was_there(tiny_data, tiny_run, tmp_path, capsys):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "mine.txt").write_text("no file of a run")
    before = {name: data for name, data in contents(folder).items() if name != "mine.txt"}
    assert train(tiny_data, folder, "--seed", 1, "--num_epoch", 1, "--store_visualization") == 0
    assert "earlier1" in capsys.readouterr().out
    assert contents(folder / "earlier1") == before and (folder / "mine.txt").exists()
    assert (folder / "best.ckpt").read_bytes() != before["best.ckpt"]

    assert train(tiny_data, folder, "--seed", 2, "--num_epoch", 1) == 0
    assert {"best.ckpt", "epoch=0_pred.gif"} <= contents(folder / "earlier2").keys() and contents(folder / "earlier1") == before
    assert train(tiny_data, folder / "earlier1", "--resume", "--num_epoch", 3) == 0
    assert read_checkpoint(folder / "earlier1" / "last.ckpt")["last_epoch"] == 2


@pytest.mark.parametrize("flags", [["--resume"], ["--ckpt_path", "best.ckpt"]])
def test_going_on_moves_nothing(tiny_data, tiny_run, tmp_path, monkeypatch, flags):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    monkeypatch.chdir(folder)
    assert train(tiny_data, folder, "--num_epoch", 3, *flags) == 0
    assert not list(folder.glob("earlier*"))


def test_going_on_from_an_earlier_checkpoint_moves_what_came_after_it(tiny_data, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    before = contents(folder)
    assert train(tiny_data, folder, "--ckpt_path", folder / "epoch=0.ckpt", "--lr", "1e-6") == 0
    assert contents(folder / "earlier1") == before
    assert read_checkpoint(folder / "last.ckpt")["last_epoch"] == 1 and (folder / "best.ckpt").exists()


def test_a_refused_start_moves_nothing(tiny_data, tiny_run, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    before = contents(folder)
    assert train(tmp_path / "nowhere", folder) == 2
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train(tiny_data, folder, "--tensorboard") == 2
    checkpoint = torch.load(folder / "epoch=0.ckpt", weights_only=True)
    del checkpoint["resume"]["kl_epoch"]  # another version's
    torch.save(checkpoint, tmp_path / "other.ckpt")
    assert train(tiny_data, folder, "--ckpt_path", tmp_path / "other.ckpt") == 2
    assert contents(folder) == before and not list(folder.glob("earlier*"))


def test_validating_a_checkpoint_leaves_its_run_as_it_is(tiny_data, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    before = contents(folder)
    assert train(tiny_data, folder, "--ckpt_path", folder / "epoch=0.ckpt", "--test") == 0
    assert contents(folder) == before
    assert contents(folder / "test").keys() == {"psnr_per_frame.csv", "psnr_per_frame.png", "val_pred.gif"}


def test_a_reader_that_has_seen_enough_ends_no_run(tiny_data, tmp_path):
    command = [sys.executable, str(ROOT / "Trainer.py"), "--DR", str(tiny_data), "--save_root", str(tmp_path / "run"), *TINY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(120) == 0
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["last_epoch"] == 1


# ---------------------------------------------------------------- half-written files

def die_half_way(path, checkpoint):
    def half(checkpoint, aside):
        save(checkpoint, aside)
        os.truncate(aside, os.path.getsize(aside) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    save, torch.save = torch.save, half
    write_checkpoint(path, checkpoint)


def test_a_kill_in_the_middle_of_a_write(tiny_data, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    before = contents(folder)
    assert in_child(die_half_way, folder / "last.ckpt", {"state_dict": {"x": torch.zeros(10_000)}}) == -signal.SIGKILL
    (leftover,) = contents(folder).keys() - before.keys()
    assert ".part" in leftover and contents(folder)["last.ckpt"] == before["last.ckpt"]
    assert read_checkpoint(folder / "last.ckpt")["last_epoch"] == 1
    assert train(tiny_data, folder, "--resume", "--num_epoch", 3) == 0
    assert not list(folder.glob(".*.part*"))  # the next run clears up


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "history.csv"
    path.write_text("old")
    with pytest.raises(cli.UserError if isinstance(error, OSError) else KeyboardInterrupt):
        with files.atomic(path) as aside:
            aside.write_text("half")
            raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def poll(path, running, results):
    """Read a checkpoint over and over; put how often, or what was wrong with it."""
    reads, epochs = 0, set()
    try:
        while running.is_set():
            if path.exists():
                epochs.add(torch.load(path, weights_only=True)["resume"]["steps_done"])
                reads += 1
    except Exception as error:
        results.put(repr(error))
    results.put((reads, len(epochs)))


def test_a_reader_never_sees_half_a_file(tiny_data, tmp_path):
    running, results = fork.Event(), fork.Queue()
    running.set()
    child = fork.Process(target=poll, args=(tmp_path / "run" / "last.ckpt", running, results))
    child.start()
    assert train(tiny_data, tmp_path / "run", "--save_every_steps", 2) == 0
    running.clear()
    reads, versions = results.get(timeout=60)  # two numbers, not an error
    child.join()
    assert reads >= 10 and versions >= 5


# ---------------------------------------------------------------- a full disk

@contextmanager
def files_up_to(size):
    """Inside, no file can grow beyond `size` bytes; to a program it looks like a full disk (Python ignores SIGXFSZ)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size, what", [(60_000, "last.ckpt"), (0, "history.csv")])
def test_a_full_disk(tiny_data, tiny_run, tmp_path, capsys, size, what):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    before = contents(folder)
    assert len(before["last.ckpt"]) > 60_000
    steps = ("--save_every_steps", 5) if what == "last.ckpt" else ()
    with files_up_to(size):
        status = train(tiny_data, folder, "--resume", "--num_epoch", 3, *steps)
    err = [line for line in capsys.readouterr().err.splitlines() if "error" in line or "Traceback" in line]
    assert status == 2 and len(err) == 1 and what in err[0] and "expected room" in err[0]
    assert contents(folder) == before  # every file as it was, nothing left behind
    assert train(tiny_data, folder, "--resume", "--num_epoch", 3) == 0  # and with room it goes on


def test_a_full_disk_in_the_middle_of_the_files_of_an_epoch(tiny_data, tiny_run, tmp_path, capsys):
    """Pictures and tables were written, the checkpoint was not: going on gives the files of a run that had room."""
    with files_up_to((tiny_run / "last.ckpt").stat().st_size - 2000):
        assert train(tiny_data, tmp_path / "run") == 2
    assert not list((tmp_path / "run").glob(".*.part*")) and (tmp_path / "run" / "val_pred.gif").exists()
    assert train(tiny_data, tmp_path / "run", "--resume") == 0
    assert compare(tmp_path / "run", tiny_run) == []


# ---------------------------------------------------------------- two runs in one folder

def test_a_folder_that_another_run_holds(tiny_data, tiny_run, tmp_path, capsys):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    before = contents(folder)
    with files.locked(folder):
        assert train(tiny_data, folder, "--resume", "--num_epoch", 3) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"--save_root {folder}" in err and "another run" in err
    assert contents(folder) == before


def hold_with_a_child(folder, ready):
    with files.locked(folder):
        if os.fork() == 0:
            time.sleep(20)  # as a loader process that has not noticed yet
            os._exit(0)
        ready.set()
        time.sleep(60)


def test_a_killed_run_lets_go_at_once(tmp_path):
    """Also where it had loader processes, which outlive it for seconds."""
    ready = fork.Event()
    holder = fork.Process(target=hold_with_a_child, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(cli.UserError, match="another run"), files.locked(tmp_path):
        pass
    holder.kill()
    holder.join()
    with files.locked(tmp_path):
        pass
