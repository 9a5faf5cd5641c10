"""Patched pipelines with LoRAs, offloading, tiling, saving, copying, training and compiling."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.autoencoders import vae as autoencoder
from helpers.patching import REPLACED, classes, code_of, code_run_by, is_ours, modules_of, plain
from helpers.pipelines import Run, pipeline, run, unet, vae
from helpers.slow import first_of
from helpers.versions import fails_on_torch_2_6
from torch import Tensor, nn

import sdconv
from sdconv.models import vae as sdconv_vae

CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "to_q", "to_v", "conv"]


@functools.cache
def lora() -> dict[str, Tensor]:
    """A LoRA on every kind of layer of the U-Net, with the keys of a file."""
    from peft import LoraConfig, get_peft_model_state_dict

    net = unet()
    torch.manual_seed(5)
    net.add_adapter(LoraConfig(r=2, target_modules=CONVOLUTIONS, init_lora_weights=False))
    found = get_peft_model_state_dict(net)
    assert any("conv_shortcut" in name for name in found)
    assert any("upsamplers.0.conv" in name for name in found)
    return {f"unet.{name}": tensor for name, tensor in found.items()}


@functools.cache
def with_lora(fused: bool, **call: Any) -> Run:
    pipe = pipeline("text")
    pipe.load_lora_weights(dict(lora()), adapter_name="one")
    if fused:
        pipe.fuse_lora()
    return run(pipe, "text", **call)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when: str) -> None:
    from peft.tuners.lora import LoraLayer

    assert with_lora(False) != plain()
    pipe = pipeline("text")
    kinds = classes(pipe)
    objects = modules_of(pipe)
    if when == "after":
        sdconv.apply_patch(pipe)
    pipe.load_lora_weights(dict(lora()), adapter_name="one")
    if when == "before":
        assert sdconv.apply_patch(pipe).left == {}
    assert is_ours(pipe.unet.mid_block.resnets[0])
    assert run(pipe, "text") == with_lora(False)
    pipe.fuse_lora()
    assert run(pipe, "text") == with_lora(True)
    pipe.unfuse_lora()
    # removes the patch while the LoRA is loaded
    sdconv.remove_patch(pipe)
    for name, module in objects.items():
        if kinds[name] in REPLACED:
            assert modules_of(pipe)[name] is module and type(module) is kinds[name]
    assert isinstance(pipe.unet.mid_block.resnets[0].conv1, LoraLayer)
    unfused = run(pipe, "text")
    assert torch.allclose(unfused.images, with_lora(False).images, atol=1e-4)
    pipe.unload_lora_weights()
    assert classes(pipe) == kinds


def test_a_lora_fused_before() -> None:
    assert with_lora(True) != with_lora(False)
    pipe = pipeline("text")
    pipe.load_lora_weights(dict(lora()), adapter_name="one")
    pipe.fuse_lora()
    assert sdconv.apply_patch(pipe).left == {}
    assert run(pipe, "text") == with_lora(True)
    sdconv.remove_patch(pipe)
    assert run(pipe, "text") == with_lora(True)


def test_a_lora_unloaded_while_patched() -> None:
    pipe = pipeline("text")
    sdconv.apply_patch(pipe)
    pipe.load_lora_weights(dict(lora()), adapter_name="one")
    half = {"cross_attention_kwargs": {"scale": 0.5}}
    other = pipeline("text")
    other.load_lora_weights(dict(lora()), adapter_name="one")
    assert run(pipe, "text", **half) == run(other, "text", **half) != with_lora(False)
    pipe.unload_lora_weights()
    assert run(pipe, "text") == plain()


def _offload(pipe: Any) -> None:
    """Offloads like ``enable_sequential_cpu_offload``, with the CPU as execution device, and adds a
    hook to every block, like a ``device_map``."""
    from accelerate import cpu_offload
    from accelerate.hooks import attach_execution_device_hook

    for part in (pipe.unet, pipe.vae):
        cpu_offload(part, "cpu")
        attach_execution_device_hook(part, "cpu")


def _remove_offload(pipe: Any) -> None:
    from accelerate.hooks import remove_hook_from_module

    for part in (pipe.unet, pipe.vae):
        remove_hook_from_module(part, recurse=True)


def _apply(pipe: Any) -> None:
    assert sdconv.apply_patch(pipe).left == {}


@pytest.mark.parametrize(
    "steps",
    [
        (_offload, _apply),
        (_apply, _offload),
        (_offload, _remove_offload, _apply),
        (_apply, _offload, _remove_offload),
        (_offload, _apply, _remove_offload),
    ],
    ids=lambda steps: "-".join(step.__name__.strip("_") for step in steps),
)
def test_offloaded(steps: tuple[Callable[[Any], None], ...]) -> None:
    pipe = pipeline("text")
    kinds = classes(pipe)
    for step in steps:
        step(pipe)
    block = pipe.unet.mid_block.resnets[0]
    hooked = steps[-1] is not _remove_offload and _remove_offload not in steps
    assert hasattr(block, "_hf_hook") == hooked
    assert (block.conv1.weight.device.type == "meta") == hooked
    _assert_patched_until_removed(pipe)
    assert classes(pipe) == kinds and hasattr(block, "_hf_hook") == hooked


def _assert_patched_until_removed(pipe: Any) -> None:
    """A patched pipeline runs sdconv's code, and diffusers' once the patch is removed."""
    ours, theirs = (code_of(k.Decoder) for k in (sdconv_vae, autoencoder))
    expected = plain()

    def check() -> None:
        assert run(pipe, "text") == expected

    ran = code_run_by(check)
    assert ours in ran and theirs not in ran
    sdconv.remove_patch(pipe)
    ran = code_run_by(check)
    assert theirs in ran and ours not in ran


def _offload_in_groups(pipe: Any) -> None:
    cpu = torch.device("cpu")
    for part in (pipe.unet, pipe.vae):
        part.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)


@fails_on_torch_2_6("diffusers asks it for an accelerator, which it cannot answer without one")
@pytest.mark.parametrize("steps", [(_offload_in_groups, _apply), (_apply, _offload_in_groups)])
def test_offloaded_in_groups(steps: tuple[Callable[[Any], None], ...]) -> None:
    pipe = pipeline("text")
    kinds = classes(pipe)
    for step in steps:
        step(pipe)
    assert hasattr(pipe.vae.decoder, "_diffusers_hook")
    _assert_patched_until_removed(pipe)
    assert classes(pipe) == kinds


def test_tiling_and_slicing() -> None:
    before, after = pipeline("text"), pipeline("text")
    sdconv.apply_patch(after)
    for pipe in (before, after):
        pipe.vae.enable_tiling()
        pipe.vae.enable_slicing()
        pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 32, 4
    assert run(after, "text") == run(before, "text") != plain()


def test_freeu() -> None:
    factors = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}
    pipe = pipeline("text")
    pipe.enable_freeu(**factors)
    expected = run(pipe, "text")
    assert expected != plain()
    sdconv.apply_patch(pipe)
    assert run(pipe, "text") == expected
    pipe.disable_freeu()
    assert run(pipe, "text") == plain()
    pipe.enable_freeu(**factors)
    assert run(pipe, "text") == expected


def test_saved_and_loaded(tmp_path: Path) -> None:
    pipe = pipeline("text")
    pipe.save_pretrained(tmp_path / "before")
    sdconv.apply_patch(pipe)
    pipe.save_pretrained(tmp_path / "patched")
    files = [p for p in (tmp_path / "before").rglob("*") if p.is_file()]
    assert len(files) >= 10
    for file in files:
        twin = tmp_path / "patched" / file.relative_to(tmp_path / "before")
        assert twin.read_bytes() == file.read_bytes(), file.name
    opened = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "patched")
    opened.set_progress_bar_config(disable=True)
    assert not any(is_ours(module) for module in modules_of(opened).values())
    assert run(opened, "text") == plain()


def _half(pipe: Any) -> None:
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.half()


@pytest.mark.parametrize(
    "move",
    first_of([_half, lambda pipe: pipe.to(torch.float64), lambda pipe: pipe.to(torch.bfloat16)]),
)
def test_changed_dtype(move: Callable[[Any], object]) -> None:
    before, after = pipeline("text"), pipeline("text")
    move(before)
    expected = run(before, "text")
    sdconv.apply_patch(before)
    sdconv.apply_patch(after)
    move(after)
    assert run(before, "text") == run(after, "text") == expected != plain()


def test_on_meta() -> None:
    with torch.device("meta"):
        net = vae(3)
    kinds = classes(net)
    assert sdconv.apply_patch(net).left == {}
    assert {p.device.type for p in net.parameters()} == {"meta"}
    assert net.decode(torch.empty(1, 4, 9, 13, device="meta")).sample.shape == (1, 3, 36, 52)
    net.to_empty(device="cpu").load_state_dict(vae(3).state_dict())
    z = torch.rand(1, 4, 9, 13)
    with torch.no_grad():
        assert torch.equal(net.decode(z).sample, vae(3).decode(z).sample)
    sdconv.remove_patch(net)
    assert classes(net) == kinds


def test_copies_and_pickles() -> None:
    net = vae(2)
    z = torch.rand(1, 4, 5, 7)
    with torch.no_grad():
        expected = net.decode(z).sample
        sdconv.apply_patch(net)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert classes(other) == classes(net)
            assert torch.equal(other.decode(z).sample, expected)
            sdconv.remove_patch(other)
            assert not is_ours(other.decoder) and is_ours(net.decoder)
            assert torch.equal(other.decode(z).sample, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_in_training(checkpointing: bool) -> None:
    def gradients(patch: bool) -> list[Tensor]:
        autoencoding, denoising = vae(2).train(), unet().train()
        for net in (autoencoding, denoising):
            if checkpointing:
                net.enable_gradient_checkpointing()
            if patch:
                sdconv.apply_patch(net)
        torch.manual_seed(1)
        latents = autoencoding.encode(torch.rand(2, 3, 18, 26)).latent_dist.mode()
        noise = denoising(latents, 5, torch.rand(2, 4, 32)).sample
        autoencoding.decode(noise).sample.square().mean().backward()
        both = (*autoencoding.named_parameters(), *denoising.named_parameters())
        assert all(parameter.grad is not None for _, parameter in both)
        return [parameter.grad for _, parameter in both]

    assert all(map(torch.equal, gradients(True), gradients(False)))


def test_gradient_checkpointing_with_a_custom_function() -> None:
    net = vae(2)
    parts: list[nn.Module] = []

    def keep(part: nn.Module, *args: Any) -> Any:
        parts.append(part)
        return part(*args)

    net.enable_gradient_checkpointing(keep)
    net(torch.rand(1, 3, 8, 8))
    before = list(parts)
    parts.clear()
    sdconv.apply_patch(net)
    net(torch.rand(1, 3, 8, 8))
    assert parts == before and net.decoder.up_blocks[0] in parts


@pytest.mark.slow
def test_compiled_without_a_graph_break() -> None:
    z = torch.rand(1, 4, 5, 7)
    net = vae(2)
    with torch.no_grad():
        expected = net.decode(z).sample
        sdconv.apply_patch(net)
        compiled = torch.compile(net.decoder, fullgraph=True, backend="eager")
        assert torch.equal(compiled(net.post_quant_conv(z)), expected)
        # recompiled when the classes of the blocks change
        sdconv.remove_patch(net)
        assert torch.equal(compiled(net.post_quant_conv(z)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["text", "xl"])
def test_on_a_gpu(kind: str, dtype: torch.dtype) -> None:
    pipe = pipeline(kind).to("cuda", dtype)
    expected = run(pipe, kind)
    sdconv.apply_patch(pipe)
    assert run(pipe, kind) == expected
