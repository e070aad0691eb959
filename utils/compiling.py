"""Compile the networks with torch.compile; fall back to eager mode where compiling fails."""

from contextlib import contextmanager, suppress

import torch

from utils.averaging import validated_weights
from utils.checkpoint import NETWORKS
from utils.cli import UserError, say
from utils.distributed import maximum
from utils.training_state import capture, restore

# without the pose encoder: small, and compiled again for the last, shorter block of a rollout
COMPILED = [name for name in NETWORKS if name != "label_transformation"]


def compiled_call(network, dynamic):
    """Return torch.compile of a network's call as a whole. dynamic: as in torch.compile.

    Before PyTorch 2.14 nn.Module.compile() compiles the network's blocks one by one instead.
    """
    def call(*inputs):
        return network._call_impl(*inputs)

    return torch.compile(call, dynamic=dynamic)


def mark_for_compiling(model):
    """Have torch.compile take the networks of COMPILED at their next call."""
    # all networks share one limit, in training and rollout together
    torch._dynamo.config.cache_size_limit = 64
    # windows of 2 have few sizes, for which kernels of fixed sizes are faster
    dynamic = False if model.args.train_vi_len == 2 else None
    for name in COMPILED:
        network = getattr(model, name)
        network._compiled_call_impl = compiled_call(network, dynamic)


def unmark(model):
    """Have the networks called as they are."""
    for name in COMPILED:
        getattr(model, name)._compiled_call_impl = None


def is_compiled(model):
    """Return whether torch.compile takes a model's networks."""
    return any(getattr(model, name)._compiled_call_impl for name in COMPILED)


@contextmanager
def uncompiled(model):
    """Call the networks as they are inside."""
    calls = {name: getattr(model, name)._compiled_call_impl for name in COMPILED}
    unmark(model)
    try:
        yield
    finally:
        for name, call in calls.items():
            getattr(model, name)._compiled_call_impl = call


def compile_networks(model, rollouts=True):
    """Compile the networks of COMPILED by a step and a rollout, and restore the model after them.

    rollouts: whether they are compiled too. Where compiling fails on any rank, every rank runs
    without.
    """
    say("compiling the networks (--compile)")
    saved, session, problem = capture(model), model.session, None
    torch._dynamo.config.optimize_ddp = False  # 6 MB of gradients need no split graph
    # no gradients are exchanged meanwhile: compiling may fail on one rank alone
    parallel, session.parallel = session.parallel, None
    try:
        mark_for_compiling(model)
        compile_by_use(model, rollouts)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, no triton, an unsupported operator: many kinds
        problem = type(error).__name__
    session.parallel = parallel
    if maximum(int(problem is not None), model.device):
        unmark(model)
        say(f"torch.compile does not work here ({problem or 'on another rank'}): "
            f"the run continues without it")
    else:
        torch._dynamo.config.suppress_errors = True  # later compilations fall back by themselves
    restore(model, saved)


def compile_by_use(model, rollouts):
    """Call the networks on random frames as training does and, if so, rollouts do."""
    args = model.args
    shape = (args.batch_size, args.train_vi_len, 3, args.frame_H, args.frame_W)
    for teacher_forced in (True, False) if args.train_vi_len > 2 else (True,):
        model.training_one_step(torch.rand(shape), torch.rand(shape), teacher_forced)
    if not rollouts:
        return
    first, label = torch.rand(shape)[:1, 0], torch.rand(shape)[:1, :1].expand(1, 3, -1, -1, -1)
    # random poses may overflow, but only after compiling
    with validated_weights(model), suppress(UserError):
        model.rollout(first, label)
