"""torch.compile takes each network whole, and training computes the same."""

from functools import partial

import pytest
import torch
from conftest import TINY
from torch._dynamo.utils import counters

import Trainer


def trained(flags, compiled):
    """A model after two steps and three frames of a rollout, and what it computed."""
    model = Trainer.VAE_Model(Trainer.build_parser().parse_args([*TINY, *flags]))
    if compiled:
        model.mark_for_compiling()
    img, label = torch.rand(2, 2, model.args.train_vi_len, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    losses = [model.training_one_step(img, label, taught) for taught in (True, False)]
    graphs = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        return graphs, torch.stack(losses), model.rollout(img[:1, 0], label[:1, :1].expand(1, 4, -1, -1, -1))


@pytest.mark.parametrize("flags", [["--train_vi_len", "2"], ["--recipe", "template", "--train_vi_len", "3"]])
def test_each_network_is_one_graph(flags, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    graphs, losses, frames = trained(flags, compiled=True)
    if flags[1] == "2":  # longer windows meet other sizes
        assert graphs == len(Trainer.COMPILED)
    _, plain_losses, plain_frames = trained(flags, compiled=False)
    torch.testing.assert_close(losses, plain_losses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(frames, plain_frames, rtol=1e-3, atol=1e-4)
