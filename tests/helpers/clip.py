"""A small CLIP text encoder's weights, by transformers' names."""

from __future__ import annotations

from helpers import seeded
from torch import Tensor

PREFIX = "cond_stage_model.transformer."
LAYER = "text_model.encoder.layers.0.self_attn.q_proj"


def text_encoder(prefix: str = PREFIX, seed: int = 0, width: int = 32) -> dict[str, Tensor]:
    """Seeded weights of one layer."""
    inner = 2 * width
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (50, width),
        "embeddings.position_embedding.weight": (7, width),
        "final_layer_norm.weight": (width,),
        "final_layer_norm.bias": (width,),
    }
    layer = "encoder.layers.0."
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes[f"{layer}self_attn.{name}.weight"] = (width, width)
        shapes[f"{layer}self_attn.{name}.bias"] = (width,)
    for name, sides in {"fc1": (inner, width), "fc2": (width, inner)}.items():
        shapes[f"{layer}mlp.{name}.weight"] = sides
        shapes[f"{layer}mlp.{name}.bias"] = sides[:1]
    for name in ("layer_norm1", "layer_norm2"):
        shapes |= {f"{layer}{name}.{tail}": (width,) for tail in ("weight", "bias")}
    drawn = seeded.weights({f"text_model.{name}": shape for name, shape in shapes.items()}, seed)
    return {prefix + name: tensor for name, tensor in drawn.items()}
