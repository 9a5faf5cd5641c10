"""Infers a U-Net's config from its shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sdconv.checkpoint.identify.metadata import family_in
from sdconv.checkpoint.identify.shapes import (
    BY_CALLER,
    InferredConfig,
    NetworkShapes,
    collapsed,
)
from sdconv.checkpoint.keys.prefixes import how_many
from sdconv.config import UNet2DConditionConfig
from sdconv.config.facts import ADDED_TIME_DIM, NORM_NUM_GROUPS, family_of_text
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


def read_unet(
    shapes: NetworkShapes, metadata: Mapping[str, str], family: str | None = None
) -> InferredConfig:
    """The config of a U-Net.

    Args:
        shapes: of its tensors.
        metadata: the file's own, which may contradict them.
        family: a key of ``UNET_FACTS``, if the caller knows it.

    Raises:
        WeightsMismatchError: a part is missing, or laid out as diffusers' class cannot be.
        InputError: the family does not fit.
    """
    _check_levels(shapes)
    channels = shapes.block_channels("down_blocks")
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
        name, evidence = family, BY_CALLER
    said = family_in(metadata)
    if family is None and said and said in fitting and context and _is_unknown(context, added):
        name, evidence = said, f"its metadata; {evidence}"
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
        layers_per_block=collapsed(depths.layers),
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
    guess: str | None = None
    open_to: tuple[str, ...] = ()
    if family is None:
        if facts.head_channels and any(c % facts.head_channels for c in split):
            open_to = tuple(dict.fromkeys((name, *fitting)))
        elif _is_unknown_width(config) and name != said:
            others = [one for one in fitting if one != "x4-upscaler" or inputs == 7]
            open_to = tuple(dict.fromkeys((name, *others)))
        elif said is not None and _differ(said, name, context):
            open_to = (name, said)
            guess = (
                f"is of {name} ({evidence}), but the metadata says {said}; {name} was taken "
                f"({_heads_of(config)}): pass family= to decide"
            )
    if open_to:
        config = config.left_open(open_to)
        guess = guess or open_unet(config)
    return InferredConfig(
        config=config, family=name, evidence=evidence, open_to=open_to, guess=guess
    )


def open_unet(config: UNet2DConditionConfig) -> str:
    """The doubt about a U-Net's family, in words that follow the component's name."""
    families = " or ".join(config.open_to)
    doubt = f"could be of {families}, which differ in the number of attention heads"
    if _is_unknown_width(config):
        doubt = (
            f"reads prompt embeddings of width {config.cross_attention_dim}, unlike any known "
            f"family, which leaves the number of attention heads open: it {doubt}"
        )
    return f"{doubt}; {config.open_to[0]} was taken ({_heads_of(config)}): pass family= to decide"


def _is_unknown_width(config: UNet2DConditionConfig) -> bool:
    """Whether the width of the prompt embedding, which decides the heads, is of no known model. An
    added embedding decides them too, and without transformers there are none."""
    return (
        any(config.attends)
        and config.num_class_embeds is None
        and isinstance(config.cross_attention_dim, int)
        and _is_unknown(config.cross_attention_dim, config.addition_embed_type)
    )


def _is_unknown(context: int, added: object) -> bool:
    return added is None and family_of_text(context, added=False) is None


def _heads_of(config: UNet2DConditionConfig) -> str:
    return f"attention_head_dim {config.attention_head_dim}"


def _differ(said: str, name: str, context: int | None) -> bool:
    """Whether metadata that names a family contradicts the one that the shapes show."""
    if context is None or said == name:
        return False
    one, other = UNET_FACTS.get(said), UNET_FACTS[name]
    return one is None or (one.heads, one.head_channels) != (other.heads, other.head_channels)


def _width(shapes: NetworkShapes, module: str) -> int | None:
    """The width of a linear layer's input; None if there is no such layer."""
    return shapes.axes(f"{module}.weight", 2)[1] if module in shapes.modules else None


def _check_levels(shapes: NetworkShapes) -> None:
    down, up = (
        how_many(f"{blocks}.{{}}", shapes.modules) for blocks in ("down_blocks", "up_blocks")
    )
    if not down or down != up:
        raise shapes.mismatch(
            "the U-Net is incomplete",
            expected="a down path and an up path with the same number of levels",
            got=f"{down} levels down, {up} up",
            hint="load a file with the whole U-Net",
        )


