"""Where a network's feature maps can be read and edited: modules' outputs, and the places between
them.

Names are those of the modules, which sdconv's and diffusers' networks have in common. A ``:``
stands before the name of a place that is no module's output:

- ``X:input``: what a block is given;
- ``X:hidden``, ``X:skip``: its two halves where a skip connection comes in, on a U-Net's way up;
- ``X:silu1``, ``X:silu2``: what a ResNet block's two convolutions read;
- ``X:temb``: what its time projection gives, ``(B, C)``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

KINDS = (
    "input hidden skip norm activation conv shortcut time resnet attention downsample upsample"
    " linear block"
).split()
"""What a place is of."""

# by the name of the class, so that diffusers' and patched ones need not be imported
_OF_CLASS = {
    **dict.fromkeys(("Conv1d", "Conv2d", "Conv3d"), "conv"),
    **dict.fromkeys(("GroupNorm", "LayerNorm", "RMSNorm", "BatchNorm2d"), "norm"),
    **dict.fromkeys(("SiLU", "ReLU", "GELU", "GEGLU", "Mish", "QuickGELU", "SiLUActivation"),
                    "activation"),
    **dict.fromkeys(("ResnetBlock2D", "TinyBlock", "PooledTinyBlock", "AutoencoderTinyBlock"),
                    "resnet"),
    **dict.fromkeys(("Attention", "Transformer2DModel", "BasicTransformerBlock", "NoTransformer"),
                    "attention"),
    **dict.fromkeys(("Downsample2D", "AsymmetricDownsample2D"), "downsample"),
    **dict.fromkeys(("Upsample2D", "Upsample"), "upsample"),
    **dict.fromkeys(("Timesteps", "TimestepEmbedding"), "time"),
    **dict.fromkeys(("Linear", "Embedding", "LoRACompatibleLinear"), "linear"),
}  # fmt: skip
_OF_NAME = {"conv_shortcut": "shortcut", "time_emb_proj": "time"}
# kinds whose modules are blocks, of which the input is a place too
_BLOCKS = ("resnet", "attention", "downsample", "upsample", "block")
# never called, or giving back what they were given
_SILENT = ("ModuleList", "ModuleDict", "ParameterList", "ParameterDict", "Dropout", "Identity")
# what a level on the way down runs last in each layer, and so keeps for the way up
_LAST_PARTS = ("motion_modules", "attentions", "resnets")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in a network a map passes.

    ``name``: as in the module's docstring. ``kind``: one of ``KINDS``. ``of``: the enclosing
    module's name. ``module``: the one whose call it is found at. ``before``: it is the call's first
    tensor argument, not what comes out. ``channels``: which of that tensor's, None for all.
    ``skip``: the other end of the skip connection that begins or ends here.
    """

    name: str
    kind: str
    of: str
    module: nn.Module
    before: bool = False
    channels: slice | None = None
    skip: str | None = None


def places(network: nn.Module, prefix: str = "") -> dict[str, Place]:
    """Every place in a network by its name, in the order in which the modules were made.

    Args:
        network: any module; ResNet blocks and U-Nets are known by their parts.
        prefix: put before each name, such as ``"unet."``.
    """
    skips = {
        prefix + name: (prefix + source, width) for name, (source, width) in _skips(network).items()
    }
    sources = {source: f"{name}:skip" for name, (source, _) in skips.items()}
    found: dict[str, Place] = {}
    readers = _readers(network)
    # a ResNet block's one activation is called two or three times: silu1 and silu2 stand for it
    known: set[int] = set()
    for name, module in network.named_modules(remove_duplicate=False):
        if _is_resnet(module):
            known.add(id(module.nonlinearity))
        kind = _kind(name, module)
        if not name or kind is None:
            continue
        reader, name = readers.get(name), prefix + name
        if reader is not None:
            of = name.rpartition(".")[0]
            found[name] = Place(name=name, kind=kind, of=of, module=reader, before=True)
        elif id(module) not in known:
            known.add(id(module))
            for place in _at(name, kind, module, skips.get(name)):
                found[place.name] = place
            if name in sources:
                found[name] = Place(**{**vars(found[name]), "skip": sources[name]})
    return found


