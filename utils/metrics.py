"""The score of a frame. It needs no PyTorch, so that a script can score a submission without."""

import math

import numpy as np

LEAST_MSE = 1e-10  # 100 dB: an exact frame would be infinite, and so would every mean that it is in


def psnr(mse):
    """Return the PSNR in dB of mean squared errors of frames in [0, 1]: a float, an array or a tensor.

    Everything that averages, compares, plots or reports a PSNR takes it from here. NaN stays NaN.
    """
    if hasattr(mse, "clamp"):  # a tensor; half precision cannot hold LEAST_MSE
        mse = mse.float() if mse.element_size() < 4 else mse
        return -10 * mse.clamp(min=LEAST_MSE).log10()
    if isinstance(mse, np.ndarray):
        return -10 * np.log10(np.maximum(mse, LEAST_MSE))
    return -10 * math.log10(max(mse, LEAST_MSE))
