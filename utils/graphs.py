"""Replay what training and rollouts repeat as CUDA graphs.

On a GPU a step of small kernels takes as long as their launches from Python. A graph launches all
of them by one call (PyTorch's notes on CUDA graphs). Python code runs only while a graph is
recorded, so graphs hold what the lab fixes, the networks, and the optimizer; the loss is computed
call by call. Networks with hooks and methods of subclasses are never recorded.
"""

import warnings
import weakref
from contextlib import contextmanager

import torch

from utils import distributed
from utils.checkpoint import NETWORKS
from utils.cli import say
from utils.compiling import is_compiled, uncompiled, unmark
from utils.hardware import autocast, step_if_finite
from utils.training_state import capture, restore

# the recorded backward passes keep their own autograd graph alive, on their own stream
warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
enabled = True  # false after a recording that failed
with_networks = weakref.WeakSet()  # models whose networks are graphs in training steps
WARM_UP = 2  # calls before a recording, in which libraries choose kernels and allocate


class Graph:
    """Record function(*inputs) of CUDA tensors; a call copies new inputs and replays it.

    Its outputs are overwritten by the next call.
    """

    def __init__(self, function, *inputs):
        self.inputs, self.graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
        # other threads may use the GPU meanwhile
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs):
        torch._foreach_copy_(self.inputs, list(inputs))
        self.graph.replay()
        return self.outputs


class Replayed:
    """Call a function of tensors whose shapes never change; on CUDA replay it after WARM_UP calls.

    pure: whether the function computes by its inputs and weights alone. Where it does not, or where
    recording fails, the function is called as before.
    """

    def __init__(self, function, pure=True):
        self.function, self.pure, self.graph, self.calls = function, pure, None, 0

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls == WARM_UP + 1 and self.pure and can_record(inputs[0].device):
            self.graph = recorded(lambda: Graph(self.function, *inputs))
        return (self.graph or self.function)(*inputs)


def replayed_frame(model, kind):
    """Return `next_frame` of a model, replayed if it is as the class `kind` has it."""
    pure = model.args.cuda_graphs and not is_compiled(model)
    pure = pure and is_unchanged(model, kind, "next_frame", "decode")
    return Replayed(model.next_frame, pure)


def is_unchanged(model, kind, *methods):
    """Return whether a model has these methods of class `kind`, and no user's hook or forward."""
    own = all(getattr(getattr(model, name), "__func__", None) is getattr(kind, name)
              for name in methods)
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    hooked = any(getattr(m, name) for m in model.modules() for name in hooks)
    replaced = model not in with_networks and any("forward" in vars(m) for m in model.modules())
    return own and not hooked and not replaced


def can_record(device):
    """Return whether graphs can be recorded: on the current CUDA device, until one failed."""
    return enabled and device.type == "cuda" and device.index == torch.cuda.current_device()


@contextmanager
def plain_calls():
    """Record nothing inside."""
    global enabled
    before, enabled = enabled, False
    try:
        yield
    finally:
        enabled = before


def recorded(record):
    """Return record(), or None where CUDA can't record it: one line, and no graphs from then on."""
    global enabled
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    state = generator.get_state()
    # a failed recording stays on its own stream, and leaves the generator unusable
    with torch.cuda.stream(torch.cuda.current_stream()):
        try:
            return record()
        except RuntimeError as error:
            enabled = False
            for model in list(with_networks):  # their noise is the old state's
                forget(model)
            torch.cuda.synchronize()  # the other stream may still restore weights
            generator.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())
            generator.set_state(state)
            problem = str(error).splitlines()[0]
    say(f"no CUDA graph ({problem}): the same results, more slowly")
    return None


# ---------------------------------------------------------------- a training step

def can_record_step(model, kind):
    """Return whether a step is a graph: on one GPU, where it calls every network once.

    kind: the class VAE_Model, whose step it must be.
    """
    args = model.args
    once = args.train_vi_len == 2 and not args.checkpoint_steps
    once = once and is_unchanged(model, kind, "training_one_step", "decode", "optimizer_step")
    return args.cuda_graphs and can_record(model.device) and distributed.world() == 1 and once


