"""Write and check the Kaggle submission, a CSV of pixel values. Needs NumPy alone."""

import numpy as np

from utils.cli import UserError
from utils.files import atomic

COMPETITION = 5, 630, (3, 32, 64)  # sequences, frames of each, shape of a frame


def csv_rows(frames):
    """Return frames (n, 3, H, W), float in [0, 1], as n rows of the CSV's text without ids.

    A row holds the whole numbers rint(255 * x), channel first.
    """
    values = np.rint(255 * frames.double().numpy()).astype(np.uint8).reshape(len(frames), -1)
    return [",".join(map(str, row)) for row in values.tolist()]


def write_submission(path, rows, values):
    """Write the Kaggle CSV atomically, in pandas' format.

    rows: texts of `csv_rows`. values: how many numbers a row holds.
    """
    with atomic(path) as aside, open(aside, "w", newline="", encoding="ascii") as file:
        file.write(",".join(["id", *map(str, range(values))]) + "\n")
        file.writelines(f"{i},{row}\n" for i, row in enumerate(rows))


def format_warning(sequences, frames, shape):
    """Return a line on how a submission differs from the competition's format; None if it fits.

    frames: of each sequence. shape: (3, H, W) of a frame.
    """
    def described(sequences, frames, shape):
        return (f"{sequences} sequences of {frames} frames of {shape[1]}x{shape[2]}, "
                f"{sequences * frames:,} rows of {1 + int(np.prod(shape)):,} columns")

    found = sequences, frames, tuple(shape)
    if found == COMPETITION:
        return None
    return (f"not the competition's format: {described(*found)}; "
            f"the competition expects {described(*COMPETITION)}")


def check_submission(path, sequences, frames, values):
    """Return the pixel values of a submission, uint8 (sequences * frames, values).

    A submission is a header `id,0,...,{values - 1}` and one row a frame: an id, counted from 0, and
    whole numbers in 0..255. UserError names the first bad line.
    """
    try:
        with open(path, "rb") as handle:
            return _Reader(path, handle, values).read(sequences, frames)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


class _Reader:
    """Read a submission line by line."""

    def __init__(self, path, handle, values):
        self.path, self.handle, self.values = path, handle, values
        self.header = ",".join(["id", *map(str, range(values))]).encode()
        # a longer line has too many columns, and is read no further
        self.longest = max(len(self.header), 24 + 4 * values) + 2

    def read(self, sequences, frames):
        """Return all rows; UserError names the first bad line."""
        rows = sequences * frames
        self.check_header(self.next_line()[1])
        pixels = np.empty((rows, self.values), dtype=np.uint8)
        for row in range(rows):
            raw, content = self.next_line()
            if not raw:
                self.fail(row + 2, f"the file ends after {row} rows, expected {rows} "
                                   f"({sequences} sequences of {frames} frames)")
            pixels[row] = self.numbers(row, raw, content)
        raw, content = self.next_line()
        if raw:
            problem = f"more than {rows} rows" if content else "is blank"
            self.fail(rows + 2, f"{problem}, expected the end of the file")
        return pixels

    def next_line(self):
        """Return the next line, bytes, with and without its line end."""
        raw = self.handle.readline(self.longest)
        return raw, raw.removesuffix(b"\n").removesuffix(b"\r")

    def check_header(self, content):
        """Raise UserError where the first line is not the expected header."""
        if content == self.header:
            return
        found = content.split(b",")
        pairs = enumerate(zip(found, self.header.split(b",")))
        first = next((i for i, (a, b) in pairs if a != b), None)
        problem = (f"has {len(found)} columns" if first is None
                   else f"has {_shown(found[first])} as column {first + 1}")
        self.fail(1, f"the header {problem}, expected id,0,1,...,{self.values - 1} "
                     f"({self.values + 1} columns)")

    def numbers(self, row, raw, content):
        """Return the values of a row, uint8 (values,). UserError names what is wrong with it."""
        line = row + 2
        if not content:
            self.fail(line, f"is blank, expected the row with id {row}")
        if not raw.endswith(b"\n") and len(raw) == self.longest:
            self.fail(line, f"is longer than {self.values + 1} columns can be")
        fields = content.split(b",", 1)
        plain = len(fields) == 2 and not fields[1].translate(None, b"0123456789,")
        if fields[0] != str(row).encode() or not plain:
            self.explain(line, row, content)
        try:
            # bytes() refuses numbers above 255, int() empty fields
            found = bytes(map(int, fields[1].split(b",")))
        except ValueError:
            found = b""
        if len(found) != self.values:
            self.explain(line, row, content)
        return np.frombuffer(found, dtype=np.uint8)

    def explain(self, line, row, content):
        """Raise UserError for what is wrong with a line that is no row."""
        fields = content.split(b",")
        if len(fields) != self.values + 1:
            self.fail(line, f"{len(fields)} columns, expected {self.values + 1} "
                            f"(id and {self.values} values)")
        if fields[0] != str(row).encode():
            self.fail(line, f"id is {_shown(fields[0])}, expected {row}")
        for column, field in enumerate(fields[1:]):
            if not field.isdigit() or len(field) > 3 or int(field) > 255:
                self.fail(line, f"column {column} is {_shown(field)}, "
                                f"expected a whole number from 0 to 255")

    def fail(self, line, what):
        """Raise UserError for a line, counted from 1."""
        raise UserError(f"{self.path}, line {line}: {what}")


def _shown(field):
    """Return the first bytes of a field as text for a message."""
    return repr(field[:24].decode("utf-8", "replace")) + ("..." if len(field) > 24 else "")
