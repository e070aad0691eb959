"""Write checkpoints atomically, and read any, third-party ones included, without running code.

A checkpoint is one dict of plain types and tensors, which `torch.load(path, weights_only=True)`
reads. Third-party checkpoints are brought into the same shape: see `read_checkpoint`.
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

from utils.cli import UserError, say
from utils.files import atomic, copy_file
from utils.options import OF_THE_MACHINE, RECIPES, as_list

NETWORKS = ("frame_transformation", "label_transformation", "Gaussian_Predictor", "Decoder_Fusion",
            "Generator")

# parts of a key that wrappers add: DataParallel and DistributedDataParallel, torch.compile, FSDP,
# activation checkpointing, and third-party modules that hold the model
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "model",
            "net"}

# types in third-party checkpoints beside tensors, none of which can run code
_HARMLESS = [Namespace, np.dtype, np.ndarray]
_HARMLESS += [type(np.dtype(kind)) for kind in "?bhilqBHILQefd"]
_HARMLESS += [(function, f"numpy.{package}.multiarray.{function.__name__}")
              for package in ("core", "_core")  # NumPy 1, NumPy 2
              for function in (np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0])]


def on_cpu(value):
    """Return a checkpoint with its tensors on the CPU, so that a machine without a GPU loads it."""
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(on_cpu, value))
    return value.cpu() if hasattr(value, "cpu") else value


def write_checkpoint(path, checkpoint, copies=()):
    """Write a checkpoint with torch.save, atomically, and then copies of the file to other paths.

    UserError for a full disk.
    """
    import torch

    with atomic(path) as aside:
        try:
            torch.save(on_cpu(checkpoint), aside)
        except RuntimeError as error:  # PyTorch's writer reports a failed write this way
            raise OSError(str(error).splitlines()[0]) from None
    for other in copies:
        copy_file(path, other)


def read_checkpoint(path):
    """Return a checkpoint as a dict whose `state_dict` has exactly the keys of the five networks.

    Accepted: this project's checkpoints; the template's, whose `optimizer` is a second copy of the
    weights (returned as None); weights under `optimizer` alone; a bare state_dict; keys with the
    parts that wrappers add (WRAPPERS); NumPy numbers; extra keys; tensors from any device (returned
    on the CPU). UserError for everything else, a file with code in it included.
    """
    loaded = _load(path)
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: holds a {type(loaded).__name__}; "
                        f"expected a dict with a state_dict")
    checkpoint = dict(loaded)
    for candidate in (*map(checkpoint.get, ("state_dict", "optimizer", "model")), checkpoint):
        weights = _weights(candidate, path)
        if weights:
            break
    else:
        raise UserError(f"{path}: holds no weights of the five networks; expected keys like "
                        f"{NETWORKS[0]}.0.conv1.weight")
    checkpoint["state_dict"] = weights
    optimizer = checkpoint.get("optimizer")
    if not (isinstance(optimizer, dict) and {"state", "param_groups"} <= optimizer.keys()):
        checkpoint["optimizer"] = None
    for key, kind, low, high in (("lr", float, 0, 10), ("tfr", float, 0, 1),
                                 ("last_epoch", int, -1, 10**9)):
        checkpoint[key] = _figure(checkpoint.get(key), kind, low, high)
    return checkpoint


def _load(path):
    """Return what torch.save wrote, tensors on the CPU. UserError for a file with code in it."""
    import torch

    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; expected a checkpoint file")
    expected = "expected a file written by torch.save"
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the UserError below is one line
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        # PyTorch reports a truncated archive as EINVAL
        cut = error.errno == errno.EINVAL
        problem = "is not a whole checkpoint" if cut else error.strerror or error
        raise UserError(f"{path}: {problem}; {expected}") from None
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name:
            raise UserError(f"{path}: holds code ({name[1]}), which is never run; "
                            f"expected tensors and plain types only") from None
        raise UserError(f"{path}: is not a checkpoint; {expected}") from None
    except Exception as error:  # a damaged archive: RuntimeError, EOFError, KeyError, ValueError
        raise UserError(f"{path}: is not a whole checkpoint ({type(error).__name__}); "
                        f"{expected}") from None


def file_version(path):
    """Return a tuple that changes when a file is written again; None where the file is gone."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def is_latest_in(folder, path):
    """Return whether a checkpoint is in a folder and was written after the same step as last.ckpt.

    False for a checkpoint that holds no training state.
    """
    path, last = Path(path).resolve(), Path(folder).resolve() / "last.ckpt"
    if path == last:
        return True
    if path.parent != last.parent or not last.exists():
        return False
    try:
        own, latest = [(loaded["last_epoch"], loaded["resume"]["state"]["step"])
                       for loaded in map(read_checkpoint, (path, last))]
    except (UserError, KeyError, TypeError):  # a damaged or third-party checkpoint
        return False
    return own == latest


def is_resumable(path):
    """Return whether a file is a checkpoint that a run of this project can resume from."""
    try:
        return isinstance(read_checkpoint(path).get("resume"), dict)
    except UserError:
        return False


