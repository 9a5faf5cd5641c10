"""Every network on the fast backend on stand-ins for CUDA's tensors, which have no values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import seeded, unets
from helpers.fake_cuda import KINDS, LOW, OnCuda, fake_cuda, placed, to_stand_ins
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import sdconv
from sdconv.fast.cuda import blocks as cuda
from sdconv.models.blocks import ResnetBlock2D, Upsample2D


class ByDispatcher(TorchFunctionMode):
    """Stands in for the methods that ask for the tensor's device even where the tensor has no
    values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_:
            return torch.ops.aten.copy_.default(*args)
        if func is Tensor.contiguous:
            return args[0].clone(memory_format=torch.contiguous_format)
        return func(*args, **(kwargs or {}))


class Watched(OnCuda):
    """Counts what ran, and refuses what runs on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran[str(func)] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def dry_run(network: Any, dtype: torch.dtype, run: Callable[[], Tensor]) -> Counter[str]:
    """What ran on stand-ins, every output of a block of which was on CUDA and in this dtype."""
    kinds = (ResnetBlock2D, Upsample2D)
    for name, module in network.named_modules():
        if isinstance(module, kinds):

            def look(module: nn.Module, given: Any, output: Tensor, name: str = name) -> None:
                assert (output.device.type, output.dtype) == ("cuda", dtype), name

            module.register_forward_hook(look)
    with FakeTensorMode(), torch.no_grad():
        to_stand_ins(network, dtype)
        with ByDispatcher(), Watched() as watched, sdconv.backend("fast"):
            out = run()
        assert (out.device.type, out.dtype) == ("cuda", dtype)
    return watched.ran


def norms_and_doublings(network: nn.Module) -> tuple[int, int]:
    modules = [*network.modules()]
    resnets = sum(isinstance(module, ResnetBlock2D) for module in modules)
    last = sum(hasattr(module, "conv_norm_out") for module in modules)
    return 2 * resnets + last, sum(isinstance(module, Upsample2D) for module in modules)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dry_run_of_autoencoders(kind: str, dtype: torch.dtype) -> None:
    network = seeded.network(KINDS[kind])

    def run() -> Tensor:
        stride, channels = network.downscale, network.config["latent_channels"]
        x = torch.empty(2, 3, 2 * stride, 3 * stride, device="cuda", dtype=dtype)
        network.encode(x)
        return network.decode(x.new_empty(2, channels, 2, 3)).sample  # type: ignore[no-any-return]

    norms, doublings = norms_and_doublings(network)
    ran = dry_run(network, dtype, run)
    assert ran["sdconv.group_norm_silu.default"] == norms
    # four phases each
    assert ran["aten.copy_.default"] >= 4 * doublings


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("family", unets.FAMILIES)
def test_dry_run_of_unets(family: str, dtype: torch.dtype) -> None:
    network = unets.blank(unets.smallest(family))

    given = unets.inputs(network.config, size=(8, 16))

    def run() -> Tensor:
        sample, _, *rest = (placed(one, dtype, fake_cuda) for one in given)
        return network(sample, 981, *rest).sample  # type: ignore[no-any-return]

    norms, doublings = norms_and_doublings(network)
    ran = dry_run(network, dtype, run)
    assert ran["sdconv.group_norm_silu.default"] == norms
    assert ran["aten.copy_.default"] >= 4 * doublings
    assert ran["aten.upsample_nearest2d.default"] == 0


def test_dry_run_notices_a_statistic_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_norm_silu", lambda norm, x, added=None: x.float())
    network = seeded.network(KINDS["sd1"])
    with pytest.raises((AssertionError, RuntimeError), match=r"dtype|same|type"):
        dry_run(
            network,
            torch.float16,
            lambda: (
                network.decode(torch.empty(1, 4, 2, 3, device="cuda", dtype=torch.float16)).sample
            ),
        )
