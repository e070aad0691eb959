"""Muon orthogonalizes the momentum of matrices; all other weights are AdamW's."""

import copy

import pytest
import torch

from scripts.kill_test import differences
from utils import muon
from utils.muon import COEFFICIENTS, WEIGHT_DECAY, Muon, is_matrix, orthogonalize

SHAPES = [(16, 8, 3, 3), (16, 8, 3, 3), (8, 32, 1, 1), (24, 24, 1, 1),
          (8, 3, 3, 3), (3, 16, 1, 1), (16, 1, 3, 3), (16,)]


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in SHAPES]


def give_gradients(parameters, seed=1):
    for parameter, gradient in zip(parameters, weights(seed)):
        parameter.grad = gradient.detach()


def test_only_convolutions_between_features_are_matrices():
    assert [is_matrix(p) for p in weights()] == [True] * 4 + [False] * 4


def matrices():
    generator = torch.Generator().manual_seed(0)
    shapes = (8, 72), (72, 8), (32, 32), (8, 9), (16, 40)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_singular_values_come_close_to_1_and_directions_stay():
    for matrix, result in zip(matrices(), orthogonalize(matrices())):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        rotated = u.mT @ result @ v.mT
        values = rotated.diagonal()
        assert (values[s / s.norm() > 0.003] - 0.95).abs().max() < 0.3
        assert (rotated - torch.diag(values)).abs().max() < 1e-4


def test_it_is_five_newton_schulz_iterations():
    a, b, c = COEFFICIENTS
    for matrix, result in zip(matrices(), orthogonalize(matrices())):
        x = matrix.double() / matrix.double().norm()
        for _ in range(5):
            square = x @ x.mT
            x = a * x + (b * square + c * square @ square) @ x
        assert (result - x).abs().max() < 1e-4


def test_matrices_that_are_padded_come_out_the_same(monkeypatch):
    """As on a GPU, where similar sizes are multiplied together."""
    plain = orthogonalize(matrices())
    monkeypatch.setattr(muon, "alike", lambda wide: [range(len(wide))])
    for matrix, padded in zip(plain, orthogonalize(matrices())):
        assert padded.is_contiguous()
        torch.testing.assert_close(padded, matrix, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weak_directions_keep_their_gradient_under_autocast(dtype):
    """In half precision rounding errors of strong directions drown them: long runs diverged."""
    noise = torch.randn(32, 96, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(noise, full_matrices=False)
    gradient = u * torch.logspace(0, -3, 32) @ v
    changes = []
    for mixed in (False, True):
        parameter = torch.zeros(32, 96, 1, 1, requires_grad=True)
        parameter.grad = gradient[..., None, None].clone()
        with torch.autocast("cpu", dtype, enabled=mixed):
            Muon([parameter], lr=0.1).step()
        changes.append(parameter.detach().flatten(1))
    assert torch.equal(*changes)
    along = (-u.mT @ changes[1] @ v.mT).diagonal()
    # also along the direction whose gradient is a thousandth
    assert along.min() > 0.2 * along.max()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch's own came with 2.9")
def test_2d_weights_move_as_with_pytorchs_muon():
    """Within bfloat16's rounding, in which PyTorch iterates; in three steps, so momentum too."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(4, 24, 40, generator=generator)
    for shape in ((24, 40), (40, 24)):
        theirs = start.reshape(shape).clone().requires_grad_()
        ours = start.reshape(*shape, 1, 1).clone().requires_grad_()
        settings = {"lr": 0.01, "weight_decay": 0.1}
        optimizers = (torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings),
                      Muon([ours], **settings))
        for gradient in gradients:
            for parameter, optimizer in zip((theirs, ours), optimizers):
                parameter.grad = gradient.reshape(parameter.shape)
                optimizer.step()
        moved = theirs.detach() - start.reshape(shape)
        assert moved.norm() > 0.1
        assert (ours.detach()[..., 0, 0] - theirs.detach()).norm() < 0.02 * moved.norm()


def test_a_step_is_as_large_as_one_of_adam_in_all_directions():
    parameters = weights()
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.0)
    before = [p.detach().clone() for p in parameters]
    give_gradients(parameters)
    optimizer.step()
    for parameter, old in list(zip(parameters, before))[:4]:
        change = (old - parameter.detach()).flatten(1)
        aligned = (change * parameter.grad.flatten(1)).sum()
        assert aligned > 0.5 * change.norm() * parameter.grad.norm()  # downhill
        size = 0.1 * 0.2 * max(change.shape) ** 0.5
        assert torch.linalg.svdvals(change).max() == pytest.approx(size, rel=0.3)


def test_other_weights_are_adamws():
    ours, theirs = weights(), weights()
    muon = Muon(ours, lr=0.01, fused=True)
    adamw = torch.optim.AdamW(theirs, lr=0.01, weight_decay=WEIGHT_DECAY, fused=True)
    for seed in (1, 2, 3):
        for parameters, optimizer in ((ours, muon), (theirs, adamw)):
            give_gradients(parameters, seed)
            optimizer.step()
    assert all(torch.equal(a, b) != is_matrix(a) for a, b in zip(ours, theirs))
    assert all(p.grad is not None for p in ours)


def test_a_step_that_found_infinity_changes_nothing():
    """As on a GPU, where the host does not wait to know."""
    parameters = weights()
    optimizer = Muon(parameters, lr=0.01, fused=True)
    give_gradients(parameters)
    optimizer.step()

    def everything():
        return [p.detach() for p in parameters], optimizer.state_dict()["state"]

    before = copy.deepcopy(everything())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
    optimizer.step()
    assert differences(before, everything()) == []
    optimizer.found_inf = torch.zeros(())
    give_gradients(parameters, 2)
    optimizer.step()
    assert all((a != b.detach()).any() for a, b in zip(before[0], parameters))


def test_an_optimizer_resumes_from_its_state():
    whole, first = weights(), weights()
    optimizers = Muon(whole, lr=0.01), Muon(first, lr=0.01)
    for parameters, optimizer in zip((whole, first), optimizers):
        give_gradients(parameters)
        optimizer.step()
    second = [p.detach().clone().requires_grad_() for p in first]
    again = Muon(second, lr=0.5)
    again.load_state_dict(optimizers[1].state_dict())
    for parameters, optimizer in ((whole, optimizers[0]), (second, again)):
        give_gradients(parameters, 2)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, second))


def test_weights_shrink_by_the_weight_decay():
    (parameter,) = [torch.ones(8, 8, 1, 1, requires_grad=True)]
    optimizer = Muon([parameter], lr=0.1, weight_decay=0.5)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(parameter.detach(), torch.full_like(parameter, 0.95))
