"""Serve the command line: one-line errors, exit statuses, signals, progress bars, checked flags.

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

# exit status by signal, as a shell reports it
INTERRUPTED = {signal.SIGINT: 130, signal.SIGTERM: 143}
if hasattr(signal, "SIGHUP"):  # a closed terminal, a lost connection; not on Windows
    INTERRUPTED[signal.SIGHUP] = 129

# PyTorch's errors where a loader process was killed, or has no room for a batch
LOADER_LOST = re.compile(r"DataLoader worker .*(is killed by signal|exited unexpectedly)"
                         r"|shared memory|shared file mapping|torch_shm|</?torch_\d|ancdata")


class UserError(ValueError):
    """Report a mistake that the user can correct.

    The text is one line that names the file or flag and what was expected.
    """


class Stopped(BaseException):
    """Report that a signal stopped the work in good order. `signal` is the signal's number.

    Like KeyboardInterrupt no Exception, so that no handler of errors swallows it.
    """

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.signal = number


def report_interrupt(kind, error, trace):
    """Print one line for a Ctrl-C during imports, before `run`; other errors as Python does."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped by Ctrl-C", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.excepthook is sys.__excepthook__:  # else a debugger's
    sys.excepthook = report_interrupt


def run(main, leave=sys.exit):
    """Call main() as a command, and leave(exit status).

    The status is 0 when done, 2 with one line on stderr for a UserError, 129, 130 or 143 when
    stopped by a signal, and 1 with a traceback for a bug.
    """
    for stream in (sys.stdout, sys.stderr):
        # a path that the terminal's encoding lacks must not end a run
        if hasattr(stream, "reconfigure"):
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
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)  # no traceback at exit
    leave(status or 0)


def loader_problem(error):
    """Return the line of an error's text, maybe a traceback, that tells how a process was lost."""
    text = f"{error}\n{error.__cause__ or ''}"  # the cause names the signal that killed a process
    lines = [line for line in text.splitlines() if LOADER_LOST.search(line)]
    return lines[-1].removeprefix("RuntimeError: ").strip().rstrip(".")


@contextmanager
def catching_signals(note):
    """Call note(signal number) inside for the signals of INTERRUPTED, which then end nothing.

    A SIGHUP that nohup ignores stays ignored.
    """
    # only the main thread may set handlers
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda number, frame: note(number))
              for number in INTERRUPTED
              if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command_line(script, argv):
    """Return the words of a command, a list.

    script: the command's file. argv: the arguments of its `main`; None for those of the process.
    """
    if argv is None:
        return list(sys.argv)
    folder, script = Path.cwd(), Path(script).resolve()
    script = script.relative_to(folder) if script.is_relative_to(folder) else script
    return [str(script), *map(str, argv)]


def stop(number):
    """Raise Stopped, as the `note` of `catching_signals`, so that nothing half-written is left."""
    raise Stopped(number)


class _Lines:
    """End every refresh of a tqdm bar with a newline, so that a log file stays readable."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        """Write a refresh of the bar as a line of its own."""
        text = text.replace("\r", "").strip()
        if text:
            with suppress(OSError):  # as in `say`
                self.stream.write(text + "\n")

    def flush(self):
        """Flush the stream; pass over one that is closed or full."""
        with suppress(OSError):
            self.stream.flush()


def progress(iterable=None, **options):
    """Return tqdm(iterable, **options) on stderr: a live bar, or a line every 20 s in a file."""
    from tqdm import tqdm  # inside, so that scripts without a bar run on a bare Python

    options.setdefault("dynamic_ncols", True)
    if not sys.stderr.isatty():
        options.update(file=_Lines(sys.stderr), mininterval=20, maxinterval=60, ascii=True,
                       dynamic_ncols=False, ncols=120)
    return tqdm(iterable, **options)


def say(line):
    """Print a line without breaking a bar on the screen; under torchrun only on rank 0."""
    if os.environ.get("RANK", "0") != "0":
        return
    from tqdm import tqdm

    try:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
    except OSError:  # `| head` has ended, or the log's disk is full: no reason to end a run
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def plural(count, kind):
    """Return a count and what is counted as text, like "1 file" or "1,234 files"."""
    ending = "" if count == 1 or kind == "CSV" else "es" if kind.endswith("x") else "s"
    return f"{count:,} {kind}{ending}"


def number(kind, low, high=None, *, above=False, multiple=1):
    """Return an argparse type: an int or float in [low, high], or (low, high] where `above`.

    kind: int or float. Without `high` an int is at most 10^9 and a float is finite; NaN is refused.
    multiple: the value is divisible by it.
    """
    high = (10**9 if kind is int else sys.float_info.max) if high is None else high

    def convert(text):
        value = kind(text)
        if not (low < value if above else low <= value) or not value <= high:
            bounds = f"above {low}" if above else f"of at least {low}"
            if high != sys.float_info.max:
                bounds += f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {convert.__name__} {bounds}")
        if multiple > 1 and value % multiple:
            raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of {multiple}")
        return value

    # argparse names the type in its message
    convert.__name__ = {int: "whole number", float: "number"}[kind]
    return convert


def path(text):
    """Check that a path, an argparse type, is not empty.

    An unset shell variable gives the empty path, which would be the current folder.
    """
    if not text:
        raise argparse.ArgumentTypeError("'' is not a path")
    return text


def png_path(text):
    """Return the Path of an image to write, an argparse type: its name ends in .png."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name that ends in .png")
    return Path(text)


class Parser(argparse.ArgumentParser):
    """Parse arguments with one-line errors and without abbreviations of flags."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        """Exit with status 2 and the message as one line."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")
