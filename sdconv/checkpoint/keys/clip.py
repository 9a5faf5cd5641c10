"""The names of CLIP text encoders: transformers' layout, and OpenCLIP's in SD2 and SDXL files.

OpenCLIP keeps the three projections of an attention as one matrix, q above k above v, and the
text projection transposed. Source: ``open_clip/transformer.py``; the inverse is
``convert_open_clip_checkpoint`` in diffusers' ``loaders/single_file_utils.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from sdconv.checkpoint.keys.keymap import NUMBER, KeyMap

# From transformers' names to OpenCLIP's. The way back is not a matter of names: three projections
# share one.
_KEYS = KeyMap(
    (
        ("embeddings.token_embedding.weight", "token_embedding.weight"),
        ("embeddings.position_embedding.weight", "positional_embedding"),
        ("encoder.layers.{layer}.{part}.{tail}", "transformer.resblocks.{layer}.{part}.{tail}"),
        (
            "encoder.layers.{layer}.self_attn.{qkv}_proj.{tail}",
            "transformer.resblocks.{layer}.attn.in_proj_{tail}",
        ),
        ("final_layer_norm.{tail}", "ln_final.{tail}"),
        ("text_projection.weight", "text_projection"),
    ),
    {
        "layer": NUMBER,
        "part": {
            "layer_norm1": "ln_1",
            "layer_norm2": "ln_2",
            "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
            "self_attn.out_proj": "attn.out_proj",
        },
        "qkv": "q|k|v",
        "tail": "weight|bias",
    },
)
POSITIONS = "embeddings.position_ids"
"""The end of the name of the numbers 0, 1, 2, ..., which old versions of transformers saved."""

TRANSPOSED = "text_projection"
"""The one matrix of OpenCLIP that is the transpose of transformers'."""


def long_name(name: str) -> str:
    """A text encoder's name with ``text_model.``, which transformers omits since version 5.6."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def open_clip_names(names: Collection[str]) -> dict[str, tuple[str, ...]] | None:
    """OpenCLIP's names -> the tensors of transformers' layout that each is made of, in the order of
    their rows; None if a name is not a CLIP text encoder's, or a projection is missing."""
    made: dict[str, list[str]] = {}
    for name in sorted(names):
        short = long_name(name).removeprefix("text_model.")
        if short == POSITIONS:
            continue
        if (target := _KEYS.original(short)) is None:
            return None
        made.setdefault(target, []).append(name)
    for target, pieces in made.items():
        # alphabetically, k comes before q
        pieces.sort(key=lambda name: "qkv".find(name.rpartition("_proj.")[0][-1:]))
        if len(pieces) != (3 if ".in_proj_" in target else 1):
            return None
    return {target: tuple(pieces) for target, pieces in made.items()} or None


_IN_PROJECTION = re.compile(
    rf"transformer\.resblocks\.(?P<layer>{NUMBER})\.attn\.in_proj_(?P<tail>weight|bias)"
)


def clip_names(names: Collection[str]) -> dict[str, tuple[str, int | None, bool]]:
    """transformers' names, with ``text_model.``, of the tensors of a text encoder in either layout.

    Returns:
        Each with its name in the file, the third of that tensor's rows that it is (None for the
        whole), and whether it is transposed there. Names of neither layout are left out.
    """
    result: dict[str, tuple[str, int | None, bool]] = {}
    for name in names:
        if match := _IN_PROJECTION.fullmatch(name):
            attention = f"text_model.encoder.layers.{match['layer']}.self_attn"
            for third, letter in enumerate("qkv"):
                result[f"{attention}.{letter}_proj.{match['tail']}"] = (name, third, False)
        elif (own := _KEYS.canonical(name)) is not None:
            result[long_name(own)] = (name, None, name == TRANSPOSED)
        elif _KEYS.original(long_name(name).removeprefix("text_model.")) is not None:
            result[long_name(name)] = (name, None, False)
    return result


def open_clip_name(name: str) -> str | None:
    """OpenCLIP's name of a tensor by transformers'; None if it has none of its own."""
    short = long_name(name).removeprefix("text_model.")
    return None if "self_attn." in short and "out_proj" not in short else _KEYS.original(short)
