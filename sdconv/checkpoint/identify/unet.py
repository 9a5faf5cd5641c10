"""A U-Net's shapes to its config."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sdconv.checkpoint.identify.shapes import InferredConfig, NetworkShapes
from sdconv.checkpoint.keys.prefixes import how_many
from sdconv.config import UNet2DConditionConfig
from sdconv.config.facts import ADDED_TIME_DIM, NORM_NUM_GROUPS
from sdconv.config.unet import (
    CROSS_DOWN,
    CROSS_MID,
    CROSS_UP,
    DOWN,
    MID,
    UNET_FACTS,
    UP,
    Depths,
    UNetFacts,
)
from sdconv.errors import InputError


def read_unet(shapes: NetworkShapes, family: str | None = None) -> InferredConfig:
    """The config of a U-Net.

    Args:
        shapes: shape of each of its tensors.
        family: a key of ``UNET_FACTS``, where the caller knows it.

    Raises:
        WeightsMismatchError: a part is missing, or laid out as diffusers' class cannot be.
        InputError: the family does not fit.
    """
    _check_levels(shapes)
    channels = _levels(shapes, "down_blocks")
    depths = _Depths.read(shapes, len(channels))
    linear = any(len(shapes[k]) == 2 for k in shapes if k.endswith(".proj_in.weight"))
    added = _width(shapes, "add_embedding.linear_1")
    projected = _width(shapes, "class_embedding.linear_1")
    context = _context_width(shapes)
    name, evidence, fitting = _family(shapes, linear, added, context)
    if family is not None:
        if family not in fitting:
            raise InputError(
                f"the family {family!r} does not fit this U-Net ({evidence})",
                where="family",
                expected=" or ".join(fitting),
                got=repr(family),
            )
        name, evidence = family, "the caller's word"
    facts = UNET_FACTS[name]
    time_channels, first = shapes.axes("time_embedding.linear_1.weight", 2)
    inputs, crosses = (
        shapes.axes("conv_in.weight", 4)[1],
        _only_cross(shapes, channels, context, name),
    )
    listed = "class_embedding.weight" in shapes
    if inputs == 7 and crosses and not listed:
        raise shapes.mismatch(
            "the x4 upscaler's list of noise levels is missing",
            expected="class_embedding.weight, which is label_emb.weight in the original layout",
        )
    config = shapes.config(
        UNet2DConditionConfig,
        sample_size=facts.sample_size,
        in_channels=inputs,
        out_channels=shapes.axes("conv_out.weight", 4)[0],
        down_block_types=tuple(CROSS_DOWN if d else DOWN for d in depths.down),
        mid_block_type=depths.mid_type,
        up_block_types=tuple(CROSS_UP if d else UP for d in depths.up),
        only_cross_attention=crosses,
        block_out_channels=channels,
        layers_per_block=_short(depths.layers),
        norm_num_groups=NORM_NUM_GROUPS,
        cross_attention_dim=context or UNet2DConditionConfig.assumed["cross_attention_dim"],
        transformer_layers_per_block=depths.per_block,
        reverse_transformer_layers_per_block=depths.reverse_per_block,
        attention_head_dim=_heads(channels, facts),
        use_linear_projection=linear,
        upcast_attention=facts.upcast_attention,
        class_embed_type="projection" if projected else None,
        num_class_embeds=shapes.axes("class_embedding.weight", 2)[0] if listed else None,
        addition_embed_type="text_time" if added else None,
        addition_time_embed_dim=ADDED_TIME_DIM if added else None,
        projection_class_embeddings_input_dim=added or projected,
        time_embedding_dim=None if time_channels == 4 * first else time_channels,
        time_cond_proj_dim=_width(shapes, "time_embedding.cond_proj"),
    )
    split = [c for c, attends in zip(channels, depths.attends, strict=True) if attends]
    unsure = family is None and facts.head_channels and any(c % facts.head_channels for c in split)
    return InferredConfig(
        config=config,
        family=name,
        evidence=evidence,
        open_to=tuple(fitting) if unsure else (),
        guess=f"could be of {' or '.join(fitting)}, which differ in the number of attention heads; "
        f"{name} was taken (attention_head_dim {config.attention_head_dim}): pass family= to decide"
        if unsure
        else None,
    )


def _width(shapes: NetworkShapes, module: str) -> int | None:
    """How wide a linear layer's input is; None where there is nothing of such a layer."""
    return shapes.axes(f"{module}.weight", 2)[1] if module in shapes.modules else None


