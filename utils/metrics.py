"""What generated frames are worth. It needs no PyTorch: a script scores a submission without."""

import math

import numpy as np

from utils.cli import UserError, say

LEAST_MSE = 1e-10  # 100 dB: an exact frame would be infinite, and so would every mean that it is in


def psnr(mse):
    """Return the PSNR in dB of frames' mean squared errors: a float, an array or a tensor.

    The frames are in [0, 1]. Everything that averages, compares, plots or reports a PSNR takes it
    from here. NaN stays NaN.
    """
    if hasattr(mse, "clamp"):  # a tensor; half precision cannot hold LEAST_MSE
        mse = mse.float() if mse.element_size() < 4 else mse
        return -10 * mse.clamp(min=LEAST_MSE).log10()
    if isinstance(mse, np.ndarray):
        return -10 * np.log10(np.maximum(mse, LEAST_MSE))
    return -10 * math.log10(max(mse, LEAST_MSE))


def are_logits(frames, given):
    """Tell whether generated frames want a sigmoid, because the network was trained with one.

    frames: (B, 3, H, W), the first ones of a rollout before any clamp. given: the frames before
    them, in [0, 1]. Both must hold: a hundredth of the values is far outside [0, 1] (logits of
    tones under 0.38 and over 0.82), and a sigmoid comes closer to the given frames, which hardly
    differ, by 6 dB than a clamp does.
    """
    far = ((frames < -0.5) | (frames > 1.5)).float().mean()
    after_sigmoid, after_clamp = ((x - given).square().mean()
                                  for x in (frames.sigmoid(), frames.clamp(0, 1)))
    return bool(far > 0.01) and bool(psnr(after_sigmoid) > psnr(after_clamp) + 6)


def check_finite(finite, start, lanes):
    """Raise UserError for the first frame of a rollout that is not finite.

    finite: bool (t, S * lanes), of the frames `start` to start + t - 1 of S sequences.
    """
    if not finite.all():
        t, lane = (~finite).nonzero()[0].tolist()
        raise UserError(f"rollout of sequence {lane // lanes}: frame {start + t} is not finite; expected "
                        f"weights that give finite frames (train longer, or with a smaller --lr)")


def warn_of_logits(model, frames, given):
    """Name --output sigmoid, once, where the first generated frames (N, 3, H, W) want one."""
    session = model.session
    if session.total_steps or session.logits_said or model.args.output != "none":
        return  # a network in training may give anything
    if are_logits(frames, given):
        session.logits_said = True
        say("the first generated frames are far outside [0, 1], as those of a network that was "
            "trained with a sigmoid; expected --output sigmoid for it")
