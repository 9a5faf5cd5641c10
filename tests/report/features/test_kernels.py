"""The learned kernels on the page are the network's weights."""

from __future__ import annotations

import json
from base64 import b64decode
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from helpers import seeded
from PIL import Image
from torch import nn

import sdconv
from sdconv.report.features.drawing import drawing_of
from sdconv.report.features.kernels import Kernels, kernel_blocks, kernels_of

CONFIG = seeded.kl((32, 64), 4, True, layers_per_block=1)


def content(conv: nn.Conv2d) -> Any:
    one = Kernels(name="conv", box="conv", module=conv, facts={})
    ((name, text),) = kernel_blocks([one])
    assert name == "kernels-0"
    return json.loads(text)


def test_every_convolution_has_its_kernel_stride_padding_and_true_stride() -> None:
    network = seeded.network(CONFIG)
    points = sdconv.features(network, 64)
    found = {one.name: one for one in kernels_of(network, points, drawing_of(points))}
    convolutions = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    assert set(found) == set(convolutions)
    facts = found["encoder.down_blocks.0.resnets.0.conv1"].facts
    assert facts == {
        "kernel": "3 \u00d7 3",
        "stride": "1",
        "padding": "1",
        "true stride": "1",
        "channels": "32 \u2192 32",
    }
    down = found["encoder.down_blocks.0.downsamplers.0.conv"]
    assert down.box == "encoder.down_blocks.0.downsamplers.0"
    assert (down.facts["stride"], down.facts["true stride"]) == ("2", "2")
    assert down.facts["padding"] == "1 below, 1 right"
    assert found["encoder.mid_block.resnets.0.conv2"].facts["true stride"] == "2"


def test_the_first_layer_is_shown_in_colours() -> None:
    conv = nn.Conv2d(3, 5, 3)
    found = content(conv)
    weight = conv.weight.detach().numpy()
    pixels = np.frombuffer(b64decode(found["colours"]), np.uint8).reshape(5, 3, 3, 3)
    assert (found["coloursCount"], found["coloursOf"]) == (5, "output")
    top = np.abs(weight).max((1, 2, 3), keepdims=True)
    back = ((pixels.astype(float) - 127.5) / 127.5).transpose(0, 3, 1, 2) * top
    assert np.abs(back - weight).max() < 0.005 * top.max()
    assert content(nn.Conv2d(6, 3, 3))["coloursOf"] == "input"  # the last layer of a decoder
    assert "colours" not in content(nn.Conv2d(4, 5, 3))
    assert "colours" not in content(nn.Conv2d(3, 5, 1))


def test_slices_and_norms() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(20, 30, 3)
    with torch.no_grad():
        conv.weight[7] *= 10
        conv.weight[:, 11] *= 10
    found = content(conv)
    weight = conv.weight.detach().numpy()
    assert len(found["outs"]) == len(found["ins"]) == 12
    assert 7 in found["outs"] and 11 in found["ins"]
    norms = np.sqrt((weight**2).sum((2, 3)))
    assert found["norm"] == pytest.approx(norms.max(), rel=1e-3)
    image = np.asarray(Image.open(BytesIO(b64decode(found["norms"]))).convert("L"))
    assert image.shape == (30, 20)
    assert image.argmax() == norms.argmax()
    slices = np.frombuffer(b64decode(found["slices"]), np.uint8).reshape(12, 12, 3, 3)
    back = (slices.astype(float) - 127.5) / 127.5 * found["slicesTop"]
    expected = weight[np.ix_(found["outs"], found["ins"])]
    assert np.abs(back - expected).max() < 0.005 * found["slicesTop"]
    assert np.allclose(found["profile"], np.abs(weight).mean((0, 1)), rtol=1e-3)


def test_large_layers_are_averaged_and_empty_ones_are_grey() -> None:
    found = content(nn.Conv2d(300, 200, 1))
    assert max(found["normsSize"]) == 128
    zeros = nn.Conv2d(3, 4, 3)
    nn.init.zeros_(zeros.weight)
    pixels = np.frombuffer(b64decode(content(zeros)["colours"]), np.uint8)
    assert set(pixels.tolist()) <= {127, 128}
