"""Decoded frames: reading an image file, and the cache of uint8 arrays that spares decoding it twice."""

import functools
import hashlib
import json
import os
import secrets
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torchvision import transforms

from utils.cli import UserError, progress

MAX_PIXELS = 64_000_000  # a picture that claims more is a mistake or an attack (a 30 KB PNG can claim 10 GB)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # said by read_image, in one line


def read_image(path):
    """A picture file as a PIL image in RGB. UserError names a file that can't be read as one."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{path}: the picture claims {image.width}x{image.height} pixels; expected at most {MAX_PIXELS:,}")
            if image.mode.startswith("I"):  # 16 bits a channel: convert("RGB") would clip instead of scaling
                scaled = np.asarray(image, dtype=np.float64) / 257
                return Image.fromarray(np.rint(scaled.clip(0, 255)).astype(np.uint8)).convert("RGB")
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert("RGB")
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"{path}: the picture claims more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow raises many kinds for broken files: OSError, SyntaxError, ValueError, struct.error
        raise UserError(f"{path}: can't be read as a picture ({type(error).__name__}: {error}); expected a PNG") from None


def decode(paths, frame_H, frame_W, workers=4, out=None, desc="decoding"):
    """Pictures to uint8 (N, 3, frame_H, frame_W), resized as `frame_transform` does, with a progress bar."""
    if out is None:
        out = np.empty((len(paths), 3, frame_H, frame_W), np.uint8)
    resize = transforms.Resize((frame_H, frame_W))

    def decode_one(i):
        out[i] = np.asarray(resize(read_image(paths[i]))).transpose(2, 0, 1)

    with ThreadPoolExecutor(max(1, workers)) as pool:  # Pillow releases the GIL while it decodes and resizes
        try:
            for _ in progress(pool.map(decode_one, range(len(paths))), total=len(paths), desc=desc, unit="picture", leave=False,
                              delay=1):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return out


def fingerprint(paths, frame_H, frame_W):
    """A key that changes with any picture's name, size or time of change, with the frame shape and with Pillow."""
    try:
        stats = [(f"{path.parent.name}/{path.name}", status.st_size, status.st_mtime_ns) for path in paths for status in [path.stat()]]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; expected a readable picture") from None
    described = json.dumps([PIL.__version__, frame_H, frame_W, str(paths[0].parent.resolve()), stats])
    return hashlib.sha256(described.encode()).hexdigest()[:20]


def cache_folder(root, cache_dir=None):
    """--cache_dir, else `.frame_cache` beside the data, else the user's cache folder; None where none can be written."""
    wanted = Path(cache_dir) if cache_dir else Path(root) / ".frame_cache"
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "pose-conditioned-vae"
    for folder in [wanted] if cache_dir else [wanted, user]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            problem = error.strerror or error
    if cache_dir:
        raise UserError(f"--cache_dir {cache_dir}: {problem}; expected a folder that can be written, or --no_cache")
    return None


def cached(paths, frame_H, frame_W, folder, workers=4, desc="decoding"):
    """The uint8 array of `decode`, memory-mapped from `folder`; made there first where it is not up to date.

    Two processes may build it at once: each writes a file of its own and renames it; readers see a whole file or none.
    The map is copy-on-write, which keeps torch quiet about read-only memory; nothing is ever written to it.
    """
    key, shape = fingerprint(paths, frame_H, frame_W), (len(paths), 3, frame_H, frame_W)
    if folder is None:
        return decode(paths, frame_H, frame_W, workers, desc=desc)
    path = Path(folder) / f"{key}.npy"
    try:
        array = np.lib.format.open_memmap(path, mode="c")
        if array.shape == shape and array.dtype == np.uint8:
            return array
    except Exception:  # not there yet, or damaged, which NumPy reports in many ways: made anew
        pass
    aside = path.with_suffix(f".{secrets.token_hex(6)}.part")
    try:
        array = np.lib.format.open_memmap(aside, mode="w+", dtype=np.uint8, shape=shape)
        if hasattr(os, "posix_fallocate"):  # a disk that fills up under a memory map is a SIGBUS
            with open(aside, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, aside.stat().st_size)
        decode(paths, frame_H, frame_W, workers, array, desc)
        array.flush()
        os.replace(aside, path)
        return np.lib.format.open_memmap(path, mode="c")
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; expected room for the frame cache, another --cache_dir, or --no_cache") from None
    finally:
        with suppress(OSError):  # a path that can't be there has nothing to remove either
            aside.unlink()


def to_float(pictures):
    """uint8 to float32 in [0, 1], bit for bit as ToTensor does it on the CPU."""
    return torch.empty(pictures.shape, device=pictures.device).copy_(pictures).div_(_white(pictures.device))


@functools.cache
def _white(device):
    """255 as a tensor: by a number CUDA would not divide but multiply by 1 / 255, which rounds in another way."""
    return torch.full((), 255.0, device=device)
