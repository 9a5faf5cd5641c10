"""Memory handed from map to map: what is reused, what never is, and that all of it goes back."""

from __future__ import annotations

import copy
import gc
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded

import sdconv
from sdconv.fast.cpu import buffer_pool as handing
from sdconv.fast.cpu.buffer_pool import blank, handed_on

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: it cuts blocks")

# two maps of 16 MiB, which are large enough, and one twice as large
SMALL, LARGE = (1, 64, 256, 256), (1, 128, 256, 256)


def at(map_: torch.Tensor) -> int:
    return map_.data_ptr()


def test_the_next_map_lies_where_one_that_is_gone_lay() -> None:
    with handed_on():
        first = blank(*SMALL, torch.float32)
        assert first.shape == SMALL and first.is_contiguous(memory_format=torch.channels_last)
        where = at(first)
        beside = blank(*SMALL, torch.float32)
        assert at(beside) != where, "the control: the first one is still there"
        view = first[:, :8]
        del first
        other = blank(*SMALL, torch.float32)
        assert at(other) != where, "a view keeps it"
        del view
        assert at(blank(*SMALL, torch.float32)) == where


def test_a_larger_block_is_cut_and_a_smaller_one_is_not_stretched() -> None:
    with handed_on():
        where = at(blank(*LARGE, torch.float32))
        small = blank(*SMALL, torch.float32)
        assert at(small) == where
        small.fill_(1)
        del small
        large = blank(*LARGE, torch.float32)
        large.fill_(2)
        assert large.sum() == 2 * large.numel()


def test_what_outlives_the_pass_keeps_its_values() -> None:
    with handed_on():
        kept = blank(*SMALL, torch.float32).fill_(3)
        gone = blank(*SMALL, torch.float32)
        where = at(gone)
        del gone
    with handed_on():
        new = [blank(*SMALL, torch.float32).fill_(4) for _ in range(3)]
        assert all(at(kept) != at(one) for one in new)
    assert kept.eq(3).all() and where


def test_nothing_stays_when_the_pass_ends() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    outlives: list[torch.Tensor] = []
    before = resident()
    for error in (False, True):
        with pytest.raises(KeyError) if error else handed_on():
            with handed_on():
                outlives.append(blank(*LARGE, torch.float32).fill_(1))
                blank(*LARGE, torch.float32).fill_(1)
                assert resident() > before + 50 * 2**20, "the control"
            if error:
                raise KeyError
        outlives.clear()
        gc.collect()
        assert resident() < before + 24 * 2**20


def test_threads_have_blocks_of_their_own() -> None:
    found: list[bool] = []
    with handed_on():
        where = at(blank(*SMALL, torch.float32))
        thread = threading.Thread(target=lambda: found.append(handing._thread.blocks is None))
        thread.start()
        thread.join()
        assert found == [True]
        assert at(blank(*SMALL, torch.float32)) == where


@torch.no_grad()
def test_maps_that_a_capture_holds_are_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    network: Any = seeded.network(seeded.kl((32, 64), 4, True))
    other = copy.deepcopy(network)
    z = torch.randn(1, 4, 24, 20)
    with sdconv.backend("fast"):
        expected = network.decode(z).sample
        with sdconv.capture(network.decoder, "*.resnets.*") as maps:
            network.decode(z)
        plain = {name: maps[name].clone() for name in maps}
        monkeypatch.setattr(handing, "_LARGE", 0)
        assert torch.equal(other.decode(z).sample, expected)
        with sdconv.capture(other.decoder, "*.resnets.*") as maps:
            other.decode(z)
    assert plain and all(torch.equal(maps[name], plain[name]) for name in plain)
