"""Which arithmetic the fast backend gives each convolution of a network, and why: found without
weights and without computing anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sdconv.analysis.anatomy import LARGEST_SIDE
from sdconv.backends import backend
from sdconv.config import Config
from sdconv.errors import InputError
from sdconv.fast import blocks as fast
from sdconv.fast.cpu.chosen import sizes
from sdconv.fast.cpu.cost_model import choose
from sdconv.fast.cpu.weight_cache import prepared
from sdconv.fast.cpu.winograd import DOUBLED
from sdconv.loading import BUILD
from sdconv.models.base import Autoencoder, Network
from sdconv.models.blocks import ResnetBlock2D, Upsample2D
from sdconv.models.dummy_inputs import Inputs, Noise, inputs_for
from sdconv.models.meta_copy import meta_copy

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Explained:
    """One convolution, or one doubling with its convolution.

    ``work``: "encode", "decode" or "forward". ``size``: rows and columns of what comes in.
    ``method``: "winograd", "packed", "direct", "doubling", or "torch" for what the fast backend
    leaves to the layer itself. ``costs``: of each method, in multiplications of a matrix product;
    empty for "torch". ``reason``: in words.
    """

    name: str
    work: str
    doubling: bool
    channels: int
    out_channels: int
    size: tuple[int, int]
    method: str
    costs: dict[str, float]
    reason: str


@dataclass(frozen=True)
class Explanation:
    """``layers`` in the order they run; ``memory``: bytes that their prepared weights come to;
    ``limit``: what they may."""

    class_name: str
    size: tuple[int, int]
    layers: tuple[Explained, ...]
    memory: int
    limit: int


@dataclass(frozen=True)
class _Call:
    name: str
    work: str
    given: Shape
    gave: Shape


def works(network: Network, size: tuple[int, int], noise: Noise) -> Inputs:
    """What to call on a network, without the half that an autoencoder lacks, and with what.

    Args:
        size: rows and columns of a picture for an autoencoder, of latents for a U-Net.

    Raises:
        InputError: no size for this network.
    """
    least = network.downscale if isinstance(network, Autoencoder) else 1
    if min(size) < least or max(size) > LARGEST_SIDE:
        raise InputError(
            "no size for this network",
            where="size",
            expected=f"{least} to {LARGEST_SIDE} rows and columns",
            got=f"{size[0]}x{size[1]}",
        )
    every = inputs_for(network, size, noise)
    parts = {"encode": "encoder", "decode": "decoder"}
    return {
        work: given
        for work, given in every.items()
        if work not in parts or getattr(network, parts[work]) is not None
    }


def explain(config: Config, size: tuple[int, int], *, limit: int | None = None) -> Explanation:
    """What the fast backend does on a CPU, in float32, with one picture or one sample.

    Args:
        config: as ``sdconv.infer`` reads it from shapes.
        size: rows and columns of a picture for an autoencoder, of latents for a U-Net.
        limit: bytes that prepared weights may take; None for what is in force.

    Raises:
        InputError: no size for this network.
    """
    with torch.device("meta"):
        dry = BUILD[config.class_name](config).eval()
    # one value stands for all: shapes, dtype and device are those of weights that were loaded
    network = meta_copy(dry)
    values = {name: torch.empty(()).expand(w.shape) for name, w in dry.state_dict().items()}
    network.load_state_dict(values, assign=True)
    limit = prepared.limit if limit is None else limit
    layers, memory = [], 0
    with backend("fast"):
        for call in _calls(dry, works(dry, size, _Shapes(1, 0, dry.dtype, dry.device))):
            layer = _explained(network, call, limit - memory)
            if layer is not None:
                layers.append(layer)
                of_each = sizes(layer.channels, layer.out_channels)
                memory += of_each.get(layer.method, 0)
                beside = _of_shortcut(network, layer)
                memory += beside if memory + beside <= limit else 0
    return Explanation(config.class_name, size, tuple(layers), memory, limit)


class _Shapes(Noise):
    """Draws nothing: tensors on the meta device."""

    def normal(self, *shape: int) -> Tensor:
        return torch.empty(1, *shape, device="meta")

    def below(self, end: int, *shape: int) -> Tensor:
        return torch.empty(1, *shape, dtype=torch.int64, device="meta")


def _calls(dry: nn.Module, inputs: Inputs) -> Iterator[_Call]:
    """Each convolution and doubling as it runs."""
    for work, given in inputs.items():
        found: list[_Call] = []
        handles = [
            _watch(name, module, work, found)
            for name, module in dry.named_modules()
            if isinstance(module, nn.Conv2d | Upsample2D)
        ]
        with torch.no_grad():
            getattr(dry, work)(*given)
        for handle in handles:
            handle.remove()
        yield from found


def _watch(name: str, module: nn.Module, work: str, found: list[_Call]) -> RemovableHandle:
    return module.register_forward_hook(
        lambda _, args, y: found.append(_Call(name, work, tuple(args[0].shape), tuple(y.shape)))
    )


def _explained(network: nn.Module, call: _Call, room: int) -> Explained | None:
    """What a call gets, of which weights may be prepared in ``room`` bytes; None for convolutions
    of other kernels and strides, and for one that its doubling stands for."""
    module, parent = (
        network.get_submodule(name) for name in (call.name, call.name.rpartition(".")[0])
    )
    conv = module.conv if isinstance(module, Upsample2D) else module
    assert isinstance(conv, nn.Conv2d)
    if (conv.kernel_size, conv.stride) != ((3, 3), (1, 1)) or isinstance(parent, Upsample2D):
        return None
    if isinstance(module, Upsample2D):
        method, costs, reason = _of_doubling(module, call, room)
    else:
        method, costs, reason = _of_convolution(conv, parent, call, room)
    height, width = call.given[2:]
    return Explained(
        name=call.name,
        work=call.work,
        doubling=isinstance(module, Upsample2D),
        channels=conv.in_channels,
        out_channels=conv.out_channels,
        size=(height, width),
        method=method,
        costs=costs,
        reason=reason,
    )


def _of_doubling(block: Upsample2D, call: _Call, room: int) -> tuple[str, dict[str, float], str]:
    if not fast.runs_doubling(block, _like(call.given), (call.gave[2], call.gave[3])):
        return "torch", {}, "not a doubling: a map of odd size waits"
    batch, channels, height, width = call.given
    pixels = batch * height * width * channels * block.conv.out_channels
    costs = {"doubling": DOUBLED.places / 4 * pixels, "direct": 36.0 * pixels}
    if sizes(channels, block.conv.out_channels)["doubling"] <= room:
        return "doubling", costs, "25 products for 16 outputs, of which each would take nine"
    return "direct", costs, "no room for what doubling prepares: see the limit of prepared weights"


def _of_convolution(
    conv: nn.Conv2d, parent: Any, call: _Call, room: int
) -> tuple[str, dict[str, float], str]:
    batch, channels, height, width = call.given
    if isinstance(parent, ResnetBlock2D):
        into = _like((batch, parent.conv1.in_channels, height, width))
        fused = fast.runs_resnet(parent, into)
    else:
        last = hasattr(parent, "conv_norm_out") and conv is parent.conv_out
        fused = last and fast.runs_last(
            parent.conv_norm_out, parent.conv_act, conv, _like(call.given)
        )
    if not fused:
        return "torch", {}, "no normalisation and SiLU before it, which the fast backend works with"
    fits = (name for name in ("winograd", "packed") if _bytes(conv, name) <= room)
    # a normalisation stands before each of them
    choice = choose(batch, channels, conv.out_channels, height, width, tuple(fits), True)
    return choice.method, dict(choice.costs), choice.reason


def _of_shortcut(network: nn.Module, layer: Explained) -> int:
    """Bytes that a block's prepared shortcut takes, which its second convolution adds."""
    block, _, part = layer.name.rpartition(".")
    parent: Any = network.get_submodule(block)
    if layer.method != "winograd" or part != "conv2" or parent.conv_shortcut is None:
        return 0
    return 4 * int(parent.conv_shortcut.weight.numel())


def _bytes(conv: nn.Conv2d, method: str) -> int:
    return sizes(conv.in_channels, conv.out_channels)[method]


def _like(shape: Shape) -> Tensor:
    """A map of that shape that takes the memory of one value."""
    return torch.empty(()).expand(shape)
