"""The U-Net's names in the original layout and in diffusers', both ways.

The original numbers its layers through: ``input_blocks.N`` is the first convolution, then every
ResNet block and every downsampling convolution in turn; ``output_blocks.N`` is a ResNet block, the
last of each level with the upsampling convolution behind it. Which ``N`` is which block of which
level follows from how many layers each level has, so a map is made for one structure. Inside a
transformer both layouts use the same names.

Source: ``ldm/modules/diffusionmodules/openaimodel.py``, ``UNetModel``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, count

from sdconv.checkpoint.keys.prefixes import how_many, modules_of
from sdconv.config.facts import ADDED_TIME_DIM, FEWEST_ADDED_TIMES, UNCLIP_WIDTHS

# leaf names of a ResNet block: diffusers' -> the original's
RESNET_LEAVES: Mapping[str, str] = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

Pair = tuple[str, str]

# modules that every U-Net has, diffusers' name first
ENDS: tuple[Pair, ...] = (
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("time_embedding.cond_proj", "time_embed.cond_proj"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)
MIDDLE_RESNETS: tuple[Pair, ...] = (
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.resnets.1", "middle_block.2"),
)
MIDDLE_TRANSFORMER: Pair = ("mid_block.attentions.0", "middle_block.1")
# what else is added to the time embedding: the original has one name for three things
LABELS: Mapping[str, tuple[Pair, ...]] = {
    "added": (
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("add_embedding.linear_2", "label_emb.0.2"),
    ),
    "projected": (
        ("class_embedding.linear_1", "label_emb.0.0"),
        ("class_embedding.linear_2", "label_emb.0.2"),
    ),
    "listed": (("class_embedding", "label_emb"),),
}

_TAIL = re.compile(r"(.+)\.(weight|bias)")
# a transformer's own modules, alike in both layouts
_TRANSFORMER = re.compile(
    r"(.+?)\.(norm|proj_in|proj_out"
    r"|transformer_blocks\.[0-9]{1,4}\.(?:norm[123]|attn[12]\.to_(?:q|k|v|out\.0)|ff\.net\.(?:0\.proj|2)))"
)


@dataclass(frozen=True, kw_only=True)
class UNetKeys:
    """One U-Net's names, both ways.

    Args:
        layers: ResNet blocks of each level on the way down.
        up_attention: of each level on the way up, whether its ResNet blocks have transformers,
            behind which the original puts the upsampling convolution.
        labels: which of ``LABELS`` it has; more than one only in diffusers' layout.
    """

    layers: tuple[int, ...]
    up_attention: tuple[bool, ...]
    labels: tuple[str, ...]

    def canonical(self, original: str) -> str | None:
        """diffusers' name for a tensor that the original layout calls ``original``; None where it
        is none of this network's."""
        return _translate(original, self._to_canonical, self._transformers_to_canonical)

    def original(self, canonical: str) -> str | None:
        """The original layout's name for diffusers' ``canonical``; None where it is none of this
        network's."""
        return _translate(canonical, self._to_original, self._transformers_to_original)

    @cached_property
    def _to_original(self) -> dict[str, str]:
        return dict(self._modules())

    @cached_property
    def _to_canonical(self) -> dict[str, str]:
        return {original: canonical for canonical, original in self._modules()}

    @cached_property
    def _transformers_to_original(self) -> dict[str, str]:
        return dict(self._transformers())

    @cached_property
    def _transformers_to_canonical(self) -> dict[str, str]:
        return {original: canonical for canonical, original in self._transformers()}

    def _modules(self) -> Iterator[Pair]:
        yield from ENDS
        for label in self.labels:
            yield from LABELS[label]
        yield from self._resamplers()
        layers = [(k.format("resnets"), v.format(0)) for k, v in self._layers()]
        for canonical, original in (*layers, *MIDDLE_RESNETS):
            yield from ((f"{canonical}.{k}", f"{original}.{v}") for k, v in RESNET_LEAVES.items())

    def _transformers(self) -> Iterator[Pair]:
        yield MIDDLE_TRANSFORMER
        yield from ((k.format("attentions"), v.format(1)) for k, v in self._layers())

    def _layers(self) -> Iterator[Pair]:
        """Every layer, with braces for what of it is meant: its ResNet block or transformer."""
        numbers = count(1)
        for level, layers in enumerate(self.layers):
            for layer in range(layers):
                yield f"down_blocks.{level}.{{}}.{layer}", f"input_blocks.{next(numbers)}.{{}}"
            next(numbers)  # the downsampling convolution's
        numbers = count(0)
        for level, layers in enumerate(self.layers[::-1]):
            for layer in range(layers + 1):
                yield f"up_blocks.{level}.{{}}.{layer}", f"output_blocks.{next(numbers)}.{{}}"

    def _resamplers(self) -> Iterator[Pair]:
        number = 0
        for level, layers in enumerate(self.layers[:-1]):
            number += layers + 1
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
        number = -1
        for level, layers in enumerate(self.layers[:0:-1]):
            number += layers + 1
            place = 2 if self.up_attention[level] else 1
            yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{number}.{place}.conv"


