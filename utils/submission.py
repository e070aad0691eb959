"""The Kaggle submission: a CSV of pixel values, written and checked. Needs NumPy alone."""

import numpy as np

from utils.cli import UserError
from utils.files import atomic


def csv_rows(frames):
    """Frames (n, 3, H, W) in [0, 1] as the CSV's text without ids: a list of n rows of integers rint(255 * x), channel first."""
    values = np.rint(255 * frames.double().numpy()).astype(np.uint8).reshape(len(frames), -1)
    return [",".join(map(str, row)) for row in values.tolist()]


def write_submission(path, rows, values):
    """The Kaggle CSV, atomically: `id` and `values` integers a row, the bytes that pandas would write."""
    with atomic(path) as aside, open(aside, "w", newline="", encoding="ascii") as file:
        file.write(",".join(["id", *map(str, range(values))]) + "\n")
        file.writelines(f"{i},{row}\n" for i, row in enumerate(rows))


def check_submission(path, sequences, frames, values):
    """The rows of a submission as a uint8 array (sequences * frames, values); UserError names the first bad line.

    A submission is a header `id,0,...,{values - 1}` and one row a frame: its id, counted from 0, and whole numbers 0..255.
    """
    rows = sequences * frames
    header = ",".join(["id", *map(str, range(values))]).encode()
    longest = max(len(header), 24 + 4 * values) + 2  # a longer line has too many columns; never read more of it

    def shown(field):
        return repr(field[:24].decode("utf-8", "replace")) + ("..." if len(field) > 24 else "")

    def fail(line, what):
        raise UserError(f"{path}, line {line}: {what}")

    def wrong(line, row, content):
        """Say what is wrong with a line that is no row."""
        fields = content.split(b",")
        if len(fields) != values + 1:
            fail(line, f"{len(fields)} columns, expected {values + 1} (id and {values} values)")
        if fields[0] != str(row).encode():
            fail(line, f"id is {shown(fields[0])}, expected {row}")
        for column, field in enumerate(fields[1:]):
            if not field.isdigit() or len(field) > 3 or int(field) > 255:
                fail(line, f"column {column} is {shown(field)}, expected a whole number from 0 to 255")

    try:
        with open(path, "rb") as handle:

            def next_line():
                content = handle.readline(longest)
                return content, content.removesuffix(b"\n").removesuffix(b"\r")

            raw, content = next_line()
            if content != header:
                found = content.split(b",")
                first = next((i for i, (a, b) in enumerate(zip(found, header.split(b","))) if a != b), None)
                what = f"has {len(found)} columns" if first is None else f"has {shown(found[first])} as column {first + 1}"
                fail(1, f"the header {what}, expected id,0,1,...,{values - 1} ({values + 1} columns)")
            pixels = np.empty((rows, values), dtype=np.uint8)
            for row in range(rows):
                line = row + 2
                raw, content = next_line()
                if not raw:
                    fail(line, f"the file ends after {row} rows, expected {rows} ({sequences} sequences of {frames} frames)")
                if not content:
                    fail(line, f"is blank, expected the row with id {row}")
                if not raw.endswith(b"\n") and len(raw) == longest:
                    fail(line, f"is longer than {values + 1} columns can be")
                fields = content.split(b",", 1)
                if fields[0] != str(row).encode() or len(fields) == 1 or fields[1].translate(None, b"0123456789,"):
                    wrong(line, row, content)
                try:
                    found = bytes(map(int, fields[1].split(b",")))  # bytes() refuses numbers above 255, int() empty fields
                except ValueError:
                    found = b""
                if len(found) != values:
                    wrong(line, row, content)
                pixels[row] = np.frombuffer(found, dtype=np.uint8)
            raw, content = next_line()
            if raw:
                line = rows + 2
                fail(line, f"more than {rows} rows, expected the end of the file" if content else "is blank, expected the end of the file")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})")
    return pixels