def _readers(network: nn.Module) -> Mapping[str, nn.Module]:
    """For each name of an activation that has several of them, as diffusers' tiny autoencoders have
    one in all places of a block: the module behind it, which reads what comes out there."""
    uses = Counter(id(module) for _, module in network.named_modules(remove_duplicate=False))
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Sequential):
            for (key, one), (_, behind) in pairwise(module._modules.items()):
                several = uses[id(one)] > 1 and uses[id(behind)] == 1
                if several and one is not None and behind is not None and not one._parameters:
                    found[f"{name}.{key}".removeprefix(".")] = behind
    return found


def _kind(name: str, module: nn.Module) -> str | None:
    own = type(module).__name__
    if own in _SILENT:
        return None
    return _OF_NAME.get(name.rpartition(".")[2]) or _OF_CLASS.get(own, "block")


def _at(name: str, kind: str, module: nn.Module, skip: tuple[str, int] | None) -> Iterator[Place]:
    """The places in and around one module, in the order in which a call passes them."""
    if kind in _BLOCKS:
        yield Place(name=f"{name}:input", kind="input", of=name, module=module, before=True)
    if skip is not None:
        source, width = skip
        parts = (("hidden", slice(None, -width), None), ("skip", slice(-width, None), source))
        for part, channels, other in parts:
            yield Place(
                name=f"{name}:{part}",
                kind=part,
                of=name,
                module=module,
                before=True,
                channels=channels,
                skip=other,
            )
    if _is_resnet(module):
        for number in (1, 2):
            yield Place(
                name=f"{name}:silu{number}",
                kind="activation",
                of=name,
                module=getattr(module, f"conv{number}"),
                before=True,
            )
        if isinstance(time := getattr(module, "time_emb_proj", None), nn.Module):
            yield Place(name=f"{name}:temb", kind="time", of=name, module=time)
    yield Place(name=name, kind=kind, of=name.rpartition(".")[0], module=module)


def _is_resnet(module: nn.Module) -> bool:
    parts = ("norm1", "conv1", "norm2", "conv2", "nonlinearity")
    return all(module._modules.get(part) is not None for part in parts)


def _skips(network: nn.Module) -> Mapping[str, tuple[str, int]]:
    """For each ResNet block on a U-Net's way up: the module whose map joins its input, and the
    channels of that map."""
    down, up = (getattr(network, f"{way}_blocks", None) for way in ("down", "up"))
    first = getattr(network, "conv_in", None)
    if not isinstance(down, nn.ModuleList) or not isinstance(up, nn.ModuleList) or first is None:
        return {}
    sources = [("conv_in", first)]
    for level, block in enumerate(down):
        kept = next((part for part in _LAST_PARTS if getattr(block, part, None)), "resnets")
        for layer, resnet in enumerate(getattr(block, "resnets", ())):
            sources.append((f"down_blocks.{level}.{kept}.{layer}", resnet))
        for layer, sampler in enumerate(getattr(block, "downsamplers", None) or ()):
            sources.append((f"down_blocks.{level}.downsamplers.{layer}", sampler))
    readers = [
        f"up_blocks.{level}.resnets.{layer}"
        for level, block in enumerate(up)
        for layer in range(len(getattr(block, "resnets", ())))
    ]
    widths = [_width(module) for _, module in sources]
    # every map that was kept is read once, the last one first; else it is no such network
    if len(readers) != len(sources) or 0 in widths:
        return {}
    named = [(name, width) for (name, _), width in zip(sources, widths, strict=True)]
    return dict(zip(readers, reversed(named), strict=True))


def _width(module: nn.Module) -> int:
    """Channels of what a convolution, a ResNet block or a downsampler gives; 0 of anything else."""
    last = getattr(module, "conv2", None) or getattr(module, "conv", None) or module
    weight = getattr(last, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) else 0
