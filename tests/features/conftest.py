"""Folders of diffusers pipelines, each written once."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import pipelines


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind in ("text", "xl", "refiner"):
        found[kind] = tmp_path_factory.mktemp("pipelines") / kind
        pipelines.pipeline(kind).save_pretrained(found[kind])
    return found
