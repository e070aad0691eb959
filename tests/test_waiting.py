"""A training step on a GPU reads nothing back from it.

Shown without a GPU, on tensors that have a shape and a device but no values.
"""

from utils import frame_cache
import pytest
import torch
import Trainer
from dataloader import RolloutPool
from conftest import TINY
from utils.averaging import begin_average
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

READING = (
    torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default
)


class NoReading(TorchDispatchMode):
    """Inside, a value read or copied from a GPU is an AssertionError.

    Values of the CPU's tensors are all 0.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_gpu = any(torch.is_tensor(x) and x.device.type == "cuda" for x in args)
        assert not (on_gpu and function in READING), f"{function} waits for the GPU"
        if function == READING[0]:
            return 0
        result = function(*args, **kwargs)
        copied = (
            function is torch.ops.aten._to_copy.default or function is torch.ops.aten.copy_.default
        )
        assert not (on_gpu and copied and result.device.type == "cpu"), (
            f"{function} copies from the GPU, and waits for it"
        )
        return result


def on_a_gpu_without_values(model):
    """Put a model's weights, and what it made of them, on a GPU that need not be there.

    Inside a FakeTensorMode.
    """
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(
                    torch.empty(weight.shape, device="cuda")
                )
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    for name in ("optim", "scheduler", "scaler"):  # made anew for these weights
        model.__dict__.pop(name, None)
    model.state.average = None
    begin_average(model)


def give_gradients(model):
    """In place of PyTorch's backward pass, which asks the driver for the device."""
    for weight in model.parameters():
        weight.grad = torch.empty_like(weight)


@pytest.fixture(autouse=True)
def values_are_not_needed():
    """Skip where PyTorch asks the driver for the device of a tensor without values, as 2.6 does.

    Afterwards forget what was kept without values.
    """
    try:
        with FakeTensorMode():
            torch.ones(2, 3, 4, 4, device="cuda").contiguous(memory_format=torch.channels_last)
    except RuntimeError as error:
        pytest.skip(f"this PyTorch needs a GPU for it: {str(error).splitlines()[0]}")
    frame_cache._white.cache_clear()
    yield
    frame_cache._white.cache_clear()


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--optim", "AdamW"],
        ["--train_vi_len", "4"],
        ["--recipe", "template", "--train_vi_len", "4"],
    ],
)
def test_a_step_reads_nothing_back_from_the_gpu(flags, monkeypatch):
    model = Trainer.VAE_Model(Trainer.build_parser().parse_args([*TINY, *flags]))
    with FakeTensorMode(), NoReading():
        on_a_gpu_without_values(model)
        img, label = torch.rand(2, 2, model.args.train_vi_len, 3, 16, 32, device="cuda")
        monkeypatch.setattr(torch.Tensor, "backward", lambda *_: give_gradients(model))
        for _ in range(2):  # the optimizer's state is made in the first
            loss = model.training_one_step(img, label, False)
        assert loss.device.type == "cuda"


def test_a_value_that_is_read_is_noticed():
    with FakeTensorMode(), NoReading():
        for read in (float, bool, torch.Tensor.cpu, torch.nonzero):
            with pytest.raises(AssertionError, match="the GPU"):
                read(torch.ones((), device="cuda"))


def test_the_pool_reads_nothing_back_wherever_the_data_are(tiny_data):
    model = Trainer.VAE_Model(Trainer.build_parser().parse_args([*TINY, "--DR", str(tiny_data)]))
    dataset = model.dataset("train", 2)
    with FakeTensorMode(allow_non_fake_inputs=True), NoReading():
        pool = RolloutPool(dataset, [0, len(dataset.frames.imgs)], 8, 0, "cuda")
        img, label = pool.draw(2, 2, 0.5, torch.zeros(2, dtype=torch.bool))
        assert img.shape == label.shape == (2, 2, 3, 16, 32)
        assert img.device.type == label.device.type == "cuda"
        pool.put(torch.rand(2, 3, 16, 32, device="cuda"))
