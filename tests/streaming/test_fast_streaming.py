"""Streaming by the fast backend: its convolutions in strips, with the whole map's statistics."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import halos, seeded
from helpers.numbers import error
from helpers.streamed import LINUX, both, executed, open_files, planned, randn
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sdconv
from sdconv.fast.cpu.conv import WinogradPass
from sdconv.fast.cpu.weight_cache import weight_cache
from sdconv.streaming import in_words, least_memory, planner, steps_of
from sdconv.streaming.fused import DoubledWinograd, HalvedBetweenZeros, Winograd
from sdconv.streaming.layers import Layer
from sdconv.streaming.maps import Map, Store
from sdconv.streaming.moments import Moments
from sdconv.streaming.passes import Ground

# wide enough that Winograd's method pays on small maps
CONFIG = seeded.kl((96, 128), 4, True, layers_per_block=1)
NETWORK = seeded.network(CONFIG).requires_grad_(False)
TOLERANCE = 1e-5
# to the reference: the fast backend's own
WITHIN = 2e-5


@pytest.mark.parametrize(("work", "size", "kinds"), [
    ("decode", (25, 30), {Winograd, DoubledWinograd}), ("encode", (50, 60), {Winograd}),
])  # fmt: skip
def test_these_sizes_are_computed_fast(work: Any, size: tuple[int, int], kinds: set[type]) -> None:
    with sdconv.backend("fast"):
        layers = [type(step.layer) for step in steps_of(NETWORK, work, *size)]
    assert kinds <= set(layers)
    assert layers.count(Winograd) >= 8
    plain = [type(step.layer) for step in steps_of(NETWORK, work, *size)]
    assert not {Winograd, DoubledWinograd} & set(plain), "the reference is what it was"
    own = copy.deepcopy(NETWORK)
    sdconv.backends.set_backend(own, "fast")
    assert [type(step.layer) for step in steps_of(own, work, *size)] == layers


@given(
    st.sampled_from(["encode", "decode"]),
    st.tuples(st.integers(40, 70), st.integers(40, 70)),
    st.integers(1, 20),
    st.booleans(),
)
@example("encode", (61, 43), 1, True)
@example("decode", (70, 44), 3, True)
@settings(max_examples=12)
def test_any_size_and_height_of_strips(
    work: str, size: tuple[int, int], rows: int, spill: bool
) -> None:
    shape = (1, 3, *size) if work == "encode" else (1, 4, size[0] // 2, size[1] // 2)
    x = randn(*shape)
    plan = planned(NETWORK, work, x, rows, spill)
    assert any(isinstance(step.layer, Winograd) for step in plan.steps)
    streamed = executed(plan, x, Path(tempfile.gettempdir()) if spill else None)
    assert error(streamed, both(NETWORK, work, x)) < TOLERANCE
    assert error(streamed, both(NETWORK, work, x, "reference")) < WITHIN


@pytest.mark.parametrize(("work", "shape"), [
    ("decode", (1, 4, 40, 44)), ("encode", (1, 3, 96, 88)),
])  # fmt: skip
def test_another_height_of_strips_is_closer_than_rounding(
    work: str, shape: tuple[int, ...]
) -> None:
    """Statistics are exact, so that the same numbers go through the same arithmetic. (At these
    sizes: where a map is so small that torch's kernel is faster, its rounding depends on a strip's
    height.)"""
    x = randn(*shape)
    one, *others = (
        executed(planned(NETWORK, work, x, rows, spill=False), x) for rows in (1, 3, 60)
    )
    assert max(error(other, one) for other in others) < 1e-6
    assert error(one, both(NETWORK, work, x)) < 1e-6, "and the unstreamed network's"


def test_by_the_method_and_by_the_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "KERNELS", 0)
    z = randn(2, 4, 25, 30)
    whole = both(NETWORK, "decode", z)
    network = copy.deepcopy(NETWORK)
    with sdconv.backend("fast"):
        least = least_memory(steps_of(NETWORK, "decode", 25, 30), pictures=2, spill=True)
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
@pytest.mark.parametrize("work", ["decode", "encode"])
def test_narrow_dtypes(work: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """No further from float64 than twice what the ordinary run by the same backend is."""
    network = copy.deepcopy(NETWORK).to(dtype)
    x = (randn(1, 4, 25, 30) if work == "decode" else randn(1, 3, 50, 60)).to(dtype)
    truth = both(copy.deepcopy(network).double(), work, x.double())
    plan = planned(network, work, x, 3, spill=True)
    assert any(isinstance(step.layer, Winograd) for step in plan.steps)
    streamed = executed(plan, x, tmp_path)
    assert streamed.dtype == dtype
    assert error(streamed, truth) <= 2 * error(both(network, work, x), truth)


def test_double_precision_is_the_reference() -> None:
    def kinds(network: Any) -> set[type]:
        with sdconv.backend("fast"):
            return {type(step.layer) for step in steps_of(network, "decode", 25, 30)}

    assert Winograd in kinds(NETWORK)
    assert Winograd not in kinds(copy.deepcopy(NETWORK).double())


def test_a_very_long_side() -> None:
    x = randn(1, 4, 6, 300)
    for z in (x, x.transpose(2, 3)):
        streamed = executed(planned(NETWORK, "decode", z, 2, spill=False), z)
        assert error(streamed, both(NETWORK, "decode", z)) < TOLERANCE


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite_comes_out_where_the_reference_has_it(value: float) -> None:
    network = copy.deepcopy(NETWORK)
    z = randn(2, 4, 25, 30)
    z[1, 2, 7, 8] = value
    expected = both(network, "decode", z, "reference")
    network.enable_streaming()
    out = both(network, "decode", z)
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().any()
    finite = expected.isfinite()
    assert finite[0].all() and error(out[finite], expected[finite]) < WITHIN


def test_not_finite_within_a_limit_too_low_for_the_reference(tmp_path: Path) -> None:
    network = seeded.network(seeded.kl((32, 256), 4, True, layers_per_block=1))
    z = randn(1, 4, 2, 1000)
    least = {}
    for name in ("fast", "reference"):
        with sdconv.backend(name):
            steps = steps_of(network, "decode", *z.shape[2:])
        least[name] = least_memory(steps, pictures=1, spill=True)
    assert least["fast"] < least["reference"]
    network.enable_streaming(least["fast"], tmp_path)
    assert both(network, "decode", z).isfinite().all(), "the control"
    z[0, 2, 1, 8] = torch.nan
    with pytest.raises(sdconv.InputError, match="the input: NaN or infinity") as raised:
        both(network, "decode", z)
    assert f"at least {in_words(least['reference'])}" in str(raised.value)
    network.enable_streaming(in_words(least["reference"]), tmp_path)
    assert both(network, "decode", z).isnan().any(), "what it says suffices"
    network.enable_streaming(least["fast"], tmp_path)
    network.decoder.up_blocks[0].upsamplers[0].conv.bias.data[5] = torch.inf
    with pytest.raises(sdconv.InputError, match=r"upsamplers\.0\.conv: NaN or infinity"):
        both(network, "decode", z.nan_to_num())


@LINUX
def test_the_maps_of_the_first_run_are_gone_before_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "KERNELS", 0)
    network = copy.deepcopy(NETWORK)
    z = randn(1, 4, 25, 30)
    z[0, 2, 7, 8] = torch.nan
    with sdconv.backend("fast"):
        least = least_memory(steps_of(network, "decode", 25, 30), pictures=1, spill=True)
    network.enable_streaming(least, tmp_path)
    assert network.streaming is not None
    assert network.streaming.plan(network, "decode", z).spilled > 0, "by the reference too"
    mapped = []
    right = Store.tensor

    def watch(self: Store, key: Map) -> Tensor:
        tensor = right(self, key)
        mapped.append(len(open_files(tmp_path)))
        return tensor

    monkeypatch.setattr(Store, "tensor", watch)
    assert both(network, "decode", z).isnan().any(), "by the second run"
    assert max(mapped) == mapped[0] > 0


def test_transformed_weights_are_not_kept() -> None:
    network = copy.deepcopy(NETWORK)
    network.enable_streaming()
    z = randn(1, 4, 25, 30)
    before = weight_cache.memory
    both(network, "decode", z)
    assert weight_cache.memory == before
    network.disable_streaming()
    both(network, "decode", z)
    assert weight_cache.memory > before, "the control: an ordinary run keeps them"


@LINUX
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_after_an_error(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = randn(1, 4, 25, 30)
    plan = planned(NETWORK, "decode", z, 2, spill=True)
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


# --- what must fail


def seams() -> float:
    z = randn(1, 4, 25, 30)
    streamed = executed(planned(NETWORK, "decode", z, 2, spill=False), z)
    return error(streamed, both(NETWORK, "decode", z))


def test_statistics_of_the_last_strip_alone_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seams() < TOLERANCE
    whole_map = Moments.take

    def forget(self: Moments, sums: Tensor, counts: Tensor) -> None:
        self.__init__(len(self.mean), self.mean.device)  # type: ignore[misc]
        whole_map(self, sums, counts)

    monkeypatch.setattr(Moments, "take", forget)
    assert seams() > 100 * TOLERANCE


def test_a_row_that_was_written_over_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = WinogradPass.strip

    def forget(self: WinogradPass, strip: Any) -> Any:
        self.above = None
        return right(self, strip)

    monkeypatch.setattr(WinogradPass, "strip", forget)
    z = randn(1, 4, 25, 30)
    streamed = executed(planned(NETWORK, "decode", z, 2, spill=False), z)
    monkeypatch.undo()
    assert error(streamed, both(NETWORK, "decode", z)) > 100 * TOLERANCE


def in_strips(layer: Layer, source: Tensor, units: int) -> Tensor:
    """A layer's output, ``(H, W, C)``, from strips of so many units."""
    height, width, _ = source.shape
    target = source.new_empty(*layer.output_size(height, width), layer.channels)
    ground = Ground(source, target, None, (), None, None, source.device)
    under_way = layer.begin(ground, units)
    for first in range(0, layer.units(height), units):
        under_way.strip(first, min(first + units, layer.units(height)))
    return target


