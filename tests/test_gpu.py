"""Every autoencoder on CUDA: for real where there is one, and everywhere else with stand-ins for
CUDA's tensors, which carry shape, dtype and device but no values."""

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
from helpers.fake_cuda import KINDS, LOW, OnCuda, to_stand_ins
from helpers.taesd_author import author, files
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sdconv
from sdconv.analysis.parity import check

FAMILY = {4: "sd1", 16: "flux1"}


# --- stand-ins


def dry_run(
    network: Any, dtype: torch.dtype, break_it: Callable[[Any], object] = lambda network: None
) -> int:
    """Runs all that an autoencoder does on stand-ins and holds every output against the device and
    the dtype; the number of modules that ran."""
    ran: set[str] = set()

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, given: object, output: Tensor) -> None:
            ran.add(name)
            assert (output.device.type, output.dtype) == ("cuda", dtype), name

        return look

    for name, module in network.named_modules():
        if name:
            module.register_forward_hook(watch(name))
    latent, stride = network.config["latent_channels"], network.downscale
    with FakeTensorMode(), torch.no_grad(), ExitStack() as stack:
        to_stand_ins(network, dtype)
        break_it(network)
        stack.enter_context(OnCuda())
        assert (network.device.type, network.dtype) == ("cuda", dtype)
        x = torch.empty(2, 3, 2 * stride, 3 * stride, device="cuda", dtype=dtype)
        encoded = network.encode(x)[0]
        outputs: list[Tensor] = []
        if isinstance(encoded, Tensor):
            scaled = network.scale_latents(encoded)
            outputs += [encoded, scaled, network.unscale_latents(scaled)]
        else:
            outputs += [encoded.parameters, encoded.mode(), encoded.sample(), encoded.kl()]
            outputs.append(encoded.sample(torch.Generator()))  # the CPU's, as pipelines pass one
        network.enable_slicing()
        decoded = network.decode(outputs[0].narrow(1, 0, latent)).sample
        assert decoded.shape == x.shape
        for output in (*outputs, decoded, network(x).sample):
            assert (output.device.type, output.dtype) == ("cuda", dtype)
    return len(ran)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dry_run(kind: str, dtype: torch.dtype) -> None:
    network = seeded.network(KINDS[kind])
    idle = (nn.ModuleList, nn.BatchNorm2d, sdconv.models.base.Network)
    modules = [module for module in network.modules() if not issubclass(type(module), idle)]
    assert dry_run(network, dtype) == len(modules)


def plant(tensor: Callable[[], Tensor]) -> Callable[[Any], None]:
    """Adds a tensor to what a module in the middle of the decoder gives."""

    def into(network: Any) -> None:
        module = network.decoder.mid_block.resnets[1].conv1
        planted = tensor()
        module.register_forward_hook(lambda module, given, output: output + planted)

    return into


PLANTED = seeded.kl((32, 32), 4, True, layers_per_block=1)


def test_dry_run_sees_a_tensor_on_the_cpu() -> None:
    with pytest.raises(RuntimeError, match=r"(?i)device"):
        dry_run(seeded.network(PLANTED), torch.float16, plant(lambda: torch.zeros(2, 3)))


def test_dry_run_sees_a_promotion_to_float32() -> None:
    with pytest.raises((AssertionError, RuntimeError), match=r"norm2|dtype"):
        dry_run(
            seeded.network(PLANTED), torch.float16, plant(lambda: torch.zeros(2, 3, device="cuda"))
        )


@pytest.mark.parametrize("part", ["conv_in", "conv_norm_out"])
def test_dry_run_sees_a_parameter_left_on_the_cpu(part: str) -> None:
    def leave(network: Any) -> None:
        module = getattr(network.decoder, part)
        weight = torch.ones(module.weight.shape, dtype=torch.float16)
        module.weight = nn.Parameter(weight, requires_grad=False)

    with pytest.raises(RuntimeError, match=r"(?i)device"):
        dry_run(seeded.network(PLANTED), torch.float16, leave)


# --- real devices

devices = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*LOW, torch.float32], ids=str)
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
@pytest.mark.parametrize("dtype", [*LOW, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["taef2", "taesana"])
def test_as_near_to_float64_as_the_authors(
    name: str, dtype: torch.dtype, device: str, tmp_path: Path
) -> None:
    """Where diffusers has no peer: at most twice as far as the author's architecture in the same
    dtype on the same device."""
    halves = author(name)
    network = sdconv.load(files(tmp_path, *halves), dtype=dtype, device=device)
    random = torch.Generator().manual_seed(2)
    image = torch.rand((1, 3, 32, 64), generator=random).to(dtype)
    latents = torch.randn((1, 32, 1, 2), generator=random).to(dtype)
    exact, truth = copy.deepcopy(halves), []
    with torch.no_grad():
        for half, given in zip(exact, (image, latents), strict=True):
            # the same rounded weights and input, without further rounding
            truth.append(half.to(dtype).double()(given.double()))
        ours = (
            network.encode(image.to(device) * 2 - 1)[0],
            (network.decode(latents.to(device))[0] + 1) / 2,
        )
        theirs = [
            half.to(device, dtype)(given.to(device))
            for half, given in zip(halves, (image, latents), strict=True)
        ]
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert (a.device.type, a.dtype) == (device, dtype)
        own, reference = ((x.cpu().double() - c).abs().max() / c.abs().max() for x in (a, b))
        assert own <= 2 * max(reference, torch.finfo(dtype).eps)


@pytest.mark.gpu
def test_a_seed_of_the_cpu_gives_the_same_noise_on_cuda() -> None:
    network = seeded.network(PLANTED)
    x = torch.randn(1, 3, 16, 16)
    drawn = []
    for device in ("cpu", "cuda"):
        with torch.no_grad():
            posterior = network.to(device).encode(x.to(device)).latent_dist
        noise = posterior.sample(torch.Generator().manual_seed(0)) - posterior.mean
        drawn.append((noise / posterior.std).cpu())
    assert torch.allclose(*drawn, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_loading_straight_to_cuda(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    sdconv.save(seeded.network(PLANTED), path)
    network = sdconv.load(path, dtype=dtype, device="cuda")
    for tensor in chain(network.parameters(), network.buffers()):
        assert (tensor.device.type, tensor.dtype) == ("cuda", dtype)
