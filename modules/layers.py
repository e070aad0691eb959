"""Building blocks of the networks. Every block maps (B, in_ch, H, W) to (B, out_ch, H / stride, W / stride)."""

import torch.nn as nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each followed by the same LeakyReLU, plus the identity (He et al. 2016)."""

    def __init__(self, in_ch, out_ch, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, stride=stride, padding=1)
        self.leaky_relu = nn.LeakyReLU(0.01, inplace=True)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, stride=stride, padding=1)
        self.skip = nn.Conv2d(in_ch, out_ch, 1, stride=stride) if in_ch != out_ch else None

    def forward(self, x):
        out = self.leaky_relu(self.conv1(x))
        out = self.leaky_relu(self.conv2(out))
        return out + (x if self.skip is None else self.skip(x))


class DepthConvBlock(nn.Module):
    """A depthwise-separable convolution, then a gated feed-forward layer."""

    def __init__(self, in_ch, out_ch, depth_kernel=3, stride=1):
        super().__init__()
        self.block = nn.Sequential(DepthConv(in_ch, out_ch, depth_kernel, stride), ConvFFN(out_ch))

    def forward(self, x):
        return self.block(x)


class DepthConv(nn.Module):
    """1x1 convolution with LeakyReLU, depthwise convolution, 1x1 convolution, plus the identity. stride is 1 or 2."""

    def __init__(self, in_ch, out_ch, depth_kernel=3, stride=1, slope=0.01, inplace=False):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(in_ch, in_ch, 1, stride=stride), nn.LeakyReLU(slope, inplace=inplace))
        self.depth_conv = nn.Conv2d(in_ch, in_ch, depth_kernel, padding=depth_kernel // 2, groups=in_ch)
        self.conv2 = nn.Conv2d(in_ch, out_ch, 1)
        self.adaptor = None
        if stride == 2:
            self.adaptor = nn.Conv2d(in_ch, out_ch, 2, stride=2)
        elif stride != 1:
            raise ValueError(f"stride is 1 or 2, not {stride}")
        elif in_ch != out_ch:
            self.adaptor = nn.Conv2d(in_ch, out_ch, 1)

    def forward(self, x):
        out = self.conv2(self.depth_conv(self.conv1(x)))
        return out + (x if self.adaptor is None else self.adaptor(x))


class ConvFFN(nn.Module):
    """A 1x1 convolution to 4 * in_ch, one half gating the other, a 1x1 convolution back, plus the identity."""

    def __init__(self, in_ch, slope=0.1, inplace=False):
        super().__init__()
        self.conv = nn.Conv2d(in_ch, 4 * in_ch, 1)
        self.conv_out = nn.Conv2d(2 * in_ch, in_ch, 1)
        self.relu = nn.LeakyReLU(slope, inplace=inplace)

    def forward(self, x):
        value, gate = self.conv(x).chunk(2, dim=1)
        return x + self.conv_out(value * self.relu(gate))
