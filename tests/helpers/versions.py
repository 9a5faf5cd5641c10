"""What the oldest versions of sdconv's dependencies cannot do."""

from __future__ import annotations

import diffusers
import pytest
import torch
from packaging.version import Version


def fails_on_torch_2_6(reason: str) -> pytest.MarkDecorator:
    """Skips a test on torch 2.6, for a reason."""
    return pytest.mark.skipif(torch.__version__.startswith("2.6."), reason=f"torch 2.6: {reason}")


# before, layers whose rank is not the most frequent one were scaled, unless the file has alphas;
# and before 0.39, layers that kohya's names write with an underscore were left out
needs_diffusers_0_40 = pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.40"),
    reason="diffusers before 0.40 merges some layers of LoRAs wrongly, or not at all",
)

# where torch is a CUDA build, some fake convolutions ask the driver for their algorithm
needs_driver = pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="needs a CUDA driver, or torch's CPU build",
)
