"""Updates that are added to a weight: products of small matrices, and whole differences.

A convolution's weight is ``(out, in, kH, kW)``, a linear layer's ``(out, in)``. The rank is ``r``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sdconv.lora.updates import Update, has_shape


class LoRA(Update):
    """``factor * up @ down``: LoRA, and LoCon for convolutions.

    ``up`` is ``(out, r)``. ``down`` is ``(r, in)``, for a convolution ``(r, in, kH, kW)``, unless
    the kernel is in ``mid``, ``(r, r, kH, kW)`` (LyCORIS' CP decomposition).

    Hu et al. 2021, https://arxiv.org/abs/2106.09685; LyCORIS' ``modules/locon.py``.
    """

    def fits(self, shape: Sequence[int]) -> bool:
        up, down, mid = self.tensors["up"], self.tensors["down"], self.tensors.get("mid")
        if len(shape) < 2 or not down.ndim:
            return False
        rank = down.shape[0]
        point, kernel = (1,) * len(shape[2:]), tuple(shape[2:])
        if mid is None:
            return has_shape(up, (shape[0], rank), point) and has_shape(
                down, (rank, shape[1]), kernel
            )
        return (
            has_shape(up, (shape[0], *mid.shape[:1]), point)
            and has_shape(mid, (*mid.shape[:1], rank), kernel)
            and has_shape(down, (rank, shape[1]), point)
        )

    def delta(self, original: Tensor, scale: float) -> Tensor:
        own = self._to(original)
        up = own["up"].flatten(1) * (self.factor * scale)  # cheaper than scaling the product
        down = own["down"].flatten(1)
        if "mid" not in own:
            return (up @ down).reshape(original.shape)
        return _with_kernel(own["mid"], up, down).reshape(original.shape)

    @property
    def width(self) -> int | None:
        down = self.tensors["down"]
        return down.shape[1] if down.ndim > 1 else None


class LoHa(Update):
    """``factor * (w1_a @ w1_b) * (w2_a @ w2_b)``, the product of two low-rank matrices' elements.

    Without ``t1`` and ``t2`` the ``a`` are ``(out, r)`` and the ``b`` ``(r, in * kH * kW)``. With
    them, which are ``(r, r, kH, kW)``, the ``a`` are ``(r, out)`` and the ``b`` ``(r, in)``.

    Hyeon-Woo et al. 2021 (FedPara), https://arxiv.org/abs/2108.06098; LyCORIS' ``modules/loha.py``
    and PEFT's ``tuners/loha``.
    """

    def fits(self, shape: Sequence[int]) -> bool:
        own = self.tensors
        return len(shape) >= 2 and all(
            _low_rank_fits(own[f"hada_w{n}_a"], own[f"hada_w{n}_b"], own.get(f"hada_t{n}"), shape)
            for n in (1, 2)
        )

    def delta(self, original: Tensor, scale: float) -> Tensor:
        own = self._to(original)
        one, two = (
            _low_rank(own[f"hada_w{n}_a"], own[f"hada_w{n}_b"], own.get(f"hada_t{n}"))
            for n in (1, 2)
        )
        return (one * two * (self.factor * scale)).reshape(original.shape)

    @property
    def width(self) -> int | None:
        right = self.tensors["hada_w1_b"]
        return right.shape[1] if right.ndim > 1 else None


class LoKr(Update):
    """``factor * kron(w1, w2)``, where either may be a product ``a @ b``.

    ``w1`` is ``(p, q)`` and ``w2`` ``(out / p, in / q, kH, kW)``. As products: ``w1_a`` ``(p, r)``
    and ``w1_b`` ``(r, q)``; ``w2_a`` ``(out / p, r)`` and ``w2_b`` ``(r, in / q * kH * kW)``, or,
    with ``t2``, ``(r, r, kH, kW)``, these are ``(r, out / p)`` and ``(r, in / q)``.

    Edalati et al. 2022 (KronA), https://arxiv.org/abs/2212.10650; LyCORIS' ``modules/lokr.py`` and
    PEFT's ``tuners/lokr``.
    """

    def fits(self, shape: Sequence[int]) -> bool:
        if len(shape) < 2:
            return False
        left = self._sides("lokr_w1", (shape[0], shape[1]))
        if left is None or shape[0] % left[0] or shape[1] % left[1]:
            return False
        rest = (shape[0] // left[0], shape[1] // left[1], *shape[2:])
        own = self.tensors
        if "lokr_w2" in own:
            return has_shape(own["lokr_w2"], (rest[0], rest[1]), rest[2:])
        return _low_rank_fits(own["lokr_w2_a"], own["lokr_w2_b"], own.get("lokr_t2"), rest)

    def delta(self, original: Tensor, scale: float) -> Tensor:
        own = self._to(original)
        left, right = (
            own[f"lokr_{w}"]
            if f"lokr_{w}" in own
            else _low_rank(own[f"lokr_{w}_a"], own[f"lokr_{w}_b"], own.get(f"lokr_{t}"))
            for w, t in (("w1", "t1"), ("w2", "t2"))
        )
        product = torch.kron(left * (self.factor * scale), right.flatten(1).contiguous())
        return product.reshape(original.shape)

    def _sides(self, name: str, most: tuple[int, int]) -> tuple[int, int] | None:
        """The sides of ``w1``, if they are those of a matrix no larger than ``most``."""
        whole = self.tensors.get(name)
        if whole is None:
            left, right = self.tensors[f"{name}_a"], self.tensors[f"{name}_b"]
            if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
                return None
            sides = (left.shape[0], right.shape[1])
        elif whole.ndim == 2:
            sides = (whole.shape[0], whole.shape[1])
        else:
            return None
        return sides if 0 < sides[0] <= most[0] and 0 < sides[1] <= most[1] else None


class GLoRA(Update):
    """``factor * (W @ a1 @ a2 + b1 @ b2)``: a low-rank change of the weight's input, and a LoRA.

    ``a1`` is ``(in, r)``, ``a2`` ``(r, in)``, ``b1`` ``(out, r)`` and ``b2`` ``(r, in, kH, kW)``;
    with ``bm``, ``(r, r, kH, kW)``, ``b2`` is ``(r, in)``. LyCORIS' first files mean
    ``W @ a2 @ a1 + b2 @ b1``; shapes that allow both are taken to be today's.

    Chavan et al. 2023, https://arxiv.org/abs/2306.07967; LyCORIS' ``modules/glora.py``.
    """

    def fits(self, shape: Sequence[int]) -> bool:
        return len(shape) >= 2 and self._ordered(shape) is not None

    def delta(self, original: Tensor, scale: float) -> Tensor:
        ordered = self._ordered(original.shape)
        assert ordered is not None
        a1, a2, b1, b2 = (one.to(original).flatten(1) for one in ordered)
        mid = self.tensors.get("bm")
        added = b1 @ b2 if mid is None else _with_kernel(mid.to(original), b1, b2)
        mixed = torch.einsum("oi...,ij->oj...", original, a1)
        mixed = torch.einsum("oi...,ij->oj...", mixed, a2)
        return (mixed + added.reshape(original.shape)) * (self.factor * scale)

    def _ordered(self, shape: Sequence[int]) -> tuple[Tensor, ...] | None:
        """``a1, a2, b1, b2`` in today's order; None if no order fits."""
        a1, a2, b1, b2 = (self.tensors[role] for role in ("a1", "a2", "b1", "b2"))
        for one in ((a1, a2, b1, b2), (a2, a1, b2, b1)):
            inner = LoRA(kind="", tensors={"up": one[0], "down": one[1]})
            tensors = {"up": one[2], "down": one[3]}
            if "bm" in self.tensors:
                tensors["mid"] = self.tensors["bm"]
            outer = LoRA(kind="", tensors=tensors)
            if inner.fits((shape[1], shape[1])) and outer.fits(shape):
                return one
        return None


class Difference(Update):
    """``factor * difference``: a whole difference of a weight, norm or bias, of the same shape."""

    @property
    def _difference(self) -> Tensor:
        return next(iter(self.tensors.values()))

    def fits(self, shape: Sequence[int]) -> bool:
        return tuple(self._difference.shape) == tuple(shape)

    def delta(self, original: Tensor, scale: float) -> Tensor:
        return self._difference.to(original) * (self.factor * scale)

    @property
    def width(self) -> int | None:
        return self._difference.shape[1] if self._difference.ndim > 1 else None


def _low_rank(left: Tensor, right: Tensor, kernel: Tensor | None) -> Tensor:
    """``left @ right`` as ``(out, in * kH * kW)``; with a kernel ``left`` is transposed."""
    if kernel is None:
        return left @ right.flatten(1)
    return _with_kernel(kernel, left.T, right).flatten(1)


def _with_kernel(kernel: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``(out, r)``, ``(r, r, kH, kW)`` and ``(r, in)`` as ``(out, in, kH * kW)``."""
    return torch.einsum("oi,ijk,jc->ock", left, kernel.flatten(2), right)


def _low_rank_fits(
    left: Tensor, right: Tensor, kernel: Tensor | None, shape: Sequence[int]
) -> bool:
    """Whether ``_low_rank`` of them has the elements of a weight of this shape, in its order."""
    if left.ndim != 2 or right.ndim < 2:
        return False
    if kernel is None:
        columns = math.prod(right.shape[1:])
        flat = right.ndim == 2 or has_shape(right, (right.shape[0], shape[1]), tuple(shape[2:]))
        return left.shape == (shape[0], right.shape[0]) and columns == math.prod(shape[1:]) and flat
    return (
        right.ndim == 2
        and left.shape[1] == shape[0]
        and right.shape[1] == shape[1]
        and has_shape(kernel, (left.shape[0], right.shape[0]), tuple(shape[2:]))
    )
