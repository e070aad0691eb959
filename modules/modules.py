"""The five networks of the conditional VAE, each an nn.Sequential. Nothing downsamples: features stay at (H, W)."""

import torch
import torch.nn as nn

from .layers import DepthConvBlock, ResidualBlock


class Generator(nn.Sequential):
    """Fused features (B, input_nc, H, W) to a frame (B, 3, H, W), without an output activation.

    output_nc is taken for compatibility: the last layer always has three channels.
    """

    def __init__(self, input_nc, output_nc):
        super().__init__(
            DepthConvBlock(input_nc, input_nc),
            ResidualBlock(input_nc, input_nc // 2),
            DepthConvBlock(input_nc // 2, input_nc // 2),
            ResidualBlock(input_nc // 2, input_nc // 4),
            DepthConvBlock(input_nc // 4, input_nc // 4),
            ResidualBlock(input_nc // 4, input_nc // 8),
            DepthConvBlock(input_nc // 8, input_nc // 8),
            nn.Conv2d(input_nc // 8, 3, 1),
        )


class RGB_Encoder(nn.Sequential):
    """A frame (B, in_chans, H, W) to features (B, out_chans, H, W)."""

    def __init__(self, in_chans, out_chans):
        super().__init__(
            ResidualBlock(in_chans, out_chans // 8),
            DepthConvBlock(out_chans // 8, out_chans // 8),
            ResidualBlock(out_chans // 8, out_chans // 4),
            DepthConvBlock(out_chans // 4, out_chans // 4),
            ResidualBlock(out_chans // 4, out_chans // 2),
            DepthConvBlock(out_chans // 2, out_chans // 2),
            nn.Conv2d(out_chans // 2, out_chans, 3, padding=1),
        )


class Label_Encoder(nn.Sequential):
    """A pose picture (B, in_chans, H, W) to features (B, out_chans, H, W)."""

    def __init__(self, in_chans, out_chans, norm_layer=nn.BatchNorm2d):
        super().__init__(
            nn.ReflectionPad2d(3),
            nn.Conv2d(in_chans, out_chans // 2, 7),
            norm_layer(out_chans // 2),
            nn.LeakyReLU(True),  # True is taken as slope 1, the identity; checkpoints depend on it
            ResidualBlock(out_chans // 2, out_chans),
        )


class Gaussian_Predictor(nn.Sequential):
    """The posterior q(z | frame, pose): a diagonal Gaussian over (B, out_chans, H, W)."""

    def __init__(self, in_chans=48, out_chans=96):
        super().__init__(
            ResidualBlock(in_chans, out_chans // 4),
            DepthConvBlock(out_chans // 4, out_chans // 4),
            ResidualBlock(out_chans // 4, out_chans // 2),
            DepthConvBlock(out_chans // 2, out_chans // 2),
            ResidualBlock(out_chans // 2, out_chans),
            nn.LeakyReLU(True),  # slope 1 again
            nn.Conv2d(out_chans, 2 * out_chans, 1),
        )

    def reparameterize(self, mu, logvar):
        """z = mu + sigma * eps with eps ~ N(0, I) (Kingma & Welling 2014, section 2.4)."""
        return mu + torch.exp(0.5 * logvar) * torch.randn_like(logvar)

    def forward(self, img, label):
        """Frame features and pose features to (z, mu, logvar), each (B, out_chans, H, W)."""
        mu, logvar = super().forward(torch.cat([img, label], dim=1)).chunk(2, dim=1)
        return self.reparameterize(mu, logvar), mu, logvar


class Decoder_Fusion(nn.Sequential):
    """Frame features, pose features and z, in_chans channels together, to (B, out_chans, H, W)."""

    def __init__(self, in_chans=48, out_chans=96):
        super().__init__(
            DepthConvBlock(in_chans, in_chans),
            ResidualBlock(in_chans, in_chans // 4),
            DepthConvBlock(in_chans // 4, in_chans // 2),
            ResidualBlock(in_chans // 2, in_chans // 2),
            DepthConvBlock(in_chans // 2, out_chans // 2),
            nn.Conv2d(out_chans // 2, out_chans, 1),
        )

    def forward(self, img, label, parm):
        """img (B, F_dim, H, W), label (B, L_dim, H, W), parm (B, N_dim, H, W), all at one (H, W)."""
        return super().forward(torch.cat([img, label, parm], dim=1))
