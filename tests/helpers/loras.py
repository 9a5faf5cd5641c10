"""LoRAs of every layer, with seeded matrices, in the names of those who write such files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from helpers import pipelines
from torch import Tensor, nn

from sdconv.checkpoint.keys.unet import keys_of_canonical

# a layer's matrices: down, up, alpha
Matrices = dict[str, tuple[Tensor, Tensor, float]]


def layers(model: nn.Module) -> dict[str, Tensor]:
    """Weights of linear layers and convolutions by their names."""
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def matrices(
    model: nn.Module, seed: int = 0, only: str = "", alpha: float | None = None
) -> Matrices:
    """A LoRA of every layer, of ranks 2 to 4 and alphas 1 and 2, as large as the weights."""
    random = torch.Generator().manual_seed(seed)
    made: Matrices = {}
    for number, (name, weight) in enumerate(layers(model).items()):
        if re.search(only, name):
            rank = 2 + number % 3
            down = torch.randn(rank, *weight.shape[1:], generator=random)
            up = torch.randn(weight.shape[0], rank, *(1,) * (weight.ndim - 2), generator=random)
            made[name] = (down / down[0].numel() ** 0.5, up, alpha or 1.0 + number % 2)
    return made


def kohya(made: Matrices, rename: Callable[[str], str] = str) -> dict[str, Tensor]:
    """With kohya's names."""
    tensors: dict[str, Tensor] = {}
    for name, (down, up, alpha) in made.items():
        layer = "lora_unet_" + rename(name).replace(".", "_")
        tensors[f"{layer}.lora_down.weight"] = down
        tensors[f"{layer}.lora_up.weight"] = up
        tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    return tensors


def dotted(made: Matrices, form: str, alphas: bool = True) -> dict[str, Tensor]:
    """With names of a form in which {} stands for the layer and [] for one of two words."""
    words = re.search(r"\[(\w+)\|(\w+)\]", form)
    assert words
    tensors: dict[str, Tensor] = {}
    for name, (down, up, alpha) in made.items():
        for word, matrix in zip(words.groups(), (down, up), strict=True):
            tensors[form.replace(words[0], word).replace("{}", name)] = matrix
        if alphas:
            tensors[f"unet.{name}.alpha"] = torch.tensor(alpha)
    return tensors


def of_original(model: nn.Module) -> Callable[[str], str]:
    """diffusers' name of a layer -> the original layout's."""
    keys = keys_of_canonical(model.state_dict().keys())
    return lambda name: str(keys.original(f"{name}.weight")).removesuffix(".weight")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def error(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest max|a-b| / max|b| of any tensor."""
    assert set(ours) == set(theirs)
    return max(float((ours[k] - v).abs().max() / v.abs().max()) for k, v in theirs.items())


def fused(kind: str, tensors: dict[str, Tensor], scale: float, **given: Any) -> dict[str, Tensor]:
    """The U-Net's weights after diffusers and PEFT have loaded a LoRA and fused it."""
    pipe = pipelines.pipeline(kind)
    pipe.load_lora_weights(dict(tensors), **given)
    pipe.fuse_lora(lora_scale=scale, components=["unet"])
    pipe.unload_lora_weights()
    return state(pipe.unet)
