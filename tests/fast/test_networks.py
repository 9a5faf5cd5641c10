"""Networks on the fast backend give the reference's results, also with hooks and when compiled."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from helpers import seeded
from helpers.numbers import error
from torch import Tensor, nn

import sdconv
from sdconv.backends import is_fast
from sdconv.errors import InputError
from sdconv.fast import blocks as fast
from sdconv.fast.cpu.conv import plan_for
from sdconv.fast.cpu.weight_cache import weight_cache
from sdconv.models.blocks import ResnetBlock2D, Upsample2D
from sdconv.models.vae import AutoencoderKL

WITHIN = 2e-5


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    """A VAE with enough channels that Winograd convolutions are faster."""
    torch.manual_seed(0)
    config = sdconv.AutoencoderKLConfig(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(96, 128),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=True,
        use_quant_conv=True,
        use_post_quant_conv=True,
        scaling_factor=0.18215,
        shift_factor=None,
        force_upcast=True,
        sample_size=32,
    )
    return AutoencoderKL(config).eval().requires_grad_(False)


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(2, 4, 25, 30, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def convolved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Spies on the fast implementations: the names of those called, in order."""
    calls: list[str] = []
    for name in ("resnet_with_stats", "upsample_with_stats", "output"):
        inner = getattr(fast.cpu, name)

        def seen(*args: Any, name: str = name, inner: Any = inner, **kwargs: Any) -> Any:
            calls.append(name.removesuffix("_with_stats"))
            return inner(*args, **kwargs)

        monkeypatch.setattr(fast.cpu, name, seen)
    yield calls


def test_these_shapes_are_convolved_by_winograd() -> None:
    # otherwise the tests below would compare the direct convolution with itself
    for batch, channels, height, width in ((1, 128, 33, 28), (1, 128, 28, 28), (2, 128, 25, 30)):
        x, weight = torch.empty(batch, channels, height, width), torch.empty(96, channels, 3, 3)
        assert plan_for("conv3x3", x, weight, False).method == "winograd"


def test_decode_and_encode(vae: AutoencoderKL, latents: Tensor, convolved: list[str]) -> None:
    expected = vae.decode(latents).sample
    assert convolved == []
    with sdconv.backend("fast"):
        out = vae.decode(latents).sample
    assert convolved.count("resnet") == 6
    assert convolved.count("upsample") == convolved.count("output") == 1
    assert error(out, expected) < WITHIN
    assert not torch.equal(out, expected)
    moments = vae.encode(expected).latent_dist.parameters
    with sdconv.backend("fast"):
        assert error(vae.encode(expected).latent_dist.parameters, moments) < WITHIN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_default_device_makes_no_difference(
    vae: AutoencoderKL, latents: Tensor, dtype: torch.dtype
) -> None:
    """Kernels are called with addresses, which memory of another device does not have."""
    network, x = copy.deepcopy(vae).to(dtype), latents.to(dtype)
    with sdconv.backend("fast"):
        expected = network.decode(x).sample
        weight_cache.clear()
        with torch.device("meta"):
            found = network.decode(x).sample
    assert torch.equal(found, expected)


@pytest.mark.parametrize("before", [False, True], ids=["output", "input"])
def test_statistics_are_not_those_of_before_a_hook(
    vae: AutoencoderKL, latents: Tensor, before: bool
) -> None:
    """Layers pass on the statistics of what they have made, which a hook then changes."""
    first, second = vae.decoder.up_blocks[0].resnets[:2]
    plain = vae.decode(latents).sample
    if before:
        hook = second.register_forward_pre_hook(lambda _, given: (3 * given[0] + 1, *given[1:]))
    else:
        hook = first.register_forward_hook(lambda _, __, out: out.mul_(3).add_(1))
    try:
        expected = vae.decode(latents).sample
        with sdconv.backend("fast"):
            found = vae.decode(latents).sample
    finally:
        hook.remove()
    assert error(found, expected) < WITHIN
    assert error(plain, expected) > 100 * WITHIN


def test_the_backend_can_be_switched(vae: AutoencoderKL) -> None:
    state = vae.state_dict()
    assert not is_fast(vae)
    with sdconv.backend("fast"):
        assert is_fast(vae)
        with sdconv.backend("reference"):
            assert not is_fast(vae)
        assert is_fast(vae)
    assert not is_fast(vae)
    own = sdconv.load(state, family="sd1", backend="fast")
    assert is_fast(own) and is_fast(own.decoder.up_blocks[0].resnets[0])
    with sdconv.backend("reference"):
        assert not is_fast(own)
    assert own.state_dict().keys() == state.keys()
    with pytest.raises(InputError, match="unknown backend"), sdconv.backend("faster"):
        pass
    with pytest.raises(InputError, match="unknown backend"):
        sdconv.load(state, family="sd1", backend="")