def _translate(
    name: str, modules: Mapping[str, str], transformers: Mapping[str, str]
) -> str | None:
    tail = _TAIL.fullmatch(name)
    if tail is None:
        return None
    if (module := modules.get(tail[1])) is not None:
        return f"{module}.{tail[2]}"
    inner = _TRANSFORMER.fullmatch(tail[1])
    if inner is not None and (home := transformers.get(inner[1])) is not None:
        return f"{home}.{inner[2]}.{tail[2]}"
    return None


def keys_of_canonical(names: Collection[str]) -> UNetKeys:
    """The map of the U-Net whose tensors have these names in diffusers' layout."""
    modules = modules_of(names)
    levels = range(how_many("down_blocks.{}.resnets.0", modules))
    return UNetKeys(
        layers=tuple(how_many(f"down_blocks.{i}.resnets.{{}}", modules) for i in levels),
        up_attention=tuple(f"up_blocks.{i}.attentions.0" in modules for i in levels),
        labels=tuple(
            label
            for label, ((module, _), *_) in LABELS.items()
            if any(f"{module}.{tail}" in names for tail in ("weight", "bias"))
        ),
    )


def keys_of_original(names: Collection[str], label_width: int | None = None) -> UNetKeys:
    """The map of the U-Net whose tensors have these names in the original layout, without prefix.

    Args:
        names: of its tensors.
        label_width: how wide what ``label_emb`` reads is, where that is known.
    """
    modules, layers = modules_of(names), [0]
    for number in count(1):
        if f"input_blocks.{number}.0.op" in modules:
            layers.append(0)
        elif f"input_blocks.{number}.0" in modules:
            layers[-1] += 1
        else:
            break
    # of each level on the way up, which has one ResNet block more than on the way down
    firsts = accumulate((number + 1 for number in layers[:0:-1]), initial=0)
    labels: tuple[str, ...] = ()
    if "label_emb.weight" in names:
        labels = ("listed",)
    elif "label_emb.0.0" in modules:
        # SDXL's text and sizes, or unCLIP's picture: only that has transformers of one block each,
        # and at the first level too
        deep = any("transformer_blocks.1." in name for name in names)
        is_added = deep or "input_blocks.1.1" not in modules or _holds_sizes(label_width)
        labels = ("added" if is_added else "projected",)
    return UNetKeys(
        layers=tuple(layers),
        up_attention=tuple(f"output_blocks.{n}.1.transformer_blocks" in modules for n in firsts),
        labels=labels,
    )


def _holds_sizes(label_width: int | None) -> bool:
    """Whether a width has room for SDXL's sizes, and is none of unCLIP's."""
    return (
        label_width is not None
        and label_width > FEWEST_ADDED_TIMES * ADDED_TIME_DIM
        and label_width not in UNCLIP_WIDTHS
    )


def ema_name(name: str) -> str:
    """What Lightning's ``LitEma`` calls its running average of a tensor: no dots in it.

    Args:
        name: in the file, such as ``model.diffusion_model.out.2.weight``.
    """
    return "model_ema." + name.removeprefix("model.").replace(".", "")