def _figure(value, kind, low, high):
    """Return a number, NumPy scalar or tensor of one number as `kind`; None outside [low, high]."""
    import torch

    try:
        if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
            value = value.item()
        value = kind(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return value if low <= value <= high else None


def _weights(candidate, path):
    """Return the five networks' tensors, a dict by their own keys; {} where there are none.

    Parts of a key that wrappers add are removed. UserError where two different tensors then have
    the same key.
    """
    import torch

    if not isinstance(candidate, dict):
        return {}
    weights = {}
    for name, value in candidate.items():
        if isinstance(name, str) and torch.is_tensor(value):
            key = ".".join(part for part in name.split(".") if part not in WRAPPERS)
            if key.split(".")[0] not in NETWORKS:
                continue
            if key in weights and not torch.equal(weights[key], value):
                raise UserError(f"{path}: holds {key} twice ({name} is another one); "
                                f"expected the weights of one model")
            weights[key] = value
    return weights


def sizes(checkpoint):
    """Return those of F_dim, L_dim, N_dim and D_out_dim that a checkpoint's weights determine."""
    last_layers = {"F_dim": ("frame_transformation.6.weight", 1),
                   "L_dim": ("label_transformation.4.conv1.weight", 1),
                   "N_dim": ("Gaussian_Predictor.6.weight", 2),
                   "D_out_dim": ("Decoder_Fusion.5.weight", 1)}
    weights = checkpoint["state_dict"]
    return {flag: len(weights[key]) // share for flag, (key, share) in last_layers.items()
            if key in weights and weights[key].dim() > 0}


def load_weights(model, weights, path):
    """Load the five networks' weights strictly. UserError names the first key that does not fit."""
    own = {key: value for key, value in model.state_dict().items() if key.split(".")[0] in NETWORKS}
    for key in [*own, *weights]:
        if key not in weights or key not in own:
            problem = "missing" if key not in weights else "not of this network"
            raise UserError(f"{path}: {key} is {problem}; "
                            f"expected exactly the weights of the five networks")
    for key, value in own.items():
        found, expected = tuple(weights[key].shape), tuple(value.shape)
        if found != expected:
            raise UserError(f"{path}: {key} is {found}, expected {expected}; --F_dim, --L_dim, "
                            f"--N_dim or --D_out_dim differ from the checkpoint's")
    for name in NETWORKS:
        part = {key[len(name) + 1:]: value for key, value in weights.items()
                if key.split(".")[0] == name}
        try:
            getattr(model, name).load_state_dict(part, strict=True)
        except RuntimeError:  # a layout or device that cannot be copied: sparse, quantized, meta
            raise UserError(f"{path}: the weights of {name} can't be copied; "
                            f"expected dense tensors with values") from None


def optimizer_fits(optimizer, parameters, squared):
    """Return whether an optimizer's state_dict fits these parameters under Adam, AdamW or Muon.

    Third-party checkpoints hold any optimizer. squared: for each parameter, whether its state has
    `exp_avg_sq`, which Muon's matrices lack.
    """
    try:
        states = [optimizer["state"][i] for i in optimizer["param_groups"][0]["params"]]
        return len(states) == len(parameters) and all(
            "step" in state and state["exp_avg"].shape == p.shape
            and ("exp_avg_sq" in state) == second
            and (not second or state["exp_avg_sq"].shape == p.shape)
            for state, p, second in zip(states, parameters, squared))
    except (KeyError, IndexError, TypeError, AttributeError):
        return False


def adopt_settings(args, parser, names=None):
    """Set flags that are not on the command line as the checkpoint at args.ckpt_path has them.

    names: the flags to set; None for all but those of the machine. A given flag that differs is
    printed. Returns all settings of the checkpoint, a dict.
    """
    path = as_list(args.ckpt_path)[0]
    loaded = read_checkpoint(path)
    settings = loaded["args"] if isinstance(loaded.get("args"), dict) else {}
    settings = parser.accept({**settings, **sizes(loaded)}, path)
    names = settings.keys() - OF_THE_MACHINE if names is None else names & settings.keys()
    if "recipe" in args.given and settings.get("recipe") != args.recipe:
        names = names - RECIPES["pool"].keys()  # another recipe was asked for: what it sets stays
    for name in sorted(names):
        if name not in args.given:
            setattr(args, name, settings[name])
            if name == "DR" and settings[name] and not os.path.isdir(settings[name]):
                raise UserError(f"--DR {settings[name]}: what {path} was trained on is "
                                f"missing; expected the data folder as --DR")
        elif getattr(args, name) != settings[name]:
            say(f"--{name} {getattr(args, name)}: the checkpoint has {settings[name]}")
    args.asked = args.given  # by this command
    # a flag that was given when the run began counts as given in every resume
    before = loaded["resume"].get("given") if isinstance(loaded.get("resume"), dict) else None
    before = before if isinstance(before, list) else []
    args.given = sorted({*args.given, *(name for name in before if name in names)})
    return settings
