"""What a user of the command line sees: one-line errors, exit statuses, signals, progress bars.

The base module: it imports nothing of the project and no package that is slow to import.
"""

import argparse
import atexit
import os
import re
import signal
import sys
import threading
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

INTERRUPTED = {signal.SIGINT: 130, signal.SIGTERM: 143}  # exit status by signal, as a shell reports it
if hasattr(signal, "SIGHUP"):  # a terminal that was closed, a connection that was lost; Windows has none
    INTERRUPTED[signal.SIGHUP] = 129

# PyTorch's errors where a loader process was killed, or has no room for a batch
LOADER_LOST = re.compile(r"DataLoader worker .*(is killed by signal|exited unexpectedly)"
                         r"|shared memory|torch_shm|</torch_\d|ancdata")


class UserError(ValueError):
    """A mistake that the user can correct. Its one-line text names the file or flag and says what was expected."""


class Stopped(BaseException):
    """Work was stopped by a signal, in good order. `signal` is its number. Like KeyboardInterrupt no Exception, so none swallows it."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.signal = number


def run(main, leave=sys.exit):
    """Call main() as a command: exit 0 when done, 2 with one line on stderr for a UserError, 129, 130 and 143 when stopped, 1 for a bug.

    leave: is called with the exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a path that the terminal's encoding lacks must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        status = 2
    except Stopped as stopped:
        status = INTERRUPTED[stopped.signal]
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        status = INTERRUPTED[signal.SIGINT]
    except SystemExit as end:
        status = end.code
    except Exception as error:
        lost = isinstance(error, RuntimeError) and LOADER_LOST.search(str(error))
        if lost:  # at any moment: PyTorch raises it in a signal handler
            print(f"error: --num_workers: a loader process was lost ({loader_problem(error)}); "
                  f"expected more shared memory (docker run --shm-size 1g), fewer processes, or "
                  f"--num_workers 0, which needs neither", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        status = 2 if lost else 1
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)  # no traceback from here on
    leave(status or 0)


def loader_problem(error):
    """Return what happened to a loader process: the line that says it, of a traceback maybe."""
    text = f"{error}\n{error.__cause__ or ''}"  # the signal that killed a process is the cause
    lines = [line for line in text.splitlines() if LOADER_LOST.search(line)]
    return lines[-1].removeprefix("RuntimeError: ").strip().rstrip(".")


@contextmanager
def catching_signals(note):
    """Inside, the signals of INTERRUPTED call note(signal number) instead of ending the process; nohup's SIGHUP stays ignored."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = {number: signal.signal(number, lambda number, frame: note(number)) for number in INTERRUPTED
              if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command_line(script, argv):
    """Return the words of a command. script: its file. argv: what its `main` got; None is the process's own."""
    if argv is None:
        return list(sys.argv)
    here, script = Path.cwd(), Path(script).resolve()
    script = script.relative_to(here) if script.is_relative_to(here) else script
    return [str(script), *map(str, argv)]


def stop(number):
    """For `catching_signals`: the command ends the way it does after an error, so that nothing half-written is left."""
    raise Stopped(number)


class _Lines:
    """A stream for tqdm that ends every refresh with a newline, so that a bar stays readable in a log file."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        text = text.replace("\r", "").strip()
        if text:
            with suppress(OSError):  # as in `say`
                self.stream.write(text + "\n")

    def flush(self):
        with suppress(OSError):
            self.stream.flush()


def progress(iterable=None, **options):
    """tqdm(iterable, **options) on stderr: a live bar on a terminal, a line every 20 seconds in a file."""
    from tqdm import tqdm  # here, so that scripts that show no bar run on a bare Python

    options.setdefault("dynamic_ncols", True)
    if not sys.stderr.isatty():
        options.update(file=_Lines(sys.stderr), mininterval=20, maxinterval=60, ascii=True, dynamic_ncols=False, ncols=120)
    return tqdm(iterable, **options)


def say(line):
    """Print a line without breaking a bar that is on the screen; under torchrun, rank 0 alone does."""
    if os.environ.get("RANK", "0") != "0":
        return
    from tqdm import tqdm

    try:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
    except OSError:  # `| head` has seen enough, or the log's disk is full: no reason to end a run
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def number(kind, low, high=None, *, above=False, multiple=1):
    """An argparse type: an int or float with low <= value <= high (low < value where `above`), never NaN or infinite.

    Without `high` an int is at most a thousand million, and a float is finite.
    """
    high = (10**9 if kind is int else sys.float_info.max) if high is None else high

    def convert(text):
        value = kind(text)
        if not (low < value if above else low <= value) or not value <= high:
            bounds = (f"above {low}" if above else f"of at least {low}") + ("" if high == sys.float_info.max else f" and at most {high}")
            raise argparse.ArgumentTypeError(f"{text!r} is not a {convert.__name__} {bounds}")
        if multiple > 1 and value % multiple:
            raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of {multiple}")
        return value

    convert.__name__ = {int: "whole number", float: "number"}[kind]  # argparse names the type in its message
    return convert


def path(text):
    """An argparse type: a path. The empty one, as an unset shell variable gives it, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("'' is not a path")
    return text


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose flags keep their full names (no abbreviations)."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")
