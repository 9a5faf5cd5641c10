"""The U-Net's names in the original layout and in diffusers'.

The original numbers its blocks consecutively: ``input_blocks.0`` is the first convolution, followed
by every ResNet block and every downsampling convolution in turn; ``output_blocks.N`` is a ResNet
block, and the last one of a level also holds the upsampling convolution. Which ``N`` is which block
of which level depends on the number of layers in each level, so a key map is made for one
structure. Inside a transformer both layouts use the same names.

Source: ``ldm/modules/diffusionmodules/openaimodel.py``, ``UNetModel``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, count

from sdconv.checkpoint.keys.keymap import Fields, KeyMap, of_tensors
from sdconv.checkpoint.keys.prefixes import how_many, modules_of
from sdconv.config.facts import ADDED_TIME_DIM, FEWEST_ADDED_TIMES, UNCLIP_WIDTHS

# names of a ResNet block's layers: diffusers' -> the original's
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
MID_RESNETS: tuple[Pair, ...] = (
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.resnets.1", "middle_block.2"),
)
MID_TRANSFORMER: Pair = ("mid_block.attentions.0", "middle_block.1")
# What else is added to the time embedding. The original has one name for three things.
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

_FIELDS: Fields = {
    "resnet": RESNET_LEAVES,
    # a transformer's own modules, which both layouts call the same
    "transformer": r"norm|proj_in|proj_out|transformer_blocks\.[0-9]{1,4}\."
    r"(?:norm[123]|attn[12]\.to_(?:q|k|v|out\.0)|ff\.net\.(?:0\.proj|2))",
    "tail": "weight|bias",
}


def _unet_keys(
    layers: Sequence[int], up_attention: Sequence[bool], labels: Iterable[str]
) -> KeyMap:
    """The key map of a U-Net.

    Args:
        layers: ResNet blocks of each level on the down path.
        up_attention: for each level on the up path, whether its ResNet blocks have transformers;
            the original puts the upsampling convolution after them.
        labels: which of ``LABELS`` it has; more than one only in diffusers' layout.
    """
    rules = [
        *ENDS,
        *(pair for label in labels for pair in LABELS[label]),
        *_samplers(layers, up_attention),
    ]
    resnets = (*_blocks(layers, "resnets", 0), *MID_RESNETS)
    rules += [(f"{ours}.{{resnet}}", f"{original}.{{resnet}}") for ours, original in resnets]
    transformers = (*_blocks(layers, "attentions", 1), MID_TRANSFORMER)
    rules += [
        (f"{ours}.{{transformer}}", f"{original}.{{transformer}}")
        for ours, original in transformers
    ]
    return KeyMap(of_tensors(rules), _FIELDS)


def _blocks(layers: Sequence[int], kind: str, position: int) -> Iterator[Pair]:
    """The ResNet blocks or the transformers of the down path and of the up path.

    Args:
        kind: diffusers' name for the list of them.
        position: where the original's numbered blocks hold them.
    """
    numbers = count(1)
    for level, length in enumerate(layers):
        for layer in range(length):
            yield f"down_blocks.{level}.{kind}.{layer}", f"input_blocks.{next(numbers)}.{position}"
        next(numbers)  # the downsampling convolution's
    numbers = count(0)
    for level, length in enumerate(layers[::-1]):
        for layer in range(length + 1):
            yield f"up_blocks.{level}.{kind}.{layer}", f"output_blocks.{next(numbers)}.{position}"


def _samplers(layers: Sequence[int], up_attention: Sequence[bool]) -> Iterator[Pair]:
    """The convolutions between the levels."""
    number = 0
    for level, length in enumerate(layers[:-1]):
        number += length + 1
        yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
    number = -1
    for level, length in enumerate(layers[:0:-1]):
        number += length + 1
        position = 2 if up_attention[level] else 1
        yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{number}.{position}.conv"


def keys_of_canonical(names: Collection[str]) -> KeyMap:
    """The key map of the U-Net whose tensors have these names in diffusers' layout."""
    modules = modules_of(names)
    levels = range(how_many("down_blocks.{}.resnets.0", modules))
    return _unet_keys(
        layers=tuple(how_many(f"down_blocks.{i}.resnets.{{}}", modules) for i in levels),
        up_attention=tuple(f"up_blocks.{i}.attentions.0" in modules for i in levels),
        labels=tuple(
            label
            for label, ((module, _), *_) in LABELS.items()
            if any(f"{module}.{tail}" in names for tail in ("weight", "bias"))
        ),
    )


def keys_of_original(names: Collection[str], label_width: int | None = None) -> KeyMap:
    """The key map of the U-Net whose tensors have these names in the original layout.

    Args:
        names: of its tensors, without a prefix.
        label_width: the width of ``label_emb``'s input, if known.
    """
    modules, layers = modules_of(names), [0]
    for number in count(1):
        if f"input_blocks.{number}.0.op" in modules:
            layers.append(0)
        elif f"input_blocks.{number}.0" in modules:
            layers[-1] += 1
        else:
            break
    # the first block of each level on the up path, where a level has one ResNet block more
    firsts = accumulate((number + 1 for number in layers[:0:-1]), initial=0)
    labels: tuple[str, ...] = ()
    if "label_emb.weight" in names:
        labels = ("listed",)
    elif "label_emb.0.0" in modules:
        # SDXL's text and sizes, or unCLIP's image: only a U-Net with the latter has transformers of
        # one block each, and also at the first level
        deep = any("transformer_blocks.1." in name for name in names)
        is_added = deep or "input_blocks.1.1" not in modules or _holds_sizes(label_width)
        labels = ("added" if is_added else "projected",)
    return _unet_keys(
        layers=tuple(layers),
        up_attention=tuple(f"output_blocks.{n}.1.transformer_blocks" in modules for n in firsts),
        labels=labels,
    )


def _holds_sizes(label_width: int | None) -> bool:
    """Whether a width has room for SDXL's sizes, and is not one of unCLIP's."""
    return (
        label_width is not None
        and label_width > FEWEST_ADDED_TIMES * ADDED_TIME_DIM
        and label_width not in UNCLIP_WIDTHS
    )


def ema_name(name: str) -> str:
    """The name that Lightning's ``LitEma`` gives to a tensor's running average: it has no dots.

    Args:
        name: in the file, such as ``model.diffusion_model.out.2.weight``.
    """
    return "model_ema." + name.removeprefix("model.").replace(".", "")
