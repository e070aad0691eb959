"""The Muon optimizer: momentum whose matrices are made orthogonal before each step (Jordan et al. 2024, "Muon")."""

from collections import defaultdict
from contextlib import contextmanager

import torch

MOMENTUM = 0.95
# the polynomial a x + b x^3 + c x^5 of Jordan et al.: five times over, it takes singular values from 0.002 on to between 0.7 and 1.2
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), (3, 2)


def is_matrix(parameter):
    """Whether Muon turns this weight, (C_out, C_in, k, k): convolutions of four channels and more on both sides, so not depthwise, nor from or to pictures."""
    return parameter.dim() == 4 and min(parameter.shape[:2]) > 3


@contextmanager
def whole_float32(device):
    """Inside, matrix products keep all of float32: no autocast, and no TF32 on CUDA."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def orthogonalize(matrices):
    """A list of float32 matrices (rows, columns), each with its singular values brought close to 1, by five Newton-Schulz iterations.

    An iteration multiplies x by a + b A + c A^2 with A = x x^T, a square matrix as small as x's smaller side. So the squares alone are
    iterated, those of one size together, and x is multiplied with their product. That is done after three iterations and after
    all five: at once, rounding errors in A would swamp the weak directions of x. So do those of products in bf16: the
    posterior's weights walk off along directions whose gradient is lost, until the KL term explodes (docs/RECIPE.md).
    """
    wide = [x if x.shape[0] <= x.shape[1] else x.mT for x in matrices]
    norms = torch._foreach_norm(wide)
    torch._foreach_add_(norms, 1e-7)
    wide = list(torch._foreach_div(wide, norms))
    alike = defaultdict(list)
    for i, x in enumerate(wide):
        alike[len(x)].append(i)
    for iterations in ITERATIONS:
        for members in alike.values():
            products = iterate(torch.stack([wide[i] @ wide[i].mT for i in members]), iterations)
            for i, product in zip(members, products):
                wide[i] = product @ wide[i]
    # contiguous: where one of a list is laid out in another way than the rest, a GPU takes foreach calls one by one
    return [x if matrix.shape == x.shape else x.mT.contiguous() for x, matrix in zip(wide, matrices)]


def iterate(squares, iterations):
    """What so many Newton-Schulz iterations multiply x with, (N, rows, rows). squares: x x^T, (N, rows, rows)."""
    a, b, c = COEFFICIENTS
    product = None
    for left in reversed(range(iterations)):
        factor = torch.baddbmm(squares, squares, squares, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if left:
            squares = factor @ squares @ factor
    return product


class Muon(torch.optim.AdamW):
    """Muon for the weights that `is_matrix` names, AdamW for all others: biases, norms, depthwise layers, few channels.

    A step turns the momentum of a weight, as a matrix (C_out, k * k * C_in), into a nearly orthogonal one, so that all directions
    of the weight learn at one pace. Times 0.2 sqrt(max(rows, columns)) it is as large as a step of Adam's, so rate and weight
    decay are AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2).
    It computes in whole float32, also inside torch.autocast. As in PyTorch's fused optimizers (fused=True), a step changes nothing where
    `found_inf` is set and 1, so that the host need not wait to know.
    """

    @torch.no_grad()
    def step(self):
        """One step from the gradients that are there."""
        gradients = {}
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None and is_matrix(p)]
            if matrices:
                self.turn(matrices, group["lr"], group["weight_decay"])
            gradients.update((p, p.grad) for p in matrices)
        for parameter in gradients:
            parameter.grad = None  # AdamW passes over what has no gradient
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    def turn(self, parameters, lr, weight_decay):
        """Muon's step, for all its weights at once: on a GPU a call for each would take longer than what it computes."""
        found_inf = getattr(self, "found_inf", None)
        taken = 1.0 if found_inf is None else 1 - found_inf
        gradients = [p.grad if found_inf is None else p.grad.nan_to_num(0, 0, 0) for p in parameters]
        states = [self.state[p] for p in parameters]
        for parameter, state in zip(parameters, states):
            if not state:
                state.update(step=torch.zeros((), device=parameter.device), exp_avg=torch.zeros_like(parameter))
        torch._foreach_add_([state["step"] for state in states], [taken] * len(states))  # one tensor for all would be read back from a GPU
        momenta = [state["exp_avg"] for state in states]
        news = torch._foreach_sub(gradients, momenta)
        torch._foreach_mul_(news, (1 - MOMENTUM) * taken)
        torch._foreach_add_(momenta, news)

        ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's
        # columns in the order that channels-last weights have in memory: nothing is copied
        with whole_float32(ahead[0].device):
            updates = orthogonalize([x.permute(0, 2, 3, 1).flatten(1) for x in ahead])
        torch._foreach_mul_(updates, [lr * 0.2 * max(x.shape) ** 0.5 for x in updates])
        torch._foreach_mul_(updates, taken)
        torch._foreach_mul_(parameters, 1 - lr * weight_decay * taken)
        torch._foreach_sub_(parameters, [x.unflatten(1, (*p.shape[2:], -1)).permute(0, 3, 1, 2) for x, p in zip(updates, parameters)])
