"""Orthogonalize the momentum of each convolution: the Muon optimizer (Jordan et al. 2024, "Muon").

PyTorch's torch.optim.Muon (2.9 and newer) takes 2-D weights only, iterates in bfloat16 and ignores
`found_inf`. This optimizer takes convolutions, iterates in float32 (in bfloat16 training diverges:
docs/EXPERIMENTS.md), and skips a step on a GPU without a wait for the GPU. On 2-D weights both
agree within rounding (tests/test_muon.py).
"""

from collections import defaultdict
from contextlib import contextmanager

import torch

MOMENTUM = 0.95
WEIGHT_DECAY = 0.1  # Liu et al.; AdamW's 0.01 overfits in an hour: docs/EXPERIMENTS.md
# a x + b x^3 + c x^5 (Jordan et al.): five iterations take singular values >= 0.002 to 0.7..1.2
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), (3, 2)
PADDED_ROWS = 24, 48, 96, 192  # sizes to which a GPU's matrices are padded


def is_matrix(parameter):
    """Return whether Muon orthogonalizes this weight, (C_out, C_in, k, k).

    True for convolutions with four channels or more on both sides. Depthwise convolutions and those
    that read or write images have fewer.
    """
    return parameter.dim() == 4 and min(parameter.shape[:2]) > 3


@contextmanager
def whole_float32(device):
    """Compute matrix products in full float32 inside: without autocast, and without TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def orthogonalize(matrices):
    """Return float32 matrices (rows, columns) with singular values brought close to 1.

    Each of five Newton-Schulz iterations multiplies x by a + b A + c A^2, with the Gram matrix
    A = x x^T (of x^T where x is tall). So the Gram matrices alone are iterated, and x is multiplied
    by the product of their polynomials: after three iterations and after all five. With a single
    product, rounding errors in A would swamp the weak directions of x. In bfloat16 they do: weights
    of the posterior grow along directions whose gradient is lost, until the KL term explodes.
    """
    norms = torch._foreach_norm(matrices)
    torch._foreach_add_(norms, 1e-7)
    tall = [x.shape[0] > x.shape[1] for x in matrices]
    scaled = torch._foreach_div(matrices, norms)
    wide = [x.mT if is_tall else x for x, is_tall in zip(scaled, tall)]
    results = [None] * len(wide)
    for members in alike(wide):
        x = stacked([wide[i] for i in members])
        for iterations in ITERATIONS:
            x = iterate(x @ x.mT, iterations) @ x
        for i, result in zip(members, x):
            rows, columns = wide[i].shape
            results[i] = result[:rows, :columns]
    return [(x.mT if is_tall else x).contiguous() for x, is_tall in zip(results, tall)]


def alike(matrices):
    """Return lists of the indices of matrices that are multiplied together.

    On a GPU calls take longer than what they compute, so matrices of similar sizes are padded; on a
    CPU only those of one shape go together.
    """
    groups = defaultdict(list)
    for i, x in enumerate(matrices):
        padded = next((size for size in PADDED_ROWS if len(x) <= size), len(x))
        groups[padded if x.is_cuda else x.shape].append(i)
    return groups.values()


def stacked(matrices):
    """Return matrices as one tensor (N, rows, columns), with zeros where one is smaller."""
    rows, columns = (max(x.shape[dim] for x in matrices) for dim in (0, 1))
    result = matrices[0].new_zeros(len(matrices), rows, columns)
    for row, x in zip(result, matrices):
        row[:x.shape[0], :x.shape[1]] = x  # zero rows and columns stay zero
    return result


def iterate(grams, iterations):
    """Return the products by which Newton-Schulz iterations multiply matrices, (N, size, size).

    grams: the Gram matrices of N matrices, (N, size, size).
    """
    a, b, c = COEFFICIENTS
    product = None
    for left in reversed(range(iterations)):
        factor = torch.baddbmm(grams, grams, grams, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if left:
            grams = factor @ grams @ factor
    return product


class Muon(torch.optim.AdamW):
    """Optimize the weights that `is_matrix` accepts with Muon, and all others with AdamW.

    A step follows the orthogonalized momentum of a weight, a matrix (C_out, k * k * C_in), so that
    all directions of the weight learn at one pace. Multiplied by 0.2 sqrt(max(rows, columns)), a
    step is as large as Adam's, so learning rate and weight decay are AdamW's (Liu et al. 2025,
    "Muon is Scalable for LLM Training", section 2.2). A step changes nothing where `found_inf` is
    1, as in PyTorch's fused optimizers (fused=True), so that the host does not wait for a GPU.
    """

    def __init__(self, params, lr=1e-3, weight_decay=WEIGHT_DECAY, **settings):
        super().__init__(params, lr=lr, weight_decay=weight_decay, **settings)

    @torch.no_grad()
    def step(self):
        """Take one step; parameters without a gradient stay as they are."""
        gradients = {}
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None and is_matrix(p)]
            if matrices:
                self.step_matrices(matrices, group["lr"], group["weight_decay"])
            gradients.update((p, p.grad) for p in matrices)
        for parameter in gradients:
            parameter.grad = None  # AdamW leaves out parameters without a gradient
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    def step_matrices(self, parameters, lr, weight_decay):
        """Take Muon's step for a list of weights at once: a call for each takes long on a GPU."""
        found_inf = getattr(self, "found_inf", None)
        taken = 1.0 if found_inf is None else 1 - found_inf
        states = [self.state[p] for p in parameters]
        for parameter, state in zip(parameters, states):
            if not state:
                step = torch.zeros((), device=parameter.device)
                state.update(step=step, exp_avg=torch.zeros_like(parameter))
        # a list of values: foreach would read a single tensor back from the GPU
        torch._foreach_add_([state["step"] for state in states], [taken] * len(states))
        momenta = [state["exp_avg"] for state in states]
        gradients = [p.grad for p in parameters]
        if found_inf is not None:  # with the momentum as gradient, a skipped step keeps it
            skipped = found_inf > 0
            gradients = [torch.where(skipped, m, g) for m, g in zip(momenta, gradients)]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's

        # columns in the order that channels-last weights have in memory
        with whole_float32(ahead[0].device):
            updates = orthogonalize([x.permute(0, 2, 3, 1).flatten(1) for x in ahead])
        torch._foreach_mul_(updates, [0.2 * max(x.shape) ** 0.5 for x in updates])
        torch._foreach_mul_(updates, lr * taken)
        torch._foreach_mul_(parameters, 1 - lr * weight_decay * taken)
        updates = [x.unflatten(1, (*p.shape[2:], -1)) for x, p in zip(updates, parameters)]
        torch._foreach_sub_(parameters, [x.permute(0, 3, 1, 2) for x in updates])
