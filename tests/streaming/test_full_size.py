"""Streaming of the full-size VAE, which uses the same kernels as in practice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded
from helpers.numbers import error
from helpers.paths import ROOT
from helpers.streamed import call, executed, planned, randn

from sdconv.fast import blocks
from sdconv.models.vae import AutoencoderKL

SHAPES = [("decode", (1, 4, 32, 40)), ("encode", (1, 3, 256, 320))]


@pytest.fixture(scope="module")
def network() -> AutoencoderKL:
    config = seeded.kl((128, 256, 512, 512), 4, True, layers_per_block=2)
    return seeded.network(config).requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize(("direction", "shape"), SHAPES)
def test_the_fast_backend_rounds_as_unstreamed(
    network: AutoencoderKL, direction: str, shape: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = randn(*shape)
    streamed = executed(planned(network, direction, x, rows=3, spill=False), x)
    assert error(executed(planned(network, direction, x, rows=2, spill=False), x), streamed) < 1e-6
    assert error(call(network, direction, x), streamed) < 1e-6
    # the fault: two layers by the reference's kernels
    monkeypatch.setattr(blocks, "is_eager", lambda *_: False)
    monkeypatch.setattr(blocks, "is_conv3x3", lambda *_, stride=1, **__: stride == 1)
    other_kernels = error(call(network, direction, x), streamed)
    assert 2e-6 < other_kernels < 1e-4, "the control: other kernels round visibly differently"
    assert torch.isfinite(streamed).all()


@pytest.mark.slow
@pytest.mark.parametrize(("direction", "shape"), SHAPES)
def test_the_reference_backend_gives_the_unstreamed_numbers(
    network: AutoencoderKL, direction: str, shape: Any
) -> None:
    x = randn(*shape)
    with torch.no_grad():
        whole = call(network, direction, x, "reference")
        network.enable_streaming("3GiB")
        streamed = call(network, direction, x, "reference")
        network.disable_streaming()
    assert error(streamed, whole) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
@pytest.mark.parametrize(
    ("direction", "backend", "dtype", "side", "limit"),
    [
        ("decode", "fast", "float32", 768, "1GiB"),
        ("encode", "fast", "float32", 768, "1GiB"),
        ("decode", "fast", "bfloat16", 768, "512MiB"),
        ("decode", "reference", "float32", 512, "768MiB"),
    ],
)
def test_the_peak_is_what_was_planned(
    direction: str, backend: str, dtype: str, side: int, limit: str, tmp_path: Path
) -> None:
    """Measured without the weights, in a process that has computed nothing before."""
    script = ROOT / "scripts" / "bench" / "streaming.py"
    options = f"--work {direction} --size {side}x{side} --memory {limit} --backend {backend}"
    command = [sys.executable, str(script), *options.split(), "--dtype", dtype, "--rounds", "0"]
    command += ["--spill", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["finite"]
    assert found["planned_peak"] <= found["memory_limit"]
    assert 0.85 < found["peak"] / found["planned_peak"] < 1.15