def _check_levels(shapes: NetworkShapes) -> None:
    down, up = (
        how_many(f"{blocks}.{{}}", shapes.modules) for blocks in ("down_blocks", "up_blocks")
    )
    if not down or down != up:
        raise shapes.mismatch(
            "the U-Net is incomplete",
            expected="a way down and a way up with as many levels each",
            got=f"{down} levels down, {up} up",
            hint="load a file that holds the whole U-Net",
        )


def _levels(shapes: NetworkShapes, blocks: str) -> tuple[int, ...]:
    """Channels of each block, in the order of the blocks, as far as they follow each other."""
    levels = range(how_many(f"{blocks}.{{}}", shapes.modules))
    return tuple(shapes.axes(f"{blocks}.{i}.resnets.0.conv1.weight", 4)[0] for i in levels)


@dataclass(frozen=True)
class _Depths:
    """How many blocks each transformer has: of each level, of each layer; empty where a level has
    no transformers. ``mid``: likewise, of the middle, with ``mid_type``."""

    layers: tuple[int, ...]
    down: tuple[tuple[int, ...], ...]
    up: tuple[tuple[int, ...], ...]
    mid: tuple[int, ...]
    mid_type: str | None

    @staticmethod
    def read(shapes: NetworkShapes, levels: int) -> _Depths:
        layers, up_layers = (
            tuple(how_many(f"{way}.{i}.resnets.{{}}", shapes.modules) for i in range(levels))
            for way in ("down_blocks", "up_blocks")
        )
        if up_layers != tuple(n + 1 for n in layers[::-1]):
            raise shapes.mismatch(
                "the way up does not match the way down",
                expected=f"{[n + 1 for n in layers[::-1]]} ResNet blocks up, level by level",
                got=list(up_layers),
                hint="load a file that holds the whole U-Net",
            )
        mid = _transformers(shapes, "mid_block", 1)
        down = tuple(_transformers(shapes, f"down_blocks.{i}", n) for i, n in enumerate(layers))
        if mid and down[-1] and mid[0] != down[-1][0]:
            raise shapes.mismatch(
                "the middle's transformer is of another depth than the last level's, which "
                "diffusers' UNet2DConditionModel cannot represent",
                expected=f"{down[-1][0]} blocks",
                got=f"{mid[0]} blocks",
                hint="run it with the code that it was trained with",
            )
        return _Depths(
            layers=layers,
            down=down,
            up=tuple(_transformers(shapes, f"up_blocks.{i}", n) for i, n in enumerate(up_layers)),
            mid=mid,
            mid_type=CROSS_MID if mid else MID if "mid_block" in shapes.modules else None,
        )

    @property
    def attends(self) -> tuple[bool, ...]:
        """Of each level, whether any transformer stands there; the middle is of the last."""
        *levels, last = (bool(d or u) for d, u in zip(self.down, self.up[::-1], strict=True))
        return (*levels, last or bool(self.mid))

    @property
    def per_block(self) -> int | tuple[Depths, ...]:
        known = {d for depths in (*self.down, *self.up, self.mid) for d in depths}
        if len(known) < 2:
            return known.pop() if known else 1
        # where nothing tells: 1, as SDXL's config has it
        spare = (1,) * (len(self.down) - 1) + (self.mid[0] if self.mid else 1,)
        if not self._mirrored:
            return tuple(d or one for d, one in zip(self.down, spare, strict=True))
        return tuple(
            _short(down or up) if down or up else one
            for down, up, one in zip(self.down, self.up[::-1], spare, strict=True)
        )

    @property
    def reverse_per_block(self) -> tuple[Depths, ...] | None:
        return None if self._mirrored else tuple(depths or 1 for depths in self.up)

    @property
    def _mirrored(self) -> bool:
        """Whether one number for each level says it all."""
        return all(
            len({*down, *up}) <= 1 for down, up in zip(self.down, self.up[::-1], strict=True)
        )


