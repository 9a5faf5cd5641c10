"""The configs of U-Nets of every family, smaller versions of them, sdconv's and diffusers' networks
of a config, and inputs for them."""

from __future__ import annotations

import copy
import pickle
from functools import lru_cache
from typing import Any

import diffusers
import torch
from helpers import seeded
from torch import Tensor

from sdconv.config import UNet2DConditionConfig
from sdconv.integrations.diffusers import UNet2DConditionModel

CROSS4 = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
SD1: dict[str, Any] = {**CROSS4, "cross_attention_dim": 768, "attention_head_dim": 8}
SD2: dict[str, Any] = {
    **CROSS4,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SMALL: dict[str, Any] = {
    "block_out_channels": (64, 128, 192),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
    "cross_attention_dim": 48,
}

# the published configs, where they differ from diffusers' defaults
FAMILIES: dict[str, dict[str, Any]] = {
    "SD1": SD1,
    "SD1 inpainting": {**SD1, "in_channels": 9},
    "InstructPix2Pix": {**SD1, "in_channels": 8},
    "LCM": {**SD1, "time_cond_proj_dim": 256},
    "SD2": SD2,
    "SD2 unCLIP": {
        **SD2,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 2048,
    },
    "SDXL": SDXL,
    "SDXL refiner": {
        **CROSS4,
        "block_out_channels": (384, 768, 1536, 1536),
        "down_block_types": (
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 4,
        "attention_head_dim": (6, 12, 24, 24),
        "cross_attention_dim": 1280,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2560,
    },
    "SSD-1B": {
        **SDXL,
        "transformer_layers_per_block": (1, (2, 2), (4, 4)),
        "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
        "mid_block_type": "UNetMidBlock2D",
    },
    "Segmind Vega": {
        **SDXL,
        "transformer_layers_per_block": (1, 1, 2),
        "mid_block_type": "UNetMidBlock2D",
    },
    "KOALA 700M": {
        **SDXL,
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2, 5),
        "mid_block_type": None,
    },
    "tiny SD": {
        **SD1,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 1,
        "mid_block_type": None,
    },
    "small SD": {**SD1, "layers_per_block": 1, "mid_block_type": "UNetMidBlock2D"},
    "x4 upscaler": {
        "in_channels": 7,
        "block_out_channels": (256, 512, 512, 1024),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
        "only_cross_attention": (True, True, True, False),
        "attention_head_dim": 8,
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "num_class_embeds": 1000,
    },
    "first attention on the text": {
        **SD1,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 1,
        "only_cross_attention": (True, False, False),
        "mid_block_type": None,
    },
    "uneven layers": {**SMALL, "layers_per_block": (1, 2, 3), "attention_head_dim": 8},
    "uneven depths": {
        **SMALL,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "transformer_layers_per_block": (3, 1, 2),
    },
    "one level": {
        "block_out_channels": (64,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "cross_attention_dim": 32,
        "time_embedding_dim": 128,
    },
    "no transformers": {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "mid_block_type": "UNetMidBlock2D",
    },
}


def small(family: str) -> dict[str, Any]:
    """The family's config with few channels, prompt embeddings of a width that no layer has, and at
    most three blocks in a transformer."""
    config = dict(FAMILIES[family])
    for name in ("transformer_layers_per_block", "reverse_transformer_layers_per_block"):
        if name in config:
            config[name] = fewer(config[name])
    levels = len(config["down_block_types"])
    linear = config.get("use_linear_projection") and config.get("num_class_embeds") is None
    config |= {
        "block_out_channels": (32, 64, 96, 96)[:levels] if levels > 1 else (64,),
        "attention_head_dim": (1, 2, 3, 3)[:levels] if linear else 8,
        "cross_attention_dim": 24,
    }
    if "addition_embed_type" in config:
        config["projection_class_embeddings_input_dim"] = TEXT + 6 * 256
    if "class_embed_type" in config:
        config["projection_class_embeddings_input_dim"] = IMAGE
    return config


def smallest(family: str) -> dict[str, Any]:
    """The family's kinds of modules, each as few times as possible."""
    config = small(family) | {"layers_per_block": 1, "transformer_layers_per_block": 1}
    return config | {"reverse_transformer_layers_per_block": None}


def fewer(depth: Any) -> Any:
    """Smaller transformer depths; depths that differ stay different."""
    if isinstance(depth, tuple):
        return tuple(map(fewer, depth))
    return {4: 2, 5: 2, 10: 3}.get(depth, depth)


# widths of SDXL's pooled prompt embedding and of unCLIP's image embedding in the small networks
TEXT, IMAGE = 16, 40


def peer_of(config: dict[str, Any]) -> diffusers.UNet2DConditionModel:
    """diffusers' network of a config, on the meta device."""
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(**config)


def on_meta(config: dict[str, Any]) -> UNet2DConditionModel:
    """sdconv's network of a config, on the meta device."""
    return _with_config(peer_of(config).config)


def _with_config(content: Any) -> UNet2DConditionModel:
    return copy.deepcopy(_on_meta(pickle.dumps(dict(content))))


@lru_cache(maxsize=6)
def _on_meta(content: bytes) -> UNet2DConditionModel:
    with torch.device("meta"):
        config = UNet2DConditionConfig.from_json(pickle.loads(content), "config")
        return UNet2DConditionModel(config)


def theirs(config: dict[str, Any], seed: int = 0) -> diffusers.UNet2DConditionModel:
    """diffusers' network with seeded weights, in eval mode."""
    return copy.deepcopy(_theirs(pickle.dumps(config), seed))


@lru_cache(maxsize=6)  # a copy takes less time than a new one
def _theirs(config: bytes, seed: int) -> diffusers.UNet2DConditionModel:
    network = peer_of(pickle.loads(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    network.load_state_dict(seeded.weights(shapes, seed), assign=True)
    return network.eval()


def ours(peer: diffusers.UNet2DConditionModel) -> UNet2DConditionModel:
    """sdconv's network with the config of diffusers' and a copy of its weights."""
    network = _with_config(peer.config)
    state = {name: tensor.clone() for name, tensor in peer.state_dict().items()}
    network.load_state_dict(state, assign=True)
    return network.eval()


def inputs(
    config: Any, batch: int = 2, size: tuple[int, int] = (8, 12), seed: int = 1
) -> tuple[Any, ...]:
    """Positional arguments for a network of this config, up to ``added_cond_kwargs``."""
    torch.manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape)

    labels: Tensor | None = None
    if config["class_embed_type"] is not None:
        labels = noise(config["projection_class_embeddings_input_dim"])
    elif config["num_class_embeds"] is not None:
        labels = torch.randint(config["num_class_embeds"], (batch,))
    guidance = config["time_cond_proj_dim"]
    added = None
    if config["addition_embed_type"] is not None:
        added = {"text_embeds": noise(TEXT), "time_ids": 1000 * torch.rand(batch, 6)}
    return (
        noise(config["in_channels"], *size),
        torch.linspace(999, 13, batch),
        noise(7, config["cross_attention_dim"]),
        labels,
        None if guidance is None else noise(guidance),
        None,
        None,
        added,
    )
