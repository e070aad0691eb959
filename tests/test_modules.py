"""The frozen network: keys, shapes, order and outputs equal the figures in modules.json."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import modules

REFERENCE = json.loads((Path(__file__).parent / "modules.json").read_text())
BUILD = {
    "RGB_Encoder": lambda: modules.RGB_Encoder(3, 128),
    "Label_Encoder": lambda: modules.Label_Encoder(3, 32),
    "Gaussian_Predictor": lambda: modules.Gaussian_Predictor(128 + 32, 12),
    "Decoder_Fusion": lambda: modules.Decoder_Fusion(128 + 32 + 12, 192),
    "Generator": lambda: modules.Generator(192, 3),
}


def fraction(step, count, phase):
    return np.modf(step * np.arange(count, dtype=np.float64) + phase)[0]


def fill(module):
    """The reference's deterministic weights, by its own formula."""
    for i, (name, tensor) in enumerate(module.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            tensor.zero_()
        elif name.endswith("running_var"):
            tensor.fill_(1)
        else:
            fan_in = tensor[0].numel() if tensor.dim() >= 2 else 1
            values = fraction(0.6180339887, tensor.numel(), 0.3819660113 * (i + 1))
            values = (values - 0.5) * 2 / np.sqrt(fan_in)
            tensor.copy_(torch.from_numpy(values).view(tensor.shape))


def reference_input(shape, phase, minus):
    values = fraction(0.7548776662, int(np.prod(shape)), phase).astype(np.float32)
    return torch.from_numpy(values).view(shape) - minus


@pytest.mark.parametrize("name", BUILD)
def test_keys_shapes_and_order(name):
    state = BUILD[name]().state_dict()
    assert [(key, list(value.shape)) for key, value in state.items()] == list(
        REFERENCE["modules"][name]["state_dict"].items()
    )


def test_number_of_parameters():
    counts = {name: sum(p.numel() for p in build().parameters()) for name, build in BUILD.items()}
    assert counts == {name: entry["parameters"] for name, entry in REFERENCE["modules"].items()}
    assert sum(counts.values()) == REFERENCE["total_parameters"]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", BUILD)
def test_outputs(name, mode):
    module = BUILD[name]()
    fill(module)
    module.train(mode == "train")
    inputs = [reference_input(*given) for given in REFERENCE["modules"][name]["inputs"]]
    with torch.no_grad():
        outputs = module(*inputs)
    # the predictor gives (z, mu, logvar); z is random and has no reference
    outputs = outputs[1:] if isinstance(outputs, tuple) else [outputs]
    expected = REFERENCE["modules"][name][mode]
    assert len(outputs) == len(expected)
    for output, figures in zip(outputs, expected):
        assert list(output.shape) == figures["shape"]
        scale = figures["abs_max"]
        flat = output.double().flatten()
        assert flat.abs().max().item() == pytest.approx(scale, rel=1e-5)
        assert flat.mean().item() == pytest.approx(figures["mean"], rel=1e-5, abs=1e-5 * scale)
        assert flat.std().item() == pytest.approx(figures["std"], rel=1e-5)
        for index, value in figures["at"].items():
            assert flat[int(index)].item() == pytest.approx(value, rel=1e-5, abs=1e-5 * scale)


def test_reparameterization_is_mu_plus_sigma_times_noise():
    predictor = modules.Gaussian_Predictor(8, 4)
    mu, logvar = torch.full((1, 4, 64, 64), 3.0), torch.full((1, 4, 64, 64), 2 * np.log(0.5))
    torch.manual_seed(0)
    z = predictor.reparameterize(mu, logvar)
    assert z.mean().item() == pytest.approx(3.0, abs=0.02)
    assert z.std().item() == pytest.approx(0.5, abs=0.02)
