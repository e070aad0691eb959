"""Save and restore what a resume needs beside the weights and the optimizer, in one dataclass.

A resumed run on a CPU is bitwise identical to one that was never stopped (docs/GUARANTEES.md).
"""

import copy
import math
from argparse import Namespace
from dataclasses import dataclass, field, fields

import torch

from utils import distributed
from utils.averaging import load_network_state, network_state
from utils.checkpoint import load_weights, optimizer_fits, read_checkpoint, sizes
from utils.cli import UserError
from utils.logger import RunningMeans
from utils.muon import is_matrix
from utils.schedules import learning_rate_factor, set_learning_rate, share_done


@dataclass
class TrainingState:
    """Hold the state of a run between two steps: plain values, tensors, objects with a state."""

    num_epoch: int                    # epochs of this run, with --max_minutes maybe fewer
    sampler: torch.Generator          # samples teacher forcing; seeded alike on all ranks
    skipped_in_a_row: object = 0      # steps with non-finite gradients; a tensor after the first
    epoch: int = 0                    # the epoch in training
    step: int = 0                     # steps done in this epoch
    steps_done: int = 0               # steps done in the whole run
    epoch_sample: float | None = None  # uniform sample in [0, 1) of --tf_coin epoch
    best_psnr: float = -math.inf
    seconds: float = 0.0              # of training in this epoch
    share_done: float = 0.0           # of the run
    by_time: bool = False             # whether that is a share of --max_minutes, not of the steps
    train_frames: int | None = None   # of the data
    average: dict | None = None       # averaged weights by name (EMA)
    pool: object = None               # the RolloutPool; every rank has its own
    history: list = field(default_factory=list)  # rows of history.csv
    steps: list = field(default_factory=list)    # rows of steps.csv
    epoch_means: RunningMeans = field(default_factory=RunningMeans)  # for history.csv
    step_means: RunningMeans = field(default_factory=RunningMeans)   # for steps.csv

    def next_epoch(self):
        """Begin the next epoch."""
        self.epoch, self.step, self.seconds, self.epoch_sample = self.epoch + 1, 0, 0.0, None
        self.epoch_means = RunningMeans()


OF_EACH_RANK = "sampler", "pool"