@dataclass(frozen=True)
class _Depths:
    """Transformer depths: the number of blocks in each transformer, by level and layer; empty for a
    level without transformers. ``mid``, ``mid_type``: the mid block's depth, and its type."""

    layers: tuple[int, ...]
    down: tuple[tuple[int, ...], ...]
    up: tuple[tuple[int, ...], ...]
    mid: tuple[int, ...]
    mid_type: str | None

    @staticmethod
    def read(shapes: NetworkShapes, levels: int) -> _Depths:
        layers, up_layers = (
            tuple(how_many(f"{path}.{i}.resnets.{{}}", shapes.modules) for i in range(levels))
            for path in ("down_blocks", "up_blocks")
        )
        if up_layers != tuple(n + 1 for n in layers[::-1]):
            raise shapes.mismatch(
                "the up path does not match the down path",
                expected=f"{[n + 1 for n in layers[::-1]]} ResNet blocks up, level by level",
                got=list(up_layers),
                hint="load a file that holds the whole U-Net",
            )
        mid = _transformers(shapes, "mid_block", 1)
        down = tuple(_transformers(shapes, f"down_blocks.{i}", n) for i, n in enumerate(layers))
        if mid and down[-1] and mid[0] != down[-1][0]:
            raise shapes.mismatch(
                "the transformers of the mid block and of the last level differ in depth, which "
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
        """For each level, whether it has a transformer; the mid block counts as the last level."""
        *levels, last = (bool(d or u) for d, u in zip(self.down, self.up[::-1], strict=True))
        return (*levels, last or bool(self.mid))

    @property
    def per_block(self) -> int | tuple[Depths, ...]:
        known = {d for depths in (*self.down, *self.up, self.mid) for d in depths}
        if len(known) < 2:
            return known.pop() if known else 1
        # 1 where nothing shows the depth, as in SDXL's config
        spare = (1,) * (len(self.down) - 1) + (self.mid[0] if self.mid else 1,)
        if not self._mirrored:
            return tuple(d or one for d, one in zip(self.down, spare, strict=True))
        return tuple(
            collapsed(down or up) if down or up else one
            for down, up, one in zip(self.down, self.up[::-1], spare, strict=True)
        )

    @property
    def reverse_per_block(self) -> tuple[Depths, ...] | None:
        return None if self._mirrored else tuple(depths or 1 for depths in self.up)

    @property
    def _mirrored(self) -> bool:
        """Whether all transformers of a level, down and up, have the same depth."""
        return all(
            len({*down, *up}) <= 1 for down, up in zip(self.down, self.up[::-1], strict=True)
        )


def _transformers(shapes: NetworkShapes, block: str, layers: int) -> tuple[int, ...]:
    """The number of blocks in each layer's transformer; empty without transformers."""
    there = [f"{block}.attentions.{i}" in shapes.modules for i in range(layers)]
    if any(there) and not all(there):
        raise shapes.mismatch(
            f"a transformer is missing in {block}",
            expected=f"{layers} transformers, one after each ResNet block, or none",
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
            "the transformers read prompt embeddings of different widths",
            expected="one width",
            got=sorted(widths),
            hint="run it with the code that it was trained with",
        )
    return widths.pop() if widths else None


def _only_cross(
    shapes: NetworkShapes, channels: tuple[int, ...], context: int | None, family: str
) -> bool | tuple[bool, ...]:
    """For each level, whether its blocks' first attention reads the prompt embedding too."""
    # Shapes do not show it where the embedding is as wide as the feature map, or where there is no
    # transformer. The x4 upscaler has self-attention only on its last level.
    upscaler = family == "x4-upscaler"
    result = [upscaler and level < len(channels) - 1 for level in range(len(channels))]
    for name in shapes:
        match = re.fullmatch(r"(down|up)_blocks\.([0-9]{1,4})\..+\.attn1\.to_k\.weight", name)
        if match is None:
            continue
        inner, width = shapes.axes(name, 2)
        level = int(match[2]) if match[1] == "down" else len(channels) - 1 - int(match[2])
        # a name outside all levels is found to be unexpected once the network is built
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
    """The family, what decided it, and all families that the caller may say instead."""
    inputs = shapes.axes("conv_in.weight", 4)[1]
    if added is not None:
        # next to 1280 channels of text, the refiner embeds five numbers and SDXL six
        refiner = added == 1280 + 5 * ADDED_TIME_DIM or context == 1280
        name = "sdxl-refiner" if refiner else "sdxl"
        return (
            name,
            f"added embedding (text and sizes) of width {added}",
            [*("sdxl", "sdxl-refiner", "playground-v2.5")],
        )
    if context is None:
        return "sd1", "no transformers", list(UNET_FACTS)
    kinds = {9: " (inpainting)", 8: " (InstructPix2Pix)"}
    said = f"{inputs} channels in{kinds.get(inputs, '')}"
    fitting = ["sd1", "sd2", "x4-upscaler"]
    if inputs == 7 and "class_embedding.weight" in shapes:
        return "x4-upscaler", "7 channels in and a list of class embeddings", fitting
    # Whether proj_in is linear or a 1x1 convolution does not decide: converters write either.
    name = family_of_width(context, linear)
    if family_of_text(context, added=False):
        evidence = f"prompt embeddings of width {context}; {said}"
        return name, evidence, fitting if name in fitting else list(UNET_FACTS)
    how = "linear" if linear else "a convolution"
    evidence = (
        f"prompt embeddings of width {context} of no known family, and proj_in is {how}; {said}"
    )
    return name, evidence, fitting


def family_of_width(context: int | None, linear: bool) -> str:
    """The family of a U-Net without an added embedding.

    Args:
        context: the width of the prompt embedding that it reads; None without transformers.
        linear: whether its ``proj_in`` is linear, which decides only for a width that no published
            model has: SD1's own code writes convolutions, SD2's linear layers.
    """
    return family_of_text(context or 768, added=False) or ("sd2" if linear else "sd1")
