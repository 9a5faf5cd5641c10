"""The pool of feature maps: what is reused, what never is, and that all memory is offered to the
system, or returned."""

from __future__ import annotations

import copy
import gc
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded

import sdconv
from sdconv.fast.cpu import buffer_pool
from sdconv.fast.cpu.buffer_pool import empty_nhwc, use_pool

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, which resizes blocks")

# feature maps of 16 MiB, large enough for the pool, and of twice as much
SMALL, LARGE = (1, 64, 256, 256), (1, 128, 256, 256)


@pytest.fixture(autouse=True)
def nothing_offered() -> None:
    """No blocks of earlier tests."""
    gc.collect()
    buffer_pool._offer.take()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def offered() -> int:
    """Bytes that the system may take."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("LazyFree"))


def test_the_next_feature_map_reuses_the_memory_of_one_that_is_gone() -> None:
    with use_pool():
        first = empty_nhwc(*SMALL, torch.float32)
        assert first.shape == SMALL and first.is_contiguous(memory_format=torch.channels_last)
        where = first.data_ptr()
        second = empty_nhwc(*SMALL, torch.float32)
        assert second.data_ptr() != where, "the control: the first one is still there"
        view = first[:, :8]
        del first
        other = empty_nhwc(*SMALL, torch.float32)
        assert other.data_ptr() != where, "a view keeps it"
        del view
        assert empty_nhwc(*SMALL, torch.float32).data_ptr() == where


def test_a_larger_block_is_used_and_a_smaller_one_grows() -> None:
    with use_pool():
        where = empty_nhwc(*LARGE, torch.float32).data_ptr()
        small = empty_nhwc(*SMALL, torch.float32)
        assert small.data_ptr() == where, "the larger one"
        other = empty_nhwc(*SMALL, torch.float32)
        count = other.fill_(1).numel()
        del other
        large = empty_nhwc(*LARGE, torch.float32)
        numbers = large.permute(0, 2, 3, 1).flatten()
        assert numbers[:count].eq(1).all(), "the pages that were there"
        assert numbers[count:].eq(0).all(), "new ones, which the system has cleared"


def test_a_feature_map_that_outlives_the_pool_keeps_its_values() -> None:
    with use_pool():
        kept = empty_nhwc(*SMALL, torch.float32).fill_(3)
        gone = empty_nhwc(*SMALL, torch.float32)
        where = gone.data_ptr()
        del gone
    with use_pool():
        new = [empty_nhwc(*SMALL, torch.float32).fill_(4) for _ in range(3)]
        assert all(kept.data_ptr() != one.data_ptr() for one in new)
    assert kept.eq(3).all() and where


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_all_memory_is_returned_or_offered_at_the_end(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is offered counts as resident until the system needs it."""

    monkeypatch.setattr(buffer_pool, "_limit", lambda: limit)
    outlives: list[torch.Tensor] = []
    gc.collect()
    before, offered_before = resident(), offered()
    for error in (False, True):
        with pytest.raises(KeyError) if error else use_pool():
            with use_pool():
                outlives.append(empty_nhwc(*LARGE, torch.float32).fill_(1))
                empty_nhwc(*LARGE, torch.float32).fill_(1)
                assert resident() - offered() > before + 50 * 2**20, "the control"
            if error:
                raise KeyError
        outlives.clear()
        gc.collect()
        assert resident() - (offered() - offered_before) < before + 24 * 2**20
        # but for the feature map that outlived its pool, whose block is returned
        assert bool(limit) == (offered() > offered_before + 24 * 2**20)


def test_the_next_pool_finds_the_blocks_of_the_one_before() -> None:
    with use_pool():
        where = empty_nhwc(*SMALL, torch.float32).fill_(1).data_ptr()
    with use_pool():
        found = empty_nhwc(*SMALL, torch.float32)
        assert found.data_ptr() == where
        taken: list[bool] = []
        thread = threading.Thread(target=lambda: taken.append(bool(buffer_pool._offer.take())))
        thread.start()
        thread.join()
        assert taken == [False], "no other pool finds them"


def test_a_small_feature_map_does_not_keep_a_large_block() -> None:
    with use_pool():
        empty_nhwc(*LARGE, torch.float32).fill_(1)
        before = offered()
        kept = empty_nhwc(*SMALL, torch.float32).fill_(2)
        assert offered() == before, "the control"
    half = kept.numel() * 4
    assert offered() >= before + half - 2**20
    assert kept.eq(2).all()


# Python 3.12 warns of forks next to threads, such as torch's
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_process_has_a_lock_of_its_own() -> None:
    """The lock is held while the process forks, as by another thread."""
    with buffer_pool._offer._lock:
        child = os.fork()
        if child == 0:
            lock = buffer_pool._offer._lock
            acquired: list[bool] = []
            thread = threading.Thread(target=lambda: acquired.append(lock.acquire(timeout=5)))
            thread.start()
            thread.join()
            os._exit(0 if acquired == [True] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_memory_can_be_released_at_once() -> None:
    with use_pool():
        empty_nhwc(*LARGE, torch.float32).fill_(1)
    before = resident()
    buffer_pool.release_memory()
    assert resident() < before - 24 * 2**20
    assert not buffer_pool._offer.take()


def test_no_more_is_offered_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer_pool, "_limit", lambda: 50 << 20)
    with use_pool():
        maps = [empty_nhwc(*size, torch.float32) for size in (SMALL, SMALL, LARGE, SMALL)]
        del maps
    assert [len(block) >> 20 for block in buffer_pool._offer.take()] == [32, 16]


def test_each_thread_has_its_own_pool() -> None:
    found: list[bool] = []
    with use_pool():
        where = empty_nhwc(*SMALL, torch.float32).data_ptr()
        thread = threading.Thread(target=lambda: found.append(buffer_pool._thread.pool is None))
        thread.start()
        thread.join()
        assert found == [True]
        assert empty_nhwc(*SMALL, torch.float32).data_ptr() == where


@torch.no_grad()
def test_captured_feature_maps_are_not_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the pool take feature maps of any size."""
    network: Any = seeded.network(seeded.kl((32, 64), 4, True))
    other = copy.deepcopy(network)
    z = torch.randn(1, 4, 24, 20)
    with sdconv.backend("fast"):
        expected = network.decode(z).sample
        with sdconv.capture(network.decoder, "*.resnets.*") as maps:
            network.decode(z)
        plain = {name: maps[name].clone() for name in maps}
        monkeypatch.setattr(buffer_pool, "_LARGE", 0)
        assert torch.equal(other.decode(z).sample, expected)
        with sdconv.capture(other.decoder, "*.resnets.*") as maps:
            other.decode(z)
    assert plain and all(torch.equal(maps[name], plain[name]) for name in plain)


def test_scratch_memory_of_a_call_in_inference_mode_can_be_written_outside_of_it() -> None:
    name = "inference mode"
    with torch.inference_mode():
        inside = buffer_pool.scratch.take(name, (2, 3), torch.float32)
        assert torch.empty(1).is_inference()  # as the view would be
    with torch.no_grad():
        outside = buffer_pool.scratch.take(name, (2, 3), torch.float32).copy_(torch.ones(2, 3))
    assert outside.data_ptr() == inside.data_ptr()
