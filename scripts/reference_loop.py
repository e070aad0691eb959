"""Define the lab's training step and rollout in their plainest form, one label and frame at a time.

docs/RECIPE.md shows the core of `reference_loss` as Algorithm 1. `VAE_Model` computes the same
faster; tests/test_step.py and tests/test_gpu.py compare it with this file, and
scripts/benchmark.py times the two side by side.

A `model` is anything that has the lab's five networks under the template's names.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


def reference_loss(model, img, label, teacher_forced, beta=1.0, kl_weight=1.0,
                   objective=F.mse_loss):
    """Return (loss, reconstruction, kl, generated) of a batch of windows.

    img, label: frames x_t and poses of the windows, (B, T, 3, H, W) in [0, 1]; x_0 is given.
    teacher_forced: bool or bool (T,), whether frame t is predicted from the true frame t - 1.
    loss = 1 / (T - 1) * sum over t >= 1 of objective(generated_t, x_t) + beta * kl_weight * KL_t
    """
    batch, length = img.shape[:2]
    teacher_forced = torch.as_tensor(teacher_forced).expand(length)
    reconstruction = kl = 0.0
    generated = img[:, 0]
    for t in range(1, length):
        # the previous frame: the true one under teacher forcing, else the one just generated
        previous = img[:, t - 1] if teacher_forced[t] else generated
        feature = model.frame_transformation(previous)
        pose = model.label_transformation(label[:, t])

        # posterior q(z | x_t, pose_t) = N(mu, exp(logvar)); z = mu + exp(logvar / 2) * eps
        target = model.frame_transformation(img[:, t])
        z, mu, logvar = model.Gaussian_Predictor(target, pose)

        # decoder p(x_t | previous, pose_t, z)
        generated = model.Generator(model.Decoder_Fusion(feature, pose, z))

        reconstruction = reconstruction + objective(generated, img[:, t])
        # KL(q || N(0, I)) = -1/2 sum(1 + logvar - mu^2 - exp(logvar)), averaged over the batch
        kl = kl - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / batch
    reconstruction, kl = reconstruction / (length - 1), kl / (length - 1)
    return reconstruction + beta * kl_weight * kl, reconstruction, kl, generated


def log_mse(generated, img):
    """Return 1e-3 log(1 + MSE / 1e-5) of each image of (B, 3, H, W), averaged over the batch."""
    mse = (generated - img).square().mean((1, 2, 3))
    return (1e-3 * torch.log(1 + mse / 1e-5)).mean()


def reference_step(model, optimizer, img, label, teacher_forced, **loss_settings):
    """Take a training step with the gradient's norm clipped at 1; return the loss."""
    loss = reference_loss(model, img, label, teacher_forced, **loss_settings)[0]
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def reference_rollout(model, first, label, N_dim, draw=torch.randn):
    """Return the frames (S, T - 1, 3, H, W) that follow `first` (S, 3, H, W).

    label: (S, T, 3, H, W), the pose of `first` included. z comes from the prior N(0, I) at every
    step; draw=torch.zeros takes its mean.
    """
    previous, frames = first, []
    for t in range(1, label.shape[1]):
        feature = model.frame_transformation(previous)
        pose = model.label_transformation(label[:, t])
        z = draw(len(first), N_dim, *first.shape[-2:], device=first.device)
        previous = model.Generator(model.Decoder_Fusion(feature, pose, z)).clamp(0, 1)
        frames.append(previous)
    return torch.stack(frames, 1)
