"""Use the machine: pick the device and its fastest precision, reuse memory, compute in pieces."""

import ctypes
import math
import os
import re
import time
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from utils.cli import UserError

# beside torch.OutOfMemoryError: the messages of a CPU, of cuDNN or cuBLAS, and of the driver
OUT_OF_MEMORY = ("can't allocate memory|not enough memory|ALLOC(ATION)?_FAILED|"
                 "(CUDA error|backend): out of memory|backend out of memory")
CPU_PIXELS = 8 * 32 * 64  # per piece on a CPU; more gains little (docs/PERFORMANCE.md)
OLDEST_TORCH = 2, 6  # as requirements.txt and scripts/setup.sh have it

# in fp16 PyTorch takes a skipped first step for a wrong order of calls
warnings.filterwarnings("ignore", message="Detected call of .lr_scheduler.step")


def check_torch():
    """Raise UserError where PyTorch is too old, before a run ends in the middle."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise UserError(f"PyTorch {torch.__version__}: is too old; expected {oldest} or newer "
                        f"(pip install -r requirements.txt)")


def pick_device(name):
    """Return the torch.device of --device (None: CUDA where there is a GPU, else the CPU).

    Sets what PyTorch should do on the device: TF32, cuDNN's benchmark, kept memory. UserError for a
    device that is missing, full, or too old for this PyTorch.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        keep_memory_and_kernels()
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"--device {name}: this machine has {count} CUDA devices; "
                            f"expected one of them, or cpu")
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
        raise UserError("--device mps: this machine has none; expected cpu or cuda")
    return device


def keep_memory_and_kernels():
    """Have the C library keep freed memory, and oneDNN every kernel that it has built.

    Memory fetched anew from the system costs a page fault for every 4 KB. oneDNN by default keeps
    1024 kernels, fewer than training and validation need together, and reads its option at the
    first convolution. The memory options are glibc's (mallopt(3)); other C libraries lack them.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    # old versions of glibc take at most 32 MB
    mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, 32 << 20)
    mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


def pick_precision(wanted, device):
    """Return (fp32, bf16 or fp16, why) for --precision on a device.

    auto takes mixed precision where the hardware has it and gains by it: bf16 on CUDA from compute
    capability 8.0 and on CPUs with AMX or, from AMD, AVX512-BF16. Intel's AVX512-BF16 without AMX
    multiplies at half the speed of fp32 (measured: docs/PERFORMANCE.md). Older GPUs are timed for
    fp16 or fp32; a CPU is never timed, so that runs are bitwise identical.
    """
    if wanted != "auto":
        return wanted, f"{wanted} as asked"
    if device.type == "cuda" and has_bf16(device):
        return "bf16", "bf16"
    if device.type == "cuda":
        ratio = convolution_speed(torch.float16, device) / convolution_speed(torch.float32, device)
        name = "fp16" if ratio > 1.1 else "fp32"
        return name, f"{name} (fp16 convolves {ratio:.1f} times as fast as fp32)"
    if device.type == "cpu":
        amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
        avx = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        if amx or avx and "AuthenticAMD" in cpu_description():
            return "bf16", f"bf16 ({'AMX' if amx else 'AVX512-BF16'})"
        if avx:
            return "fp32", ("fp32 (this CPU's AVX512-BF16 is slower; "
                            "--precision bf16 uses it anyway)")
    return "fp32", "fp32"


def has_bf16(device):
    """Return whether the hardware has bf16: every CPU, and CUDA from compute capability 8.0."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def keep_precision(model, saved):
    """Keep the precision that --precision auto found before a stop.

    Another timing must not change the rest of a resumed run. saved: `capture` of the run.
    """
    found, device = saved["precision"], model.device
    same_kind = saved["device"] == device.type and (found != "bf16" or has_bf16(device))
    if model.args.precision == "auto" and model.precision != found and same_kind:
        model.picked_precision = found, f"{found} as in the checkpoint"
        model.__dict__.pop("scaler", None)  # its cached property belongs to the other precision


