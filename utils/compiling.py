"""torch.compile of the networks, tried before training and given up where it does not work."""

from contextlib import suppress

import torch

from utils.averaging import validated_weights
from utils.checkpoint import NETWORKS
from utils.cli import UserError, say
from utils.distributed import maximum
from utils.training_state import capture, restore

# not the pose encoder: it is small, and would be compiled once more for the last, shorter block of a rollout
COMPILED = [name for name in NETWORKS if name != "label_transformation"]


def compiled_call(network, dynamic):
    """Return torch.compile of a network's call as a whole; before PyTorch 2.14 nn.Module.compile() takes blocks.

    dynamic: as in torch.compile.
    """
    def call(*inputs):
        return network._call_impl(*inputs)

    return torch.compile(call, dynamic=dynamic)


def mark_for_compiling(model):
    """Have torch.compile take the networks of COMPILED when they are next called."""
    torch._dynamo.config.cache_size_limit = 64  # the networks share one limit, training and rollout too
    for name in COMPILED:  # windows of 2 have few sizes; kernels for any size are slower
        network = getattr(model, name)
        network._compiled_call_impl = compiled_call(network, False if model.args.train_vi_len == 2 else None)


def compile_networks(model):
    """torch.compile the networks of COMPILED by a step and a rollout that leave no trace; go on without on failure."""
    say("compiling the networks (--compile)")
    saved, session, problem = capture(model), model.session, None
    torch._dynamo.config.optimize_ddp = False  # gradients of 6 MB need no graph split for their sake
    # no gradients are exchanged meanwhile: compiling may fail on one rank alone
    parallel, session.parallel = session.parallel, None
    try:
        mark_for_compiling(model)
        compile_by_use(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, no triton, an operator that it can't take: many kinds
        problem = type(error).__name__
    session.parallel = parallel
    if maximum(int(problem is not None), model.device):
        for name in COMPILED:
            getattr(model, name)._compiled_call_impl = None
        say(f"torch.compile does not work here ({problem or 'on another rank'}): going on without it")
    else:
        torch._dynamo.config.suppress_errors = True  # what is compiled later falls back by itself
    restore(model, saved)


def compile_by_use(model):
    """Call what training and rollouts call, on random frames."""
    args = model.args
    shape = (args.batch_size, args.train_vi_len, 3, args.frame_H, args.frame_W)
    for teacher_forced in (True, False) if args.train_vi_len > 2 else (True,):
        model.training_one_step(torch.rand(shape), torch.rand(shape), teacher_forced)
    first, label = torch.rand(shape)[:1, 0], torch.rand(shape)[:1, :1].expand(1, 3, -1, -1, -1)
    with validated_weights(model), suppress(UserError):  # poses of noise may overflow, after compiling
        model.rollout(first, label)
