"""Statistics for averaged weights."""

import torch
import torch.nn as nn
from torch.optim.swa_utils import update_bn

from utils.hardware import channels_last


@torch.no_grad()
def recalibrate_batchnorm(model, poses):
    """Compute BatchNorm's statistics over poses, uint8 (N, 3, H, W) (Wu & Johnson 2021)."""
    blocks = max(1, len(poses) // 128)
    stem = nn.Sequential(*list(model.label_transformation)[:3])
    # a block is every blocks-th pose, so that means are alike and variances may be averaged
    parts = (poses[i::blocks].float().div(255).to(model.device) for i in range(blocks))
    update_bn(map(channels_last, parts), stem)
