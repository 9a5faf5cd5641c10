"""A small U-Net to merge into: diffusers', sdconv's, and a copy of sdconv's for each test."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from helpers import unets


@pytest.fixture(scope="module")
def peer() -> Any:
    return unets.theirs(unets.smallest("SD1"))


@pytest.fixture(scope="module")
def built(peer: Any) -> Any:
    return unets.ours(peer)


@pytest.fixture
def network(built: Any) -> Any:
    return copy.deepcopy(built)