def record_step(model, kind):
    """Have a model's training steps replay its networks, compiled or not, and its optimizer."""
    forget(model)
    if not can_record_step(model, kind):
        return
    recorded(lambda: record_networks(model))
    if model in with_networks and model.precision != "fp16":  # there Python code scales the loss
        model.session.take_step = OptimizerStep()


def record_networks(model):
    """Replace the forward and backward pass of each network, in training, by graphs."""
    saved = capture(model)
    try:
        with uncompiled(model):  # a hook would have them compiled again
            networks, inputs = calls_in_a_step(model)
        if len(networks) > len(set(networks)):  # an edited step
            say("no CUDA graph (a step calls a network twice): the same results, more slowly")
            return
        with_networks.add(model)
        with autocast(model.device, model.precision, cache=False):
            torch.cuda.make_graphed_callables(networks, inputs)
        for network, given in zip(networks, inputs):
            network.forward = for_shapes(network, given)
        unmark(model)  # recorded as they were compiled; rollouts are graphs of their own
    except RuntimeError:
        forget(model)
        raise
    finally:
        restore(model, saved)


def calls_in_a_step(model):
    """Return the networks in the order of their calls, and copies of the inputs of each call.

    Copies, as an autograd graph that is kept alive would end a recording.
    """
    args, calls = model.args, []

    def note(network, given):
        copies = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in given)
        calls.append((network, copies))

    hooks = [getattr(model, name).register_forward_pre_hook(note) for name in NETWORKS]
    frames = torch.rand(args.batch_size, 2, 3, args.frame_H, args.frame_W, device=model.device)
    try:
        model.training_one_step(frames, frames, True)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(network for network, _ in calls), tuple(given for _, given in calls)


def for_shapes(network, recorded_inputs):
    """Return the forward method of a network: the recorded one for inputs of these shapes."""
    replay, plain = network.forward, type(network).forward
    shapes = [x.shape for x in recorded_inputs]

    def forward(*inputs):
        if torch.is_grad_enabled() and [x.shape for x in inputs] == shapes:
            return replay(*inputs)
        return plain(network, *inputs)

    return forward


def forget(model):
    """Have training steps call everything again."""
    model.session.take_step = step_if_finite
    if model in with_networks:
        for name in NETWORKS:
            getattr(model, name).__dict__.pop("forward", None)
        with_networks.remove(model)


class OptimizerStep:
    """Take the place of `step_if_finite` for one optimizer, as a graph."""

    def __init__(self):
        self.replayed, self.addresses = Replayed(self.step), None

    def __call__(self, optimizer, scaler, parameters, max_norm):
        """Clip and step, or do nothing; see `step_if_finite`."""
        self.given = optimizer, scaler, list(parameters), max_norm
        gradients = [p.grad for p in self.given[2]]
        known = len(optimizer.param_groups) == 1 and "capturable" in optimizer.param_groups[0]
        if not known or any(g is None for g in gradients):
            return step_if_finite(*self.given)
        # a graph reads and writes memory by address: another state needs another recording
        addresses = [x.data_ptr() for state in optimizer.state.values() for x in state.values()]
        if addresses != self.addresses:
            self.replayed, self.addresses = Replayed(self.step), addresses
        # a tensor made on the device: a copy would wait for it
        lr = torch.full((), optimizer.param_groups[0]["lr"], device=gradients[0].device)
        return self.replayed(lr, *gradients)

    def step(self, lr, *gradients):
        """Do the step with a learning rate that a graph can read, a tensor ()."""
        optimizer, _, parameters, _ = self.given
        group = optimizer.param_groups[0]
        own = {name: group[name] for name in ("lr", "capturable")}
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        if lr.is_cuda and torch.cuda.is_current_stream_capturing():
            group.update(lr=lr, capturable=True)
        try:
            return step_if_finite(*self.given)
        finally:
            group.update(own)
