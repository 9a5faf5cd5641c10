"""Streaming with the fast backend: its convolutions in strips, with global statistics."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import halos, seeded
from helpers.numbers import error
from helpers.streamed import LINUX, call, executed, open_files, planned, randn
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sdconv
from sdconv.fast.cpu.conv import WinogradPass
from sdconv.fast.cpu.weight_cache import weight_cache
from sdconv.sizes import format_bytes
from sdconv.streaming import least_memory, planner, steps_of
from sdconv.streaming.buffers import AllocatedBuffers, FeatureBuffer
from sdconv.streaming.fused import (
    AmxConv3x3,
    SidePaddedDownsampleConv,
    UncachedConv3x3,
    WinogradConv3x3,
    WinogradUpsampleConv,
)
from sdconv.streaming.group_stats import RunningGroupStats
from sdconv.streaming.layers import StepContext, StreamLayer

# enough channels for Winograd's method to pay on small feature maps
CONFIG = seeded.kl((96, 128), 4, True, layers_per_block=1)
NETWORK = seeded.network(CONFIG).requires_grad_(False)
TOLERANCE = 1e-5
# the fast backend's own error against the reference
WITHIN = 2e-5


@pytest.mark.parametrize(("direction", "size", "kinds"), [
    ("decode", (25, 30), {WinogradConv3x3, UncachedConv3x3, WinogradUpsampleConv}),
    ("encode", (50, 60), {WinogradConv3x3, UncachedConv3x3}),
])  # fmt: skip
def test_these_sizes_use_the_fast_layers(
    direction: Any, size: tuple[int, int], kinds: set[type]
) -> None:
    with sdconv.backend("fast"):
        layers = [type(step.layer) for step in steps_of(NETWORK, direction, *size)]
    assert kinds <= set(layers)
    assert sum(issubclass(layer, WinogradConv3x3) for layer in layers) >= 8
    plain = [type(step.layer) for step in steps_of(NETWORK, direction, *size)]
    assert not {WinogradConv3x3, WinogradUpsampleConv} & set(plain), "the reference has none"
    own = copy.deepcopy(NETWORK)
    sdconv.backends.set_backend(own, "fast")
    assert [type(step.layer) for step in steps_of(own, direction, *size)] == layers


@given(
    st.sampled_from(["encode", "decode"]),
    st.tuples(st.integers(40, 70), st.integers(40, 70)),
    st.integers(1, 20),
    st.booleans(),
)
@example("encode", (61, 43), 1, True)
@example("decode", (70, 44), 3, True)
@settings(max_examples=12)
def test_any_image_size_and_strip_height(
    direction: str, size: tuple[int, int], rows: int, spill: bool
) -> None:
    shape = (1, 3, *size) if direction == "encode" else (1, 4, size[0] // 2, size[1] // 2)
    x = randn(*shape)
    plan = planned(NETWORK, direction, x, rows=rows, spill=spill)
    assert any(isinstance(step.layer, WinogradConv3x3) for step in plan.steps)
    streamed = executed(plan, x, Path(tempfile.gettempdir()) if spill else None)
    assert error(streamed, call(NETWORK, direction, x)) < TOLERANCE
    assert error(streamed, call(NETWORK, direction, x, "reference")) < WITHIN


@pytest.mark.parametrize(("direction", "shape"), [
    ("decode", (1, 4, 40, 44)), ("encode", (1, 3, 96, 88)),
])  # fmt: skip
def test_the_strip_height_hardly_changes_the_rounding(
    direction: str, shape: tuple[int, ...]
) -> None:
    """Statistics are exact, so the same values go through the same arithmetic. (At these sizes. On
    feature maps so small that torch's kernel is used, rounding depends on the strip's height.)"""
    x = randn(*shape)
    one, *others = (
        executed(planned(NETWORK, direction, x, rows=rows, spill=False), x) for rows in (1, 3, 60)
    )
    # torch's matrix products of the attention layer round by the strip's height on some processors
    assert max(error(other, one) for other in others) < 5e-6
    assert error(one, call(NETWORK, direction, x)) < 1e-6, "as for the unstreamed network"


def test_backend_and_set_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "KERNEL_OVERHEAD", 0)
    z = randn(2, 4, 25, 30)
    whole = call(NETWORK, "decode", z)
    network = copy.deepcopy(NETWORK)
    with sdconv.backend("fast"):
        least = least_memory(steps_of(NETWORK, "decode", 25, 30), batch=2, spill=True)
    network.enable_streaming(least, tmp_path)
    assert network.streaming is not None
    with sdconv.backend("fast"):
        assert network.streaming.plan(network, "decode", z).spilled > 0
        streamed = network.decode(z).sample
    assert error(streamed, whole) < TOLERANCE
    plain = network.decode(z).sample
    assert not torch.equal(plain, streamed)
    sdconv.backends.set_backend(network, "fast")
    assert torch.equal(network.decode(z).sample, streamed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_narrow_dtypes(direction: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The error is at most twice that of the ordinary run, both measured against float64."""
    network = copy.deepcopy(NETWORK).to(dtype)
    x = (randn(1, 4, 25, 30) if direction == "decode" else randn(1, 3, 50, 60)).to(dtype)
    truth = call(copy.deepcopy(network).double(), direction, x.double())
    plan = planned(network, direction, x, rows=3, spill=True)
    assert any(isinstance(step.layer, (WinogradConv3x3, AmxConv3x3)) for step in plan.steps)
    streamed = executed(plan, x, tmp_path)
    assert streamed.dtype == dtype
    assert error(streamed, truth) <= 2 * error(call(network, direction, x), truth)


