"""How the fast backend computes each 3x3 convolution of a network, and why: found from the config
alone, without weights and without computing anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sdconv.analysis.anatomy import LARGEST_SIDE
from sdconv.backends import backend
from sdconv.config import Config
from sdconv.devices import on_meta
from sdconv.errors import InputError
from sdconv.fast import blocks as fast
from sdconv.fast.cpu import amx
from sdconv.fast.cpu.conv import PRODUCTS
from sdconv.fast.cpu.cost_constants import (
    CostConstants,
    calibration_in_force,
    constants_in_force,
)
from sdconv.fast.cpu.cost_model import packed_bytes, plan_conv
from sdconv.fast.cpu.kernels import methods_for
from sdconv.fast.cpu.processor import direct_rate
from sdconv.fast.cpu.weight_cache import weight_cache
from sdconv.fast.cpu.winograd import Kind
from sdconv.fast.preconditions import DTYPES, has_plain_methods, reads_image
from sdconv.loading import build
from sdconv.models.base import Autoencoder, Network
from sdconv.models.blocks import AsymmetricDownsample2D, ResnetBlock2D, Upsample2D
from sdconv.models.dummy_inputs import Inputs, Noise, inputs_for
from sdconv.models.meta_copy import meta_copy

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Explained:
    """One convolution, with the upsampling or the padding that belongs to it.

    ``work``: "encode", "decode" or "forward". ``kind``: "conv3x3", "upsample_conv" or
    "downsample_conv". ``size``: rows and columns of the input. ``method``: one of
    `ConvPlan`'s, "image_conv" for an encoder's first, or "torch" for what the fast backend leaves
    to the layer itself. ``costs``: the modelled time of each method, in multiplications of a matrix
    product; empty for those two. ``reason``: why this method, in words.
    """

    name: str
    work: str
    kind: Kind
    channels: int
    out_channels: int
    size: tuple[int, int]
    method: str
    costs: dict[str, float]
    reason: str


@dataclass(frozen=True)
class Explanation:
    """``dtype``: that of weights and feature maps, by torch's name. ``layers``: in the order in
    which they run. ``memory``: bytes of their packed weights; ``limit``: the most that these may
    take. ``constants``: the cost model's; ``calibrated``: the day on which they were fitted on this
    machine, None for those that ship."""

    class_name: str
    size: tuple[int, int]
    dtype: str
    layers: tuple[Explained, ...]
    memory: int
    limit: int
    constants: CostConstants
    calibrated: str | None


@dataclass(frozen=True)
class _Call:
    name: str
    work: str
    input: Shape
    output: Shape


def method_inputs(network: Network, size: tuple[int, int], noise: Noise) -> Inputs:
    """The methods to call on a network, each with its inputs; an autoencoder without an encoder has
    no "encode".

    Args:
        size: rows and columns of an image for an autoencoder, of latents for a U-Net.

    Raises:
        InputError: the network does not take this size.
    """
    least = network.downscale if isinstance(network, Autoencoder) else 1
    if min(size) < least or max(size) > LARGEST_SIDE:
        raise InputError(
            "invalid size for this network",
            where="size",
            expected=f"{least} to {LARGEST_SIDE} rows and columns",
            got=f"{size[0]}x{size[1]}",
        )
    every = inputs_for(network, size, noise)
    halves = {"encode": "encoder", "decode": "decoder"}
    return {
        work: inputs
        for work, inputs in every.items()
        if work not in halves or getattr(network, halves[work]) is not None
    }


def explain(
    config: Config,
    size: tuple[int, int],
    *,
    limit: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Explanation:
    """How the fast backend computes a network on this machine's CPU, for one image or one sample.

    Args:
        config: as ``sdconv.infer`` finds it from shapes.
        size: rows and columns of an image for an autoencoder, of latents for a U-Net.
        limit: bytes that packed weights may take; None for the limit in force.
        dtype: of weights and feature maps: float32, float16 or bfloat16.

    Raises:
        InputError: the network does not take this size, or the fast backend not this dtype.
    """
    if dtype not in DTYPES:
        raise InputError(
            "the fast backend does not compute in this dtype",
            where="dtype",
            expected=" or ".join(map(dtype_name, DTYPES)),
            got=dtype_name(dtype),
            hint="use one of these",
        )
    with on_meta():
        dry = build(config).to(dtype).eval()
    # weights of one repeated value have the shapes, dtype and device of loaded ones
    network = meta_copy(dry)
    values = {name: _like(w.shape, w.dtype) for name, w in dry.state_dict().items()}
    network.load_state_dict(values, assign=True)
    limit = weight_cache.limit if limit is None else limit
    layers, memory = [], 0
    with backend("fast"):
        for call in _calls(dry, method_inputs(dry, size, _Shapes(1, 0, dry.dtype, dry.device))):
            layer = _explained(network, call, limit - memory)
            if layer is not None:
                layers.append(layer)
                sizes = packed_bytes(layer.kind, layer.channels, layer.out_channels)
                memory += sizes.get(layer.method, 0)
                shortcut = _shortcut_bytes(network, layer)
                memory += shortcut if memory + shortcut <= limit else 0
    calibration = calibration_in_force()
    return Explanation(
        class_name=config.class_name,
        size=size,
        dtype=dtype_name(dtype),
        layers=tuple(layers),
        memory=memory,
        limit=limit,
        constants=constants_in_force(),
        calibrated=None if calibration is None else calibration.day,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name without the module: ``float32``."""
    return str(dtype).removeprefix("torch.")


