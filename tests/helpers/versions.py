"""What the oldest versions of sdconv's dependencies cannot do."""

from __future__ import annotations

import pytest
import torch


def fails_on_torch_2_6(reason: str) -> pytest.MarkDecorator:
    """Skips a test on torch 2.6, for a reason."""
    return pytest.mark.skipif(torch.__version__.startswith("2.6."), reason=f"torch 2.6: {reason}")


# where torch is a CUDA build, some fake convolutions ask the driver for their algorithm
needs_driver = pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="needs a CUDA driver, or torch's CPU build",
)
