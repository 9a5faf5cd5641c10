"""Every network on the fast backend, on fake CUDA tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import seeded, unets
from helpers.fake_cuda import (
    AUTOENCODERS,
    HALF_DTYPES,
    RefuseCpu,
    WithoutDriver,
    assert_on_cuda,
    fake_cuda,
    map_tensors,
    record_outputs,
    to_fake_cuda,
)
from helpers.slow import first_of
from helpers.versions import needs_driver
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sdconv
from sdconv.fast.cuda import blocks as cuda
from sdconv.models.blocks import Attention, ResnetBlock2D, Upsample2D
from sdconv.models.vae import AutoencoderKL


class CountOperators(RefuseCpu):
    """Counts the operators that run, and refuses those on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def dry_run(network: Any, dtype: torch.dtype, run: Callable[[], Tensor]) -> Counter[str]:
    """Counts the operators of a run on fake CUDA tensors, and checks that every block that has a
    fast implementation returns a CUDA tensor of this dtype."""
    # a hook on any other module would make its block decline the fast implementation
    outputs = record_outputs(network, (ResnetBlock2D, Upsample2D))
    with FakeTensorMode(), torch.no_grad():
        to_fake_cuda(network, dtype)
        with WithoutDriver(), CountOperators() as operators, sdconv.backend("fast"):
            out = run()
    assert_on_cuda({**outputs, "forward": [out]}, dtype)
    return operators.counts


def norms_and_epilogues(network: nn.Module) -> tuple[int, int]:
    """How many GroupNorms and how many epilogues of a convolution are one operator each."""
    modules = [*network.modules()]
    resnets, attentions, upsamplers = (
        sum(isinstance(module, kind) for module in modules)
        for kind in (ResnetBlock2D, Attention, Upsample2D)
    )
    # the VAE's halves; a U-Net's first convolution keeps its bias
    halves = sum(hasattr(module, "conv_norm_out") for module in modules)
    first = halves if isinstance(network, AutoencoderKL) else 0
    norms = 2 * resnets + attentions + halves
    return norms, resnets + attentions + upsamplers + first


@needs_driver
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_dry_run_of_autoencoders(kind: str, dtype: torch.dtype) -> None:
    network = seeded.network(AUTOENCODERS[kind])

    def run() -> Tensor:
        scale, channels = network.downscale, network.config["latent_channels"]
        x = torch.empty(2, 3, 2 * scale, 3 * scale, device="cuda", dtype=dtype)
        network.encode(x)
        return network.decode(x.new_empty(2, channels, 2, 3)).sample  # type: ignore[no-any-return]

    norms, epilogues = norms_and_epilogues(network)
    ran = dry_run(network, dtype, run)
    assert ran["sdconv.group_norm_nhwc.default"] == norms
    assert ran["sdconv.epilogue.default"] == epilogues


@needs_driver
@pytest.mark.parametrize("dtype", first_of(HALF_DTYPES), ids=str)
@pytest.mark.parametrize("family", first_of(unets.FAMILIES))
def test_dry_run_of_unets(family: str, dtype: torch.dtype) -> None:
    network = unets.on_meta(unets.smallest(family))

    given = unets.inputs(network.config, size=(8, 16))

    def run() -> Tensor:
        sample, _, *rest = (map_tensors(one, dtype, fake_cuda) for one in given)
        return network(sample, 981, *rest).sample  # type: ignore[no-any-return]

    norms, epilogues = norms_and_epilogues(network)
    ran = dry_run(network, dtype, run)
    assert ran["sdconv.group_norm_nhwc.default"] == norms
    assert ran["sdconv.epilogue.default"] == epilogues
    assert ran["aten.upsample_nearest2d.default"] == 0


@needs_driver
def test_dry_run_notices_an_injected_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_norm", lambda norm, x, *_, **__: x.float())
    network = seeded.network(AUTOENCODERS["sd1"])
    with pytest.raises((AssertionError, RuntimeError), match=r"dtype|same|type"):
        dry_run(
            network,
            torch.float16,
            lambda: (
                network.decode(torch.empty(1, 4, 2, 3, device="cuda", dtype=torch.float16)).sample
            ),
        )
