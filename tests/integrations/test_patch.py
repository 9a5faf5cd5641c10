"""Patched pipelines give the same bits, and the patch can be removed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models import resnet
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders import vae as autoencoder
from helpers.patching import REPLACED, classes, code_of, code_run_by, is_ours, modules_of, plain
from helpers.pipelines import KINDS, SCHEDULERS, pipeline, run, scheduler, seeded, unet, vae
from helpers.slow import first_of, marked_slow
from torch import nn

import sdconv
from sdconv.models import blocks
from sdconv.models import vae as sdconv_vae


@pytest.mark.parametrize("kind", marked_slow(KINDS, but=["text", "upscale", "xl controlnet"]))
def test_pipelines_give_the_same_pixels(kind: str) -> None:
    pipe = pipeline(kind)
    summary = sdconv.apply_patch(pipe)
    assert summary.left == {}
    assert run(pipe, kind) == plain(kind)
    assert sdconv.remove_patch(pipe)
    assert run(pipe, kind) == plain(kind)


# diffusers passes tensors to numpy in a way that numpy 2 deprecates
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", first_of(SCHEDULERS))
def test_schedulers(name: str) -> None:
    pipe = pipeline("text", scheduler=scheduler(name))
    expected = run(pipe, "text")
    assert expected != plain()
    pipe = pipeline("text", scheduler=scheduler(name))
    sdconv.apply_patch(pipe)
    assert run(pipe, "text") == expected


def test_one_prompt_without_guidance() -> None:
    given = {"prompt": "a cat", "negative_prompt": None, "guidance_scale": 1.0, "height": 64}
    given["generator"] = torch.Generator().manual_seed(7)
    expected = run(pipeline("text"), "text", **given)
    pipe = pipeline("text")
    sdconv.apply_patch(pipe)
    given["generator"] = torch.Generator().manual_seed(7)
    assert run(pipe, "text", **given) == expected


@pytest.mark.parametrize("change", ["weight", "eps", "scale"])
@pytest.mark.parametrize("name", ["vae.decoder.mid_block.resnets.0", "unet.mid_block.resnets.1"])
def test_a_changed_block_changes_the_image(name: str, change: str) -> None:
    pipe = pipeline("text")
    sdconv.apply_patch(pipe)
    block = modules_of(pipe)[name]
    assert is_ours(block)
    with torch.no_grad():
        if change == "weight":
            block.conv2.weight[0, 0, 1, 1] += 1e-3
        elif change == "eps":
            block.norm1.eps *= 100
        else:
            block.norm2.weight *= 1.01
    assert run(pipe, "text") != plain()


def test_sdconvs_code_runs_only_while_patched() -> None:
    pipe = pipeline("text")
    ours = {
        code_of(blocks.ResnetBlock2D),
        code_of(blocks.Downsample2D),
        code_of(blocks.Upsample2D),
        code_of(blocks.Attention),
        code_of(sdconv_vae.Decoder),
    }
    theirs = {code_of(kind) for kind in REPLACED} - {code_of(autoencoder.Encoder)}
    before = code_run_by(lambda: run(pipe, "text"))
    sdconv.apply_patch(pipe)
    patched = code_run_by(lambda: run(pipe, "text"))
    sdconv.remove_patch(pipe)
    after = code_run_by(lambda: run(pipe, "text"))
    for ran in (before, after):
        assert theirs <= ran and not ours & ran
    assert ours <= patched and not theirs & patched


# --- the objects


@pytest.mark.parametrize("kind", ["text", "controlnet"])
def test_objects_parameters_and_hooks_stay_the_same(kind: str) -> None:
    pipe = pipeline(kind)
    pipe.unet.mid_block.resnets[0].register_forward_hook(lambda *_: None)

    def snapshot() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module):
                state = part.state_dict()
                found[name] = (
                    list(state),
                    [tensor.data_ptr() for tensor in state.values()],
                    [(n, id(p)) for n, p in part.named_parameters()],
                    [(n, id(b)) for n, b in part.named_buffers()],
                    [(n, id(m)) for n, m in part.named_modules()],
                    [id(m._forward_hooks) for m in part.modules()],
                )
        return found

    before, kinds = snapshot(), classes(pipe)
    sdconv.apply_patch(pipe)
    assert snapshot() == before
    assert [n for n, m in modules_of(pipe).items() if type(m) in REPLACED] == []
    sdconv.remove_patch(pipe)
    assert snapshot() == before and classes(pipe) == kinds


def test_the_summary_lists_every_block() -> None:
    pipe = pipeline("text")
    before = {n: t.__name__ for n, t in classes(pipe).items() if t in REPLACED}
    summary = sdconv.apply_patch(pipe)
    named = {name: kind for kind, names in summary.replaced.items() for name in names}
    attentions = {n for n, kind in named.items() if kind == "Attention"}
    assert attentions == {f"vae.{half}coder.mid_block.attentions.0" for half in ("en", "de")}
    assert {n for n, m in modules_of(pipe).items() if is_ours(m)} == named.keys()
    assert named.keys() - attentions == before.keys()
    asymmetric = {n for n, kind in named.items() if kind == "AsymmetricDownsample2D"}
    assert asymmetric == {n for n in named if n.startswith("vae.encoder") and "downsamplers" in n}
    lines = str(summary).splitlines()
    assert lines[0] == f"replaced {len(named)} blocks"
    assert any(line.split()[:2] == ["2", "Attention"] for line in lines)


def test_patched_blocks_are_instances_of_sdconvs_classes() -> None:
    net = vae(2)
    sdconv.apply_patch(net)
    assert not [name for name, module in modules_of(net).items() if isinstance(module, REPLACED)]
    assert isinstance(net.decoder, sdconv_vae.Decoder)
    assert isinstance(net.decoder.mid_block.resnets[0], blocks.ResnetBlock2D)
    attention = net.decoder.mid_block.attentions[0]
    # diffusers sets processors only on instances of its own class
    assert isinstance(attention, blocks.Attention) and isinstance(attention, Attention)


def test_applying_twice_changes_nothing_more() -> None:
    net = unet()
    kinds = classes(net)
    first = sdconv.apply_patch(net)
    patched = classes(net)
    second = sdconv.apply_patch(net)
    assert second.replaced == {} and second.left == {}
    assert second.already == sum(map(len, first.replaced.values()))
    assert first.already == 0 and f"({second.already} had been replaced before)" in str(second)
    assert classes(net) == patched
    names = sdconv.remove_patch(net)
    assert sorted(names) == sorted(name for some in first.replaced.values() for name in some)
    assert classes(net) == kinds
    assert sdconv.remove_patch(net) == ()


def test_another_backend_after_a_patch_is_reported() -> None:
    net = unet()
    total = sum(map(len, sdconv.apply_patch(net).replaced.values()))
    assert f"replaced {total} blocks" in str(sdconv.apply_patch(unet(), backend="fast"))
    again = sdconv.apply_patch(net)
    assert again.switched == () and "switched" not in str(again)
    fast = sdconv.apply_patch(net, backend="fast")
    assert fast.replaced == {} and len(fast.switched) == fast.already == total
    assert str(fast).splitlines()[1] == f"switched {total} of those to the fast backend"
    assert sdconv.apply_patch(net, backend="fast").switched == ()
    assert len(sdconv.apply_patch(net).switched) == total


def test_parts_and_single_blocks() -> None:
    net = unet()
    kinds = classes(net)
    block = net.up_blocks[0].upsamplers[0]
    summary = sdconv.apply_patch(block)
    assert summary.replaced == {"Upsample2D": ("",)} and "the module itself" in str(summary)
    assert is_ours(block)
    sdconv.apply_patch(net)
    assert set(sdconv.remove_patch(net.mid_block)) == {"resnets.0", "resnets.1"}
    assert classes(net.mid_block) == {
        name: kinds[f"mid_block.{name}".rstrip(".")] for name in classes(net.mid_block)
    }
    assert is_ours(net.down_blocks[0].resnets[0])


def test_components_that_are_none_or_sdconvs_or_shared() -> None:
    own = sdconv.AutoencoderKL(
        sdconv.AutoencoderKLConfig(
            **sdconv.AutoencoderKLConfig.assumed
            | {"block_out_channels": (32, 32), "layers_per_block": 1}
        )
    )
    pipe = pipeline("text", vae=own, text_encoder=None, tokenizer=None)
    kinds = classes(own)
    summary = sdconv.apply_patch(pipe)
    assert all(name.startswith("unet.") for names in summary.replaced.values() for name in names)
    assert all(name.startswith("unet.") for name in sdconv.remove_patch(pipe))
    assert classes(own) == kinds
    # twice in one module, and in two pipelines
    one = seeded(lambda: resnet.ResnetBlock2D(in_channels=32, temb_channels=None))
    assert sdconv.apply_patch(nn.ModuleList([one, one])).replaced == {"ResnetBlock2D": ("0",)}
    twice = pipeline("text")
    twice.register_modules(image_encoder=twice.unet)
    assert sdconv.apply_patch(twice).already == 0
    other = pipeline("image", unet=pipe.unet)
    sdconv.apply_patch(pipe)
    assert sdconv.apply_patch(other).already > 0


@pytest.mark.parametrize("wrong", [None, "unet", {"unet": 1}, [nn.Identity()]])
@pytest.mark.parametrize("call", [sdconv.apply_patch, sdconv.remove_patch])
def test_targets_that_are_neither_pipeline_nor_module(
    call: Callable[[object], object], wrong: Any
) -> None:
    with pytest.raises(sdconv.InputError, match="expected: a diffusers pipeline or a torch module"):
        call(wrong)
