"""Paths of the checkout's files."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "weights"
DATA = ROOT / "tests" / "data"
TINY_VAE = WEIGHTS / "tiny-vae.safetensors"
