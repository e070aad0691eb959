"""What the user types and sees: one-line errors with exit status 2, progress bars, and the shared pieces of every parser.

The lowest room of the house: it imports nothing of the project.
"""

import argparse
import math
import signal
import sys

from tqdm import tqdm

INTERRUPTED = {signal.SIGINT: 130, signal.SIGTERM: 143}  # exit status by signal, as a shell reports it


class UserError(Exception):
    """A mistake that the user can correct. Its one-line text names the file or flag and says what was expected."""


def run(main):
    """Call main() as a command: exit 0 when done, 2 with one line on stderr for a UserError, 130 for Ctrl-C."""
    try:
        status = main()
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        status = INTERRUPTED[signal.SIGINT]
    sys.exit(status or 0)


class _Lines:
    """A stream for tqdm that ends every refresh with a newline, so that a bar stays readable in a log file."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        text = text.replace("\r", "").strip()
        if text:
            self.stream.write(text + "\n")

    def flush(self):
        self.stream.flush()


def progress(iterable=None, **options):
    """tqdm(iterable, **options) on stderr: a live bar on a terminal, a line every 20 seconds in a file."""
    options.setdefault("dynamic_ncols", True)
    if not sys.stderr.isatty():
        options.update(file=_Lines(sys.stderr), mininterval=20, maxinterval=60, ascii=True, dynamic_ncols=False, ncols=120)
    return tqdm(iterable, **options)


def number(kind, low, high=math.inf, *, above=False):
    """An argparse type: an int or float with low <= value <= high (low < value where `above`), never NaN."""

    def convert(text):
        value = kind(text)
        if not (low < value if above else low <= value) or not value <= high or (math.isinf(value) and high == math.inf):
            bounds = f"above {low}" if above else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {bounds}" + ("" if high == math.inf else f" and at most {high}"))
        return value

    convert.__name__ = {int: "whole number", float: "number"}[kind]  # argparse names the type in its message
    return convert


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose flags keep their full names (no abbreviations)."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")
