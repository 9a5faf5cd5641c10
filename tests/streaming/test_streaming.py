"""Streaming with the reference backend: the unstreamed numbers, for strips of any height."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import helpers.streamed
import pytest
import torch
import torch.nn.functional as F
from helpers import seeded
from helpers.numbers import error
from helpers.streamed import executed, randn
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sdconv
from sdconv.integrations.peers import peer
from sdconv.streaming import layers
from sdconv.streaming.executor import run
from sdconv.streaming.group_stats import RunningGroupStats

SMALL = seeded.kl((32, 64, 64), 4, True, layers_per_block=1)
KINDS = {name: c for name, c in seeded.WITH_PEER.items() if "taesd" not in name}
TOLERANCE = 1e-5


# this file is about the reference backend; test_fast_streaming.py has the fast one
call = partial(helpers.streamed.call, backend="reference")
planned = partial(helpers.streamed.planned, backend="reference")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_vae(kind: str, tmp_path: Path) -> None:
    network = seeded.network(KINDS[kind])
    latent = network.config["latent_channels"]
    for direction, x in (("decode", randn(2, latent, 6, 5)), ("encode", randn(2, 3, 37, 50))):
        whole = call(network, direction, x)
        network.enable_streaming("1GiB", tmp_path)
        assert error(call(network, direction, x), whole) < TOLERANCE
        network.disable_streaming()
        assert torch.equal(call(network, direction, x), whole)


NETWORK = seeded.network(SMALL)
# in float64, rounding in groups of few values does not hide a fault
EXACT = copy.deepcopy(NETWORK).double()


@pytest.mark.slow
@given(
    st.sampled_from(["encode", "decode"]),
    st.tuples(st.integers(4, 40), st.integers(4, 40)),
    st.integers(1, 45),
    st.booleans(),
)
@example("encode", (13, 4), 1, True)
@example("decode", (40, 5), 7, False)
@settings(max_examples=25)
def test_any_image_size_and_strip_height(
    direction: str, size: tuple[int, int], rows: int, spill: bool
) -> None:
    shape = (1, 3, *size) if direction == "encode" else (1, 4, -(-size[0] // 4), -(-size[1] // 4))
    x = randn(*shape).double()
    plan = planned(EXACT, direction, x, rows=rows, spill=spill)
    folder = Path(tempfile.gettempdir()) if spill else None
    assert error(executed(plan, x, folder), call(EXACT, direction, x)) < 1e-10


def test_rounding_is_that_of_the_ordinary_run() -> None:
    """Both runs are equally far from one in float64."""
    x = randn(1, 4, 24, 24)
    exact = call(copy.deepcopy(NETWORK).double(), "decode", x.double())
    whole = error(call(NETWORK, "decode", x), exact)
    streamed = executed(planned(NETWORK, "decode", x, rows=3, spill=False), x)
    assert error(streamed, exact) < 2 * whole


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """The error is at most twice that of the ordinary run, both measured against float64."""
    network = copy.deepcopy(NETWORK).to(dtype)
    exact = copy.deepcopy(network).double()
    for direction, x in (("decode", randn(1, 4, 7, 9)), ("encode", randn(1, 3, 30, 22))):
        x = x.to(dtype)
        truth, whole = call(exact, direction, x.double()), call(network, direction, x)
        plan = planned(network, direction, x, rows=3, spill=True)
        streamed = executed(plan, x, tmp_path)
        assert streamed.dtype == dtype
        allowed = max(2 * error(whole, truth), 1e-13)
        assert error(streamed, truth) <= allowed


@pytest.mark.slow
def test_very_long_sides() -> None:
    x = randn(1, 4, 2, 120)
    for z in (x, x.transpose(2, 3)):
        whole = call(NETWORK, "decode", z)
        streamed = executed(planned(NETWORK, "decode", z, rows=5, spill=False), z)
        assert error(streamed, whole) < TOLERANCE


def test_images_of_a_batch_do_not_affect_each_other() -> None:
    z = randn(3, 4, 6, 5)
    z[1] *= 100
    plan = planned(NETWORK, "decode", z, rows=2, spill=False)
    one = planned(NETWORK, "decode", z[:1], rows=2, spill=False)
    alone = torch.cat([executed(one, z[number : number + 1]) for number in range(3)])
    assert torch.equal(executed(plan, z), alone)
    assert error(alone, call(NETWORK, "decode", z)) < TOLERANCE


def test_memory_formats_and_views_of_the_input() -> None:
    z = randn(1, 4, 6, 10)
    plan = planned(NETWORK, "decode", z, rows=2, spill=False)
    expected = executed(plan, z)
    wide = randn(1, 4, 6, 20)
    wide[..., ::2] = z
    for same in (z.contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        assert torch.equal(executed(plan, same), expected)
    assert expected.is_contiguous()


# --- injected faults: what an inexact method would do


def seams(network: Any, z: Tensor, rows: int = 3) -> float:
    streamed = executed(planned(network, "decode", z, rows=rows, spill=False), z)
    return error(streamed, call(network, "decode", z))


def test_tiles_of_the_reference_differ() -> None:
    theirs, _ = peer(SMALL, None, seeded.tensors(SMALL), "diffusers")
    assert isinstance(theirs, diffusers.AutoencoderKL)
    z = randn(1, 4, 24, 24)
    whole = call(theirs, "decode", z)
    theirs.enable_tiling()
    theirs.tile_latent_min_size, theirs.tile_sample_min_size = 12, 48
    assert error(call(theirs, "decode", z), whole) > 1000 * TOLERANCE
    assert seams(NETWORK, z) < TOLERANCE


def test_statistics_of_the_last_strip_alone_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    update = RunningGroupStats.update

    def forget(self: RunningGroupStats, rows: Tensor) -> None:
        self.__init__(len(self.mean), self.mean.device)  # type: ignore[misc]
        update(self, rows)

    monkeypatch.setattr(RunningGroupStats, "update", forget)
    assert seams(NETWORK, randn(1, 4, 12, 12)) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", [layers.Conv3x3, layers.UpsampleConv])
@pytest.mark.parametrize("short", [(0, 1), (1, 0)], ids=["above", "below"])
def test_a_halo_one_row_short_fails(
    kind: type[layers.StreamLayer], short: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kind.apply

    def blind(self: layers.StreamLayer, strip: Tensor) -> Tensor:
        strip = strip.clone()
        strip[0] *= short[1]
        strip[-1] *= short[0]
        return right(self, strip)

    monkeypatch.setattr(kind, "apply", blind)
    assert seams(NETWORK, randn(1, 4, 12, 12)) > 100 * TOLERANCE


def test_attention_within_a_strip_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layers.AttentionLayer.compute

    def narrow(self: Any, strip: Tensor, residual: Any, whole: Sequence[Tensor]) -> Tensor:
        return right(self, strip, residual, [part[: len(strip)] for part in whole])

    monkeypatch.setattr(layers.AttentionLayer, "compute", narrow)
    assert seams(NETWORK, randn(1, 4, 12, 12)) > 100 * TOLERANCE


# --- as methods of the network, and of a pipeline


def test_enable_tiling_streams() -> None:
    network = seeded.network(SMALL)
    z = randn(1, 4, 6, 7)
    whole = call(network, "decode", z)
    network.enable_tiling()
    assert network.streaming is not None
    assert error(call(network, "decode", z), whole) < TOLERANCE
    network.enable_tiling(False)
    assert network.streaming is None
    network.enable_tiling(tile_sample_min_height=64)
    network.disable_tiling()
    assert network.streaming is None


def test_enable_tiling_keeps_a_limit_that_was_set(tmp_path: Path) -> None:
    network = seeded.network(SMALL)
    network.enable_streaming("2GiB", tmp_path)
    settings = network.streaming
    network.enable_tiling()
    network.use_tiling = True
    assert network.streaming == settings
    network.disable_tiling()
    network.enable_tiling()
    assert network.streaming is not None and network.streaming.limit is None, "the control"


def test_progress_is_shown_on_a_terminal_only(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, z = seeded.network(SMALL), randn(1, 4, 6, 7)
    for terminal, progress in ((True, True), (True, False), (False, True)):
        # tells rich whether this is a terminal
        if terminal:
            monkeypatch.setenv("FORCE_COLOR", "1")
        else:
            monkeypatch.delenv("FORCE_COLOR")
        network.enable_streaming(None, progress=progress)
        call(network, "decode", z)
        shown = capfd.readouterr()
        assert ("decoding" in shown.err) == (terminal and progress)
        assert shown.out == ""


def test_progress_reaches_the_end() -> None:
    plan = planned(NETWORK, "decode", z := randn(1, 4, 20, 20), rows=3, spill=False)
    done: list[int] = []
    with torch.no_grad():
        out = torch.empty(plan.shape)
        run(plan, z, out, folder=None, on_strip=lambda step, part: done.append(part))
    assert len(done) == sum(-(-step.units // 3) for step in plan.steps)
    assert 0.99 * plan.multiplies < sum(done) <= plan.multiplies


def test_forward_and_tuples_streamed() -> None:
    network = seeded.network(SMALL)
    x = randn(2, 3, 16, 20)
    with torch.inference_mode():
        whole = network(x).sample
        network.enable_streaming()
        assert error(network(x).sample, whole) < TOLERANCE
        (posterior,) = network.encode(x, return_dict=False)
        (images,) = network.decode(posterior.mode(), return_dict=False)
    assert error(images, whole) < TOLERANCE


def test_autocast_changes_nothing() -> None:
    network = seeded.network(SMALL)
    z, x = randn(1, 4, 6, 7), randn(1, 3, 24, 28)
    low = call(network, "decode", z.bfloat16().float())
    network.enable_streaming()
    expected = call(network, "decode", z), call(network, "encode", x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(network, "decode", z), expected[0])
        assert torch.equal(call(network, "encode", x), expected[1])
        assert error(call(network, "decode", z.bfloat16()), low) < TOLERANCE


@pytest.mark.slow
def test_as_exact_as_the_ordinary_run_with_many_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The controls inject faults: convolutions whose rounding error is three times torch's; and, on
    the processors where it is less exact, the kernel meant for few channels."""
    network = seeded.network(seeded.kl((512,), 4, True, layers_per_block=1))
    z = randn(1, 4, 24, 24)
    exact = call(copy.deepcopy(network).double(), "decode", z.double())
    ordinary = error(call(network, "decode", z), exact)

    def streamed_error() -> float:
        plan = planned(network, "decode", z, rows=5, spill=False)
        return error(executed(plan, z), exact)

    convolve = layers.StreamLayer.convolve

    def rounding_tripled(layer: layers.StreamLayer, window: Tensor, **options: int) -> Tensor:
        in_double = dataclasses.replace(layer, module=copy.deepcopy(layer.module).double())
        true = convolve(in_double, window.double(), **options)
        return (true + 3 * (convolve(layer, window, **options) - true)).float()

    assert streamed_error() < 1.5 * ordinary
    with monkeypatch.context() as patch:
        patch.setattr(layers.StreamLayer, "convolve", rounding_tripled)
        assert streamed_error() > 2 * ordinary, "the control"
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        monkeypatch.setattr(layers, "prefers_channels_first", lambda weight: False)
        assert streamed_error() > 2 * ordinary, "the control: the channels-last kernel"


