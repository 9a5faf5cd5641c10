"""Commands that torchrun starts once per rank: all compute together, and the first one speaks."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from typing import Annotated

import typer

from sdconv.errors import InputError

Ranks = Annotated[
    bool,
    typer.Option(
        "--ranks",
        help="Compute the image over several processes, a band of rows each: torchrun "
        "--nproc-per-node N -m sdconv ... --ranks. --memory is each one's.",
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        help="With --ranks, how long a process waits for another before it takes it for dead; a "
        "large image, whose attention takes minutes, may need more.",
    ),
]


_LONGEST = 7 * 24 * 3600  # seconds


def join_ranks(device: str, timeout: float) -> str:
    """Connects this process to the others that torchrun has started, until the command ends.

    Args:
        device: ``cpu``, or ``cuda`` for one GPU per process.
        timeout: seconds for which a process waits for another to connect.

    Returns:
        This process's own device.

    Raises:
        InputError: torchrun has not started this process, or ``timeout`` is out of range.
    """
    import torch.distributed as dist

    if not 0 < timeout <= _LONGEST:
        raise InputError(
            "not a number of seconds to wait",
            where="--timeout",
            expected="more than 0, and a week at most",
            got=timeout,
        )
    if not dist.is_torchelastic_launched():
        raise InputError(
            "there are no other processes",
            where="--ranks",
            hint="start the command with torchrun --nproc-per-node N -m sdconv ... --ranks, or "
            "leave --ranks out",
        )
    on_cpu = device == "cpu"
    dist.init_process_group("gloo" if on_cpu else "nccl", timeout=timedelta(seconds=timeout))
    atexit.register(dist.destroy_process_group)
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device


def is_first_rank() -> bool:
    """Whether this process writes and prints: it is the only one, or the first of several."""
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
