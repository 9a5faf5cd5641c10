"""Encoding and decoding in strips: the same numbers as the whole, at any height of a strip."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers import seeded
from helpers.layouts import half_spilled
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sdconv
from sdconv.integrations.peers import peer
from sdconv.streaming import Plan, layers, make_plan, steps_of
from sdconv.streaming.executor import run
from sdconv.streaming.moments import Moments

SMALL = seeded.kl((32, 64, 64), 4, True, layers_per_block=1)
KINDS = {name: c for name, c in seeded.WITH_PEER.items() if "taesd" not in name}
TOLERANCE = 1e-5


def randn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.no_grad()
def both(network: Any, work: str, x: Tensor) -> Tensor:
    """Moments of a picture's latents, or latents' pictures."""
    if work == "decode":
        return network.decode(x).sample
    return network.encode(x).latent_dist.parameters


def planned(network: Any, work: Any, x: Tensor, *, rows: int | None = None, spill: bool) -> Plan:
    """A plan with this many units a strip, as many as fit if None; half of the bytes spilled if
    asked."""
    steps = steps_of(network, work, *x.shape[2:])
    plan = make_plan(steps, pictures=len(x), limit=None, can_spill=spill)
    if rows is not None:
        plan = dataclasses.replace(plan, units=(rows,) * len(steps))
    if spill:
        plan = dataclasses.replace(plan, layout=half_spilled(plan.layout))
    return plan


@torch.no_grad()
def executed(plan: Plan, x: Tensor, folder: Path | None = None) -> Tensor:
    out = torch.full(plan.shape, torch.nan, dtype=x.dtype)
    for one, made in zip(x, out, strict=True):
        run(plan, one, made, folder=folder)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_vae(kind: str, tmp_path: Path) -> None:
    network = seeded.network(KINDS[kind])
    latent = network.config["latent_channels"]
    for work, x in (("decode", randn(2, latent, 6, 5)), ("encode", randn(2, 3, 37, 50))):
        whole = both(network, work, x)
        network.enable_streaming("1GiB", tmp_path)
        assert difference(both(network, work, x), whole) < TOLERANCE
        network.disable_streaming()
        assert torch.equal(both(network, work, x), whole)


NETWORK = seeded.network(SMALL)
# what a few values in a group do to rounding is out of sight in float64
EXACT = copy.deepcopy(NETWORK).double()


@given(
    st.sampled_from(["encode", "decode"]),
    st.tuples(st.integers(4, 40), st.integers(4, 40)),
    st.integers(1, 45),
    st.booleans(),
)
@example("encode", (13, 4), 1, True)
@example("decode", (40, 5), 7, False)
@settings(max_examples=25)
def test_any_size_and_height_of_strips(
    work: str, size: tuple[int, int], rows: int, spill: bool
) -> None:
    shape = (1, 3, *size) if work == "encode" else (1, 4, -(-size[0] // 4), -(-size[1] // 4))
    x = randn(*shape).double()
    plan = planned(EXACT, work, x, rows=rows, spill=spill)
    folder = Path(tempfile.gettempdir()) if spill else None
    assert difference(executed(plan, x, folder), both(EXACT, work, x)) < 1e-10


def test_no_closer_to_the_truth_is_asked_than_the_whole_gives() -> None:
    """Both stand equally far from a run in float64."""
    x = randn(1, 4, 24, 24)
    exact = both(copy.deepcopy(NETWORK).double(), "decode", x.double())
    whole = difference(both(NETWORK, "decode", x).double(), exact)
    strips = executed(planned(NETWORK, "decode", x, rows=3, spill=False), x)
    assert difference(strips.double(), exact) < 2 * whole


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """Within twice the ordinary run's own distance from float64."""
    network = copy.deepcopy(NETWORK).to(dtype)
    exact = copy.deepcopy(network).double()
    for work, x in (("decode", randn(1, 4, 7, 9)), ("encode", randn(1, 3, 30, 22))):
        x = x.to(dtype)
        truth, whole = both(exact, work, x.double()), both(network, work, x)
        plan = planned(network, work, x, rows=3, spill=True)
        strips = executed(plan, x, tmp_path)
        assert strips.dtype == dtype
        allowed = max(2 * difference(whole.double(), truth), 1e-13)
        assert difference(strips.double(), truth) <= allowed


def test_very_long_sides() -> None:
    x = randn(1, 4, 2, 120)
    for z in (x, x.transpose(2, 3)):
        whole = both(NETWORK, "decode", z)
        strips = executed(planned(NETWORK, "decode", z, rows=5, spill=False), z)
        assert difference(strips, whole) < TOLERANCE


