"""What test_distributed.py runs on several ranks; rank 0 writes what it found to OUT/report.json.

    PYTHONPATH=.:tests torchrun --nproc_per_node=2 tests/two_ranks.py DATA OUT

A run that nobody stops, then for every way of stopping one: stop it by a signal to one rank only,
and resume.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from utils import cli, distributed
import Trainer
from conftest import TINY
from utils.checkpoint import adopt_settings
from utils.cli import Stopped

# rank, where, step
STOPS = {"pool": [(1, "training", 3), (0, "validation", 1)], "template": [(1, "training", 6)]}
RECIPES = {
    "pool": ["--tfr", "0.3"],
    "template": ["--recipe", "template", "--train_vi_len", "4", "--tfr", "0.6"],
}


class Watched(Trainer.VAE_Model):
    """A model that notes the windows it trains on and may send its own process a signal."""

    signal_in = signal_at = None

    def training_one_step(self, img, label, flags):
        self.windows = getattr(self, "windows", []) + [img[:, 1:].sum((1, 2, 3, 4)).tolist()]
        self.signal_if("training", len(self.windows))
        return super().training_one_step(img, label, flags)

    def rollout(self, *args, **kwargs):
        self.signal_if("validation", 1)
        return super().rollout(*args, **kwargs)

    def signal_if(self, where, count):
        if (self.signal_in, self.signal_at) == (where, count):
            os.kill(os.getpid(), signal.SIGTERM)


def train(data, folder, recipe, *flags, signal_in=None, signal_at=None):
    """Do what Trainer.main does, but leave the process group open for the next run.

    Return the model and whether it was stopped.
    """
    args = Trainer.build_parser().parse_args(
        ["--DR", data, "--save_root", str(folder), *TINY, *RECIPES[recipe], *flags]
    )
    if args.resume:
        args.ckpt_path = str(folder / "last.ckpt")
        adopt_settings(args, Trainer.build_parser())
    model = Watched(args)
    model.signal_in, model.signal_at = signal_in, signal_at
    model.load_checkpoint()
    try:
        model.training_stage()
        return model, False
    except Stopped:
        return model, True


def gathered(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def same_on_all_ranks(model):
    """Return whether network, averages and optimizer are bitwise identical on all ranks."""
    own = [
        *model.state_dict().values(), *(model.state.average or {}).values(),
        *(v for s in model.optim.state_dict()["state"].values() for v in s.values()),
    ]
    own = torch.cat([value.contiguous().view(-1).view(torch.uint8) for value in own])
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    return all(other.equal(own) for other in every)


def main():
    data, out = sys.argv[1], Path(sys.argv[2])
    distributed.start(Trainer.build_parser().parse_args([*TINY]), sys.argv)
    rank, report = dist.get_rank(), {}
    for recipe in RECIPES:
        model, _ = train(data, out / recipe, recipe)
        report[recipe] = {"same": same_on_all_ranks(model), "windows": gathered(model.windows)}
        for stopping_rank, where, step in STOPS[recipe]:
            folder = out / f"{recipe} {where}"
            mine = {"signal_in": where, "signal_at": step} if rank == stopping_rank else {}
            _, stopped = train(data, folder, recipe, **mine)
            dist.barrier()
            model, _ = train(data, folder, recipe, "--resume")
            report[recipe][where] = {"stopped": gathered(stopped), "same": same_on_all_ranks(model)}
    if rank == 0:
        (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    cli.run(main, distributed.leave)
