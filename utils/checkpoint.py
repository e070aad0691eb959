"""Checkpoints: writing them atomically, and reading third-party ones safely.

A checkpoint is one dict of plain types and tensors, so `torch.load(path, weights_only=True)` reads it. Loading never
runs code from a file. Third-party checkpoints are brought into the same shape: see `read_checkpoint`.
PyTorch is imported where it is needed, so that scripts that only name the networks start at once.
"""

import errno
import os
import pickle
import re
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np

from utils.cli import UserError
from utils.files import atomic

NETWORKS = ("frame_transformation", "label_transformation", "Gaussian_Predictor", "Decoder_Fusion", "Generator")

# what strangers' checkpoints hold beside tensors: NumPy numbers and parsed arguments, which can't run code
_HARMLESS = [Namespace, np.dtype, np.ndarray] + [type(np.dtype(kind)) for kind in "?bhilqBHILQefd"]
_HARMLESS += [(function, f"numpy.{package}.multiarray.{function.__name__}") for package in ("core", "_core")  # NumPy 1, NumPy 2
              for function in (np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0])]


def on_cpu(value):
    """A checkpoint with all its tensors on the CPU, so that torch.load reads it on a machine without the GPU."""
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(on_cpu, value))
    return value.cpu() if hasattr(value, "cpu") else value


def write_checkpoint(path, checkpoint):
    """torch.save, atomically. RuntimeError of a full disk becomes a UserError; the previous file stays whole."""
    import torch

    with atomic(path) as aside:
        try:
            torch.save(on_cpu(checkpoint), aside)
        except RuntimeError as error:  # PyTorch's writer reports a failed write this way
            raise OSError(str(error).splitlines()[0]) from None


def read_checkpoint(path):
    """A checkpoint as a dict whose `state_dict` has exactly the keys of the five networks.

    Taken: ours; the template's, whose `optimizer` is a second copy of the weights (`optimizer` is None then); weights
    under `optimizer` alone; a bare state_dict; `module.` prefixes of DataParallel; NumPy numbers; extra keys; tensors
    saved on any device (they arrive on the CPU). UserError for everything else, a file with code in it included.
    """
    import torch

    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; expected a checkpoint file")
    harmless = torch.serialization.safe_globals(_HARMLESS)
    try:
        with harmless, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file is said in one line
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        problem = "is not a whole checkpoint" if error.errno == errno.EINVAL else error.strerror or error  # a cut archive, in PyTorch's words
        raise UserError(f"{path}: {problem}; expected a file written by torch.save") from None
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name:
            raise UserError(f"{path}: holds code ({name[1]}), which is never run; expected tensors and plain types only") from None
        raise UserError(f"{path}: is not a checkpoint; expected a file written by torch.save") from None
    except Exception as error:  # a damaged archive fails in many ways: RuntimeError, EOFError, KeyError, ValueError
        raise UserError(f"{path}: is not a whole checkpoint ({type(error).__name__}); expected a file written by torch.save") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: holds a {type(loaded).__name__}; expected a dict with a state_dict")

    checkpoint = dict(loaded)
    for candidate in (checkpoint.get("state_dict"), checkpoint.get("optimizer"), checkpoint.get("model"), checkpoint):
        weights = _weights(candidate)
        if weights:
            break
    else:
        raise UserError(f"{path}: holds no weights of the five networks; expected keys like {NETWORKS[0]}.0.conv1.weight")
    checkpoint["state_dict"] = weights
    optimizer = checkpoint.get("optimizer")
    if not (isinstance(optimizer, dict) and {"state", "param_groups"} <= optimizer.keys()):
        checkpoint["optimizer"] = None
    for key, kind, low, high in (("lr", float, 0, 10), ("tfr", float, 0, 1), ("last_epoch", int, -1, 10**9)):
        checkpoint[key] = _figure(checkpoint.get(key), kind, low, high)
    return checkpoint


