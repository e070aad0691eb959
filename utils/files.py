"""Write files atomically, lock a folder, and keep the files that are there already."""

import csv
import errno
import itertools
import os
import re
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.cli import UserError, say

# columns of history.csv, a row an epoch, and of steps.csv, a row every few steps
HISTORY = ("epoch", "lr", "tfr", "tf_share", "beta", "kl_weight", "train_loss",
           "train_reconstruction", "train_mse", "train_kl", "val_mse", "val_psnr_mean",
           "val_psnr_min", "val_psnr_last", "skipped_steps", "seconds", "frames_per_second")
STEPS = "step", "epoch", "lr", "tfr", "tf_share", "beta", "loss", "reconstruction", "mse", "kl"

# what a run writes into its folder, as patterns
OF_A_RUN = ("last.ckpt", "best.ckpt", "epoch=*", "history.csv", "steps.csv", "psnr_per_frame.*",
            "val_pred.gif", "val_pred_large.gif", "tensorboard")
# of them those of a validation rollout, in the order of `write_validation`
ROLLOUT_FILES = "psnr_per_frame.png", "val_pred.gif", "psnr_per_frame.csv"
# in the metadata of images and GIFs, by which a file of this project is recognized
MARK = "pose-conditioned VAE"
# tables have no room for a mark: each is recognized by the file written with it
KNOWN_BY = {"submission.csv": "pred_seq0.gif", "psnr_per_frame.csv": "val_pred.gif"}
# errors of a file system that lacks the operation (CIFS, vboxsf, Lustre, NFS, FUSE)
NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}


def make_folder(path, flag="--save_root"):
    """Create a folder with its parents and return its Path. UserError where it is not writable."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror or error}; "
                        f"expected a folder that can be written") from None
    return Path(path)


def check_save_root(path):
    """Raise UserError where no folder can be made at `path`; make nothing."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # too long a name, a closed folder on the way, links in a circle
        raise UserError(f"--save_root {path}: {error.strerror}; "
                        f"expected a folder that can be written") from None
    parents = [Path(path), *Path(path).absolute().parents]
    there = next(filter(os.path.lexists, parents), parents[-1])  # Windows may lack the drive
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--save_root {path}: {there} is not a folder that can be written; "
                        f"expected one")


# ---------------------------------------------------------------- writing

def flush_to_disk(descriptor):
    """Wait until a file or folder is on the disk, on file systems that support it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


@contextmanager
def atomic(path):
    """Give a path beside `path` to write to; rename it to `path` at the end, or remove it.

    A reader sees the old file or the new one, never half a file, even after a power cut. OSError
    becomes a UserError.
    """
    path = Path(path)
    # file systems take 255 bytes, of which the number and the suffixes need some
    stem = os.fsdecode(os.fsencode(path.name)[:150])
    aside = path.with_name(f".{stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield aside
        with open(aside, "rb+") as file:
            flush_to_disk(file.fileno())
        replace(aside, path)
        if hasattr(os, "O_DIRECTORY"):  # the rename itself must reach the disk too
            flush_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error}); "
                        f"expected room and permission there") from None
    finally:
        with suppress(OSError):  # where nothing could be written, nothing is there to remove
            aside.unlink()


def copy_file(source, path):
    """Copy a file, atomically."""
    with atomic(path) as aside:
        shutil.copyfile(source, aside)


def replace(aside, path, tries=10 if os.name == "nt" else 1):
    """Rename a file; on Windows try for two seconds, as another program may have `path` open."""
    for left in reversed(range(tries)):
        try:
            return os.replace(aside, path)
        except PermissionError:
            if not left:
                raise
            time.sleep(0.2)


def flush_folder(folder):
    """Wait until a folder's names are on the disk, if the folder can be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:  # a folder may be writable and not readable
        if error.errno not in NOT_SUPPORTED | {errno.EACCES, errno.EPERM}:
            raise
        return
    try:
        flush_to_disk(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def optional(path):
    """Print one line, inside, for any error that keeps a table or figure from being written."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, UserError)
        problem = str(error) if known else f"{path}: not written ({type(error).__name__}: {error})"
        say(" ".join(problem.split()) + "; the run continues without it")


def write_csv(path, columns, rows):
    """Write rows (dicts) under a header, atomically."""
    with atomic(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def csv_length(path):
    """Return how many rows a CSV has under its header; 0 where no CSV can be read."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return max(0, sum(1 for _ in csv.reader(file)) - 1)
    except (OSError, ValueError, csv.Error):
        return 0


def sweep_leftovers(folder):
    """Remove the temporary files that a killed run left. Call it with the folder's lock held."""
    for path in Path(folder).glob(".*.part*"):
        if re.fullmatch(r"\..+\.\d+\.part(\.[^.]+)?", path.name):  # a name that `atomic` gives
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------- files of earlier runs

def set_aside(folder):
    """Move an earlier run's files into the first free subfolder of earlier1, earlier2, ...

    Returns the subfolder, itself a save_root; None where there is nothing that a run would
    overwrite. UserError where the files can't be moved.
    """
    folder = Path(folder)
    left = [path for pattern in OF_A_RUN for path in folder.glob(pattern)]
    if all(path.name == "tensorboard" for path in left):  # a run adds to that folder
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
    """Return a folder in which outputs of these names overwrite nothing: root, root/test, ...

    patterns: the names, with wildcards. Files that this project wrote may be overwritten. of_a_run:
    a run writes such names too, so a run's folder is left out.
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
    """Return whether this project wrote a figure or GIF; of a table, the GIF written with it."""
    path = path.with_name(KNOWN_BY.get(path.name, path.name))
    try:
        with open(path, "rb") as file:
            return MARK.encode() in file.read(4096)  # metadata come before the pixels
    except OSError:
        return False


# ---------------------------------------------------------------- the lock

@contextmanager
def locked(folder, flag="--save_root", what="run"):
    """Lock a folder for this process; UserError where another run holds the lock.

    flag: the flag that gives the folder. what: run or sweep, for the error. The lock ends with the
    process, even a killed one. A file system without locks is reported in one line.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no fcntl, so the folder stays unlocked
        yield
        return
    try:
        file = open(Path(folder) / ".lock", "a")  # "w" would empty another program's file
    except OSError as error:
        raise UserError(f"{flag} {folder}: {error.strerror or error}; "
                        f"expected a folder that can be written") from None
    with file:
        os.register_at_fork(after_in_child=file.close)  # a loader process may outlive a killed run
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # other errors mean that locks are not supported
            raise UserError(f"{flag} {folder}: another {what} is using it; "
                            f"expected a folder of its own for each {what}") from None
        except OSError as error:
            say(f"{flag} {folder}: can't be locked there ({error.strerror or error}); "
                f"nothing guards it against a second {what}")
        yield
