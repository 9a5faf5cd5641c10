"""Which of diffusers' blocks and calls sdconv computes, and which stay diffusers'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import downsampling, resnet, upsampling
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.unets import unet_2d_blocks
from helpers.patching import classes, is_ours, modules_of
from helpers.pipelines import seeded, unet, vae
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sdconv

# --- single blocks, of any size


@settings(max_examples=60)
@given(
    channels=st.tuples(st.sampled_from([32, 64, 96]), st.sampled_from([32, 64])),
    time=st.booleans(),
    activation=st.sampled_from(["swish", "mish", "gelu"]),
    size=st.tuples(st.integers(1, 3), st.integers(2, 17), st.integers(1, 17)),
    channels_last=st.booleans(),
    training=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_resnet_blocks(
    channels: tuple[int, int],
    time: bool,
    activation: str,
    size: tuple[int, int, int],
    channels_last: bool,
    training: bool,
    dtype: torch.dtype,
) -> None:
    batch, *rows_and_columns = size
    block = seeded(
        lambda: resnet.ResnetBlock2D(
            in_channels=channels[0],
            out_channels=channels[1],
            temb_channels=16 if time else None,
            non_linearity=activation,
            conv_shortcut_bias=time,
        )
    )
    x = torch.rand(batch, channels[0], *rows_and_columns, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
        block = block.to(memory_format=torch.channels_last)
    temb = torch.rand(batch, 16, dtype=dtype) if time else None
    block.to(dtype).train(training)
    _same_before_and_after(block, x, temb=temb)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(["downsample", "asymmetric downsample", "upsample", "attention"]),
    size=st.tuples(st.integers(1, 3), st.integers(2, 17), st.integers(2, 17)),
    output=st.none() | st.tuples(st.integers(1, 40), st.integers(1, 40)),
    channels_last=st.booleans(),
)
def test_samplers_and_attention(
    kind: str, size: tuple[int, int, int], output: tuple[int, int] | None, channels_last: bool
) -> None:
    make: dict[str, Callable[[], nn.Module]] = {
        "downsample": lambda: downsampling.Downsample2D(32, use_conv=True, out_channels=48),
        "asymmetric downsample": lambda: downsampling.Downsample2D(32, use_conv=True, padding=0),
        "upsample": lambda: upsampling.Upsample2D(32, use_conv=True, out_channels=48),
        "attention": lambda: Attention(
            32, heads=1, dim_head=32, norm_num_groups=8, residual_connection=True, bias=True
        ),
    }
    block = seeded(make[kind])
    batch, *rows_and_columns = size
    x = torch.rand(batch, 32, *rows_and_columns)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    more = {"output_size": output} if kind == "upsample" else {}
    _same_before_and_after(block, x, **more)


def _same_before_and_after(block: nn.Module, x: Tensor, **more: Any) -> None:
    with torch.no_grad():
        expected = block(x, **more)
        assert sdconv.apply_patch(block).left == {} and is_ours(block)
        got = block(x, **more)
    assert torch.equal(got, expected) and got.stride() == expected.stride()


# --- blocks that are left unchanged


def _features(channels: int = 32) -> Tensor:
    return torch.rand(2, channels, 8, 8, generator=torch.Generator().manual_seed(3))


def _unconditional(down: str, up: str, **fields: Any) -> nn.Module:
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=(down, down),
        up_block_types=(up, up),
        **fields,
    )


def _vae_with(processor: object) -> nn.Module:
    net = vae(2)
    net.decoder.mid_block.attentions[0].set_processor(processor)
    return net


def _block(**fields: Any) -> nn.Module:
    return resnet.ResnetBlock2D(in_channels=32, temb_channels=None, **fields)


def _with(**parts: nn.Module) -> nn.Module:
    """A block with some parts replaced after construction."""
    block = _block()
    for name, part in parts.items():
        setattr(block, name, part)
    return block


LEFT: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], set[str]]] = {
    "FIR kernels": (
        lambda: _unconditional("SkipDownBlock2D", "SkipUpBlock2D"),
        (_features(3), 7),
        {
            "ResnetBlock2D: up is True",
            "ResnetBlock2D: down is True",
            "ResnetBlock2D: output_scale_factor is 1.41",
            "FirDownsample2D: FIR kernel",
            "FirUpsample2D: FIR kernel",
        },
    ),
    "resampling inside ResNet blocks": (
        lambda: _unconditional("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
        (_features(3), 7),
        {
            "ResnetBlock2D: up is True",
            "ResnetBlock2D: down is True",
            "Downsample2D: use_conv is False",
            "Upsample2D: use_conv is False",
        },
    ),
    "scale and shift": (
        lambda: _unconditional("DownBlock2D", "UpBlock2D", resnet_time_scale_shift="scale_shift"),
        (_features(3), 7),
        {"ResnetBlock2D: time_embedding_norm is scale_shift"},
    ),
    "ada-group norms": (
        lambda: unet_2d_blocks.KDownBlock2D(32, 32, 16, num_layers=1, add_downsample=True),
        (_features(), torch.ones(2, 16)),
        {
            "ResnetBlockCondNorm2D: time_embedding_norm is ada_group",
            "KDownsample2D: fixed kernel",
        },
    ),
    "spatial norms": (
        lambda: diffusers.VQModel(
            block_out_channels=(32,), layers_per_block=1, norm_type="spatial"
        ),
        (torch.rand(1, 3, 8, 8),),
        {
            "ResnetBlockCondNorm2D: time_embedding_norm is spatial",
            "Decoder: conv_norm_out is SpatialNorm",
            "Attention: spatial_norm is SpatialNorm",
        },
    ),
    "dropout": (
        lambda: _block(dropout=0.1),
        (_features(), None),
        {"ResnetBlock2D: dropout.p is 0.1"},
    ),
    "dropout removed": (
        lambda: _with(dropout=nn.Identity()),
        (_features(), None),
        {"ResnetBlock2D: 'Identity' object has no attribute 'p'"},
    ),
    "time without its activation": (
        lambda: resnet.ResnetBlock2D(in_channels=32, temb_channels=16, skip_time_act=True),
        (_features(), torch.ones(2, 16)),
        {"ResnetBlock2D: skip_time_act is True"},
    ),
    "transposed convolution": (
        lambda: upsampling.Upsample2D(32, use_conv_transpose=True),
        (_features(),),
        {"Upsample2D: use_conv is False"},
    ),
    "another name": (
        lambda: upsampling.Upsample2D(32, use_conv=True, name="Conv2d_0"),
        (_features(),),
        {"Upsample2D: name is Conv2d_0"},
    ),
    "norm before downsampling": (
        lambda: downsampling.Downsample2D(32, use_conv=True, norm_type="ln_norm", eps=1e-5),
        (_features(),),
        {"Downsample2D: norm is LayerNorm"},
    ),
    "wider padding": (
        lambda: downsampling.Downsample2D(32, use_conv=True, padding=2),
        (_features(),),
        {"Downsample2D: padding is 2"},
    ),
    "attention narrower than its input": (
        lambda: Attention(
            32, heads=1, dim_head=16, norm_num_groups=32, residual_connection=True, bias=True
        ),
        (_features(),),
        {"Attention: inner_dim is 16"},
    ),
    "another processor": (
        lambda: _vae_with(AttnProcessor()),
        (_features(3),),
        {"Attention: processor is AttnProcessor"},
    ),
    "subclass": (
        lambda: type("Mine", (resnet.ResnetBlock2D,), {})(in_channels=32, temb_channels=None),
        (_features(), None),
        {"Mine: a subclass of ResnetBlock2D"},
    ),
    "one dimension": (
        lambda: downsampling.Downsample1D(4, use_conv=True),
        (torch.ones(1, 4, 8),),
        {"Downsample1D: sdconv has no such block"},
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_unsupported_blocks_are_left_and_listed(name: str) -> None:
    make, inputs, reasons = LEFT[name]
    net = seeded(make)
    kinds = classes(net)
    with torch.no_grad():
        expected = _tensors(net(*inputs))
        summary = sdconv.apply_patch(net)
        assert all(map(torch.equal, _tensors(net(*inputs)), expected))
    for reason in reasons:
        assert any(why.startswith(reason) for why in summary.left.values()), summary
        assert reason in str(summary)
    for block, why in summary.left.items():
        assert type(modules_of(net)[block]) is kinds[block]
        assert why.startswith(kinds[block].__name__)
    sdconv.remove_patch(net)
    assert classes(net) == kinds


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output or ()
    return [tensor for value in values for tensor in _tensors(value)]


def test_a_block_with_an_overridden_forward_is_left() -> None:
    net = unet()
    block = net.mid_block.resnets[0]
    original = block.forward
    block.forward = lambda *args: 2 * original(*args)
    summary = sdconv.apply_patch(net)
    assert summary.left == {"mid_block.resnets.0": "ResnetBlock2D: its forward is overridden"}


# --- calls and processors that sdconv does not support


def test_unsupported_calls_run_diffusers_code() -> None:
    block = seeded(lambda: _block())
    embedding = torch.rand(2, 32, 1, 1)
    attention = vae(2).decoder.mid_block.attentions[0]
    tokens = torch.rand(2, 5, 64)
    with torch.no_grad():
        expected = (
            block(_features(), embedding),
            attention(tokens),
            attention(_features(64), tokens),
        )
        for module in (block, attention):
            assert sdconv.apply_patch(module).left == {}
        assert torch.equal(block(_features(), embedding), expected[0])
        assert not torch.equal(block(_features(), None), expected[0])
        assert torch.equal(attention(tokens), expected[1])
        assert torch.equal(attention(_features(64), tokens), expected[2])
        for call in (block, attention, seeded(lambda: upsampling.Upsample2D(32, use_conv=True))):
            sdconv.apply_patch(call)
            with pytest.raises(TypeError):
                call()


def test_latent_embeddings_give_the_same_error_as_before() -> None:
    decoder = vae(2).decoder
    z = torch.rand(1, 4, 5, 7)
    errors = []
    for _ in range(2):
        with torch.no_grad(), pytest.raises(RuntimeError) as error:
            decoder(z, z)  # a decoder whose normalisation does not take them
        errors.append(str(error.value))
        sdconv.apply_patch(decoder)
    assert errors[0] == errors[1]
    with torch.no_grad():
        assert torch.equal(decoder(z, None), decoder(sample=z))


def test_a_scale_is_still_deprecated() -> None:
    for block in (
        downsampling.Downsample2D(32, use_conv=True),
        downsampling.Downsample2D(32, use_conv=True, padding=0),
        upsampling.Upsample2D(32, use_conv=True),
        _block(),
    ):
        temb = (None,) if isinstance(block, resnet.ResnetBlock2D) else ()
        sdconv.apply_patch(block)
        with pytest.warns(FutureWarning, match="scale"):
            block(_features(), *temb, scale=1.0)


def test_processors_set_and_projections_fused_while_patched() -> None:
    net, other = vae(2), vae(2)
    z = torch.rand(1, 4, 5, 7)

    class Twice(AttnProcessor2_0):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().__call__(*args, **kwargs)

    sdconv.apply_patch(net)
    with torch.no_grad():
        same = other.decode(z).sample
        for change in (
            lambda vae: vae.set_attn_processor(Twice()),
            lambda vae: vae.set_attn_processor(AttnProcessor2_0()),
            lambda vae: vae.fuse_qkv_projections(),
            lambda vae: vae.unfuse_qkv_projections(),
        ):
            for one in (net, other):
                change(one)
            assert torch.equal(net.decode(z).sample, other.decode(z).sample)
        assert torch.equal(net.decode(z).sample, same)
        net.set_attn_processor(Twice())
        assert not torch.equal(net.decode(z).sample, same)
