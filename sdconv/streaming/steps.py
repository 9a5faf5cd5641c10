"""A VAE as a list of steps over full-size maps: what the planner counts and the executor runs.

Each step reads strips of one map, once, from top to bottom, and writes strips of a map. A
GroupNorm's statistics are those of the whole map, so they must be complete before the next step
begins: they are gathered while the map is written. A step may write over the map that it reads,
for the rows that its next strip needs are carried along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdconv.blocks import AsymmetricDownsample2D, Attention, ResnetBlock2D, Upsample2D
from sdconv.errors import InputError
from sdconv.streaming.layers import Doubled, Halved, Layer, Point, Same
from sdconv.streaming.maps import Map
from sdconv.streaming.moments import Moments, computing

Work = Literal["encode", "decode"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One pass over a map: normalise, activate, ``layer``, add ``residual``, write.

    Attributes:
        name: of the layer in the network.
        source: read. target: written, with or without statistics (``measured``).
        norm: applied to the source first. activated: SiLU after it.
        residual: added to what the layer gives, through ``shortcut`` if there is one.
    """

    name: str
    source: Map
    target: Map
    layer: Layer
    norm: nn.GroupNorm | None = None
    activated: bool = False
    residual: Map | None = None
    shortcut: nn.Conv2d | None = None
    measured: bool = False

    @property
    def reads(self) -> tuple[Map, ...]:
        """The maps that must be alive beside the target."""
        return (self.source,) if self.residual is None else (self.source, self.residual)

    @property
    def units(self) -> int:
        """In how many units the whole can be cut."""
        return self.layer.units(self.source.height)

    def prepare(self, rows: Tensor, out: Tensor, moments: Moments | None) -> None:
        """The source's ``rows`` as the layer takes them, into ``out``."""
        if self.norm is None or moments is None:
            out.copy_(rows)
            return
        scale, shift = moments.scale_and_shift(self.norm)
        if out.dtype == scale.dtype:
            torch.addcmul(shift, rows, scale, out=out)
            ready = out
        else:
            ready = torch.addcmul(shift, rows.to(scale.dtype), scale)
        if self.activated:
            F.silu(ready, inplace=True)
        if ready is not out:
            out.copy_(ready)

    def compute(self, strip: Tensor, residual: Tensor | None, whole: Sequence[Tensor]) -> Tensor:
        """The target's rows, a tensor of their own.

        Args:
            strip: the window's rows, prepared. residual: the residual map's rows.
            whole: the maps that are read as a whole.
        """
        made = self.layer.apply(strip)
        if residual is None:
            return made
        if self.shortcut is None:
            return made.add_(residual)
        weight, bias = self.shortcut.weight.flatten(1), self.shortcut.bias
        made.view(-1, made.shape[-1]).addmm_(residual.flatten(0, 1), weight.T)
        return made if bias is None else made.add_(bias)

    def workspace(self, units: int) -> int:
        """Bytes that a strip of this many units takes beside the maps."""
        first, last = self.layer.window(0, units)
        rows, width = last - first, self.source.width
        window = rows * (width + self.layer.right) * self.source.channels
        made = self.layer.scratch(rows, width)
        weights = 2 * self.layer.module.weight.numel()  # reordered by the kernel at each call
        dtype = self.target.dtype
        # in a narrow dtype, copies to normalise and to measure in float32
        wide = 0 if computing(dtype) == dtype else max(2 * window, made)
        return (window + made + weights) * dtype.itemsize + wide * computing(dtype).itemsize

    @property
    def multiplies(self) -> int:
        """Multiplications of the whole step."""
        own = self.layer.multiplies(self.source.height, self.source.width)
        if self.shortcut is not None:
            own += self.target.height * self.target.width * self.shortcut.weight.numel()
        return own


@dataclass(frozen=True, eq=False, kw_only=True)
class Attend(Step):
    """Queries from strips of a map, over the keys and values of the whole map; ``layer`` is the
    projection to queries."""

    keys: Map
    values: Map
    out: nn.Linear

    @property
    def reads(self) -> tuple[Map, ...]:
        return (*super().reads, self.keys, self.values)

    def compute(self, strip: Tensor, residual: Tensor | None, whole: Sequence[Tensor]) -> Tensor:
        query, key, value = (
            x.reshape(1, 1, -1, x.shape[-1]) for x in (self.layer.apply(strip), *whole)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        made: Tensor = self.out(mixed.view_as(strip))
        return made if residual is None else made.add_(residual)

    def workspace(self, units: int) -> int:
        tokens = units * self.source.width
        # the query, what is mixed and what is projected
        return super().workspace(units) + 2 * tokens * self.source.channels * (
            self.source.dtype.itemsize
        )

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

    def layer(self, name: str, layer: Layer, norm: nn.GroupNorm | None = None) -> None:
        """A layer to a new map, after a norm and SiLU if given."""
        height, width = layer.output_size(self.at.height, self.at.width)
        target = Map(height, width, layer.channels, self.at.dtype)
        self._step(name, layer, target, norm=norm, activated=norm is not None)

    def resnet(self, name: str, block: ResnetBlock2D) -> None:
        before = self.at
        self.layer(f"{name}.conv1", Same(block.conv1), block.norm1)
        self._step(
            f"{name}.conv2",
            Same(block.conv2),
            self.at,  # over what conv1 wrote
            norm=block.norm2,
            activated=True,
            residual=before,
            shortcut=block.conv_shortcut,
        )

    def attention(self, name: str, block: Attention) -> None:
        x = self.at
        keys, values = replace(x, whole=True), replace(x, whole=True)
        for layer, target in ((block.to_k, keys), (block.to_v, values)):
            self.at = x
            self._step(f"{name}.projection", Point(layer), target, norm=block.group_norm)
        self.at = x
        attend = Attend(
            name=name,
            source=x,
            target=x,
            layer=Point(block.to_q),
            norm=block.group_norm,
            residual=x,
            keys=keys,
            values=values,
            out=cast(nn.Linear, block.to_out[0]),
        )
        self.steps.append(attend)

    def _step(self, name: str, layer: Layer, target: Map, **fields: Any) -> None:
        self.steps.append(Step(name=name, source=self.at, target=target, layer=layer, **fields))
        self.at = target

    def finished(self) -> tuple[Step, ...]:
        """The steps, with those marked whose target is normalised next."""
        wanted: set[Map] = set()
        finished: list[Step] = []
        for step in reversed(self.steps):
            finished.append(replace(step, measured=step.target in wanted))
            wanted.discard(step.target)
            if step.norm is not None:
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
            build.layer(f"{name}.conv", Doubled(module.conv))
        elif isinstance(module, AsymmetricDownsample2D):
            build.layer(f"{name}.conv", Halved(module.conv))
        elif name.endswith("quant_conv"):
            build.layer(name, Point(module))
        else:
            norm = network.get_submodule(name.replace("conv_out", "conv_norm_out"))
            build.layer(name, Same(module), norm if isinstance(norm, nn.GroupNorm) else None)
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
                    fix="merge adapters into the weights, or call disable_streaming()",
                )
            hooked = any(hasattr(module, name) for name in ("_hf_hook", "_diffusers_hook"))
            if hooked or module._forward_hooks or module._forward_pre_hooks:
                raise InputError(
                    "a hook waits for the module's call, and streaming does not call it",
                    where=suffix,
                    fix="remove it, or call disable_streaming()",
                )
