"""One image over several ranks: the bits of a streaming pass over the same strips, in any number of
ranks, and errors on every rank instead of a rank that waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import ranked, seeded
from helpers.numbers import error
from helpers.ranked import Pool, compute, streamed_in_bands
from helpers.slow import first_of
from helpers.streamed import call, randn
from torch import Tensor

import sdconv
from sdconv.streaming import make_plan, steps_of
from sdconv.streaming.fused import WinogradConv3x3
from sdconv.streaming.parallel.bands import Bands, band_steps

SMALL = seeded.kl((32, 64, 64), 4, True, layers_per_block=1)
# enough channels for Winograd's method
WIDE = seeded.kl((96, 128), 4, True, layers_per_block=1)
KINDS = {name: c for name, c in seeded.WITH_PEER.items() if "taesd" not in name}
# torch's matrix products of the attention layer round by the strip's height on some processors
TOLERANCE = 5e-6


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    started = Pool(4, tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


def over(pool: Pool, ranks: int, config: Any, direction: str, x: Tensor, **given: Any) -> Tensor:
    """The network's output over ranks, which all have the same bits of it."""
    given |= {"config": config, "direction": direction, "x": x.numpy()}
    answers = pool.run(compute, ranks, **given)
    assert all(isinstance(answer, np.ndarray) for answer in answers), answers[0]
    first, *others = answers
    assert all(np.array_equal(first, other, equal_nan=True) for other in others)
    return torch.from_numpy(first)


@pytest.mark.parametrize("ranks", first_of([3, 1, 2, 4]))
@pytest.mark.parametrize(("direction", "shape"), [
    ("decode", (2, 4, 9, 7)), ("encode", (1, 3, 50, 41)),
])  # fmt: skip
@pytest.mark.parametrize("rows", first_of([2, None]))
def test_the_bits_of_a_streaming_pass(
    direction: Any, shape: tuple[int, ...], ranks: int, rows: int | None, pool: Pool
) -> None:
    x = randn(*shape)
    found = over(pool, ranks, SMALL, direction, x, rows=rows)
    network = seeded.network(SMALL)
    assert torch.equal(found, streamed_in_bands(network, direction, x, ranks, "reference", rows))


@pytest.mark.parametrize("ranks", first_of([3, 2, 4]))
@pytest.mark.parametrize(("direction", "shape"), [
    ("decode", (1, 4, 30, 26)), ("encode", (1, 3, 61, 44)),
])  # fmt: skip
@pytest.mark.parametrize("rows", first_of([2, None]))
def test_the_bits_of_a_streaming_pass_of_the_fast_backend(
    direction: Any, shape: tuple[int, ...], ranks: int, rows: int | None, pool: Pool
) -> None:
    x, network = randn(*shape), seeded.network(WIDE)
    with sdconv.backend("fast"):
        assert WinogradConv3x3 in {type(s.layer) for s in steps_of(network, direction, *shape[2:])}
    found = over(pool, ranks, WIDE, direction, x, rows=rows, backend="fast")
    assert torch.equal(found, streamed_in_bands(network, direction, x, ranks, "fast", rows))
    assert error(found, call(network, direction, x)) < TOLERANCE


@pytest.mark.parametrize("kind", first_of(KINDS))
def test_every_kind_of_vae(kind: str, pool: Pool) -> None:
    """In float64, in which rounding does not hide a fault."""
    network: Any = seeded.network(KINDS[kind])
    latent = network.config["latent_channels"]
    exact = network.double()
    for direction, x in (("decode", randn(1, latent, 5, 6)), ("encode", randn(1, 3, 45, 34))):
        whole = call(exact, direction, x.double(), "reference")
        found = over(pool, 3, KINDS[kind], direction, x, dtype=torch.float64, rows=1)
        assert error(found, whole) < 1e-10


@pytest.mark.parametrize("dtype", first_of([torch.bfloat16, torch.float16]), ids=str)
def test_narrow_dtypes(dtype: torch.dtype, pool: Pool) -> None:
    z = randn(1, 4, 24, 20)
    for config, backend in ((SMALL, "reference"), (WIDE, "fast")):
        network = seeded.network(config).to(dtype)
        found = over(pool, 3, config, "decode", z, dtype=dtype, backend=backend, rows=2)
        expected = streamed_in_bands(network, "decode", z.to(dtype), 3, backend, 2)
        assert torch.equal(found, expected.float())


def seamless(axes: str, network: Any) -> None:
    sdconv.seamless(network, axes).__enter__()


def padding(mode: str, network: Any) -> None:
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and module.padding == (1, 1):
            module.padding_mode = mode


