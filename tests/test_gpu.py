"""What a GPU changes: precision, compiling, skipped steps, data and random state on the device.

Skipped without a GPU; GPU_CHECK_DEVICE=cpu runs the same code on a CPU (see scripts/gpu_check.sh).
"""

import copy
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from conftest import TINY, in_process, send_at
from torch import nn

import Tester
import Trainer
from utils.averaging import network_state
from modules import Gaussian_Predictor
from scripts.kill_test import compare, differences, rows
from scripts.reference_loop import reference_rollout, reference_step
from utils.checkpoint import NETWORKS
from utils.compiling import compile_networks, is_compiled, mark_for_compiling
from utils import graphs
from utils.submission import check_submission
from utils.training_state import capture, restore

DEVICE = os.environ.get("GPU_CHECK_DEVICE", "cuda")
ON_CPU = DEVICE == "cpu"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(
    not ON_CPU and not torch.cuda.is_available(), reason="there is no GPU")]

B, T, H, W = 2, 4, 16, 32
TEACHER_FORCED = torch.tensor([True, False, True, False])
# how far each precision may be from float32 on a CPU, relatively; tf32: CUDA's default float32
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.03, "tf32": 0.02}
PRECISIONS = ["fp32", "bf16"] if ON_CPU else list(TOLERANCE)  # fp16 is slow there: test_fp16.py


@pytest.fixture(params=PRECISIONS)
def precision(request, monkeypatch):
    """Have every model compute in this precision, whatever suits the device."""
    name = request.param.replace("tf32", "fp32")
    monkeypatch.setattr(Trainer, "pick_precision", lambda *_: (name, name))
    yield request.param
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True


def build(precision, *flags):
    words = [*TINY, "--device", DEVICE, "--precision", "auto", "--recipe", "template",
             "--kl_anneal_type", "None", "--kl_weight", "0.01", *flags]
    model = Trainer.VAE_Model(Trainer.build_parser().parse_args(words))
    torch.backends.cudnn.benchmark = False  # the search takes longer than the tests
    if precision == "fp32":  # building a model switches TF32 on
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return model


class Networks(nn.Module):
    """A copy of a model's networks on the CPU, for the reference loop."""

    def __init__(self, model):
        super().__init__()
        for name in NETWORKS:
            setattr(self, name, copy.deepcopy(getattr(model, name)).cpu())


