"""What is on disk stays whole: half-written files, full disks, two runs, other projects' files."""

import errno
import fcntl
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch

import Tester
import Trainer
from utils.checkpoint import read_checkpoint, write_checkpoint
from utils import cli
from utils import files
from conftest import ROOT, TINY, in_process, send_at
from scripts.kill_test import compare

OF_A_TEST = "psnr_per_frame.csv", "psnr_per_frame.png", "val_pred.gif"
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
    assert {"best.ckpt", "epoch=0_pred.gif"} <= contents(folder / "earlier2").keys()
    assert contents(folder / "earlier1") == before
    assert train(tiny_data, folder / "earlier1", "--resume", "--num_epoch", 3) == 0
    assert read_checkpoint(folder / "earlier1" / "last.ckpt")["last_epoch"] == 2


@pytest.mark.parametrize("flags", [["--resume"], ["--ckpt_path", "best.ckpt"]])
def test_resuming_moves_nothing(tiny_data, tiny_run, tmp_path, monkeypatch, flags):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    monkeypatch.chdir(folder)
    assert train(tiny_data, folder, "--num_epoch", 3, *flags) == 0
    assert not list(folder.glob("earlier*"))


def test_resuming_an_earlier_checkpoint_moves_what_followed(tiny_data, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    before = contents(folder)
    first = folder / "epoch=0.ckpt"
    assert train(tiny_data, folder, "--ckpt_path", first, "--lr", "1e-6") == 0
    assert contents(folder / "earlier1") == before
    assert read_checkpoint(folder / "last.ckpt")["last_epoch"] == 1
    assert (folder / "best.ckpt").exists()


def test_a_refused_start_moves_nothing(tiny_data, tiny_run, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    before = contents(folder)
    assert train(tmp_path / "nowhere", folder) == 2
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train(tiny_data, folder, "--tensorboard") == 2
    checkpoint = torch.load(folder / "epoch=0.ckpt", weights_only=True)
    del checkpoint["resume"]["state"]["average"]  # another version's
    torch.save(checkpoint, tmp_path / "other.ckpt")
    assert train(tiny_data, folder, "--ckpt_path", tmp_path / "other.ckpt") == 2
    assert contents(folder) == before and not list(folder.glob("earlier*"))


def test_validating_a_checkpoint_leaves_its_run_as_it_is(tiny_data, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    before = contents(folder)
    assert train(tiny_data, folder, "--ckpt_path", folder / "epoch=0.ckpt", "--test") == 0
    assert contents(folder) == before
    assert contents(folder / "test").keys() == set(OF_A_TEST)


def test_a_reader_that_has_seen_enough_ends_no_run(tiny_data, tmp_path):
    command = [sys.executable, str(ROOT / "Trainer.py"), "--DR", str(tiny_data),
               "--save_root", str(tmp_path / "run"), *TINY]
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
    other = folder / ".film.mp4.part"  # another program's
    other.write_text("half a film")
    checkpoint = {"state_dict": {"x": torch.zeros(10_000)}}
    assert in_child(die_half_way, folder / "last.ckpt", checkpoint) == -signal.SIGKILL
    (leftover,) = contents(folder).keys() - before.keys() - {other.name}
    assert ".part" in leftover and contents(folder)["last.ckpt"] == before["last.ckpt"]
    assert read_checkpoint(folder / "last.ckpt")["last_epoch"] == 1
    assert train(tiny_data, folder, "--resume", "--num_epoch", 3) == 0
    assert list(folder.glob(".*.part*")) == [other]  # the next run clears up, after itself


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
                epochs.add(torch.load(path, weights_only=True)["resume"]["state"]["steps_done"])
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
    """Inside, no file can grow beyond `size` bytes, as on a full disk (Python ignores SIGXFSZ)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size, what", [(60_000, "last.ckpt"), (0, ".ckpt")])
def test_a_full_disk(tiny_data, tiny_run, tmp_path, capsys, size, what):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    before = contents(folder)
    assert len(before["last.ckpt"]) > 60_000
    steps = ("--save_every_steps", 5) if what == "last.ckpt" else ()
    with files_up_to(size):
        status = train(tiny_data, folder, "--resume", "--num_epoch", 3, *steps)
    err = [line for line in capsys.readouterr().err.splitlines()
           if "error" in line or "Traceback" in line]
    assert status == 2 and len(err) == 1 and what in err[0] and "expected room" in err[0]
    assert contents(folder) == before  # every file as it was, nothing left behind
    assert train(tiny_data, folder, "--resume", "--num_epoch", 3) == 0  # and with room it resumes


def test_checkpoints_are_written_before_tables_and_figures(tiny_data, tiny_run, tmp_path):
    """No epoch ends without its checkpoints; with room, the same command leaves the same files."""
    with files_up_to(60_000):  # room for every table and figure, for no checkpoint
        assert train(tiny_data, tmp_path / "run") == 2
    assert not contents(tmp_path / "run")
    assert train(tiny_data, tmp_path / "run", "--resume") == 0
    assert compare(tmp_path / "run", tiny_run) == []


def test_a_disk_that_has_no_room_for_another_checkpoint(tiny_data, tiny_run, tmp_path, capsys):
    """A folder named epoch=3.ckpt stands for a disk without room for a further file."""
    whole, folder = (shutil.copytree(tiny_run, tmp_path / name) for name in ("whole", "run"))
    assert train(tiny_data, whole, "--resume", "--num_epoch", 5) == 0
    (folder / "epoch=3.ckpt").mkdir()
    assert train(tiny_data, folder, "--resume", "--num_epoch", 5) == 2
    assert "epoch=3.ckpt" in capsys.readouterr().err
    assert read_checkpoint(folder / "last.ckpt")["last_epoch"] == 3  # the epoch is not lost
    (folder / "epoch=3.ckpt").rmdir()
    assert train(tiny_data, folder, "--resume", "--num_epoch", 5) == 0
    assert compare(folder, whole) == []


def test_a_table_that_cannot_be_written_ends_no_run(tiny_data, tiny_run, tmp_path, capsys):
    """Nothing can be renamed to a folder's name, nor to that of a file open in Excel on Windows."""
    whole, folder = (shutil.copytree(tiny_run, tmp_path / name) for name in ("whole", "run"))
    assert train(tiny_data, whole, "--resume", "--num_epoch", 3) == 0
    tables = [folder / name for name in ("history.csv", "steps.csv", *OF_A_TEST)]
    for path in tables:
        path.unlink()
        path.mkdir()
    capsys.readouterr()
    assert train(tiny_data, folder, "--resume", "--num_epoch", 3) == 0
    out, err = capsys.readouterr()
    for path in tables:
        assert f"{path}: can't be written" in out and "Traceback" not in err
    assert read_checkpoint(folder / "last.ckpt")["last_epoch"] == 2

    # the run is done; as after a kill between checkpoints and tables, resuming writes these
    for path in tables:
        path.rmdir()
    assert train(tiny_data, folder, "--resume", "--num_epoch", 3) == 0
    assert compare(folder, whole) == []


def test_a_kill_between_checkpoints_and_tables_loses_no_table(
    tiny_data, tiny_run, tmp_path, monkeypatch
):
    whole, folder = (shutil.copytree(tiny_run, tmp_path / name) for name in ("whole", "run"))
    assert train(tiny_data, whole, "--resume", "--num_epoch", 3) == 0
    for name in ("history.csv", "steps.csv", *OF_A_TEST):
        (folder / name).unlink()
    again = shutil.copytree(folder, tmp_path / "again")
    assert train(tiny_data, folder, "--resume", "--num_epoch", 3) == 0
    assert compare(folder, whole) == []

    with monkeypatch.context() as patch:  # a stop while the missing tables are made
        send_at(patch, "val_one_step", 1, signal.SIGINT)
        assert train(tiny_data, again, "--resume", "--num_epoch", 4) == 130
    assert train(tiny_data, again, "--resume", "--num_epoch", 3) == 0
    assert compare(again, whole) == []


def test_a_figure_that_cannot_be_drawn_ends_no_run(tiny_data, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert train(tiny_data, tmp_path / "run", "--num_epoch", 1) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "psnr_per_frame.png" in line]
    assert "matplotlib" in line
    assert contents(tmp_path / "run").keys() >= {"last.ckpt", "history.csv", "val_pred.gif"}


# ---------------------------------------------------------------- what a file system can't do

def failing(number, only=lambda descriptor: True):
    def call(descriptor, *args):
        if only(descriptor):
            raise OSError(number, os.strerror(number))
    return call


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("only", [lambda d: stat.S_ISDIR(os.fstat(d).st_mode), lambda d: True])
def test_a_file_system_that_cannot_flush(tmp_path, monkeypatch, number, only):
    """CIFS and vboxsf have no fsync of folders."""
    monkeypatch.setattr(os, "fsync", failing(number, only))
    files.write_csv(tmp_path / "a.csv", ["a"], [{"a": 1}])
    assert (tmp_path / "a.csv").read_text() == "a\n1\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_flush_that_fails_is_an_error(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(cli.UserError, match="a.csv"):
        files.write_csv(tmp_path / "a.csv", ["a"], [{"a": 1}])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.parametrize("names", [("--save_root", "run"), ("OUT", "sweep")])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, number, names):
    """Lustre without -o flock, NFS without its daemon, Gluster: no sign of another run."""
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with files.locked(tmp_path, *names):
        pass
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and f"{names[0]} {tmp_path}" in out and os.strerror(number) in out
    assert "using it" not in out and not err


def test_a_run_where_there_are_no_locks(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    assert train(tiny_data, tmp_path / "run", "--num_epoch", 1) == 0
    assert capsys.readouterr().out.count("can't be locked") == 1


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EWOULDBLOCK])
def test_a_lock_that_is_held(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with pytest.raises(cli.UserError, match="another run is using it"), files.locked(tmp_path):
        pass


# ---------------------------------------------------------------- files of other projects

@pytest.fixture
def foreign(tiny_run, tmp_path):
    """A folder of another project: the template's checkpoints, and outputs named as ours."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    checkpoint = {"state_dict": read_checkpoint(tiny_run / "last.ckpt")["state_dict"], "lr": 0.001,
                  "tfr": 1.0, "last_epoch": 2}
    for name in ("epoch=2.ckpt", "foreign.ckpt"):
        torch.save(checkpoint, folder / name)
    for name in (*OF_A_TEST, "submission.csv", "pred_seq0.gif", ".lock"):
        (folder / name).write_text(f"their {name}")
    return folder


def test_no_resume_is_promised_of_another_projects_run(tiny_data, foreign, tiny_run, capsys):
    before, lock = contents(foreign), (foreign / ".lock").read_text()
    flags = ["--ckpt_path", foreign / "foreign.ckpt", "--num_epoch", 4]
    assert train(tiny_data, foreign, *flags) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "earlier1" in line]
    assert "--resume" not in line
    assert contents(foreign / "earlier1").items() <= before.items()
    assert {"epoch=2.ckpt", *OF_A_TEST} <= contents(foreign / "earlier1").keys()
    kept = {"foreign.ckpt", "submission.csv", "pred_seq0.gif"}
    assert {name: contents(foreign)[name] for name in kept} == {name: before[name] for name in kept}
    assert (foreign / ".lock").read_text() == lock

    assert train(tiny_data, foreign, "--num_epoch", 1) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "earlier2" in line]
    assert f"--save_root {foreign / 'earlier2'} --resume" in line


def test_outputs_without_a_checkpoint_are_moved_too(tiny_data, foreign):
    (foreign / "epoch=2.ckpt").unlink()
    before = contents(foreign)
    assert train(tiny_data, foreign, "--num_epoch", 1) == 0
    assert contents(foreign / "earlier1") == {name: before[name] for name in OF_A_TEST}


@pytest.mark.parametrize("command", [("Trainer", "--test"), ("Tester",)])
def test_a_test_overwrites_no_file_of_another_project(tiny_data, foreign, capsys, command):
    program, *flags = command
    main = {"Trainer": Trainer.main, "Tester": Tester.main}[program]
    before = contents(foreign)
    for _ in range(2):  # the second time over the first one's output, which is ours
        assert in_process(main, "--DR", tiny_data, "--save_root", foreign, *TINY, *flags,
                          "--ckpt_path", foreign / "foreign.ckpt") == 0
        assert "is not of this project" in capsys.readouterr().out
        assert contents(foreign) == before
        written = set(OF_A_TEST) if flags else {"submission.csv", "pred_seq0.gif", "pred_seq4.gif"}
        assert written <= contents(foreign / "test").keys()
    assert [path.name for path in foreign.iterdir() if path.is_dir()] == ["test"]


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


def test_a_killed_run_releases_its_lock_at_once(tmp_path):
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
