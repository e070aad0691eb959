"""The ranks of a run under torchrun: start, agree, broadcast, leave. One process alone needs none of it."""

import os
import shlex
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from utils.cli import INTERRUPTED, Stopped, UserError
from utils.hardware import pick_device


def started():
    """Return whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank():
    """Return the number of this process; rank 0 validates and writes."""
    return dist.get_rank() if started() else 0


def world():
    """Return the number of processes."""
    return dist.get_world_size() if started() else 1


def start(args, command):
    """Join torchrun's process group, if any, and give each rank its device in `args`.

    UserError where --gpu asks for more processes than there are, and for one device that several would share.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if args.gpu > 1 and count != args.gpu:
        raise UserError(f"--gpu {args.gpu}: expected to be started as "
                        f"torchrun --nproc_per_node={args.gpu} {shlex.join(command)}")
    if count == 1:
        return
    if args.device is None and not torch.cuda.is_available():
        args.device = "cpu"
    elif args.device in (None, "cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    elif args.device.startswith("cuda:") and os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise UserError(f"--device {args.device}: can't be shared by {os.environ['LOCAL_WORLD_SIZE']} "
                        f"processes; expected --device cuda, which gives each its own")
    device = pick_device(args.device)
    # a rank waits for rank 0's validation, which may be long
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))


def leave(status):
    """Exit with a status; at once after an error, since the other ranks may never leave the group."""
    if started():
        if status not in (0, *INTERRUPTED.values()):
            sys.stdout.flush()
            os._exit(status)
        dist.destroy_process_group()
    sys.exit(status)


def resume_command(command):
    """Return the command line that resumes the run of `command`, a list of words."""
    words = [word for word in command if word != "--resume"] + ["--resume"]
    ranks = os.environ.get("LOCAL_WORLD_SIZE")  # set by torchrun
    return (f"torchrun --nproc_per_node={ranks} " if ranks else "python ") + shlex.join(words)


# ---------------------------------------------------------------- values

def broadcast(value, device):
    """Return the number that rank 0 has, on every rank."""
    if world() == 1:
        return value
    value = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(value, 0)
    return value.item()


def broadcast_object(value):
    """Return the object that rank 0 has, on every rank."""
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def gather(value):
    """Return the objects of all ranks, a list in their order."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def maximum(value, device):
    """Return the largest of the integers that the ranks have."""
    if world() == 1:
        return value
    value = torch.tensor(value, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


# ---------------------------------------------------------------- training

class StopSignal:
    """The signal that ends a run between two steps, the same step on every rank."""

    def __init__(self):
        self.received = self.agreed = 0

    def note(self, number):
        """Remember a signal that this process received."""
        self.received = number

    def agree(self, device):
        """Let every rank know of a signal that any of them received."""
        self.agreed = maximum(self.received, device)

    def check(self, alone=False):
        """Raise Stopped after a signal: one that the ranks agreed on, unless `alone`."""
        number = self.received if alone or world() == 1 else self.agreed
        if number:
            raise Stopped(number)
