"""A VAE as a list of steps over full-size maps: what the planner counts and the executor runs.

Each step reads strips of one map, once, from top to bottom, and writes strips of a map. A
GroupNorm's statistics are those of the whole map, so they must be complete before the next step
begins: they are gathered while the map is written. A step may write over the map that it reads,
for the rows that its next strip needs are carried along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch import nn

from sdconv.backends import is_fast
from sdconv.errors import InputError
from sdconv.fast.modules import is_bare
from sdconv.models.blocks import AsymmetricDownsample2D, Attention, ResnetBlock2D, Upsample2D
from sdconv.streaming import fused
from sdconv.streaming.layers import Attended, Doubled, Halved, Layer, Linear, Point, Same
from sdconv.streaming.maps import Map

Work = Literal["encode", "decode"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One pass over a map.

    Attributes:
        name: of the layer in the network.
        source: read. target: written, with or without statistics (``measured``).
        residual: a map that the layer adds.
    """

    name: str
    source: Map
    target: Map
    layer: Layer
    residual: Map | None = None
    measured: bool = False

    @property
    def reads(self) -> tuple[Map, ...]:
        """The maps that must be alive beside the target."""
        return (self.source,) if self.residual is None else (self.source, self.residual)

    @property
    def units(self) -> int:
        """In how many units the whole can be cut."""
        return self.layer.units(self.source.height)

    @property
    def comfort(self) -> int:
        """Bytes beside the maps of which more would not make it faster."""
        return self.layer.comfort(self.source.width)

    def workspace(self, units: int) -> int:
        """Bytes that a strip of this many units takes beside the maps."""
        return self.layer.workspace(units, self.source.width)

    def remains(self, units: int) -> int:
        """The same after the first strip."""
        return self.layer.remains(units, self.source.width)

    @property
    def multiplies(self) -> int:
        """Multiplications of the whole step."""
        return self.layer.multiplies(self.source.height, self.source.width)


@dataclass(frozen=True, eq=False, kw_only=True)
class Attend(Step):
    """Attention from strips of a map to the keys and values of the whole map."""

    keys: Map
    values: Map

    @property
    def reads(self) -> tuple[Map, ...]:
        return (*super().reads, self.keys, self.values)

    @property
    def multiplies(self) -> int:
        queries = self.source.height * self.source.width
        tokens = self.keys.height * self.keys.width
        return 2 * super().multiplies + 2 * queries * tokens * self.source.channels


class _Builder:
    """Follows a network's modules and writes down the steps."""

    def __init__(self, start: Map) -> None:
        self.at = start
        self.steps: list[Step] = []

    def layer(self, name: str, layer: Layer) -> None:
        """A layer to a new map."""
        height, width = layer.output_size(self.at.height, self.at.width)
        self._step(name, layer, Map(height, width, layer.channels, self.at.dtype))

    def same(self, conv: nn.Conv2d, norm: nn.GroupNorm | None, **more: Any) -> Layer:
        """A 3x3 convolution of what there is now, after a norm and SiLU if given, by the backend
        that is in force for it."""
        kind: type[Layer] = Same
        if is_fast(conv) and fused.takes(conv.weight):
            at, normalised = self.at, norm is not None
            kind = fused.layer_for("conv3x3", conv, at.height, at.width, normalised=normalised)
        return kind(conv, norm, activated=norm is not None, **more)

    def doubled(self, conv: nn.Conv2d) -> Layer:
        """A 3x3 convolution after a doubling, by the backend that is in force for it."""
        if is_fast(conv) and fused.takes(conv.weight):
            return fused.layer_for("upsample_conv", conv, self.at.height, self.at.width)(conv)
        return Doubled(conv)

    def halved(self, conv: nn.Conv2d) -> Layer:
        """A 3x3 convolution at stride 2, by the backend that is in force for it."""
        if is_fast(conv) and fused.takes(conv.weight):
            return fused.layer_for("downsample_conv", conv, self.at.height, self.at.width)(conv)
        return Halved(conv)

    def resnet(self, name: str, block: ResnetBlock2D) -> None:
        before = self.at
        self.layer(f"{name}.conv1", self.same(block.conv1, block.norm1))
        second = self.same(block.conv2, block.norm2, shortcut=block.conv_shortcut)
        # over what conv1 wrote
        self._step(f"{name}.conv2", second, self.at, residual=before)

    def attention(self, name: str, block: Attention) -> None:
        x = self.at
        keys, values = replace(x, whole=True), replace(x, whole=True)
        for layer, target in ((block.to_k, keys), (block.to_v, values)):
            self.at = x
            self._step(f"{name}.projection", Linear(layer, block.group_norm), target)
        self.at = x
        out = cast(nn.Linear, block.to_out[0])
        attend = Attend(
            name=name,
            source=x,
            target=x,
            layer=Attended(block.to_q, block.group_norm, out=out),
            residual=x,
            keys=keys,
            values=values,
        )
        self.steps.append(attend)

    def _step(self, name: str, layer: Layer, target: Map, residual: Map | None = None) -> None:
        step = Step(name=name, source=self.at, target=target, layer=layer, residual=residual)
        self.steps.append(step)
        self.at = target

    def finished(self) -> tuple[Step, ...]:
        """The steps, with those marked whose target is normalised next."""
        wanted: set[Map] = set()
        finished: list[Step] = []
        for step in reversed(self.steps):
            finished.append(replace(step, measured=step.target in wanted))
            wanted.discard(step.target)
            if step.layer.norm is not None:
                wanted.add(step.source)
        return tuple(reversed(finished))


