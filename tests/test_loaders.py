"""Loader processes: a command ends within seconds of an error, and what they lack is one line."""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest

import dataloader
import Trainer
from conftest import ROOT, TINY, in_process, run_cli

LOADERS = ["--recipe", "template", "--train_vi_len", "4", "--batch_size", "2", "--no_cache",
           "--num_workers", "2"]


def one_line(stderr):
    """Return the only line of stderr that is no progress bar."""
    (line,) = [line for line in stderr.splitlines() if line and "|" not in line]
    return line


@pytest.mark.parametrize("image, flags", [
    ("train/train_img/33.png", []), ("train/train_label/2.png", []), ("val/val_img/9.png", []),
    ("val/val_label/0.png", ["--test", "--ckpt_path", "best.ckpt"])])
def test_an_error_ends_the_command(tiny_data, tiny_run, tmp_path, image, flags):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    os.truncate(data / image, 300)
    done = run_cli("Trainer.py", "--DR", data, "--save_root", tmp_path / "out", *TINY, *LOADERS,
                   *flags, timeout=60, cwd=tiny_run)  # it would wait for its loaders for ever
    assert done.returncode == 2 and image in one_line(done.stderr)
    if "val" in image and not flags:  # found before the first epoch, which would be lost
        assert not (tmp_path / "out").exists()


def test_too_little_shared_memory(tiny_data, tmp_path):
    def small():  # what a full /dev/shm does, too: the batch's file can't grow
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    done = run_cli("Trainer.py", "--DR", tiny_data, "--save_root", tmp_path / "out", *TINY,
                   *LOADERS, timeout=60, preexec_fn=small)
    line = one_line(done.stderr)
    assert done.returncode == 2 and line.startswith("error: --num_workers") and "--shm-size" in line


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_loader_process_that_is_killed(tiny_data, tmp_path, monkeypatch, capfd, number):
    monkeypatch.setattr(dataloader, "read_image", lambda path: os.kill(os.getpid(), number))
    flags = "--DR", tiny_data, "--save_root", tmp_path, *TINY, *LOADERS
    assert in_process(Trainer.main, *flags) == 2
    err = capfd.readouterr().err
    line = err.splitlines()[-1]
    assert "error: --num_workers" in line and "Traceback" not in err
    assert "killed by signal" in line or "exited unexpectedly" in line  # whichever is seen first


def test_no_more_processes(tiny_data, tmp_path, monkeypatch, capsys):
    def full(self):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.Process, "start", full)
    flags = "--DR", tiny_data, "--save_root", tmp_path, *TINY, *LOADERS
    assert in_process(Trainer.main, *flags) == 2
    assert "error: --num_workers" in capsys.readouterr().err


ENDS_ITS_LOADERS = """
import multiprocessing, sys
import dataloader, torch

dataset = dataloader.Dataset_Dance(sys.argv[1], dataloader.frame_transform(4, 8), "train", 4)
batches = iter(dataloader.ImageLoader(dataset, 1, num_workers=2))
assert next(batches)[0].shape == (1, 4, 3, 4, 8)
workers = multiprocessing.active_children()
assert workers
for worker in workers:
    worker.terminate()
assert torch.is_tensor(next(batches)[0])  # the batches that are under way still come
for worker in workers:
    worker.join(20)
    assert worker.exitcode == 0  # not killed, which PyTorch would report in the parent
"""


def test_a_process_ends_its_loaders(tiny_data):
    """Also where nobody closed the loader: that is what multiprocessing does at exit.

    In a process of its own: a test runner's has threads, and a fork may inherit their locks.
    """
    command = [sys.executable, "-c", ENDS_ITS_LOADERS, str(tiny_data)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
