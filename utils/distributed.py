"""Connect the ranks of a run under torchrun: start, broadcast, agree on signals, leave.

In a process alone every function returns at once.
"""

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
    """Return the number of this process, from 0; rank 0 validates and writes."""
    return dist.get_rank() if started() else 0


def world():
    """Return the number of processes."""
    return dist.get_world_size() if started() else 1


def start(args, command):
    """Join torchrun's process group, if any, and set args.device to this rank's device.

    command: the words that started this process. UserError where --gpu asks for more processes than
    there are, and for one device that several processes would share.
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
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    elif args.device.startswith("cuda:") and os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise UserError(f"--device {args.device}: can't be shared by "
                        f"{os.environ['LOCAL_WORLD_SIZE']} processes; expected --device cuda, "
                        f"which gives each its own")
    device = pick_device(args.device)
    # the ranks wait for rank 0's validation, which may be long
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))


def leave(status):
    """Exit with a status; of several ranks at once.

    After an error the other ranks may never leave the group. And a thread of the group that wants
    the interpreter while it ends aborts the process.
    """
    if started():
        if status in (0, *INTERRUPTED.values()):
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def resume_command(command):
    """Return the command line, a string, that resumes the run of `command`, a list of words."""
    words = [word for word in command if word != "--resume"] + ["--resume"]
    ranks = os.environ.get("LOCAL_WORLD_SIZE")  # set by torchrun
    return (f"torchrun --nproc_per_node={ranks} " if ranks else "python ") + shlex.join(words)


# ---------------------------------------------------------------- values

def broadcast(value, device):
    """Return rank 0's number on every rank. device: where the ranks exchange it."""
    if world() == 1:
        return value
    value = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(value, 0)
    return value.item()


def broadcast_object(value):
    """Return rank 0's object on every rank."""
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def gather(value):
    """Return the objects of all ranks, a list in the order of the ranks."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def maximum(value, device):
    """Return the largest of the ranks' integers. device: where the ranks exchange them."""
    if world() == 1:
        return value
    value = torch.tensor(value, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


# ---------------------------------------------------------------- training

class StopSignal:
    """End a run on a signal between two steps, after the same step on every rank."""

    def __init__(self):
        self.received = self.agreed = 0

    def note(self, number):
        """Remember a signal that this process received."""
        self.received = number

    def agree(self, device):
        """Tell every rank of a signal that any rank received."""
        self.agreed = maximum(self.received, device)

    def check(self, alone=False):
        """Raise Stopped after a signal that the ranks agreed on; alone: after this rank's own."""
        number = self.received if alone or world() == 1 else self.agreed
        if number:
            raise Stopped(number)
