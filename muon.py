"""The Muon optimizer: momentum whose matrices are made orthogonal before each step (Jordan et al. 2024, "Muon")."""

from collections import defaultdict

import torch

MOMENTUM = 0.95
# the polynomial a x + b x^3 + c x^5 of Jordan et al.: five times over, it takes singular values from 0.002 on to between 0.7 and 1.2
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def is_matrix(parameter):
    """Whether Muon turns this weight, (C_out, C_in, k, k): convolutions between features, not depthwise, nor from or to pictures."""
    return parameter.dim() == 4 and min(parameter.shape[:2]) > 3


def orthogonalize(matrices):
    """Matrices (N, rows, columns) with their singular values brought close to 1, by Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """Muon for the weights that `is_matrix` names, AdamW for all others: biases, norms, first, last and depthwise layers.

    A step turns the momentum of a weight, as a matrix (C_out, C_in * k * k), into a nearly orthogonal one, so that all directions
    of the weight learn at one pace. Times 0.2 sqrt(max(rows, columns)) it is as large as a step of Adam's, so rate and weight
    decay are AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2).
    Inside torch.autocast the iterations take its precision, which is enough for them. As in PyTorch's fused optimizers (fused=True), a step
    changes nothing where `found_inf` is set and 1, so that the host need not wait to know.
    """

    @torch.no_grad()
    def step(self):
        """One step from the gradients that are there."""
        gradients = {}
        for group in self.param_groups:
            alike = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None and is_matrix(parameter):
                    alike[parameter.shape].append(parameter)
            for parameters in alike.values():
                self.turn(parameters, group["lr"], group["weight_decay"])
                gradients.update((parameter, parameter.grad) for parameter in parameters)
        for parameter in gradients:
            parameter.grad = None  # AdamW passes over what has no gradient
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    def turn(self, parameters, lr, weight_decay):
        """Muon's step for weights of one shape, all at once."""
        found_inf = getattr(self, "found_inf", None)
        taken = torch.ones((), device=parameters[0].device) if found_inf is None else 1 - found_inf
        updates = []
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            if not state:
                state.update(step=torch.zeros((), device=parameter.device), exp_avg=torch.zeros_like(parameter))
            if found_inf is not None:
                gradient = gradient.nan_to_num(0, 0, 0)
            state["step"] += taken
            state["exp_avg"].lerp_(gradient, (1 - MOMENTUM) * taken)
            updates.append(gradient.lerp(state["exp_avg"], MOMENTUM).flatten(1))  # Nesterov's look ahead
        updates = orthogonalize(torch.stack(updates)).float()
        pace = lr * 0.2 * max(updates.shape[1:]) ** 0.5
        for parameter, update in zip(parameters, updates):
            parameter.mul_(1 - lr * weight_decay * taken).sub_(update.reshape(parameter.shape) * (pace * taken))
