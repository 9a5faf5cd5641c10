"""A VAE as a list of steps over full-size feature maps, which the planner counts and the executor
runs.

Each step reads strips of one feature map from top to bottom, once, and writes strips of another.
GroupNorm needs the statistics of the whole feature map before the next step begins, so they are
collected while the feature map is written. A step may overwrite the feature
map that it reads, because it keeps the rows that the next strip needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch import nn

from sdconv.backends import is_fast
from sdconv.errors import InputError
from sdconv.fast.cpu.winograd import Kind
from sdconv.fast.preconditions import (
    has_plain_forward,
    has_plain_methods,
    is_bare,
    is_called_plainly,
)
from sdconv.models.blocks import AsymmetricDownsample2D, Attention, ResnetBlock2D, Upsample2D
from sdconv.models.padding import ZEROS, Modes, is_seamless, modes_for, padding_modes
from sdconv.streaming import fused
from sdconv.streaming.buffers import FeatureBuffer
from sdconv.streaming.layers import (
    AttentionLayer,
    Conv1x1,
    Conv3x3,
    DownsampleConv,
    Projection,
    StreamLayer,
    UpsampleConv,
    WholeConv,
)

Direction = Literal["encode", "decode"]

_LAYERS = (
    *(nn.Conv2d, nn.Linear, nn.GroupNorm, nn.SiLU, nn.ModuleList),
    *(ResnetBlock2D, Attention, Upsample2D, AsymmetricDownsample2D),
)


@dataclass(frozen=True, eq=False, kw_only=True)
class StreamStep:
    """One layer over a whole feature map.

    Attributes:
        name: of the layer in the network.
        source: the buffer that is read.
        target: the buffer that is written.
        layer: what is computed.
        residual: a buffer that is added to the output.
        collects_stats: whether the target's statistics are collected for the next normalisation.
        band: the units that are computed, if the buffers hold a rank's rows only.
    """

    name: str
    source: FeatureBuffer
    target: FeatureBuffer
    layer: StreamLayer
    residual: FeatureBuffer | None = None
    collects_stats: bool = False
    band: range | None = None

    @property
    def inputs(self) -> tuple[FeatureBuffer, ...]:
        """The buffers that must be alive together with the target."""
        return (self.source,) if self.residual is None else (self.source, self.residual)

    @property
    def units(self) -> int:
        """The number of units (see ``StreamLayer``) in the whole step."""
        return self.layer.units(self.source.height) if self.band is None else len(self.band)

    @property
    def ample_workspace(self) -> int:
        """The workspace in bytes beyond which strips get no faster."""
        return self.layer.ample_workspace(self.source.width)

    def workspace(self, units: int) -> int:
        """Bytes that a strip of ``units`` needs in addition to the feature maps."""
        return self.layer.workspace(units, self.source.width)

    @property
    def multiplies(self) -> int:
        """Multiply-accumulates of the whole step."""
        return self.layer.multiplies(self.source.height, self.source.width)


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionStep(StreamStep):
    """Attention of each strip to the keys and values of the whole feature map."""

    keys: FeatureBuffer
    values: FeatureBuffer

    @property
    def inputs(self) -> tuple[FeatureBuffer, ...]:
        return (*super().inputs, self.keys, self.values)

    @property
    def multiplies(self) -> int:
        queries = self.source.height * self.source.width
        tokens = self.keys.height * self.keys.width
        return 2 * super().multiplies + 2 * queries * tokens * self.source.channels


class _StepBuilder:
    """Turns modules into steps, in the order they are added; ``current`` holds the latest output.

    Each convolution is computed by the backend in force for it.
    """

    def __init__(self, start: FeatureBuffer) -> None:
        self.current = start
        self.steps: list[StreamStep] = []

    def add_layer(self, name: str, layer: StreamLayer) -> None:
        """Adds a layer that writes to a new buffer."""
        height, width = layer.output_size(self.current.height, self.current.width)
        target = FeatureBuffer(height, width, layer.out_channels, self.current.dtype)
        self._add_step(name, layer, target)

    def conv3x3(self, conv: nn.Conv2d, norm: nn.GroupNorm | None, **options: Any) -> StreamLayer:
        """The layer for a 3x3 convolution of the current feature map, after ``norm`` and SiLU if
        there is a norm."""
        shortcut: nn.Conv2d | None = options.get("shortcut")
        plain_shortcut = shortcut is None or is_plain_conv(shortcut, kernel=1)
        options |= {"norm": norm, "silu": norm is not None}
        # torch refuses to reflect a single row or column
        wide = min(self.current.height, self.current.width) > 1 or conv.padding_mode != "reflect"
        if not (is_plain_conv(conv, padding=1) and plain_shortcut and wide):
            return self._whole(conv, conv, **options)
        layer = self._fast_layer("conv3x3", conv, normalised=norm is not None) or Conv3x3
        return layer(conv, modes=padding_modes(conv), **options)

    def _whole(self, conv: nn.Conv2d, block: nn.Module, **options: Any) -> StreamLayer:
        return WholeConv(module=conv, block=block, height=self.current.height, **options)

    def add_upsample(self, name: str, block: Upsample2D) -> None:
        """Nearest upsampling and its convolution."""
        conv = block.conv
        if not is_plain_conv(conv, padding=1):
            self.add_layer(name, self._whole(conv, block))
            return
        layer = self._fast_layer("upsample_conv", conv) or UpsampleConv
        self.add_layer(name, layer(conv, modes=padding_modes(conv)))

    def add_downsample(self, name: str, block: AsymmetricDownsample2D) -> None:
        """A convolution at stride 2."""
        conv = block.conv
        if not is_plain_conv(conv, stride=2):
            self.add_layer(name, self._whole(conv, block))
            return
        # The convolution pads nothing; the block does.
        modes = modes_for(block.seamless_axes, ZEROS)
        layer = self._fast_layer("downsample_conv", conv, modes=modes) or DownsampleConv
        self.add_layer(name, layer(conv, modes=modes))

    def add_pointwise(self, name: str, conv: nn.Conv2d) -> None:
        """A 1x1 convolution."""
        plain = is_plain_conv(conv, kernel=1)
        self.add_layer(name, Conv1x1(conv) if plain else self._whole(conv, conv))

    def _fast_layer(
        self,
        kind: Kind,
        conv: nn.Conv2d,
        *,
        normalised: bool = False,
        modes: Modes | None = None,
    ) -> type[StreamLayer] | None:
        """The fast backend's class of layer; None where that backend is not in force, or does not
        pad with zeros."""
        if (modes or padding_modes(conv)) != ZEROS:
            return None
        if not (is_fast(conv) and fused.can_run(conv.weight)):
            return None
        height, width = self.current.height, self.current.width
        return fused.layer_for(kind, conv, height, width, normalised=normalised)

    def add_resnet(self, name: str, block: ResnetBlock2D) -> None:
        """Adds a ResNet block; its second convolution overwrites the output of the first."""
        x = self.current
        self.add_layer(f"{name}.conv1", self.conv3x3(block.conv1, block.norm1))
        conv2 = self.conv3x3(block.conv2, block.norm2, shortcut=block.conv_shortcut)
        self._add_step(f"{name}.conv2", conv2, self.current, residual=x)

    def add_attention(self, name: str, block: Attention) -> None:
        """Adds an attention block, which overwrites its input."""
        x = self.current
        keys, values = replace(x, resident=True), replace(x, resident=True)
        for linear, target in ((block.to_k, keys), (block.to_v, values)):
            self.current = x
            self._add_step(f"{name}.projection", Projection(linear, block.group_norm), target)
        self.current = x
        out = cast(nn.Linear, block.to_out[0])
        step = AttentionStep(
            name=name,
            source=x,
            target=x,
            layer=AttentionLayer(block.to_q, block.group_norm, out=out),
            residual=x,
            keys=keys,
            values=values,
        )
        self.steps.append(step)

    def _add_step(
        self,
        name: str,
        layer: StreamLayer,
        target: FeatureBuffer,
        residual: FeatureBuffer | None = None,
    ) -> None:
        step = StreamStep(
            name=name, source=self.current, target=target, layer=layer, residual=residual
        )
        self.steps.append(step)
        self.current = target

    def finish(self) -> tuple[StreamStep, ...]:
        """The steps, with ``collects_stats`` set where a later step normalises the target."""
        wanted: set[FeatureBuffer] = set()
        finished: list[StreamStep] = []
        for step in reversed(self.steps):
            finished.append(replace(step, collects_stats=step.target in wanted))
            wanted.discard(step.target)
            if step.layer.norm is not None:
                wanted.add(step.source)
        return tuple(reversed(finished))


def steps_of(
    network: nn.Module, direction: Direction, height: int, width: int
) -> tuple[StreamStep, ...]:
    """The steps for one image. The first step's source is the input, the last one's target the
    result.

    Args:
        network: an ``AutoencoderKL``; one on the meta device can be planned, but not run.
        direction: which half of the network.
        height: rows of the input (an image, or latents).
        width: columns of the input.

    Raises:
        InputError: a module is not one of the VAE's own (it is an adapter, for instance), or has a
            hook (for capturing or offloading) that streaming would not call.
    """
    modules = dict(_modules_in_order(network, direction))
    check_modules(modules, _LAYERS)
    first = next(iter(modules.values()))
    builder = _StepBuilder(FeatureBuffer(height, width, first.in_channels, first.weight.dtype))
    for name, module in modules.items():
        if isinstance(module, ResnetBlock2D):
            builder.add_resnet(name, module)
        elif isinstance(module, Attention):
            builder.add_attention(name, module)
        elif isinstance(module, Upsample2D):
            builder.add_upsample(f"{name}.conv", module)
        elif isinstance(module, AsymmetricDownsample2D):
            builder.add_downsample(f"{name}.conv", module)
        elif name.endswith("quant_conv"):
            builder.add_pointwise(name, module)
        else:
            norm = network.get_submodule(name.replace("conv_out", "conv_norm_out"))
            group_norm = norm if isinstance(norm, nn.GroupNorm) else None
            builder.add_layer(name, builder.conv3x3(module, group_norm))
    return builder.finish()


def _modules_in_order(network: nn.Module, direction: Direction) -> Iterator[tuple[str, Any]]:
    """A half's blocks, and its convolutions outside blocks, by their names, in running order."""
    half = "encoder" if direction == "encode" else "decoder"
    mid_block = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
    stages = tuple(
        f"{kind}.{stage}.{part}.{index}"
        for kind in ("down_blocks", "up_blocks")
        for stage, block in enumerate(getattr(network.get_submodule(half), kind, ()))
        for part in ("resnets", "downsamplers", "upsamplers")
        for index, _ in enumerate(getattr(block, part, None) or ())
    )
    blocks = (*stages, *mid_block) if direction == "encode" else (*mid_block, *stages)
    names = [f"{half}.{name}" for name in ("conv_in", *blocks, "conv_out")]
    names = [*names, "quant_conv"] if direction == "encode" else ["post_quant_conv", *names]
    modules = dict(network.named_modules())
    yield from ((name, modules[name]) for name in names if name in modules)


