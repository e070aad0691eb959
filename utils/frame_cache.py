"""Read image files, and keep decoded frames as uint8 arrays so that none is decoded twice."""

import functools
import hashlib
import io
import json
import os
import secrets
import struct
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

from utils.cli import UserError, progress, say
from utils.files import flush_to_disk

MAX_PIXELS = 64_000_000  # a file that claims more is a mistake or an attack (30 KB can claim 10 GB)
# read_image refuses such a file in one line of its own
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_image(path):
    """Return an image file as a PIL image in RGB. UserError for a file that can't be read."""
    try:
        with open(path, "rb") as file, Image.open(io.BytesIO(pixels_only(file.read()))) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{path}: the image claims {image.width}x{image.height} pixels; "
                                f"expected at most {MAX_PIXELS:,}")
            return to_rgb(image, path)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"{path}: the image claims more than {MAX_PIXELS:,} pixels") from None
    except PIL.UnidentifiedImageError:
        raise UserError(f"{path}: is no image that Pillow knows; expected a PNG") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read as an image ({error.strerror or error}); "
                        f"expected a PNG") from None
    except Exception as error:  # for broken files Pillow raises SyntaxError, ValueError, ...
        raise UserError(f"{path}: can't be read as an image ({type(error).__name__}: {error}); "
                        f"expected a PNG") from None


def pixels_only(data):
    """Return the bytes of a PNG without the chunks that don't affect its pixels.

    Pillow refuses a PNG whose text chunks are long or damaged. Any other file is returned as it is.
    """
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    kept, at = [data[:8]], 8
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind[:1].isupper() or kind == b"tRNS":  # lower case marks a chunk as optional
            kept.append(data[at:at + size + 12])
        at += size + 12
    return b"".join(kept) + data[at:]


def to_rgb(image, path):
    """Return a PIL image of any mode in RGB, 8 bits a channel, scaled from its own range.

    UserError for values of unknown range: signed, floating-point, 32 bits.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    sample_format = max(tags.get(SAMPLEFORMAT, (1,)))
    if image.mode in ("I", "F") or sample_format != 1:
        kind = {"I": "32-bit or signed", "F": "floating-point"}.get(image.mode, "signed")
        raise UserError(f"{path}: holds {kind} values; expected an image of 8 or 16 bits a channel")
    if image.mode.startswith("I;16"):  # convert("RGB") would clip
        white = 2 ** tags.get(BITSPERSAMPLE, (16,))[0] - 1  # 12 bits are possible, too
        values = np.asarray(image, dtype=np.float64) * (255 / white)
        if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero: Pillow inverts only 8 bits
            values = 255 - values
        image = Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8))
    elif image.mode == "La":  # Pillow has no conversion of La to RGB
        image = image.convert("LA")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def decode(paths, frame_H, frame_W, workers=4, out=None, desc="decoding"):
    """Return images decoded to uint8 (N, 3, frame_H, frame_W), resized as `frame_transform` does.

    workers: threads. out: the array to write to, else a new one. desc: the bar's text.
    """
    if out is None:
        out = np.empty((len(paths), 3, frame_H, frame_W), np.uint8)

    def decode_one(i):
        image = read_image(paths[i]).resize((frame_W, frame_H), Image.Resampling.BILINEAR)
        out[i] = np.asarray(image).transpose(2, 0, 1)

    # threads: Pillow releases the GIL while it decodes and resizes
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            for _ in progress(pool.map(decode_one, range(len(paths))), total=len(paths),
                              desc=desc, unit="image", leave=False, delay=1):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return out


def fingerprint(paths, frame_H, frame_W):
    """Return a key that changes with any image, the frame shape and Pillow's version.

    A replaced or renamed image has another inode or time of change, even where name, size and time
    of modification are equal.
    """
    try:
        stats = [(f"{path.parent.name}/{path.name}", status.st_size, status.st_mtime_ns,
                  status.st_ctime_ns, status.st_ino)
                 for path in paths for status in [path.stat()]]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; "
                        f"expected a readable image") from None
    described = json.dumps([PIL.__version__, frame_H, frame_W,
                            str(paths[0].parent.resolve()), stats])
    return hashlib.sha256(described.encode()).hexdigest()[:20]


def cache_folder(root, cache_dir=None):
    """Make and return the folder of the frame cache; None where none can be written.

    The folder is --cache_dir, else `.frame_cache` in the data folder, else in the user's cache
    folder. UserError for a --cache_dir that can't be written.
    """
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    folders = [Path(cache_dir)] if cache_dir else [Path(root) / ".frame_cache"]
    if not cache_dir and user.is_absolute():  # "~" stays where a user has no name and no HOME
        folders.append(user / "pose-conditioned-vae")
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            problem = error.strerror or error
    if cache_dir:
        raise UserError(f"--cache_dir {cache_dir}: {problem}; expected a folder that can be "
                        f"written, or --no_cache")
    say_once(f"--DR {root}: can't be written ({problem}), so frames are decoded into memory at "
             f"every start; --cache_dir keeps them")
    return None


@functools.cache
def say_once(line):
    """Print a line the first time only: each split asks for the cache's folder."""
    say(line)


def cached(paths, frame_H, frame_W, folder, workers=4, desc="decoding"):
    """Return the uint8 array of `decode`, memory-mapped from a file in `folder`.

    A missing file is made first. Two processes may do so at once: each writes a file of its own and
    renames it, so readers see a whole file or none. Nothing is ever written to the map; it is
    copy-on-write because torch warns of read-only memory. Without a folder (None) the array is in
    memory.
    """
    key, shape = fingerprint(paths, frame_H, frame_W), (len(paths), 3, frame_H, frame_W)
    if folder is None:
        return decode(paths, frame_H, frame_W, workers, desc=desc)
    path = Path(folder) / f"{key}.npy"
    array = open_array(path, shape)
    if array is not None:
        return array
    aside = path.with_suffix(f".{secrets.token_hex(6)}.part")
    try:
        # the array is not kept in a variable: Windows can't rename a file that is mapped
        decode(paths, frame_H, frame_W, workers, new_array(aside, shape), desc)
        with open(aside, "rb+") as file:  # else frames may be black after a power cut
            flush_to_disk(file.fileno())
        try:
            os.replace(aside, path)
        except PermissionError:  # on Windows, where another process maps its finished file
            array = open_array(path, shape)
            if array is None:
                raise
            return array
        return np.lib.format.open_memmap(path, mode="c")
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; expected room for the frame cache, "
                        f"another --cache_dir, or --no_cache") from None
    finally:
        with suppress(OSError):  # where nothing could be written, nothing is there to remove
            aside.unlink()


def open_array(path, shape):
    """Return the uint8 array of this shape in a .npy file, memory-mapped; None if there is none."""
    try:
        array = np.lib.format.open_memmap(path, mode="c")
    except Exception:  # a missing or damaged file, which NumPy reports in many ways
        return None
    return array if array.shape == shape and array.dtype == np.uint8 else None


def new_array(path, shape):
    """Return a uint8 array mapped to a new .npy file, whose room on the disk is allocated."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):  # a full disk under a memory map ends the process (SIGBUS)
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def to_float(frames):
    """Return uint8 frames as float32 in [0, 1], bitwise what ToTensor gives on the CPU."""
    return torch.empty(frames.shape, device=frames.device).copy_(frames).div_(_white(frames.device))


@functools.cache
def _white(device):
    """Return 255 as a tensor: CUDA replaces division by a number with another rounding."""
    return torch.full((), 255.0, device=device)
