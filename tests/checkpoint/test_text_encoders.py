"""Where a folder's text encoder goes in an original file, and the numbers of its positions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import seeded, unets
from helpers.slow import first_of
from helpers.weight_files import convert
from safetensors.torch import load_file, save_file
from torch import Tensor

SD1, SD2 = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."


def text_encoder() -> dict[str, Tensor]:
    """The tensors of a CLIP text encoder of one layer, by transformers' names."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (9, 8),
        "embeddings.position_embedding.weight": (77, 8),
        "final_layer_norm.weight": (8,),
        "final_layer_norm.bias": (8,),
    }
    layer = "encoder.layers.0."
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= {f"{layer}self_attn.{name}.weight": (8, 8), f"{layer}self_attn.{name}.bias": (8,)}
    for name, shape in (("mlp.fc1", (16, 8)), ("mlp.fc2", (8, 16))):
        shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
    for name in ("layer_norm1", "layer_norm2"):
        shapes |= {f"{layer}{name}.weight": (8,), f"{layer}{name}.bias": (8,)}
    return {f"text_model.{name}": tensor for name, tensor in seeded.weights(shapes).items()}


def pipeline(folder: Path, width: int, linear: bool, positions: Tensor | None) -> Path:
    config = {
        **unets.smallest("SD1"),
        "block_out_channels": (64,) * 4,
        "cross_attention_dim": width,
        "use_linear_projection": linear,
    }
    shapes = {k: tuple(v.shape) for k, v in unets.on_meta(config).state_dict().items()}
    text = text_encoder()
    if positions is not None:
        text["text_model.embeddings.position_ids"] = positions
    for name, tensors in (("unet", seeded.weights(shapes)), ("text_encoder", text)):
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "model.safetensors")
    return folder


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("width", "prefix"), [(768, SD1), (1024, SD2)])
def test_the_width_decides_the_place(width: int, prefix: str, linear: bool, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    convert(pipeline(tmp_path / "p", width, linear, None), out, "original")
    written = load_file(out)
    assert any(name.startswith(prefix) for name in written)
    other = SD2 if prefix is SD1 else SD1
    assert not any(name.startswith(other) for name in written)


def test_the_caller_decides_the_place(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "p", 768, False, None)
    convert(folder, tmp_path / "m.safetensors", "original", family="sd2")
    assert any(name.startswith(SD2) for name in load_file(tmp_path / "m.safetensors"))


RIGHT = torch.arange(77)[None]


def spoilt(dtype: torch.dtype = torch.float32) -> Tensor:
    """As merging leaves them: 40 has become 40.9999 or so."""
    return (RIGHT.float() + torch.where(RIGHT % 2 == 0, -1e-4, 1e-4)).to(dtype)


@pytest.mark.parametrize("dtype", first_of([torch.float16, None]))
@pytest.mark.parametrize(
    ("positions", "right"),
    [
        (RIGHT, RIGHT),
        (RIGHT.int(), RIGHT.int()),
        (spoilt(), RIGHT),
        (RIGHT.half(), RIGHT),
        (spoilt(torch.float64), RIGHT),
        (RIGHT.float() + 3, None),
        (torch.full((1, 77), torch.nan), None),
    ],
)
def test_positions_are_integers_or_left_out(
    positions: Tensor, right: Tensor | None, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    folder = pipeline(tmp_path / "p", 768, False, positions)
    convert(folder, tmp_path / "m.safetensors", "original", dtype=dtype)
    name = f"{SD1}embeddings.position_ids"
    written = load_file(tmp_path / "m.safetensors")
    assert (name in written) == (right is not None)
    if right is not None:
        assert written[name].dtype == right.dtype
        assert torch.equal(written[name], right)
