"""What a machine offers: the device, its fastest precision, and memory that is kept."""

import ctypes
import math
import os
import re
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from utils.cli import UserError

# PyTorch's own error is torch.OutOfMemoryError; others are found by the words of a CPU, cuDNN or cuBLAS, and the driver
OUT_OF_MEMORY = "can't allocate memory|ALLOC(ATION)?_FAILED|CUDA error: out of memory"
CPU_PIXELS = 8 * 32 * 64  # what a CPU computes at a time; more gains little (docs/PERFORMANCE.md)
OLDEST_TORCH = (2, 6)  # as requirements.txt and scripts/setup.sh have it


def check_torch():
    """Raise UserError where PyTorch is too old: a run would end in the middle."""
    if torch.__version__ < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise UserError(f"PyTorch {torch.__version__}: is too old; expected {oldest} or newer "
                        f"(pip install -r requirements.txt)")


def pick_device(name):
    """Return the torch.device of --device (None: CUDA where there is one, else the CPU).

    UserError for one that is missing.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        keep_memory_and_kernels()
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"--device {name}: there are {count} CUDA devices here; "
                            f"expected one that is there, or cpu")
        if device.index is not None:
            torch.cuda.set_device(device)
        try:
            torch.zeros(1, device=device).add_(1).item()
        except torch.OutOfMemoryError:
            raise UserError(f"--device {name}: has no free memory; "
                            f"expected some, another device, or cpu") from None
        except RuntimeError as error:  # a card that this build of PyTorch has no kernels for
            raise UserError(f"--device {name}: PyTorch {torch.__version__} can't compute on it "
                            f"({str(error).splitlines()[0]}); "
                            f"expected another build of it, or --device cpu") from None
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: there is none here; expected cpu or cuda")
    return device


def keep_memory_and_kernels():
    """Have the C library keep what is freed, and oneDNN every kernel that it has built.

    Activations fetched anew from the system are a page fault for every 4 KB, and oneDNN by default
    forgets all but 1024 kernels: fewer than training and validating take together. The first two
    options are glibc's (mallopt(3)); another C library goes on as it does. The third is oneDNN's,
    which reads it at its first convolution.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    # 32 MB is the most that old versions take
    mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, 32 << 20)
    mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


def pick_precision(wanted, device):
    """Return (fp32, bf16 or fp16, why) for --precision on a device.

    auto takes mixed precision where the hardware has it and gains by it: bf16 on CUDA from compute
    capability 8.0 and on CPUs with AMX or, from AMD, AVX512-BF16. Intel's AVX512-BF16 without AMX
    multiplies at half of fp32's rate (measured: docs/PERFORMANCE.md). A CPU is never timed, so that
    runs are bitwise identical; older GPUs are: fp16 or fp32.
    """
    if wanted != "auto":
        return wanted, f"{wanted} as asked"
    if device.type == "cuda" and has_bf16(device):
        return "bf16", "bf16"
    if device.type == "cuda":
        ratio = convolution_speed(torch.float16, device) / convolution_speed(torch.float32, device)
        name = "fp16" if ratio > 1.1 else "fp32"
        return name, f"{name} (fp16 convolves {ratio:.1f} times as fast as fp32 here)"
    if device.type == "cpu":
        amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
        avx = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        if amx or avx and "AuthenticAMD" in cpu_description():
            return "bf16", f"bf16 ({'AMX' if amx else 'AVX512-BF16'})"
        if avx:
            return "fp32", ("fp32 (this CPU's AVX512-BF16 is slower; "
                            "--precision bf16 takes it all the same)")
    return "fp32", "fp32"


def has_bf16(device):
    """Return whether bf16 is the hardware's own: on CUDA from compute capability 8.0."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def keep_precision(model, saved):
    """Keep the precision that a resumed run had found by --precision auto: a timing must not change its rest."""
    found, device = saved["precision"], model.device
    same_kind = saved["device"] == device.type and (found != "bf16" or has_bf16(device))
    if model.args.precision == "auto" and model.precision != found and same_kind:
        model.picked_precision = found, f"{found} as before the stop"
        model.__dict__.pop("scaler", None)  # made anew on first use


def cpu_description():
    """Return what the system says of its CPUs; empty where it has no /proc/cpuinfo."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def convolution_speed(dtype, device):
    """Return convolutions a second, channels-last as in training; the best of several."""
    images, weights = (torch.ones(shape, dtype=dtype, device=device)
                       .contiguous(memory_format=torch.channels_last)
                       for shape in ((8, 128, 32, 64), (128, 128, 3, 3)))
    best = math.inf
    for _ in range(6):
        began = time.perf_counter()
        F.conv2d(images, weights, padding=1)[0, 0, 0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - began)
    return 1 / best


# ---------------------------------------------------------------- tensors and memory

def channels_last(x):
    """Return (B, C, H, W) in the memory layout that convolutions are fastest in."""
    return x.contiguous(memory_format=torch.channels_last)


def join(parts):
    """Return torch.cat of the parts, without a copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def in_pieces(function, *inputs, step=None):
    """Apply a function that treats every sample alone to (N, ...) tensors, in pieces that suit the device.

    step: samples of a time step; then a piece is one, recomputed in the backward pass.
    """
    count, _, height, width = inputs[0].shape
    size = max(1, CPU_PIXELS // (height * width)) if inputs[0].device.type == "cpu" else count
    if step and torch.is_grad_enabled():
        size, function = step, partial(checkpoint, function, use_reentrant=False)
    pieces = [function(*at) for at in zip(*(x.split(size) for x in inputs))]
    return join(pieces) if torch.is_tensor(pieces[0]) else tuple(map(join, zip(*pieces)))


@contextmanager
def enough_memory(flag, instead):
    """Inside, a device without room is a UserError that names the flag, with its value, and what was expected."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not re.search(OUT_OF_MEMORY, str(error)):
            raise
        raise UserError(f"{flag}: needs more memory than the device has free; expected {instead}") from None


@contextmanager
def evaluating(*models):
    """Inside, BatchNorm uses its running statistics; afterwards each model is in its former mode."""
    modes = [model.training for model in models]
    for model in models:
        nn.Module.train(model, False)
    try:
        yield
    finally:
        for model, mode in zip(models, modes):
            nn.Module.train(model, mode)


class Float32Conv2d(nn.Conv2d):
    """A convolution that stays in float32 under autocast (on CUDA in TF32, as all of float32 there).

    The first of the pose encoder and the last of the generator are small, and in bf16 a rollout loses up to 0.6 dB by
    them: BatchNorm's recalibrated statistics are those of float32, and rounded frames are fed back.
    """

    def forward(self, x):
        """Convolve (B, C, H, W) in float32."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


# ---------------------------------------------------------------- precision of a step

def autocast(device, precision):
    """Return the context in which networks run: mixed precision for "bf16" and "fp16"."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def step_if_finite(optimizer, scaler, parameters, max_norm):
    """Clip the gradient's norm and step; do nothing where the gradient is not finite.

    Returns whether it was finite, a bool tensor.
    """
    scaler.unscale_(optimizer)
    finite = nn.utils.clip_grad_norm_(parameters, max_norm).isfinite()
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    elif finite.device.type == "cuda":  # the fused kernel reads the flag: the host need not wait
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
        optimizer.step()
    elif finite:
        optimizer.step()
    return finite
