"""The hook points of a network: where its feature maps can be read and edited.

Every module's output is a hook point, under the module's name, which sdconv's and diffusers'
networks share. It is the output as it is, but for the normalisation in a VAE's attention: that
computes ``(B, C, H*W)``, and is read and edited as tokens ``(B, H*W, C)``. Hook points that are not
a module's output have a ``:`` in their name:

- ``X:input``: the input of a block;
- ``X:hidden``, ``X:skip``: the two halves of that input where a skip connection is concatenated, on
  a U-Net's up path;
- ``X:silu1``, ``X:silu2``: the inputs of a ResNet block's two convolutions;
- ``X:temb``: the output of its time projection, ``(B, C)``;
- ``X:probs``: the attention probabilities of a U-Net's transformer, ``(B, heads, queries, keys)``,
  of the self-attention (``attn1``) and of the cross-attention (``attn2``). They are computed only
  for this hook point, and only a pattern that ends in ``:probs`` matches it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor, nn

from sdconv.features.attention import PROBABILITIES, has_probabilities

KINDS = (
    "input hidden skip norm activation conv shortcut time resnet attention probs downsample"
    " upsample linear block"
).split()
"""The kinds of hook points."""

# by class name, so that diffusers' and patched classes need not be imported
_KIND_OF_CLASS = {
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
_KIND_OF_NAME = {"conv_shortcut": "shortcut", "time_emb_proj": "time"}
# kinds of modules whose input is a hook point too
_BLOCKS = ("resnet", "attention", "downsample", "upsample", "block")
# never called, or returning their input
_WITHOUT_OUTPUT = (
    "ModuleList", "ModuleDict", "ParameterList", "ParameterDict", "Dropout", "Identity"
)  # fmt: skip
# the last part of a down block's layer, whose output is kept as a skip
_LAST_PARTS = ("motion_modules", "attentions", "resnets")


@dataclass(frozen=True, kw_only=True)
class HookPoint:
    """A point in a network where a feature map can be read and replaced.

    Attributes:
        name: as in the module's docstring.
        kind: one of ``KINDS``.
        of: name of the enclosing module.
        module: the module that carries the hook.
        before: the feature map is the first tensor argument of the module's call, not its output.
        channels: the part of that tensor's channels that is meant; None for all.
        skip: the other end of the skip connection that begins or ends here.
    """

    name: str
    kind: str
    of: str
    module: nn.Module
    before: bool = False
    channels: slice | None = None
    skip: str | None = None


def hook_points(network: nn.Module, prefix: str = "") -> dict[str, HookPoint]:
    """Every hook point of a network by name, in the order in which the modules were registered.

    Args:
        network: any module; ResNet blocks and U-Nets are recognised by their submodules.
        prefix: put before each name, such as ``"unet."``.
    """
    skips = {
        prefix + name: (prefix + source, width) for name, (source, width) in _skips(network).items()
    }
    sources = {source: f"{name}:skip" for name, (source, _) in skips.items()}
    found: dict[str, HookPoint] = {}
    readers = _readers(network)
    # a ResNet block calls its one activation two or three times: silu1 and silu2 stand for it
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
            found[name] = HookPoint(name=name, kind=kind, of=of, module=reader, before=True)
        elif id(module) not in known:
            known.add(id(module))
            for point in _around(name, kind, module, skips.get(name)):
                found[point.name] = point
            if name in sources:
                found[name] = replace(found[name], skip=sources[name])
    return found


def _readers(network: nn.Module) -> Mapping[str, nn.Module]:
    """For each name of an activation module that is used more than once, the module that follows it
    and reads its output.

    Each block of diffusers' tiny autoencoders uses one ReLU module several times.
    """
    uses = Counter(id(module) for _, module in network.named_modules(remove_duplicate=False))
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Sequential):
            for (key, one), (_, following) in pairwise(module._modules.items()):
                several = uses[id(one)] > 1 and uses[id(following)] == 1
                if several and one is not None and following is not None and not one._parameters:
                    found[f"{name}.{key}".removeprefix(".")] = following
    return found


def _kind(name: str, module: nn.Module) -> str | None:
    class_name = type(module).__name__
    if class_name in _WITHOUT_OUTPUT:
        return None
    return _KIND_OF_NAME.get(name.rpartition(".")[2]) or _KIND_OF_CLASS.get(class_name, "block")


def _around(
    name: str, kind: str, module: nn.Module, skip: tuple[str, int] | None
) -> Iterator[HookPoint]:
    """The hook points in and around one module, in the order in which a call passes them."""
    if kind in _BLOCKS:
        yield HookPoint(name=f"{name}:input", kind="input", of=name, module=module, before=True)
    if skip is not None:
        source, width = skip
        parts = (("hidden", slice(None, -width), None), ("skip", slice(-width, None), source))
        for part, channels, other_end in parts:
            yield HookPoint(
                name=f"{name}:{part}",
                kind=part,
                of=name,
                module=module,
                before=True,
                channels=channels,
                skip=other_end,
            )
    if _is_resnet(module):
        for number in (1, 2):
            yield HookPoint(
                name=f"{name}:silu{number}",
                kind="activation",
                of=name,
                module=getattr(module, f"conv{number}"),
                before=True,
            )
        if isinstance(time := getattr(module, "time_emb_proj", None), nn.Module):
            yield HookPoint(name=f"{name}:temb", kind="time", of=name, module=time)
    if has_probabilities(name, module):
        yield HookPoint(name=f"{name}{PROBABILITIES}", kind="probs", of=name, module=module)
    yield HookPoint(name=name, kind=kind, of=name.rpartition(".")[0], module=module)


def _is_resnet(module: nn.Module) -> bool:
    parts = ("norm1", "conv1", "norm2", "conv2", "nonlinearity")
    return all(module._modules.get(part) is not None for part in parts)


def _skips(network: nn.Module) -> Mapping[str, tuple[str, int]]:
    """For each ResNet block on a U-Net's up path: the module whose output is concatenated to its
    input, and the number of channels of that output."""
    down, up = (getattr(network, f"{path}_blocks", None) for path in ("down", "up"))
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
    widths = [_out_channels(module) for _, module in sources]
    # a U-Net reads each skip once, the last one first; anything else is not a U-Net
    if len(readers) != len(sources) or 0 in widths:
        return {}
    named = [(name, width) for (name, _), width in zip(sources, widths, strict=True)]
    return dict(zip(readers, reversed(named), strict=True))


def _out_channels(module: nn.Module) -> int:
    """Output channels of a convolution, a ResNet block or a downsampler; 0 for other modules."""
    last = getattr(module, "conv2", None) or getattr(module, "conv", None) or module
    weight = getattr(last, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) else 0