def packed(value):
    """Return a copy of a field's value as plain types and tensors."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    return copy.deepcopy(value.state_dict() if hasattr(value, "state_dict") else value)


def unpacked(own, saved, device):
    """Return a field's value from the result of `packed`.

    own: the field's present value, which takes the state where it is an object.
    """
    if isinstance(own, torch.Generator):
        own.set_state(saved)
    elif hasattr(own, "load_state_dict"):
        if saved is not None:
            own.load_state_dict(saved)
    else:
        return to_device(copy.deepcopy(saved), device)
    return own


def to_device(value, device):
    """Return a value, or a dict of them, with its tensors on a device."""
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value.to(device) if torch.is_tensor(value) else value


def capture(model):
    """Return everything that determines the rest of a run, as plain types and tensors."""
    state, device = model.state, model.device
    state.share_done = share_done(model)
    of_this_rank = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        **{name: packed(getattr(state, name)) for name in OF_EACH_RANK},
    }
    return {
        "weights": network_state(model),
        # made on first use, and then it adds initial_lr to the optimizer's groups
        "scheduler": model.scheduler.state_dict(),
        "optimizer": copy.deepcopy(model.optim.state_dict()), "scaler": model.scaler.state_dict(),
        "precision": model.precision, "device": device.type,
        "epoch_steps": model.steps_in(state.epoch) if state.train_frames else None,
        "state": {f.name: packed(getattr(state, f.name)) for f in fields(state)
                  if f.name not in OF_EACH_RANK},
        "ranks": distributed.gather(of_this_rank),
    }


def restore(model, saved):
    """Bring a model to the state that `capture` returned; flags of the two runs may differ."""
    state, device = model.state, model.device
    load_network_state(model, saved["weights"])
    load_optimizer(model, saved["optimizer"])
    for group, before in zip(model.optim.param_groups, saved["optimizer"]["param_groups"]):
        group.update(lr=before["lr"], initial_lr=before["initial_lr"])
    model.scheduler.load_state_dict(saved["scheduler"])
    if saved["scaler"]:  # empty where nothing was scaled
        model.scaler.load_state_dict(saved["scaler"])

    found = dict(saved["state"])
    if state.average is None or found["average"] is None:  # this command's --ema holds
        found["average"] = state.average
    # None for a rank that the run did not have; teacher forcing is sampled alike on all ranks
    of_this_rank = dict(enumerate(saved["ranks"])).get(distributed.rank())
    own = ({name: of_this_rank[name] for name in OF_EACH_RANK} if of_this_rank else
           {"sampler": saved["ranks"][0]["sampler"]})
    if state.pool is None:  # this command's --pool 0 holds
        own.pop("pool", None)
    for name, value in {**found, **own}.items():
        setattr(state, name, unpacked(getattr(state, name), value, device))
    model.kl_annealing.current_epoch = state.epoch
    if of_this_rank:
        torch.set_rng_state(of_this_rank["torch"])
        if of_this_rank["cuda"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(of_this_rank["cuda"], device)


def restore_checkpoint(model, saved, path):
    """Restore the state in the checkpoint at `path`. UserError where another version wrote it."""
    try:
        restore(model, saved)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--ckpt_path {path}: its training state is not one of this version "
                        f"({type(error).__name__}: {error}); expected a run of this version"
                        ) from None


def load_optimizer(model, optimizer):
    """Load the state of an optimizer's state_dict; an empty state where its kind is another.

    Settings and memory layout stay the model's.
    """
    parameters = list(model.parameters())
    squared = [not (model.args.optim == "Muon" and is_matrix(p)) for p in parameters]
    fits = optimizer_fits(optimizer, parameters, squared)
    state = copy.deepcopy(optimizer["state"]) if fits else {}
    model.optim.load_state_dict({**model.optim.state_dict(), "state": state})
    for parameter, own in model.optim.state.items():
        # the fused kernels assume the memory layout of the parameter
        for name in own.keys() & {"exp_avg", "exp_avg_sq"}:
            own[name] = torch.empty_like(parameter).copy_(own[name])


def take_settings(model, loaded):
    """Take the progress of training from a checkpoint, as `read_checkpoint` returns it.

    Sets args.lr, tfr, current_epoch (the one after the checkpoint's last), kl_annealing and the
    optimizer. Where this project wrote the checkpoint, also sets session.saved, from which a
    training stage resumes.
    """
    args, session = model.args, model.session
    for name in ("state", "optim", "scheduler", "scaler"):  # made by an earlier stage
        model.__dict__.pop(name, None)
    session.lr = args.lr
    if "lr" not in args.given:
        args.lr = loaded["lr"] or args.lr
    model.tfr = args.tfr if loaded["tfr"] is None else loaded["tfr"]
    model.current_epoch = 0 if loaded["last_epoch"] is None else loaded["last_epoch"] + 1
    model.kl_annealing.current_epoch = model.current_epoch

    saved = loaded.get("resume")  # of any type in a third-party checkpoint
    ours = isinstance(saved, dict) and {"state", "ranks", "num_epoch"} <= saved.keys()
    # lr is the schedule's peak if ours, the last epoch's in a third-party checkpoint
    factor = 1 if ours or "lr" in args.given else learning_rate_factor(args, model.current_epoch, 0)
    model.scheduler.base_lrs = [session.lr if args.schedule == "cosine" else args.lr / factor]
    set_learning_rate(model)
    load_optimizer(model, loaded["optimizer"])
    if ours:
        weights = loaded.get("train_state_dict", loaded["state_dict"])
        settings = loaded["args"] if isinstance(loaded.get("args"), dict) else {}
        session.saved = {**saved, "weights": weights, "optimizer": loaded["optimizer"],
                         "settings": settings}


def load_member(kind, args, path):
    """Return a model of class `kind` with the weights of a further checkpoint of an ensemble.

    Sizes are the checkpoint's, and so is the output activation where no flag is given. UserError
    for another frame shape.
    """
    loaded = read_checkpoint(path)
    settings = {**kind.flags().accept(loaded.get("args"), path), **sizes(loaded)}
    for name in ("frame_H", "frame_W"):
        if settings.get(name, getattr(args, name)) != getattr(args, name):
            raise UserError(f"--ckpt_path {path}: its --{name} is {settings[name]}; expected "
                            f"{getattr(args, name)}, as the first checkpoint has")
    names = settings.keys() & {"F_dim", "L_dim", "N_dim", "D_out_dim", "output"}
    own = {name: settings[name] for name in names - ({"output"} & {*getattr(args, "asked", ())})}
    member = kind(Namespace(**{**vars(args), **own}))
    load_weights(member, loaded["state_dict"], path)
    return member
