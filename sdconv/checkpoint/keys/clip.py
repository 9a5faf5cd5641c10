"""A text encoder's names in transformers' layout and in OpenCLIP's, which SD2 and SDXL files use.

OpenCLIP keeps the three projections of an attention as one matrix, q above k above v, and the
text projection transposed. Source: ``open_clip/transformer.py``; ``convert_open_clip_checkpoint``
in diffusers' ``loaders/single_file_utils.py`` is the way back.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

# transformers' module -> OpenCLIP's, outside the layers
_ENDS: Mapping[str, str] = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_PARTS: Mapping[str, str] = {
    "layer_norm1": "ln_1.",
    "layer_norm2": "ln_2.",
    "mlp.fc1": "mlp.c_fc.",
    "mlp.fc2": "mlp.c_proj.",
    "self_attn.out_proj": "attn.out_proj.",
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attn.in_proj_"),
}
# numbers from 0 up, which old versions of transformers saved
_COUNTS = "embeddings.position_ids"

TRANSPOSED = "text_projection"
"""OpenCLIP's one matrix that is the transpose of transformers'."""


def long_name(name: str) -> str:
    """A text encoder's name with the ``text_model.`` that transformers left out from version 5.6
    on."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def open_clip_names(names: Collection[str]) -> dict[str, tuple[str, ...]] | None:
    """OpenCLIP's name -> the tensors of transformers' layout that it is made of, in the order of
    its rows; None where a name is not a CLIP text encoder's, or a projection is missing."""
    made: dict[str, list[str]] = {}
    for name in sorted(names):
        short = long_name(name).removeprefix("text_model.")
        layer = _LAYER.fullmatch(short)
        if short == _COUNTS:
            continue
        if short in _ENDS:
            made.setdefault(_ENDS[short], []).append(name)
        elif layer is not None and layer[2] in _LAYER_PARTS:
            target = f"transformer.resblocks.{layer[1]}.{_LAYER_PARTS[layer[2]]}{layer[3]}"
            made.setdefault(target, []).append(name)
        else:
            return None
    for target, pieces in made.items():
        # in alphabetical order k stands before q
        pieces.sort(key=lambda name: "qkv".find(name.rpartition("_proj.")[0][-1:]))
        if len(pieces) != (3 if ".in_proj_" in target else 1):
            return None
    return {target: tuple(pieces) for target, pieces in made.items()} or None