def cpu_description():
    """Return the text of /proc/cpuinfo; empty where the system has none."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def convolution_speed(dtype, device):
    """Return convolutions a second, channels-last as in training, the best of six timings."""
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
    """Return (B, C, H, W) in the memory layout in which convolutions are fastest."""
    return x.contiguous(memory_format=torch.channels_last)


def join(parts):
    """Return torch.cat of the parts; a single part as it is, without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def in_pieces(function, *inputs, step=None):
    """Return function(*inputs), computed in pieces of the batch that suit the device.

    function: from (N, C, H, W) tensors to a tensor or several, every sample alone. step: samples of
    a time step, which are then a piece; its activations are recomputed in the backward pass.
    """
    count, _, height, width = inputs[0].shape
    size = max(1, CPU_PIXELS // (height * width)) if inputs[0].device.type == "cpu" else count
    if step and torch.is_grad_enabled():
        size, function = step, partial(checkpoint, function, use_reentrant=False)
    pieces = [function(*at) for at in zip(*(x.split(size) for x in inputs))]
    return join(pieces) if torch.is_tensor(pieces[0]) else tuple(map(join, zip(*pieces)))


@contextmanager
def enough_memory(flag, instead):
    """Turn a lack of memory, inside, into a UserError.

    flag: the flag to change, with its value. instead: what to use instead.
    """
    try:
        yield
    except RuntimeError as error:
        lacks = isinstance(error, torch.OutOfMemoryError) or re.search(OUT_OF_MEMORY, str(error))
        if not lacks:
            raise
        raise UserError(f"{flag}: needs more memory than the device has free; "
                        f"expected {instead}") from None


@contextmanager
def evaluating(*models):
    """Have BatchNorm use its running statistics inside; then give each model its mode back."""
    modes = [model.training for model in models]
    for model in models:
        nn.Module.train(model, False)
    try:
        yield
    finally:
        for model, mode in zip(models, modes):
            nn.Module.train(model, mode)


class Float32Conv2d(nn.Conv2d):
    """Convolve in float32 under autocast (on CUDA in TF32, like every float32 convolution).

    The first convolution of the pose encoder and the last of the generator are small. In bf16 they
    cost a rollout up to 0.6 dB: BatchNorm's recalibrated statistics are those of float32, and
    rounded frames are fed back.
    """

    def forward(self, x):
        """Return the convolution of (B, C, H, W), float32."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


# ---------------------------------------------------------------- precision of a step

def autocast(device, precision, cache=True):
    """Return the context in which networks run: mixed precision for "bf16" and "fp16".

    cache: whether weights are cast once for all calls inside. A CUDA graph is recorded without it,
    and what is compiled with it would be compiled again.
    """
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=cache)


@contextmanager
def without_gradients(device, precision):
    """Compute a rollout inside: without gradients, in bf16, else in float32.

    fp16 ends at 65504: a single activation above it would end the rollout.
    """
    # inference mode costs least, but in it autocast casts every weight again for every frame
    mixed = precision == "bf16"
    no_grad = torch.no_grad() if mixed else torch.inference_mode()
    # a search for the fastest convolutions takes longer than a rollout
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        with autocast(device, "bf16" if mixed else "fp32"), no_grad:
            yield
    finally:
        torch.backends.cudnn.benchmark = before


def step_if_finite(optimizer, scaler, parameters, max_norm):
    """Clip the gradient's norm at max_norm and step; do nothing where it is not finite.

    Returns whether the norm was finite, a bool tensor.
    """
    scaler.unscale_(optimizer)
    finite = nn.utils.clip_grad_norm_(parameters, max_norm).isfinite()
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    elif finite.device.type == "cuda":  # the fused kernel reads the flag, so the host does not wait
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
        optimizer.step()
    elif finite:
        optimizer.step()
    return finite