def check_modules(modules: Mapping[str, nn.Module], supported: Sequence[type[nn.Module]]) -> None:
    """Checks that streaming may compute with the weights of modules instead of calling them.

    Args:
        modules: parts of a network, by their names.
        supported: the classes of the modules in them.

    Raises:
        InputError: a module is of another class, or has a hook or a forward of its own.
    """
    for prefix, part in modules.items():
        for name, module in part.named_modules(prefix=prefix):
            if type(module) not in supported:
                raise InputError(
                    "streaming supports the network's own layers only",
                    where=name,
                    got=type(module).__name__,
                    hint="merge adapters into the weights, or call disable_streaming()",
                )
            if isinstance(module, nn.Conv2d) and "forward" not in vars(module):
                called = is_called_plainly(module, nn.Conv2d)  # its methods may be replaced
            else:
                called = is_bare(module, type(module))
            if not called:
                raise InputError(
                    "the module has a hook, or a forward of its own, which streaming would not "
                    "call",
                    where=name,
                    hint="remove it, or call disable_streaming()",
                )


def is_plain_conv(conv: nn.Conv2d, *, kernel: int = 3, stride: int = 1, padding: int = 0) -> bool:
    """Whether strips can compute a convolution: it is torch's own or seamless, of this size."""
    return (
        (
            has_plain_methods(conv, nn.Conv2d)
            or (is_seamless(conv) and has_plain_forward(conv, nn.Conv2d))
        )
        and conv.kernel_size == (kernel, kernel)
        and conv.stride == (stride, stride)
        and conv.padding == (padding, padding)
        and (conv.dilation == (1, 1) or kernel == 1)
        and conv.groups == 1
        and (padding == 0 or conv.padding_mode in ("zeros", "circular", "reflect", "replicate"))
    )
