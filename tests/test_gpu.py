"""Every autoencoder on CUDA: on a real device where there is one, everywhere on fake tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded
from helpers.fake_cuda import (
    AUTOENCODERS,
    HALF_DTYPES,
    RefuseCpu,
    assert_on_cuda,
    record_outputs,
    to_fake_cuda,
)
from helpers.numbers import error
from helpers.slow import first_of
from helpers.taesd_author import author, files
from helpers.versions import needs_driver
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sdconv
from sdconv.analysis.parity import check

FAMILY = {4: "sd1", 16: "flux1"}


# --- fake CUDA tensors


def dry_run(
    network: Any, dtype: torch.dtype, inject: Callable[[Any], object] = lambda network: None
) -> int:
    """Runs an autoencoder's methods on fake CUDA tensors, after ``inject`` has put in a fault, and
    checks the device and dtype of every output; returns the number of modules that ran."""
    modules = record_outputs(network)
    latent, scale = network.config["latent_channels"], network.downscale
    with FakeTensorMode(), torch.no_grad(), ExitStack() as stack:
        to_fake_cuda(network, dtype)
        inject(network)
        stack.enter_context(RefuseCpu())
        assert (network.device.type, network.dtype) == ("cuda", dtype)
        x = torch.empty(2, 3, 2 * scale, 3 * scale, device="cuda", dtype=dtype)
        encoded = network.encode(x)[0]
        if isinstance(encoded, Tensor):
            scaled = network.scale_latents(encoded)
            outputs = [encoded, scaled, network.unscale_latents(scaled)]
        else:
            outputs = [encoded.parameters, encoded.mode(), encoded.sample(), encoded.kl()]
            outputs.append(encoded.sample(torch.Generator()))  # on the CPU, as in pipelines
        network.enable_slicing()
        decoded = network.decode(outputs[0].narrow(1, 0, latent)).sample
        assert decoded.shape == x.shape
        outputs += [decoded, network(x).sample]
    assert_on_cuda({**modules, "methods": outputs}, dtype)
    return len(modules)


@needs_driver
@pytest.mark.parametrize("dtype", first_of(HALF_DTYPES), ids=str)
@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_dry_run(kind: str, dtype: torch.dtype) -> None:
    network = seeded.network(AUTOENCODERS[kind])
    never_called = (nn.ModuleList, nn.BatchNorm2d, sdconv.models.base.Network)
    called = [one for one in network.modules() if not issubclass(type(one), never_called)]
    assert dry_run(network, dtype) == len(called)


def add(tensor: Callable[[], Tensor]) -> Callable[[Any], None]:
    """A fault: adds a tensor to the output of a convolution of the decoder's mid block."""

    def inject(network: Any) -> None:
        added = tensor()
        network.decoder.mid_block.resnets[1].conv1.register_forward_hook(
            lambda module, args, output: output + added
        )

    return inject


SMALL = seeded.kl((32, 32), 4, True, layers_per_block=1)


def test_dry_run_notices_a_tensor_on_the_cpu() -> None:
    with pytest.raises(RuntimeError, match=r"(?i)device"):
        dry_run(seeded.network(SMALL), torch.float16, add(lambda: torch.zeros(2, 3)))


@needs_driver
def test_dry_run_notices_a_promotion_to_float32() -> None:
    with pytest.raises((AssertionError, RuntimeError), match=r"dtype|same"):
        dry_run(seeded.network(SMALL), torch.float16, add(lambda: torch.zeros(2, 3, device="cuda")))


@pytest.mark.parametrize("part", ["conv_in", "conv_norm_out"])
def test_dry_run_notices_a_parameter_left_on_the_cpu(part: str) -> None:
    def leave_on_cpu(network: Any) -> None:
        module = getattr(network.decoder, part)
        weight = torch.ones(module.weight.shape, dtype=torch.float16)
        module.weight = nn.Parameter(weight, requires_grad=False)

    with pytest.raises(RuntimeError, match=r"(?i)device"):
        dry_run(seeded.network(SMALL), torch.float16, leave_on_cpu)


# --- real devices

devices = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALF_DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("kind", seeded.WITH_PEER)
def test_parity_with_diffusers(kind: str, dtype: torch.dtype) -> None:
    config = seeded.WITH_PEER[kind]
    family = FAMILY[config["latent_channels"]] if config.class_name == "AutoencoderKL" else None
    report = check(
        seeded.tensors(config), family=family, device="cuda", dtype=dtype, size=(72, 104), batch=2
    )
    assert report.passed, report.worst
    assert report.device == "cuda"


@pytest.mark.parametrize("device", devices)
@pytest.mark.parametrize("dtype", first_of([*HALF_DTYPES, torch.float32]), ids=str)
@pytest.mark.parametrize("name", first_of(["taef2", "taesana"]))
def test_error_is_at_most_twice_that_of_the_authors(
    name: str, dtype: torch.dtype, device: str, tmp_path: Path
) -> None:
    """For networks that diffusers does not have: the error against float64, compared with that of
    the author's architecture in the same dtype on the same device."""
    halves = author(name)
    network = sdconv.load(files(tmp_path, *halves), dtype=dtype, device=device)
    random = torch.Generator().manual_seed(2)
    image = torch.rand((1, 3, 32, 64), generator=random).to(dtype)
    latents = torch.randn((1, 32, 1, 2), generator=random).to(dtype)
    with torch.no_grad():
        # the same rounded weights and inputs, without further rounding
        exact = [
            half.to(dtype).double()(given.double())
            for half, given in zip(copy.deepcopy(halves), (image, latents), strict=True)
        ]
        ours = (
            network.encode(image.to(device) * 2 - 1)[0],
            (network.decode(latents.to(device))[0] + 1) / 2,
        )
        theirs = [
            half.to(device, dtype)(given.to(device))
            for half, given in zip(halves, (image, latents), strict=True)
        ]
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert (a.device.type, a.dtype) == (device, dtype)
        assert error(a.cpu(), c) <= 2 * max(error(b.cpu(), c), torch.finfo(dtype).eps)


@pytest.mark.gpu
def test_a_generator_on_the_cpu_gives_the_same_noise_on_cuda() -> None:
    network = seeded.network(SMALL)
    x = torch.randn(1, 3, 16, 16)
    drawn = []
    for device in ("cpu", "cuda"):
        with torch.no_grad():
            posterior = network.to(device).encode(x.to(device)).latent_dist
        noise = posterior.sample(torch.Generator().manual_seed(0)) - posterior.mean
        drawn.append((noise / posterior.std).cpu())
    assert torch.allclose(*drawn, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
def test_loading_straight_to_cuda(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    sdconv.save(seeded.network(SMALL), path)
    network = sdconv.load(path, dtype=dtype, device="cuda")
    for tensor in chain(network.parameters(), network.buffers()):
        assert (tensor.device.type, tensor.dtype) == ("cuda", dtype)
