"""Updates that rotate a weight: OFT and BOFT, whose blocks are orthogonal matrices.

Qiu et al. 2023 (OFT), https://arxiv.org/abs/2306.07280; Liu et al. 2023 (BOFT),
https://arxiv.org/abs/2311.06243.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdconv.lora.updates import Update


@dataclass(frozen=True, kw_only=True, eq=False)
class _OutputRotation(Update):
    """A rotation of the outputs by ``R = (I + Q) (I - Q)^-1`` with ``Q = blocks - blocks^T``.

    ``constraint``: the file's alpha; where it is positive, the norm of all ``Q`` of the layer is
    at most ``constraint * out``. ``rescale``, ``(out, 1, ...)``, multiplies the rotated rows.

    A scale takes each block to ``I + scale * (R - I)``, as in LyCORIS, and ``rescale`` to
    ``1 + scale * (rescale - 1)``.
    """

    constraint: float = 0.0

    def delta(self, original: Tensor, scale: float) -> Tensor:
        own = self._to(original)
        skew = own["oft_blocks"] - own["oft_blocks"].mT
        most = self.constraint * original.shape[0]
        if most > 0:
            norm = torch.linalg.vector_norm(skew) + 1e-8
            skew = skew * torch.clamp(most / norm, max=1.0)
        identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        rotated = self._rotated(original, identity + scale * (_cayley(skew) - identity))
        if "rescale" in own:
            rotated = rotated * (1 + scale * (own["rescale"] - 1))
        return rotated - original

    def _rotated(self, weight: Tensor, rotations: Tensor) -> Tensor:
        raise NotImplementedError

    def _rescale_fits(self, shape: Sequence[int]) -> bool:
        rescale = self.tensors.get("rescale")
        return rescale is None or tuple(rescale.shape) == (shape[0], *(1 for _ in shape[1:]))


class OFT(_OutputRotation):
    """LyCORIS' and kohya's OFT: ``oft_blocks``, ``(n, b, b)`` with ``n * b = out``, rotate ``n``
    groups of outputs by ``R^T``. LyCORIS' ``modules/diag_oft.py``."""

    def fits(self, shape: Sequence[int]) -> bool:
        blocks = self.tensors["oft_blocks"]
        return (
            len(shape) >= 2
            and blocks.ndim == 3
            and blocks.shape[1] == blocks.shape[2]
            and blocks.shape[0] * blocks.shape[1] == shape[0]
            and self._rescale_fits(shape)
        )

    def _rotated(self, weight: Tensor, rotations: Tensor) -> Tensor:
        groups = weight.reshape(*rotations.shape[:2], *weight.shape[1:])
        return torch.einsum("knm,kn...->km...", rotations, groups).flatten(0, 1)


class BOFT(_OutputRotation):
    """LyCORIS' BOFT: ``oft_blocks``, ``(m, n, b, b)`` with ``n * b = out``, rotate the outputs in
    ``m`` stages, each of which pairs outputs twice as far apart as the one before. A scale changes
    every stage, so that BOFT is not linear in it. LyCORIS' ``modules/boft.py``."""

    def fits(self, shape: Sequence[int]) -> bool:
        blocks = self.tensors["oft_blocks"]
        if len(shape) < 2 or blocks.ndim != 4 or blocks.shape[2] != blocks.shape[3]:
            return False
        return _is_butterfly(blocks.shape, shape[0]) and self._rescale_fits(shape)

    def _rotated(self, weight: Tensor, rotations: Tensor) -> Tensor:
        size, rest = rotations.shape[-1], weight.shape[1:]
        for stage, blocks in enumerate(rotations):
            apart = 2**stage * size // 2
            pairs = weight.reshape(-1, 2, apart, *rest).transpose(1, 2)
            groups = pairs.reshape(-1, size, *rest)
            rotated = torch.einsum("bij,bj...->bi...", blocks, groups)
            weight = rotated.reshape(-1, apart, 2, *rest).transpose(1, 2).flatten(0, 2)
        return weight


