"""Files and folders: atomic writes, CSV tables, a lock for a folder, what was there before."""

import csv
import errno
import itertools
import os
import re
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.cli import UserError, say

# columns of history.csv, a row an epoch, and of steps.csv, a row every few steps
HISTORY = ("epoch", "lr", "tfr", "tf_share", "beta", "kl_weight", "train_loss", "train_reconstruction", "train_mse",
           "train_kl", "val_mse", "val_psnr_mean", "val_psnr_min", "val_psnr_last", "skipped_steps", "seconds",
           "frames_per_second")
STEPS = "step", "epoch", "lr", "tfr", "tf_share", "beta", "loss", "reconstruction", "mse", "kl"

# what a run writes into its folder, as patterns
OF_A_RUN = ("last.ckpt", "best.ckpt", "epoch=*", "history.csv", "steps.csv", "psnr_per_frame.*",
            "val_pred.gif", "val_pred_large.gif", "tensorboard")
# in the metadata of images and GIFs, so that a file of this project is known as one
MARK = "pose-conditioned VAE"
# tables have no room for a mark: the file that is written with each
KNOWN_BY = {"submission.csv": "pred_seq0.gif", "psnr_per_frame.csv": "val_pred.gif"}
# what a file system says that has no such operation (CIFS, vboxsf, Lustre, NFS, FUSE)
NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}


def make_folder(path, flag="--save_root"):
    """Create a folder with its parents. UserError where nothing can be written there."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror or error}; "
                        f"expected a folder that can be written") from None
    return Path(path)


def check_save_root(path):
    """Raise UserError where no folder can be made at `path`, before any long work; make nothing."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # too long a name, a closed folder on the way, links in a circle
        raise UserError(f"--save_root {path}: {error.strerror}; "
                        f"expected a folder that can be written") from None
    there = next(p for p in [Path(path), *Path(path).absolute().parents] if os.path.lexists(p))
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--save_root {path}: {there} is not a folder that can be written; "
                        f"expected one")


# ---------------------------------------------------------------- writing

def flush_to_disk(descriptor):
    """Wait until a file or folder is on the disk; pass over a file system that can't tell."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


@contextmanager
def atomic(path):
    """Give a path beside `path` to write to; rename it to `path` at the end, or remove it.

    A reader sees the old file or the new one, never half of one, also after a power cut. OSError
    becomes a UserError.
    """
    path = Path(path)
    stem = os.fsdecode(os.fsencode(path.name)[:150])  # with more a long name would be too long
    aside = path.with_name(f".{stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield aside
        with open(aside, "rb+") as file:
            flush_to_disk(file.fileno())
        os.replace(aside, path)
        if hasattr(os, "O_DIRECTORY"):  # the rename itself must reach the disk too
            flush_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error}); "
                        f"expected room and permission there") from None
    finally:
        with suppress(OSError):  # a path that can't be there has nothing to remove either
            aside.unlink()


def flush_folder(folder):
    """Wait until a folder's names are on the disk; pass over a folder that can't be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:  # a folder may be open to writing and closed to reading
        if error.errno not in NOT_SUPPORTED | {errno.EACCES, errno.EPERM}:
            raise
        return
    try:
        flush_to_disk(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def optional(path):
    """Inside, whatever stops the writing of a table or figure at `path` is one line, no error."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, UserError)
        problem = str(error) if known else f"{path}: not written ({type(error).__name__}: {error})"
        say(" ".join(problem.split()) + "; the run continues without")


def write_csv(path, columns, rows):
    """Write rows (dicts) under a header, atomically."""
    with atomic(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def csv_length(path):
    """Return how many rows a CSV has under its header; 0 where there is none that can be read."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return max(0, sum(1 for _ in csv.reader(file)) - 1)
    except (OSError, ValueError, csv.Error):
        return 0


def sweep_leftovers(folder):
    """Remove the temporary files that a killed run left. Call it with the folder's lock held."""
    for path in Path(folder).glob(".*.part*"):
        if re.fullmatch(r"\..+\.\d+\.part(\.[^.]+)?", path.name):  # no other program's
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------- what was there before

def set_aside(folder):
    """Move what an earlier run left in its folder into earlier1 in there, or the first free number.

    Return the new folder, itself a save_root; None where nothing was there that a new run would
    overwrite. UserError where the files can't be moved.
    """
    folder = Path(folder)
    left = [path for pattern in OF_A_RUN for path in folder.glob(pattern)]
    if all(path.name == "tensorboard" for path in left):  # a run adds to that
        return None
    aside = next(path for n in itertools.count(1)
                 if not os.path.lexists(path := folder / f"earlier{n}"))
    try:
        aside.mkdir()
        for path in left:
            path.rename(aside / path.name)
    except OSError as error:
        raise UserError(f"--save_root {folder}: holds an earlier run that can't be moved to "
                        f"{aside} ({error.strerror or error}); "
                        f"expected --resume, or another folder") from None
    return aside


def output_folder(root, patterns, of_a_run=False):
    """Return the folder for outputs of these names: `root`, or `test` in it where they'd overwrite.

    No file is overwritten that this project did not write, and where the names are those of a
    run's files, a run's folder keeps its own.
    """
    root = Path(root)
    folders = itertools.chain(["", "test"], (f"test{n}" for n in itertools.count(2)))
    if of_a_run and any((root / name).exists() for name in OF_A_RUN[:2] + ("history.csv",)):
        next(folders)
    for folder in map(root.joinpath, folders):
        there = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
        foreign = next((path for path in there if not is_ours(path)), None)
        if foreign is None:
            return folder
        say(f"--save_root {root}: {foreign} is not of this project and stays as it is")


def is_ours(path):
    """Return whether this project wrote a figure or a GIF, or the GIF that a table goes with."""
    path = path.with_name(KNOWN_BY.get(path.name, path.name))
    try:
        with open(path, "rb") as file:
            return MARK.encode() in file.read(4096)  # metadata come before the pixels
    except OSError:
        return False


# ---------------------------------------------------------------- the lock

@contextmanager
def locked(folder, flag="--save_root", what="run"):
    """Hold a folder for this process; UserError where another run (or sweep) holds it.

    A killed process lets go by itself. Where the system has no such locks, a line says so.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no fcntl; the folder is not guarded there
        yield
        return
    try:
        file = open(Path(folder) / ".lock", "a")  # not "w", which would empty somebody else's file
    except OSError as error:
        raise UserError(f"{flag} {folder}: {error.strerror or error}; "
                        f"expected a folder that can be written") from None
    with file:
        os.register_at_fork(after_in_child=file.close)  # a loader process may outlive a killed run
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # EAGAIN and EWOULDBLOCK alone mean that it is held
            raise UserError(f"{flag} {folder}: another {what} is using it; "
                            f"expected a folder of its own for each {what}") from None
        except OSError as error:
            say(f"{flag} {folder}: can't be locked there ({error.strerror or error}); "
                f"nothing guards it against a second {what}")
        yield
