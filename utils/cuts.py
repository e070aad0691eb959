"""Find the cuts of a video, between which frames follow each other."""

import numpy as np
import torch

REACH = 8  # frames to each side that a cut is judged by


def find_clips(imgs):
    """Return the start indices of the clips in uint8 frames (N, 3, H, W), and N.

    Clip i is frames [starts[i], starts[i + 1]). A cut is a frame that differs from the previous
    frame by 0.01 more than three times the usual difference around it (`usual_jump`; both are mean
    absolute differences). A flash is no cut (`comes_back`). A clip has at least two frames, so that
    there is always a frame to predict.
    """
    count = len(imgs)
    jump = np.zeros(count)
    for start in range(1, count, 1024):
        jump[start:start + 1024] = mean_difference(imgs[start:start + 1024],
                                                   imgs[start - 1:min(start + 1023, count - 1)])
    moved = np.flatnonzero(jump)  # a held frame is no motion
    starts = [0]
    for i in np.flatnonzero(jump[moved] > 0.01):
        t, limit = int(moved[i]), 0.01 + 3 * usual_jump(jump[moved], i)
        if (jump[t] > limit and t - starts[-1] >= 2 and count - t >= 2
                and not comes_back(imgs, t, limit)):
            starts.append(t)
    return starts + [count]


def usual_jump(jump, i):
    """Return the median of the 16 jumps around jump i, far smaller ones left out.

    A held frame that was compressed once more has a far smaller jump, and so has the frame before
    or after a fade. With them in the median, ordinary motion or a fade would count as a cut.
    """
    first = max(0, min(i - REACH, len(jump) - 1 - 2 * REACH))  # 16 at the ends, too
    around = np.sort(np.delete(jump[first:first + 2 * REACH + 1], i - first))
    return np.median(around[around >= around[-2:][0] / 3]) if len(around) else 0.0


def comes_back(imgs, t, limit):
    """Return whether a frame soon after the jump at t is like one before, as after a flash.

    limit: the mean absolute difference in [0, 1] up to which two frames are alike.
    """
    after, before = imgs[t + 1:t + REACH], imgs[max(0, t - REACH):t - 1]
    return any(len(frames) and mean_difference(frames, imgs[at:at + 1]).min() <= limit
               for frames, at in ((after, t - 1), (before, t)))


def mean_difference(frames, others):
    """Return the mean absolute difference of each pair of uint8 frames, (N,) in [0, 1]."""
    frames, others = (np.asarray(torch.as_tensor(x).cpu(), dtype=np.float32)  # may be on a GPU
                      for x in (frames, others))
    return np.abs(frames - others).mean((1, 2, 3)) / 255