def test_double_precision_is_the_reference() -> None:
    def kinds(network: Any) -> set[type]:
        with sdconv.backend("fast"):
            return {type(step.layer) for step in steps_of(network, "decode", 25, 30)}

    assert WinogradConv3x3 in kinds(NETWORK)
    assert WinogradConv3x3 not in kinds(copy.deepcopy(NETWORK).double())


@pytest.mark.slow
def test_a_very_long_side() -> None:
    x = randn(1, 4, 6, 300)
    for z in (x, x.transpose(2, 3)):
        streamed = executed(planned(NETWORK, "decode", z, rows=2, spill=False), z)
        assert error(streamed, call(NETWORK, "decode", z)) < TOLERANCE


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_come_out_where_the_reference_has_them(value: float) -> None:
    network = copy.deepcopy(NETWORK)
    z = randn(2, 4, 25, 30)
    z[1, 2, 7, 8] = value
    expected = call(network, "decode", z, "reference")
    network.enable_streaming()
    out = call(network, "decode", z)
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().any()
    finite = expected.isfinite()
    assert finite[0].all() and error(out[finite], expected[finite]) < WITHIN


def test_nan_within_a_limit_too_low_for_the_reference(tmp_path: Path) -> None:
    network = seeded.network(seeded.kl((32, 256), 4, True, layers_per_block=1))
    z = randn(1, 4, 2, 1000)
    least = {}
    for name in ("fast", "reference"):
        with sdconv.backend(name):
            steps = steps_of(network, "decode", *z.shape[2:])
        least[name] = least_memory(steps, batch=1, spill=True)
    assert least["fast"] < least["reference"]
    network.enable_streaming(least["fast"], tmp_path)
    assert call(network, "decode", z).isfinite().all(), "the control"
    z[0, 2, 1, 8] = torch.nan
    with pytest.raises(sdconv.InputError, match="the input: NaN or infinity") as raised:
        call(network, "decode", z)
    assert f"at least {format_bytes(least['reference'])}" in str(raised.value)
    network.enable_streaming(format_bytes(least["reference"]), tmp_path)
    assert call(network, "decode", z).isnan().any(), "the limit that the error asks for is enough"
    network.enable_streaming(least["fast"], tmp_path)
    network.decoder.up_blocks[0].upsamplers[0].conv.bias.data[5] = torch.inf
    with pytest.raises(sdconv.InputError, match=r"upsamplers\.0\.conv: NaN or infinity"):
        call(network, "decode", z.nan_to_num())


@LINUX
def test_the_buffers_of_the_first_run_are_freed_before_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "KERNEL_OVERHEAD", 0)
    network = copy.deepcopy(NETWORK)
    z = randn(1, 4, 25, 30)
    z[0, 2, 7, 8] = torch.nan
    with sdconv.backend("fast"):
        least = least_memory(steps_of(network, "decode", 25, 30), batch=1, spill=True)
    network.enable_streaming(least, tmp_path)
    assert network.streaming is not None
    assert network.streaming.plan(network, "decode", z).spilled > 0, "by the reference too"
    mapped = []
    tensor_of = AllocatedBuffers.tensor

    def watch(self: AllocatedBuffers, buffer: FeatureBuffer) -> Tensor:
        tensor = tensor_of(self, buffer)
        mapped.append(len(open_files(tmp_path)))
        return tensor

    monkeypatch.setattr(AllocatedBuffers, "tensor", watch)
    assert call(network, "decode", z).isnan().any(), "computed by the second run"
    assert max(mapped) == mapped[0] > 0


