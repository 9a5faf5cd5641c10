"""Which text encoder, and which of its layers, a key of a LoRA file names.

Files spell a text encoder in many ways, in transformers' or in OpenCLIP's layout: ``lora_te_...``,
``lora_te1_...`` and ``lora_te2_...`` (kohya's), ``text_encoder_2.text_model...`` (PEFT's and
diffusers'), ``lycoris_text_model_...``, ``text_encoders.clip_g.transformer...``,
``cond_stage_model.model...``, ``conditioner.embedders.1.model...``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from sdconv.checkpoint.keys.clip import open_clip_name

# in the spelling with underscores
_START = re.compile(
    r"(?:base_model_model_)?(?:lora_|lycoris_)?"
    r"(?:te(?P<te>\d*)_|text_encoders?_(?:(?P<number>\d)_)?|cond_stage_model_"
    r"|conditioner_embedders_(?P<embedder>\d)_)?"
    r"(?:clip_(?P<clip>[lgh])_)?"
)
# other text encoders
_OTHERS = re.compile(r"(?:lora_|lycoris_)?(?:text_encoders?_)?(?:t5|prior_te_)")
# wrappers that may follow, in any number
_WRAPPERS = ("transformer_", "model_")
FIRST, SECOND = "text_encoder", "text_encoder_2"


def text_layer_spellings(layers: Collection[str]) -> dict[str, str]:
    """Every spelling of a text encoder's layers, with underscores, without prefixes.

    Args:
        layers: transformers' names, with ``text_model.``.

    Returns:
        transformers' and OpenCLIP's names -> transformers' name.
    """
    table: dict[str, str] = {}
    for layer in layers:
        names = [layer, layer.removeprefix("text_model.")]
        if (other := open_clip_name(f"{layer}.weight")) is not None:
            names.append(other.removesuffix(".weight"))
        for name in names:
            table.setdefault(name.replace(".", "_"), layer)
    return table


def text_encoder_of(stem: str) -> str | None:
    """The text encoder that a key begins with; None for one that is not CLIP's, such as T5's."""
    name = stem.replace(".", "_")
    match = _START.match(name)
    assert match is not None  # everything in it is optional
    if _OTHERS.match(name):
        return None
    if match["clip"] is not None:
        return SECOND if match["clip"] == "g" else FIRST
    number = match["te"] or match["number"]
    if match["embedder"] is not None:
        number = str(int(match["embedder"]) + 1)
    return {None: FIRST, "": FIRST, "1": FIRST, "2": SECOND}.get(number)


def text_layer(stem: str, spellings: Mapping[str, str]) -> str | None:
    """The layer that a key names, by transformers' name; None if the text encoder lacks it.

    Args:
        stem: the key without its role.
        spellings: as ``text_layer_spellings`` returns them.
    """
    name = stem.replace(".", "_")
    match = _START.match(name)
    assert match is not None
    rest = name[match.end() :]
    while rest not in spellings:
        wrapper = next((one for one in _WRAPPERS if rest.startswith(one)), None)
        if wrapper is None:
            return None
        rest = rest.removeprefix(wrapper)
    return spellings[rest]
