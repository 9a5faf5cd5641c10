"""LoRAs with seeded matrices for every layer, in the names of each kind of file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from helpers import pipelines
from helpers.numbers import error
from torch import Tensor, nn

from sdconv.checkpoint.keys.unet import keys_of_canonical

# by layer: down, up, alpha
Matrices = dict[str, tuple[Tensor, Tensor, float]]


def layers(model: nn.Module) -> dict[str, Tensor]:
    """The weights of linear layers and convolutions, by name."""
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def matrices(
    model: nn.Module, seed: int = 0, only: str = "", alpha: float | None = None
) -> Matrices:
    """A LoRA for every layer whose name matches ``only``, with ranks 2 to 4, alphas 1 and 2, and
    updates about as large as the weights."""
    random = torch.Generator().manual_seed(seed)
    lora: Matrices = {}
    for number, (name, weight) in enumerate(layers(model).items()):
        if re.search(only, name):
            rank = 2 + number % 3
            down = torch.randn(rank, *weight.shape[1:], generator=random)
            up = torch.randn(weight.shape[0], rank, *(1,) * (weight.ndim - 2), generator=random)
            lora[name] = (down / down[0].numel() ** 0.5, up, alpha or 1.0 + number % 2)
    return lora


def kohya(lora: Matrices, rename: Callable[[str], str] = str) -> dict[str, Tensor]:
    """A LoRA's tensors with kohya's names."""
    tensors: dict[str, Tensor] = {}
    for name, (down, up, alpha) in lora.items():
        layer = "lora_unet_" + rename(name).replace(".", "_")
        tensors[f"{layer}.lora_down.weight"] = down
        tensors[f"{layer}.lora_up.weight"] = up
        tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    return tensors


def dotted(lora: Matrices, form: str, alphas: bool = True) -> dict[str, Tensor]:
    """A LoRA's tensors with names of a form, where ``{}`` is the layer and ``[A|B]`` is A for the
    down matrix and B for the up matrix."""
    words = re.search(r"\[(\w+)\|(\w+)\]", form)
    assert words
    tensors: dict[str, Tensor] = {}
    for name, (down, up, alpha) in lora.items():
        for word, matrix in zip(words.groups(), (down, up), strict=True):
            tensors[form.replace(words[0], word).replace("{}", name)] = matrix
        if alphas:
            tensors[f"unet.{name}.alpha"] = torch.tensor(alpha)
    return tensors


def original_names(model: nn.Module) -> Callable[[str], str]:
    """A function from diffusers' name of a layer to its name in the original layout."""
    keys = keys_of_canonical(model.state_dict().keys())
    return lambda name: str(keys.original(f"{name}.weight")).removesuffix(".weight")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def largest_error(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest ``error`` of any tensor."""
    assert set(ours) == set(theirs)
    return max(error(ours[name], tensor) for name, tensor in theirs.items())


def fused(kind: str, tensors: dict[str, Tensor], scale: float, **given: Any) -> dict[str, Tensor]:
    """The U-Net's weights after diffusers and PEFT have loaded and fused a LoRA."""
    pipe = pipelines.pipeline(kind)
    pipe.load_lora_weights(dict(tensors), **given)
    pipe.fuse_lora(lora_scale=scale, components=["unet"])
    pipe.unload_lora_weights()
    return state(pipe.unet)
