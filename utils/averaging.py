"""Average weights over steps (EMA), and recalibrate BatchNorm's statistics for the average."""

from contextlib import contextmanager

import torch
import torch.nn as nn
from torch.optim.swa_utils import update_bn

from utils.checkpoint import NETWORKS
from utils.hardware import channels_last


def begin_average(model):
    """Begin the average of a model's weights where --ema is given, unless it has begun."""
    if model.args.ema and model.state.average is None:
        weights = model.named_parameters()
        model.state.average = {name: p.detach().clone() for name, p in weights}


def update_average(model):
    """Move the average towards the weights after the newest step."""
    state = model.state
    if state.average is None:
        return
    # short runs forget their start: TensorFlow's ExponentialMovingAverage with num_updates
    decay = min(model.args.ema, (1 + state.steps_done) / (10 + state.steps_done))
    weights = [p.detach() for p in model.parameters()]
    torch._foreach_lerp_(list(state.average.values()), weights, 1 - decay)


@contextmanager
def validated_weights(model):
    """Give a model, inside, the weights that are validated and saved: averaged weights, if any.

    BatchNorm's statistics are recalibrated for these weights: running averages lag behind.
    """
    average, poses = model.state.average, model.session.poses
    if average is None and poses is None:
        yield
        return
    raw = network_state(model)
    with torch.no_grad():
        for name, value in (average or {}).items():
            model.get_parameter(name).copy_(value)
    if poses is not None:
        recalibrate_batchnorm(model, poses)
    try:
        yield
    finally:
        load_network_state(model, raw)


@torch.no_grad()
def recalibrate_batchnorm(model, poses):
    """Recompute BatchNorm's statistics over poses, uint8 (N, 3, H, W) (Wu & Johnson 2021)."""
    blocks = max(1, len(poses) // 128)
    stem = nn.Sequential(*list(model.label_transformation)[:3])
    # strided blocks of poses have similar means, so that their variances may be averaged
    parts = (poses[i::blocks].float().div(255).to(model.device) for i in range(blocks))
    update_bn(map(channels_last, parts), stem)


def network_state(model):
    """Return a copy of the five networks' weights, a dict by a checkpoint's keys."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()
            if name.split(".")[0] in NETWORKS}


@torch.no_grad()
def load_network_state(model, weights):
    """Restore the weights of `network_state`."""
    own = model.state_dict()
    for name, value in weights.items():
        own[name].copy_(value)
