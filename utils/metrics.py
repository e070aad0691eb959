"""Score generated frames. Needs no PyTorch, so that a script scores a submission without it."""

import math

import numpy as np

from utils.cli import UserError, say

LEAST_MSE = 1e-10  # 100 dB: the PSNR of an exact frame would be infinite, and every mean with it


def psnr(mse):
    """Return the PSNR in dB, at most 100, of mean squared errors of frames in [0, 1].

    mse: a float, an array or a tensor, and so is the result. NaN stays NaN. Every PSNR that is
    averaged, compared, plotted or reported comes from this function.
    """
    if hasattr(mse, "clamp"):  # a tensor; half precision cannot hold LEAST_MSE
        mse = mse.float() if mse.element_size() < 4 else mse
        return -10 * mse.clamp(min=LEAST_MSE).log10()
    if isinstance(mse, np.ndarray):
        return -10 * np.log10(np.maximum(mse, LEAST_MSE))
    return -10 * math.log10(max(mse, LEAST_MSE))


def are_logits(frames, given):
    """Return whether generated frames are logits of a network that was trained with a sigmoid.

    frames: (B, 3, H, W), the first generated frames of a rollout before any clamp. given: their
    previous frames, in [0, 1]. Two conditions must hold. More than a hundredth of the values is far
    outside [0, 1] (logits of values under 0.38 and over 0.82). And a sigmoid brings the frames
    closer to the given ones, which hardly differ, by 6 dB than a clamp does.
    """
    far = ((frames < -0.5) | (frames > 1.5)).float().mean()
    after_sigmoid, after_clamp = ((x - given).square().mean()
                                  for x in (frames.sigmoid(), frames.clamp(0, 1)))
    return bool(far > 0.01) and bool(psnr(after_sigmoid) > psnr(after_clamp) + 6)


def check_finite(finite, start, rollouts):
    """Raise UserError for the first frame of a rollout that is not finite.

    finite: bool (t, S * rollouts), of the frames `start` to start + t - 1 of S sequences.
    rollouts: of each sequence (--rollouts).
    """
    if not finite.all():
        t, rollout = (~finite).nonzero()[0].tolist()
        raise UserError(f"rollout of sequence {rollout // rollouts}: frame {start + t} is not "
                        f"finite; expected weights that give finite frames (train longer, or with "
                        f"a smaller --lr)")


def warn_of_logits(model, frames, given):
    """Print once that --output sigmoid is missing, where generated frames (N, 3, H, W) are logits.

    given: their previous frames.
    """
    session = model.session
    if session.total_steps or session.logits_said or model.args.output != "none":
        return  # a network in training may give anything
    if are_logits(frames, given):
        session.logits_said = True
        say("the first generated frames are far outside [0, 1], as those of a network that was "
            "trained with a sigmoid; expected --output sigmoid for it")
