"""Files and folders: atomic writes, CSV tables, the lock on a run's folder, earlier runs set aside."""

import csv
import itertools
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.cli import UserError

# what a run writes into its folder, as patterns
OF_A_RUN = ("last.ckpt", "best.ckpt", "epoch=*", "history.csv", "steps.csv", "psnr_per_frame.*",
            "val_pred.gif", "val_pred_large.gif", "tensorboard")


def make_folder(path, flag="--save_root"):
    """Create a folder with its parents. UserError where that can't be done, or nothing can be written there."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror or error}; expected a folder that can be written") from None
    return Path(path)


def check_save_root(path):
    """UserError where a folder can't be made at `path`, before any long work; makes nothing."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # too long a name, a closed folder on the way, links in a circle
        raise UserError(f"--save_root {path}: {error.strerror}; expected a folder that can be written") from None
    there = next(p for p in [Path(path), *Path(path).absolute().parents] if os.path.lexists(p))
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--save_root {path}: {there} is not a folder that can be written; expected one")


@contextmanager
def atomic(path):
    """A path beside `path` to write to; flushed and renamed to `path` at the end, removed where anything fails.

    A reader sees the old file or the new one, never half of one, also after a power cut. OSError becomes a UserError.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part{path.suffix}")
    try:
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        if hasattr(os, "O_DIRECTORY"):  # the rename itself must reach the disk too
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error}); expected room and permission there") from None
    finally:
        with suppress(OSError):  # a path that can't be there has nothing to remove either
            aside.unlink()


def sweep_leftovers(folder):
    """Remove the temporary files that a killed run left in its folder. Call it with the folder's lock held."""
    for path in Path(folder).glob(".*.part*"):
        path.unlink(missing_ok=True)


def set_aside(folder):
    """Move what an earlier run left in its folder into earlier1 in there, or the first such number that is free.

    Returns the new folder, itself a save_root to go on in; None where there was no checkpoint. UserError where that can't be done.
    """
    folder = Path(folder)
    left = [path for pattern in OF_A_RUN for path in folder.glob(pattern)]
    if not any(path.suffix == ".ckpt" for path in left):
        return None
    aside = next(path for n in itertools.count(1) if not os.path.lexists(path := folder / f"earlier{n}"))
    try:
        aside.mkdir()
        for path in left:
            path.rename(aside / path.name)
    except OSError as error:
        raise UserError(f"--save_root {folder}: holds an earlier run that can't be moved to {aside} ({error.strerror or error}); "
                        f"expected --resume, or another folder") from None
    return aside


def write_csv(path, columns, rows):
    """Rows (dicts) under a header, atomically."""
    with atomic(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def locked(folder, flag="--save_root", what="run"):
    """Hold a folder for this process; UserError where another run (or sweep) holds it. A killed process lets go by itself."""
    try:
        import fcntl
    except ImportError:  # Windows has no fcntl; the folder is not guarded there
        yield
        return
    try:
        file = open(Path(folder) / ".lock", "w")
    except OSError as error:
        raise UserError(f"{flag} {folder}: {error.strerror or error}; expected a folder that can be written") from None
    with file:
        os.register_at_fork(after_in_child=file.close)  # a loader process may outlive a killed run for seconds
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{flag} {folder}: another {what} is using it; expected a folder of its own for each {what}") from None
        yield