def test_pictures_of_a_batch_do_not_see_each_other() -> None:
    z = randn(3, 4, 6, 5)
    z[1] *= 100
    plan = planned(NETWORK, "decode", z, rows=2, spill=False)
    one = planned(NETWORK, "decode", z[:1], rows=2, spill=False)
    alone = torch.cat([executed(one, z[number : number + 1]) for number in range(3)])
    assert torch.equal(executed(plan, z), alone)
    assert difference(alone, both(NETWORK, "decode", z)) < TOLERANCE


def test_layouts_and_views_of_the_input() -> None:
    z = randn(1, 4, 6, 10)
    plan = planned(NETWORK, "decode", z, rows=2, spill=False)
    expected = executed(plan, z)
    wide = randn(1, 4, 6, 20)
    wide[..., ::2] = z
    for same in (z.contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        assert torch.equal(executed(plan, same), expected)
    assert expected.is_contiguous()


# --- what must fail: each of these is what an inexact method does


def seams(network: Any, z: Tensor, rows: int = 3) -> float:
    strips = executed(planned(network, "decode", z, rows=rows, spill=False), z)
    return difference(strips, both(network, "decode", z))


def test_tiles_of_the_reference_differ() -> None:
    theirs, _ = peer(SMALL, None, seeded.tensors(SMALL), "diffusers")
    assert isinstance(theirs, diffusers.AutoencoderKL)
    z = randn(1, 4, 24, 24)
    whole = both(theirs, "decode", z)
    theirs.enable_tiling()
    theirs.tile_latent_min_size, theirs.tile_sample_min_size = 12, 48
    assert difference(both(theirs, "decode", z), whole) > 1000 * TOLERANCE
    assert seams(NETWORK, z) < TOLERANCE


def test_statistics_of_the_last_strip_alone_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    whole_map = Moments.add

    def forget(self: Moments, rows: Tensor) -> None:
        self.__init__(len(self.mean), self.mean.device)  # type: ignore[misc]
        whole_map(self, rows)

    monkeypatch.setattr(Moments, "add", forget)
    assert seams(NETWORK, randn(1, 4, 12, 12)) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", [layers.Same, layers.Doubled])
@pytest.mark.parametrize("short", [(0, 1), (1, 0)], ids=["above", "below"])
def test_a_halo_one_row_short_fails(
    kind: type[layers.Layer], short: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kind.apply

    def blind(self: layers.Layer, strip: Tensor) -> Tensor:
        strip = strip.clone()
        strip[0] *= short[1]
        strip[-1] *= short[0]
        return right(self, strip)

    monkeypatch.setattr(kind, "apply", blind)
    assert seams(NETWORK, randn(1, 4, 12, 12)) > 100 * TOLERANCE


def test_attention_within_a_strip_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdconv.streaming.layers import Attended

    right = Attended.compute

    def narrow(self: Any, strip: Tensor, residual: Any, whole: Sequence[Tensor]) -> Tensor:
        return right(self, strip, residual, [part[: len(strip)] for part in whole])

    monkeypatch.setattr(Attended, "compute", narrow)
    assert seams(NETWORK, randn(1, 4, 12, 12)) > 100 * TOLERANCE


# --- as methods of the network, and of a pipeline


def test_enable_tiling_streams() -> None:
    network = seeded.network(SMALL)
    z = randn(1, 4, 6, 7)
    whole = both(network, "decode", z)
    network.enable_tiling()
    assert network.streaming is not None
    assert difference(both(network, "decode", z), whole) < TOLERANCE
    network.enable_tiling(False)
    assert network.streaming is None
    network.enable_tiling(tile_sample_min_height=64)
    network.disable_tiling()
    assert network.streaming is None


def test_enable_tiling_keeps_a_limit_that_was_set(tmp_path: Path) -> None:
    network = seeded.network(SMALL)
    network.enable_streaming("2GiB", tmp_path)
    told = network.streaming
    network.enable_tiling()
    network.use_tiling = True
    assert network.streaming == told
    network.disable_tiling()
    network.enable_tiling()
    assert network.streaming is not None and network.streaming.limit is None, "the control"


def test_progress_is_shown_on_a_terminal_only(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, z = seeded.network(SMALL), randn(1, 4, 6, 7)
    for terminal, progress in ((True, True), (True, False), (False, True)):
        # what rich takes for a terminal
        monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
        network.enable_streaming(None, progress=progress)
        both(network, "decode", z)
        shown = capfd.readouterr()
        assert ("decoding" in shown.err) == (terminal and progress)
        assert shown.out == ""


def test_progress_reaches_its_end() -> None:
    plan = planned(NETWORK, "decode", z := randn(1, 4, 20, 20), rows=3, spill=False)
    done: list[int] = []
    out = torch.empty(plan.shape)
    with torch.no_grad():
        run(plan, z[0], out[0], folder=None, tick=lambda step, part: done.append(part))
    assert len(done) == sum(-(-step.units // 3) for step in plan.steps)
    assert 0.99 * plan.multiplies < sum(done) <= plan.multiplies


def test_whole_forward_and_results_streamed() -> None:
    network = seeded.network(SMALL)
    x = randn(2, 3, 16, 20)
    with torch.inference_mode():
        whole = network(x).sample
        network.enable_streaming()
        assert difference(network(x).sample, whole) < TOLERANCE
        (posterior,) = network.encode(x, return_dict=False)
        (pictures,) = network.decode(posterior.mode(), return_dict=False)
    assert difference(pictures, whole) < TOLERANCE


def test_autocast_changes_nothing() -> None:
    network = seeded.network(SMALL)
    z, x = randn(1, 4, 6, 7), randn(1, 3, 24, 28)
    low = both(network, "decode", z.bfloat16().float())
    network.enable_streaming()
    expected = both(network, "decode", z), both(network, "encode", x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(both(network, "decode", z), expected[0])
        assert torch.equal(both(network, "encode", x), expected[1])
        assert difference(both(network, "decode", z.bfloat16()), low) < TOLERANCE


def test_as_exact_as_the_ordinary_run_with_many_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    network = seeded.network(seeded.kl((512,), 4, True, layers_per_block=1))
    z = randn(1, 4, 24, 24)
    exact = both(copy.deepcopy(network).double(), "decode", z.double())
    whole = difference(both(network, "decode", z).double(), exact)

    def streamed() -> float:
        plan = planned(network, "decode", z, rows=5, spill=False)
        return difference(executed(plan, z).double(), exact)

    assert streamed() < 1.5 * whole
    monkeypatch.setattr(layers, "is_wide", lambda weight: False)
    assert streamed() > 2 * whole, "the control: by the kernel for few channels"


def test_flux2_streams() -> None:
    network = seeded.network(seeded.flux2((32, 32), layers_per_block=1))
    network.enable_streaming()
    z = randn(1, 32, 4, 4)
    streamed = both(network, "decode", z)
    network.disable_streaming()
    assert difference(streamed, both(network, "decode", z)) < TOLERANCE


def test_a_copy_keeps_its_setting() -> None:
    network = seeded.network(SMALL)
    network.enable_streaming("3GiB")
    again = copy.deepcopy(network)
    assert again.streaming == network.streaming
    again.disable_streaming()
    assert network.streaming is not None


def test_not_a_number_comes_out_where_the_whole_has_it() -> None:
    z = randn(1, 4, 8, 8)
    z[0, 0, 3, 3] = torch.nan
    whole = both(NETWORK, "decode", z)
    strips = executed(planned(NETWORK, "decode", z, rows=2, spill=False), z)
    assert torch.equal(strips.isnan(), whole.isnan()) and strips.isnan().any()


# --- what is refused


def refused(match: str, x: Tensor, network: Any = None, **options: Any) -> None:
    network = network or seeded.network(SMALL)
    network.enable_streaming(**options)
    with torch.no_grad(), pytest.raises(sdconv.InputError, match=match):
        network.decode(x)


def test_another_dtype_than_the_network() -> None:
    refused("float64", randn(1, 4, 4, 4).double())


def test_too_small_a_map() -> None:
    refused(
        "too small for this network", randn(1, 4, 1, 1), seeded.network(seeded.kl((32,), 4, True))
    )


def test_gradients() -> None:
    network = seeded.network(SMALL)
    network.enable_streaming()
    with pytest.raises(sdconv.InputError, match="no gradients"):
        network.decode(randn(1, 4, 4, 4).requires_grad_())
    # weights want them unless told otherwise, so that an ordinary call would be refused
    assert network.decoder.conv_in.weight.requires_grad
    assert not network.decode(randn(1, 4, 4, 4)).sample.requires_grad


def test_hooks_and_adapters_are_named() -> None:
    network = seeded.network(SMALL)
    handle = network.decoder.mid_block.resnets[1].conv1.register_forward_hook(lambda *_: None)
    refused(r"mid_block\.resnets\.1\.conv1: a hook", randn(1, 4, 4, 4), network)
    both(network, "encode", randn(1, 3, 16, 16))  # the other half has none
    handle.remove()
    network.decoder.conv_in.forward = lambda x: x
    refused(r"decoder\.conv_in: a hook", randn(1, 4, 4, 4), network)
    del network.decoder.conv_in.forward

    class Adapter(nn.Conv2d):
        pass

    network.decoder.conv_out = Adapter(32, 3, 3, padding=1)
    refused(r"decoder\.conv_out: .* own layers only", randn(1, 4, 4, 4), network)


def test_the_shape_is_still_checked() -> None:
    refused(r"\(B, 4, H, W\)", randn(1, 3, 4, 4))