@pytest.mark.parametrize(("channels", "order"), [(128, "last"), (512, "first")])
@torch.no_grad()
def test_the_kernel_follows_the_number_of_channels(channels: int, order: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 64, 3)
    window = randn(9, 24, channels)
    x = window[None].permute(0, 3, 1, 2)
    by_kernel = {
        name: F.conv2d(view, conv.weight, conv.bias, padding=(0, 1))[0].permute(1, 2, 0)
        for name, view in (("first", x.contiguous()), ("last", x))
    }
    assert not torch.equal(by_kernel["first"], by_kernel["last"]), "the control: rounding differs"
    assert torch.equal(layers.Conv3x3(conv).apply(window), by_kernel[order])


def test_flux2_streams() -> None:
    network = seeded.network(seeded.flux2((32, 32), layers_per_block=1))
    network.enable_streaming()
    z = randn(1, 32, 4, 4)
    streamed = call(network, "decode", z)
    network.disable_streaming()
    assert error(streamed, call(network, "decode", z)) < TOLERANCE


def test_a_copy_keeps_the_setting() -> None:
    network = seeded.network(SMALL)
    network.enable_streaming("3GiB")
    again = copy.deepcopy(network)
    assert again.streaming == network.streaming
    again.disable_streaming()
    assert network.streaming is not None