@pytest.mark.parametrize("change", first_of([
    partial(padding, "reflect"), partial(padding, "replicate"), partial(seamless, "y"),
    partial(seamless, "xy"),
]), ids=["reflect", "replicate", "y", "xy"])  # fmt: skip
def test_other_padding(change: Callable[[Any], None], pool: Pool) -> None:
    """Where the rows beyond an edge are other rows, which another rank may have."""
    network: Any = seeded.network(SMALL).double()
    change(network)
    for direction, x in (("decode", randn(1, 4, 5, 6)), ("encode", randn(1, 3, 29, 34))):
        whole = call(network, direction, x.double(), "reference")
        given: dict[str, Any] = {"dtype": torch.float64, "change": change}
        assert error(over(pool, 4, SMALL, direction, x, **given), whole) < 1e-10


@pytest.mark.parametrize("backend", first_of(["fast", "reference"]))
def test_nan_comes_out_where_one_process_has_it(backend: str, pool: Pool) -> None:
    """The fast backend starts again with the reference, on every rank."""
    x = randn(1, 4, 24, 20)
    x[0, 0, 20, 3] = torch.nan
    found = over(pool, 3, WIDE, "decode", x, backend=backend)
    whole = call(seeded.network(WIDE), "decode", x, backend)
    assert torch.equal(found.isnan(), whole.isnan()) and found.isnan().any()


# --- faults injected into the communication, which the comparisons above must notice


def difference(pool: Pool, fault: Callable[[pytest.MonkeyPatch], None]) -> float:
    """The error with a fault, in float64, where it is 1e-15 without."""
    z = randn(1, 4, 12, 12)
    whole = call(seeded.network(SMALL).double(), "decode", z.double(), "reference")
    given = {"dtype": torch.float64, "config": SMALL, "direction": "decode", "x": z.numpy()}
    answers = pool.run(compute, 3, fault=fault, **given)
    return max(error(torch.from_numpy(answer), whole) for answer in answers)


