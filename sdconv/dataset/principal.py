"""Principal axes of a data set's features, the same for all its images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from safetensors.torch import load, save
from torch import Tensor

from sdconv.dataset.store import AXES, Store
from sdconv.features.reduction import channel_axis


@dataclass(frozen=True)
class PrincipalAxes:
    """The directions of the largest variance over the channels of a hook point.

    Attributes:
        mean: ``(C,)``. axes: ``(C, components)``, the largest variance first; each one's largest
            weight is positive.
    """

    mean: Tensor
    axes: Tensor

    IMAGES: ClassVar[int] = 64
    """The most images that the axes are found from: the first that can be decoded of those that are
    spread evenly over the plan, and of the others if these are too few."""

    def project(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, components, H, W)``."""
        axis = channel_axis(x)
        rows = x.movedim(axis, -1).float() - self.mean.to(x.device)
        return (rows @ self.axes.to(x.device)).movedim(-1, axis)

    @classmethod
    def read_or_fit(
        cls, store: Store, components: int, images: Callable[[], Iterator[Mapping[str, Tensor]]]
    ) -> dict[str, PrincipalAxes]:
        """The axes of each hook point: those in the folder, or else of these images, which are then
        written to it.

        Args:
            store: the data set's folder.
            components: their number.
            images: yields feature maps ``(C, H, W)`` by the names of the hook points; what follows
                an ``@`` in a name is left out.
        """
        path = store.folder / AXES
        if not path.exists():
            tensors = _fit(images(), components)
            if not tensors:  # no image can be decoded: none needs axes
                return {}
            store.write(AXES, lambda file: file.write(save(tensors)))
        found = load(path.read_bytes())
        names = {name.rpartition(":")[0] for name in found}
        return {name: cls(found[f"{name}:mean"], found[f"{name}:axes"]) for name in names}


def _fit(images: Iterator[Mapping[str, Tensor]], components: int) -> dict[str, Tensor]:
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}
    for maps in images:
        for label, x in maps.items():
            name = label.partition("@")[0]
            axis = channel_axis(x[None])
            rows = x[None].movedim(axis, -1).reshape(-1, x[None].shape[axis]).double()
            count, total, products = sums.get(name, (0, 0, 0))
            sums[name] = (count + len(rows), total + rows.sum(0), products + rows.mT @ rows)
    tensors = {}
    for name, (count, total, products) in sums.items():
        mean = total / count
        _, axes = torch.linalg.eigh(products / count - torch.outer(mean, mean))  # ascending
        axes = axes[:, -components:].flip(-1)
        sign = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        tensors[f"{name}:mean"] = mean.float().contiguous()
        tensors[f"{name}:axes"] = (axes * sign).float().contiguous()
    return tensors
