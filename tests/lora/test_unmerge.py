"""Unmerging restores every bit, and merging changes the weights' values only."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pipelines, unets
from helpers.loras import assert_equal, fused, kohya, largest_error, layers, matrices, state
from helpers.versions import needs_diffusers_0_40
from torch import nn

import sdconv
from sdconv.errors import InputError


def test_several_are_unmerged_in_any_order(network: Any) -> None:
    network.half()
    before = state(network)
    first = kohya(matrices(network, 1))
    second = kohya(matrices(network, 2, only="down_blocks"))
    sdconv.merge_lora(network, second, 0.5)
    only_second = state(network)
    sdconv.unmerge_lora(network)
    assert_equal(network.state_dict(), before)

    one = sdconv.merge_lora(network, first)
    two = sdconv.merge_lora(network, second, 0.5)
    both = state(network)
    one.unmerge()
    assert_equal(network.state_dict(), only_second)
    three = sdconv.merge_lora(network, first)
    assert largest_error(network.state_dict(), both) < 1e-3
    sdconv.unmerge_lora(network, two)
    three.unmerge()
    assert_equal(network.state_dict(), before)
    for again in (one.unmerge, lambda: sdconv.unmerge_lora(network)):
        with pytest.raises(InputError, match="no LoRA to unmerge"):
            again()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_mapped_from_a_file(dtype: torch.dtype, network: Any, tmp_path: Path) -> None:
    path = tmp_path / "unet.safetensors"
    sdconv.save(network.to(dtype), path)
    content = path.read_bytes()
    mapped = sdconv.load(path)
    addresses = {name: weight.data_ptr() for name, weight in layers(mapped).items()}
    merged = sdconv.merge_lora(mapped, kohya(matrices(mapped)))
    assert all(weight.data_ptr() != addresses[name] for name, weight in layers(mapped).items())
    assert path.read_bytes() == content
    merged.unmerge()
    assert {name: weight.data_ptr() for name, weight in layers(mapped).items()} == addresses
    assert_equal(mapped.state_dict(), network.state_dict())


def test_after_a_change_of_dtype(network: Any) -> None:
    expected = {name: tensor.half() for name, tensor in state(network).items()}
    merged = sdconv.merge_lora(network, kohya(matrices(network)))
    network.half()
    merged.unmerge()
    assert_equal(network.state_dict(), expected)


def test_parameters_stay_the_same_objects(network: Any) -> None:
    before = list(network.parameters())
    merged = sdconv.merge_lora(network, kohya(matrices(network)))
    assert all(a is b for a, b in zip(before, network.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in before)
    network(*unets.inputs(network.config)).sample.sum().backward()
    assert all(weight.grad is not None for weight in layers(network).values())
    merged.unmerge()


def test_a_merged_network_can_be_garbage_collected() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    sdconv.merge_lora(
        model, {"a.lora_A.weight": torch.ones(1, 4), "a.lora_B.weight": torch.ones(4, 1)}
    )
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@needs_diffusers_0_40
def test_on_a_patched_network_of_diffusers_that_peft_wrapped() -> None:
    pipe = pipelines.pipeline("text")
    before = state(pipe.unet)
    tensors = kohya(matrices(pipe.unet, alpha=1.0))
    expected = fused("text", tensors, 1.0)
    sdconv.apply_patch(pipe)
    other = matrices(pipe.unet, 7, only="attn|conv1", alpha=1.0)
    pipe.load_lora_weights(kohya(other), adapter_name="other")
    merged = sdconv.merge_lora(pipe.unet, tensors)
    pipe.unload_lora_weights()
    sdconv.remove_patch(pipe)
    assert largest_error(pipe.unet.state_dict(), expected) < 1e-6
    merged.unmerge()
    assert_equal(pipe.unet.state_dict(), before)


def test_on_a_compiled_network() -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(4, 5))
    compiled, x = torch.compile(model, backend="eager"), torch.randn(2, 4)
    down, up = torch.randn(2, 4), torch.randn(5, 2)
    with torch.no_grad():
        before = compiled(x)
        merged = sdconv.merge_lora(compiled, {"0.lora_A.weight": down, "0.lora_B.weight": up})
        assert torch.allclose(compiled(x), before + x @ down.T @ up.T, atol=1e-5)
        merged.unmerge()
        assert torch.equal(compiled(x), before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype, network: Any) -> None:
    tensors = kohya(matrices(network))
    network.to(dtype)
    before = state(network)
    sdconv.merge_lora(network, tensors, 0.5)
    expected = state(network)
    sdconv.unmerge_lora(network)
    merged = sdconv.merge_lora(network.to("cuda"), tensors, 0.5)  # matrices on the CPU
    on_cpu = {name: tensor.cpu() for name, tensor in state(network).items()}
    assert largest_error(on_cpu, expected) < 4 * torch.finfo(dtype).eps
    merged.unmerge()
    assert_equal(network.cpu().state_dict(), before)
