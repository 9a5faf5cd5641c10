"""The memory layout of weights, with the CPU in the place of CUDA; and on a GPU where there is
one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import seeded
from helpers.fake_cuda import AUTOENCODERS
from torch import nn

import sdconv
from sdconv.backends import set_backend
from sdconv.fast.cuda import weights


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_DEVICES", ("cpu",))


def layouts(network: nn.Module) -> list[bool]:
    """Of each 3x3 convolution, whether its weight is channels-last."""
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    return [conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convs]


@pytest.mark.usefixtures("as_on_cuda")
def test_converted_once_and_back(tmp_path: Path) -> None:
    vae = seeded.network(AUTOENCODERS["sd1"])
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    objects = [id(one) for one in vae.parameters()]
    assert not any(layouts(vae))
    set_backend(vae, "fast")
    assert all(layouts(vae))
    pointers = [one.data_ptr() for one in vae.parameters()]
    set_backend(vae, "fast")
    assert [one.data_ptr() for one in vae.parameters()] == pointers
    assert [id(one) for one in vae.parameters()] == objects
    assert all(torch.equal(one, before[name]) for name, one in vae.state_dict().items())
    sdconv.save(vae, tmp_path / "vae.safetensors")
    again = sdconv.load(tmp_path / "vae.safetensors", family="sd1")
    assert all(torch.equal(one, before[name]) for name, one in again.state_dict().items())
    set_backend(vae, "reference")
    assert not any(layouts(vae))
    assert all(torch.equal(one, before[name]) for name, one in vae.state_dict().items())


@pytest.mark.usefixtures("as_on_cuda")
def test_left_alone() -> None:
    # the user's own channels-last weight stays so
    own = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    # two parameters that share memory go on sharing it
    memory = torch.randn(2, 4, 4, 3, 3)
    shared = nn.Conv2d(4, 4, 3)
    shared.weight = nn.Parameter(memory[0])
    with torch.inference_mode():
        inference = nn.Conv2d(4, 4, 3)
    network = nn.Sequential(own, shared, inference)
    set_backend(network, "fast")
    assert layouts(network) == [True, False, False]
    assert shared.weight.data_ptr() == memory.data_ptr()
    set_backend(network, "reference")
    assert layouts(network) == [True, False, False]


def test_weights_on_a_cpu_stay() -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 3))
    set_backend(network, "fast")
    assert layouts(network) == [False]


@pytest.mark.gpu
def test_on_cuda() -> None:
    vae = seeded.network(AUTOENCODERS["sd1"]).cuda()
    set_backend(vae, "fast")
    assert all(layouts(vae))
    set_backend(vae, "reference")
    assert not any(layouts(vae))
