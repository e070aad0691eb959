"""The training step against a plain loop, frame by frame; and what a rollout may look at.

The step computes what does not depend on a prediction for all time steps at once. With BatchNorm on running statistics
that is the same arithmetic as the loop of the assignment's figure, so loss and gradients must agree.
"""

import copy
from collections import Counter

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TINY
from torch.utils._python_dispatch import TorchDispatchMode

import Trainer
from modules import Gaussian_Predictor

B, T, H, W = 2, 6, 16, 32
TAUGHT = {"True": True, "False": False, "mixed": torch.tensor([True, False, True, False, False, True]),
          "all but the last": torch.tensor([True] * 5 + [False])}


def build(*flags):
    return Trainer.VAE_Model(Trainer.build_parser().parse_args(
        [*TINY, "--recipe", "template", "--kl_anneal_type", "None", "--kl_weight", "0.01", *flags]))


@pytest.fixture(autouse=True)
def same_noise(monkeypatch):
    """One draw of eps for every call, so that the order of calls does not matter."""
    eps = torch.randn(4, H, W, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(Gaussian_Predictor, "reparameterize", lambda self, mu, logvar: mu + torch.exp(0.5 * logvar) * eps)


@pytest.fixture
def window():
    generator = torch.Generator().manual_seed(7)
    return torch.rand(B, T, 3, H, W, generator=generator), torch.rand(B, T, 3, H, W, generator=generator)


def moved(model):
    """Running statistics that are not those of a fresh network, and then no longer change."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        model.label_transformation(torch.rand(4, 3, H, W, generator=generator) * 0.7)
    nn.Module.train(model, False)
    return model


def plain_loop(model, img, label, taught):
    """Loss of a window, one frame at a time: poses, posterior, decode, and the frame just made goes back in with its gradient."""
    taught = torch.as_tensor(taught).expand(T)
    output = {"none": lambda x: x, "clamp": lambda x: x.clamp(0, 1), "sigmoid": torch.sigmoid}[model.args.output]
    mse = log_mse = divergence = 0.0
    for t in range(1, T):
        history = img[:, t - 1] if t == 1 or taught[t] else generated  # noqa: F821 (made in the step before)
        pose = model.label_transformation(label[:, t])
        z, mu, logvar = model.Gaussian_Predictor(model.frame_transformation(img[:, t]), pose)
        generated = output(model.Generator(model.Decoder_Fusion(model.frame_transformation(history), pose, z)))
        mse = mse + F.mse_loss(generated, img[:, t])
        for one, true in zip(generated, img[:, t]):
            log_mse = log_mse + 1e-3 * torch.log((F.mse_loss(one, true) + 1e-5) / 1e-5) / B
        divergence = divergence - 0.5 * (1 + logvar - mu ** 2 - logvar.exp()).sum() / B
    reconstruction = log_mse if model.args.objective == "log_mse" else mse
    sums = {"loss": reconstruction + 0.01 * divergence, "reconstruction": reconstruction, "mse": mse, "kl": divergence}
    return {name: value / (T - 1) for name, value in sums.items()}, generated


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), [p.grad.clone() for p in model.parameters()]


def apart(found, expected):
    return float(((found - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("flags", [[], ["--checkpoint_steps"], ["--output", "sigmoid"], ["--output", "clamp"], ["--objective", "log_mse"]], ids=" ".join)
@pytest.mark.parametrize("taught", TAUGHT)
def test_loss_and_gradients_are_those_of_a_plain_loop(taught, flags, window):
    model = moved(build(*flags))
    found, last = model(*window, TAUGHT[taught])
    whole, each = gradients(model, found["loss"])
    expected, expected_last = plain_loop(model, *window, TAUGHT[taught])
    expected_whole, expected_each = gradients(model, expected["loss"])
    assert list(found) == list(expected) and apart(last, expected_last) < 1e-5
    for name in expected:
        assert apart(found[name], expected[name]) < 1e-5, name
    assert apart(whole, expected_whole) < 1e-5
    assert all(apart(a, b) < 1e-4 for a, b in zip(each, expected_each) if b.norm() > 1e-4 * expected_whole.norm())


def test_the_ways_to_teach_differ(window):
    model = moved(build())
    loss = lambda taught: model(*window, taught)[0]["loss"].item()
    losses = [loss(taught) for taught in TAUGHT.values()]
    assert len(set(losses)) == len(losses)
    every = torch.ones(T, dtype=torch.bool)
    assert loss(every) == losses[0] and loss(~every) == losses[1]
    first_two = every.clone()
    first_two[:2] = False  # the past frame has no history, and the second one's is always given
    assert loss(first_two) == losses[0]


@pytest.mark.parametrize("taught", TAUGHT)
def test_checkpoint_steps_gives_the_same_gradients_while_training(taught, window):
    """With BatchNorm in training mode too, where a recomputed pass must not count twice in its running statistics."""
    results = []
    for flags in ([], ["--checkpoint_steps"]):
        model = build(*flags)
        loss = model(*window, TAUGHT[taught])[0]["loss"]
        results.append((float(loss), gradients(model, loss)[0], model.state_dict()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6) and apart(results[1][1], results[0][1]) < 1e-5
    for name, value in results[0][2].items():
        assert torch.equal(value, results[1][2][name]), name


def test_one_step_clips_and_updates(window):
    model = moved(build("--lr", "0.001", "--kl_weight", "0.01"))
    reference = copy.deepcopy(model)
    optimizer = torch.optim.Adam(reference.parameters(), lr=0.001)
    for taught in (True, False, True):
        loss = model.training_one_step(*window, taught)
        expected = plain_loop(reference, *window, taught)[0]["loss"]
        assert loss.shape == () and float(loss) == pytest.approx(float(expected), rel=1e-4)
        optimizer.zero_grad()
        expected.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
    found, wanted = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, reference))
    start = torch.cat([p.detach().flatten() for p in moved(build()).parameters()])
    assert apart(found - start, wanted - start) < 0.02  # Adam's first steps follow the sign of tiny gradients too


# ---------------------------------------------------------------- the rollout

@pytest.fixture(scope="module")
def sequence():
    generator = torch.Generator().manual_seed(11)
    return torch.rand(3, 40, 3, H, W, generator=generator), torch.rand(3, 40, 3, H, W, generator=generator)


def test_a_rollout_looks_at_the_first_frame_only(sequence):
    img, label = sequence
    model = build()
    loss, psnrs = model.val_one_step(img, label)
    predicted = model.predicted
    assert predicted.shape == (3, 39, 3, H, W) and len(psnrs) == 39 and predicted.min() >= 0 and predicted.max() <= 1
    assert float(loss) == pytest.approx(float(F.mse_loss(predicted, img[:, 1:])), rel=1e-5)
    error = (predicted - img[:, 1:]).square().mean((2, 3, 4))
    assert psnrs == pytest.approx((-10 * torch.log10(error)).mean(0).tolist(), rel=1e-5)

    others = img.clone()
    others[:, 1:] = 1 - others[:, 1:]
    other_loss, other_psnrs = model.val_one_step(others, label)
    assert torch.equal(model.predicted, predicted) and other_psnrs != psnrs
    others[:, 0] = 1 - others[:, 0]
    model.val_one_step(others, label)
    assert not torch.equal(model.predicted, predicted)
    others = label.clone()
    others[:, 0] = 0  # nor at the pose of the given frame
    assert torch.equal(model.rollout(img[:, 0], others), predicted)
    others[:, 20:] = 0
    changed = model.rollout(img[:, 0], others)
    assert torch.equal(changed[:, :19], predicted[:, :19]) and not torch.equal(changed[:, 19:], predicted[:, 19:])


@pytest.mark.parametrize("flags", [[], ["--rollouts", "3"], ["--z", "zero"]], ids=" ".join)
def test_a_sequence_rolls_out_the_same_alone_and_among_others(flags, sequence):
    img, label = sequence
    model = build(*flags)
    together = model.rollout(img[:, 0], label)
    assert torch.equal(model.rollout(img[:, 0], label), together)
    for i in range(3):
        assert torch.allclose(model.rollout(img[i:i + 1, 0], label[i:i + 1])[0], together[i], atol=1e-5)
    order = [2, 0, 1]
    assert torch.allclose(model.rollout(img[order, 0], label[order]), together[order], atol=1e-5)


def test_a_rollout_is_the_plain_loop_of_the_assignment(sequence):
    img, label = sequence
    model = moved(build("--z", "zero"))
    with torch.no_grad():
        frame, frames = img[:, 0], []
        for t in range(1, 40):
            features = model.frame_transformation(frame), model.label_transformation(label[:, t]), torch.zeros(3, 4, H, W)
            frame = model.Generator(model.Decoder_Fusion(*features)).clamp(0, 1)
            frames.append(frame)
    assert torch.allclose(model.rollout(img[:, 0], label), torch.stack(frames, 1), atol=1e-5)


def test_both_ends_of_the_network_stay_in_float32_in_mixed_precision(window):
    """BatchNorm's recomputed statistics are those of float32, and a frame that is fed back is not rounded."""
    img, label = window
    mixed, whole = moved(build("--precision", "bf16")), moved(build("--precision", "fp32"))
    with torch.no_grad(), mixed.autocast():
        stems = [nn.Sequential(*list(model.label_transformation)[:3]) for model in (mixed, whole)]
        assert torch.equal(*(stem(label[:, 0]) for stem in stems))
        assert mixed.label_transformation(label[:, 0]).dtype == torch.bfloat16  # what lies between is not
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
    model.decode = lambda history, pose, z: drawn.append(z.clone()) or torch.zeros(3, 3, H, W)
    model.rollout(img[:, 0], label)
    z = torch.stack(drawn)  # (39, 3, N_dim, H, W)
    assert z.shape == (39, 3, 4, H, W) and len({float(step.sum()) for step in z[:, 0]}) == 39
    assert abs(float(z.mean())) < 0.02 and abs(float(z.std()) - 1) < 0.02


@pytest.mark.parametrize("recipe", ["pool", "template"])
def test_batch_norm_is_back_in_training_mode(recipe, tiny_data, tmp_path):
    words = ["--DR", str(tiny_data), "--save_root", str(tmp_path / "new" / "out"), *TINY, "--recipe", recipe]
    model = Trainer.VAE_Model(Trainer.build_parser().parse_args(words))
    seen = []
    handles = [m.register_forward_hook(lambda m, *_: seen.append(m.training)) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
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
    assert not any(module.training for module in model.modules())  # it leaves the mode that it found


def test_batch_norm_learns_while_training(window):
    model = build()
    before = copy.deepcopy(model.state_dict())
    model.training_one_step(*window, True)
    moved_on = [name for name, value in model.state_dict().items() if "running" in name and not torch.equal(value, before[name])]
    assert len(moved_on) == 2