def test_nan_comes_out_where_the_ordinary_run_has_it() -> None:
    z = randn(1, 4, 8, 8)
    z[0, 0, 3, 3] = torch.nan
    whole = call(NETWORK, "decode", z)
    streamed = executed(planned(NETWORK, "decode", z, rows=2, spill=False), z)
    assert torch.equal(streamed.isnan(), whole.isnan()) and streamed.isnan().any()


# --- what raises an error


def assert_raises(match: str, x: Tensor, network: Any = None, **options: Any) -> None:
    network = network or seeded.network(SMALL)
    network.enable_streaming(**options)
    with torch.no_grad(), pytest.raises(sdconv.InputError, match=match):
        network.decode(x)


def test_another_dtype_than_the_networks() -> None:
    assert_raises("float64", randn(1, 4, 4, 4).double())


def test_too_small_a_feature_map() -> None:
    assert_raises(
        "too small for this network", randn(1, 4, 1, 1), seeded.network(seeded.kl((32,), 4, True))
    )


def test_gradients() -> None:
    network = seeded.network(SMALL)
    network.enable_streaming()
    with pytest.raises(sdconv.InputError, match="no gradients"):
        network.decode(randn(1, 4, 4, 4).requires_grad_())
    # trainable weights alone raise no error: weights are trainable by default
    assert network.decoder.conv_in.weight.requires_grad
    assert not network.decode(randn(1, 4, 4, 4)).sample.requires_grad


def test_hooks_and_adapters_are_named() -> None:
    network = seeded.network(SMALL)
    handle = network.decoder.mid_block.resnets[1].conv1.register_forward_hook(lambda *_: None)
    assert_raises(
        r"mid_block\.resnets\.1\.conv1: the module has a hook", randn(1, 4, 4, 4), network
    )
    call(network, "encode", randn(1, 3, 16, 16))  # the encoder has none
    handle.remove()
    network.decoder.conv_in.forward = lambda x: x
    assert_raises(r"decoder\.conv_in: the module has a hook", randn(1, 4, 4, 4), network)
    del network.decoder.conv_in.forward

    class Adapter(nn.Conv2d):
        pass

    network.decoder.conv_out = Adapter(32, 3, 3, padding=1)
    assert_raises(r"decoder\.conv_out: .* own layers only", randn(1, 4, 4, 4), network)


def test_the_shape_is_still_checked() -> None:
    assert_raises(r"\(B, 4, H, W\)", randn(1, 3, 4, 4))
