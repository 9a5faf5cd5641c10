"""Layouts of maps as tests want them."""

from __future__ import annotations

import dataclasses
import mmap

from sdconv.streaming.maps import Layout


def half_spilled(layout: Layout) -> Layout:
    """The same with about half of its bytes outside memory, so that maps lie in both."""
    memory = layout.size // 2 // mmap.PAGESIZE * mmap.PAGESIZE
    return dataclasses.replace(layout, memory=memory)