@pytest.fixture
def same_noise(monkeypatch):
    """One draw of eps for every call and device."""
    eps = torch.randn(4, H, W, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    monkeypatch.setattr(Gaussian_Predictor, "reparameterize",
                        lambda self, mu, logvar: mu + torch.exp(0.5 * logvar) * eps.to(mu))


@pytest.fixture
def window():
    return tuple(torch.rand(2, B, T, 3, H, W, generator=torch.Generator().manual_seed(7)))


def apart(found, expected):
    return float((found.cpu().float() - expected).norm() / expected.norm())


def flat(tensors):
    return torch.cat([x.detach().flatten().cpu().float() for x in tensors])


def finite_step(model, window):
    """Take a training step; with fp16, whose scale has to be found, as many as that needs."""
    for _ in range(20):
        loss = model.training_one_step(*window, TEACHER_FORCED[:window[0].shape[1]])
        if not model.state.skipped_in_a_row:
            return loss
    raise AssertionError("every step was skipped")


def prepare_compiling(precision, monkeypatch, tried=("fp32", "bf16", "fp16")):
    """Have torch.compile begin anew; skip precisions that are not tried, on a CPU all but bf16."""
    if precision not in (["bf16"] if ON_CPU else tried):
        pytest.skip("compiling takes long")
    torch._dynamo.reset()
    if ON_CPU:  # kernels take minutes to build there
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_step_is_the_reference_loops(precision, compiled, window, same_noise, monkeypatch):
    if compiled:
        prepare_compiling(precision, monkeypatch)
    model = build(precision)
    nn.Module.train(model, False)  # BatchNorm on running statistics, which time steps share
    plain = Networks(model)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.001)
    start = flat(plain.parameters())
    expected = reference_step(plain, optimizer, *window, TEACHER_FORCED, kl_weight=0.01)
    if compiled:
        mark_for_compiling(model)
    assert apart(finite_step(model, window), expected) < TOLERANCE[precision]
    gradient, wanted = (flat(p.grad for p in m.parameters()) for m in (model, plain))
    assert apart(gradient, wanted) < TOLERANCE[precision]
    moved, wanted = (flat(m.parameters()) - start for m in (model, plain))
    assert torch.cosine_similarity(moved, wanted, dim=0) > 0.9


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_graphs_compute_what_single_calls_do(precision, compiled, window, same_noise, monkeypatch):
    """In the default recipe; a skipped step changes nothing there either."""
    if compiled:
        prepare_compiling(precision, monkeypatch, tried=["bf16"])
    found = []
    img, label = (x[:, :2].to(DEVICE) for x in window)
    for record in (False, True):
        model = build(precision, "--recipe", "pool", "--batch_size", str(B), "--train_vi_len", "2")
        if record and compiled:
            compile_networks(model, rollouts=False)
        if record:
            graphs.record_step(model, Trainer.VAE_Model)
        for epoch in range(3):  # a learning rate of its own for each step
            model.optim.param_groups[0]["lr"] = 0.001 * (epoch + 1)
            losses = [finite_step(model, (img, label)) for _ in range(2)]
        found.append((flat(losses), flat(model.parameters())))
        if record and not ON_CPU:  # not called as before
            assert all("forward" in getattr(model, name).__dict__ for name in NETWORKS)
            assert precision == "fp16" or model.session.take_step.replayed.graph
            assert not is_compiled(model)
    (losses, weights), (expected, wanted) = found[1], found[0]
    assert apart(losses, expected) < TOLERANCE[precision]
    assert apart(weights, wanted) < TOLERANCE[precision]
    before = network_state(model)
    model.training_one_step(img * float("nan"), label, TEACHER_FORCED[:2])
    assert model.state.skipped_in_a_row == 1
    assert differences(before, network_state(model)) == []
    graphs.forget(model)
    again = finite_step(model, (img, label))
    assert again.isfinite() and apart(flat(model.parameters()), wanted) > 0


def test_a_graph_that_cannot_be_recorded_costs_nothing(capsys, monkeypatch):
    monkeypatch.setattr(graphs, "enabled", True)

    def sign(x):
        return x if x.sum().item() > 0 else -x  # reads a value back

    replayed = graphs.Replayed(sign)
    for value in (1.0, -2.0, 3.0, -4.0, 5.0):
        x = torch.full((2,), value, device=DEVICE)
        assert torch.equal(replayed(x), x.abs())
    assert torch.randn(3, device=DEVICE).isfinite().all()
    assert ON_CPU or "no CUDA graph" in capsys.readouterr().out


def test_after_a_failed_recording_nothing_is_a_graph(window, monkeypatch):
    """Graphs made before would draw noise from a random state that no checkpoint holds."""
    monkeypatch.setattr(graphs, "enabled", True)
    model = build("fp32", "--recipe", "pool", "--batch_size", str(B), "--train_vi_len", "2")
    graphs.record_step(model, Trainer.VAE_Model)
    assert ON_CPU or model in graphs.with_networks
    batch = *(x[:, :2].to(DEVICE) for x in window), TEACHER_FORCED[:2]
    model.training_one_step(*batch)
    fails = graphs.Replayed(lambda x: x * x.sum().item())  # reads a value back
    for _ in range(3):
        fails(torch.ones(2, device=DEVICE))
    assert model not in graphs.with_networks
    saved = capture(model)
    noise = []
    for _ in range(2):
        model.training_one_step(*batch)
        noise.append(flat([model.generated]))
        restore(model, saved)
    assert torch.equal(*noise)


