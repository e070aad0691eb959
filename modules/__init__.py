"""The five frozen networks of the lab. Nothing in this package may change: checkpoints depend on it."""

from .modules import Decoder_Fusion, Gaussian_Predictor, Generator, Label_Encoder, RGB_Encoder

__all__ = ["Generator", "RGB_Encoder", "Gaussian_Predictor", "Decoder_Fusion", "Label_Encoder"]