def test_hooks_get_the_references_activations(vae: AutoencoderKL, latents: Tensor) -> None:
    block = vae.decoder.up_blocks[0].resnets[0]
    seen: list[Tensor] = []
    hook = block.conv1.register_forward_hook(lambda m, given, out: seen.append(out))
    try:
        vae.decode(latents)
        with sdconv.backend("fast"):
            vae.decode(latents)
    finally:
        hook.remove()
    reference, fast_output = seen
    assert error(fast_output, reference) < WITHIN


def test_after_a_hook_is_removed_the_block_is_fast_again(
    vae: AutoencoderKL, latents: Tensor, convolved: list[str]
) -> None:
    """accelerate's hooks leave a bound ``forward`` among the module's attributes."""
    own = copy.deepcopy(vae)
    with sdconv.backend("fast"):
        add_hook_to_module(own.decoder.conv_out, ModelHook())
        own.decode(latents)
        assert "output" not in convolved, "control: with a hook, the block is not fast"
        remove_hook_from_module(own.decoder.conv_out)
        assert "forward" in vars(own.decoder.conv_out)
        own.decode(latents)
    assert convolved.count("output") == 1


def test_nan_and_infinity_spread_as_in_the_reference() -> None:
    torch.manual_seed(3)
    block = ResnetBlock2D(128, 128, temb_channels=None, groups=8, eps=1e-6).requires_grad_(False)
    upsample = Upsample2D(128).requires_grad_(False)
    x = torch.randn(1, 128, 33, 28)
    for value in (float("nan"), float("inf")):
        x[0, 3, 5, 6] = value
        for module in (block, upsample):
            expected = module(x)
            with sdconv.backend("fast"):
                out = module(x)
            assert torch.equal(out.isfinite(), expected.isfinite())
            assert torch.equal(out.isnan(), expected.isnan())
            finite = expected.isfinite()
            if finite.any():
                assert error(out[finite], expected[finite]) < WITHIN


@pytest.mark.parametrize("inference", [False, True])
def test_compiled_as_one_graph(inference: bool) -> None:
    torch.manual_seed(5)
    block = nn.Sequential(
        ResnetBlock2D(128, 96, temb_channels=None, groups=8, eps=1e-6), Upsample2D(96)
    ).requires_grad_(False)
    x = torch.randn(1, 128, 33, 28)
    expected = block(x)
    with sdconv.backend("fast"), torch.inference_mode(inference):
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        assert error(compiled(x), expected) < WITHIN
        held = weight_cache.memory
        compiled(x)
        assert weight_cache.memory == held
    del compiled
    torch._dynamo.reset()


def test_exported() -> None:
    torch.manual_seed(6)
    block = Upsample2D(128).requires_grad_(False)
    x = torch.randn(1, 128, 33, 28)
    with sdconv.backend("fast"):
        program = torch.export.export(block, (x,))
    names = {str(node.target) for node in program.graph.nodes}
    assert "sdconv.upsample_conv.default" in names
    assert error(program.module()(x), block(x)) < WITHIN


@pytest.mark.parametrize("whole", [None, "hook", "forward", "compiled"])
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_blocks_input_is_freed_unless_something_sees_the_whole_block(
    half: str, whole: str | None
) -> None:
    network = seeded.network(seeded.kl((32, 32), 4, True, layers_per_block=2))
    block = network.encoder.down_blocks[0] if half == "encoder" else network.decoder.up_blocks[0]
    seen: list[str] = []
    forward = block.forward
    match whole:
        case "hook":
            block.register_forward_hook(lambda *_: seen.append("block"))
        case "forward":
            block.forward = lambda x: seen.append("block") or forward(x)
        case "compiled":
            block._compiled_call_impl = lambda x: seen.append("block") or forward(x)
    inputs: list[weakref.ref[Tensor]] = []
    block.resnets[0].register_forward_pre_hook(lambda _, x: inputs.append(weakref.ref(x[0])))
    block.resnets[1].register_forward_pre_hook(
        lambda *_: seen.append("held" if inputs[0]() is not None else "freed")
    )
    call = getattr(network, half[:-1])
    given = torch.randn(1, 3, 16, 16) if half == "encoder" else torch.randn(1, 4, 8, 8)
    with torch.no_grad(), sdconv.backend("fast"):
        call(given)
    assert sorted(seen) == (["freed"] if whole is None else ["block", "held"])
    with torch.enable_grad(), sdconv.backend("fast"):
        call(given)
    assert seen.count("block") == (0 if whole is None else 2)
