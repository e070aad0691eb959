"""torch.compile takes each network whole, and training computes the same."""

from functools import partial

import pytest
import torch
from conftest import TINY, in_process
from torch._dynamo.utils import counters

import Trainer
from utils.compiling import COMPILED, mark_for_compiling


def trained(flags, compiled):
    """A model after two steps and three frames of a rollout, and what it computed."""
    model = Trainer.VAE_Model(Trainer.build_parser().parse_args([*TINY, *flags]))
    if compiled:
        mark_for_compiling(model)
    img, label = torch.rand(
        2, 2, model.args.train_vi_len, 3, 16, 32, generator=torch.Generator().manual_seed(0)
    )
    torch.manual_seed(0)
    losses = [model.training_one_step(img, label, forced) for forced in (True, False)]
    graphs = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        return (
            graphs, torch.stack(losses),
            model.rollout(img[:1, 0], label[:1, :1].expand(1, 4, -1, -1, -1))
        )


@pytest.fixture(autouse=True)
def plain_backend(monkeypatch):
    """Traced graphs that run as they are: what is tested needs no kernels built."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    settings = torch._dynamo.config
    with settings.patch(
        suppress_errors=False, optimize_ddp=settings.optimize_ddp,
        cache_size_limit=settings.cache_size_limit
    ):
        yield


@pytest.mark.parametrize("backend, flags", [
    ("aot_eager", ["--train_vi_len", "2"]),  # backward passes are traced, too
    ("eager", ["--recipe", "template", "--train_vi_len", "3"])
])
def test_each_network_is_one_graph(monkeypatch, backend, flags):
    monkeypatch.setattr(torch, "compile", partial(torch.compile.func, backend=backend))
    graphs, losses, frames = trained(flags, compiled=True)
    if flags[1] == "2":  # longer windows meet other sizes
        assert graphs == len(COMPILED)
    _, plain_losses, plain_frames = trained(flags, compiled=False)
    torch.testing.assert_close(losses, plain_losses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(frames, plain_frames, rtol=1e-3, atol=1e-4)


def test_nothing_is_compiled_unless_asked():
    parse = Trainer.build_parser().parse_args
    words = [], ["--compile"], ["--no_compile"]
    assert [parse(flags).compile for flags in words] == [False, True, False]


def test_training_has_its_networks_compiled(tiny_data, tmp_path, monkeypatch, capsys):
    """In fp16, where poses of noise, on which --compile is tried, give infinite frames."""
    monkeypatch.setattr(Trainer, "pick_precision", lambda *_: ("fp16", "fp16"))
    small = ["--frame_H", "8", "--frame_W", "16", "--num_epoch", "1", "--batch_size", "8"]
    words = ["--DR", tiny_data, "--save_root", tmp_path / "run", *TINY, *small, "--compile"]
    assert in_process(Trainer.main, *words) == 0
    said = capsys.readouterr().out
    assert "compiling the networks" in said and "does not work here" not in said
    assert counters["stats"]["unique_graphs"] >= len(COMPILED)


def test_without_a_compiler_training_continues(tiny_data, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise ImportError("no compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile.func, backend=broken))
    words = ["--DR", tiny_data, "--save_root", tmp_path / "run", *TINY, "--compile"]
    assert in_process(Trainer.main, *words) == 0
    assert "torch.compile does not work here" in capsys.readouterr().out