def test_transformed_weights_are_not_cached() -> None:
    network = copy.deepcopy(NETWORK)
    network.enable_streaming()
    z = randn(1, 4, 25, 30)
    before = weight_cache.memory
    call(network, "decode", z)
    assert weight_cache.memory == before
    network.disable_streaming()
    call(network, "decode", z)
    assert weight_cache.memory > before, "the control: an ordinary run caches them"


@LINUX
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_after_an_error(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = randn(1, 4, 25, 30)
    plan = planned(NETWORK, "decode", z, rows=2, spill=True)
    last = plan.steps[-2].target
    right = WinogradPass.strip

    def fails(self: WinogradPass, strip: Any) -> Any:
        if self.out.shape == (last.channels, last.height, last.width):
            assert open_files(tmp_path), "the control: there is something to leave"
            raise error
        return right(self, strip)

    monkeypatch.setattr(WinogradPass, "strip", fails)
    with pytest.raises(error):
        executed(plan, z, tmp_path)
    assert open_files(tmp_path) == [] and list(tmp_path.iterdir()) == []


# --- injected faults


def seams() -> float:
    z = randn(1, 4, 25, 30)
    streamed = executed(planned(NETWORK, "decode", z, rows=2, spill=False), z)
    return error(streamed, call(NETWORK, "decode", z))


def test_statistics_of_the_last_strip_alone_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seams() < TOLERANCE
    update = RunningGroupStats.update_from_sums

    def forget(self: RunningGroupStats, sums: Tensor, counts: Tensor) -> None:
        self.__init__(len(self.mean), self.mean.device)  # type: ignore[misc]
        update(self, sums, counts)

    monkeypatch.setattr(RunningGroupStats, "update_from_sums", forget)
    assert seams() > 100 * TOLERANCE


def test_an_overwritten_row_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = WinogradPass.strip

    def forget(self: WinogradPass, strip: Any) -> Any:
        self.above = None
        return right(self, strip)

    monkeypatch.setattr(WinogradPass, "strip", forget)
    z = randn(1, 4, 25, 30)
    streamed = executed(planned(NETWORK, "decode", z, rows=2, spill=False), z)
    monkeypatch.undo()
    assert error(streamed, call(NETWORK, "decode", z)) > 100 * TOLERANCE


def in_strips(layer: StreamLayer, source: Tensor, units: int) -> Tensor:
    """A layer's output, ``(H, W, C)``, computed in strips of ``units``."""
    height, width, _ = source.shape
    target = source.new_empty(*layer.output_size(height, width), layer.out_channels)
    context = StepContext(source, target, None, (), None, None, source.device)
    runner = layer.make_runner(context, units)
    for first in range(0, layer.units(height), units):
        runner.run_strip(first, min(first + units, layer.units(height)))
    return target


@pytest.mark.parametrize(
    ("kind", "dtype", "channels_first", "fault"),
    [
        *(
            (kind, dtype, channels_first, fault)
            for kind in (WinogradConv3x3, WinogradUpsampleConv)
            for dtype, channels_first, faults in (
                (torch.float32, False, halos.IN_PLACE),
                (torch.float16, False, halos.IN_PLACE),
                (torch.float16, True, halos.COPIED),
            )
            for fault in faults
        ),
        (SidePaddedDownsampleConv, torch.float32, False, halos.window_without_its_last_row),
    ],
)
@torch.no_grad()
def test_a_missing_row_between_strips_fails(
    kind: Any,
    dtype: torch.dtype,
    channels_first: bool,
    fault: halos.Fault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    layer = kind(nn.Conv2d(16, 16, 3, dtype=dtype))
    source = randn(22, 20, 16).to(dtype)
    if channels_first:
        source = source.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    whole = in_strips(layer, source, layer.units(22)).double()
    borders = halos.border_rows(fault, layer.output_rows(0, 2)[1], len(whole))
    assert len(borders) >= 2
    within = TOLERANCE if dtype == torch.float32 else 2e-3

    def errors() -> Tensor:
        """The error of each output row."""
        off = (in_strips(layer, source, 2).double() - whole).abs() / whole.abs().max()
        return off.amax(dim=(1, 2))

    assert errors().max() < within
    fault(monkeypatch)
    found = errors()
    assert found[borders].min() > 1e-2
    found[borders] = 0
    assert found.max() < within, "only the rows at a border are wrong"