def file_version(path):
    """What is another one when a file was written again; None where it is gone."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def is_latest_in(folder, path):
    """Whether a checkpoint is in a folder, and of the moment that last.ckpt there is of."""
    path, last = Path(path).resolve(), Path(folder).resolve() / "last.ckpt"
    if path == last:
        return True
    if path.parent != last.parent or not last.exists():
        return False
    try:
        moments = [(loaded["last_epoch"], loaded["resume"]["step"]) for loaded in map(read_checkpoint, (path, last))]
    except (UserError, KeyError, TypeError):  # a damaged last.ckpt, a stranger's
        return False
    return moments[0] == moments[1]


def is_resumable(path):
    """Return whether a checkpoint is there that holds a run of this project, not weights alone."""
    try:
        return isinstance(read_checkpoint(path).get("resume"), dict)
    except UserError:
        return False


def _figure(value, kind, low, high):
    """A number, NumPy scalar or tensor of one number as a plain int or float; None where it can't be that one."""
    import torch

    try:
        value = kind(value.item() if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return value if low <= value <= high else None


def _weights(candidate):
    """The five networks' tensors in a state_dict-like dict, prefixes of wrappers removed; {} where there are none."""
    import torch

    if not isinstance(candidate, dict):
        return {}
    weights = {}
    for key, value in candidate.items():
        if isinstance(key, str) and torch.is_tensor(value):
            key = re.sub(r"^((module|_orig_mod)\.)+", "", key)
            if key.split(".")[0] in NETWORKS:
                weights[key] = value
    return weights


def sizes(checkpoint):
    """The sizes that a checkpoint's weights have: F_dim, L_dim, N_dim, D_out_dim, as a dict (those that can be read off)."""
    last_layers = {"F_dim": ("frame_transformation.6.weight", 1), "L_dim": ("label_transformation.4.conv1.weight", 1),
                   "N_dim": ("Gaussian_Predictor.6.weight", 2), "D_out_dim": ("Decoder_Fusion.5.weight", 1)}
    weights = checkpoint["state_dict"]
    return {flag: len(weights[key]) // share for flag, (key, share) in last_layers.items()
            if key in weights and weights[key].dim() > 0}


def load_weights(model, weights, path):
    """load_state_dict with strict=True. UserError that names the first key that doesn't fit."""
    own = {key: value for key, value in model.state_dict().items() if key.split(".")[0] in NETWORKS}
    for key in [*own, *weights]:
        if key not in weights or key not in own:
            raise UserError(f"{path}: {key} is {'missing' if key not in weights else 'not of this network'}; "
                            f"expected exactly the weights of the five networks")
    for key, value in own.items():
        if weights[key].shape != value.shape:
            raise UserError(f"{path}: {key} is {tuple(weights[key].shape)}, expected {tuple(value.shape)}; "
                            f"--F_dim, --L_dim, --N_dim or --D_out_dim differ from the checkpoint's")
    for name in NETWORKS:
        try:
            getattr(model, name).load_state_dict({key[len(name) + 1:]: value for key, value in weights.items()
                                                  if key.split(".")[0] == name}, strict=True)
        except RuntimeError:  # tensors of a layout or a device that can't be copied: sparse, quantized, meta
            raise UserError(f"{path}: the weights of {name} can't be copied; expected dense tensors with values") from None


def optimizer_fits(optimizer, parameters, squared):
    """Whether an optimizer's state_dict is an Adam's, AdamW's or Muon's for these parameters; strangers keep all kinds.

    squared: for each parameter whether it has a second moment, which Muon's matrices lack.
    """
    try:
        states = [optimizer["state"][i] for i in optimizer["param_groups"][0]["params"]]
        return len(states) == len(parameters) and all(
            "step" in state and state["exp_avg"].shape == p.shape and ("exp_avg_sq" in state) == second
            and (not second or state["exp_avg_sq"].shape == p.shape) for state, p, second in zip(states, parameters, squared))
    except (KeyError, IndexError, TypeError, AttributeError):
        return False