def test_a_graph_takes_new_inputs():
    replayed = graphs.Replayed(lambda x, y: x * 2 + y)
    for value in range(6):
        x = torch.full((2, 3, 4, 4), float(value), device=DEVICE)
        x = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(replayed(x, x + 1), 3 * x + 1)
    assert ON_CPU or replayed.graph


@pytest.mark.parametrize("optim", ["Adam", "Muon"])
def test_a_gradient_that_is_not_finite_changes_nothing(precision, optim, window):
    model = build(precision, "--optim", optim)
    finite_step(model, window)
    before = copy.deepcopy((network_state(model), model.optim.state_dict()["state"]))
    img = window[0].clone()
    img[0, 1, 0, 0, 0] = float("nan")
    model.training_one_step(img, window[1], TEACHER_FORCED)
    assert model.state.skipped_in_a_row == 1
    after = network_state(model), model.optim.state_dict()["state"]
    assert differences(before, after) == []
    finite_step(model, window)
    assert differences(before[0], network_state(model)) != []


def test_a_rollout_is_the_reference_loops(precision, window):
    model = build(precision, "--z", "zero")
    plain = Networks(model)
    nn.Module.train(plain, False)
    first, label = window[0][:, 0], window[1]
    expected = reference_rollout(plain, first, label, model.args.N_dim, torch.zeros)
    frames = model.rollout(first, label)
    assert frames.device.type == "cpu" and apart(frames, expected) < TOLERANCE[precision]
    model.args.z = "prior"
    assert torch.equal(model.rollout(first, label), model.rollout(first, label)) or not ON_CPU
    assert not torch.equal(model.rollout(first, label), frames)


def test_a_stopped_run_resumes(tiny_data, tmp_path, monkeypatch):
    def train(folder, *flags):
        words = ["--DR", tiny_data, "--save_root", folder, *TINY, "--device", DEVICE, *flags]
        return in_process(Trainer.main, *words)

    assert train(tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        send_at(patch, "training_one_step", 24, signal.SIGTERM)  # in the second of two epochs
        assert train(tmp_path / "run") == 143
    assert train(tmp_path / "run", "--resume") == 0
    found, expected = (rows(tmp_path / name / "history.csv") for name in ("run", "whole"))
    assert len(found) == len(expected) == 2
    if ON_CPU:
        assert compare(tmp_path / "run", tmp_path / "whole") == []
    for mine, other in zip(found, expected):  # a GPU adds up in any order: not bitwise identical
        for name in ("lr", "tfr", "tf_share", "beta"):
            assert float(mine[name]) == pytest.approx(float(other[name]))
        assert float(mine["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=0.2)


def test_the_testers_csv_is_the_cpus(tiny_data, tiny_run, tmp_path):
    values = []
    for device in (DEVICE, "cpu"):
        words = ["--DR", tiny_data, "--ckpt_path", tiny_run / "best.ckpt", "--z", "zero",
                 "--save_root", tmp_path / device, "--device", device, "--precision", "fp32"]
        assert in_process(Tester.main, *words) == 0
        csv = check_submission(tmp_path / device / "submission.csv", 5, 20, 3 * H * W)
        values.append(np.asarray(csv, dtype=int))
    difference = np.abs(values[0] - values[1])
    assert difference.max() <= 5 and difference.mean() < 0.2


@pytest.mark.skipif(ON_CPU, reason="a CPU does not count what a step allocates")
def test_memory_stays_and_checkpoint_steps_halves_it(window):
    long = tuple(x.repeat(1, 8, 1, 1, 1).to(DEVICE) for x in window)
    peaks = []
    for flags in ([], ["--checkpoint_steps"]):
        model = build("tf32", *flags)
        model.training_one_step(*long, False)
        allocated = []
        for _ in range(5):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model.training_one_step(*long, False)
            allocated.append(torch.cuda.memory_allocated())
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert max(allocated) - min(allocated) < 1e6
    assert peaks[1] < 0.6 * peaks[0]
