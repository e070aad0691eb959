"""The training step against the reference loop, frame by frame; and what a rollout may look at.

The step computes what does not depend on a prediction for all time steps at once. With BatchNorm on
running statistics that is the same arithmetic as the loop of the assignment's figure, so loss and
gradients must agree.
"""

import copy
import textwrap
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, TINY
from torch.utils._python_dispatch import TorchDispatchMode

import Trainer
from modules import Gaussian_Predictor
from scripts.reference_loop import log_mse, reference_loss, reference_rollout, reference_step
from utils.checkpoint import NETWORKS
from utils.hardware import autocast

B, T, H, W = 2, 6, 16, 32
TEACHER_FORCED = {
    "True": True, "False": False, "mixed": torch.tensor([True, False, True, False, False, True]),
    "all but the last": torch.tensor([True] * 5 + [False])}
WAYS = [[], ["--checkpoint_steps"], ["--output", "sigmoid"], ["--output", "clamp"],
        ["--objective", "log_mse"]]


def build(*flags):
    return Trainer.VAE_Model(Trainer.build_parser().parse_args(
        [*TINY, "--recipe", "template", "--kl_anneal_type", "None", "--kl_weight", "0.01", *flags]))


@pytest.fixture(autouse=True)
def same_noise(monkeypatch):
    """One draw of eps for every call, so that the order of calls does not matter."""
    eps = torch.randn(4, H, W, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(Gaussian_Predictor, "reparameterize",
                        lambda self, mu, logvar: mu + torch.exp(0.5 * logvar) * eps)


@pytest.fixture
def window():
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.rand(2, B, T, 3, H, W, generator=generator))


