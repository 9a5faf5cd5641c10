"""What all stages are given."""

from __future__ import annotations

from dataclasses import dataclass

# in the order in which they run, each with its share of the time
STAGES = {
    "environment": 0.06,
    "parity": 0.26,
    "tests": 0.14,
    "speed": 0.34,
    "profile": 0.07,
    "streaming": 0.13,
}


@dataclass(frozen=True)
class Options:
    """``device``: "cuda" or "cpu". ``small``: small networks and few sizes, which a CPU computes in
    minutes. ``compiled``: measure what torch.compile makes of the networks, too."""

    device: str = "cuda"
    small: bool = False
    compiled: bool = True


def limit(stage: str, stages: list[str], left: float) -> float:
    """Seconds for a stage: its share of what is left for it and those after it, so that what a
    stage does not need goes to the next ones."""
    shares = [STAGES[name] for name in stages[stages.index(stage) :]]
    return left * shares[0] / sum(shares)