def _transformers(shapes: NetworkShapes, block: str, layers: int) -> tuple[int, ...]:
    """Blocks of each layer's transformer; empty without transformers."""
    there = [f"{block}.attentions.{i}" in shapes.modules for i in range(layers)]
    if any(there) and not all(there):
        raise shapes.mismatch(
            f"a transformer is missing in {block}",
            expected=f"{layers} transformers, one behind each ResNet block, or none",
            got=f"{sum(there)}",
        )
    return tuple(
        how_many(f"{block}.attentions.{i}.transformer_blocks.{{}}", shapes.modules)
        for i in range(layers)
        if there[i]
    )


def _context_width(shapes: NetworkShapes) -> int | None:
    names = [name for name in shapes if name.endswith("attn2.to_k.weight")]
    widths = {shapes.axes(name, 2)[1] for name in names}
    if len(widths) > 1:
        raise shapes.mismatch(
            "the transformers read texts of different widths",
            expected="one width",
            got=sorted(widths),
        )
    return widths.pop() if widths else None


def _only_cross(
    shapes: NetworkShapes, channels: tuple[int, ...], context: int | None, family: str
) -> bool | tuple[bool, ...]:
    """Of each level, whether its blocks' first attention reads the text as well."""
    # where the text is as wide as the map, or there is no transformer, shapes do not tell: the x4
    # upscaler has no self-attention but on its last level
    upscaler = family == "x4-upscaler"
    result = [upscaler and level < len(channels) - 1 for level in range(len(channels))]
    for name in shapes:
        match = re.fullmatch(r"(down|up)_blocks\.([0-9]{1,4})\..+\.attn1\.to_k\.weight", name)
        if match is None:
            continue
        inner, width = shapes.axes(name, 2)
        level = int(match[2]) if match[1] == "down" else len(channels) - 1 - int(match[2])
        # what is of no level is told apart as unexpected, once the network is built
        if context != inner and 0 <= level < len(channels):
            result[level] = width == context
    return tuple(result) if any(result) else False


def _heads(channels: tuple[int, ...], facts: UNetFacts) -> int | tuple[int, ...]:
    if facts.head_channels is None:
        return facts.heads or 1
    return tuple(max(1, count // facts.head_channels) for count in channels)


def _family(
    shapes: NetworkShapes, linear: bool, added: int | None, context: int | None
) -> tuple[str, str, list[str]]:
    """The family, what decided it, and all families that the shapes allow."""
    inputs = shapes.axes("conv_in.weight", 4)[1]
    if added is not None:
        # the refiner embeds five numbers beside 1280 channels of text, SDXL six
        refiner = added == 1280 + 5 * ADDED_TIME_DIM or context == 1280
        name = "sdxl-refiner" if refiner else "sdxl"
        return name, f"text and sizes {added} wide beside the time", ["sdxl", "sdxl-refiner"]
    if context is None:
        return "sd1", "no transformers", list(UNET_FACTS)
    if not linear:
        kinds = {9: " (inpainting)", 8: " (InstructPix2Pix)"}
        return (
            "sd1",
            f"proj_in is a convolution; {inputs} channels in{kinds.get(inputs, '')}",
            ["sd1"],
        )
    fitting = ["sd2", "x4-upscaler"]
    if inputs == 7 and "class_embedding.weight" in shapes:
        return "x4-upscaler", "7 channels in and a list of class embeddings", fitting
    return "sd2", "proj_in is linear", fitting


def _short(values: tuple[int, ...]) -> Any:
    """One number where all are the same."""
    return values[0] if len(set(values)) == 1 else values
