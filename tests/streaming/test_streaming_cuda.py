"""Streaming on CUDA: strips are computed there; spilled feature maps are in the host's memory.

Without a GPU, stand-ins for CUDA tensors are used, which have no values (see ``test_gpu``).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import seeded
from helpers.fake_cuda import WithoutDriver, to_fake_cuda
from helpers.slow import first_of
from helpers.versions import needs_driver
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdconv.streaming import least_memory, steps_of

aten = torch.ops.aten
CONFIG = seeded.kl((32, 64), 4, True, layers_per_block=1)
# operations allowed on spilled feature maps, in the host's memory
WAITING = {"zeros", "narrow", "select", "permute", "view", "alias", "detach", "unbind"}
MOVING = {"copy_", "_to_copy"}


class Watch(TorchDispatchMode):
    """Forbids arithmetic on the host's tensors, and counts copies in each direction."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = {"out": 0, "in": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim]
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in given}
        if "cpu" in devices and name not in WAITING | MOVING and func.namespace != "prim":
            raise RuntimeError(f"{func} on {[(x.device.type, x.shape) for x in given]}")
        if name == "copy_" and len(devices) == 2:
            self.moved["out" if args[0].device.type == "cpu" else "in"] += 1
        if name == "_to_copy" and devices != {out.device.type}:
            self.moved["in" if out.device.type == "cuda" else "out"] += 1
        return out


def dry_run(direction: Any, dtype: torch.dtype, *, tight: bool, break_it: bool = False) -> Watch:
    """Stream on stand-ins; with the lowest limit if ``tight``."""
    network: Any = seeded.network(CONFIG)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        to_fake_cuda(network, dtype)
        if break_it:
            norm = network.decoder.conv_norm_out
            norm._parameters["bias"] = torch.nn.Parameter(torch.zeros(32, dtype=dtype))
        x = torch.empty((2, 4, 12, 8) if direction == "decode" else (2, 3, 24, 16), device="cuda")
        x = x.to(dtype)
        steps = steps_of(network, direction, *x.shape[2:])
        limit = least_memory(steps, batch=2, spill=True) if tight else None
        network.enable_streaming(limit, progress=False)
        with WithoutDriver(), Watch() as watch:
            if direction == "decode":
                out = network.decode(x).sample
            else:
                out = network.encode(x).latent_dist.parameters
    assert (out.device.type, out.dtype) == ("cuda", dtype)
    return watch


@needs_driver
@pytest.mark.parametrize("direction", first_of(["decode", "encode"]))
@pytest.mark.parametrize("dtype", first_of([torch.bfloat16, torch.float32]), ids=str)
def test_dry_run(direction: str, dtype: torch.dtype) -> None:
    moved = dry_run(direction, dtype, tight=True).moved
    assert moved["in"] > 10 and moved["out"] > 10, "feature maps go to the host and come back"
    assert dry_run(direction, dtype, tight=False).moved == {"in": 0, "out": 0}, (
        "the control: all fits"
    )


@needs_driver
def test_a_tensor_left_behind_fails_the_dry_run() -> None:
    with pytest.raises(RuntimeError, match=r"cpu"):
        dry_run("decode", torch.float16, tight=False, break_it=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("direction", ["encode", "decode"])
@torch.no_grad()
def test_on_cuda(direction: str) -> None:
    network: Any = seeded.network(seeded.kl((64, 128), 4, True)).cuda()
    exact = copy.deepcopy(network).double()
    x = torch.randn((1, 4, 256, 256) if direction == "decode" else (1, 3, 512, 512), device="cuda")

    def made(network: Any, x: Tensor) -> Tensor:
        if direction == "decode":
            return network.decode(x).sample
        return network.encode(x).latent_dist.parameters

    whole, truth = made(network, x), made(exact, x.double())
    del exact
    network.enable_streaming("160MiB")
    plan = network.streaming.plan(network, direction, x)
    assert plan.spilled > 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    streamed = made(network, x)
    assert torch.cuda.max_memory_allocated() - before <= 1.15 * plan.peak
    allowed = 2 * (whole - truth).abs().max()
    assert (streamed - truth).abs().max() <= allowed
