"""Devices that tensors can be placed on."""

from __future__ import annotations

import torch

from sdconv.errors import InputError


def usable_device(device: str | torch.device) -> torch.device:
    """The torch device of that name, if a tensor can be placed on it.

    Raises:
        InputError: there is no such device here.
    """
    try:
        found = torch.device(device)
        torch.empty(1, device=found).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise InputError(
            "no such device here",
            where="device",
            expected="cpu, or cuda where torch finds a GPU",
            got=f"{device!r}: {str(error).splitlines()[0]}",
            hint="leave the device out",
        ) from error
    return found
