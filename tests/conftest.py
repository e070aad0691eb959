"""What the tests share: tiny data, tiny sizes, and ways to run a command."""

import importlib
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

# the networks of the tests are too small to share out
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent

# flags that make a run take a second
TINY = [
    "--frame_H", "16", "--frame_W", "32", "--F_dim", "16", "--L_dim", "8", "--N_dim", "4",
    "--D_out_dim", "16", "--val_vi_len", "20", "--num_epoch", "2", "--device", "cpu",
    "--precision", "fp32"
]


def run_cli(script, *args, timeout=120, **options):
    """Run `python script args...`, script relative to the repository; its output is text."""
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, args)],
        capture_output=True, text=True, timeout=timeout, env=environment, **options
    )


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Demo data, not to be changed: 64 training frames in four clips, 20 frames to validate,
    five test sequences of 20 poses.
    """
    out = tmp_path_factory.mktemp("data") / "tiny"
    done = run_cli("scripts/make_demo_data.py", out, "--train_frames", 64, "--sequence_frames", 20)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def tiny_run(tiny_data, tmp_path_factory):
    """The folder of a finished run of two epochs on `tiny_data`. Not to be changed."""
    import Trainer

    folder = tmp_path_factory.mktemp("run") / "ckpt"
    Trainer.main(["--DR", str(tiny_data), "--save_root", str(folder), *TINY])
    return folder


def in_process(main, *args):
    """Return the exit status of a command's `main`, run in this process.

    That spares the seconds that importing torch takes.
    """
    from utils import cli

    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: main([str(arg) for arg in args]))
    return ended.value.code


def run_main(script, *args):
    """Run scripts/`script` as `run_cli` does, but in this process."""
    main = importlib.import_module(script.removesuffix(".py")).main
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = in_process(main, *args)
    return subprocess.CompletedProcess([script, *args], status, out.getvalue(), err.getvalue())


def send_at(monkeypatch, method, call, number):
    """Send this process a signal when a method of the model is called for the `call`th time."""
    import Trainer

    original, calls = getattr(Trainer.VAE_Model, method), []

    def wrapped(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer.VAE_Model, method, wrapped)


def steps(model):
    """How many steps of the epoch were taken, and how many skipped."""
    means = model.state.epoch_means.means()
    return means["taken"], means["skipped_steps"]