class _Shapes(Noise):
    """Draws no values: tensors on the meta device."""

    def normal(self, *shape: int) -> Tensor:
        return torch.empty(1, *shape, dtype=self._dtype, device="meta")

    def below(self, end: int, *shape: int) -> Tensor:
        return torch.empty(1, *shape, dtype=torch.int64, device="meta")


def _calls(dry: nn.Module, inputs: Inputs) -> Iterator[_Call]:
    """The calls of convolutions and of the blocks that resample, in order."""
    for work, given in inputs.items():
        found: list[_Call] = []
        handles = [
            _record(name, module, work, found)
            for name, module in dry.named_modules()
            if isinstance(module, nn.Conv2d | Upsample2D | AsymmetricDownsample2D)
        ]
        with torch.no_grad():
            getattr(dry, work)(*given)
        for handle in handles:
            handle.remove()
        yield from found


def _record(name: str, module: nn.Module, work: str, found: list[_Call]) -> RemovableHandle:
    return module.register_forward_hook(
        lambda _, args, y: found.append(_Call(name, work, tuple(args[0].shape), tuple(y.shape)))
    )


def _explained(network: nn.Module, call: _Call, room: int) -> Explained | None:
    """How a call is computed if ``room`` bytes are left for packed weights; None for convolutions
    of other kernels and strides, and for one that is explained with the block it belongs to."""
    module = network.get_submodule(call.name)
    parent = network.get_submodule(call.name.rpartition(".")[0])
    kind = _kind(module, parent)
    if kind is None:
        return None
    conv = module if isinstance(module, nn.Conv2d) else module.conv
    assert isinstance(conv, nn.Conv2d)
    batch, _, height, width = call.input
    channels, out_channels = conv.in_channels, conv.out_channels
    declined = _declined(module, parent, call)
    costs: dict[str, float] = {}
    if declined == _NOT_NORMALISED and _is_image_conv(network, conv):
        method, reason = "image_conv", "so few channels are summed directly"
    elif declined is not None:
        method, reason = "torch", declined
    else:
        sizes = packed_bytes(kind, channels, out_channels)
        methods = methods_for(conv.weight.dtype)
        available = tuple(method for method in methods if sizes.get(method, 0) <= room)
        # the fast backend takes a 3x3 convolution together with the normalisation before it
        normalised = kind == "conv3x3"
        shape = batch, channels, out_channels, height, width
        rate = direct_rate(conv.weight.dtype)
        plan = plan_conv(kind, *shape, normalised, available, rate)
        method, costs, reason = plan.method, dict(plan.costs), plan.reason
    return Explained(
        name=call.name,
        work=call.work,
        kind=kind,
        channels=channels,
        out_channels=out_channels,
        size=(height, width),
        method=method,
        costs=costs,
        reason=reason,
    )


def _kind(module: nn.Module, parent: nn.Module) -> Kind | None:
    if isinstance(module, Upsample2D):
        return "upsample_conv"
    if isinstance(module, AsymmetricDownsample2D):
        return "downsample_conv"
    assert isinstance(module, nn.Conv2d)
    plain = (module.kernel_size, module.stride) == ((3, 3), (1, 1))
    return "conv3x3" if plain and not isinstance(parent, Upsample2D) else None


def _declined(module: Any, parent: Any, call: _Call) -> str | None:
    """Why the fast backend leaves a call to the layer itself, None if it does not."""
    conv = module if isinstance(module, nn.Conv2d) else module.conv
    x = _like(call.input, conv.weight.dtype)
    pads_zeros = conv.padding_mode == "zeros" and not getattr(module, "seamless_axes", "")
    if not (pads_zeros and has_plain_methods(conv, nn.Conv2d)):
        return "another padding than zeros, or a forward of its own"
    if isinstance(module, Upsample2D):
        if fast.can_run_upsample(module, x, (call.output[2], call.output[3])):
            return None
        return "the output is not twice as large as the input"
    if isinstance(module, AsymmetricDownsample2D):
        return None if fast.can_run_downsample(module, x) else "an input of a single row or column"
    if isinstance(parent, ResnetBlock2D):
        block_input = (call.input[0], parent.conv1.in_channels, *call.input[2:])
        fused = fast.can_run_resnet(parent, _like(block_input, x.dtype))
    else:
        last = hasattr(parent, "conv_norm_out") and module is parent.conv_out
        fused = last and fast.can_run_output(parent.conv_norm_out, parent.conv_act, module, x)
    return None if fused else _NOT_NORMALISED


_NOT_NORMALISED = "no GroupNorm and SiLU before it"


def _is_image_conv(network: nn.Module, conv: nn.Conv2d) -> bool:
    """Whether an autoencoder's convolution is of an image, and there are kernels for it."""
    kernels = find_spec("numba") is not None
    return kernels and isinstance(network, Autoencoder) and reads_image(conv)


def _shortcut_bytes(network: nn.Module, layer: Explained) -> int:
    """Bytes of a block's packed shortcut, which its second convolution adds."""
    block, _, part = layer.name.rpartition(".")
    parent: Any = network.get_submodule(block)
    if part != "conv2" or parent.conv_shortcut is None:
        return 0
    if layer.method == "amx":
        out_channels, channels = parent.conv_shortcut.weight.shape[:2]
        return amx.packed_bytes("conv3x3", channels, out_channels) // 9
    return 4 * int(parent.conv_shortcut.weight.numel()) if layer.method in PRODUCTS else 0


def _like(shape: Shape, dtype: torch.dtype) -> Tensor:
    """A tensor of that shape in the memory of one value."""
    return torch.empty((), dtype=dtype).expand(shape)
