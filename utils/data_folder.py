"""Find the images of a data folder (--DR) and check its layout. Pure Python.

    DR/train/train_img/*.png   DR/train/train_label/*.png     frames and poses, same names
    DR/val/val_img/*.png       DR/val/val_label/*.png         one validation sequence
    DR/test/test_img/{0..4}/*  DR/test/test_label/{0..4}/*    first frames, and all poses

Images are ordered by the one integer in their name.
"""

import os
import re
from contextlib import suppress
from itertools import islice, pairwise
from pathlib import Path

from utils.cli import UserError, say

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


# ---------------------------------------------------------------- images of a folder

def image_number(path):
    """Return the one integer in the name of an image ("12.png", "frame12.png").

    UserError for a name without an integer or with several.
    """
    numbers = re.findall(r"\d+", path.stem)
    if len(numbers) != 1:
        raise UserError(f"{path}: the name holds {len(numbers) or 'no'} integers; "
                        f"expected exactly one, like 12.png")
    return int(numbers[0])


def list_images(folder):
    """Return the images of a folder, ordered by the integers in their names.

    Hidden files and files that are no images are left out. UserError for a folder without images.
    """
    folder = Path(folder)
    try:
        with os.scandir(folder) as entries:
            # a link that points nowhere is kept: reading it fails with its name
            paths = [folder / entry.name for entry in entries if not entry.name.startswith(".")
                     and (not os.path.isdir(entry) if entry.is_symlink() else entry.is_file())]
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; "
                        f"expected a folder of images") from None
    images = by_number((path for path in sorted(paths) if path.suffix.lower() in IMAGES),
                       image_number)
    if not images:
        raise UserError(f"{folder}: holds no images; expected files like 0.png")
    return list(images.values())


def by_number(paths, number):
    """Return {number(path): path} in numeric order. UserError where two paths share a number."""
    numbered = {}
    for path in paths:
        other = numbered.setdefault(number(path), path)
        if other != path:
            raise UserError(f"{path}: has the same number as {other.name}; "
                            f"expected every number once")
    return dict(sorted(numbered.items()))


def list_pairs(root, mode):
    """Return the frames and the pose images of the train or val split, two lists of equal length.

    UserError for a frame without a pose image, and the reverse.
    """
    check_root(root, mode)
    frames = list_images(Path(root) / mode / f"{mode}_img")
    labels = list_images(Path(root) / mode / f"{mode}_label")
    frame_at, label_at = ({image_number(p): p for p in paths} for paths in (frames, labels))
    for number in sorted(frame_at.keys() ^ label_at.keys()):
        if number in frame_at:
            raise UserError(f"{frame_at[number]}: has no pose image; "
                            f"expected {labels[0].parent / frame_at[number].name}")
        raise UserError(f"{label_at[number]}: has no frame; "
                        f"expected {frames[0].parent / label_at[number].name}")
    return frames, labels


def report_gap(images):
    """Print one line where numbers between the first and the last of `list_images` are missing."""
    numbers = [image_number(path) for path in images]
    missing = numbers[-1] - numbers[0] + 1 - len(numbers)
    if missing:
        first = next(before + 1 for before, after in pairwise(numbers) if after > before + 1)
        say(f"{images[0].parent}: lacks {missing} of the numbers {numbers[0]} to {numbers[-1]}, "
            f"the first {first}; images on both sides of a gap count as consecutive")


def list_test_sequences(root):
    """Return [(first frame, pose images)] of every test sequence, ordered by folder number.

    UserError for a sequence without its first frame or poses, and for a gap in the numbers.
    """
    check_root(root, "test")
    image_root, label_root = Path(root) / "test" / "test_img", Path(root) / "test" / "test_label"
    images, labels = list_number_folders(image_root), list_number_folders(label_root)
    for number in sorted(images.keys() ^ labels.keys()):
        folder, missing, other = ((images[number], "poses", label_root) if number in images
                                  else (labels[number], "first frame", image_root))
        raise UserError(f"{folder}: has no {missing}; expected {other / folder.name}")
    sequences = []
    for number, folder in images.items():
        firsts = list_images(folder)
        if len(firsts) != 1:
            raise UserError(f"{folder}: holds {len(firsts)} images; "
                            f"expected one, the first frame of the sequence")
        sequences.append((firsts[0], list_images(labels[number])))
    # a submission's rows go by position: after a gap they would count for another sequence
    for number in range(min(images), max(images)):
        if number not in images:
            raise UserError(f"{image_root / str(number)}: is missing; expected folders with "
                            f"consecutive numbers, {min(images)} to {max(images)}")
    return sequences


def list_number_folders(root):
    """Return {number: folder} of the folders in root whose name is a number, in numeric order.

    UserError where root has none.
    """
    try:
        folders = [path for path in Path(root).iterdir()
                   if path.is_dir() and path.name.isdecimal()]
    except OSError as error:
        raise UserError(f"{root}: {error.strerror or error}; "
                        f"expected folders 0, 1, 2, ...") from None
    if not folders:
        raise UserError(f"{root}: holds no sequence; expected folders 0, 1, 2, ...")
    return by_number(sorted(folders), lambda path: int(path.name))


# ---------------------------------------------------------------- the place of the folder

def check_root(root, mode):
    """Raise UserError where the data folder is one or two levels above or below --DR."""
    root = Path(root)
    if not os.path.isdir(root / mode):
        for folder in folders_around(root):
            if os.path.isdir(folder / mode / f"{mode}_img"):
                raise UserError(f"--DR {root}: holds no {mode}/; expected the folder that has "
                                f"train/, val/ and test/, which is {folder}")


def folders_around(root):
    """Yield the two folders above root, then those one and two levels below it."""
    yield from list(Path(os.path.abspath(root)).parents)[:2]
    level = [root]
    for _ in range(2):
        below = []
        for folder in level:
            with suppress(OSError), os.scandir(folder) as entries:
                # a hundred names suffice: --DR may be a home folder
                below += [folder / entry.name for entry in islice(entries, 100)
                          if not entry.name.startswith(".") and entry.is_dir()]
        yield from sorted(below)
        level = below