@pytest.mark.parametrize(
    ("kind", "dtype", "fault"),
    [
        *(
            (kind, dtype, fault)
            for kind in (Winograd, DoubledWinograd)
            for dtype, faults in (
                (torch.float32, halos.IN_PLACE),
                (torch.float16, halos.COPIED),
            )
            for fault in faults
        ),
        (HalvedBetweenZeros, torch.float32, halos.window_without_its_last_row),
    ],
)
@torch.no_grad()
def test_a_missing_row_between_strips_fails(
    kind: Any, dtype: torch.dtype, fault: halos.Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = kind(nn.Conv2d(16, 16, 3, dtype=dtype))
    source = randn(22, 20, 16).to(dtype)
    whole = in_strips(layer, source, layer.units(22)).double()
    borders = halos.border_rows(fault, layer.outputs(0, 2)[1], len(whole))
    assert len(borders) >= 2
    within = TOLERANCE if dtype == torch.float32 else 2e-3

    def errors() -> Tensor:
        """Of each row of the output."""
        off = (in_strips(layer, source, 2).double() - whole).abs() / whole.abs().max()
        return off.amax(dim=(1, 2))

    assert errors().max() < within
    fault(monkeypatch)
    found = errors()
    assert found[borders].min() > 1e-2
    found[borders] = 0
    assert found.max() < within, "and it is the border that shows it"