def steps_of(network: nn.Module, work: Work, height: int, width: int) -> tuple[Step, ...]:
    """The steps for one picture; the first step's source is what comes in, the last one's target is
    the result.

    Args:
        network: an ``AutoencoderKL``; on the meta device it can be counted, not run.
        work: which half. height, width: of what comes in (a picture, or latents).

    Raises:
        InputError: modules that are not the VAE's own (an adapter's), or with hooks on them
            (a capture's, an offloading's), which would not be called.
    """
    parts = dict(_parts(network, work))
    _check(parts)
    first = next(iter(parts.values()))
    build = _Builder(Map(height, width, first.in_channels, first.weight.dtype))
    for name, module in parts.items():
        if isinstance(module, ResnetBlock2D):
            build.resnet(name, module)
        elif isinstance(module, Attention):
            build.attention(name, module)
        elif isinstance(module, Upsample2D):
            build.layer(f"{name}.conv", build.doubled(module.conv))
        elif isinstance(module, AsymmetricDownsample2D):
            build.layer(f"{name}.conv", build.halved(module.conv))
        elif name.endswith("quant_conv"):
            build.layer(name, Point(module))
        else:
            norm = network.get_submodule(name.replace("conv_out", "conv_norm_out"))
            build.layer(name, build.same(module, norm if isinstance(norm, nn.GroupNorm) else None))
    return build.finished()


def _parts(network: nn.Module, work: Work) -> Iterator[tuple[str, Any]]:
    """Blocks and lone convolutions by their names in the network, in the order they run."""
    half = "encoder" if work == "encode" else "decoder"
    middle = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
    levels = tuple(
        f"{kind}.{level}.{part}.{index}"
        for kind in ("down_blocks", "up_blocks")
        for level, block in enumerate(getattr(network.get_submodule(half), kind, ()))
        for part in ("resnets", "downsamplers", "upsamplers")
        for index, _ in enumerate(getattr(block, part, None) or ())
    )
    own = (*levels, *middle) if work == "encode" else (*middle, *levels)
    names = [f"{half}.{name}" for name in ("conv_in", *own, "conv_out")]
    names = [*names, "quant_conv"] if work == "encode" else ["post_quant_conv", *names]
    modules = dict(network.named_modules())
    yield from ((name, modules[name]) for name in names if name in modules)


def _check(parts: Mapping[str, nn.Module]) -> None:
    plain = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.SiLU, nn.ModuleList)
    blocks = (ResnetBlock2D, Attention, Upsample2D, AsymmetricDownsample2D)
    for prefix, part in parts.items():
        for suffix, module in part.named_modules(prefix=prefix):
            if type(module) not in (*plain, *blocks):
                raise InputError(
                    "streaming knows the VAE's own layers only",
                    where=suffix,
                    got=type(module).__name__,
                    hint="merge adapters into the weights, or call disable_streaming()",
                )
            if not is_bare(module, type(module)):
                raise InputError(
                    "a hook waits for the module's call, and streaming does not call it",
                    where=suffix,
                    hint="remove it, or call disable_streaming()",
                )
