"""Updates that rescale a weight: (IA)3, and DoRA, which rescales a weight after an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdconv.lora.updates import Update


@dataclass(frozen=True, kw_only=True, eq=False)
class Rescaling(Update):
    """(IA)3: ``W * (1 + scale * (vector - neutral))`` along one axis.

    ``axis``: 0 for the outputs, 1 for the inputs. ``neutral``: the value that changes nothing, 0 in
    LyCORIS' files and 1 in PEFT's.

    Liu et al. 2022, https://arxiv.org/abs/2205.05638; LyCORIS' ``modules/ia3.py`` and PEFT's
    ``tuners/ia3``.
    """

    axis: int
    neutral: float

    @property
    def _vector(self) -> Tensor:
        return next(iter(self.tensors.values()))

    def fits(self, shape: Sequence[int]) -> bool:
        return (
            len(shape) > self.axis
            and self._vector.numel() == shape[self.axis]
            and self._vector.numel() == max(self._vector.shape, default=1)
        )

    def delta(self, original: Tensor, scale: float) -> Tensor:
        change = (self._vector.to(original).flatten() - self.neutral) * scale
        along = [1] * original.ndim
        along[self.axis] = -1
        return original * change.view(along)


@dataclass(frozen=True, kw_only=True, eq=False)
class DoRA(Update):
    """``scale * (magnitude * V / norm(V) - W)`` with ``V = W + update``: the trained magnitude of
    each output's (or input's) weights, and the direction after an update with scale 1.

    ``inner``: the update. LyCORIS' ``dora_scale`` has a value for each output, ``(out, 1, ...)``,
    or for each input, ``(1, in, 1, ...)``; PEFT's ``magnitude`` has one for each output, ``(out,)``
    for linear layers and ``(1, out, 1, 1)`` for convolutions. The norm is over all other axes.

    The scale interpolates between the original and the trained weight, as in LyCORIS'
    ``apply_dora_scale``. (LyCORIS' modules scale the magnitude's share alone, and PEFT's the update
    within the norm; both leave something at scale 0. All agree at 1.)

    Liu et al. 2024, https://arxiv.org/abs/2402.09353; LyCORIS' ``functional/general.py`` and PEFT's
    ``tuners/lora/dora.py``.
    """

    inner: Update

    def fits(self, shape: Sequence[int]) -> bool:
        return self.inner.fits(shape) and self._axis(shape) is not None

    def delta(self, original: Tensor, scale: float) -> Tensor:
        changed = original + self.inner.delta(original, 1.0)
        others = [axis for axis in range(changed.ndim) if axis != self._axis(changed.shape)]
        norms = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
        norms += torch.finfo(norms.dtype).eps  # LyCORIS'; a row of zeros stays one
        magnitude = self._magnitude.to(original).reshape(norms.shape)
        trained: Tensor = changed * (magnitude / norms)
        return (trained - original) * scale

    @property
    def width(self) -> int | None:
        return self.inner.width

    @property
    def _magnitude(self) -> Tensor:
        return next(
            self.tensors[role] for role in ("magnitude", "dora_scale") if role in self.tensors
        )

    def _axis(self, shape: Sequence[int]) -> int | None:
        """The weight's axis along which the magnitude has its values; None if it fits neither."""
        out, given = shape[0], tuple(self._magnitude.shape)
        ones = (1,) * (len(shape) - 2)
        if given in ((out,), (out, 1, *ones)) or (
            "magnitude" in self.tensors and given == (1, out, *ones)
        ):
            return 0
        return 1 if given == (1, shape[1], *ones) else None