def moved(model):
    """Running statistics that are not those of a fresh network, and then no longer change."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        model.label_transformation(torch.rand(4, 3, H, W, generator=generator) * 0.7)
    nn.Module.train(model, False)
    return model


def reference(model, window, teacher_forced):
    """Loss, reconstruction, mse, kl and the last frame of the reference loop, by name."""
    args = model.args
    networks = SimpleNamespace(**{name: getattr(model, name) for name in NETWORKS})
    output = {"none": lambda x: x, "clamp": lambda x: x.clamp(0, 1), "sigmoid": torch.sigmoid}
    networks.Generator = lambda x: output[args.output](model.Generator(x))
    objective = log_mse if args.objective == "log_mse" else F.mse_loss
    settings = {"kl_weight": args.kl_weight, "objective": objective}
    loss, reconstruction, kl, generated = reference_loss(
        networks, *window, teacher_forced, **settings)
    mse = reference_loss(networks, *window, teacher_forced)[1]
    return {"loss": loss, "reconstruction": reconstruction, "mse": mse, "kl": kl}, generated


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    each = [p.grad.clone() for p in model.parameters()]
    return torch.cat([gradient.flatten() for gradient in each]), each


def apart(found, expected):
    return float(((found - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("flags", WAYS, ids=" ".join)
@pytest.mark.parametrize("teacher_forced", TEACHER_FORCED)
def test_loss_and_gradients_are_the_reference_loops(teacher_forced, flags, window):
    model = moved(build(*flags))
    *_, generated = model(*window, TEACHER_FORCED[teacher_forced])
    found = model.losses
    whole, each = gradients(model, found["loss"])
    expected, expected_frame = reference(model, window, TEACHER_FORCED[teacher_forced])
    expected_whole, expected_each = gradients(model, expected["loss"])
    assert found.keys() == expected.keys()
    assert all(apart(found[name], expected[name]) < 1e-5 for name in found)
    assert apart(generated, expected_frame) < 1e-5
    assert apart(whole, expected_whole) < 1e-5
    small = 1e-4 * expected_whole.norm()
    assert all(apart(a, b) < 1e-4 for a, b in zip(each, expected_each) if b.norm() > small)


def test_the_docs_show_the_reference_loop():
    source, docs = ((ROOT / path).read_text(encoding="utf-8")
                    for path in ("scripts/reference_loop.py", "docs/RECIPE.md"))
    shown = docs.split("## Algorithm 1")[1].split("```python\n")[1].split("```")[0]
    assert textwrap.indent(shown, " " * 4) in source and "kl_weight * kl" in shown


def loss_of(model, window, teacher_forced):
    return model(*window, teacher_forced)[0]


def test_the_teacher_forcing_masks_differ(window):
    model = moved(build())
    losses = [loss_of(model, window, value).item() for value in TEACHER_FORCED.values()]
    assert len(set(losses)) == len(losses)
    every = torch.ones(T, dtype=torch.bool)
    assert loss_of(model, window, every).item() == losses[0]
    assert loss_of(model, window, ~every).item() == losses[1]
    first_two = every.clone()
    first_two[:2] = False  # nothing precedes frame 0, and frame 1 has a true one before it anyway
    assert loss_of(model, window, first_two).item() == losses[0]


@pytest.mark.parametrize("teacher_forced", TEACHER_FORCED)
def test_checkpoint_steps_gives_the_same_gradients(teacher_forced, window):
    """With BatchNorm in training mode too: a recomputed pass must not move its statistics twice."""
    results = []
    for flags in ([], ["--checkpoint_steps"]):
        model = build(*flags)
        loss = loss_of(model, window, TEACHER_FORCED[teacher_forced])
        results.append((float(loss.detach()), gradients(model, loss)[0], model.state_dict()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert apart(results[1][1], results[0][1]) < 1e-5
    for name, value in results[0][2].items():
        assert torch.equal(value, results[1][2][name]), name


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_one_step_clips_and_updates(window):
    model = moved(build("--lr", "0.001", "--kl_weight", "0.01"))
    plain, start = copy.deepcopy(model), weights(model)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.001)
    for teacher_forced in (True, False, True):
        loss = model.training_one_step(*window, teacher_forced)
        expected = reference_step(plain, optimizer, *window, teacher_forced, kl_weight=0.01)
        assert loss.shape == () and float(loss) == pytest.approx(float(expected), rel=1e-4)
    # Adam's first steps follow the sign of tiny gradients too
    assert apart(weights(model) - start, weights(plain) - start) < 0.02


# ---------------------------------------------------------------- the rollout

@pytest.fixture(scope="module")
def sequence():
    generator = torch.Generator().manual_seed(11)
    return tuple(torch.rand(2, 3, 40, 3, H, W, generator=generator))


def test_a_rollout_looks_at_the_first_frame_only(sequence):
    img, label = sequence
    model = build()
    loss, psnrs = model.val_one_step(img, label)
    predicted = model.predicted
    assert predicted.shape == (3, 39, 3, H, W) and len(psnrs) == 39
    assert predicted.min() >= 0 and predicted.max() <= 1
    assert float(loss) == pytest.approx(float(F.mse_loss(predicted, img[:, 1:])), rel=1e-5)
    error = (predicted - img[:, 1:]).square().mean((2, 3, 4))
    assert psnrs == pytest.approx((-10 * torch.log10(error)).mean(0).tolist(), rel=1e-5)

    others = img.clone()
    others[:, 1:] = 1 - others[:, 1:]
    _, other_psnrs = model.val_one_step(others, label)
    assert torch.equal(model.predicted, predicted) and other_psnrs != psnrs
    others[:, 0] = 1 - others[:, 0]
    model.val_one_step(others, label)
    assert not torch.equal(model.predicted, predicted)
    others = label.clone()
    others[:, 0] = 0  # nor at the pose of the given frame
    assert torch.equal(model.rollout(img[:, 0], others), predicted)
    others[:, 20:] = 0
    changed = model.rollout(img[:, 0], others)
    assert torch.equal(changed[:, :19], predicted[:, :19])
    assert not torch.equal(changed[:, 19:], predicted[:, 19:])


@pytest.mark.parametrize("flags", [[], ["--rollouts", "3"], ["--z", "zero"]], ids=" ".join)
def test_a_sequence_rolls_out_the_same_alone_and_among_others(flags, sequence):
    img, label = sequence
    model = build(*flags)
    together = model.rollout(img[:, 0], label)
    assert torch.equal(model.rollout(img[:, 0], label), together)
    for i in range(3):
        alone = model.rollout(img[i:i + 1, 0], label[i:i + 1])[0]
        assert torch.allclose(alone, together[i], atol=1e-5)
    order = [2, 0, 1]
    assert torch.allclose(model.rollout(img[order, 0], label[order]), together[order], atol=1e-5)


def test_a_rollout_is_the_reference_loops(sequence):
    img, label = sequence
    model = moved(build("--z", "zero"))
    expected = reference_rollout(model, img[:, 0], label, model.args.N_dim, torch.zeros)
    assert torch.allclose(model.rollout(img[:, 0], label), expected, atol=1e-5)


def test_mixed_precision_keeps_both_ends_in_float32(window):
    """BatchNorm's recomputed statistics are float32's, and a frame fed back is not rounded."""
    img, label = window
    mixed, whole = moved(build("--precision", "bf16")), moved(build("--precision", "fp32"))
    with torch.no_grad(), autocast(mixed.device, mixed.precision):
        stems = [nn.Sequential(*list(model.label_transformation)[:3]) for model in (mixed, whole)]
        assert torch.equal(*(stem(label[:, 0]) for stem in stems))
        # what lies between is not
        assert mixed.label_transformation(label[:, 0]).dtype == torch.bfloat16
    frames = mixed.rollout(img[:, 0], label)
    assert (frames != frames.bfloat16()).any()
    assert mixed.state_dict().keys() == build().state_dict().keys()


class Casts(TorchDispatchMode):
    """Counts how often each parameter is cast."""

    def __init__(self, model):
        super().__init__()
        self.names, self.seen = {id(p): name for name, p in model.named_parameters()}, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype):
            self.seen[self.names.get(id(args[0]))] += 1
        return function(*args, **(kwargs or {}))


def test_a_rollout_in_mixed_precision_casts_each_weight_once(sequence):
    img, label = sequence
    model = build("--precision", "bf16")
    with Casts(model) as casts:
        model.rollout(img[:, 0], label[:, :20])
    del casts.seen[None]
    assert len(casts.seen) > 100 and set(casts.seen.values()) == {1}


def test_z_is_drawn_anew_at_every_step(sequence):
    img, label = sequence
    drawn = []
    model = build()
    model.decode = lambda previous, pose, z: drawn.append(z.clone()) or torch.zeros(3, 3, H, W)
    model.rollout(img[:, 0], label)
    z = torch.stack(drawn)  # (39, 3, N_dim, H, W)
    assert z.shape == (39, 3, 4, H, W) and len({float(step.sum()) for step in z[:, 0]}) == 39
    assert abs(float(z.mean())) < 0.02 and abs(float(z.std()) - 1) < 0.02


@pytest.mark.parametrize("recipe", ["pool", "template"])
def test_batch_norm_is_back_in_training_mode(recipe, tiny_data, tmp_path):
    words = ["--DR", tiny_data, "--save_root", tmp_path / "new" / "out", *TINY, "--recipe", recipe]
    model = Trainer.VAE_Model(Trainer.build_parser().parse_args([str(word) for word in words]))
    seen = []
    handles = [m.register_forward_hook(lambda m, *_: seen.append(m.training))
               for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = copy.deepcopy(model.state_dict())
    score = model.eval()
    assert seen and not any(seen)  # on its running statistics in every step of the rollout
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(score, float) and (tmp_path / "new" / "out").is_dir()
    for handle in handles:
        handle.remove()

    nn.Module.train(model, False)
    model.eval()
    # it leaves the mode that it found
    assert not any(module.training for module in model.modules())


def test_batch_norm_learns_while_training(window):
    model = build()
    before = copy.deepcopy(model.state_dict())
    model.training_one_step(*window, True)
    moved_on = [name for name, value in model.state_dict().items()
                if "running" in name and not torch.equal(value, before[name])]
    assert len(moved_on) == 2