def no_fault(patch: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize("fault", [
    ranked.a_missing_row, ranked.local_statistics, ranked.local_keys,
], ids=lambda fault: fault.__name__)  # fmt: skip
def test_a_fault_in_the_communication_is_noticed(fault: Any, pool: Pool) -> None:
    assert difference(pool, fault) > 1e-4


def test_without_a_fault_there_is_no_difference(pool: Pool) -> None:
    """The control."""
    assert difference(pool, no_fault) < 1e-10


def test_inner_strips_run_while_rows_travel(pool: Pool) -> None:
    z = randn(1, 4, 24, 20)
    logs = pool.run(ranked.strips_and_waits, 3, config=SMALL, x=z.numpy(), rows=2)
    (middle,) = (log for log in logs[1].items() if log[0] == "decoder.conv_out")
    events = middle[1]
    assert events[0] == "send"
    assert 4 < events.index("wait") < len(events) - 2, events


# --- bands


@pytest.mark.parametrize("backend", ["reference", "fast"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_bands_cover_every_row_once(direction: Any, ranks: int, backend: str) -> None:
    network = seeded.network(WIDE)
    with sdconv.backend(backend):
        steps = steps_of(network, direction, 31, 20)
    bands = Bands(steps, ranks)
    for step in steps:
        for height, found in (
            (step.source.height, [bands.own(step.source.height, r) for r in range(ranks)]),
            (step.target.height, [bands.own(step.target.height, r) for r in range(ranks)]),
            (step.units, [bands.units(step, rank) for rank in range(ranks)]),
        ):
            assert [row for rows in found for row in rows] == list(range(height))
        for rank in range(ranks):
            has = set(bands.own(step.source.height, rank))
            if bands.is_whole(step.source):
                has = set(range(step.source.height))
            needed = set(bands.needed(step, rank))
            received = [m for m in bands.messages(step) if m.receiver == rank]
            assert needed <= has | {place for m in received for place in m.places}
            for message in received:
                assert set(message.rows) <= set(bands.own(step.source.height, message.sender))
                assert message.sender != rank, "with zeros beyond the edges"


def test_memory_is_divided() -> None:
    network = seeded.network(seeded.kl((128, 128, 128), 4, True, layers_per_block=1))
    steps = steps_of(network, "decode", 256, 64)
    options: Any = {"batch": 1, "limit": None, "can_spill": False}
    whole = make_plan(steps, **options).layout.size
    for ranks in (2, 4):
        each = [
            make_plan(band_steps(Bands(steps, ranks), rank), **options).layout.size
            for rank in range(ranks)
        ]
        assert max(each) < 1.1 * whole / ranks


# --- errors, on every rank


def refused(answers: list[Any]) -> str:
    """The error that all ranks raise alike."""
    first, *others = answers
    assert isinstance(first, str) and first.startswith("AgreedError"), answers
    assert all(other == first for other in others)
    return first


@pytest.mark.parametrize(("change", "message"), [
    ({"shape": (1, 4, 9, 8)}, "the ranks differ in the input's shape\n"
     "  expected: the same on every rank\n  got: (1, 4, 9, 7) (rank 0), (1, 4, 9, 8) (rank 1)"),
    ({"shape": (1, 5, 9, 7)}, "on rank 1: AutoencoderKL: latents have the wrong shape"),
    ({"seed": 5}, "hint: give every rank the same: broadcast it, or use one seed"),
    ({"backend": "fast"}, "hint: use the same backend on every rank"),
    ({"dtype": torch.float64}, "on rank 1: AutoencoderKL: latents must have the dtype"),
    ({"direction": "encode"}, "the ranks differ in the method called"),
    ({"gradients": True}, "on rank 1: streaming: streaming computes no gradients"),
    ({"hook": True}, "on rank 1: decoder.conv_in: the module has a hook"),
])  # fmt: skip
def test_what_differs_is_an_error_on_every_rank(
    change: dict[str, Any], message: str, pool: Pool
) -> None:
    answers = pool.run(ranked.differing, 3, config=SMALL, change=change)
    assert message in refused([error for error, _ in answers])
    assert all(afterwards for _, afterwards in answers), "the ranks compute the next input"


def test_weights_must_be_the_same(pool: Pool) -> None:
    message = refused(pool.run(ranked.different_weights, 2, config=SMALL))
    assert "the ranks differ in its weights" in message
    assert "hint: load the same weights on every rank" in message


def test_more_ranks_than_rows(pool: Pool) -> None:
    given = {"config": SMALL, "direction": "decode", "x": randn(1, 4, 3, 9).numpy()}
    message = refused(pool.run(compute, 4, **given))
    assert "more ranks than rows in the smallest feature map" in message
    assert "expected: at most 3\n  got: 4" in message
    given["x"] = randn(1, 4, 4, 9).numpy()
    assert isinstance(pool.run(compute, 4, **given)[3], np.ndarray), "the control"


def test_a_convolution_that_needs_the_whole_map(pool: Pool) -> None:
    given = {"config": SMALL, "direction": "decode", "x": randn(1, 4, 8, 9).numpy()}
    message = refused(pool.run(compute, 2, change=ranked.dilated, **given))
    assert "decoder.conv_in: a convolution of another size" in message


def test_ranks_leave_at_once_after_an_error(pool: Pool) -> None:
    """Before torch 2.8, a rank could wait for its own threads for ever. Nobody refers to the group
    any more while the error is handled, so that its connections have ended."""
    for refused_by_all, gone in pool.run(ranked.leaving, 4, config=SMALL, times=5):
        assert refused_by_all == ["AgreedError"] * 5
        assert gone == [True] * 5
    for refused_by_all, gone in pool.run(ranked.left_alone, 4, config=SMALL):
        assert refused_by_all in (["SdconvError"], ["closed"])
        assert gone == [True]


@pytest.mark.slow
def test_a_limit_for_each_rank(pool: Pool, tmp_path: Path) -> None:
    """A limit that one rank cannot meet is an error on all; a lower one is met with a file."""
    found = pool.run(ranked.limited, 2, config=SMALL, folder=str(tmp_path))
    for message, equal, spilled in found:
        assert "memory_limit: the memory limit cannot be met" in message
        assert equal and spilled > 0


def test_without_torch_distributed() -> None:
    assert not dist.is_initialized()
    network: Any = seeded.network(SMALL)
    with pytest.raises(sdconv.SdconvError, match="is not initialised") as raised:
        network.enable_parallel()
    assert "torchrun" in str(raised.value)
    assert network.streaming is None
    network.enable_streaming()
    network.disable_parallel()
    assert network.streaming is not None, "streaming in this process is left alone"


# --- a rank that ends


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "failed", "stopped"])
def test_a_rank_that_ends_ends_the_others(end: str, tmp_path: Path) -> None:
    """Killed; failed with an error of its own while it lives on; and stopped, which only time can
    tell, here four seconds."""
    pool = Pool(3, tmp_path)
    try:
        pool.start(ranked.ending, 3, config=SMALL, end=end)
        answers = pool.answers(2 if end == "killed" else 3)
    finally:
        pool.close()
    survivors = [answer for answer in answers if answer[0] != "ended"]
    assert len(survivors) == 2
    for text, seconds, again in survivors:
        assert "another rank ended, or did not answer in time" in text
        assert seconds < 20
        assert "the ranks are no longer connected" in again
