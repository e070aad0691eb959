"""SIGTERM, Ctrl-C and a lost terminal save and stop, in training and in validation.

A run that resumes from there ends bitwise identical.
"""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

import Trainer
from utils import cli, frame_cache
from conftest import ROOT, TINY, in_process, send_at
from scripts.kill_test import compare

RECIPES = {"pool": (), "template": ("--recipe", "template", "--train_vi_len", "4", "--tfr", "0.6")}


def train(data, folder, *flags):
    return in_process(Trainer.main, "--DR", data, "--save_root", folder, *TINY, *flags)


@pytest.fixture(autouse=True)
def sighup():
    """Take SIGHUP as a terminal's child does, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def whole(tiny_data, tiny_run, tmp_path_factory):
    """Folders of runs that nobody stopped, by recipe."""
    folder = tmp_path_factory.mktemp("whole") / "template"
    assert train(tiny_data, folder, *RECIPES["template"]) == 0
    return {"pool": tiny_run, "template": folder}


@pytest.mark.parametrize(
    "recipe, method, call, number, status",
    [
        ("pool", "training_one_step", 3, signal.SIGTERM, 143),
        ("template", "training_one_step", 11, signal.SIGINT, 130),
        ("pool", "val_one_step", 2, signal.SIGINT, 130),
        ("template", "val_one_step", 1, signal.SIGTERM, 143),
        ("pool", "write", 1, signal.SIGTERM, 143),
        ("pool", "training_one_step", 4, signal.SIGHUP, 129),
    ],
)
def test_a_signal_saves_stops_and_the_rest_is_the_same(
    tiny_data, whole, tmp_path, capsys, monkeypatch, recipe, method, call, number, status
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        send_at(patch, method, call, number)
        assert train(tiny_data, folder, *RECIPES[recipe]) == status
    out, err = capsys.readouterr()
    assert "saved; resume with: python " in out and out.rstrip().endswith("--resume")
    assert "Traceback" not in err and not list(folder.glob(".*.part*"))
    # a process that trains in a notebook gets its handlers back
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert train(tiny_data, folder, *RECIPES[recipe], "--resume") == 0
    assert compare(folder, whole[recipe]) == []


def test_the_line_to_resume_with_is_built_from_what_main_got(
    tiny_data, whole, tmp_path, capsys, monkeypatch
):
    """`Trainer.main([...])` in a notebook cell: the process's own arguments are the kernel's."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.chdir(ROOT)
    with monkeypatch.context() as patch:
        send_at(patch, "training_one_step", 3, signal.SIGINT)
        assert train(tiny_data, tmp_path / "a run") == 130
    line = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(line.partition("saved; resume with: ")[2])
    assert words == [
        "python", "Trainer.py", "--DR", str(tiny_data), "--save_root", str(tmp_path / "a run"),
        *TINY, "--resume"
    ]
    assert in_process(Trainer.main, *words[2:]) == 0
    assert compare(tmp_path / "a run", whole["pool"]) == []


def test_a_script_that_never_called_main_is_told_the_checkpoint(
    tiny_data, tmp_path, capsys, monkeypatch
):
    args = Trainer.build_parser().parse_args(
        ["--DR", str(tiny_data), "--save_root", str(tmp_path), *TINY]
    )
    send_at(monkeypatch, "training_one_step", 2, signal.SIGTERM)
    with pytest.raises(cli.Stopped):
        Trainer.VAE_Model(args).training_stage()
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith(f"saved; resume from {tmp_path / 'last.ckpt'}")


def test_under_nohup_a_lost_terminal_changes_nothing(tiny_data, whole, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        send_at(monkeypatch, "training_one_step", 3, signal.SIGHUP)
        assert train(tiny_data, tmp_path / "run") == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert compare(tmp_path / "run", whole["pool"]) == []


def test_a_signal_while_decoding_leaves_nothing_behind(tiny_data, tmp_path, monkeypatch):
    def interrupted(path):
        if path.name == "9.png":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(path)

    original = frame_cache.read_image
    monkeypatch.setattr(frame_cache, "read_image", interrupted)
    assert train(tiny_data, tmp_path / "run", "--cache_dir", tmp_path / "cache") == 143
    assert os.listdir(tmp_path / "cache") == [] and not (tmp_path / "run").exists()


def start(data, folder, *flags, until):
    """Start a run in a process group of its own, as a shell or `timeout` does.

    Return when its log has `until`.
    """
    command = [
        sys.executable, str(ROOT / "Trainer.py"), "--DR", str(data), "--save_root", str(folder),
        *TINY, *flags
    ]
    log = folder.with_suffix(".log")
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.monotonic() + 90
    while until not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return process, log


def test_a_signal_to_the_whole_group(tiny_data, tmp_path):
    """`timeout`, a terminal's Ctrl-C and batch systems signal the loader processes too.

    The run must still save.
    """
    flags = (
        "--recipe", "template", "--train_vi_len", "2", "--no_cache", "--num_workers", "2",
        "--num_epoch", "1000"
    )
    term, term_log = start(tiny_data, tmp_path / "term", *flags, until="epoch 0:")
    os.killpg(term.pid, signal.SIGTERM)
    assert term.wait(60) == 143
    interrupt, interrupt_log = start(tiny_data, tmp_path / "int", *flags, until="epoch 0:")
    os.killpg(interrupt.pid, signal.SIGINT)
    assert interrupt.wait(60) == 130
    for log in (term_log, interrupt_log):
        assert "saved; resume with: python " in log.read_text()
        assert "Traceback" not in log.read_text()


def test_ctrl_c_during_imports_is_one_line(tmp_path):
    """A first Ctrl-C often comes then: importing PyTorch takes seconds."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    # a shell's background commands ignore Ctrl-C
    ended = subprocess.run([sys.executable, ROOT / "Trainer.py"], capture_output=True, text=True,
                           env={**os.environ, "PYTHONPATH": str(tmp_path)},
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "stopped by Ctrl-C\n")