class ButterflyInputRotation(Update):
    """PEFT's BOFT: ``boft_R``, ``(m, n, b, b)`` with ``n * b = in * kH * kW``, rotate the weight's
    columns in ``m`` stages by ``R = (I - Q) (I + Q)^-1`` with ``Q = (boft_R - boft_R^T) / 2``;
    ``boft_s``, a value for each output, multiplies the rotated rows.

    A scale takes the weight to ``W + scale * (changed - W)``; PEFT itself has no scale for BOFT.

    PEFT's ``tuners/boft/layer.py``.
    """

    def fits(self, shape: Sequence[int]) -> bool:
        blocks, rescale = self.tensors["boft_R"], self.tensors["boft_s"]
        if len(shape) < 2 or blocks.ndim != 4 or blocks.shape[2] != blocks.shape[3]:
            return False
        return (
            _is_butterfly(blocks.shape, torch.Size(shape[1:]).numel())
            and rescale.numel() == shape[0]
            and rescale.numel() == max(rescale.shape, default=0)
        )

    def delta(self, original: Tensor, scale: float) -> Tensor:
        own = self._to(original)
        skew = (own["boft_R"] - own["boft_R"].mT) / 2
        rows, size = len(original), skew.shape[-1]
        weight = original.flatten(1)
        for stage, blocks in enumerate(_cayley(-skew)):
            half, apart = size // 2, 2**stage
            pairs = weight.reshape(rows, -1, 2, apart, half).transpose(2, 3)
            groups = pairs.reshape(rows, -1, size)
            rotated = torch.einsum("okc,krc->okr", groups, blocks)
            weight = rotated.reshape(rows, -1, apart, 2, half).transpose(2, 3).flatten(1)
        weight = weight * own["boft_s"].reshape(-1, 1)
        return (weight.reshape(original.shape) - original) * scale


@dataclass(frozen=True, kw_only=True, eq=False)
class InputRotation(Update):
    """PEFT's OFT: ``oft_R``, ``(n, b * (b - 1) / 2)``, the upper triangles of skew-symmetric ``Q``,
    rotate ``n`` groups of ``b`` of the weight's ``in * kH * kW`` columns by ``R^T``.

    ``terms``: the number of terms of the Neumann series by which PEFT approximates ``R``; None is
    PEFT's exact ``R = (I - Q) (I + Q)^-1``, whose ``Q`` has the other sign. ``most``: the largest
    norm of each ``Q`` times the square root of their number (COFT); None does not limit it. A
    single block is shared by all groups.

    A scale takes the weight to ``W + scale * (W R^T - W)``; PEFT itself has no scale for OFT.

    PEFT's ``tuners/oft/layer.py``.
    """

    size: int
    terms: int | None
    most: float | None

    def fits(self, shape: Sequence[int]) -> bool:
        triangles = self.tensors["oft_R"]
        if len(shape) < 2 or triangles.ndim != 2:
            return False
        columns = torch.Size(shape[1:]).numel()
        return (
            self.size > 0
            and columns % self.size == 0
            and triangles.shape[0] in (1, columns // self.size)
            and triangles.shape[1] == self.size * (self.size - 1) // 2
        )

    def delta(self, original: Tensor, scale: float) -> Tensor:
        triangles = self.tensors["oft_R"].to(original)
        upper = triangles.new_zeros(len(triangles), self.size, self.size)
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=upper.device)
        upper[:, rows, columns] = triangles
        skew = upper - upper.mT
        if self.most is not None:
            norms = torch.linalg.matrix_norm(skew, keepdim=True)
            most = self.most / len(skew) ** 0.5
            skew = torch.where(norms <= most, skew, skew * (most / norms))
        turned = self._rotations(skew) - torch.eye(self.size, dtype=skew.dtype, device=skew.device)
        groups = original.reshape(len(original), -1, self.size)
        turned = turned.expand(groups.shape[1], -1, -1)
        return (torch.einsum("okc,krc->okr", groups, turned) * scale).reshape(original.shape)

    def _rotations(self, skew: Tensor) -> Tensor:
        if self.terms is None:
            return _cayley(-skew)
        identity = torch.eye(self.size, dtype=skew.dtype, device=skew.device)
        rotations = identity.expand_as(skew).clone()
        if self.terms > 1:
            rotations += 2 * skew
        if self.terms > 2:
            power = skew @ skew
            rotations += 2 * power
            for _ in range(3, self.terms - 1):
                power = power @ skew
                rotations += 2 * power
            rotations += power @ skew  # the last term is not doubled
        return rotations


def _cayley(skew: Tensor) -> Tensor:
    """``(I + Q) (I - Q)^-1``, which is orthogonal for a skew-symmetric ``Q``."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    # inv_ex: what cannot be inverted becomes values that are not finite, not an exception
    inverse: Tensor = torch.linalg.inv_ex(identity - skew).inverse
    return (identity + skew) @ inverse


def _is_butterfly(blocks: Sequence[int], length: int) -> bool:
    """Whether blocks of shape ``(m, n, b, b)`` rotate so many channels in stages of pairs."""
    stages, number, size = blocks[:3]
    return (
        number * size == length
        and size > 0
        and size % 2 == 0
        and 0 < stages <= number.bit_length()
        and length % (2 ** (stages - 1) * size) == 0
    )
